"""Worlds sampled from an observation, compared to the true ones, and the planner that simulates actions in them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings

from qos_jax import InputError, Observation, evaluate, make, make_router, router_names, scenarios
from qos_jax.evaluation.statistics import crossed_interval
from qos_jax.impact.imagined_world import expected_remaining_tokens, sample_belief, sample_request
from qos_jax.routers.impact_greedy import impact_greedy
from qos_jax.routers.planner import rollout_planner
from qos_jax.sim import engine
from qos_jax.sim.engine import Slots
from qos_jax.sim.env import EnvState
from tests.helpers.observations import SLOTS, equal_experts, observation, observations, running, waiting

NUM_EXPERTS, RATE_PER_S = 4, 12.0
EXPERTS = tuple((llm, "A40") for llm in ("alpaca-native", "chatglm-6b", "mpt-7b-instruct", "koala-7B-HF"))
ENV, PARAMS = make(
    "paper-3", experts=EXPERTS, rate_per_s=RATE_PER_S, prediction="perfect", max_running=6, max_waiting=2
)
SHORT = rollout_planner(PARAMS.workload, horizon=3, futures=3)  # the tests do not need long plans
short_act = jax.jit(SHORT.act)


@pytest.fixture(scope="module")
def played() -> tuple[EnvState, Observation, Any]:
    """States, observations and memory, leaves [120, ...], of 120 decisions of the short planner."""
    step, history = jax.jit(ENV.step), []
    obs, state = jax.jit(ENV.reset)(jax.random.key(3), PARAMS)
    memory = SHORT.init()
    for key in jax.random.split(jax.random.key(3), 120):
        history.append((state, obs, memory))
        action, memory = short_act(key, obs, memory)
        obs, state, *_ = step(key, state, action, PARAMS)
    return jax.tree.map(lambda *x: jnp.stack(x), *history)


@pytest.mark.slow
class TestSampleBelief:
    def test_with_known_lengths_it_finishes_like_the_true_world(
        self, played: tuple[EnvState, Observation, Any]
    ) -> None:
        """Without further arrivals, and with experts that may start an iteration at once."""
        states, observed, _ = played

        @jax.jit
        @jax.vmap
        def ends(state: EnvState, obs: Observation) -> tuple[Slots, Slots, jax.Array]:
            experts = state.world.experts
            now = experts.replace(clock_s=jnp.zeros_like(experts.clock_s))
            true, belief = (
                engine.drain(ENV.spec.engine, PARAMS.experts, each).slots
                for each in (now, sample_belief(obs, 0.0).experts)
            )
            return true, belief, experts.slots.live

        true, belief, present = jax.tree.map(np.asarray, ends(states, observed))
        assert present.sum() > 500
        assert (present.sum(-1) > 6).any()  # some requests wait
        assert np.array_equal(belief.output_tokens > 0, present)
        assert np.array_equal(belief.output_tokens[present], true.output_tokens[present])
        np.testing.assert_allclose(belief.finish_s[present], true.finish_s[present], rtol=2e-5)

    def test_without_a_key_lengths_are_the_expected_ones(self) -> None:
        obs = observation([running(generated_tokens=30, predicted_tokens=50.0), waiting(predicted_tokens=20.0)])
        slots = sample_belief(obs, 0.5).experts.slots
        expected = 30 + float(expected_remaining_tokens(obs.requests, 0.5)[0, 0])
        assert slots.output_tokens[0].tolist() == [round(expected), 20] + [0] * (SLOTS - 2)
        assert slots.payload.score[0, :2].tolist() == [0.5, 0.5]
        assert not slots.live[0, 2:].any()

    def test_sampled_lengths_follow_the_law_given_the_generated_tokens(self) -> None:
        """Lognormals with the prediction as mean, truncated at the generated tokens."""
        generated, predicted, length_cv = (1, 60, 200), (80.0, 80.0, 201.0), 1.1
        obs = observation(
            [running(generated_tokens=e, predicted_tokens=p) for e, p in zip(generated, predicted, strict=True)],
            profile=equal_experts(1, kv_blocks=100_000),
        )
        keys = jax.random.split(jax.random.key(0), 4000)
        sampled = jax.jit(jax.vmap(lambda key: sample_belief(obs, length_cv, key).experts.slots.output_tokens[0, :3]))(
            keys
        )
        log_sd = math.sqrt(math.log1p(length_cv**2))
        for tokens, e, p in zip(np.asarray(sampled).T, generated, predicted, strict=True):
            assert tokens.min() > e
            law = scipy.stats.lognorm(log_sd, scale=p * math.exp(-(log_sd**2) / 2))
            quantiles = 1 - law.sf(tokens - 0.5 + np.random.default_rng(0).uniform(size=len(tokens))) / law.sf(e + 0.5)
            assert scipy.stats.kstest(quantiles, "uniform").pvalue > 1e-3
        arrived = jax.vmap(lambda key: sample_request(obs, length_cv, key).output_tokens[0])(keys)
        assert np.mean(arrived) == pytest.approx(40.0, rel=0.08)  # the prediction

    def test_admitted_requests_fit_into_memory(self) -> None:
        """An expert admits only requests that fit into its memory, so sampled lengths never exceed it."""
        obs = observation([running(generated_tokens=9, predicted_tokens=1e6)], profile=equal_experts(1, kv_blocks=10))
        for key in (None, jax.random.key(0)):
            slots = sample_belief(obs, 1.1, key).experts.slots
            assert 10 <= int(slots.output_tokens[0, 0]) <= 160 - 32


@pytest.mark.slow
class TestPlanner:
    @settings(max_examples=30)
    @given(observations(NUM_EXPERTS))
    @example(observation(*[[]] * NUM_EXPERTS, legal=[False] * (NUM_EXPERTS + 1)))
    def test_its_actions_are_legal(self, obs: Observation) -> None:
        mask = np.asarray(obs.action_mask)
        action = int(short_act(jax.random.key(0), obs, SHORT.init())[0])
        assert mask[action] if mask.any() else action == NUM_EXPERTS

    def test_it_does_not_observe_ground_truth(self, played: tuple[EnvState, Observation, Any]) -> None:
        """Its actions do not change with the true scores and the true remaining tokens."""
        states, observed, memories = played

        @jax.vmap
        def other(state: EnvState) -> EnvState:
            slots, request = state.world.experts.slots, state.request
            slots = slots.replace(
                output_tokens=jnp.where(slots.live, slots.output_tokens + 77, slots.output_tokens),
                payload=slots.payload.replace(score=1.0 - slots.payload.score),
            )
            world = state.world.replace(experts=state.world.experts.replace(slots=slots))
            request = request.replace(score=1.0 - request.score, output_tokens=request.output_tokens + 77)
            return state.replace(world=world, request=request)

        observe = jax.jit(jax.vmap(lambda state: ENV.observe(state, PARAMS)))
        observed_of_others, chosen = observe(other(states)), []
        for i in range(20, 120, 3):
            both = [jax.tree.map(lambda x, i=i: x[i], (obs, memories)) for obs in (observed, observed_of_others)]
            action, other_action = (int(short_act(jax.random.key(i), *each)[0]) for each in both)
            assert other_action == action
            chosen.append(action)
        assert len(set(chosen)) > 2

    def test_it_estimates_the_rate_from_ages(self, played: tuple[EnvState, Observation, Any]) -> None:
        gaps = played[2]
        assert not gaps.weight[0]
        assert float(gaps.weight[-1] / gaps.sum_s[-1]) == pytest.approx(RATE_PER_S, rel=0.3)

    def test_it_drops_a_request_that_would_delay_all_others_beyond_their_limit(self) -> None:
        """Each request just meets its limit, and a long prompt would stall all of them."""
        at_limit = [running(predicted_score=0.9, latency_limit_s=0.033)] * 4
        arrived: dict[str, Any] = {"predicted_score": 0.6, "prompt_tokens": 2000, "predicted_tokens": 150.0}
        arrived["profile"] = equal_experts(NUM_EXPERTS, kv_blocks=400)

        def action(obs: Observation) -> int:
            return int(short_act(jax.random.key(0), obs, SHORT.init())[0])

        assert action(observation(*[at_limit] * 4, **arrived)) == NUM_EXPERTS
        assert action(observation(*[at_limit] * 4, legal=[True] * 4 + [False], **arrived)) < NUM_EXPERTS
        assert action(observation(at_limit, at_limit, [], at_limit, **arrived)) == 2

    def test_the_same_key_gives_the_same_action(self, played: tuple[EnvState, Observation, Any]) -> None:
        obs, memory = jax.tree.map(lambda x: x[-1], played[1:])
        one, other = (short_act(jax.random.key(5), obs, memory)[0] for _ in range(2))
        assert one == other


class TestName:
    def test_it_is_made_by_name_and_not_among_all(self) -> None:
        assert make_router("rollout", ENV, PARAMS).name == "rollout"
        assert "rollout" not in router_names(ENV)

    def test_it_needs_the_law_of_requests(self) -> None:
        with pytest.raises(InputError, match="router 'rollout' plans ahead, but workload is None"):
            make_router("rollout", ENV)


@pytest.mark.slow
def test_planning_costs_no_qos() -> None:
    """Near saturation, compared to impact-greedy; the study ``planner`` measures by how much it is better."""
    env, params = make("paper-3", load=0.9)
    routers = [impact_greedy(), rollout_planner(params.workload)]
    runs = evaluate(env, params, routers, scenarios(params, [0.9], range(1000, 1004)), 300, warmup=100)
    greedy, planned = np.array([run.metrics["qos"] for run in runs]).reshape(2, -1)
    assert crossed_interval((planned - greedy)[None])["high"] > 0.0
