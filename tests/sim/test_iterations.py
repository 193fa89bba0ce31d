"""The log of iterations against the reference implementation, one by one."""

from __future__ import annotations

import numpy as np
import pytest

from qos_jax import InputError
from qos_jax.sim.iterations import Activity, IterationLog, iterations_of
from tests.helpers.reference import Iteration, replay_reference
from tests.helpers.workloads import KINDS, World

START_S, END_S = 0.7, 4.0


def log_of(world: World, expert: int = 0) -> IterationLog:
    return iterations_of(world.experts, world.trace, world.assignment, expert, START_S, END_S)


def expected(world: World, expert: int = 0) -> list[Iteration]:
    reference = replay_reference(world.experts, world.trace, world.assignment)
    return [iteration for iteration in reference.experts[expert].iterations if START_S <= iteration.start_s < END_S]


@pytest.mark.parametrize("kind", ["preemption_storm", "full_queue", "small_budget", "measured"])
def test_agrees_with_the_reference(kind: str) -> None:
    world = KINDS[kind](np.random.default_rng(3))
    log, reference = log_of(world), expected(world)
    assert len(reference) > 20
    np.testing.assert_allclose(log.start_s, [iteration.start_s for iteration in reference], atol=1e-5)
    np.testing.assert_allclose(log.duration_s, [iteration.duration_s for iteration in reference], atol=1e-5)
    prefill_tokens = np.where(log.activity == Activity.PREFILL, log.tokens, 0).sum(1)
    np.testing.assert_array_equal(prefill_tokens, [iteration.prefill_tokens for iteration in reference])
    np.testing.assert_array_equal((log.tokens > 0).sum(1), [iteration.scheduled for iteration in reference])


def test_tokens_that_the_prefix_cache_has_are_not_computed() -> None:
    world = KINDS["calm"](np.random.default_rng(0))
    world.experts = world.experts.replace(prefix_cache=np.full(3, True))
    prompts = world.trace.prompt_tokens
    world.trace = world.trace.replace(shared_tokens=np.maximum(prompts - 20, 0))
    log, found = log_of(world), np.maximum(prompts - 20, 0) // 16 * 16
    done = np.flatnonzero((log.activity[0] == Activity.ABSENT) & (log.activity[-1] == Activity.ABSENT))
    computed = np.where(log.activity == Activity.PREFILL, log.tokens, 0).sum(0)[done]
    assert len(done) > 3
    np.testing.assert_array_equal(computed, (prompts - found)[log.request[done]])


def test_a_request_waits_computes_its_prompt_and_decodes() -> None:
    world = KINDS["calm"](np.random.default_rng(0))
    log = log_of(world)
    new = np.flatnonzero((log.activity[0] == Activity.ABSENT) & (log.activity[-1] == Activity.ABSENT))
    assert len(new) > 3
    for column in new:
        j = log.request[column]
        tokens, activity = log.tokens[:, column], log.activity[:, column]
        assert tokens[activity == Activity.PREFILL].sum() == world.trace.prompt_tokens[j]
        assert (activity == Activity.DECODE).sum() == world.trace.output_tokens[j, 0] - 1
        order = activity[activity != Activity.ABSENT]
        assert (np.diff(order) >= 0).all()  # waiting, prefill, decode
        assert log.start_s[np.argmax(activity > 0)] >= log.arrival_s[column] == world.trace.arrival_s[j]


def test_a_preempted_request_starts_over() -> None:
    log = log_of(KINDS["preemption_storm"](np.random.default_rng(3)))
    restarted = (log.activity[:-1] == Activity.PREEMPTED) & (log.activity[1:] == Activity.PREFILL)
    assert restarted.any()
    assert not ((log.activity[:-1] == Activity.PREEMPTED) & (log.activity[1:] == Activity.DECODE)).any()
    assert not log.tokens[log.activity == Activity.PREEMPTED].any()


def test_an_expert_without_requests_has_no_iterations() -> None:
    world = KINDS["calm"](np.random.default_rng(0))
    world.assignment = np.full_like(world.assignment, 1)
    log = log_of(world)
    assert log.start_s.shape == (0,)
    assert log.activity.shape == (0, 0)


@pytest.mark.parametrize(
    ("expert", "start_s", "message"), [(3, 0.0, "expert is 3"), (0, 9.0, "window is 9.0 .. 4.0 s")]
)
def test_an_illegal_expert_or_window_is_refused(expert: int, start_s: float, message: str) -> None:
    world = KINDS["calm"](np.random.default_rng(0))
    with pytest.raises(InputError, match=message):
        iterations_of(world.experts, world.trace, world.assignment, expert, start_s, END_S)
