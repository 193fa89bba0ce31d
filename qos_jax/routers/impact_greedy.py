"""The greedy router of the impact estimate."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from qos_jax.impact.estimate import WIDTH_S, impact
from qos_jax.impact.imagined_world import LENGTH_CV
from qos_jax.routers.base import Router, best_legal, gumbel_if_stale, key_for_ties
from qos_jax.sim.types import Observation

# Tuned with WIDTH_S on training seeds, by ``python -m experiments.tune_impact``; see docs/decisions.
PRICE = 0.2  # QoS, on paper-3 and edge-8
TEMPERATURE = 0.1  # QoS, with metrics that are 0.5 s stale, on paper-6 too


def impact_greedy(
    name: str = "impact_greedy",
    *,
    width_s: float = WIDTH_S,
    length_cv: float = LENGTH_CV,
    price: float = PRICE,
    temperature: float = TEMPERATURE,
    later_prompts: bool = False,
    **fields: Any,
) -> Router:
    """Takes the placement that adds most to the expected QoS of all requests.

    Args:
      name: of the router.
      width_s: see ``impact``.
      length_cv: see ``impact``.
      price: QoS. The request is dropped where this is legal and every placement adds less; with minus infinity the
        router never drops.
      temperature: QoS. With stale metrics the router samples from softmax(added QoS / temperature), in which the drop
        is worth ``price``.
      later_prompts: see ``impact``.
      **fields: other fields of ``Router``.
    """

    def act(key: Array, obs: Observation, memory: tuple[()]) -> tuple[Array, tuple[()]]:
        net = impact(obs, width_s, length_cv, later_prompts=later_prompts).net
        value = jnp.append(net, price) + gumbel_if_stale(key, obs, temperature)
        best = jnp.max(jnp.where(obs.action_mask[:-1], value[:-1], -jnp.inf))
        drop = (best < value[-1]) & obs.action_mask[-1]
        return jnp.where(drop, net.shape[0], best_legal(key_for_ties(key), obs, value[:-1])), memory

    return Router(name=name, init=tuple, act=act, **({"kind": "heuristic"} | fields))
