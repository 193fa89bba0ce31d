"""Measures the saturation rate of presets: what load 1 means.

python -m experiments.saturation --preset=paper-3,edge-8 --seeds=5
"""

from __future__ import annotations

import numpy as np
from absl import flags

from qos_jax.programs import common
from qos_jax.sim.capacity import saturation_rate
from qos_jax.worlds.presets import PRESETS, make

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this program."""
    flags.DEFINE_list("preset", list(PRESETS), "Presets to measure.")
    flags.DEFINE_integer("seeds", 5, "How many seeds.", lower_bound=2)


def main(argv: list[str]) -> None:
    """Prints mean and standard error over seeds, beside what the preset has written down."""
    del argv
    for name in FLAGS.preset:
        env, params = make(name, rate_per_s=1.0)
        rates = [saturation_rate(env, params, seed=seed) for seed in range(FLAGS.seeds)]
        error = np.std(rates, ddof=1) / np.sqrt(len(rates))
        written = PRESETS[name].saturation_per_s
        print(f"{name}: {np.mean(rates):.2f} +- {error:.2f} requests/s (written down: {written})", flush=True)


if __name__ == "__main__":
    common.start(define_flags, main)
