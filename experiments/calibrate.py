"""Says how well the impact estimate predicts what then happens, in both forms and for several qualities of predictions.

python -m experiments.calibrate --preset=paper-3 --load=0.9 --seeds=4 --out=runs/calibration

The width of the logistic that routes best is not the one whose probabilities are best. That one, by Brier score, is
chosen on the training seeds from 0 on; everything is then reported on the seeds from 1000 on.
"""

from __future__ import annotations

import io
import json
import math
import operator
import pathlib
import shlex
import sys
from typing import Any

import jax
from absl import flags

from qos_jax.errors import InputError
from qos_jax.evaluation.evaluate import Scenario, evaluate
from qos_jax.evaluation.impact_calibration import calibration_of, outcome_of, predict
from qos_jax.impact.estimate import WIDTH_S, Form
from qos_jax.impact.imagined_world import LENGTH_CV
from qos_jax.io.files import writable_folder, write_whole
from qos_jax.io.provenance import versions
from qos_jax.programs import common
from qos_jax.report import plots
from qos_jax.routers import make_router
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.worlds.presets import PRESETS, make

FLAGS = flags.FLAGS
_FORMS: tuple[Form, ...] = ("analytic", "rollout")
_PREDICTIONS = ("perfect", "realistic", "none")
_FIRST_TEST_SEED = 1000
_KNOWN_LENGTH_CV = 0.05  # where lengths are told, as the oracle has it


def define_flags() -> None:
    """Defines the flags of this program."""
    flags.DEFINE_string("preset", "paper-3", f"World: {', '.join(PRESETS)}.")
    flags.DEFINE_float("load", 0.9, "Arrival rate as a fraction of the fleet's saturation rate.", 0.0)
    flags.DEFINE_list("routers", ["impact_greedy", "random"], "Routers whose decisions are looked at.")
    flags.DEFINE_list("widths_ms", ["0.1", "0.25", "0.5", "1", "1.5", "3"], "Widths of the logistic to try, ms/token.")
    flags.DEFINE_integer("requests", 800, "Requests of each seed.", lower_bound=50)
    flags.DEFINE_integer("removals", 32, "Requests of each run whose violations are counted.", lower_bound=1)
    flags.DEFINE_integer("seeds", 4, "How many seeds to choose the width on, and to report on.", 1, _FIRST_TEST_SEED)
    flags.DEFINE_string("out", "runs/calibration", "Folder for results.json and reliability.png.")


def main(argv: list[str]) -> None:
    """Predicts and compares, prints a table and writes the results."""
    del argv
    widths_s = [width / 1e3 for width in common.numbers("widths_ms", FLAGS.widths_ms)]
    widths_s = sorted({WIDTH_S, *widths_s})
    if not FLAGS.routers:
        raise InputError("--routers= names none; choose some, for instance impact_greedy,random")
    folder = writable_folder(FLAGS.out)
    rows: list[dict[str, Any]] = []
    for prediction in _PREDICTIONS:
        env, params = make(FLAGS.preset, load=FLAGS.load, prediction=prediction)
        train = _calibrations(env, params, prediction, widths_s, range(FLAGS.seeds))
        test = _calibrations(env, params, prediction, widths_s, range(_FIRST_TEST_SEED, _FIRST_TEST_SEED + FLAGS.seeds))
        for form in _FORMS:
            briers = [each["in_time"]["brier"] for each in train[form, "all"]]
            best = briers.index(min(briers))
            for (_, router), each in ((key, each) for key, each in test.items() if key[0] == form):
                rows += [
                    {"prediction": prediction, "form": form, "router": router, "width_s": width_s}
                    | {"routing_width": width_s == WIDTH_S, "best_width": w == best}
                    | each[w]
                    for w, width_s in enumerate(widths_s)
                ]
    print(_table(rows))
    _write(folder, rows, widths_s)


def _write(folder: pathlib.Path, rows: list[dict[str, Any]], widths_s: list[float]) -> None:
    config = {name: FLAGS[name].value for name in ("preset", "load", "routers", "requests", "removals", "seeds")}
    results = {
        "config": config | {"widths_s": widths_s, "warmup": _warmup(), "first_seed": _FIRST_TEST_SEED},
        "command": shlex.join(["python", "-m", "experiments.calibrate", *sys.argv[1:]]),
        "versions": versions(),
        "rows": rows,
    }
    picture = io.BytesIO()
    plots.reliability_curves([row for row in rows if row["router"] == "all"]).savefig(picture, format="png")
    write_whole(folder / "results.json", json.dumps(_strict(results), indent=1, allow_nan=False))
    write_whole(folder / "reliability.png", picture.getvalue())
    print(f"written: {folder / 'results.json'}")


def _warmup() -> int:
    return FLAGS.requests // 10


def _calibrations(
    env: Environment, params: EnvParams, prediction: str, widths_s: list[float], seeds: range
) -> dict[tuple[Form, str], list[dict[str, Any]]]:
    """Returns the calibration at each width by form and router, and of all routers together under the name all."""
    routers = [make_router(name, env.spec.num_experts, params.workload) for name in dict.fromkeys(FLAGS.routers)]
    scenarios = [Scenario(FLAGS.load, FLAGS.load * float(params.saturation_per_s), seed) for seed in seeds]
    runs = evaluate(env, params, routers, scenarios, FLAGS.requests, warmup=_warmup())
    outcomes = [outcome_of(env, params, run, warmup=_warmup(), removals=FLAGS.removals) for run in runs]
    length_cv = _KNOWN_LENGTH_CV if prediction == "perfect" else LENGTH_CV
    of = {router.name: [r for r, run in enumerate(runs) if run.router is router] for router in routers}
    calibrations: dict[tuple[Form, str], list[dict[str, Any]]] = {}
    for form in _FORMS:
        predicted = predict(env, params, runs, form, widths_s, length_cv)
        for name, mine in (of | {"all": list(range(len(runs)))}).items():
            calibrations[form, name] = calibration_of(
                [outcomes[r] for r in mine], jax.tree.map(operator.itemgetter(mine), predicted)
            )
    return calibrations


def _table(rows: list[dict[str, Any]]) -> str:
    """Returns a table of the width whose probabilities are best and, for all routers, of the one that routes best."""
    lines = [
        f"{'':36}ms per token           width          in time                     violations caused",
        f"{'predictions form router':36}  corr  bias   MAE     ms    P   share  Brier  base   ECE   corr  told  real",
    ]
    for row in rows:
        if not (row["best_width"] or (row["routing_width"] and row["router"] == "all")):
            continue
        latency, in_time, caused = row["latency_per_token_s"], row["in_time"], row["violations"]
        star = "*" if row["best_width"] else " "
        cells = [
            f"{row['prediction'] + ' ' + row['form'] + ' ' + row['router']:36}",
            f"{latency['correlation']:6.3f}{1e3 * latency['bias']:+6.1f}{1e3 * latency['mae']:6.1f}  ",
            f"{1e3 * row['width_s']:5.2f}{star}{in_time['predicted']:5.2f}{in_time['realised']:6.2f}",
            f"{in_time['brier']:7.3f}{in_time['base_brier']:6.3f}{in_time['ece']:6.3f}  ",
            f"{caused['correlation']:5.2f}{caused['predicted']:6.2f}{caused['realised']:6.2f}",
        ]
        lines.append(" ".join(cells))
    return "\n".join([*lines, "* the width with the best Brier score on the training seeds"])


def _strict(value: Any) -> Any:
    """Puts null in the place of NaN."""
    if isinstance(value, dict):
        return {name: _strict(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    common.start(define_flags, main)
