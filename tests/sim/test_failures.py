"""Experts fail and return by their law; what they lose is told, and nothing else is lost."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qos_jax import make
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.failures import FailureLaw, Failures, all_up, next_interval, reseeded
from qos_jax.sim.replay import replay_many
from qos_jax.sim.types import Observation, Request, RequestTrace, Turn
from qos_jax.sim.world import World, WorldSpec, advance, collect, dispatch, empty_world, observe
from tests.helpers.small_env import small_env, small_experts, small_params

N = 3
NEVER = 1e30


def law(up_s: float, down_s: float) -> FailureLaw:
    return FailureLaw(jnp.full(N, up_s), jnp.full(N, down_s))


def test_times_up_and_down_have_the_means_of_the_law() -> None:
    def step(state: Failures, _: None) -> tuple[Failures, jax.Array]:
        _, state = next_interval(state, jnp.float32(0.1))
        return state, state.down

    worlds = jax.vmap(lambda key: all_up(law(20.0, 5.0), key))(jax.random.split(jax.random.key(0), 64))
    _, down = jax.jit(jax.vmap(lambda state: jax.lax.scan(step, state, None, 20_000)))(worlds)
    down = np.asarray(down)[:, 2_000:]  # [64, steps, N], without the start, at which all are up
    assert down.mean() == pytest.approx(0.2, abs=0.01)
    fails = (down[:, 1:] & ~down[:, :-1]).sum((0, 1))
    assert fails / (64 * down.shape[1] * 0.1) == pytest.approx(np.full(N, 1 / 25), rel=0.06)


def test_an_expert_of_infinite_mean_never_fails() -> None:
    state = all_up(FailureLaw(jnp.array([jnp.inf, 1.0, 1.0]), jnp.ones(N)), jax.random.key(0))
    for _ in range(50):
        interval, state = next_interval(state, jnp.float32(3.0))
        assert not interval.fails[0] and not state.down[0]
        assert np.isfinite(interval.until_s).all() and (np.asarray(interval.rest_s) >= 0).all()


@pytest.mark.slow
def test_every_request_is_finished_lost_refused_or_there_still() -> None:
    env, params = small_env(N, failures=True), small_params(N, rate_per_s=20.0)
    params = params.replace(failure_law=law(3.0, 1.0))

    def step(carry: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], dict]:
        obs, state = carry
        action = jnp.argmax(obs.action_mask[:-1] * jax.random.uniform(key, (N,)))
        obs, state, _, _, _, info = env.step(key, state, action, params)
        return (obs, state), info | {"down": state.world.failures.down, "mask": obs.action_mask[:-1]}

    start = env.reset(jax.random.key(0), params)
    keys = jax.random.split(jax.random.key(1), 900)
    (_, state), info = jax.jit(lambda start: jax.lax.scan(step, start, keys))(start)
    finished, lost = (int(x.sum()) for x in (info["completions"].finished, info["completions"].lost))
    there = int(state.world.experts.slots.live.sum())
    assert finished + lost + int(info["dropped"].sum()) + there == 900
    assert lost > 50 and finished > 200
    assert (info["down"].any(0) & ~info["down"].all(0)).all()
    assert not (info["down"] & info["mask"]).any()


def test_a_failure_takes_the_cache_and_an_expert_that_is_down_takes_nothing() -> None:
    spec, experts = WorldSpec(N, EngineSpec(8), sessions=2, failures=True), small_experts(N, prefix_cache=True)
    turn = Turn(jnp.int32(0), jnp.bool_(False), jnp.int32(400))
    one = jnp.ones(N)
    request = Request(jnp.int32(100), jnp.full(N, 5, jnp.int32), one, jnp.float32(1.0), one, one, turn=turn)

    @jax.jit
    def sent(world: World, action: int) -> tuple[World, Observation, jax.Array]:
        world, dropped = dispatch(spec, experts, world, request, action)
        world, _ = collect(experts, advance(spec, experts, world, jnp.float32(9.0)))
        return world, observe(spec, experts, world, request), dropped

    world = empty_world(spec, experts, 0.0, law(NEVER, NEVER), jax.random.key(0))
    world, obs, _ = sent(world, 0)
    assert obs.arrived.cached_tokens.tolist() == [96, 0, 0]
    fails = world.replace(failures=world.failures.replace(left_s=jnp.array([7.0, NEVER, NEVER])))
    after, obs, _ = sent(fails, 0)  # finishes before the failure
    assert obs.arrived.cached_tokens.tolist() == [0, 0, 0]
    assert obs.action_mask.tolist() == [False, True, True, True]
    assert [bool(sent(after, n)[2]) for n in range(N)] == [True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("fails_s", [0.3, 1.7, 4.0])
def test_a_replay_after_a_failure_is_one_of_the_later_requests_alone(fails_s: float) -> None:
    rng = np.random.default_rng(0)
    arrival_s = np.sort(rng.uniform(0.0, 6.0, 60))
    tokens = rng.integers(1, 80, (60, N))
    trace, assignment = RequestTrace(arrival_s, rng.integers(1, 100, 60), tokens), rng.integers(-1, N, 60)
    failures = [np.array([fails_s]), np.zeros(0), np.zeros(0)]
    experts = jax.tree.map(np.asarray, small_experts(N))
    (whole,), (failing,) = (replay_many(experts, [trace], [assignment], failures=each) for each in (None, [failures]))
    later = arrival_s > fails_s
    part = RequestTrace(arrival_s[later], trace.prompt_tokens[later], tokens[later])
    (alone,) = replay_many(experts, [part], [assignment[later]])

    on_first = assignment == 0
    np.testing.assert_array_equal(failing.log.finish_s[~on_first], whole.log.finish_s[~on_first])
    np.testing.assert_allclose(failing.log.finish_s[on_first & later], alone.log.finish_s[on_first[later]], rtol=1e-12)
    before = on_first & ~later
    done = before & (whole.log.finish_s <= fails_s)
    np.testing.assert_array_equal(failing.log.finish_s[done], whole.log.finish_s[done])
    open_still = before & ~whole.log.dropped & ~done
    lost = failing.log.lost
    assert lost is not None and lost.sum() >= open_still.sum() - 4  # an iteration that has begun is finished
    assert not lost[~open_still].any() and failing.log.dropped[lost].all()


def test_standby_ends_with_a_failure() -> None:
    experts = jax.tree.map(np.asarray, small_experts(N, standby_s=17.5))
    trace, alone = RequestTrace(np.array([0.0, 10.0]), np.array([9, 9]), np.full((2, N), 4)), np.array([0, 1])
    never = np.zeros(0)
    (whole,), (cut,) = (
        replay_many(experts, [trace], [alone], failures=[[fails_s, never, never]])
        for fails_s in (never, np.array([5.0]))
    )
    end_s = whole.log.finish_s[1]
    assert whole.standby_s[0] == pytest.approx(end_s - whole.log.finish_s[0])
    assert cut.standby_s[0] == pytest.approx(5.0 - whole.log.finish_s[0])
    assert cut.standby_s[1] == whole.standby_s[1]


def test_worlds_that_are_set_back_have_other_failures_to_come() -> None:
    state = all_up(law(5.0, 1e6), jax.random.key(0))
    other = reseeded(state, jax.random.key(1))
    assert other is not None and reseeded(None, jax.random.key(1)) is None
    np.testing.assert_array_equal(state.left_s, other.left_s)
    (_, one), (_, two) = (next_interval(each, jnp.float32(1e3)) for each in (state, other))
    assert (one.left_s != two.left_s).any()


def test_a_world_says_how_experts_fail() -> None:
    env, params = make("paper-3", rate_per_s=1.0, failures="600:30")
    assert env.spec.failures
    assert params.failure_law.mean_up_s.tolist() == [600.0] * 3
    assert params.failure_law.mean_down_s.tolist() == [30.0] * 3
    for text in ("600", "0:30", "600:x", "1e10:1", "1:2:3", "6_0:30"):
        with pytest.raises(ValueError, match="must be UP:DOWN, mean seconds above 0"):
            make("paper-3", rate_per_s=1.0, failures=text)
