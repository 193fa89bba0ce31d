"""Tunes the impact-greedy router on training seeds: its logistic's width, the price of a place, and its temperature.

python -m experiments.tune_impact --presets=paper-3,edge-8 --seeds=5
python -m experiments.tune_impact --staleness=0.5 --widths_ms=1,2,4 --prices=0.1,0.2 --temperatures=0,0.02,0.05,0.1

Evaluation uses seeds from 1000 on, so nothing here is seen again.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from absl import flags

from qos_jax.evaluation.evaluate import Scenario, evaluate
from qos_jax.programs import common
from qos_jax.routers.impact_greedy import impact_greedy
from qos_jax.worlds.presets import make

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this program."""
    flags.DEFINE_list("presets", ["paper-3", "edge-8"], "Presets to tune on.")
    flags.DEFINE_list("load", ["0.45", "0.6", "0.75", "0.9", "1.1", "1.3"], "Loads to tune on.")
    flags.DEFINE_list("widths_ms", ["0.5", "0.7", "1", "1.5", "2"], "Widths of the logistic, ms/token.")
    flags.DEFINE_list("prices", ["-0.1", "0", "0.1", "0.2"], "Prices of a place, QoS.")
    flags.DEFINE_list("temperatures", ["0"], "Temperatures, QoS; 0 takes the best.")
    flags.DEFINE_float("staleness", 0.0, "Routers see metrics at least this many seconds late.", 0.0)
    flags.DEFINE_bool("oracle", False, "Tune the oracle, which is told the true scores and lengths.")
    flags.DEFINE_integer("seeds", 5, "How many seeds.", 1, 1000)
    flags.DEFINE_integer("requests", 2500, "Requests of each load and seed.", lower_bound=10)


def main(argv: list[str]) -> None:
    """Prints the mean QoS of each setting by preset, and over all."""
    del argv
    told: dict[str, Any] = (
        {"kind": "oracle", "sees": "true_scores_and_tokens", "length_cv": 0.05} if FLAGS.oracle else {}
    )
    settings = list(itertools.product(FLAGS.widths_ms, FLAGS.prices, FLAGS.temperatures))
    routers = [
        impact_greedy(
            "/".join(setting), width_s=float(setting[0]) / 1e3, price=float(setting[1]), temperature=float(setting[2]),
            **told,
        )
        for setting in settings
    ]  # fmt: skip
    totals = np.zeros(len(settings))
    for preset in FLAGS.presets:
        env, params = make(preset, load=1.0, staleness_s=FLAGS.staleness)
        rate_per_s = float(params.saturation_per_s)
        loads = common.numbers("load", FLAGS.load)
        scenarios = [Scenario(load, load * rate_per_s, seed) for load in loads for seed in range(FLAGS.seeds)]
        runs = evaluate(env, params, routers, scenarios, FLAGS.requests, warmup=FLAGS.requests // 10)
        qos = np.array([run.metrics["qos"] for run in runs]).reshape(len(settings), len(loads), FLAGS.seeds).mean(-1)
        totals += qos.mean(-1) / len(FLAGS.presets)
        print(f"{preset}: mean QoS at loads {', '.join(FLAGS.load)}, and their mean")
        for setting, row in zip(settings, qos, strict=True):
            cells = "  ".join(f"{value:.3f}" for value in row)
            print(f"  {_told(setting)}   {cells}   {row.mean():.4f}", flush=True)
    print(f"best over all: {_told(settings[int(totals.argmax())])}, mean QoS {totals.max():.4f}")


def _told(setting: tuple[str, str, str]) -> str:
    width, price, temperature = setting
    return f"width {width:>4} ms  price {price:>4}  temperature {temperature:>4}"


if __name__ == "__main__":
    common.start(define_flags, main)
