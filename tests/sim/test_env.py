"""The contract of the environment: transformations, determinism, episodes, legality, late metrics and conservation."""

from __future__ import annotations

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify
from jax.experimental.key_reuse import _core as key_reuse

from qos_jax import ExpertProfile, RequestTrace
from qos_jax.evaluation.metrics import latency_per_token_s, qos_of
from qos_jax.sim import engine
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.replay import replay_many
from qos_jax.sim.types import Observation
from qos_jax.sim.world import Completions, World, collect
from tests.helpers.reference import standby_between
from tests.helpers.small_env import SmallWorkload, small_env, small_params

NUM_ENVS = 4
NUM_STEPS = 120  # on one expert less than a chunk of a replay, so that all replays are one program
NUM_EXPERTS = 3
HISTORY = 8  # with it one program serves fresh metrics, which are those of no staleness, and late ones
DROP = NUM_EXPERTS


def play(env: Environment, keys: jax.Array, params: EnvParams, actions: jax.Array) -> dict[str, Any]:
    """Plays given actions [E, T], with the checks on; every leaf of ``params`` is [E, ...], of the result [E, T, ...].

    Each row is one transition: ``obs`` and ``state`` before the action, what came of it, and the state after it.
    """
    error, rows = _play(env, keys, params, actions)
    error.throw()
    return jax.tree.map(np.asarray, rows)


@partial(jax.jit, static_argnums=0)
@partial(checkify.checkify, errors=checkify.user_checks)
def _play(env: Environment, keys: jax.Array, params: EnvParams, actions: jax.Array) -> dict[str, Any]:

    def one(key: jax.Array, params: EnvParams, actions: jax.Array) -> dict[str, Any]:
        def step(carry: Any, x: Any) -> tuple[Any, dict[str, Any]]:
            (obs, state), (key, action) = carry, x
            next_obs, next_state, reward, terminated, truncated, info = env.step(key, state, action, params)
            row = {
                "obs": obs, "state": state, "action": action, "next_obs": next_obs, "next_state": next_state,
                "reward": reward, "terminated": terminated, "truncated": truncated, "info": info,
            }  # fmt: skip
            return (next_obs, next_state), row

        reset_key, step_key = jax.random.split(key)
        return jax.lax.scan(step, env.reset(reset_key, params), (jax.random.split(step_key, len(actions)), actions))[1]

    return jax.vmap(one)(keys, params, actions)


def stacked(*params: EnvParams) -> EnvParams:
    """The parameters of the environments side by side; one is used for all."""
    return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *(params * NUM_ENVS if len(params) == 1 else params))


def random_actions(seed: int = 0) -> jax.Array:
    """Any expert, and now and then the drop."""
    return jax.random.choice(
        jax.random.key(seed), NUM_EXPERTS + 1, (NUM_ENVS, NUM_STEPS), p=jnp.array([0.4, 0.3, 0.25, 0.05])
    )


def some_keys(seed: int = 1) -> jax.Array:
    return jax.random.split(jax.random.key(seed), NUM_ENVS)


def row(tree: Any, *index: int) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def visible(obs: Observation) -> tuple[Any, Any]:
    """The experts and their requests, zeros where there is none."""
    here = obs.requests.running | obs.requests.waiting
    return obs.experts, jax.tree.map(lambda x: np.where(here, x, 0), obs.requests)


def in_flight(world: Any) -> np.ndarray:
    return np.sum(world.experts.slots.live, axis=(-2, -1))


CHECKED = small_env(check=True, history=HISTORY)
# Different loads, limits and memory side by side; preemptions and full queues included.
WORLDS = stacked(
    small_params(rate_per_s=2.0, latency_limit_s=0.03, max_waiting=8, standby_s=np.array([0.0, 0.1, 1e6])),
    small_params(rate_per_s=12.0, latency_limit_s=0.1, standby_s=0.05),
    small_params(rate_per_s=12.0, kv_blocks=14),
    small_params(rate_per_s=30.0, max_running=2, latency_limit_s=0.2),
)


@pytest.fixture(scope="module")
def played() -> dict[str, Any]:
    return play(CHECKED, some_keys(), WORLDS, random_actions())


def test_the_test_worlds_press_on_every_rule(played: dict[str, Any]) -> None:
    slots = played["next_state"].world.experts.slots
    assert np.any(slots.preemptions > 0)
    assert np.any(slots.waiting)
    assert np.any(played["info"]["dropped"] & (played["action"] != DROP))
    assert np.all(np.sum(played["info"]["completions"].violations, 1) > 0)
    assert np.all(np.sum(played["reward"], 1) > 0)


@pytest.mark.slow
def test_jit_eager_and_vmap_agree(played: dict[str, Any]) -> None:
    """Single compiled steps against no compilation, a batch of keys, one of parameters, a checked scan of both."""
    env, at = small_env(history=HISTORY), 40
    keys = jnp.stack([jax.random.split(jax.random.split(key)[1], NUM_STEPS)[at] for key in some_keys()])
    states, actions = jax.tree.map(lambda x: jnp.asarray(x[:, at]), (played["state"], played["action"]))
    state, action, params = row(states, 1), actions[1], row(WORLDS, 1)
    step = jax.jit(env.step)
    over_keys = jax.jit(jax.vmap(env.step, (0, None, None, None)))(keys, state, action, params)
    over_params = jax.jit(jax.vmap(env.step, (None, None, None, 0)))(keys[1], state, action, WORLDS)

    def agree(ours: Any, theirs: Any) -> None:
        ours, theirs = map(without_passes, (ours, theirs))
        chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-5)

    for i in range(NUM_ENVS):
        agree(row(over_keys, i), step(keys[i], state, action, params))
        agree(row(over_params, i), step(keys[1], state, action, row(WORLDS, i)))
        expected = (row(played[name], i, at) for name in ("next_obs", "next_state", "reward"))
        agree(step(keys[i], row(states, i), actions[i], row(WORLDS, i))[:3], tuple(expected))
    agree(env.step(keys[1], state, action, params), row(over_keys, 1))

    # Where some episodes end with this step and others do not; also of environments within environments.
    ending = WORLDS.replace(max_steps_in_episode=jnp.array([at + 1, 5000, at + 1, 5000]))
    some_end = jax.jit(jax.vmap(env.step, (None, None, None, 0)))(keys[1], state, action, ending)
    within = jax.jit(jax.vmap(jax.vmap(env.step, (0, None, None, None)), (None, None, None, 0)))
    all_end_or_none = within(keys, state, action, ending)
    for i in range(NUM_ENVS):
        alone = step(keys[1], state, action, row(ending, i))
        assert bool(alone[4]) == (i % 2 == 0)
        agree(row(some_end, i), alone)
        agree(row(all_end_or_none, i, 1), alone)


def without_passes(out: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a step returns but for the passes of the engine's loops, which go on until the whole batch is done."""
    return tuple(x | {"completions": x["completions"].replace(passes=0)} if isinstance(x, dict) else x for x in out)


def test_one_trace_serves_every_value_of_the_parameters() -> None:
    chex.clear_trace_counter()

    @chex.assert_max_traces(1)
    def counted(env: Environment, *args: Any) -> Any:
        return env.step(*args)

    step = jax.jit(counted, static_argnums=0)
    for i, params in enumerate((small_params(), small_params(rate_per_s=20.0, kv_blocks=20, max_steps_in_episode=7))):
        env = small_env()  # another instance of an equal environment
        _, state = jax.eval_shape(env.reset, jax.random.key(i), params)
        jax.eval_shape(partial(step, env), jax.random.key(2), state, jnp.int32(i), params)
    with pytest.raises(AssertionError, match="traced > 1 times"):
        env = small_env(slots=8)
        _, state = jax.eval_shape(env.reset, jax.random.key(0), params)
        jax.eval_shape(partial(step, env), jax.random.key(2), state, jnp.int32(0), params)


def test_equal_keys_repeat_and_other_keys_differ(played: dict[str, Any]) -> None:
    again = play(CHECKED, some_keys(), WORLDS, random_actions())
    chex.assert_trees_all_equal(again, played)
    other = play(CHECKED, some_keys(2), WORLDS, random_actions())
    assert np.all(np.any(np.asarray(other["info"]["gap_s"]) != played["info"]["gap_s"], 1))
    prompts = played["obs"].arrived.prompt_tokens
    assert len(np.unique(prompts, axis=0)) == NUM_ENVS


def test_an_episode_is_truncated_and_the_next_one_begins_empty() -> None:
    steps = 40
    params = stacked(small_params(rate_per_s=20.0, max_steps_in_episode=steps))
    rows = play(CHECKED, some_keys(), params, random_actions())
    ends = np.arange(1, NUM_STEPS + 1) % steps == 0
    np.testing.assert_array_equal(rows["truncated"], np.broadcast_to(ends, (NUM_ENVS, NUM_STEPS)))
    assert not rows["terminated"].any()
    final_obs = rows["info"]["final_observation"]
    busy = np.sum(final_obs.experts.running + final_obs.experts.waiting, -1)
    assert np.all(busy[:, ends] > 0)  # the last observation still shows the work
    assert not in_flight(rows["next_state"].world)[:, ends].any()
    assert not rows["next_obs"].experts.running[:, ends].any()
    np.testing.assert_array_equal(rows["next_state"].time[:, ends], 0)
    within = jax.tree.map(lambda x: x[:, ~ends], (rows["next_obs"], final_obs))
    chex.assert_trees_all_close(*within, rtol=1e-6)
    first_prompts = rows["next_obs"].arrived.prompt_tokens[:, ends]
    assert len(np.unique(first_prompts)) > 1  # episodes differ


def test_routers_observe_what_they_are_told_of_the_experts() -> None:
    params = small_params()
    told = params.experts.replace(kv_blocks=jnp.array([40, 0, 40]), step_base_s=2 * params.experts.step_base_s)
    env, key = small_env(), jax.random.key(0)
    obs, state = env.reset(key, params)
    told_obs, told_state = env.reset(key, params.replace(believed_experts=told))
    assert obs.experts.profile is params.experts
    assert told_obs.experts.profile is told
    assert (np.asarray(obs.action_mask[:-1]).all(), told_obs.action_mask[:-1].tolist()) == (True, [True, False, True])
    chex.assert_trees_all_equal(told_state, state)


def test_the_state_does_not_grow_with_the_episode() -> None:
    env = small_env()

    def state_of(max_steps: int) -> Any:
        return env.reset(jax.random.key(0), small_params(max_steps_in_episode=max_steps))[1]

    chex.assert_trees_all_equal_shapes_and_dtypes(state_of(10), state_of(10_000_000))


def test_masked_actions_are_those_that_would_be_refused(played: dict[str, Any]) -> None:
    full = played["obs"].experts.waiting == np.asarray(WORLDS.experts.max_waiting)[:, None]
    legal = played["obs"].action_mask
    assert full.any()
    assert not np.any(legal[..., :-1] & full)
    assert legal[..., -1].all()
    chosen_legal = np.take_along_axis(legal, played["action"][..., None], -1)[..., 0]
    sent = played["action"] != DROP
    # Prompts fit by far here, so a legal action is always taken, and an illegal one never.
    np.testing.assert_array_equal(played["info"]["dropped"][sent], ~chosen_legal[sent])


@pytest.mark.parametrize("allow_drop", [True, False])
def test_the_drop_is_legal_only_where_allowed(allow_drop: bool) -> None:
    obs, _ = small_env(allow_drop=allow_drop).reset(jax.random.key(0), small_params())
    np.testing.assert_array_equal(obs.action_mask, [True] * NUM_EXPERTS + [allow_drop])


def test_a_prompt_that_never_fits_is_illegal_where_it_does_not() -> None:
    params = small_params(kv_blocks=jnp.array([1, 8, 40]))
    for seed in range(8):
        obs, _ = small_env().reset(jax.random.key(seed), params)
        blocks_needed = -(-(int(obs.arrived.prompt_tokens) + 1) // 16)
        np.testing.assert_array_equal(obs.action_mask[:-1], blocks_needed <= np.array([1, 8, 40]))


def test_a_drop_leaves_the_experts_alone(played: dict[str, Any]) -> None:
    always_drop = jnp.full((NUM_ENVS, NUM_STEPS), DROP, jnp.int32)
    rows = play(CHECKED, some_keys(), WORLDS, always_drop)
    assert np.all(rows["info"]["dropped"])
    assert not np.any(rows["reward"])
    assert not np.any(in_flight(rows["next_state"].world))
    assert not np.any(rows["info"]["completions"].busy_s)
    np.testing.assert_array_equal(rows["info"]["gap_s"], played["info"]["gap_s"])  # arrivals do not care


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    rates=st.lists(st.floats(0.5, 200.0), min_size=NUM_ENVS, max_size=NUM_ENVS),
    kv_blocks=st.lists(st.integers(1, 40), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS),
    max_running=st.integers(1, 8),
    max_waiting=st.integers(0, 8),
)
def test_no_request_is_lost(
    seed: int, rates: list[float], kv_blocks: list[int], max_running: int, max_waiting: int
) -> None:
    limits = {"kv_blocks": jnp.array(kv_blocks), "max_running": max_running, "max_waiting": max_waiting}
    params = stacked(*(small_params(rate_per_s=rate, **limits) for rate in rates))
    rows = play(CHECKED, some_keys(seed), params, random_actions(seed))
    experts = rows["next_state"].world.experts
    arrived = np.arange(1, NUM_STEPS + 1)
    finished = np.cumsum(rows["info"]["completions"].finished, 1)
    dropped = np.cumsum(rows["info"]["dropped"], 1)
    here = in_flight(rows["next_state"].world)
    np.testing.assert_array_equal(here + finished + dropped, np.broadcast_to(arrived, here.shape))
    held = np.sum(np.where(experts.slots.running, -(-experts.slots.computed // 16), 0), -1)
    assert np.all(held <= kv_blocks)
    assert np.all(np.sum(experts.slots.running, -1) <= max_running)
    assert np.all(experts.clock_s >= 0)
    assert np.all(rows["next_obs"].experts.kv_used_blocks == held)
    assert np.all(rows["reward"] >= 0)
    assert np.all(rows["reward"] <= rows["info"]["completions"].score * (1 + 1e-6))


def test_reward_and_what_is_in_flight_are_the_qos_of_a_replay(played: dict[str, Any]) -> None:
    """The environment, accumulated step by step in relative time, against a replay of the same requests at once."""

    @jax.jit
    @jax.vmap
    def collect_rest(experts: ExpertProfile, world: World) -> Completions:
        return collect(experts, world.replace(experts=engine.drain(small_env().spec.engine, experts, world.experts)))[1]

    at_the_end = collect_rest(WORLDS.experts, jax.tree.map(lambda x: x[:, -1], played["next_state"].world))
    for i in range(NUM_ENVS):
        experts = jax.tree.map(np.asarray, row(WORLDS, i).experts)
        one = row(played, i)
        requests = one["state"].request
        arrival_s = np.append(0.0, np.cumsum(one["info"]["gap_s"].astype(np.float64)))[:-1]
        trace = RequestTrace(
            arrival_s=arrival_s,
            prompt_tokens=requests.prompt_tokens,
            output_tokens=requests.output_tokens,
            score=requests.score,
            latency_limit_s=requests.latency_limit_s,
        )
        assignment = np.where(one["action"] == DROP, -1, one["action"])
        (replayed,) = replay_many(experts, [trace], [assignment])
        np.testing.assert_array_equal(one["info"]["dropped"], replayed.log.dropped)

        rest = row(at_the_end, i)
        answers = one["info"]["completions"]
        per_token_s = latency_per_token_s(experts, trace, assignment, replayed)
        assert answers.finished.sum() + rest.finished == np.sum(~replayed.log.dropped)
        total_per_token_s = answers.latency_per_token_s.sum() + rest.latency_per_token_s
        assert float(total_per_token_s) == pytest.approx(np.nansum(per_token_s), rel=1e-4)
        qos = one["reward"].sum(dtype=np.float64) + float(rest.qos)
        assert qos == pytest.approx(qos_of(experts, trace, assignment, replayed).sum(), rel=1e-5)
        for n, standby_s in enumerate(experts.standby_s):
            served = (assignment == n) & ~replayed.log.dropped
            expected_s = standby_between(trace.arrival_s[served], replayed.log.finish_s[served], standby_s, np.inf)
            assert answers.standby_s[:, n].sum() + rest.standby_s[n] == pytest.approx(expected_s, rel=1e-4, abs=1e-3)


def test_the_order_of_the_experts_does_not_matter(played: dict[str, Any]) -> None:
    order = np.array([2, 0, 1])
    actions = random_actions()
    renamed = jnp.append(jnp.argsort(order), DROP)[actions]
    experts = jax.tree.map(lambda x: x[:, order], WORLDS.experts)
    workload = WORLDS.workload.replace(order=WORLDS.workload.order[:, order])
    turned = play(CHECKED, some_keys(), WORLDS.replace(experts=experts, workload=workload), renamed)
    chex.assert_trees_all_close(turned["reward"], played["reward"], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(turned["info"]["dropped"], played["info"]["dropped"])
    expected = jax.tree.map(lambda x: x[:, :, order], visible(played["next_obs"]))
    chex.assert_trees_all_close(visible(turned["next_obs"]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rates", [(2.0, 8.0, 20.0, 20.0), (jnp.inf,) * NUM_ENVS])
def test_late_metrics_are_those_of_an_earlier_arrival(rates: tuple[float, ...]) -> None:
    """The newest arrival that is old enough, or the oldest one remembered; at an infinite rate all come at once."""
    staleness_s = (0.0, 0.2, 0.2, 60.0)
    params = stacked(*(small_params(rate_per_s=r, staleness_s=d) for r, d in zip(rates, staleness_s, strict=True)))
    late = play(CHECKED, some_keys(), params, random_actions())
    fresh = play(CHECKED, some_keys(), params.replace(staleness_s=jnp.zeros(NUM_ENVS)), random_actions())
    chex.assert_trees_all_equal(late["info"]["gap_s"], fresh["info"]["gap_s"])
    arrival_s = np.cumsum(np.pad(fresh["info"]["gap_s"].astype(np.float64), ((0, 0), (1, 0))), 1)[:, :-1]
    seen = np.zeros((NUM_ENVS, NUM_STEPS), int)
    for i, now in np.ndindex(seen.shape):
        oldest = max(now - HISTORY + 1, 0)
        ages_s = arrival_s[i, now] - arrival_s[i, oldest : now + 1]
        seen[i, now] = oldest + max(np.flatnonzero(ages_s >= staleness_s[i]), default=0)
    then = jax.tree.map(lambda x: x[np.arange(NUM_ENVS)[:, None], seen], visible(fresh["obs"]))
    chex.assert_trees_all_equal(visible(late["obs"]), then)
    chex.assert_trees_all_equal(late["obs"].arrived, fresh["obs"].arrived)
    np.testing.assert_array_equal(late["obs"].staleness_s, np.tile(np.float32(staleness_s)[:, None], NUM_STEPS))
    np.testing.assert_array_equal(fresh["obs"].staleness_s, 0.0)


def test_the_check_mode_names_what_is_wrong() -> None:
    broken = WORLDS.replace(workload=WORLDS.workload.replace(rate_per_s=WORLDS.workload.rate_per_s.at[2].set(jnp.nan)))
    with pytest.raises(checkify.JaxRuntimeError, match="the gap to the next arrival is nan"):
        play(CHECKED, some_keys(), broken, random_actions())


@struct.dataclass
class Careless(SmallWorkload):
    """Draws the gap with the key of all the rest."""

    def next(self, key: jax.Array, state: jax.Array) -> Any:
        _, request, state = super().next(key, state)
        return jax.random.exponential(key), request, state


def test_no_key_is_used_twice() -> None:
    env, params = small_env(), small_params()

    def reset_and_step(key: jax.Array, params: EnvParams) -> Any:
        reset_key, step_key = jax.random.split(key)
        _, state = env.reset(reset_key, params)
        return env.step(step_key, state, jnp.int32(0), params)

    def check(params: EnvParams) -> None:
        key_reuse.check_key_reuse_jaxpr(jax.make_jaxpr(reset_and_step)(jax.random.key(0), params).jaxpr)

    careless = params.replace(workload=Careless(**vars(params.workload)))
    check(params)
    with pytest.raises(jax.errors.KeyReuseError):
        check(careless)
