"""Which expert each router takes, among legal ones only."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qos_jax.errors import InputError
from qos_jax.routers import make_router, router_names
from qos_jax.sim.types import Observation
from tests.observations import RUNNING, WAITING, Seen, observation

NUM_EXPERTS = 3
DROP = NUM_EXPERTS
ALIKE = {"step_base_s": 0.02, "prefill_base_s": 0.01, "prefill_per_token_s": 1e-4, "per_sequence_s": 1e-3}
DRAWING = {"random", "power_of_two"}


def decide(name: str, obs: Observation, seed: int = 0) -> int:
    router = make_router(name, NUM_EXPERTS)
    return int(router.act(jax.random.key(seed), obs, router.init())[0])


def decide_often(name: str, obs: Observation, times: int = 200) -> set[int]:
    router = make_router(name, NUM_EXPERTS)
    keys = jax.random.split(jax.random.key(1), times)
    return set(np.asarray(jax.vmap(lambda key: router.act(key, obs, router.init())[0])(keys)).tolist())


LONG = dataclasses.replace(RUNNING, predicted_tokens=500.0)
BIG = dataclasses.replace(RUNNING, prompt_tokens=300)
LATE = dataclasses.replace(RUNNING, generated_tokens=49)


@pytest.mark.parametrize(
    ("name", "requests", "chosen"),
    [
        ("shortest_queue", [[RUNNING] * 2, [WAITING], [RUNNING, WAITING]], 1),
        ("shortest_queue", [[RUNNING] * 2, [LONG], [LATE]], 1),
        ("shortest_tokens", [[RUNNING] * 2, [LONG], [RUNNING]], 2),
        ("shortest_tokens", [[LATE] * 4, [RUNNING], [LONG]], 0),
        ("shortest_tokens", [[RUNNING], [dataclasses.replace(WAITING, predicted_tokens=30.0)], [LONG]], 0),
        ("least_kv", [[BIG], [RUNNING] * 3, [WAITING] * 4], 2),
        ("least_kv", [[BIG], [RUNNING] * 3, [RUNNING] * 4], 1),
        ("vllm_dp", [[RUNNING] * 6, [RUNNING, WAITING], [WAITING] * 2], 1),
        ("vllm_dp", [[RUNNING] * 3, [RUNNING, WAITING], [WAITING] * 2], 0),
        ("latency_headroom", [[RUNNING] * 3, [RUNNING], [RUNNING] * 2], 1),
        ("expert_2", [[], [], [RUNNING] * 6], 2),
    ],
)
def test_load_routers_take_the_least_loaded_by_their_own_measure(
    name: str, requests: list[list[Seen]], chosen: int
) -> None:
    assert decide(name, observation(requests, **ALIKE)) == chosen


@pytest.mark.parametrize(
    "name", ["shortest_queue", "shortest_tokens", "least_kv", "vllm_dp", "latency_headroom", "impact_greedy"]
)
def test_first_of_equal_experts_wins(name: str) -> None:
    busy = [LONG] * 6
    assert decide(name, observation([busy, [RUNNING], [RUNNING]], per_kv_token_s=1e-6, **ALIKE)) == 1


def test_least_kv_compares_shares_and_not_blocks() -> None:
    assert decide("least_kv", observation([[BIG], [RUNNING] * 3, [RUNNING] * 3], kv_blocks=[400, 40, 40])) == 0


def test_bert_router_looks_at_scores_only() -> None:
    obs = observation([[], [RUNNING] * 6, []], predicted_score=[0.5, 0.9, 0.7], latency_limit_s=0.021)
    assert decide("bert_router", obs) == 1
    assert decide("bert_router_feasible", obs) != 1


@pytest.mark.parametrize(
    ("latency_limit_s", "legal", "chosen"),
    [
        (1.0, None, 2),  # all meet it: the best score
        (0.024, None, 0),  # only the fastest does
        (0.001, None, 0),  # none does: the most headroom
        (1.0, [True, True, False], 1),
        (0.024, [False, True, True], 1),  # the only feasible one is illegal: the most headroom of the others
    ],
)
def test_bert_router_feasible(latency_limit_s: float, legal: list[bool] | None, chosen: int) -> None:
    obs = observation(
        [[], [], []], predicted_score=[0.5, 0.7, 0.9], latency_limit_s=latency_limit_s, legal=legal, network_s=0.0
    )
    assert decide("bert_router_feasible", obs) == chosen


def test_round_robin_takes_turns_and_passes_over_the_full() -> None:
    router = make_router("round_robin", NUM_EXPERTS)
    memory = router.init()
    taken = []
    everyone, no_one, some = [True] * 3, [False] * 3, [False, True, False]
    for legal in (everyone, everyone, everyone, everyone, some, some, no_one, everyone, everyone):
        action, memory = router.act(jax.random.key(0), observation([[], [], []], legal=legal), memory)
        taken.append(int(action))
    assert taken == [0, 1, 2, 0, 1, 1, DROP, 2, 0]


def test_random_reaches_every_legal_expert() -> None:
    assert decide_often("random", observation([[RUNNING] * 6, [], []])) == {0, 1, 2}
    assert decide_often("random", observation([[RUNNING] * 6, [], []], legal=[True, False, True])) == {0, 2}


def test_power_of_two_takes_the_shorter_of_two() -> None:
    requests = [[RUNNING] * 3, [WAITING], [RUNNING] * 2]
    assert decide_often("power_of_two", observation(requests)) == {1, 2}
    assert decide_often("power_of_two", observation(requests, legal=[True, False, True])) == {2}
    assert decide_often("power_of_two", observation(requests, legal=[True, False, False])) == {0}


def test_power_of_two_on_a_single_expert() -> None:
    router = make_router("power_of_two", 1)
    assert int(router.act(jax.random.key(0), observation([[RUNNING]]), router.init())[0]) == 0


def test_single_expert_drops_what_it_cannot_take() -> None:
    assert decide("expert_1", observation([[], [], []], legal=[True, False, True])) == DROP


def test_only_oracles_see_truths() -> None:
    sees = {name: make_router(name, NUM_EXPERTS).sees for name in router_names(NUM_EXPERTS)}
    assert {name: truths for name, truths in sees.items() if truths != "predictions"} == {
        "oracle_score": "true_scores",
        "oracle_impact": "true_scores_and_tokens",
    }
    for name in sees:
        router = make_router(name, NUM_EXPERTS)
        assert router.name == name
        assert (router.kind == "oracle") == (router.sees != "predictions")


@pytest.mark.parametrize("name", ["shortest", "expert_3", "expert_-1", "expert_", ""])
def test_unknown_name_lists_the_legal_ones(name: str) -> None:
    with pytest.raises(InputError, match=r"shortest_queue.*expert_0.*expert_2"):
        make_router(name, NUM_EXPERTS)


there = st.builds(
    lambda prompt, emitted, more, age, waits: Seen(
        prompt, emitted + more, emitted, 0 if waits else None, age, 0.05, predicted_score=0.6
    ),
    st.integers(1, 200), st.integers(1, 300), st.floats(1.0, 300.0), st.floats(0.0, 9.0), st.booleans(),
)  # fmt: skip
fleets = st.lists(st.lists(there, max_size=7), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS)
scores = st.permutations([0.3, 0.55, 0.9])
COMPILED = {
    name: jax.jit(lambda key, obs, router=make_router(name, NUM_EXPERTS): router.act(key, obs, router.init())[0])
    for name in router_names(NUM_EXPERTS)
}


@settings(max_examples=15)
@given(fleets, scores, st.lists(st.booleans(), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS), st.integers(0, 9))
def test_no_router_takes_an_illegal_action(
    requests: list[list[Seen]], predicted_score: list[float], legal: list[bool], seed: int
) -> None:
    obs = observation(requests, predicted_score=predicted_score, legal=legal)
    for name, act in COMPILED.items():
        action = act(jax.random.key(seed), obs)
        assert action.dtype == jnp.int32
        assert bool(obs.action_mask[action]), name


@settings(max_examples=15)
@given(fleets, scores, st.permutations(range(NUM_EXPERTS)))
def test_order_of_the_experts_does_not_matter(
    requests: list[list[Seen]], predicted_score: list[float], order: list[int]
) -> None:
    obs = observation(requests, predicted_score=predicted_score)
    index = jnp.asarray(order)
    permuted = jax.tree.map(lambda x: x[index] if x.ndim else x, obs.replace(action_mask=obs.action_mask[:-1]))
    permuted = permuted.replace(action_mask=obs.action_mask)
    # Speeds and scores differ between the experts, so that none of these ties unless both refuse the request.
    for name in ("latency_headroom", "bert_router", "bert_router_feasible", "impact_greedy_no_drop"):
        ours, theirs = (int(COMPILED[name](jax.random.key(0), x)) for x in (obs, permuted))
        assert order[theirs] == ours, name


def test_a_batch_decides_as_its_environments_do_alone() -> None:
    observations = [
        observation([[RUNNING] * n, [WAITING] * 2, [LONG]], predicted_score=[0.6, 0.5, 0.7]) for n in range(1, 6)
    ]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *observations)
    keys = jax.random.split(jax.random.key(2), len(observations))
    for name in router_names(NUM_EXPERTS):
        router = make_router(name, NUM_EXPERTS)
        act = jax.vmap(lambda key, obs, router=router: router.act(key, obs, router.init())[0])
        alone = [int(router.act(key, obs, router.init())[0]) for key, obs in zip(keys, observations, strict=True)]
        assert np.asarray(act(keys, batch)).tolist() == alone, name
