"""The requests by which a policy in training is judged: neither those that it learns from, nor those of an evaluation.

Of the evaluations the best may choose the weights of the router, so their seeds are below those of ``qos-jax
evaluate``, and requests of a trace or table are of the part that training uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from qos_jax.errors import InputError
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.types import Observation

FIRST_HELD_OUT_SEED = 1000  # of evaluations after training; training uses seeds below

Act = Callable[[Array, Observation], Array]  # key, observation -> action [] int32

_WARM_UP = 0.25  # leading share of the requests that does not count, as the fleet is empty at first


@dataclasses.dataclass(frozen=True)
class Validation:
    """The requests of an evaluation: the same at every evaluation, and for impact_greedy."""

    params: EnvParams  # of one environment
    loads: tuple[float, ...] = ()  # environment i has load i modulo their number; that of ``params`` without them
    num_envs: int = 32  # E
    steps: int = 800  # requests of each

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
          InputError: there are too few environments for an interval, or no steps.
        """
        for name, minimum in (("num_envs", 2), ("steps", 1)):
            if getattr(self, name) < minimum:
                raise InputError(f"{name} of the evaluation is {getattr(self, name)}, must be at least {minimum}")

    def arguments(self) -> tuple[Array, EnvParams]:
        """Returns the seeds [E] and the parameters, of which only the loads have an axis [E]."""
        seeds = FIRST_HELD_OUT_SEED - 1 - jnp.arange(self.num_envs)
        if not self.loads:
            return seeds, self.params
        return seeds, self.params.at_load(jnp.resize(jnp.asarray(self.loads), (self.num_envs,)))

    def qos(self, env: Environment, act: Act, seeds: Array, params: EnvParams) -> Array:
        """Returns the mean QoS [E] of the requests behind the warm-up; pure."""
        axes = jax.tree.map(lambda many, one: 0 if jnp.ndim(many) > jnp.ndim(one) else None, params, self.params)

        def one(seed: Array, params: EnvParams) -> Array:
            def decide(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], Array]:
                obs, state = carry
                key_act, key_step = jax.random.split(key)
                obs, state, *_, info = env.step(key_step, state, act(key_act, obs), params)
                return (obs, state), info["completions"].qos

            key_reset, key_steps = jax.random.split(jax.random.key(seed))
            _, earned = lax.scan(decide, env.reset(key_reset, params), jax.random.split(key_steps, self.steps))
            return jnp.mean(earned[int(_WARM_UP * self.steps) :])

        return jax.vmap(one, in_axes=(0, axes))(seeds, params)
