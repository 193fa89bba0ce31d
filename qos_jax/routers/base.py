"""The interface of a router: a small frozen struct of pure functions for one environment, to be jitted and vmapped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from qos_jax.sim.types import Observation

Memory = Any  # a pytree; () for a router without memory


@dataclasses.dataclass(frozen=True)
class Router:
    """A policy that assigns each arriving request to an expert, from observations only."""

    name: str
    kind: Literal["heuristic", "learned", "oracle"]
    init: Callable[[], Memory]
    """Returns the memory before the first request."""
    act: Callable[[Array, Observation, Memory], tuple[Array, Memory]]
    """Takes a random key, the observation and the memory; returns the action [] int32, N to drop, and the memory."""
    information: Literal["predictions", "true_scores", "true_scores_and_tokens"] = "predictions"
    """Which ground truth an oracle observes instead of predictions."""
    params: Any = dataclasses.field(default=None, compare=False, repr=False)
    """Weights of a learned router, a pytree; ``act`` holds them already."""


def best_legal(key: Array, obs: Observation, value: Array) -> Array:
    """Returns the legal expert with the highest value, one of equals by lot.

    Args:
      key: random key for ties.
      obs: the observation.
      value: [N] of each expert.

    Returns:
      The action [] int32; N, the drop, where no expert is legal.
    """
    legal = obs.action_mask[:-1]
    return jnp.where(jnp.any(legal), drawn_best(key, value, legal), legal.shape[0]).astype(jnp.int32)


def drawn_best(key: Array, value: Array, legal: Array) -> Array:
    """Returns the index [] int32 of the highest legal value; each of equals is as likely.

    Were it always the first of equals, all requests that arrive between two updates of the metrics would go there.

    Args:
      key: random key for ties.
      value: [A] of each choice.
      legal: [A] bool, at least one of them.
    """
    value = jnp.asarray(value, float)
    among_legal = jnp.where(legal, value, -jnp.inf)
    best = jnp.max(among_legal)
    lot = jax.random.uniform(key, value.shape)
    # XLA may compute a value twice and round it differently, so that none equals the best: then the first one is taken.
    first = jnp.arange(value.shape[0]) == jnp.argmax(among_legal)
    highest = legal & (first | ~(value < best))  # any legal one where a value is NaN
    return jnp.argmax(jnp.where(highest, lot, -1.0)).astype(jnp.int32)


def key_for_ties(key: Array) -> Array:
    """Returns the key for ties in a router that also samples with ``key``."""
    return jax.random.fold_in(key, 1)


def gumbel_if_stale(key: Array, obs: Observation, temperature: float) -> Array:
    """Returns Gumbel noise [N + 1] where metrics are stale, and 0 where they are fresh.

    The best of values plus this noise is a sample from softmax(values / temperature). With stale metrics, requests that
    arrive shortly after each other observe the same fleet. Without noise all of them would go to the same expert.
    """
    return jnp.where(obs.staleness_s > 0, temperature * jax.random.gumbel(key, obs.action_mask.shape), 0.0)


def by_value(name: str, value: Callable[[Observation], Array], **fields: Any) -> Router:
    """Builds a router without memory that takes the legal expert with the highest value.

    Args:
      name: of the router.
      value: returns the value [N] of each expert.
      **fields: other fields of ``Router``; the kind is "heuristic" by default.
    """
    return Router(
        name=name,
        init=tuple,
        act=lambda key, obs, memory: (best_legal(key, obs, value(obs)), memory),
        **({"kind": "heuristic"} | fields),
    )
