"""The compiled scalar loop of the benchmarks agrees with the plain-Python reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings

from experiments.benchmarks.native_loop import simulate
from tests.helpers.reference import Job, ReferenceExpert, replay_reference
from tests.helpers.workloads import KINDS, World, calm, full_queue, small_worlds


def synchronous(world: World) -> World:
    switches = dict.fromkeys(("async_scheduling", "prefix_cache"), np.zeros_like(world.experts.kv_blocks, bool))
    return dataclasses.replace(world, experts=world.experts.replace(**switches))


def assert_same(world: World) -> None:
    world = synchronous(world)
    expected = replay_reference(world.experts, world.trace, world.assignment)
    _, log = simulate(world.experts, world.trace, world.assignment)
    np.testing.assert_array_equal(log.dropped, expected.dropped)
    np.testing.assert_array_equal(log.preemptions, expected.preemptions)
    np.testing.assert_allclose(log.finish_s, expected.finish_s, rtol=1e-9)
    np.testing.assert_allclose(log.first_token_s, expected.first_token_s, rtol=1e-9)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"measured"}))
def test_agrees_with_the_reference(kind: str) -> None:
    for seed in range(3 if "crowd" in kind else 20):
        assert_same(KINDS[kind](np.random.default_rng(seed)))


@settings(deadline=None)
@given(small_worlds())
def test_agrees_with_the_reference_on_any_small_world(world: World) -> None:
    assert_same(world)


@pytest.mark.parametrize("kind", [calm, full_queue])
def test_joins_the_shortest_queue(kind: Callable[[np.random.Generator], World]) -> None:
    world = synchronous(kind(np.random.default_rng(0)))
    chosen, log = simulate(world.experts, world.trace)
    fleet = [ReferenceExpert(world.experts, n, None, 16) for n in range(3)]
    for j, time_s in enumerate(world.trace.arrival_s):
        for expert in fleet:
            expert.run_until(time_s)
        lengths = [len(expert.running) + len(expert.waiting) for expert in fleet]
        assert chosen[j] == np.argmin(lengths)
        job = Job(world.trace.prompt_tokens[j], world.trace.output_tokens[j, chosen[j]])
        fleet[chosen[j]].offer(job, time_s)
        assert log.dropped[j] == job.dropped
