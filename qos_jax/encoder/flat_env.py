"""The environment with a vector as its observation, for agents of PureJaxRL, rejax and others that expect a ``Box``."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from qos_jax.encoder.flat import FLAT_LIMIT, flat_size, flat_view
from qos_jax.sim.env import Environment, EnvParams, EnvState
from qos_jax.sim.spaces import Box, space_class
from qos_jax.sim.types import Observation


def masked_flat_view(obs: Observation) -> Array:
    """Returns ``flat_view`` and behind it the action mask, 1 where an action is legal: float32 [F + N + 1]."""
    return jnp.concatenate([flat_view(obs), obs.action_mask.astype(jnp.float32)])


@dataclasses.dataclass(frozen=True)
class FlatEnvironment:
    """``env`` with ``masked_flat_view``s as observations, by the same contract of gymnax."""

    env: Environment

    @property
    def name(self) -> str:
        """Name of the environment."""
        return self.env.name

    @property
    def num_actions(self) -> int:
        """Number of actions: one for each expert, and the drop."""
        return self.env.num_actions

    @property
    def default_params(self) -> EnvParams:
        """Parameters that ``reset`` and ``step`` take when they are called without any."""
        return self.env.default_params

    def action_space(self, params: EnvParams | None = None) -> Any:
        """Returns the space of actions, see ``Environment.action_space``."""
        return self.env.action_space(params)

    def observation_space(self, params: EnvParams | None = None) -> Any:
        """Returns the space of observations: a ``Box`` [F + N + 1], gymnax's if gymnax has been imported."""
        del params
        size = flat_size(self.env.spec.num_experts) + self.num_actions
        return space_class(Box)(-FLAT_LIMIT, FLAT_LIMIT, (size,), jnp.float32)

    def action_mask(self, obs: Array) -> Array:
        """Returns the legal actions [..., N + 1] bool of observations [..., F + N + 1]."""
        return obs[..., -self.num_actions :] > 0

    def reset(self, key: Array, params: EnvParams | None = None) -> tuple[Array, EnvState]:
        """Returns the first observation [F + N + 1] and the state, see ``Environment.reset``."""
        obs, state = self.env.reset(key, params)
        return masked_flat_view(obs), state

    def step(
        self, key: Array, state: EnvState, action: Array | int, params: EnvParams | None = None
    ) -> tuple[Array, EnvState, Array, Array, Array, dict[str, Any]]:
        """Routes the waiting request, see ``Environment.step``; ``final_observation`` is flat, too."""
        obs, state, reward, terminated, truncated, info = self.env.step(key, state, action, params)
        info |= {"final_observation": masked_flat_view(info["final_observation"])}
        return masked_flat_view(obs), state, reward, terminated, truncated, info
