"""Tunes the router impact_greedy on training seeds: the width of its logistic, its price and its temperature.

python -m experiments.tune_impact --presets=paper-3,edge-8 --seeds=5
python -m experiments.tune_impact --staleness=0.5 --widths_ms=1,2,4 --prices=0.1,0.2 --temperatures=0,0.02,0.05,0.1

Evaluations use the seeds from 1000 on, so they are independent of the tuning.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from qos_jax.evaluation.evaluate import evaluate, scenarios
from qos_jax.programs.app import FlagGroup, run_program
from qos_jax.programs.compilation_cache import use_cache
from qos_jax.programs.world_flags import numbers
from qos_jax.routers import Router
from qos_jax.routers.impact_greedy import impact_greedy
from qos_jax.worlds.build import make

_FIRST_TEST_SEED = 1000
_ORACLE = {"kind": "oracle", "information": "true_scores_and_tokens", "length_cv": 0.05}

Setting = tuple[str, str, str]  # width in ms/token, price and temperature, as the flags have them


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    group = FlagGroup(values, "tune_impact")
    group.texts("presets", ["paper-3", "edge-8"], "Presets to tune on.")
    group.texts("load", ["0.45", "0.6", "0.75", "0.9", "1.1", "1.3"], "Loads to tune on.")
    group.texts("widths_ms", ["0.5", "0.7", "1", "1.5", "2"], "Widths of the logistic, ms/token.")
    group.texts("prices", ["-0.1", "0", "0.1", "0.2"], "QoS gains below which the router drops a request.")
    group.texts("temperatures", ["0"], "Temperatures under stale metrics, QoS; 0 takes the best placement.")
    group.number("staleness", 0.0, "Routers observe metrics at least this many seconds late.", 0.0)
    group.boolean("oracle", False, "Tune the oracle, which observes true scores and lengths.")
    group.integer("seeds", 5, "Number of seeds.", 1, _FIRST_TEST_SEED)
    group.integer("requests", 2500, "Requests of each load and seed.", 10)


def main(values: flags.FlagValues) -> None:
    """Prints the mean QoS of each setting by preset, and the best setting over all presets."""
    settings = list(itertools.product(values.widths_ms, values.prices, values.temperatures))
    routers = [_router(setting, _ORACLE if values.oracle else {}) for setting in settings]
    totals, loads = np.zeros(len(settings)), numbers("load", values.load)
    for preset in values.presets:
        qos = mean_qos(preset, routers, loads, values.seeds, values.requests, values.staleness)
        totals += qos.mean(-1) / len(values.presets)
        print(f"{preset}: mean QoS at loads {', '.join(values.load)}, and their mean")
        for setting, row in zip(settings, qos, strict=True):
            cells = "  ".join(f"{value:.3f}" for value in row)
            print(f"  {_text(setting)}   {cells}   {row.mean():.4f}", flush=True)
    print(f"best over all: {_text(settings[int(totals.argmax())])}, mean QoS {totals.max():.4f}")


def _router(setting: Setting, fields: dict[str, Any]) -> Router:
    width_ms, price, temperature = map(float, setting)
    return impact_greedy("/".join(setting), width_s=width_ms / 1e3, price=price, temperature=temperature, **fields)


def mean_qos(
    preset: str, routers: Sequence[Router], loads: Sequence[float], seeds: int, requests: int, staleness_s: float = 0.0
) -> np.ndarray:
    """Returns the QoS [routers, loads], the mean over the first training seeds."""
    env, params = make(preset, load=1.0, staleness_s=staleness_s)
    training = scenarios(params, loads, range(seeds))
    runs = evaluate(env, params, routers, training, requests, warmup=requests // 10)
    return np.array([run.metrics["qos"] for run in runs]).reshape(len(routers), len(loads), seeds).mean(-1)


def _text(setting: Setting) -> str:
    width_ms, price, temperature = setting
    return f"width {width_ms:>4} ms  price {price:>4}  temperature {temperature:>4}"


if __name__ == "__main__":
    use_cache()
    run_program(define, main, name="python -m experiments.tune_impact", summary="tunes the router impact_greedy")
