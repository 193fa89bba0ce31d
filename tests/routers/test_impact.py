"""The impact estimate against the simulator's rules where it should be exact, and its direction where it is not."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qos_jax.routers.base import Router
from qos_jax.routers.impact import Impact, impact, impact_greedy
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, TOKEN_BUDGET, ExpertProfile
from tests.observations import RUNNING, WAITING, Seen, observation
from tests.reference import Job, ReferenceExpert
from tests.small_env import small_experts

ROOMY = {"kv_blocks": 4000, "max_running": 64}
TOLD = 1e-3  # coefficient of variation of lengths that are as predicted
WIDTH_S = 1e-3
PREDICTED = jax.jit(lambda obs: impact(obs, WIDTH_S, TOLD))
UNSURE = jax.jit(lambda obs: impact(obs, WIDTH_S))


def job(seen: Seen) -> Job:
    """Returns this request as the plain-Python simulator has it, if it is as long as predicted."""
    blocks = -(-seen.computed // BLOCK_SIZE_TOKENS)
    return Job(seen.prompt_tokens, int(seen.predicted_tokens), seen.generated_tokens, seen.computed, blocks)


def served(experts: ExpertProfile, jobs: list[Job]) -> list[float]:
    """Returns when [s from now] the first expert finishes each of these requests if nothing else arrives."""
    expert = ReferenceExpert(experts, 0, TOKEN_BUDGET, BLOCK_SIZE_TOKENS)
    jobs = copy.deepcopy(jobs)
    expert.clock_s = 0.0
    expert.running = [one for one in jobs if one.computed]
    expert.waiting.extend(one for one in jobs if not one.computed)
    expert.free_blocks -= sum(one.blocks for one in jobs)
    expert.run_until(float("inf"))
    return [one.finish_s for one in jobs]


def own_latency_s(there: list[Seen], prompt_tokens: int, tokens: int, **profile: Any) -> tuple[float, float]:
    """Returns the latency per token of a new request, predicted and simulated."""
    obs = observation([there], prompt_tokens=prompt_tokens, predicted_tokens=float(tokens), **profile)
    experts = small_experts(1, **profile)
    finish_s = served(experts, [*map(job, there), Job(prompt_tokens, tokens)])[-1]
    return float(PREDICTED(obs).latency_per_token_s[0]), (finish_s + float(experts.network_s[0])) / tokens


running = st.builds(
    lambda prompt, emitted, left, age: Seen(prompt, float(emitted + left), emitted, None, age),
    st.integers(1, 200), st.integers(1, 300), st.integers(60, 300), st.floats(0.0, 9.0),
)  # fmt: skip
waiting = st.builds(
    lambda prompt, left, age: Seen(prompt, float(left), 0, 0, age),
    st.integers(1, 200), st.integers(1, 300), st.floats(0.0, 9.0),
)  # fmt: skip
crowds = st.tuples(st.lists(running, max_size=4), st.lists(waiting, max_size=3)).map(lambda both: both[0] + both[1])


@settings(max_examples=40)
@given(st.integers(1, TOKEN_BUDGET), st.integers(1, 400))
def test_latency_on_an_idle_expert_is_exact(prompt_tokens: int, tokens: int) -> None:
    predicted, simulated = own_latency_s([], prompt_tokens, tokens, **ROOMY)
    np.testing.assert_allclose(predicted, simulated, rtol=1e-5)


@settings(max_examples=40)
@given(st.lists(running, min_size=1, max_size=6), st.integers(1, 300), st.integers(1, 60))
def test_latency_beside_requests_that_outlast_it_is_exact(there: list[Seen], prompt_tokens: int, tokens: int) -> None:
    predicted, simulated = own_latency_s(there, prompt_tokens, tokens, **ROOMY)
    np.testing.assert_allclose(predicted, simulated, rtol=1e-5)


@settings(max_examples=40)
@given(running, st.integers(1, 300), st.integers(1, 500), st.floats(-2.0, 2.0))
def test_harm_to_a_lone_request_is_exact(seen: Seen, prompt_tokens: int, tokens: int, margin: float) -> None:
    experts = small_experts(1, **ROOMY)

    def latency_per_token_s(*added: Job) -> float:
        latency_s = seen.age_s + served(experts, [job(seen), *added])[0] + float(experts.network_s[0])
        return latency_s / seen.predicted_tokens

    alone_s, beside_s = latency_per_token_s(), latency_per_token_s(Job(prompt_tokens, tokens))
    limit_s = alone_s + margin * WIDTH_S
    seen = dataclasses.replace(seen, latency_limit_s=limit_s)
    violation = [1.0 / (1.0 + np.exp((limit_s - latency_s) / WIDTH_S)) for latency_s in (alone_s, beside_s)]
    result = PREDICTED(observation([[seen]], prompt_tokens=prompt_tokens, predicted_tokens=float(tokens), **ROOMY))
    np.testing.assert_allclose(result.violations_change[0], violation[1] - violation[0], rtol=1e-3, atol=3e-4)
    np.testing.assert_allclose(
        result.qos_change[0], -seen.predicted_score * float(result.violations_change[0]), rtol=1e-5
    )


@pytest.mark.parametrize("left", [1, 7, 40])
def test_wait_for_the_only_place_is_what_its_holder_has_left(left: int) -> None:
    holder = Seen(predicted_tokens=10.0 + left, generated_tokens=10)
    predicted, simulated = own_latency_s([holder], 20, 30, max_running=1, per_sequence_s=0.0, per_kv_token_s=0.0)
    np.testing.assert_allclose(predicted, simulated, rtol=1e-4)


def test_wait_for_memory() -> None:
    there = [Seen(prompt_tokens=300, predicted_tokens=80.0, generated_tokens=10)]
    crowded, roomy = (
        PREDICTED(observation([there], prompt_tokens=100, kv_blocks=blocks)).latency_per_token_s[0]
        for blocks in (24, 400)
    )
    # 24 blocks hold 309 tokens now and not 100 more, and the holder has 70 iterations of 0.02 s left.
    assert 0 < crowded - roomy < 2 * 70 * 0.022 / 50


def test_request_that_outran_its_prediction_is_expected_to_stay() -> None:
    fresh, overdue = (Seen(predicted_tokens=emitted + 1.0, generated_tokens=emitted) for emitted in (1, 400))
    waits = [
        float(UNSURE(observation([[seen]], max_running=1)).latency_per_token_s[0]) * 50 for seen in (fresh, overdue)
    ]
    assert waits[1] - waits[0] > 0.02 * 200


def test_unsure_length_spreads_the_chance_to_make_up_for_a_wait() -> None:
    there = [Seen(predicted_tokens=60.0, generated_tokens=10)]
    for limit_s, order in ((0.06, 1), (0.03, -1)):  # the wait of 50 iterations is likely made up for, or likely not
        obs = observation([there], max_running=1, latency_limit_s=limit_s)
        sure, unsure = (float(impact(obs, WIDTH_S, cv).in_time[0]) for cv in (0.05, 1.1))
        assert (sure - unsure) * order > 0.005
        assert 0.0 < unsure < 1.0


@settings(max_examples=40)
@given(
    st.lists(crowds, min_size=2, max_size=2), st.integers(1, 500), st.floats(1.0, 500.0), st.sampled_from([1, 4, 64])
)
def test_one_more_request_never_helps_those_already_there(
    requests: list[list[Seen]], prompt_tokens: int, tokens: float, max_running: int
) -> None:
    result = UNSURE(
        observation(requests, prompt_tokens=prompt_tokens, predicted_tokens=tokens, max_running=max_running)
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
    assert (result.qos_change <= 0).all()
    assert (result.violations_change >= 0).all()
    assert ((result.in_time >= 0) & (result.in_time <= 1)).all()
    for n, there in enumerate(requests):
        if not there:
            assert result.violations_change[n] == 0


@settings(max_examples=40)
@given(st.lists(running, max_size=5), running, st.integers(1, 500), st.floats(1.0, 500.0))
def test_another_running_request_never_speeds_one_up(
    there: list[Seen], another: Seen, prompt_tokens: int, tokens: float
) -> None:
    fewer, more = (
        float(
            PREDICTED(
                observation([crowd], prompt_tokens=prompt_tokens, predicted_tokens=tokens, **ROOMY)
            ).latency_per_token_s[0]
        )
        for crowd in (there, [*there, another])
    )
    assert more > fewer


@settings(max_examples=20)
@given(st.lists(crowds, min_size=3, max_size=3), st.permutations(range(3)))
def test_experts_may_come_in_any_order(requests: list[list[Seen]], order: list[int]) -> None:
    obs, index = observation(requests), jnp.asarray(order)
    permuted = jax.tree.map(lambda x: x[index] if x.ndim and x.shape[0] == 3 else x, obs)

    def close(mine: jax.Array, theirs: jax.Array) -> None:
        np.testing.assert_allclose(mine[index], theirs, rtol=1e-4, atol=1e-5)

    result: Impact = UNSURE(obs)
    jax.tree.map(close, result, UNSURE(permuted))


def act(router: Router, **told: Any) -> int:
    obs = observation([[RUNNING] * 4 + [WAITING] * 3] * 2, latency_limit_s=0.02, **told)
    return int(router.act(jax.random.key(0), obs, router.init())[0])


def test_impact_greedy_drops_what_is_worth_less_than_its_price() -> None:
    hopeless = impact_greedy(price=0.1)
    assert act(hopeless) == 2
    assert act(hopeless, drop_legal=False) in (0, 1)
    assert act(hopeless, legal=[False, False]) == 2
    assert act(impact_greedy(price=-np.inf)) in (0, 1)


def test_impact_greedy_spares_those_at_their_limit_for_one_of_equal_worth() -> None:
    def at_limit(margin_s: float) -> list[Seen]:
        return [dataclasses.replace(RUNNING, latency_limit_s=0.0235 + margin_s)]

    alike = {"step_base_s": 0.02, "prefill_base_s": 0.01, "prefill_per_token_s": 1e-4, "per_sequence_s": 1e-3}
    router = impact_greedy()
    for slack, chosen in ((0, 1), (1, 0)):
        requests = [at_limit(0.05 * slack), at_limit(0.05 * (1 - slack))]
        obs = observation(requests, per_kv_token_s=1e-6, **alike)
        assert int(router.act(jax.random.key(0), obs, router.init())[0]) == chosen
