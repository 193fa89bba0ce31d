"""LLMs that share a card: world, replay and reference agree on who is loaded when, and what waits for it."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qos_jax
from qos_jax import (
    ExpertProfile,
    InputError,
    Request,
    RequestTrace,
    evaluate,
    load_fleet,
    make,
    make_router,
    scenarios,
    train,
)
from qos_jax.agent.recipes import Recipe
from qos_jax.fleet.fleet_file import Fleet
from qos_jax.fleet.profiles import profile_of
from qos_jax.gateway.fleet import backends_of
from qos_jax.impact.estimate import impact
from qos_jax.sim.capacity import saturation_rate, saturation_rates
from qos_jax.sim.iterations import iterations_of
from qos_jax.sim.replay import replay_many
from qos_jax.sim.types import SharedCards
from qos_jax.sim.validation import of_one_type
from qos_jax.sim.world import World, advance, closed, collect, dispatch, empty_world, observe
from tests.helpers.everything_once import tiny_agent
from tests.helpers.observations import observation, running
from tests.helpers.reference import replay_reference
from tests.helpers.small_env import small_env, small_experts

J = 60


def experts_on(*cards: int, load_s: float = 0.7, **fields: Any) -> ExpertProfile:
    """Experts on these cards, of which each takes a little longer to load than the one before."""
    experts = small_experts(len(cards), **fields)
    number = np.array(cards, np.int32)
    return experts.replace(cards=SharedCards(number, load_s * (1.0 + 0.1 * np.arange(len(cards)))))


def trace_of(rng: np.random.Generator, num_experts: int, rate_per_s: float) -> RequestTrace:
    gaps_s = rng.exponential(1 / rate_per_s, J)
    return RequestTrace(np.cumsum(gaps_s), rng.integers(1, 120, J), rng.integers(1, 60, (J, num_experts)))


def in_turns(rng: np.random.Generator, num_experts: int, longest: int = 12) -> np.ndarray:
    """Experts of J requests, of which several in a row go to one."""
    return np.repeat(rng.integers(0, num_experts, J), rng.integers(1, longest + 1, J))[:J]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    cards=st.sampled_from([(0, 0), (0, 0, 1), (5, 2, 5, 2), (1, 1, 1, 0)]),
    rate_per_s=st.sampled_from([0.3, 3.0, 30.0]),
    load_s=st.sampled_from([0.0, 0.7, 20.0]),
    is_async=st.booleans(),
)
def test_replay_agrees_with_the_reference(
    seed: int, cards: tuple[int, ...], rate_per_s: float, load_s: float, is_async: bool
) -> None:
    rng = np.random.default_rng(seed)
    experts = experts_on(*cards, load_s=load_s, async_scheduling=is_async, standby_s=0.3)
    trace, assignment = trace_of(rng, len(cards), rate_per_s), in_turns(rng, len(cards))
    expected = replay_reference(experts, trace, assignment)
    taken = np.where(expected.dropped, -1, assignment)  # a router sends none to an LLM that is leaving
    expected = replay_reference(experts, trace, taken)
    (result,) = replay_many(experts, [trace], [taken])
    np.testing.assert_array_equal(result.log.dropped, expected.dropped)
    np.testing.assert_allclose(result.log.finish_s, expected.finish_s, rtol=1e-9)
    np.testing.assert_allclose(result.log.first_token_s, expected.first_token_s, rtol=1e-9)
    np.testing.assert_allclose(result.busy_s, [expert.busy_s for expert in expected.experts], rtol=1e-9)


def test_a_swap_waits_for_the_last_answer_and_the_loading() -> None:
    experts = experts_on(0, 0, load_s=5.0, step_base_s=0.1, prefill_base_s=0.0, prefill_per_token_s=0.0,
                         per_sequence_s=0.0, per_kv_token_s=0.0)  # fmt: skip
    trace = RequestTrace(np.array([0.0, 1.0, 1.5, 30.0]), np.full(4, 8), np.full((4, 2), 20))
    log = qos_jax.replay(experts, trace, np.array([0, 1, 1, 0]))
    # The first answer takes 2 s, then 5.5 s of loading; the third request came before its end and is in the same batch.
    np.testing.assert_allclose(log.finish_s, [2.0, 9.5, 9.5, 37.0], rtol=1e-6)
    np.testing.assert_allclose(log.first_token_s[1:3], 7.6, rtol=1e-6)


def test_a_request_for_an_llm_that_leaves_waits_until_it_is_loaded_again() -> None:
    experts = experts_on(0, 0, load_s=5.0, step_base_s=0.1, prefill_base_s=0.0, prefill_per_token_s=0.0,
                         per_sequence_s=0.0, per_kv_token_s=0.0)  # fmt: skip
    trace = RequestTrace(np.array([0.0, 1.0, 1.5]), np.full(3, 8), np.full((3, 2), 20))
    log = qos_jax.replay(experts, trace, np.array([0, 1, 0]))
    np.testing.assert_allclose(log.finish_s, [2.0, 9.5, 16.5], rtol=1e-6)


class TestWorld:
    N = 4

    def served(self, seed: int) -> Any:
        """Sums and actions of requests that go to a random expert, several in a row to one."""
        spec = small_env(self.N, slots=64, shared_cards=True).spec
        experts = of_one_type(jax.tree.map(jnp.asarray, experts_on(0, 0, 1, 0, max_waiting=20, kv_blocks=400)))
        rng = np.random.default_rng(seed)
        trace, actions = trace_of(rng, self.N, 8.0), in_turns(rng, self.N, longest=5)
        requests = Request(
            *(jnp.asarray(x, jnp.int32) for x in (trace.prompt_tokens, trace.output_tokens)),
            *(jnp.ones((J, self.N)), jnp.ones(J), jnp.ones((J, self.N)), jnp.ones((J, self.N))),
        )

        def step(world: World, x: Any) -> Any:
            gap_s, request, action = x
            world, before = collect(experts, advance(spec, experts, world, gap_s))
            obs = observe(spec, experts, world, request)
            refuses = closed(world)[action]
            world, dropped = dispatch(spec, experts, world, request, action)
            return world, (before, obs, refuses, dropped, world.loaded)

        gaps_s = jnp.asarray(np.diff(trace.arrival_s, prepend=0.0), jnp.float32)
        start = empty_world(spec, experts)
        world, found = jax.jit(lambda x: jax.lax.scan(step, start, x))((gaps_s, requests, jnp.asarray(actions)))
        _, rest = collect(experts, advance(spec, experts, world, jnp.float32(1e5)))
        return experts, trace, actions, found, rest

    @pytest.mark.parametrize("seed", range(3))
    def test_it_agrees_with_the_replay(self, seed: int) -> None:
        experts, trace, actions, (before, _, refuses, dropped, loaded), rest = self.served(seed)
        assert refuses.any() and not refuses.all()
        np.testing.assert_array_equal(dropped, refuses)  # no queue is full
        np.testing.assert_array_equal(np.asarray(loaded)[:, [0, 1, 3]].sum(-1), 1)  # of the three on one card
        assert loaded[:, 2].all()
        log = qos_jax.replay(experts, trace, np.where(refuses, -1, actions))
        finished = np.sum(before.finished) + rest.finished
        assert finished == np.isfinite(log.finish_s).sum()
        tokens = trace.output_tokens[np.arange(J), actions]
        latency_s = np.nansum((log.finish_s - trace.arrival_s + 0.01) / tokens)
        assert np.sum(before.latency_per_token_s) + rest.latency_per_token_s == pytest.approx(latency_s, rel=1e-3)

    def test_the_router_sees_what_is_closed_and_how_long_loading_takes(self) -> None:
        experts, _, actions, (_, obs, refuses, _, loaded), _ = self.served(0)
        legal = np.asarray(obs.action_mask)[np.arange(J), actions]
        np.testing.assert_array_equal(legal, ~refuses)
        was_loaded = np.concatenate([[[True, False, True, False]], np.asarray(loaded)[:-1]])
        left_s, load_s = np.asarray(obs.experts.load_left_s), np.asarray(experts.cards.load_s)
        np.testing.assert_allclose(left_s[~was_loaded], np.broadcast_to(load_s, left_s.shape)[~was_loaded])
        assert (left_s[was_loaded] <= np.broadcast_to(load_s, left_s.shape)[was_loaded]).all()
        assert (left_s[was_loaded] > 0).any() and (left_s[was_loaded] == 0).any()


def test_the_estimate_waits_for_the_card() -> None:
    profile = experts_on(0, 0, 1, load_s=10.0)
    busy = [[running(predicted_tokens=100.0)], [], [running(predicted_tokens=100.0)]]
    obs = observation(*busy, profile=profile)
    free = impact(obs.replace(experts=obs.experts.replace(profile=profile.replace(cards=None))))
    load_left_s = jnp.array([0.0, 11.0, 0.0])
    shared = impact(obs.replace(experts=obs.experts.replace(load_left_s=load_left_s)))
    tokens = np.asarray(obs.arrived.predicted_tokens)
    more_s = (np.asarray(shared.latency_per_token_s) - np.asarray(free.latency_per_token_s)) * tokens
    np.testing.assert_allclose(more_s[[0, 2]], 0.0, atol=1e-4)
    assert more_s[1] > 11.0 + 0.5  # and the rest of the answer on the loaded one
    with pytest.raises(InputError, match='form is "rollout", must be "analytic"'):
        impact(obs.replace(experts=obs.experts.replace(load_left_s=load_left_s)), form="rollout")


@pytest.mark.parametrize("rate_per_s", [0.01, 1.0])
def test_the_estimate_charges_for_what_the_card_loses_meanwhile(rate_per_s: float) -> None:
    profile = experts_on(0, 0, 1, load_s=10.0)
    obs = observation([], [], [], profile=profile, recent_rate_per_s=rate_per_s, predicted_score=[0.6, 0.7, 0.5])
    obs = obs.replace(experts=obs.experts.replace(load_left_s=jnp.array([0.0, 11.0, 0.0])))
    found = impact(obs)
    change = np.asarray(found.qos_change)
    assert change[0] == change[2] == 0.0
    # Half of the arrivals are for this card. At one in 200 s it is hardly ever at work, so nearly all are served later.
    most = 0.5 * rate_per_s * 11.0 * float(found.qos[0])
    assert -most < change[1] < 0.0
    assert (change[1] > -0.01 * most) == (rate_per_s == 0.01)


def test_failures_are_refused() -> None:
    trace = RequestTrace(np.zeros(1), np.ones(1), np.ones((1, 2)))
    with pytest.raises(InputError, match="failures are given, must be None"):
        replay_many(experts_on(0, 0), [trace], [np.zeros(1, int)], failures=[[np.ones(1), np.ones(1)]])


@pytest.mark.parametrize(
    ("cards", "message"),
    [
        (SharedCards(np.array([0, 0, 0]), np.ones(2)), r"number has shape \(3,\), must be \[2\]"),
        (SharedCards(np.array([0.0, 0.5]), np.ones(2)), "number is .* must be whole numbers"),
        (SharedCards(np.array([0, 0]), np.array([1.0, -1.0])), "load_s is -1.0 for expert 1, must be from 0 to 1e6"),
        (SharedCards(np.array([0, 0]), np.array([np.nan, 1.0])), "load_s is nan for expert 0"),
    ],
)
def test_bad_cards_are_refused(cards: SharedCards, message: str) -> None:
    trace = RequestTrace(np.zeros(1), np.ones(1), np.ones((1, 2)))
    with pytest.raises(InputError, match=rf"experts\.cards\.{message}"):
        qos_jax.replay(small_experts(2).replace(cards=cards), trace, np.zeros(1, int))


BOARD = """
format = 1
copies = 2
limits.latency_ms_per_token = 150
quality.mean_score = { "qwen3-8b" = 0.71, "qwen3-1.7b" = 0.58 }
workload = { sessions = "8:3:2048", saturation_per_s = 4.0 }

[[experts]]
llm = "qwen3-1.7b:int4"
device = "Jetson AGX Orin 64GB"
card = "board"
load_s = 4

[[experts]]
llm = "qwen3-8b:int4"
device = "Jetson AGX Orin 64GB"
card = "board"
load_s = 12
"""


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    path = tmp_path_factory.mktemp("fleet") / "fleet.toml"
    path.write_text(BOARD)
    return load_fleet(path)


class TestFleetFile:
    def test_each_copy_has_a_card_of_its_own(self, board: Fleet) -> None:
        profile = profile_of(board.experts)
        assert profile.cards is not None
        assert profile.cards.number.tolist() == [0, 0, 2, 2]
        assert profile.cards.load_s.tolist() == [4, 12, 4, 12]

    def test_idle_power_is_that_of_the_cards(self, board: Fleet) -> None:
        device, profile = board.experts[0].device, profile_of(board.experts)
        assert profile.idle_w.sum() == 2 * device.idle_w
        at_work_w = profile.busy_w[1] + profile.idle_w[0]  # the other LLM idles meanwhile
        assert at_work_w == profile.busy_w[0] == device.busy_w

    @pytest.mark.slow
    def test_the_fastest_llm_of_each_card_saturates_it(self, board: Fleet) -> None:
        env, params = make(board)
        rates = saturation_rates(env, params, requests_per_expert=200)
        assert saturation_rate(env, params, requests_per_expert=200) == max(rates[:2]) + max(rates[2:])

    def test_an_llm_begins_with_an_empty_cache(self, board: Fleet) -> None:
        env, params = make(board)
        routers = [make_router(name, env, params) for name in ("round_robin", "impact_greedy")]
        runs = evaluate(env, params, routers, scenarios(params, [0.5], [0]), 80)
        swaps, reused = 0, 0
        for run in runs:
            served = np.isfinite(run.replayed.log.finish_s)
            np.testing.assert_array_equal(served, run.assignment >= 0)
            shared_tokens = np.asarray(run.trace.shared_tokens)
            for experts in ([0, 1], [2, 3]):
                on_card = np.flatnonzero(np.isin(run.assignment, experts))
                before = np.concatenate([experts[:1], run.assignment[on_card][:-1]])
                swapped = on_card[run.assignment[on_card] != before]
                assert not shared_tokens[swapped].any()
                swaps, reused = swaps + len(swapped), reused + np.sum(shared_tokens[on_card] > 0)
        assert swaps > 5
        assert reused > 5

    def test_counterfactual_copies_are_refused(self, board: Fleet) -> None:
        with pytest.raises(InputError, match="targets are counterfactual, must be returns where LLMs share a card"):
            train(make(board), Recipe(tiny_agent("mvr"), steps=8, randomise=()))

    def test_the_example_has_one(self) -> None:
        example = load_fleet(pathlib.Path(__file__).parents[2] / "examples" / "shared_card.toml")
        assert [expert.card for expert in example.experts] == ["orin", "orin", None]

    def test_a_gateway_refuses_them(self, board: Fleet) -> None:
        with pytest.raises(InputError, match="card is 'board', must be left out: a gateway knows no shared cards"):
            backends_of(board)

    def test_the_iterations_of_one_expert_are_refused(self, board: Fleet) -> None:
        trace = RequestTrace(np.zeros(1), np.ones(1), np.ones((1, 4)))
        with pytest.raises(InputError, match=r"experts\.cards is given, must be None: iterations are those of one"):
            iterations_of(profile_of(board.experts), trace, np.zeros(1, int), 0, 0.0, 1.0)

    def test_failures_are_refused(self, board: Fleet) -> None:
        with pytest.raises(InputError, match="failures is 60:3, must be None where LLMs share a card"):
            make(board, failures="60:3")

    @pytest.mark.slow
    def test_a_soft_actor_critic_trains(self, board: Fleet) -> None:
        trained = train(make(board), Recipe(tiny_agent("sac"), steps=40, randomise=("load",)), evaluation_envs=2,
                        evaluation_steps=4)  # fmt: skip
        assert trained.finished
