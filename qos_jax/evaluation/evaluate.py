"""Evaluation: what every router makes of the same requests.

For each load and seed one trace of requests is drawn; every router decides on that very trace (common random numbers),
and each one's decisions are replayed by the exact engine into a log of all requests, from which all metrics come.
Oracles decide on the same observation with truths in the place of predictions.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qos_jax.evaluation.metrics import metrics_of
from qos_jax.routers.base import Router
from qos_jax.sim.batching import map_environments
from qos_jax.sim.capacity import sample_requests
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.replay import ReplayResult, replay_many
from qos_jax.sim.types import Request, RequestTrace
from qos_jax.sim.world import WorldSpec, advance, dispatch, empty_world, observe


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One load and one seed: the requests that every router is given."""

    load: float  # fraction of the fleet's saturation rate
    rate_per_s: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Run:
    """What one router made of one scenario."""

    router: Router
    scenario: Scenario
    trace: RequestTrace
    assignment: np.ndarray  # [J] int32, -1 where the router dropped the request
    replayed: ReplayResult
    metrics: dict[str, float]


def rollout(
    spec: WorldSpec,
    routers: tuple[Router, ...],
    which: Array | int,
    params: EnvParams,
    gaps_s: Array,
    requests: Request,
    key: Array,
) -> Array:
    """Lets one of the routers decide on a known sequence of requests.

    All routers are compiled into one program and ``which`` picks one at run time, as to compile the engine for each of
    them would take far longer than to run it.

    Args:
      spec: shapes of the world.
      routers: who may decide.
      which: [] int32, index of who does.
      params: the world; its workload is not used.
      gaps_s: [J] s before each request.
      requests: what the router is told, and what then is true; leaves [J, ...].
      key: for routers that draw lots.

    Returns:
      The actions [J] int32; ``num_experts`` is a drop.
    """

    def decide(carry: tuple[Any, Any], x: tuple[Array, Request, Array]) -> tuple[tuple[Any, Any], Array]:
        (world, memories), (gap_s, request, key) = carry, x
        world = advance(spec, params.experts, world, gap_s)
        obs = observe(spec, params.experts, world, request, params.staleness_s)

        def act(i: int) -> tuple[Array, Any]:
            action, memory = routers[i].act(key, obs, memories[i])
            return jnp.asarray(action, jnp.int32), (*memories[:i], memory, *memories[i + 1 :])

        action, memories = lax.switch(which, [partial(act, i) for i in range(len(routers))])
        world, _ = dispatch(spec, params.experts, world, request, action)
        return (world, memories), action

    start = (empty_world(spec, params.experts), tuple(router.init() for router in routers))
    return lax.scan(decide, start, (gaps_s, requests, jax.random.split(key, gaps_s.shape[0])))[1]


def with_truths(router: Router, requests: Request) -> Request:
    """Puts the truths that an oracle may see in the place of the predictions."""
    if router.information in ("true_scores", "true_scores_and_tokens"):
        requests = requests.replace(predicted_score=requests.score)
    if router.information == "true_scores_and_tokens":
        requests = requests.replace(predicted_tokens=requests.output_tokens.astype(requests.predicted_tokens.dtype))
    return requests


def evaluate(
    env: Environment,
    params: EnvParams,
    routers: Sequence[Router],
    scenarios: Sequence[Scenario],
    num_requests: int,
    *,
    warmup: int = 0,
    progress: Callable[[Router], None] = lambda router: None,
) -> list[Run]:
    """Runs every router on every scenario; ``progress`` is called as each router is done. Routers run side by side.

    Args:
      env: the environment; only its spec is used.
      params: its parameters; the arrival rate is each scenario's own.
      routers: who decides.
      scenarios: loads and seeds.
      num_requests: requests of each scenario.
      warmup: leading requests that the metrics do not count.
      progress: called with each router that is done.

    Returns:
      The runs, router by router, scenarios in their order within.
    """
    rates = np.array([scenario.rate_per_s for scenario in scenarios])
    keys = jnp.stack([jax.random.key(scenario.seed) for scenario in scenarios])
    gaps_s, requests = _sample_scenarios(params, rates, keys, num_requests)
    traces = _traces(gaps_s, requests, len(scenarios))

    together, experts = tuple(routers), jax.tree.map(np.asarray, params.experts)
    world = params.replace(workload=None)  # so that another one does not compile anew

    def run(which: int) -> list[Run]:
        router = together[which]
        actions = np.asarray(
            _rollouts(env.spec, together, jnp.int32(which), world, gaps_s, with_truths(router, requests), keys)
        )
        assignments = [np.where(a == env.spec.num_experts, -1, a) for a in actions]
        engine_spec = env.spec.engine
        replays = replay_many(
            experts, traces, assignments,
            token_budget=engine_spec.token_budget, block_size=engine_spec.block_size,
        )  # fmt: skip
        runs = [
            Run(router, *each, metrics_of(experts, *each[1:], warmup))
            for each in zip(scenarios, traces, assignments, replays, strict=True)
        ]
        progress(router)
        return runs

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return [one for runs in pool.map(run, range(len(together))) for one in runs]


@partial(jax.jit, static_argnums=3)
def _sample_scenarios(params: EnvParams, rates: Array, keys: Array, num_requests: int) -> tuple[Array, Request]:
    def sample(rate: Array, key: Array) -> tuple[Array, Request]:
        return sample_requests(params.workload.with_rate(rate), key, num_requests)

    return jax.vmap(sample)(rates, keys)


@partial(jax.jit, static_argnums=(0, 1))
def _rollouts(
    spec: WorldSpec,
    routers: tuple[Router, ...],
    which: Array,
    params: EnvParams,
    gaps_s: Array,
    requests: Request,
    keys: Array,
) -> Array:
    def one(scenario: tuple[Array, Request, Array]) -> Array:
        gaps_s, requests, key = scenario
        return rollout(spec, routers, which, params, gaps_s, requests, jax.random.fold_in(key, 1))

    return map_environments(one, (gaps_s, requests, keys))


def _traces(gaps_s: Array, requests: Request, count: int) -> list[RequestTrace]:
    requests, arrivals_s = jax.tree.map(np.asarray, requests), np.cumsum(np.asarray(gaps_s, np.float64), axis=1)
    return [
        RequestTrace(
            arrival_s=arrivals_s[i], **{name: getattr(requests, name)[i] for name in Request.__dataclass_fields__}
        )
        for i in range(count)
    ]
