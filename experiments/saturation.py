"""Measures the saturation rate of presets, the arrival rate at load 1.

python -m experiments.saturation --preset=paper-3,edge-8 --seeds=5
"""

from __future__ import annotations

import numpy as np
from absl import flags

from qos_jax.programs.app import FlagGroup, run_program
from qos_jax.programs.compilation_cache import use_cache
from qos_jax.sim.capacity import saturation_rate
from qos_jax.worlds.build import make
from qos_jax.worlds.presets import PRESETS


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    group = FlagGroup(values, "saturation")
    group.texts("preset", list(PRESETS), "Presets to measure.")
    group.integer("seeds", 5, "Number of seeds.", 2)


def main(values: flags.FlagValues) -> None:
    """Prints the mean over seeds and its standard error beside the rate that the preset states."""
    for name in values.preset:
        env, params = make(name, rate_per_s=1.0)
        rates = [saturation_rate(env, params, seed=seed) for seed in range(values.seeds)]
        error = np.std(rates, ddof=1) / np.sqrt(len(rates))
        stated = PRESETS[name].saturation_per_s
        print(f"{name}: {np.mean(rates):.2f} +- {error:.2f} requests/s (in the preset: {stated})", flush=True)


if __name__ == "__main__":
    use_cache()
    run_program(define, main, name="python -m experiments.saturation", summary="measures the rate at load 1")
