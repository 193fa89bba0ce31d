"""The router that goes by the impact estimate."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from qos_jax.impact.estimate import WIDTH_S, impact
from qos_jax.impact.imagined_world import LENGTH_CV
from qos_jax.routers.base import Router, best_legal, gumbel_if_stale
from qos_jax.sim.types import Observation

PRICE = 0.2  # QoS were tuned on training seeds of paper-3 and edge-8, and this


TEMPERATURE = 0.1  # QoS with metrics half a second late, and on paper-6, too; see BUILD_NOTES.md


def impact_greedy(
    name: str = "impact_greedy",
    *,
    width_s: float = WIDTH_S,
    length_cv: float = LENGTH_CV,
    price: float = PRICE,
    temperature: float = TEMPERATURE,
    **fields: Any,
) -> Router:
    """Takes the placement that adds most to the expected QoS of all requests.

    Args:
      name: of the router.
      width_s: see ``impact``.
      length_cv: see ``impact``.
      price: the request is dropped where that is legal and every placement adds less than this; minus infinity never
        drops.
      temperature: in QoS; where metrics are late, the router draws by softmax(added QoS / temperature), a drop at its
        price.
      **fields: other fields of the router.
    """

    def act(key: Array, obs: Observation, memory: tuple[()]) -> tuple[Array, tuple[()]]:
        net = impact(obs, width_s, length_cv).net
        worth = jnp.append(net, price) + gumbel_if_stale(key, obs, temperature)
        best = jnp.max(jnp.where(obs.action_mask[:-1], worth[:-1], -jnp.inf))
        drop = (best < worth[-1]) & obs.action_mask[-1]
        return jnp.where(drop, net.shape[0], best_legal(obs, worth[:-1])), memory

    return Router(name=name, init=tuple, act=act, **({"kind": "heuristic"} | fields))
