"""Trains on the instant environment with several layouts in a process of eight devices, and prints the differences."""

from __future__ import annotations

import json
import math

import jax
import numpy as np

from qos_jax.training.loop import train
from qos_jax.training.progress import TrainResult
from qos_jax.training.validation import Validation
from tests.helpers.instant_env import small_learner
from tests.helpers.small_env import small_params

LAYOUTS = ((1, 8, 4), (2, 4, 8))  # seeds, shards, devices to be compared with one
UPDATES = 100


def trained(seeds: int, shards: int, devices: int) -> TrainResult:
    learner, params = small_learner(shards=shards, num_envs=8, capacity=128), small_params()
    return train(
        learner, params, learner.config.hyper, Validation(params, num_envs=2, steps=20),
        steps=UPDATES // learner.config.updates * learner.steps_per_chunk, seeds=range(seeds),
        devices=jax.devices()[:devices] if devices > 1 else (), checkpoint_every_s=math.inf,
    )  # fmt: skip


def main() -> None:
    """Prints the largest difference of a weight for each layout."""
    found = {}
    for seeds, shards, devices in LAYOUTS:
        alone, other = trained(seeds, shards, 1), trained(seeds, shards, devices)
        differences = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), alone.weights, other.weights)
        found[f"{seeds} seeds, {shards} shards, {devices} devices"] = max(jax.tree.leaves(differences))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
