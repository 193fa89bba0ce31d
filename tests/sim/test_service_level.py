"""When an answer is in time: against plain comparisons, in the world and in what routers are told."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qos_jax import ExpertProfile, Observation, RequestLog, RequestTrace, ServiceLimits
from qos_jax.encoder.flat import flat_view
from qos_jax.encoder.graph import graph_features
from qos_jax.encoder.jraph_views import graph_view
from qos_jax.evaluation.metrics import in_time_of, qos_of
from qos_jax.impact.estimate import impact
from qos_jax.sim import engine
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.replay import ReplayResult
from qos_jax.sim.service_level import expected_margin_s, margin_s, per_token_limit_s
from qos_jax.sim.types import Request
from qos_jax.sim.world import SlotPayload, World, collect
from tests.helpers.observations import observation, running, waiting
from tests.helpers.small_env import small_experts

estimate = jax.jit(impact)

LIMIT_S = st.one_of(st.just(math.inf), st.floats(1e-3, 100.0))


def request(latency_limit_s: object, ttft_s: object, tpot_s: object, e2e_s: object) -> Request:
    limits = ServiceLimits(*(jnp.asarray(each, jnp.float32) for each in (ttft_s, tpot_s, e2e_s)))
    return Request(None, None, None, jnp.asarray(latency_limit_s, jnp.float32), None, None, limits)  # type: ignore[arg-type]


@given(
    limits=st.tuples(LIMIT_S, LIMIT_S, LIMIT_S, LIMIT_S),
    tokens=st.integers(1, 500),
    ttft_s=st.floats(1e-3, 50.0),
    decode_s=st.floats(1e-3, 50.0),
)
def test_the_margin_has_the_sign_of_the_nearest_limit(
    limits: tuple[float, ...], tokens: int, ttft_s: float, decode_s: float
) -> None:
    decode_s *= tokens > 1
    e2e_s = ttft_s + decode_s
    used = [e2e_s / tokens / limits[0], ttft_s / limits[1], e2e_s / limits[3]]
    used += [decode_s / (tokens - 1) / limits[2]] if tokens > 1 else []
    margin = float(margin_s(request(*limits), float(tokens), e2e_s, ttft_s))
    if max(used) < 1 - 1e-4:
        assert margin > 0
        assert e2e_s / tokens <= float(per_token_limit_s(request(*limits), float(tokens))) * (1 + 1e-4)
    if max(used) > 1 + 1e-4:
        assert margin < 0


def test_a_first_token_on_time_is_never_late_again() -> None:
    wants = request(math.inf, 0.5, math.inf, math.inf)
    for ttft_s, has_first, is_met in [(0.4, True, True), (0.6, True, False), (0.4, False, True), (0.6, False, False)]:
        assert (expected_margin_s(wants, 50.0, 900.0, ttft_s, has_first) > 0) == is_met
    early = expected_margin_s(wants, 50.0, 900.0, 0.4, False)
    assert float(early) == pytest.approx(0.1 / 50)  # it may still be late, by so much for each token
    assert expected_margin_s(wants, 50.0, 900.0, 0.4, True) == math.inf


def test_the_world_counts_what_the_metrics_count() -> None:
    """Finished answers in the slots of two experts, and the same as a log."""
    rng = np.random.default_rng(0)
    experts, shape = small_experts(2, network_s=np.array([0.0, 0.3])), (2, 64)
    tokens = rng.integers(1, 30, shape)
    first_s, decode_s, score = (
        rng.exponential(1.0, shape),
        rng.exponential(0.1, shape) * (tokens - 1),
        rng.random(shape),
    )
    limits = [rng.choice([math.inf, 0.5, 2.0], shape) for _ in range(3)]
    per_token_s = rng.choice([math.inf, 0.1, 0.5], shape)

    payload = SlotPayload(*(jnp.asarray(x, jnp.float32) for x in (score, per_token_s, score, tokens)),
                          ServiceLimits(*(jnp.asarray(x, jnp.float32) for x in limits)))  # fmt: skip
    state = engine.init_state(EngineSpec(64), (2,), payload)
    state = state.replace(
        slots=state.slots.replace(
            output_tokens=jnp.asarray(tokens, jnp.int32),
            generated=jnp.asarray(tokens, jnp.int32),
            first_token_s=jnp.asarray(first_s, jnp.float32),
            finish_s=jnp.asarray(first_s + decode_s, jnp.float32),
            payload=payload,
        )
    )
    _, completions = collect(experts, World(state, None))

    expert = np.repeat([0, 1], 64)
    columns = [x.ravel() for x in (tokens, first_s, first_s + decode_s, score, per_token_s, *limits)]
    tokens, first_s, finish_s, score, per_token_s, *limits = columns
    both = lambda x: np.stack([x, x], 1)  # noqa: E731
    trace = RequestTrace(np.zeros(128), None, both(tokens), both(score), per_token_s, limits=ServiceLimits(*limits))
    log = RequestLog(finish_s, first_s, np.zeros(128, int), np.zeros(128, bool))
    replayed = ReplayResult(log, *[np.zeros(2)] * 3)
    profile: ExpertProfile = jax.tree.map(np.asarray, experts)
    in_time = in_time_of(profile, trace, expert, replayed)
    assert 20 < in_time.sum() < 108
    assert int(completions.violations) == np.sum(~in_time)
    assert float(completions.qos) == pytest.approx(qos_of(profile, trace, expert, replayed).sum(), rel=1e-5)


def limited(obs: Observation, ttft_s: float, tpot_s: float, e2e_s: float) -> Observation:
    """The same observation, but with further limits for every request; running ones had their first token at once."""
    limits = ServiceLimits(*(jnp.float32(x) for x in (ttft_s, tpot_s, e2e_s)))
    everywhere = jax.tree.map(lambda x: jnp.broadcast_to(x, obs.requests.running.shape), limits)
    first_token_s = jnp.where(obs.requests.generated_tokens > 0, 0.1, 0.0)
    return obs.replace(
        arrived=obs.arrived.replace(limits=limits),
        requests=obs.requests.replace(limits=everywhere, first_token_s=first_token_s),
    )


FLEET = ([running(), running(), waiting(), waiting()], [running()], [])


def test_limits_that_limit_nothing_change_no_estimate() -> None:
    obs = observation(*FLEET)
    plain, same = estimate(obs), estimate(limited(obs, math.inf, math.inf, math.inf))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, same)


@pytest.mark.parametrize("which", range(3))
def test_a_tighter_limit_is_met_less_often(which: int) -> None:
    obs = observation(*FLEET, latency_limit_s=0.2)
    in_time = []
    for factor in (100.0, 1.0, 0.3):
        limits = [math.inf] * 3
        limits[which] = factor * (0.05, 0.024, 1.0)[which]
        in_time.append(np.asarray(estimate(limited(obs, *limits)).in_time))
    assert np.all(np.diff(in_time, axis=0) <= 1e-6)
    assert np.all(in_time[0] > 0.9)
    assert np.all(in_time[2] < 0.5)


def test_a_placement_costs_others_most_at_a_limit_that_just_holds_without_it() -> None:
    obs, loss = observation(*FLEET, prompt_tokens=2000, latency_limit_s=0.2), []
    obs = obs.replace(requests=obs.requests.replace(latency_limit_s=jnp.full_like(obs.requests.latency_limit_s, 0.5)))
    for e2e_s in np.linspace(1.0, 8.0, 29):
        loss.append(-float(estimate(limited(obs, math.inf, math.inf, e2e_s)).qos_change[0]))
    most = int(np.argmax(loss))
    assert loss[most] > 0.1 + max(loss[0], loss[-1], 0)
    assert 0 < most < len(loss) - 1


def test_features_are_finite_without_a_limit_per_token() -> None:
    obs = limited(observation(*FLEET, latency_limit_s=math.inf), 0.5, math.inf, math.inf)
    obs = obs.replace(
        requests=obs.requests.replace(latency_limit_s=jnp.full_like(obs.requests.latency_limit_s, np.inf))
    )
    assert np.all(np.isfinite(flat_view(obs)))
    features = graph_features(obs)
    assert all(np.all(np.isfinite(x)) for x in (features.arrived, features.experts, features.requests))
    nodes = graph_view(jax.tree.map(np.asarray, obs))["arrived", "expert"].nodes
    assert set(nodes["ttft_s"]) == {0.0, np.float32(0.5)}
