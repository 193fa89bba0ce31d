"""Features of the nodes: their values, that they are finite, and which requests are kept."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qos_jax import InputError, Observation
from qos_jax.encoder.flat import FLAT_ARRIVED, flat_view
from qos_jax.encoder.graph import (
    EXPERT_FEATURES,
    FEATURE_LIMIT,
    IMPACT_FEATURES,
    REQUEST_FEATURES,
    GraphFeatures,
    graph_features,
)
from qos_jax.impact.estimate import impact
from tests.helpers.encoder_worlds import nodes_of_batch, observations_of, one_of, quick_jit
from tests.helpers.observations import observation, observations, running, waiting
from tests.helpers.small_env import small_experts

nodes_of = quick_jit(graph_features, static_argnames=("with_impact", "later_prompts", "slots"))


def columns(features: object, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    values = np.asarray(features)
    assert values.shape[-1] == len(names)
    return {name: values[..., i] for i, name in enumerate(names)}


def two_experts(**arrived: float) -> Observation:
    on_time = running(prompt_tokens=30, generated_tokens=10, age_s=0.5, latency_limit_s=0.05, predicted_tokens=20.0)
    late = running(prompt_tokens=30, generated_tokens=10, age_s=0.9, latency_limit_s=0.03, predicted_tokens=20.0)
    new = waiting(prompt_tokens=100, age_s=0.0, latency_limit_s=0.1, predicted_tokens=40.0, predicted_score=0.8)
    return observation([on_time, late, new], [], **({"latency_limit_s": 0.05} | arrived))


def test_requests_by_hand() -> None:
    found = nodes_of(two_experts())
    assert found.running[0].tolist() == [True, True] + [False] * 6
    assert found.waiting[0].tolist() == [False, False, True] + [False] * 5
    of_request = columns(found.requests[0, :3], REQUEST_FEATURES)
    expected = {
        "prompt_tokens": np.log([31, 31, 101]) / math.log(1025),
        "predicted_score": [0.5, 0.5, 0.8],
        "predicted_tokens": np.log([21, 21, 41]) / math.log(1025),
        "generated_tokens": np.log([11, 11, 1]) / math.log(1025),
        "age": [0.5, 1.5, 0.0],
        "slack": [1.0, -1.0, 1.0],
        "latency_limit": [1.0, 0.6, 2.0],
        "kv_share": [3 / 40, 3 / 40, 0.0],
        "computed": [39 / 40, 39 / 40, 0.0],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(of_request[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
    assert not np.any(found.requests[0, 3:]) and not np.any(found.requests[1])


def test_experts_carry_the_flat_columns_and_the_impact_estimate() -> None:
    obs = two_experts(prompt_tokens=500)
    flat, found = np.asarray(quick_jit(flat_view)(obs)), nodes_of(obs)
    np.testing.assert_allclose(found.arrived, flat[: len(FLAT_ARRIVED)], rtol=1e-6)
    of_expert = columns(found.experts, EXPERT_FEATURES + IMPACT_FEATURES)
    plain = np.stack([of_expert[name] for name in EXPERT_FEATURES], -1)
    np.testing.assert_allclose(plain.ravel(), flat[len(FLAT_ARRIVED) :], rtol=1e-6)
    np.testing.assert_allclose(nodes_of(obs, with_impact=False).experts, plain, rtol=1e-6)
    estimate = quick_jit(impact)(obs)
    np.testing.assert_allclose(of_expert["own_latency"], estimate.latency_per_token_s / 0.05, rtol=1e-5)
    np.testing.assert_allclose(of_expert["qos"], estimate.qos, rtol=1e-5)
    np.testing.assert_allclose(np.expm1(of_expert["violations_change"]), estimate.violations_change, atol=1e-6)
    assert of_expert["qos_change"][0] < 0 and of_expert["qos_change"][1] == 0
    assert of_expert["net"][0] < of_expert["net"][1]


def test_the_estimate_may_count_prompts_that_take_freed_places() -> None:
    profile = small_experts(2, prefill_per_token_s=5e-4)
    obs = two_experts(prompt_tokens=500)
    obs = obs.replace(experts=obs.experts.replace(profile=profile))
    estimate = quick_jit(partial(impact, later_prompts=True))(obs)
    found = columns(nodes_of(obs, later_prompts=True).experts, EXPERT_FEATURES + IMPACT_FEATURES)
    np.testing.assert_allclose(found["own_latency"], estimate.latency_per_token_s / 0.05, rtol=1e-5)
    assert estimate.latency_per_token_s[0] > quick_jit(impact)(obs).latency_per_token_s[0]


@settings(max_examples=40, deadline=None)
@given(
    obs=observations(),
    limit_s=st.sampled_from([0.0, 1e-9, 0.03, 1e9, np.inf]),
    age_s=st.sampled_from([0.0, 1.0, 1e6]),
    predicted_tokens=st.sampled_from([0.0, 1.0, 1e6]),
    most=st.sampled_from([(1, 0, 1), (2**30, 2**30, 2**30)]),
)
def test_features_are_always_finite_and_small(
    obs: Observation, limit_s: float, age_s: float, predicted_tokens: float, most: tuple[int, int, int]
) -> None:
    def full(like: object, value: float) -> np.ndarray:
        return np.full_like(np.asarray(like), value)

    max_running, max_waiting, kv_blocks = (full(obs.experts.running, limit) for limit in most)
    profile = obs.experts.profile.replace(max_running=max_running, max_waiting=max_waiting, kv_blocks=kv_blocks)
    tokens = full(obs.arrived.predicted_tokens, predicted_tokens)
    obs = obs.replace(
        arrived=obs.arrived.replace(latency_limit_s=np.float32(limit_s), predicted_tokens=tokens),
        experts=obs.experts.replace(profile=profile),
        requests=obs.requests.replace(
            latency_limit_s=full(obs.requests.latency_limit_s, limit_s), age_s=full(obs.requests.age_s, age_s)
        ),
    )
    found = nodes_of(obs)
    for name in ("arrived", "experts", "requests"):
        features = np.asarray(getattr(found, name))
        assert features.dtype == np.float32
        assert np.all(np.abs(features) <= FEATURE_LIMIT), name


def test_values_in_empty_slots_are_not_read() -> None:
    obs = two_experts()
    present = np.asarray(obs.requests.running | obs.requests.waiting)
    other = jax.tree.map(lambda x: x if x.dtype == bool else np.where(present, x, x.dtype.type(3)), obs.requests)
    jax.tree.map(np.testing.assert_array_equal, nodes_of(obs.replace(requests=other)), nodes_of(obs))


def spread_out(obs: Observation, slot: np.ndarray) -> Observation:
    """The same requests: request i of every expert in slot ``slot[i]``, with empty slots in between."""

    def spread(x: jax.Array) -> np.ndarray:
        wide = np.zeros((x.shape[0], 3 * x.shape[1]), x.dtype)
        wide[:, slot] = x
        return wide

    return obs.replace(requests=jax.tree.map(spread, obs.requests))


@pytest.mark.parametrize("slots", [1, 2, 5, 8, 11])
def test_the_first_requests_are_kept_with_empty_slots_in_between(slots: int) -> None:
    obs = two_experts()
    gaps = np.array([2, 3, 7, 10, 11, 15, 20, 23])
    kept, complete = nodes_of(spread_out(obs, gaps), slots=slots), nodes_of(obs)
    assert kept.requests.shape[-2] == slots
    both = min(slots, 3)
    for name in ("requests", "running", "waiting"):
        few, every = np.asarray(getattr(kept, name)), np.asarray(getattr(complete, name))
        np.testing.assert_allclose(few[:, :both], every[:, :both], rtol=1e-6)
        assert not few[:, both:].any()


@pytest.mark.slow
def test_in_a_real_world_all_requests_are_kept_if_there_are_enough_slots() -> None:
    """Finished requests leave empty slots, so taking the first slots would fail this test."""
    obs = one_of(observations_of("paper-3", 3.0))  # a light load, of which many requests have finished
    complete = nodes_of(obs)
    present = np.asarray(complete.running | complete.waiting)
    slots = int(present.sum(-1).max())
    kept = nodes_of(obs, slots=slots)
    assert present[..., slots:].any()
    np.testing.assert_array_equal(np.sum(kept.running, -1), np.sum(complete.running, -1))
    np.testing.assert_allclose(
        np.asarray(kept.requests)[kept.running | kept.waiting], complete.requests[present], rtol=1e-5
    )


def test_slots_below_one_are_refused() -> None:
    with pytest.raises(InputError, match="slots is 0"):
        graph_features(two_experts(), slots=0)


def test_nodes_of_a_batch() -> None:
    obs = observations_of("paper-3", 30.0)
    batch = nodes_of_batch(obs)
    for i in range(4):
        alone = nodes_of(one_of(obs, i))
        for field in dataclasses.fields(GraphFeatures):
            found, expected = getattr(batch, field.name)[i], getattr(alone, field.name)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=field.name)
