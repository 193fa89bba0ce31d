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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qos_jax.errors import InputError
from qos_jax.evaluation.metrics import metrics_of, select_assigned
from qos_jax.io.text_files import shown
from qos_jax.routers.base import Router
from qos_jax.sim.batching import map_environments
from qos_jax.sim.capacity import sample_requests
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.replay import ReplayResult, replay_many
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, ExpertProfile, Observation, Request, RequestTrace
from qos_jax.sim.validation import MAX_SEED, checked_whole
from qos_jax.sim.world import (
    World,
    WorldSpec,
    advance,
    closed,
    collect,
    dispatch,
    empty_world,
    observe,
    turn_of,
    whole_prompt,
)
from qos_jax.workload.arrivals import RATE_RANGE_PER_S

_REAL = (int, float, np.integer, np.floating)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A load and a seed, which fix the requests that every router is given.

    Raises:
      InputError: a number is out of range.
    """

    load: float  # fraction of the fleet's saturation rate
    rate_per_s: float  # requests/s, within ``RATE_RANGE_PER_S``
    seed: int  # whole, below 2^32

    def __post_init__(self) -> None:
        """Checks the numbers: seeds beyond 32 bit would be those of others, and tiny rates would never end."""
        checked_whole("seed", self.seed, 0, MAX_SEED)
        low, high = RATE_RANGE_PER_S
        for name, least, most in (("load", 0.0, math.inf), ("rate_per_s", low, high)):
            value = getattr(self, name)
            is_number = isinstance(value, _REAL) and not isinstance(value, bool)
            if not is_number or not least <= value <= most or not math.isfinite(value):
                raise InputError(f"{name} is {value!r}, must be a number from {least:g} to {most:g}")


def scenarios(params: EnvParams, loads: Sequence[float], seeds: Iterable[int]) -> list[Scenario]:
    """Returns the scenarios of every load with every seed, load by load. Loads and rates are not rounded.

    Args:
      params: of the world; ``params.saturation_per_s`` turns loads into arrival rates.
      loads: fractions of the fleet's saturation rate.
      seeds: whole numbers below 2^32. Training uses seeds below 1000.

    Raises:
      InputError: a load or a seed is out of range, or the saturation rate of the world is unknown.
    """
    saturation_per_s = float(params.saturation_per_s)
    seeds = [checked_whole("seed", seed, 0, MAX_SEED) for seed in seeds]
    if not 0 < saturation_per_s < math.inf:
        raise InputError(f"saturation_per_s is {saturation_per_s}: measure it with qos_jax.saturation_rate")
    for load in loads:
        if isinstance(load, bool) or not isinstance(load, _REAL) or not 0 < load < math.inf:
            raise InputError(f"load is {load!r}, must be a finite number above 0")
    return [Scenario(float(load), float(load) * saturation_per_s, seed) for load in loads for seed in seeds]


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
) -> tuple[Array, Routed]:
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
      key: for routers that sample actions, and for failures, which are the same for all routers.

    Returns:
      The actions [J] int32, ``num_experts`` is a drop; and ``Routed``.
    """

    def act(key: Array, obs: Observation, memories: tuple[Any, ...]) -> tuple[Array, tuple[Any, ...]]:
        def act_of(i: int) -> tuple[Array, tuple[Any, ...]]:
            action, memory = routers[i].act(key, obs, memories[i])
            return jnp.asarray(action, jnp.int32), (*memories[:i], memory, *memories[i + 1 :])

        return lax.switch(which, [partial(act_of, i) for i in range(len(routers))])

    memories = tuple(router.init() for router in routers)
    return route_by(spec, act, memories, params, gaps_s, requests, key, lambda obs: ())[:2]


def route_by(
    spec: WorldSpec,
    act: Callable[[Array, Observation, Any], tuple[Array, Any]],
    memory: Any,
    params: EnvParams,
    gaps_s: Array,
    requests: Request,
    key: Array,
    look: Callable[[Observation], Any],
) -> tuple[Array, Routed, Any]:
    """Routes a known sequence of requests by ``act`` of a router; see ``route_requests``.

    Returns:
      The actions [J] int32, ``Routed``, and what ``look`` returns of the observation of each decision, leaves [J, ...].
    """

    def decide(carry: tuple[Any, Any], x: tuple[Array, Request, Array]) -> tuple[tuple[Any, Any], tuple[Any, ...]]:
        (world, memory), (gap_s, request, key) = carry, x
        world = advance(spec, params.experts, world, gap_s)
        if spec.sessions:  # prefixes are cached when finished requests are collected
            world, _ = collect(params.experts, world)
        obs = observe(spec, params.observed_experts, world, request, params.staleness_s)
        action, memory = act(key, obs, memory)
        action = jnp.asarray(action, jnp.int32)
        routed = routed_of(params.experts, world, request)
        world, _ = dispatch(spec, params.experts, world, request, action)
        return (world, memory), (action, routed, look(obs))

    world = empty_world(spec, params.experts, params.scrape_s, params.failure_law, key)
    start = (world, memory)
    return lax.scan(decide, start, (gaps_s, requests, jax.random.split(key, gaps_s.shape[0])))[1]


class Routed(NamedTuple):
    """What a replay must know of a routed world beside the requests and where they were sent."""

    prompt_tokens: Array | None  # [J] int32, with the context of the session; None without sessions, as for the next
    cached_tokens: Array | None  # [J, N] int32, of these in the cache of each expert
    failed_after_s: Array | None  # [J, N] s since the arrival before, inf for none; None where none fails
    closed: Array | None  # [J, N] bool: it took no request; None where all do, but for full queues and memory

    def trace(self, trace: RequestTrace, assignment: np.ndarray) -> RequestTrace:
        """Returns a trace with these prompts, and what an assignment [J] finds of them in the cache."""
        if self.cached_tokens is None:
            return trace
        cached = np.where(assignment < 0, 0, select_assigned(np.asarray(self.cached_tokens), assignment))
        return trace.replace(prompt_tokens=np.asarray(self.prompt_tokens), shared_tokens=cached, turn=None)

    def assignment(self, actions: np.ndarray, num_experts: int) -> np.ndarray:
        """Returns the expert of each request [J], -1 where it was dropped or the expert was closed."""
        refused = actions == num_experts
        if self.closed is not None:
            refused |= select_assigned(np.asarray(self.closed), np.where(refused, 0, actions)) & ~refused
        return np.where(refused, -1, actions)

    def failures_s(self, trace: RequestTrace) -> list[np.ndarray]:
        """Returns the times [s] at which each of the N experts failed; only where experts fail."""
        before_s = np.concatenate([[0.0], trace.arrival_s[:-1]])
        times_s = before_s[:, None] + np.asarray(self.failed_after_s, np.float64)
        return [column[np.isfinite(column)] for column in times_s.T]


def routed_of(experts: ExpertProfile, world: World, request: Request) -> Routed:
    """Returns what a replay must know of a request that has arrived."""
    turn, failures = turn_of(experts, world, request), world.failures
    return Routed(
        None if turn is None else whole_prompt(request, turn),
        None if turn is None else turn.cached_blocks * BLOCK_SIZE_TOKENS,
        None if failures is None else failures.failed_after_s,
        None if failures is None and world.loaded is None else closed(world),
    )


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
      InputError: a number is out of range, or a router or scenario is none.
    """
    together = tuple(routers)
    for name, kind, values in (("router", Router, together), ("scenario", Scenario, scenarios)):
        if wrong := [value for value in values if not isinstance(value, kind)]:
            raise InputError(f"{name} is {shown(wrong[0])}, must be a {kind.__name__}")
    sampled = sample_scenarios(params, scenarios, num_requests)

    def run(which: int) -> list[RouterRun]:
        runs = run_router(env, params, together, which, sampled, warmup)
        progress(together[which])
        return runs

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return [each for runs in pool.map(run, range(len(together))) for each in runs]


class SampledScenarios(NamedTuple):
    """The J requests of each of S scenarios."""

    scenarios: Sequence[Scenario]
    gaps_s: Array  # [S, J] s before each request
    requests: Request  # leaves [S, J, ...]
    keys: Array  # [S]
    traces: list[RequestTrace]


def sample_scenarios(params: EnvParams, scenarios: Sequence[Scenario], num_requests: int) -> SampledScenarios:
    """Samples the requests of scenarios; the arrival rate is that of each. Other rates and seeds do not recompile.

    Raises:
      InputError: the number of requests is out of range.
    """
    num_requests = checked_whole("num_requests", num_requests, 1)
    rates = np.array([scenario.rate_per_s for scenario in scenarios])
    keys = jnp.stack([jax.random.key(scenario.seed) for scenario in scenarios])
    gaps_s, requests = _sample_scenarios(params, rates, keys, num_requests)
    return SampledScenarios(scenarios, gaps_s, requests, keys, _traces(gaps_s, requests, len(scenarios)))


def run_router(
    env: Environment,
    params: EnvParams,
    routers: tuple[Router, ...],
    which: int,
    sampled: SampledScenarios,
    warmup: int = 0,
) -> list[RouterRun]:
    """Runs one of ``routers``, which are compiled into one program, on sampled scenarios; see ``evaluate``."""
    warmup = checked_whole("warmup", warmup, 0, sampled.gaps_s.shape[1] - 1)
    router, experts = routers[which], jax.tree.map(np.asarray, params.experts)
    world = params.replace(workload=None)  # another workload does not recompile
    requests = with_truths(router, sampled.requests)
    actions, routed = _route_scenarios(
        env.spec, routers, jnp.int32(which), world, sampled.gaps_s, requests, sampled.keys
    )
    each = [jax.tree.map(lambda x, i=i: np.asarray(x[i]), routed) for i in range(len(sampled.traces))]
    assignments = [of.assignment(a, env.spec.num_experts) for of, a in zip(each, np.asarray(actions), strict=True)]
    traces = [of.trace(*args) for of, *args in zip(each, sampled.traces, assignments, strict=True)]
    replays = replay_many(
        experts,
        traces,
        assignments,
        block_size=env.spec.engine.block_size,
        failures=[of.failures_s(trace) for of, trace in zip(each, traces, strict=True)] if env.spec.failures else None,
    )
    return [
        RouterRun(router, *args, metrics_of(experts, *args[1:], warmup))
        for args in zip(sampled.scenarios, traces, assignments, replays, strict=True)
    ]


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
) -> tuple[Array, Routed]:
    def one(scenario: tuple[Array, Request, Array]) -> tuple[Array, Routed]:
        gaps_s, requests, key = scenario
        return route_requests(spec, routers, which, params, gaps_s, requests, jax.random.fold_in(key, 1))

    return map_environments(one, (gaps_s, requests, keys))


def _traces(gaps_s: Array, requests: Request, count: int) -> list[RequestTrace]:
    requests, arrivals_s = jax.tree.map(np.asarray, requests), np.cumsum(np.asarray(gaps_s, np.float64), axis=1)
    return [
        RequestTrace(
            arrival_s=arrivals_s[i],
            **{name: jax.tree.map(lambda x: x[i], getattr(requests, name)) for name in Request.__dataclass_fields__},  # noqa: B023
        )
        for i in range(count)
    ]
