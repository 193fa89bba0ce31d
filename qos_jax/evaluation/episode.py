"""One episode of a router in full: its requests, what each placement was estimated to add, and what came of it."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import numpy as np
from jax import Array

from qos_jax.evaluation.evaluate import Routed, SampledScenarios, route_by, with_truths
from qos_jax.evaluation.metrics import in_time_of, qos_of
from qos_jax.impact.estimate import impact
from qos_jax.routers.base import Router
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.replay import ReplayResult, replay_many
from qos_jax.sim.types import Request, RequestTrace
from qos_jax.sim.world import WorldSpec


@dataclasses.dataclass(frozen=True)
class Episode:
    """What one router did with J requests on N experts."""

    router: Router
    trace: RequestTrace
    assignment: np.ndarray  # [J] int32 expert, -1 where the router dropped the request
    net: np.ndarray  # [J, N] QoS of all requests that each placement was estimated to add, see ``impact``
    replayed: ReplayResult
    in_time: np.ndarray  # [J] bool
    qos: np.ndarray  # [J]


def episode(env: Environment, params: EnvParams, router: Router, sampled: SampledScenarios) -> Episode:
    """Returns the episode of a router on the first of the sampled scenarios.

    Args:
      env: the environment.
      params: its parameters.
      router: to watch.
      sampled: of ``sample_scenarios``; the same for several routers gives them the same requests.
    """
    requests = jax.tree.map(lambda x: x[0], with_truths(router, sampled.requests))
    world = params.replace(workload=None)
    key = jax.random.fold_in(sampled.keys[0], 1)
    actions, routed, net = _decisions(env.spec, router, world, sampled.gaps_s[0], requests, key)
    routed = jax.tree.map(np.asarray, routed)
    assignment = routed.assignment(np.asarray(actions), env.spec.num_experts)
    experts, trace = jax.tree.map(np.asarray, params.experts), routed.trace(sampled.traces[0], assignment)
    failures = [routed.failures_s(trace)] if env.spec.failures else None
    (replayed,) = replay_many(experts, [trace], [assignment], block_size=env.spec.engine.block_size, failures=failures)
    in_time, qos = (of(experts, trace, assignment, replayed) for of in (in_time_of, qos_of))
    return Episode(router, trace, assignment, np.asarray(net), replayed, in_time, qos)


@partial(jax.jit, static_argnums=(0, 1))
def _decisions(
    spec: WorldSpec, router: Router, params: EnvParams, gaps_s: Array, requests: Request, key: Array
) -> tuple[Array, Routed, Array]:
    """Returns the actions [J], what a replay must know, and what each placement was estimated to add [J, N]."""
    return route_by(
        spec, router.act, router.init(), params, gaps_s, requests, key, look=lambda obs: impact(obs).net
    )  # fmt: skip
