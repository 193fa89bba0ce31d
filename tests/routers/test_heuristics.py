"""Heuristic routers on constructed and random observations, and the names of routers."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qos_jax import InputError, Observation, Router, make_router, router_names
from qos_jax.impact.estimate import impact
from qos_jax.sim.types import RATE_WINDOWS_S
from tests.helpers.observations import EQUAL, equal_experts, observation, observations, reordered, running, waiting
from tests.helpers.small_env import small_env, small_experts

NUM_EXPERTS = 4
DROP = NUM_EXPERTS
ENV = small_env(NUM_EXPERTS)
ROUTERS = {name: make_router(name, ENV) for name in router_names(ENV)}
BY_IMPACT = {
    "impact_greedy",
    "impact_greedy_equal_gpus",
    "impact_greedy_later_prompts",
    "impact_greedy_no_drop",
    "oracle_impact",
}
MAY_REFUSE = {*BY_IMPACT, "latency_scorer"}
SINGLES = {f"expert_{i}" for i in range(NUM_EXPERTS)}
IDLE: list[list[Any]] = [[]] * NUM_EXPERTS
R, W = running(), waiting()


@jax.jit
def all_choices(key: jax.Array, obs: Observation) -> dict[str, jax.Array]:
    return {name: router.act(key, obs, router.init())[0] for name, router in ROUTERS.items()}


choices_by_lot = jax.jit(jax.vmap(all_choices, in_axes=(0, None)))


def choice(name: str, obs: Observation) -> int:
    return int(all_choices(jax.random.key(0), obs)[name])


@partial(jax.jit, static_argnums=0)
def sampled(router: Router, keys: jax.Array, obs: Observation) -> jax.Array:
    return jax.vmap(lambda key: router.act(key, obs, router.init())[0])(keys)


def counts(name: str, obs: Observation) -> np.ndarray:
    """How often a router that samples takes each action, with 600 keys."""
    keys = jax.random.split(jax.random.key(1), 600)
    return np.bincount(sampled(ROUTERS[name], keys, obs), minlength=NUM_EXPERTS + 1)


@pytest.mark.parametrize(
    ("name", "fleet", "expected"),
    [
        ("shortest_queue", ([R, R, R], [R, R, W], [R, W], [R, R, R]), 2),
        ("shortest_queue", ([W, W], [R], [R], []), 3),
        ("vllm_dp", ([W], [R, R, R], [R, W], [W, W]), 1),  # 3 running weigh less than 1 waiting,
        ("vllm_dp", ([R] * 5, [W], [R, W], [W, W]), 1),  # 5 more,
        ("vllm_dp_2026", ([W, W], [R, R, R], [R, W, R], [R] * 4), 0),  # a request waits or runs, where memory is free
        ("least_kv", ([R, R, R], [R, R], [R], [R, R]), 2),
        ("least_kv", ([R, R], [R], [W] * 3, [R]), 2),  # waiting requests hold no memory
        ("shortest_tokens", ([R, R], [running(predicted_tokens=500.0)], [R, R, R], [R] * 4), 0),
        # Prompt tokens to compute count as much as tokens to generate.
        ("shortest_tokens", ([waiting(prompt_tokens=90, predicted_tokens=10.0)], [R, R, R], [R, R], [R] * 4), 2),
        ("shortest_tokens", ([waiting(prompt_tokens=70, predicted_tokens=10.0)], [R, R, R], [R, R], [R] * 4), 0),
        ("shortest_tokens", ([running(prompt_tokens=90, computed_tokens=50)], [R, R, R], [R, R], [R] * 4), 2),
        ("shortest_tokens", ([running(prompt_tokens=90, computed_tokens=60)], [R, R, R], [R, R], [R] * 4), 0),
        ("latency_headroom", ([R, R, R], [R, R], [R], [R, R]), 2),
        ("latency_headroom", ([W] * 7, [R] * 4, [R, R, W], [R, R]), 3),
    ],
)
def test_a_router_takes_the_best_expert_by_its_definition(name: str, fleet: Any, expected: int) -> None:
    assert choice(name, observation(*fleet)) == expected


def test_four_running_weigh_as_much_as_one_waiting_for_vllm_dp() -> None:
    actions = choices_by_lot(jax.random.split(jax.random.key(1), 600), observation([W], [R] * 4, [R, W], [W, W]))
    assert set(np.asarray(actions["vllm_dp"])) == {0, 1}


def test_least_kv_compares_shares_of_memory() -> None:
    fleet = ([R, R], [R], [R, R], [R])  # 3 blocks each
    assert choice("least_kv", observation(*fleet, profile=equal_experts(4, kv_blocks=[40, 10, 12, 19]))) == 0


def test_scores_decide_for_the_bert_router_whatever_the_load() -> None:
    obs = observation([], [], [R] * 4 + [W] * 4, [], predicted_score=[0.3, 0.5, 0.6, 0.1])
    assert choice("bert_router", obs) == choice("oracle_score", obs) == 2


def test_latency_headroom_knows_how_fast_the_experts_are() -> None:
    slower = [1.5, 1.1, 1.3, 1.4]
    for field in EQUAL:
        profile = equal_experts(4, **{field: np.multiply(EQUAL[field], slower)})
        obs = observation([R], [R], [R], [R], profile=profile, prompt_tokens=300)  # no prefill hidden by the weights
        assert choice("latency_headroom", obs) == 1, field
    assert choice("latency_headroom", observation(*IDLE, profile=equal_experts(4, network_s=slower))) == 1
    assert choice("latency_headroom", observation(*IDLE, predicted_tokens=[30.0, 30.0, 90.0, 30.0])) == 2


def test_the_only_legal_expert_is_taken_however_its_value_is_rounded() -> None:
    """XLA computes values twice and may round them differently: 58 of 49 blocks made vllm_dp_2026 take expert 0."""
    queue = [running(prompt_tokens=n, computed_tokens=n + 4) for n in (237, 301, 333)] + [W] * 3
    for kv_blocks in range(40, 60):
        profile = equal_experts(4, kv_blocks=[4, kv_blocks, 4, 4])
        obs = observation([], queue, [], [], profile=profile, legal=[False, True, False, False, False])
        assert set(map(int, all_choices(jax.random.key(0), obs).values())) - {DROP} == {1}


class TestVllmDp2026:
    def test_a_queue_counts_more_where_kv_memory_is_short(self) -> None:
        fleet = ([R, W], [R] * 4, [R] * 6, [R] * 7)  # 3 blocks for each running request
        for kv_blocks, expected in ((6, 0), (4, 0), (3, 1)):  # the first expert scores 2, 3.5 and 5
            profile = equal_experts(4, kv_blocks=[kv_blocks, 40, 40, 40])
            assert choice("vllm_dp_2026", observation(*fleet, profile=profile)) == expected

    def test_counts_what_it_sent_since_the_metrics_were_taken(self) -> None:
        """Ten arrivals per second and a router that sees what was 0.45 s ago: 5 requests are in flight unseen."""
        router = make_router("vllm_dp_2026", ENV)
        act, memory, arrivals, taken = jax.jit(router.act), router.init(), 0.0, []
        for key in jax.random.split(jax.random.key(0), 12):
            arrivals = 1.0 + arrivals * np.exp(-0.1 / RATE_WINDOWS_S[1])
            obs = observation([R] * 3, [], [], [R], recent_rate_per_s=arrivals / RATE_WINDOWS_S[1])
            action, memory = act(key, obs.replace(staleness_s=jnp.float32(0.45)), memory)
            taken.append(int(action))
        unseen = np.array(taken)[np.arange(5, 12)[:, None] - np.arange(1, 6)]  # the five before each
        loads = np.array([3, 0, 0, 1]) + np.stack([np.bincount(each, minlength=4) for each in unseen])
        assert (loads[np.arange(7), taken[5:]] == loads.min(1)).all()
        assert sorted(taken[:2]) == [1, 2] and sorted(taken[2:5]) == [1, 2, 3]


class TestBertRouterFeasible:
    def idle(self, limit_s: float) -> Observation:
        """Four experts that take 22, 28, 34 and 41 ms per token; the slowest is best."""
        arrived = {"predicted_score": [0.1, 0.5, 0.3, 0.9], "prompt_tokens": 1, "predicted_tokens": 1e3}
        return observation(*IDLE, profile=small_experts(4), latency_limit_s=limit_s, **arrived)

    @pytest.mark.parametrize(("limit_s", "expected"), [(0.06, 3), (0.038, 1), (0.025, 0)])
    def test_takes_the_best_score_among_those_that_meet_the_limit(self, limit_s: float, expected: int) -> None:
        assert choice("bert_router_feasible", self.idle(limit_s)) == expected

    def test_falls_back_to_the_most_headroom(self) -> None:
        obs = self.idle(0.01)
        assert choice("bert_router_feasible", obs) == choice("latency_headroom", obs) == 0

    def test_an_illegal_expert_is_not_feasible(self) -> None:
        fastest_last = reordered(self.idle(0.025), [3, 2, 1, 0])
        obs = fastest_last.replace(action_mask=np.arange(NUM_EXPERTS + 1) != 3)
        assert choice("bert_router_feasible", obs) == choice("latency_headroom", obs) == 2


def test_a_single_expert_gets_all_requests_and_those_it_cannot_take_are_dropped() -> None:
    assert choice("expert_2", observation([], [], [W] * 8, [])) == 2
    assert choice("expert_2", observation(*IDLE, legal=[True, True, False, True, True])) == DROP
    assert choice("expert_2", observation(*IDLE, legal=[True, True, False, True, False])) == DROP


@pytest.mark.parametrize("name", [5, None, ["random"], "", "expert_99", "expert_-1", "expert_\u0661"])
def test_what_is_no_name_of_a_router_is_refused(name: Any) -> None:
    with pytest.raises(InputError, match=r"^router .* (is unknown; choose all|must be a name)"):
        make_router(name, ENV)


def test_random_takes_all_legal_experts_equally_often() -> None:
    taken = counts("random", observation(*IDLE, legal=[True, False, True, True, True]))
    assert taken[[1, DROP]].sum() == 0
    assert taken[[0, 2, 3]] == pytest.approx(200, abs=50)  # 4.3 standard deviations


class TestPowerOfTwo:
    def test_takes_the_shorter_of_two_uniformly_sampled_experts(self) -> None:
        taken = counts("power_of_two", observation([R, R], [W, R, R], [], [R]))
        assert taken[[1, DROP]].sum() == 0  # the longest queue loses against each of the others
        assert taken[[2, 3, 0]] == pytest.approx([300, 200, 100], abs=50)  # they win 3, 2 and 1 of the 6 pairs

    def test_samples_among_the_legal_experts(self) -> None:
        taken = counts("power_of_two", observation([R] * 3, [], [R], [W, R], legal=[True, False, True, True, True]))
        assert taken[[0, 1, DROP]].sum() == 0
        assert taken[[2, 3]] == pytest.approx([400, 200], abs=50)

    def test_takes_the_only_legal_expert(self) -> None:
        taken = counts("power_of_two", observation([W] * 3, [R], [], [], legal=[True, False, False, False, True]))
        assert taken[0] == taken.sum()
        alone = make_router("power_of_two", small_env(1))
        assert alone.act(jax.random.key(0), observation([R]), alone.init())[0] == 0


class TestRoundRobin:
    def turns(self, *masks: list[bool]) -> list[int]:
        """The actions under a sequence of masks of the experts."""
        router = make_router("round_robin", small_env(len(masks[0])))
        memory, taken = router.init(), []
        for mask in masks:
            obs = observation(*[[]] * len(mask), legal=[*mask, True])
            action, memory = router.act(jax.random.key(0), obs, memory)
            taken.append(int(action))
        return taken

    def test_takes_the_experts_in_turn(self) -> None:
        assert self.turns(*[[True] * 3] * 7) == [0, 1, 2, 0, 1, 2, 0]

    def test_skips_full_experts_and_continues_after_the_chosen_one(self) -> None:
        free, second_full = [True, True, True], [True, False, True]
        assert self.turns(free, second_full, free, free) == [0, 2, 0, 1]
        assert self.turns(*[second_full] * 5) == [0, 2, 0, 2, 0]

    def test_a_drop_does_not_advance_the_turn(self) -> None:
        free, full = [True] * 3, [False] * 3
        assert self.turns(free, free, full, full, free) == [0, 1, 3, 3, 2]


@pytest.mark.parametrize("staleness_s", [0.0, 0.5])
@pytest.mark.parametrize("fleet", [IDLE, [[R, W]] * NUM_EXPERTS], ids=["idle", "busy"])
def test_equal_experts_get_equal_shares(fleet: Any, staleness_s: float) -> None:
    """Were the first of equals taken, a burst between two updates of the metrics would all go there."""
    obs = observation(*fleet, legal=[True, False, True, True, False]).replace(staleness_s=jnp.float32(staleness_s))
    for name, actions in choices_by_lot(jax.random.split(jax.random.key(1), 600), obs).items():
        if name not in SINGLES | {"round_robin"}:
            taken = np.bincount(actions, minlength=NUM_EXPERTS + 1)
            assert taken[[1, DROP]].sum() == 0, name
            assert taken[[0, 2, 3]] == pytest.approx(200, abs=52), name  # 4.5 standard deviations


@settings(max_examples=60)
@given(observations(NUM_EXPERTS), st.integers(0, 2**31 - 1))
def test_every_action_is_legal(obs: Observation, seed: int) -> None:
    legal = np.asarray(obs.action_mask)
    for name, action in all_choices(jax.random.key(seed), obs).items():
        assert action.dtype == jnp.int32
        assert 0 <= action <= DROP
        if not legal[:-1].any():
            assert action == DROP, name
        elif name in MAY_REFUSE:
            assert legal[action], name
        elif name in SINGLES:
            assert action == (int(name[-1]) if legal[int(name[-1])] else DROP)
        else:
            assert action < DROP, name
            assert legal[action], name


@jax.jit
def values(obs: Observation) -> dict[str, jax.Array]:
    """The values [N] that the routers compare, computed independently."""
    requests, experts = obs.requests, obs.experts
    work = requests.prompt_tokens + requests.predicted_tokens - requests.computed_tokens
    estimated = impact(obs)
    net = estimated.qos + estimated.qos_change
    kv_share = experts.kv_used_blocks / experts.profile.kv_blocks
    return {
        "shortest_queue": -(experts.running + experts.waiting).astype(float),
        "shortest_tokens": -jnp.sum(work * (requests.running | requests.waiting), -1),
        "least_kv": -kv_share,
        "vllm_dp": -(4.0 * experts.waiting + experts.running),
        "vllm_dp_2026": -(experts.running + experts.waiting * (1 + 6 * jnp.maximum(kv_share - 0.5, 0.0))),
        "latency_headroom": -estimated.latency_per_token_s,
        "bert_router": obs.arrived.predicted_score,
        "oracle_score": obs.arrived.predicted_score,
        "impact_greedy": net,
        "impact_greedy_equal_gpus": impact(obs, 1.5e-3).net,
        "impact_greedy_later_prompts": impact(obs, later_prompts=True).net,
        "impact_greedy_no_drop": net,
    }


@settings(max_examples=60)
@given(observations(NUM_EXPERTS), st.permutations(range(NUM_EXPERTS)))
def test_the_order_of_the_experts_does_not_matter(obs: Observation, order: list[int]) -> None:
    """Except for ties, which are drawn."""
    key, legal = jax.random.key(0), np.asarray(obs.action_mask[:-1])
    before, after = all_choices(key, obs), all_choices(key, reordered(obs, order))
    place = [*order, DROP]
    for name, value in values(obs).items():
        best = np.sort(np.asarray(value)[legal])[::-1]
        if len(best) < 2 or best[0] - best[1] > 1e-5 * abs(best[0]):
            assert place[int(after[name])] == before[name], name
        if before[name] < DROP:
            assert value[before[name]] >= best[0] - 1e-5 * abs(best[0]), name


def test_jit_and_vmap_change_nothing() -> None:
    fleets = [
        ([R, W], [R], [running(predicted_tokens=80.0)], [R, R]),
        ([R] * 4, [], [W] * 3, [R, W]),
        ([R] * 2, [R] * 3, [R] * 4, [R] * 4 + [W] * 4),
    ]
    each = [
        observation(*fleet, profile=small_experts(4), predicted_score=scores)
        for fleet, scores in zip(fleets, np.random.default_rng(0).uniform(size=(3, 4)), strict=True)
    ]
    keys = jax.random.split(jax.random.key(2), len(each))
    together = jax.jit(jax.vmap(all_choices))(keys, jax.tree.map(lambda *x: jnp.stack(x), *each))
    for i, obs in enumerate(each):
        alone = all_choices.__wrapped__(keys[i], obs)
        assert {name: int(x) for name, x in alone.items()} == {name: int(x[i]) for name, x in together.items()}


class TestNames:
    @pytest.mark.parametrize("num_experts", [1, 8, 9])
    def test_every_name_makes_the_router_of_that_name(self, num_experts: int) -> None:
        env = small_env(num_experts)
        names = router_names(env)
        assert len(set(names)) == len(names)
        for name in names:
            assert make_router(name, env).name == name

    def test_experts_alone_are_named_in_small_fleets_only(self) -> None:
        small, large = small_env(8), small_env(9)
        assert [name for name in router_names(small) if name.startswith("expert_")] == [f"expert_{i}" for i in range(8)]
        assert not [name for name in router_names(large) if name.startswith("expert_")]
        assert make_router("expert_8", large).name == "expert_8"

    def test_only_oracles_observe_ground_truth(self) -> None:
        for router in ROUTERS.values():
            assert (router.information != "predictions") == (router.kind == "oracle"), router.name

    @pytest.mark.parametrize("name", ["best", "", "expert_4", "expert_-1", "expert_", "expert_one", "expert 1", "1"])
    def test_an_unknown_name_is_one_error_that_lists_the_known(self, name: str) -> None:
        with pytest.raises(InputError) as error:
            make_router(name, ENV)
        message = str(error.value)
        assert repr(name) in message
        assert "expert_0 to expert_3" in message
        assert all(known in message for known in router_names(small_env(9)))
        assert "\n" not in message

    def test_the_call_of_the_previous_release_still_works(self) -> None:
        with pytest.warns(DeprecationWarning, match="give env and params"):
            assert make_router("shortest_queue", 3).name == "shortest_queue"  # type: ignore[arg-type]
        with pytest.warns(DeprecationWarning, match="give env and params"):
            assert router_names(3) == router_names(small_env(3))  # type: ignore[arg-type]
