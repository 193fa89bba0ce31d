"""Preferences: weights of the reward that a network observes, so that one checkpoint serves an operator's dial.

In training each environment has preferences of its own: it is rewarded by them, and its observations hold them. At run
time they are the memory of the router; another dial needs no other program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from qos_jax.agent.rewards import RewardWeights
from qos_jax.agent.sac import Hyperparameters
from qos_jax.errors import InputError
from qos_jax.io.text_files import number_or_nan, shown
from qos_jax.sim.env import EnvParams
from qos_jax.sim.types import Preferences
from qos_jax.worlds.randomization import PREFERENCES

NAMES = tuple(Preferences.__dataclass_fields__)


def preferences_of(weights: RewardWeights) -> Preferences:
    """Returns the preferences that a reward expresses, [] float32 each."""
    return Preferences(**{name: jnp.float32(getattr(weights, name)) for name in NAMES})


def with_preferences(hyper: Hyperparameters, params: EnvParams) -> Hyperparameters:
    """Returns the numbers of the algorithm with the reward that the preferences of an environment express, if any."""
    if params.preferences is None:
        return hyper
    return hyper.replace(weights=hyper.weights.replace(**vars(params.preferences)))


def checked_preferences(config: Any, given: Mapping[str, Any], place: str) -> Preferences:
    """Returns the preferences of an agent with other values for some of them.

    Args:
      config: the ``AgentConfig``.
      given: weights by name.
      place: that gave them, for messages.

    Raises:
      InputError: a name is unknown, a weight is outside of the range of training, or the agent reads no preferences.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"{place} is {shown(given)}, must be a table of weights by name: {', '.join(NAMES)}")
    if not config.network.with_preferences:
        raise InputError(
            f"{place} is {shown(dict(given))}, must not be given for an agent without preferences: "
            "train one with --randomise=load,arrivals,preferences"
        )
    default = {name: float(weight) for name, weight in vars(Preferences()).items()}
    ranges = {name: (low, high) for name, low, high in PREFERENCES}
    for name, weight in given.items():
        if name not in ranges:
            raise InputError(f"{place}.{name} is unknown; choose from {', '.join(NAMES)}")
        low, high = min(default[name], ranges[name][0]), ranges[name][1]
        if not low <= number_or_nan(weight) <= high:
            raise InputError(f"{place}.{name} is {shown(weight)}, must be a number from {low:g} to {high:g}")
    changed = {name: jnp.float32(number_or_nan(weight)) for name, weight in given.items()}
    return preferences_of(config.hyper.weights).replace(**changed)
