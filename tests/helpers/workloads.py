"""Random worlds that stress every rule of the simulator, for tests that compare two implementations.

``KINDS`` maps a name to its generator, ``small_worlds`` is the hypothesis strategy. Experts do not interact, so several
worlds can be joined into a larger one (``side_by_side``), and a whole batch runs as one program of one shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from hypothesis import strategies as st

from qos_jax import ExpertProfile, RequestTrace
from qos_jax.sim.types import IterationTables

NUM_EXPERTS = 3
NUM_REQUESTS = 64
CROWD = 300
UNLIMITED = 1_000_000
DROPPED_BY_ROUTER = -1
TICK_S = 2.0**-10  # sums of such times are exact, so iterations can start exactly at an arrival

Limit = int | np.ndarray


@dataclasses.dataclass
class World:
    """Experts, requests, and the expert of each request; an ``assignment`` [J] of -1 is a drop by the router."""

    experts: ExpertProfile
    trace: RequestTrace
    assignment: np.ndarray


def profile(**fields: Any) -> ExpertProfile:
    """A profile of as many experts as the longest field; missing costs are 0, missing limits are very large."""
    free = dict.fromkeys(
        ("step_base_s", "prefill_base_s", "prefill_per_token_s", "per_sequence_s", "per_kv_token_s"), 0.0
    )
    endless = dict.fromkeys(("kv_blocks", "max_running", "max_waiting"), UNLIMITED)
    fields = free | endless | fields
    return ExpertProfile(**dict(zip(fields, np.broadcast_arrays(*map(np.atleast_1d, fields.values())), strict=True)))


def side_by_side(worlds: Sequence[World]) -> World:
    """One world with all experts and all requests, in order of arrival."""
    sizes = [np.shape(world.experts.kv_blocks)[0] for world in worlds]
    starts = np.cumsum(sizes) - sizes
    arrival_s = np.concatenate([world.trace.arrival_s for world in worlds])
    order = np.argsort(arrival_s, kind="stable")
    outputs = [
        np.pad(world.trace.output_tokens, ((0, 0), (start, sum(sizes) - start - size)), constant_values=1)
        for world, start, size in zip(worlds, starts, sizes, strict=True)
    ]
    assignments = [
        np.where(world.assignment == DROPPED_BY_ROUTER, DROPPED_BY_ROUTER, world.assignment + start)
        for world, start in zip(worlds, starts, strict=True)
    ]
    return World(
        experts=jax.tree.map(
            lambda *fields: np.concatenate(
                [np.broadcast_to(x, (size, *np.shape(x)[1:])) for x, size in zip(fields, sizes, strict=True)]
            ),
            *(world.experts for world in worlds),
        ),
        trace=RequestTrace(
            arrival_s=arrival_s[order],
            prompt_tokens=np.concatenate([world.trace.prompt_tokens for world in worlds])[order],
            output_tokens=np.concatenate(outputs)[order],
        ),
        assignment=np.concatenate(assignments)[order],
    )


def _experts(
    rng: np.random.Generator, *, kv_blocks: Limit, max_running: Limit = 32, max_waiting: Limit = UNLIMITED
) -> ExpertProfile:
    """Experts of random speed, so that either term of the prefill time may be the larger one."""
    return profile(
        step_base_s=rng.uniform(0.005, 0.05, NUM_EXPERTS),
        prefill_base_s=rng.uniform(0.0, 0.04, NUM_EXPERTS),
        prefill_per_token_s=rng.uniform(2e-5, 3e-4, NUM_EXPERTS),
        per_sequence_s=rng.uniform(0.0, 3e-4, NUM_EXPERTS),
        per_kv_token_s=rng.uniform(0.0, 5e-6, NUM_EXPERTS),
        kv_blocks=kv_blocks,
        max_running=max_running,
        max_waiting=max_waiting,
        **_engine(rng),
    )


def _engine(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Engine switches, each on for about half of the experts."""
    return {name: rng.random(NUM_EXPERTS) < 0.5 for name in ("async_scheduling", "prefix_cache")}


def _poisson(rng: np.random.Generator, mean_gap_s: float, requests: int = NUM_REQUESTS) -> np.ndarray:
    return np.cumsum(rng.exponential(mean_gap_s, requests))


def _tokens(rng: np.random.Generator, low: int, high: int, *shape: int) -> np.ndarray:
    """Token counts with a long tail: log-uniform in [low, high]."""
    return np.exp(rng.uniform(np.log(low), np.log(high + 1), shape)).astype(np.int32).clip(low, high)


def _anyone(rng: np.random.Generator, requests: int = NUM_REQUESTS) -> np.ndarray:
    """Random experts, the first one most often; the router drops one request in twenty."""
    return rng.choice([DROPPED_BY_ROUTER, 0, 1, 2], requests, p=[0.05, 0.4, 0.3, 0.25])


def _world(
    rng: np.random.Generator,
    experts: ExpertProfile,
    arrival_s: np.ndarray,
    prompts: tuple[int, int],
    outputs: tuple[int, int],
    token_budget: int = 2048,
) -> World:
    requests = len(arrival_s)
    trace = RequestTrace(arrival_s, _tokens(rng, *prompts, requests), _tokens(rng, *outputs, requests, NUM_EXPERTS))
    return World(experts.replace(token_budget=token_budget), trace, _anyone(rng, requests))


def calm(rng: np.random.Generator) -> World:
    """Enough memory and places for all requests."""
    return _world(rng, _experts(rng, kv_blocks=2000), _poisson(rng, 0.05), (1, 300), (1, 200))


def preemption_storm(rng: np.random.Generator) -> World:
    """Memory for a few requests and places for many, so they preempt each other repeatedly."""
    experts = _experts(rng, kv_blocks=rng.integers(14, 40, NUM_EXPERTS), max_running=16)
    return _world(rng, experts, _poisson(rng, 0.05), (1, 60), (20, 150))


def full_queue(rng: np.random.Generator) -> World:
    """Short queues, or none, under a heavy load."""
    experts = _experts(
        rng,
        kv_blocks=rng.integers(10, 60, NUM_EXPERTS),
        max_running=rng.integers(1, 6, NUM_EXPERTS),
        max_waiting=rng.integers(0, 5, NUM_EXPERTS),
    )
    return _world(rng, experts, _poisson(rng, 0.15), (1, 80), (1, 80))


def long_prompts(rng: np.random.Generator) -> World:
    """Prompts of several iterations."""
    experts = _experts(rng, kv_blocks=rng.integers(380, 900, NUM_EXPERTS))
    return _world(rng, experts, _poisson(rng, 0.5), (200, 6000), (1, 60))


def small_budget(rng: np.random.Generator) -> World:
    """A token budget so small that decoding uses all of it, and prompts wait or progress by a few tokens."""
    experts = _experts(rng, kv_blocks=rng.integers(14, 30, NUM_EXPERTS))
    return _world(rng, experts, _poisson(rng, 0.05), (1, 60), (20, 150), token_budget=8)


def simultaneous(rng: np.random.Generator) -> World:
    """Bursts of requests at exactly the same time, on whole seconds."""
    experts = _experts(rng, kv_blocks=rng.integers(12, 30, NUM_EXPERTS), max_running=8, max_waiting=6)
    return _world(rng, experts, np.sort(rng.integers(0, 6, NUM_REQUESTS)).astype(float), (1, 100), (1, 100))


def one_token(rng: np.random.Generator) -> World:
    """Answers of one or two tokens, which finish with the prefill or one iteration later."""
    experts = _experts(rng, kv_blocks=rng.integers(10, 60, NUM_EXPERTS), max_running=8, max_waiting=20)
    return _world(rng, experts, _poisson(rng, 0.005), (1, 150), (1, 2))


def idle_hours(rng: np.random.Generator) -> World:
    """Bursts with idle hours between them."""
    experts = _experts(rng, kv_blocks=rng.integers(14, 40, NUM_EXPERTS), max_running=8)
    gaps_s = np.where(
        rng.random(NUM_REQUESTS) < 0.1, rng.uniform(3600, 20_000, NUM_REQUESTS), rng.exponential(0.02, NUM_REQUESTS)
    )
    return _world(rng, experts, np.cumsum(gaps_s), (1, 100), (1, 150))


def never_fitting(rng: np.random.Generator) -> World:
    """Memory too small for some requests, and sufficient for others only alone."""
    experts = _experts(rng, kv_blocks=rng.integers(4, 16, NUM_EXPERTS))
    return _world(rng, experts, _poisson(rng, 0.1), (1, 200), (1, 120))


def unequal(rng: np.random.Generator) -> World:
    """Experts that differ in every limit and by factors in speed."""
    experts = _experts(
        rng,
        kv_blocks=np.array([5000, 60, 25]),
        max_running=np.array([64, 1, 7]),
        max_waiting=np.array([UNLIMITED, 3, UNLIMITED]),
    )
    speed = np.array([0.1, 1.0, 10.0])
    experts = experts.replace(step_base_s=experts.step_base_s * speed, per_sequence_s=experts.per_sequence_s * speed)
    return _world(rng, experts, _poisson(rng, 0.1), (1, 300), (1, 100))


def on_the_boundary(rng: np.random.Generator) -> World:
    """Arrivals exactly at the boundaries of iterations: all times are sums of powers of two."""
    experts = profile(
        step_base_s=rng.integers(4, 32, NUM_EXPERTS) * TICK_S,
        prefill_base_s=rng.integers(0, 32, NUM_EXPERTS) * TICK_S,
        prefill_per_token_s=rng.integers(0, 2, NUM_EXPERTS) * TICK_S,
        per_sequence_s=rng.integers(0, 2, NUM_EXPERTS) * TICK_S,
        per_kv_token_s=rng.integers(0, 2, NUM_EXPERTS) * TICK_S / 4,
        kv_blocks=rng.integers(6, 20, NUM_EXPERTS),
        max_running=8,
        max_waiting=8,
        **_engine(rng),
    )
    gaps_s = rng.integers(0, 64, NUM_REQUESTS) * TICK_S
    return _world(rng, experts, np.cumsum(gaps_s), (1, 40), (1, 40))


def measured(rng: np.random.Generator) -> World:
    """Tables of kernels that rise and fall; prompts in chunks, preemptions, and budgets beyond the last knot."""
    experts = _experts(rng, kv_blocks=rng.integers(30, 400, NUM_EXPERTS), max_running=16).replace(kernels=_tables(rng))
    return _world(rng, experts, _poisson(rng, 0.05), (1, 400), (1, 100), token_budget=int(rng.choice([40, 300, 2048])))


def _tables(rng: np.random.Generator) -> IterationTables:
    """Tables in which every term has a weight, so that a wrong sum shows."""

    def knots(high: int, count: int) -> np.ndarray:
        return np.sort([rng.choice(np.arange(1, high), count, replace=False) for _ in range(NUM_EXPERTS)])

    def times(high_s: float, count: int) -> np.ndarray:
        rising = np.sort(rng.uniform(0.002, high_s, (NUM_EXPERTS, count)))
        rising[:, 1:-1] *= rng.uniform(0.8, 1.2, (NUM_EXPERTS, count - 2))
        rising[:, -1] = np.maximum(rising[:, -1], rising[:, -2])
        return rising

    largest = np.array([4e-3, 1e-4, 3e-6, 2e-3, 6e-3, 8e-3, 2e-4, 8e-6, 2e-5, 4e-5, 1e-8, 1e-6])
    return IterationTables(
        dense_tokens=knots(400, 9),
        dense_s=times(0.05, 9),
        head_requests=knots(12, 4),
        head_s=times(0.005, 4),
        attention_s=rng.uniform(0.0, largest, (NUM_EXPERTS, len(largest))),
        host_s=rng.uniform(0.0, 1e-3, NUM_EXPERTS),
        host_per_sequence_s=rng.uniform(0.0, 1e-4, NUM_EXPERTS),
    )


def crowd(rng: np.random.Generator) -> World:
    """Three hundred requests on one expert at once, which exhaust its memory."""
    experts = profile(
        step_base_s=0.017,
        prefill_base_s=0.009,
        prefill_per_token_s=9e-5,
        per_sequence_s=4e-5,
        per_kv_token_s=2e-7,
        kv_blocks=rng.integers(600, 900),
        max_running=300,
    )
    trace = RequestTrace(_poisson(rng, 0.001, CROWD), _tokens(rng, 1, 60, CROWD), _tokens(rng, 40, 150, CROWD, 1))
    return World(experts, trace, np.zeros(CROWD, np.int32))


KINDS: dict[str, Callable[[np.random.Generator], World]] = {
    kind.__name__: kind
    for kind in (
        calm,
        preemption_storm,
        full_queue,
        long_prompts,
        small_budget,
        simultaneous,
        one_token,
        idle_hours,
        never_fitting,
        unequal,
        on_the_boundary,
        measured,
        crowd,
    )
}


@st.composite
def small_worlds(draw: st.DrawFn, num_experts: int = 2, num_requests: int = 10) -> World:
    """A world small enough to read when a test fails; its times are exact sums, so arrivals may meet boundaries."""

    def integers(low: int, high: int, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        return np.reshape(draw(st.lists(st.integers(low, high), min_size=count, max_size=count)), shape)

    experts = profile(
        step_base_s=integers(1, 16, num_experts) * TICK_S,
        prefill_base_s=integers(0, 32, num_experts) * TICK_S,
        prefill_per_token_s=integers(0, 2, num_experts) * TICK_S,
        per_sequence_s=integers(0, 4, num_experts) * TICK_S,
        per_kv_token_s=integers(0, 2, num_experts) * TICK_S / 4,
        kv_blocks=integers(1, 9, num_experts),
        max_running=integers(1, 6, num_experts),
        max_waiting=integers(0, 6, num_experts),
        token_budget=draw(st.sampled_from([8, 2048])),
        async_scheduling=integers(0, 1, num_experts) > 0,
        prefix_cache=integers(0, 1, num_experts) > 0,
        standby_s=integers(0, 64, num_experts) * TICK_S,
    )
    trace = RequestTrace(
        arrival_s=np.cumsum(integers(0, 64, num_requests)) * TICK_S,
        prompt_tokens=integers(1, 70, num_requests),
        output_tokens=integers(1, 50, num_requests, num_experts),
    )
    assignment = integers(DROPPED_BY_ROUTER, num_experts - 1, num_requests)
    return World(experts, trace, assignment)
