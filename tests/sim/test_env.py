"""The contract of the environment: transformations, determinism, episodes, what is legal, late metrics, and conservation."""

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

from qos_jax import RequestTrace
from qos_jax.sim import engine
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.metrics import latency_per_token_s, qos_of
from qos_jax.sim.replay import replay_many
from qos_jax.sim.types import Workload
from qos_jax.sim.world import collect
from tests.small_env import small_env, small_params

NUM_ENVS = 4
NUM_STEPS = 150
NUM_EXPERTS = 3
DROP = NUM_EXPERTS


@partial(jax.jit, static_argnums=0)
def play(env: Environment, keys: jax.Array, params: EnvParams, actions: jax.Array) -> dict[str, Any]:
    """Plays given actions [E, T]; every leaf of ``params`` is [E, ...], every one of the result [E, T, ...].

    Each row is one transition: ``obs`` and ``state`` before the action, what came of it, and the state after it.
    """

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
    return jax.tree.map(lambda *x: jnp.stack(x), *(params * NUM_ENVS if len(params) == 1 else params))


def random_actions(seed: int = 0) -> jax.Array:
    """Any expert, and now and then the drop."""
    return jax.random.choice(
        jax.random.key(seed), NUM_EXPERTS + 1, (NUM_ENVS, NUM_STEPS), p=jnp.array([0.4, 0.3, 0.25, 0.05])
    )


def some_keys(seed: int = 1) -> jax.Array:
    return jax.random.split(jax.random.key(seed), NUM_ENVS)


def row(tree: Any, *index: int) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def in_flight(world: Any) -> np.ndarray:
    return np.sum(world.experts.slots.live, axis=(-2, -1))


# Different loads, limits and memory side by side; preemptions and full queues included.
WORLDS = stacked(
    small_params(rate_per_s=2.0, latency_limit_s=0.03, max_waiting=8),
    small_params(rate_per_s=12.0, latency_limit_s=0.1),
    small_params(rate_per_s=12.0, kv_blocks=14),
    small_params(rate_per_s=30.0, max_running=2, latency_limit_s=0.2),
)


@pytest.fixture(scope="module")
def played() -> dict[str, Any]:
    return jax.tree.map(np.asarray, play(small_env(), some_keys(), WORLDS, random_actions()))


def test_the_test_worlds_press_on_every_rule(played: dict[str, Any]) -> None:
    slots = played["next_state"].world.experts.slots
    assert np.any(slots.preemptions > 0)
    assert np.any(slots.waiting)
    assert np.any(played["info"]["dropped"] & (played["action"] != DROP))
    assert np.all(np.sum(played["info"]["answers"].violations, 1) > 0)
    assert np.all(np.sum(played["reward"], 1) > 0)


def test_jit_eager_and_vmap_agree(played: dict[str, Any]) -> None:
    """The batch of ``play`` is over keys and parameters; here each of them alone, none, and no compilation."""
    env = small_env()
    at = 40
    keys = jax.random.split(jax.random.key(5), NUM_ENVS)
    state, action, params = row(played["state"], 1, at), jnp.int32(1), row(WORLDS, 1)
    both = jax.jit(jax.vmap(env.step, (0, None, None, 0)))(keys, state, action, WORLDS)
    over_keys = jax.jit(jax.vmap(env.step, (0, None, None, None)))(keys, state, action, params)
    over_params = jax.jit(jax.vmap(env.step, (None, None, None, 0)))(keys[2], state, action, WORLDS)
    step = jax.jit(env.step)
    for i in range(NUM_ENVS):
        chex.assert_trees_all_close(row(both, i), step(keys[i], state, action, row(WORLDS, i)), rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(row(over_keys, i), step(keys[i], state, action, params), rtol=1e-5, atol=1e-6)
        alone = step(keys[2], state, action, row(WORLDS, i))
        chex.assert_trees_all_close(row(over_params, i), alone, rtol=1e-5, atol=1e-6)
    eager = env.step(keys[0], state, action, params)
    chex.assert_trees_all_close(eager, step(keys[0], state, action, params), rtol=1e-5, atol=1e-6)
    for i in range(NUM_ENVS):  # and the scan over a batch of different worlds is a loop over single steps
        _, step_key = jax.random.split(some_keys()[i])
        key = jax.random.split(step_key, NUM_STEPS)[at]
        _, next_state, reward, *_ = step(key, row(played["state"], i, at), played["action"][i, at], row(WORLDS, i))
        chex.assert_trees_all_close(next_state, row(played["next_state"], i, at), rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(reward, played["reward"][i, at], rtol=1e-5)


def test_one_trace_serves_every_value_of_the_parameters() -> None:
    chex.clear_trace_counter()
    traced = jax.jit(chex.assert_max_traces(lambda env, *args: env.step(*args), 1), static_argnums=0)
    keys = jax.random.split(jax.random.key(0), 3)
    for i, params in enumerate((small_params(), small_params(rate_per_s=20.0, kv_blocks=20, max_steps_in_episode=7))):
        env = small_env()  # another instance of an equal environment
        _, state = env.reset(keys[i], params)
        traced(env, keys[2], state, jnp.int32(i), params)


def test_equal_keys_repeat_and_other_keys_differ(played: dict[str, Any]) -> None:
    again = play(small_env(), some_keys(), WORLDS, random_actions())
    chex.assert_trees_all_equal(again, played)
    other = play(small_env(), some_keys(2), WORLDS, random_actions())
    assert np.all(np.any(np.asarray(other["info"]["gap_s"]) != played["info"]["gap_s"], 1))
    prompts = played["obs"].arrived.prompt_tokens
    assert len(np.unique(prompts, axis=0)) == NUM_ENVS


def test_an_episode_is_truncated_and_the_next_one_begins_empty() -> None:
    steps = 40
    params = stacked(small_params(rate_per_s=20.0, max_steps_in_episode=steps))
    rows = jax.tree.map(np.asarray, play(small_env(), some_keys(), params, random_actions()))
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
    chex.assert_trees_all_equal(*within)
    first_prompts = rows["next_obs"].arrived.prompt_tokens[:, ends]
    assert len(np.unique(first_prompts)) > 1  # episodes differ


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
    always_drop = jnp.full((NUM_ENVS, NUM_STEPS), DROP)
    rows = play(small_env(), some_keys(), WORLDS, always_drop)
    assert np.all(rows["info"]["dropped"])
    assert not np.any(rows["reward"])
    assert not np.any(in_flight(rows["next_state"].world))
    assert not np.any(rows["info"]["answers"].busy_s)
    np.testing.assert_array_equal(rows["info"]["gap_s"], played["info"]["gap_s"])  # arrivals do not care


@settings(max_examples=15, deadline=None)
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
    rows = jax.tree.map(np.asarray, play(small_env(), some_keys(seed), params, random_actions(seed)))
    experts = rows["next_state"].world.experts
    arrived = np.arange(1, NUM_STEPS + 1)
    finished = np.cumsum(rows["info"]["answers"].finished, 1)
    dropped = np.cumsum(rows["info"]["dropped"], 1)
    here = in_flight(rows["next_state"].world)
    np.testing.assert_array_equal(here + finished + dropped, np.broadcast_to(arrived, here.shape))
    held = np.sum(np.where(experts.slots.running, -(-experts.slots.computed // 16), 0), -1)
    assert np.all(held <= kv_blocks)
    assert np.all(np.sum(experts.slots.running, -1) <= max_running)
    assert np.all(experts.clock_s >= 0)
    assert np.all(rows["next_obs"].experts.kv_used_blocks == held)
    assert np.all(rows["reward"] >= 0)
    assert np.all(rows["reward"] <= rows["info"]["answers"].score * (1 + 1e-6))


def test_reward_and_what_is_in_flight_are_the_qos_of_a_replay(played: dict[str, Any]) -> None:
    """The environment, accumulated step by step in relative time, against a replay of the same requests at once."""
    env = small_env()
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

        world = row(one["next_state"].world, -1)
        drained = engine.drain(env.spec.engine, row(WORLDS, i).experts, world.experts)
        _, rest = collect(row(WORLDS, i).experts, world.replace(experts=drained))
        answers = one["info"]["answers"]
        per_token_s = latency_per_token_s(experts, trace, assignment, replayed)
        assert answers.finished.sum() + rest.finished == np.sum(~replayed.log.dropped)
        total_per_token_s = answers.latency_per_token_s.sum() + rest.latency_per_token_s
        assert float(total_per_token_s) == pytest.approx(np.nansum(per_token_s), rel=1e-4)
        qos = one["reward"].sum(dtype=np.float64) + float(rest.qos)
        assert qos == pytest.approx(qos_of(experts, trace, assignment, replayed).sum(), rel=1e-5)


@struct.dataclass
class Reordered:
    """A workload whose expert n is the expert ``order[n]`` of another."""

    workload: Workload
    order: jax.Array  # [N]

    def init(self, key: jax.Array) -> Any:
        return self.workload.init(key)

    def next(self, key: jax.Array, state: Any) -> Any:
        gap_s, request, state = self.workload.next(key, state)
        names = ("output_tokens", "score", "predicted_score", "predicted_tokens")
        return gap_s, request.replace(**{name: getattr(request, name)[self.order] for name in names}), state


def reordered(params: EnvParams, order: np.ndarray) -> EnvParams:
    """Every environment's world with its experts in another order."""
    experts = jax.tree.map(lambda x: x[:, order], params.experts)
    orders = jnp.broadcast_to(jnp.asarray(order), (NUM_ENVS, NUM_EXPERTS))
    return params.replace(experts=experts, workload=Reordered(params.workload, orders))


def test_the_order_of_the_experts_does_not_matter() -> None:
    order = np.array([2, 0, 1])
    actions = random_actions()
    renamed = jnp.append(jnp.argsort(order), DROP)[actions]
    straight = play(small_env(), some_keys(), reordered(WORLDS, np.arange(NUM_EXPERTS)), actions)
    turned = play(small_env(), some_keys(), reordered(WORLDS, order), renamed)
    chex.assert_trees_all_close(turned["reward"], straight["reward"], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(turned["info"]["dropped"], straight["info"]["dropped"])
    experts, requests = straight["next_obs"].experts, straight["next_obs"].requests
    expected = jax.tree.map(lambda x: x[:, :, order], (experts, requests))
    chex.assert_trees_all_close((turned["next_obs"].experts, turned["next_obs"].requests), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rates", [(2.0, 8.0, 20.0, 20.0), (jnp.inf,) * NUM_ENVS])
def test_late_metrics_are_those_of_an_earlier_arrival(rates: tuple[float, ...]) -> None:
    """The newest arrival that is old enough, or the oldest one remembered; at an infinite rate all come at once."""
    history = 8
    staleness_s = (0.0, 0.2, 0.2, 60.0)
    params = stacked(*(small_params(rate_per_s=r, staleness_s=d) for r, d in zip(rates, staleness_s, strict=True)))
    late = play(small_env(history=history), some_keys(), params, random_actions())
    fresh = play(small_env(), some_keys(), params, random_actions())
    chex.assert_trees_all_equal(late["info"]["gap_s"], fresh["info"]["gap_s"])
    gap_s = np.asarray(fresh["info"]["gap_s"], np.float64)
    arrival_s = np.cumsum(np.pad(gap_s, ((0, 0), (1, 0))), 1)[:, :-1]
    for i in range(NUM_ENVS):
        for now in range(NUM_STEPS):
            oldest = max(now - history + 1, 0)
            ages_s = arrival_s[i, now] - arrival_s[i, oldest : now + 1]
            seen = oldest + max(np.flatnonzero(ages_s >= staleness_s[i]), default=0)
            then = row(fresh["obs"], i, seen)
            chex.assert_trees_all_equal(
                row((late["obs"].experts, late["obs"].requests), i, now), (then.experts, then.requests)
            )
    chex.assert_trees_all_equal(late["obs"].arrived, fresh["obs"].arrived)


def test_the_check_mode_is_silent_until_something_is_wrong() -> None:
    checked_play = jax.jit(checkify.checkify(partial(play, small_env(check=True))))
    error, rows = checked_play(some_keys(), WORLDS, random_actions())
    assert error.get() is None
    chex.assert_trees_all_close(rows["reward"], play(small_env(), some_keys(), WORLDS, random_actions())["reward"])
    rates = WORLDS.workload.rate_per_s.at[2].set(jnp.nan)
    broken = WORLDS.replace(workload=WORLDS.workload.replace(rate_per_s=rates))
    error, _ = checked_play(some_keys(), broken, random_actions())
    assert "the gap to the next arrival is nan" in error.get()


def test_no_key_is_used_twice() -> None:
    env, params = small_env(), small_params()
    with jax.debug_key_reuse(True):
        keys = jax.random.split(jax.random.key(0))
        _, state = jax.jit(env.reset)(keys[0], params)
        jax.jit(env.step)(keys[1], state, jnp.int32(0), params)
