"""Routers of today's serving systems: the decision that is characteristic of each, in a fleet made for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qos_jax import InputError, Observation, Router, make_router
from qos_jax.impact.estimate import impact
from qos_jax.routers import production
from qos_jax.routers.impact_greedy import PRICE
from tests.helpers.observations import equal_experts, observation, running, waiting
from tests.helpers.small_env import small_env, small_experts

ENV = small_env(3)
BUSY = [running()] * 3
FULL = [running()] * 4 + [waiting()] * 3


def taken(router: Router, obs: Observation, memory: Any = None) -> int:
    return int(router.act(jax.random.key(0), obs, router.init() if memory is None else memory)[0])


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.1, 1), (0.4, 0)],  # the best score leads that of the cheapest expert by .3
)
def test_a_score_threshold_decides_between_the_best_and_the_cheapest(threshold: float, expected: int) -> None:
    obs = observation(FULL, BUSY, [], profile=small_experts(3), predicted_score=[0.4, 0.7, 0.5])
    assert taken(production.score_threshold(threshold), obs) == expected


def test_of_scores_that_are_nearly_the_best_the_least_loaded_is_taken() -> None:
    obs = observation(BUSY, [running()], [], predicted_score=[0.70, 0.69, 0.60], latency_limit_s=0.2)
    assert taken(production.multi_factor(0.02), obs) == 1
    assert taken(production.multi_factor(0.2), obs) == 2
    assert taken(production.multi_factor(0.0), obs) == 0


def test_an_expert_above_its_ceiling_is_not_taken_for_its_score() -> None:
    obs = observation(BUSY, [], [], predicted_score=[0.9, 0.5, 0.4], latency_limit_s=0.2)
    assert taken(production.multi_factor(0.0), obs) == 0
    crowded = obs.replace(experts=obs.experts.replace(kv_used_blocks=jnp.array([39, 0, 0])))  # of 40
    assert taken(production.multi_factor(0.0), crowded) == 1
    assert taken(production.multi_factor(0.0), observation(BUSY, BUSY, BUSY, latency_limit_s=1e-4)) < 3


def test_the_cache_is_followed_where_loads_are_balanced() -> None:
    obs = observation(BUSY, [running()], [])
    assert taken(production.prefix_affinity(), obs) == 2
    share = jnp.array([0.9, 0.6, 0.0])
    cached = obs.replace(
        arrived=obs.arrived.replace(cached_tokens=(share * obs.arrived.prompt_tokens).astype(jnp.int32))
    )
    assert taken(production.prefix_affinity(), cached) == 0
    assert taken(production.prefix_affinity(least_share=0.95), cached) == 2
    assert taken(production.prefix_affinity(most_ahead=len(BUSY) - 1), cached) == 2


def test_latency_is_priced_where_it_is_within_the_limit() -> None:
    obs = observation(BUSY, [], [], predicted_score=[0.7, 0.68, 0.4], latency_limit_s=0.05)
    assert taken(production.route_balance(0.0, 0.0), obs) == 0
    assert taken(production.route_balance(0.5, 0.0), obs) == 1


def test_what_is_hardly_in_time_is_filtered_out() -> None:
    obs = observation(FULL, [], [], predicted_score=[0.9, 0.5, 0.4], latency_limit_s=0.03)
    assert float(impact(obs).in_time[0]) < 0.3
    assert taken(production.route_balance(0.0, 0.5), obs) == 1
    assert taken(production.route_balance(0.0, 0.0), obs) == 0


class TestLatencyScorer:
    OBS = observation(BUSY, [running()], FULL, latency_limit_s=0.1)

    def test_most_and_least_headroom(self) -> None:
        assert taken(production.latency_scorer(least_headroom=False), self.OBS) == 1
        assert taken(production.latency_scorer(least_headroom=True), self.OBS) == 2

    def test_what_no_expert_can_answer_in_time_is_refused_or_sent_to_the_one_with_most_headroom(self) -> None:
        late = self.OBS.replace(arrived=self.OBS.arrived.replace(latency_limit_s=jnp.float32(1e-3)))
        assert taken(production.latency_scorer(), late) == 3
        assert taken(production.latency_scorer(admit_all=True), late) == 1
        forbidden = late.replace(action_mask=jnp.array([True, True, True, False]))
        assert taken(production.latency_scorer(), forbidden) == 1

    @pytest.mark.parametrize("factor", [0.5, 2.0])
    def test_it_learns_how_fast_experts_are(self, factor: float) -> None:
        """All take ``factor`` times what the profile says of an idle expert for each token."""
        profile = equal_experts(3, per_sequence_s=np.zeros(3), per_kv_token_s=np.zeros(3))
        tokens = 20
        one = running(generated_tokens=tokens, age_s=factor * 0.02 * tokens)
        obs, router = observation([one], [one], [one], profile=profile), production.latency_scorer(rate=0.2)
        memory = router.init()
        for _ in range(100):
            _, memory = router.act(jax.random.key(0), obs, memory)
        assert float(memory.factors[0]) == pytest.approx(factor, rel=0.02)


@pytest.mark.parametrize("score", [0.9, 0.02])
def test_admission_refuses_what_adds_less_than_its_price(score: float) -> None:
    obs = observation(BUSY, [], FULL, predicted_score=score, latency_limit_s=0.2)
    expected = 3 if float(impact(obs).net[1]) < PRICE else 1
    assert (expected == 3) == (score < 0.1)
    assert taken(make_router("shortest_queue+admission", ENV), obs) == expected
    assert taken(make_router("shortest_queue", ENV), obs) == 1
    forbidden = obs.replace(action_mask=jnp.array([True, True, True, False]))
    assert taken(make_router("shortest_queue+admission", ENV), forbidden) == 1


def test_without_drops_a_request_is_placed_wherever_one_can_take_it() -> None:
    obs = observation(FULL, FULL, FULL, latency_limit_s=1e-3)
    assert taken(make_router("impact_greedy", ENV), obs) == 3
    assert taken(make_router("impact_greedy+no_drop", ENV), obs) < 3
    nowhere = obs.replace(action_mask=jnp.array([False, False, False, True]))
    assert taken(make_router("impact_greedy+no_drop", ENV), nowhere) == 3


@pytest.mark.parametrize("name", ["impact_greedy+admission+no_drop", "impact_greedy+", "+admission", "random+x"])
def test_other_variants_are_unknown(name: str) -> None:
    with pytest.raises(InputError, match="is unknown"):
        make_router(name, ENV)
