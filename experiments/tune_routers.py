"""Tunes the parameters of each router that has some, on training seeds, with the same number of trials for all.

python -m experiments.tune_routers --presets=paper-3,edge-8,edge-2026 --seeds=4 --out=runs/tuned

Written is tuned.json with the mean QoS of every trial by preset and load. The best trial of a router is the one that
loses least, on the preset where it loses most, against that router's best trial there: a mean over the presets would
favour those where QoS differs most. The best trials are the defaults in ``qos_jax.routers``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from experiments.tune_impact import mean_qos
from qos_jax.io.files import writable_folder, write_whole
from qos_jax.io.provenance import plain, versions
from qos_jax.programs.app import FlagGroup, run_program
from qos_jax.programs.compilation_cache import use_cache
from qos_jax.programs.world_flags import numbers
from qos_jax.routers import Router, production
from qos_jax.routers.impact_greedy import impact_greedy

_FIRST_TEST_SEED = 1000
TRIALS: dict[str, tuple[Callable[..., Router], dict[str, tuple[Any, ...]]]] = {
    "route_balance": (
        production.route_balance,
        {"latency_weight": (0.0, 0.05, 0.1, 0.3), "least_probability": (0.0, 0.3, 0.5, 0.8)},
    ),
    "multi_factor": (production.multi_factor, {"tolerance": (0.0, 0.01, 0.03, 0.1), "most_kv": (0.5, 0.7, 0.9, 1.0)}),
    "score_threshold": (production.score_threshold, {"threshold": tuple(np.linspace(0.0, 0.15, 16).round(3).tolist())}),
    "latency_scorer": (
        production.latency_scorer,
        {"least_headroom": (False, True), "admit_all": (False, True), "rate": (0.0, 0.005, 0.02, 0.1)},
    ),
    "prefix_affinity": (
        production.prefix_affinity,
        {"least_share": (0.2, 0.4, 0.6, 0.8), "most_ahead": (4, 8, 16, 32)},
    ),
    "impact_greedy": (impact_greedy, {"width_s": (0.5e-3, 1e-3, 2e-3, 4e-3), "price": (0.0, 0.1, 0.2, 0.3)}),
}
"""Router -> what makes it, and the values to try, 16 combinations each."""


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    group = FlagGroup(values, "tune_routers")
    group.texts("routers", list(TRIALS), "Routers to tune.")
    group.texts("presets", ["paper-3", "edge-8", "edge-2026"], "Presets to tune on.")
    group.texts("load", ["0.6", "0.9", "1.1"], "Loads to tune on.")
    group.integer("seeds", 4, "Number of seeds.", 1, _FIRST_TEST_SEED)
    group.integer("requests", 1500, "Requests of each load and seed.", 10)
    group.string("out", "runs/tuned", "Folder for tuned.json.")


def main(values: flags.FlagValues) -> None:
    """Prints the best trial of each router, and writes all of them."""
    folder, loads = writable_folder(values.out), numbers("load", values.load)
    found = {}
    for name in values.routers:
        factory, options = TRIALS[name]
        trials = [dict(zip(options, choice, strict=True)) for choice in itertools.product(*options.values())]
        routers = [factory(**trial) for trial in trials]
        qos = np.array([mean_qos(preset, routers, loads, values.seeds, values.requests) for preset in values.presets])
        best = _least_loss(qos.mean(-1))
        print(f"{name}: {trials[best]}, mean QoS {qos.mean((0, 2))[best]:.4f}", flush=True)
        found[name] = {"best": trials[best], "trials": trials, "qos": qos.tolist()}
        config = {"presets": values.presets, "loads": loads, "seeds": values.seeds, "requests": values.requests}
        result = plain({"config": config, "versions": versions(), "routers": found})
        write_whole(folder / "tuned.json", json.dumps(result, indent=1, allow_nan=False))


def _least_loss(qos: np.ndarray) -> int:
    """Returns the trial, of those with a mean QoS [presets, trials], whose largest loss to the best one is least.

    Of equals it is the one whose mean loss is least.
    """
    loss = qos.max(1, keepdims=True) - qos
    return int(np.lexsort((loss.mean(0), loss.max(0)))[0])


if __name__ == "__main__":
    use_cache()
    run_program(define, main, name="python -m experiments.tune_routers", summary="tunes every router alike")
