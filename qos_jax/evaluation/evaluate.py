"""Evaluation: all routers on the same requests.

One trace of requests is sampled for each load and seed, and every router routes this trace (common random numbers). The
exact engine replays the decisions of each router into a log of all requests, from which all metrics are computed.
Oracles observe ground truth instead of predictions.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qos_jax.errors import InputError
from qos_jax.evaluation.metrics import metrics_of
from qos_jax.routers.base import Router
from qos_jax.sim.batching import map_environments
from qos_jax.sim.capacity import sample_requests
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.replay import ReplayResult, replay_many
from qos_jax.sim.types import Request, RequestTrace
from qos_jax.sim.validation import MAX_SEED, checked_whole
from qos_jax.sim.world import WorldSpec, advance, dispatch, empty_world, observe

_REAL = (int, float, np.integer, np.floating)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A load and a seed, which fix the requests that every router is given."""

    load: float  # fraction of the fleet's saturation rate
    rate_per_s: float  # requests/s
    seed: int


def scenarios(params: EnvParams, loads: Sequence[float], seeds: Iterable[int]) -> list[Scenario]:
    """Returns the scenarios of every load with every seed, load by load. Loads and rates are not rounded.

    Args:
      params: of the world; ``params.saturation_per_s`` turns loads into arrival rates.
      loads: fractions of the fleet's saturation rate.
      seeds: whole numbers below 2^32. Training uses seeds below 1000.

    Raises:
      InputError: a load or a seed is out of range, or the saturation rate of the world is unknown.
    """
    saturation_per_s, seeds = float(params.saturation_per_s), list(seeds)
    if not 0 < saturation_per_s < math.inf:
        raise InputError(f"saturation_per_s is {saturation_per_s}: measure it with qos_jax.saturation_rate")
    for load in loads:
        if isinstance(load, bool) or not isinstance(load, _REAL) or not 0 < load < math.inf:
            raise InputError(f"load is {load!r}, must be a finite number above 0")
    for seed in seeds:
        checked_whole("seed", seed, 0, MAX_SEED)
    return [Scenario(float(load), float(load) * saturation_per_s, int(seed)) for load in loads for seed in seeds]


@dataclasses.dataclass(frozen=True)
class RouterRun:
    """One router on one scenario of J requests."""

    router: Router
    scenario: Scenario
    trace: RequestTrace
    assignment: np.ndarray  # [J] int32 expert, -1 where the router dropped the request
    replayed: ReplayResult
    metrics: dict[str, float]


def route_requests(
    spec: WorldSpec,
    routers: tuple[Router, ...],
    which: Array | int,
    params: EnvParams,
    gaps_s: Array,
    requests: Request,
    key: Array,
) -> Array:
    """Routes a known sequence of requests with one of the routers.

    All routers are compiled into one program and ``which`` chooses one at run time: compiling the engine for each
    router would take much longer than running it.

    Args:
      spec: shapes of the world.
      routers: all routers of the program.
      which: [] int32, index of the router to use.
      params: the world; its workload is not used.
      gaps_s: [J] s before each request.
      requests: predictions and ground truth, leaves [J, ...].
      key: for routers that sample actions.

    Returns:
      The actions [J] int32; ``num_experts`` is a drop.
    """

    def decide(carry: tuple[Any, Any], x: tuple[Array, Request, Array]) -> tuple[tuple[Any, Any], Array]:
        (world, memories), (gap_s, request, key) = carry, x
        world = advance(spec, params.experts, world, gap_s)
        obs = observe(spec, params.observed_experts, world, request, params.staleness_s)

        def act(i: int) -> tuple[Array, Any]:
            action, memory = routers[i].act(key, obs, memories[i])
            return jnp.asarray(action, jnp.int32), (*memories[:i], memory, *memories[i + 1 :])

        action, memories = lax.switch(which, [partial(act, i) for i in range(len(routers))])
        world, _ = dispatch(spec, params.experts, world, request, action)
        return (world, memories), action

    start = (empty_world(spec, params.experts), tuple(router.init() for router in routers))
    return lax.scan(decide, start, (gaps_s, requests, jax.random.split(key, gaps_s.shape[0])))[1]


def with_truths(router: Router, requests: Request) -> Request:
    """Replaces the predictions by the ground truth that an oracle observes."""
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
) -> list[RouterRun]:
    """Runs every router on every scenario. Routers run in parallel threads.

    Args:
      env: the environment; only its spec is used.
      params: its parameters; the arrival rate is that of each scenario.
      routers: the routers to compare.
      scenarios: loads and seeds, see ``scenarios``.
      num_requests: number of requests of each scenario.
      warmup: number of leading requests that the metrics do not count.
      progress: called with each router that is done.

    Returns:
      The runs, router by router, each in the order of the scenarios.

    Raises:
      InputError: a number is out of range.
    """
    num_requests = checked_whole("num_requests", num_requests, 1)
    warmup = checked_whole("warmup", warmup, 0, num_requests - 1)
    rates = np.array([scenario.rate_per_s for scenario in scenarios])
    keys = jnp.stack([jax.random.key(scenario.seed) for scenario in scenarios])
    gaps_s, requests = _sample_scenarios(params, rates, keys, num_requests)
    traces = _traces(gaps_s, requests, len(scenarios))

    together, experts = tuple(routers), jax.tree.map(np.asarray, params.experts)
    world = params.replace(workload=None)  # another workload does not recompile

    def run_router(which: int) -> list[RouterRun]:
        router = together[which]
        actions = np.asarray(
            _route_scenarios(env.spec, together, jnp.int32(which), world, gaps_s, with_truths(router, requests), keys)
        )
        assignments = [np.where(a == env.spec.num_experts, -1, a) for a in actions]
        replays = replay_many(experts, traces, assignments, block_size=env.spec.engine.block_size)
        runs = [
            RouterRun(router, *each, metrics_of(experts, *each[1:], warmup))
            for each in zip(scenarios, traces, assignments, replays, strict=True)
        ]
        progress(router)
        return runs

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return [run for runs in pool.map(run_router, range(len(together))) for run in runs]


@partial(jax.jit, static_argnums=3)
def _sample_scenarios(params: EnvParams, rates: Array, keys: Array, num_requests: int) -> tuple[Array, Request]:
    def sample(rate: Array, key: Array) -> tuple[Array, Request]:
        return sample_requests(params.workload.with_rate(rate), key, num_requests)

    return jax.vmap(sample)(rates, keys)


@partial(jax.jit, static_argnums=(0, 1))
def _route_scenarios(
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
        return route_requests(spec, routers, which, params, gaps_s, requests, jax.random.fold_in(key, 1))

    return map_environments(one, (gaps_s, requests, keys))


def _traces(gaps_s: Array, requests: Request, count: int) -> list[RequestTrace]:
    requests, arrivals_s = jax.tree.map(np.asarray, requests), np.cumsum(np.asarray(gaps_s, np.float64), axis=1)
    return [
        RequestTrace(
            arrival_s=arrivals_s[i], **{name: getattr(requests, name)[i] for name in Request.__dataclass_fields__}
        )
        for i in range(count)
    ]
