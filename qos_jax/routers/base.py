"""What a router is: a small frozen struct of pure functions, for one environment, to be jitted and vmapped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from qos_jax.sim.types import Observation

Memory = Any  # a pytree; () for a router without one


@dataclasses.dataclass(frozen=True)
class Router:
    """Decides which expert serves the request that has arrived, from what it is told and nothing else."""

    name: str
    kind: Literal["heuristic", "learned", "oracle"]
    init: Callable[[], Memory]
    """Returns the memory before the first request."""
    act: Callable[[Array, Observation, Memory], tuple[Array, Memory]]
    """Takes a key, what is seen and the memory; returns the action [] int32, N for a drop, and the memory."""
    information: Literal["predictions", "true_scores", "true_scores_and_tokens"] = "predictions"
    """Oracles see truths in the place of predictions."""
    params: Any = dataclasses.field(default=None, compare=False, repr=False)
    """Weights of a learned router, a pytree; ``act`` has them already."""


def best_legal(obs: Observation, value: Array) -> Array:
    """Returns the legal expert of the highest ``value`` [N], the first of equals; N, the drop, where none is legal."""
    legal = obs.action_mask[:-1]
    best = jnp.argmax(jnp.where(legal, value, -jnp.inf))
    return jnp.where(jnp.any(legal), best, legal.shape[0]).astype(jnp.int32)


def gumbel_if_stale(key: Array, obs: Observation, temperature: float) -> Array:
    """Returns noise [N + 1] with which the best of some values is a draw by softmax(values / temperature).

    It is 0 where metrics are fresh. Where they are late, requests that come close together all see the same fleet, and
    by their values alone would all go to the same expert.
    """
    return jnp.where(obs.staleness_s > 0, temperature * jax.random.gumbel(key, obs.action_mask.shape), 0.0)


def by_value(name: str, value: Callable[[Observation], Array], **fields: Any) -> Router:
    """Builds a router without memory that takes the legal expert of the highest value [N]."""
    return Router(
        name=name,
        init=tuple,
        act=lambda key, obs, memory: (best_legal(obs, value(obs)), memory),
        **({"kind": "heuristic"} | fields),
    )
