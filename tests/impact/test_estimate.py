"""The impact estimate against exact simulation, its properties on any observation, and the router that uses it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from qos_jax import (
    Environment,
    InputError,
    Observation,
    Request,
    RequestTrace,
    evaluate,
    make,
    make_router,
    replay,
    scenarios,
)
from qos_jax.evaluation.evaluate import RouterRun
from qos_jax.evaluation.metrics import latency_per_token_s
from qos_jax.impact.estimate import Impact, impact, in_flight_qos
from qos_jax.impact.imagined_world import sample_belief
from qos_jax.routers.impact_greedy import impact_greedy
from qos_jax.sim import engine
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.world import SlotPayload, World, WorldSpec, advance, collect, dispatch, empty_world, observe
from tests.helpers.observations import (
    SLOTS,
    Seen,
    equal_experts,
    observation,
    observations,
    reordered,
    runners,
    running,
    waiting,
)
from tests.helpers.small_env import small_experts

NUM_EXPERTS = 4
CERTAIN = {"width_s": 1e-5, "length_cv": 0.01}  # nearly hard limits, nearly exact lengths
PRESET, LOAD, WARMUP = "paper-3", 0.9, 60

estimate_of = jax.jit(impact, static_argnames=("width_s", "length_cv", "form"))
believed_world = jax.jit(sample_belief)


@jax.jit
def greedy(obs: Observation, price: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The action at this price, and the net impact of each placement [N]."""
    return impact_greedy(price=price).act(jax.random.key(0), obs, ())[0], impact(obs).net


def test_memory_that_limits_nothing_may_have_any_size() -> None:
    fleet = [running(), running(), waiting()], [running(prompt_tokens=900)]
    some, all_but_endless = (
        observation(*fleet, profile=equal_experts(2, kv_blocks=blocks)) for blocks in (10**6, 10**9)
    )
    some_impact, endless_impact = estimate_of(some), estimate_of(all_but_endless)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), some_impact, endless_impact)
    believed, believed_endless = (believed_world(obs).experts.slots for obs in (some, all_but_endless))
    assert np.sum(believed.live) == 4
    np.testing.assert_array_equal(believed_endless.output_tokens, believed.output_tokens)


def test_more_tokens_on_an_expert_never_look_like_fewer() -> None:
    latency_s = [
        estimate_of(observation([waiting(prompt_tokens=2**bits)] * SLOTS, prompt_tokens=2**bits)).latency_per_token_s[0]
        for bits in range(10, 31)
    ]
    assert np.all(np.isfinite(latency_s))
    assert np.all(np.diff(latency_s) > 0)


class TestAgainstTheSimulator:
    """Lengths are known. Request A is sent to every expert at time 0, and request B later."""

    num_experts = 12
    output_a = np.array([160, 190, 220, 150, 180, 210] * 2)
    prompt_a = np.array([10, 250, 90, 300, 40, 170] * 2)
    output_b = np.array([20, 70, 45, 60, 30, 55] * 2)
    prompt_b = 600
    profile = small_experts(
        num_experts,
        per_kv_token_s=3e-5,
        kv_blocks=1000,
        max_running=np.repeat([8, 1], 6),
        network_s=0.2,
    )
    together = slice(0, 6)
    one_by_one = slice(6, 12)

    def simulated(self, *requests: tuple[float, Any, np.ndarray]) -> np.ndarray:
        """Latencies per token [R, N] of requests (arrival, prompt, outputs), each sent to every expert."""
        arrival_s, prompt_tokens, output_tokens = zip(*requests, strict=True)
        trace = RequestTrace(
            arrival_s=np.repeat(arrival_s, self.num_experts),
            prompt_tokens=np.ravel([np.broadcast_to(prompt, self.num_experts) for prompt in prompt_tokens]),
            output_tokens=np.repeat(output_tokens, self.num_experts, axis=0),
        )
        log = replay(self.profile, trace, np.tile(np.arange(self.num_experts), len(requests)))
        latency_s = (log.finish_s - trace.arrival_s).reshape(-1, self.num_experts) + self.profile.network_s
        return np.asarray(latency_s) / np.array(output_tokens)

    def seen(self, sent_b_s: float) -> Observation:
        """The observation when B arrives."""
        spec = WorldSpec(self.num_experts, EngineSpec(SLOTS))
        half = jnp.full(self.num_experts, 0.5)
        payload = SlotPayload(half, half, half, jnp.asarray(self.output_a, jnp.float32))
        world, all_experts = empty_world(spec, self.profile), jnp.ones(self.num_experts, bool)
        tokens = jnp.asarray(self.prompt_a), jnp.asarray(self.output_a)
        world = world.replace(experts=engine.push(world.experts, all_experts, *tokens, payload))
        world = jax.jit(partial(advance, spec, self.profile))(world, jnp.float32(sent_b_s))
        request = Request(
            prompt_tokens=jnp.int32(self.prompt_b),
            output_tokens=jnp.asarray(self.output_b),
            score=half,
            latency_limit_s=jnp.float32(0.05),
            predicted_score=half,
            predicted_tokens=jnp.asarray(self.output_b, jnp.float32),
        )
        return observe(spec, self.profile, world, request)

    @pytest.mark.parametrize(("prompt_tokens", "rel"), [(1, 1e-4), (600, 1e-4), (3000, 1e-2)])
    def test_latency_on_an_idle_expert(self, prompt_tokens: int, rel: float) -> None:
        """The estimate is exact, except that a prompt of two iterations costs ``per_sequence_s`` twice."""
        idle: list[list[Seen]] = [[]] * self.num_experts
        obs = observation(*idle, profile=self.profile, prompt_tokens=prompt_tokens, predicted_tokens=self.output_b)
        exact_s = self.simulated((0.0, prompt_tokens, self.output_b))[0]
        np.testing.assert_allclose(estimate_of(obs, **CERTAIN).latency_per_token_s, exact_s, rtol=rel)

    def test_two_at_once(self) -> None:
        """The estimate is exact: one prefill serves both."""
        a, b = (0.0, self.prompt_a, self.output_a), (0.0, self.prompt_b, self.output_b)
        exact_s = self.simulated(a, b)[1, self.together]
        obs = self.seen(0.0)
        assert np.all(obs.experts.waiting == 1)
        estimate_s = estimate_of(obs, **CERTAIN).latency_per_token_s[self.together]
        np.testing.assert_allclose(estimate_s, exact_s, rtol=3e-3)

    def test_one_after_the_other(self) -> None:
        """B's latency; and A misses its limit because of B exactly if the limit lies between its latencies."""
        sent_s = 1.2
        a, b = (0.0, self.prompt_a, self.output_a), (sent_s, self.prompt_b, self.output_b)
        (alone_s,), (together_s, exact_s) = self.simulated(a), self.simulated(a, b)
        obs = self.seen(sent_s)
        assert np.all(obs.experts.running == 1)

        estimate_s = np.asarray(estimate_of(obs, **CERTAIN).latency_per_token_s)
        missed_s = ((exact_s - estimate_s) * self.output_b)[self.together]
        iteration_s = together_s[self.together]
        assert np.all((-0.1 * iteration_s < missed_s) & (missed_s < 1.1 * iteration_s))  # the current iteration
        # While B waits, the estimate assumes one request fewer in the batch than there are: none, with one place.
        np.testing.assert_allclose(estimate_s[self.one_by_one], exact_s[self.one_by_one], rtol=0.15)

        slower_s = together_s - alone_s
        assert np.all(slower_s[self.together] > 3e-4)
        for share, expected in ((-0.6, 0.0), (0.5, 1.0), (1.6, 0.0)):
            limit_s = jnp.asarray(alone_s + share * slower_s, jnp.float32)[:, None]
            limits_s = jnp.broadcast_to(limit_s, (self.num_experts, SLOTS))
            estimate = estimate_of(obs.replace(requests=obs.requests.replace(latency_limit_s=limits_s)), **CERTAIN)
            np.testing.assert_allclose(estimate.violations_change[self.together], expected, atol=0.05)
            np.testing.assert_allclose(estimate.violations_change[self.one_by_one], 0.0, atol=1e-6)
            np.testing.assert_allclose(estimate.qos_change, -0.5 * estimate.violations_change, atol=1e-6)


def test_later_prompts_take_the_places_of_requests_that_finish() -> None:
    """Where prompts are dear, and one request follows another, they are most of what the estimate misses."""
    prompt, output, gap_s, count = 600, 60, 0.9, 40
    profile = small_experts(1, prefill_per_token_s=5e-4, kv_blocks=1000, max_running=8)
    spec, one = WorldSpec(1, EngineSpec(SLOTS)), jnp.ones(1)
    request = Request(
        prompt_tokens=jnp.int32(prompt),
        output_tokens=jnp.full(1, output),
        score=one,
        latency_limit_s=jnp.float32(0.1),
        predicted_score=one,
        predicted_tokens=float(output) * one,
    )

    def arrive(world: World, _: None) -> tuple[World, jax.Array]:
        world, _completions = collect(profile, advance(spec, profile, world, jnp.float32(gap_s)))
        obs = observe(spec, profile, world, request)
        estimates = [impact(obs, **CERTAIN, later_prompts=later).latency_per_token_s[0] for later in (False, True)]
        return dispatch(spec, profile, world, request, jnp.int32(0))[0], jnp.stack(estimates)

    estimated_s = np.asarray(
        jax.jit(lambda world: jax.lax.scan(arrive, world, None, count))(empty_world(spec, profile))[1]
    )
    trace = RequestTrace(gap_s * (1 + np.arange(count)), np.full(count, prompt), np.full((count, 1), output))
    log = replay(profile, trace, np.zeros(count, int))
    exact_s = (log.finish_s - trace.arrival_s + np.asarray(profile.network_s)) / output
    steady = slice(count // 4, -count // 4)  # the last ones are followed by none
    without, with_later = np.abs(estimated_s - exact_s[:, None])[steady].mean(0)
    assert with_later < 0.4 * without


class TestRolloutForm:
    """Six requests wait on each expert when one more arrives; places and memory are scarce, so requests interfere.

    Lengths are known, no request has started and none follows, so the estimate must equal the difference of replays
    with and without the request.
    """

    num_experts, num_there = 8, 6
    profile = small_experts(num_experts, max_waiting=8)
    rng = np.random.default_rng(2)
    prompt_tokens = rng.integers(1, 200, (num_there + 1, num_experts))
    output_tokens = rng.integers(1, 90, (num_there + 1, num_experts))
    prompt_tokens[-1] = 150
    score = rng.uniform(0.0, 1.0, (num_there + 1, num_experts)).astype(np.float32)

    def latency_s(self, num_requests: int) -> np.ndarray:
        """Latencies per token [R, N] of the first requests of each expert, with and without the last."""
        trace = RequestTrace(
            arrival_s=np.zeros(num_requests * self.num_experts),
            prompt_tokens=self.prompt_tokens[:num_requests].ravel(),
            output_tokens=np.repeat(self.output_tokens[:num_requests].ravel()[:, None], self.num_experts, 1),
        )
        log = replay(self.profile, trace, np.tile(np.arange(self.num_experts), num_requests))
        assert log.preemptions.any()
        latency_s = log.finish_s.reshape(-1, self.num_experts) + np.asarray(self.profile.network_s)
        return latency_s / self.output_tokens[:num_requests]

    def limits_s(self) -> np.ndarray:
        """Limits [R, N] of requests: some are met only without the last request, others in both or in neither case."""
        without_s, together_s = self.latency_s(self.num_there), self.latency_s(self.num_there + 1)
        between_s = (without_s + together_s[:-1]) / 2
        far_s = without_s * np.where(np.arange(self.num_experts) % 2 == 0, 0.5, 2.0)
        limits_s = np.where(np.arange(self.num_there)[:, None] % 3 == 0, far_s, between_s)
        return np.append(limits_s, np.full((1, self.num_experts), np.median(together_s[-1]) + 1e-4), 0)

    def seen(self) -> Observation:
        limit_s = self.limits_s()
        return observation(
            *[
                [
                    waiting(
                        prompt_tokens=int(self.prompt_tokens[j, n]),
                        age_s=0.0,
                        latency_limit_s=float(limit_s[j, n]),
                        predicted_score=float(self.score[j, n]),
                        predicted_tokens=float(self.output_tokens[j, n]),
                    )
                    for j in range(self.num_there)
                ]
                for n in range(self.num_experts)
            ],
            profile=self.profile,
            prompt_tokens=150,
            latency_limit_s=float(limit_s[-1, 0]),
            predicted_score=self.score[-1],
            predicted_tokens=self.output_tokens[-1],
        )

    def test_it_is_the_difference_of_two_replays(self) -> None:
        without_s, together_s = self.latency_s(self.num_there), self.latency_s(self.num_there + 1)
        in_time = together_s <= self.limits_s()
        change = in_time[:-1].astype(int) - (without_s <= self.limits_s()[:-1])
        assert (change < 0).sum() > self.num_experts
        estimate = estimate_of(self.seen(), width_s=1e-7, length_cv=0.0, form="rollout")
        np.testing.assert_allclose(estimate.latency_per_token_s, together_s[-1], rtol=1e-5)
        np.testing.assert_allclose(estimate.in_time, in_time[-1], atol=1e-3)
        np.testing.assert_allclose(estimate.qos, in_time[-1] * self.score[-1], atol=1e-3)
        np.testing.assert_allclose(estimate.violations_change, -change.sum(0), atol=1e-3)
        np.testing.assert_allclose(estimate.qos_change, (change * self.score[:-1]).sum(0), atol=1e-3)

    def test_a_margin_becomes_a_probability_by_the_logistic(self) -> None:
        margin_s = self.limits_s()[-1] - self.latency_s(self.num_there + 1)[-1]
        estimate = estimate_of(self.seen(), width_s=0.05, length_cv=0.0, form="rollout")
        np.testing.assert_allclose(estimate.in_time, 1 / (1 + np.exp(-margin_s / 0.05)), rtol=1e-4)

    def test_an_expert_that_cannot_hold_it_never_answers(self) -> None:
        obs = observation([], [running()], profile=equal_experts(2, kv_blocks=np.array([4, 400])), prompt_tokens=100)
        estimate = estimate_of(obs, form="rollout")
        assert np.isposinf(estimate.latency_per_token_s[0])
        assert (estimate.in_time[0], estimate.qos_change[0]) == (0.0, 0.0)
        assert 0 < estimate.latency_per_token_s[1] < 0.1

    @settings(max_examples=30)
    @given(observations(NUM_EXPERTS))
    def test_it_ends_for_any_observation(self, obs: Observation) -> None:
        estimate = jax.tree.map(np.asarray, estimate_of(obs, form="rollout"))
        assert ((estimate.in_time >= 0) & (estimate.in_time <= 1)).all()
        assert np.isfinite([estimate.qos, estimate.qos_change, estimate.violations_change]).all()
        assert (estimate.latency_per_token_s > 0).all()

    def test_both_forms_agree_closely(self) -> None:
        """On 80 experts, from idle to full, with requests near their limits."""
        rng = np.random.default_rng(7)

        def seen(kind: Any) -> Seen:
            emitted = int(rng.integers(1, 60)) if kind is running else 0
            tokens = {"generated_tokens": emitted, "predicted_tokens": emitted + float(rng.uniform(2, 80))}
            return kind(age_s=0.03 * emitted, latency_limit_s=float(rng.uniform(0.024, 0.04)), **tokens)

        fleet = [
            [seen(running) for _ in range(rng.integers(0, 5))] + [seen(waiting) for _ in range(rng.integers(0, 3))]
            for _ in range(80)
        ]
        profile = equal_experts(80, kv_blocks=400, max_running=6)
        obs = observation(*fleet, profile=profile, prompt_tokens=200, latency_limit_s=0.03)
        analytic, rollout = (estimate_of(obs, length_cv=0.05, form=form) for form in ("analytic", "rollout"))
        assert rollout.violations_change.max() > 0.5
        for name in ("latency_per_token_s", "in_time", "violations_change"):
            assert np.corrcoef(getattr(analytic, name), getattr(rollout, name))[0, 1] > 0.8, name


@pytest.mark.parametrize(("max_running", "kv_blocks"), [(4, 1000), (100, 80)])
def test_the_batch_is_limited_by_places_and_memory(max_running: int, kv_blocks: int) -> None:
    """A very long request shares its iterations with as many requests as fit, four in total."""
    request = running(prompt_tokens=310, predicted_tokens=20.0)  # 20 blocks
    profile = equal_experts(SLOTS + 1, max_running=max_running, kv_blocks=kv_blocks, per_kv_token_s=0.0)
    fleet = [[request] * count for count in range(SLOTS + 1)]
    obs = observation(*fleet, profile=profile, prompt_tokens=320, predicted_tokens=1e6)
    expected_s = 0.02 + 0.001 * np.minimum(np.arange(SLOTS + 1) + 1, 4)
    np.testing.assert_allclose(estimate_of(obs).latency_per_token_s, expected_s, rtol=1e-3)


def test_a_request_beyond_its_prediction_keeps_its_place_long() -> None:
    """It keeps its place for about as long as it has run, if lengths are uncertain."""
    fleet = [[running(generated_tokens=emitted, predicted_tokens=emitted + 1.0)] for emitted in (100, 400)]
    obs = observation(*fleet, profile=equal_experts(2, max_running=1), predicted_tokens=40.0)
    for length_cv, tokens in ((1.1, 330.0), (0.01, 3.0)):
        latency_s = 40.0 * estimate_of(obs, length_cv=length_cv).latency_per_token_s
        assert float(latency_s[1] - latency_s[0]) == pytest.approx(0.02 * tokens, abs=0.05)


def test_in_time_is_the_share_of_lengths_that_spread_the_prefill_enough() -> None:
    """The lengths are lognormal with the prediction as their median; on an idle expert, estimates are exact."""
    lengths = 60.0 * np.exp(math.sqrt(math.log1p(1.1**2)) * scipy.stats.norm.ppf((np.arange(400) + 0.5) / 400))
    idle: list[list[Seen]] = [[]] * len(lengths)
    profile = equal_experts(len(lengths), kv_blocks=1000, per_kv_token_s=0.0)
    all_lengths, typical = (
        observation(*idle, profile=profile, prompt_tokens=2000, predicted_tokens=tokens) for tokens in (lengths, 60.0)
    )
    exact_s = np.asarray(estimate_of(all_lengths, width_s=1e-5, length_cv=1.1).latency_per_token_s)
    for limit_s in (0.0215, 0.022, 0.023, 0.025, 0.03, 0.04, 0.1):
        obs = typical.replace(arrived=typical.arrived.replace(latency_limit_s=jnp.float32(limit_s)))
        in_time = estimate_of(obs, width_s=1e-5, length_cv=1.1).in_time[0]
        assert in_time == pytest.approx(np.mean(exact_s <= limit_s), abs=0.04), limit_s


def test_a_limit_far_away_is_certain() -> None:
    obs = observation([], [running()], [running()] * 4, [running()] * 4 + [waiting()] * 4)
    for expert, latency_s in enumerate(estimate_of(obs).latency_per_token_s):
        missed, kept = (
            estimate_of(obs.replace(arrived=obs.arrived.replace(latency_limit_s=factor * latency_s))).in_time[expert]
            for factor in (0.3, 30.0)
        )
        assert missed < 0.02
        assert kept > 0.98


def check_range(estimate: Impact) -> None:
    for leaf in jax.tree.leaves(estimate):
        assert np.all(np.isfinite(leaf))
    assert np.all(estimate.latency_per_token_s > 0)
    assert np.all((estimate.in_time >= 0) & (estimate.in_time <= 1))
    assert np.all(estimate.qos >= 0)
    assert np.all(estimate.qos_change <= 0)
    assert np.all(estimate.violations_change >= 0)


@settings(max_examples=60)
@given(observations(NUM_EXPERTS), st.permutations(range(NUM_EXPERTS)))
def test_properties_on_any_observation(obs: Observation, order: list[int]) -> None:
    """The loss is bounded by the requests on the expert, and the order of the experts does not matter."""
    estimate, requests = jax.tree.map(np.asarray, (estimate_of(obs), obs.requests))
    check_range(estimate)
    assert np.all(estimate.qos <= obs.arrived.predicted_score)
    present = np.asarray(requests.running | requests.waiting)
    assert np.all(estimate.violations_change <= present.sum(-1) * (1 + 1e-6))
    assert np.all(-estimate.qos_change <= np.sum(requests.predicted_score * present, -1) * (1 + 1e-6))
    permuted = estimate_of(reordered(obs, order))
    for leaf, permuted_leaf in zip(jax.tree.leaves(estimate), jax.tree.leaves(permuted), strict=True):
        np.testing.assert_allclose(permuted_leaf, leaf[np.array(order)], rtol=1e-5, atol=1e-7)


def test_a_batch_of_observations_is_refused() -> None:
    """With as many observations as experts, a batch would broadcast without an error."""
    obs = observation([running()], [waiting()])
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), obs)
    with pytest.raises(InputError, match=r"obs.arrived.prompt_tokens has shape \(2,\), must be \[\] = \[\]"):
        impact(batch)
    with pytest.raises(InputError, match=r"obs.arrived.prompt_tokens has shape \(2,\)"):
        jax.jit(in_flight_qos)(batch)
    wrong = obs.replace(arrived=obs.arrived.replace(predicted_score=jnp.zeros(1)))
    with pytest.raises(InputError, match=r"obs.arrived.predicted_score has shape \(1,\), must be \[N\] = \[2\]"):
        impact(wrong)
    one_by_one = jax.jit(jax.vmap(impact))(batch)
    np.testing.assert_array_equal(one_by_one.net[1], estimate_of(obs).net)


@pytest.mark.parametrize("limit_s", [0.0, 1e-9, 1e6])
def test_extremes_are_finite(limit_s: float) -> None:
    late: dict[str, Any] = {"age_s": 1e6, "latency_limit_s": limit_s, "prompt_tokens": 100_000}
    obs = observation(
        [],
        [running(generated_tokens=30_000, predicted_tokens=30_001.0, **late)] * SLOTS,
        [waiting(predicted_tokens=1e6, **late)] * SLOTS,
        [running(predicted_tokens=11.0)] * 4 + [waiting(predicted_tokens=1.0)] * 4,
        profile=equal_experts(4, kv_blocks=np.array([1, 1, 30_000, 40]), max_waiting=0),
        latency_limit_s=limit_s,
        prompt_tokens=1,
        predicted_tokens=[1.0, 1e6, 1.0, 1e6],
    )
    check_range(estimate_of(obs))


@settings(max_examples=60)
@given(
    others=st.lists(runners(), max_size=2),
    added=runners(),
    prompt_tokens=st.integers(1, 300),
    predicted_tokens=st.floats(1.0, 300.0),
    latency_limit_s=st.floats(0.02, 0.08),
)
def test_one_more_running_request_makes_it_slower(others: list[Seen], added: Seen, **arrived: Any) -> None:
    """This holds while there is a place for every request."""
    estimate = estimate_of(observation(others, [*others, added], profile=equal_experts(2, kv_blocks=400), **arrived))
    assert estimate.latency_per_token_s[1] > estimate.latency_per_token_s[0]
    assert estimate.in_time[1] <= estimate.in_time[0]


@settings(max_examples=60)
@given(observations(NUM_EXPERTS), st.floats(-2.0, 1.0, width=32, allow_subnormal=False))
def test_the_request_is_dropped_just_where_every_placement_is_below_the_price(obs: Observation, price: float) -> None:
    legal = np.asarray(obs.action_mask)
    worth = np.where(legal[:-1], greedy(obs, jnp.float32(price))[1], -np.inf)
    best = worth.max()
    above = best + max(1e-6, 1e-6 * abs(best)) if legal[:-1].any() else 0.0
    for tried in (price, -math.inf, best, above):
        dropped = not legal[:-1].any() or (legal[-1] and best < np.float32(tried))
        chosen = int(greedy(obs, jnp.float32(tried))[0])
        assert chosen == NUM_EXPERTS if dropped else worth[chosen] == best, tried


def test_a_fleet_on_the_brink_gets_no_request() -> None:
    """Each request on it barely meets its limit, and a long prompt would stall all of them."""
    brink = [running(predicted_score=0.9, latency_limit_s=0.033)] * 4
    arrived: dict[str, Any] = {"predicted_score": 0.6, "prompt_tokens": 2000, "predicted_tokens": 150.0}
    arrived["profile"] = equal_experts(2, kv_blocks=400)
    env = Environment(WorldSpec(2, EngineSpec(SLOTS)))
    routers = {name: make_router(name, env) for name in ("impact_greedy", "impact_greedy_no_drop")}

    @jax.jit
    def act(obs: Observation) -> dict[str, jax.Array]:
        return {name: router.act(jax.random.key(0), obs, router.init())[0] for name, router in routers.items()}

    taken = act(observation(brink, brink, **arrived))
    assert taken["impact_greedy"] == 2
    assert taken["impact_greedy_no_drop"] < 2  # either, as they are equal
    must_place = act(observation(brink, brink, legal=[True, True, False], **arrived))
    assert max(must_place.values()) < 2
    assert act(observation(brink, [], **arrived)) == {"impact_greedy": 1, "impact_greedy_no_drop": 1}


def test_actions_are_sampled_with_stale_metrics_only() -> None:
    obs = observation([running()] * 3, [running()] * 2, [], legal=[True, True, False, True])
    keys, temperature = jax.random.split(jax.random.key(0), 20_000), 0.1
    router = impact_greedy(temperature=temperature, price=0.3)
    act = jax.jit(jax.vmap(lambda key, obs: router.act(key, obs, ())[0], in_axes=(0, None)))
    assert len(np.unique(act(keys, obs))) == 1
    sampled = np.bincount(act(keys, obs.replace(staleness_s=jnp.float32(0.1))), minlength=4) / len(keys)
    worth = np.append(estimate_of(obs).net, 0.3) + np.where(obs.action_mask, 0.0, -np.inf)
    np.testing.assert_allclose(sampled, scipy.special.softmax(worth / temperature), atol=0.02)


@pytest.fixture(scope="module")
def runs() -> dict[str, list[RouterRun]]:
    """Runs of several routers on the paper's experts at load 0.9, by name of the router."""
    env, params = make(PRESET, load=LOAD)
    routers = [make_router(name, env) for name in ("impact_greedy", "shortest_queue", "round_robin", "bert_router")]
    runs = evaluate(env, params, routers, scenarios(params, [LOAD], [1000, 1001]), 600, warmup=WARMUP)
    return {router.name: [run for run in runs if run.router is router] for router in routers}


@pytest.mark.slow
def test_the_router_that_uses_the_estimate_beats_the_others(runs: dict[str, list[RouterRun]]) -> None:
    qos = {name: np.mean([run.metrics["qos"] for run in of_router]) for name, of_router in runs.items()}
    best_other = max(value for name, value in qos.items() if name != "impact_greedy")
    assert qos["impact_greedy"] > 1.3 * best_other


@pytest.mark.slow
def test_the_estimate_predicts_which_requests_are_in_time(runs: dict[str, list[RouterRun]]) -> None:
    """The requests are round robin's: almost all requests placed by the estimate are in time."""
    env, params = make(PRESET, load=LOAD)

    def estimate(world: World, x: tuple[jax.Array, Request, jax.Array]) -> tuple[World, jax.Array]:
        gap_s, request, action = x
        world = advance(env.spec, params.experts, world, gap_s)
        in_time = impact(observe(env.spec, params.experts, world, request)).in_time[action]
        return dispatch(env.spec, params.experts, world, request, action)[0], in_time

    run = runs["round_robin"][0]
    trace = run.trace
    assert not run.replayed.log.dropped.any()
    requests = jax.tree.map(jnp.asarray, trace.requests)
    gaps_s = jnp.asarray(np.diff(trace.arrival_s, prepend=0.0), jnp.float32)
    start = empty_world(env.spec, params.experts)
    predicted = jax.lax.scan(estimate, start, (gaps_s, requests, jnp.asarray(run.assignment)))[1]

    experts = jax.tree.map(np.asarray, params.experts)
    in_time = latency_per_token_s(experts, trace, run.assignment, run.replayed) <= trace.latency_limit_s
    predicted, in_time = np.asarray(predicted)[WARMUP:], in_time[WARMUP:]
    assert np.corrcoef(predicted, in_time)[0, 1] > 0.5
    assert np.mean((predicted - in_time) ** 2) < 0.7 * in_time.var()  # Brier score, against that of the base rate
    assert predicted.mean() == pytest.approx(in_time.mean(), abs=0.15)
