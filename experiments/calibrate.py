"""Measures how well the impact estimate predicts what happens, for both forms and three qualities of predictions.

python -m experiments.calibrate --preset=paper-3 --load=0.9 --seeds=4 --out=runs/calibration

The width of the logistic that routes best is not the width with the best probabilities. The latter is chosen by Brier
score on the training seeds from 0 on. All results are of the test seeds from 1000 on.
"""

from __future__ import annotations

import json
import operator
import pathlib
import shlex
import sys
from functools import partial
from typing import Any

import jax
from absl import flags

from qos_jax.errors import InputError
from qos_jax.evaluation.evaluate import evaluate, scenarios
from qos_jax.evaluation.impact_calibration import calibration_of, outcome_of, predict
from qos_jax.impact.estimate import WIDTH_S, ImpactForm
from qos_jax.impact.imagined_world import LENGTH_CV
from qos_jax.io.files import writable_folder, write_whole
from qos_jax.io.provenance import plain, versions
from qos_jax.programs.app import FlagGroup, run_program
from qos_jax.programs.compilation_cache import use_cache
from qos_jax.programs.world_flags import numbers
from qos_jax.report import reliability_plots
from qos_jax.report.pictures import write_figure
from qos_jax.routers import make_router
from qos_jax.worlds.build import make
from qos_jax.worlds.presets import PRESETS

_FORMS: tuple[ImpactForm, ...] = ("analytic", "rollout")
_PREDICTIONS = ("perfect", "realistic", "none")
_FIRST_TEST_SEED = 1000
_PERFECT_LENGTH_CV = 0.05  # of perfect predictions, as for the router oracle_impact
_ALL = "all"  # the routers pooled

Row = dict[str, Any]


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    group = FlagGroup(values, "calibrate")
    group.string("preset", "paper-3", f"World: {', '.join(PRESETS)}.")
    group.number("load", 0.9, "Arrival rate as a fraction of the saturation rate.", 0.0)
    group.texts("routers", ["impact_greedy", "random"], "Routers that make the decisions.")
    group.texts("widths_ms", ["0.1", "0.25", "0.5", "1", "1.5", "3"], "Widths of the logistic to try, ms/token.")
    group.integer("requests", 800, "Requests of each seed.", 50)
    group.integer("removals", 32, "Requests of each run whose violations are counted.", 1)
    group.integer("seeds", 4, "Number of training seeds, and of test seeds.", 1, _FIRST_TEST_SEED)
    group.string("out", "runs/calibration", "Folder for results.json and reliability.png.")


def main(values: flags.FlagValues) -> None:
    """Predicts and compares, prints a table and writes the results."""
    widths_s = [width / 1e3 for width in numbers("widths_ms", values.widths_ms)]
    widths_s = sorted({WIDTH_S, *widths_s})
    if not values.routers:
        raise InputError("--routers= names none; choose some, for instance impact_greedy,random")
    folder = writable_folder(values.out)
    rows = [row for prediction in _PREDICTIONS for row in _rows(values, prediction, widths_s)]
    print(_table(rows))
    _write(folder, values, rows, widths_s)


def _rows(values: flags.FlagValues, prediction: str, widths_s: list[float]) -> list[Row]:
    """Returns the test results of each form, router and width; the best width is chosen on the training seeds."""
    train = _calibrations(values, prediction, widths_s, range(values.seeds))
    test = _calibrations(values, prediction, widths_s, range(_FIRST_TEST_SEED, _FIRST_TEST_SEED + values.seeds))
    rows = []
    for (form, router), by_width in test.items():
        briers = [each["in_time"]["brier"] for each in train[form, _ALL]]
        best = briers.index(min(briers))
        rows += [
            {"prediction": prediction, "form": form, "router": router, "width_s": width_s}
            | {"routing_width": width_s == WIDTH_S, "best_width": w == best}
            | by_width[w]
            for w, width_s in enumerate(widths_s)
        ]
    return rows


def _calibrations(
    values: flags.FlagValues, prediction: str, widths_s: list[float], seeds: range
) -> dict[tuple[ImpactForm, str], list[Row]]:
    """Returns the calibration at each width by form and router, and that of the routers pooled as router "all"."""
    env, params = make(values.preset, load=values.load, prediction=prediction)
    routers = [make_router(name, env, params) for name in dict.fromkeys(values.routers)]
    warmup = _warmup(values)
    runs = evaluate(env, params, routers, scenarios(params, [values.load], seeds), values.requests, warmup=warmup)
    outcomes = [outcome_of(env, params, run, warmup=warmup, removals=values.removals) for run in runs]
    length_cv = _PERFECT_LENGTH_CV if prediction == "perfect" else LENGTH_CV
    groups = {router.name: [r for r, run in enumerate(runs) if run.router is router] for router in routers}
    groups[_ALL] = list(range(len(runs)))
    calibrations: dict[tuple[ImpactForm, str], list[Row]] = {}
    for form in _FORMS:
        predicted = predict(env, params, runs, form, widths_s, length_cv)
        for name, indices in groups.items():
            calibrations[form, name] = calibration_of(
                [outcomes[r] for r in indices], jax.tree.map(operator.itemgetter(indices), predicted)
            )
    return calibrations


def _warmup(values: flags.FlagValues) -> int:
    return values.requests // 10


def _table(rows: list[Row]) -> str:
    """Returns a table of the width with the best probabilities and, for all routers, of the width that routes best."""
    lines = [
        f"{'':36}ms per token           width          in time                     violations caused",
        f"{'predictions form router':36}  corr  bias   MAE     ms    P   share  Brier  base   ECE   corr  pred  real",
    ]
    for row in rows:
        if not (row["best_width"] or (row["routing_width"] and row["router"] == _ALL)):
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


def _write(folder: pathlib.Path, values: flags.FlagValues, rows: list[Row], widths_s: list[float]) -> None:
    config = {name: values[name].value for name in ("preset", "load", "routers", "requests", "removals", "seeds")}
    results = {
        "config": config | {"widths_s": widths_s, "warmup": _warmup(values), "first_seed": _FIRST_TEST_SEED},
        "command": shlex.join(["python", "-m", "experiments.calibrate", *sys.argv[1:]]),
        "versions": versions(),
        "rows": rows,
    }
    write_whole(folder / "results.json", json.dumps(plain(results), indent=1, allow_nan=False))
    shown = [row for row in rows if row["router"] == _ALL]
    write_figure(folder, "reliability", partial(reliability_plots.reliability_curves, shown))
    print(f"written: {folder / 'results.json'}")


if __name__ == "__main__":
    use_cache()
    run_program(
        define, main, name="python -m experiments.calibrate",
        summary="measures how well the impact estimate predicts what happens",
    )  # fmt: skip
