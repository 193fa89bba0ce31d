"""What a proxy knows: the ledger of tokens that pass, and counts as of the last scrape."""

from __future__ import annotations

from typing import Any

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from qos_jax.errors import InputError
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.types import Observation, Request
from qos_jax.sim.world import World, WorldSpec, empty_world, observe, record_arrival
from qos_jax.worlds.build import make
from tests.helpers.small_env import small_experts

N, S = 2, 6
SPEC = WorldSpec(N, EngineSpec(S), observe="proxy")
EXPERTS = small_experts(N)
REQUEST = Request(jnp.int32(9), jnp.ones(N, jnp.int32), *[jnp.ones(N)] * 1, jnp.float32(0.03), jnp.ones(N), jnp.ones(N))


def filled(seed: int) -> World:
    """A world with requests of random progress on its experts."""
    rng = np.random.default_rng(seed)
    world = empty_world(SPEC, EXPERTS, 0.5)
    output = rng.integers(0, 20, (N, S))
    generated = np.minimum(rng.integers(0, 12, (N, S)), output)
    slots = world.experts.slots.replace(
        prompt_tokens=jnp.asarray(rng.integers(1, 40, (N, S)), jnp.int32),
        output_tokens=jnp.asarray(output, jnp.int32),
        generated=jnp.asarray(generated, jnp.int32),
        arrival_s=jnp.asarray(np.sort(rng.uniform(-5, 0, (N, S))), jnp.float32),
    )
    return with_computed(world.replace(experts=world.experts.replace(slots=slots)), rng)


def with_computed(world: World, rng: Any) -> World:
    """The same world with other tokens computed, and other requests preempted."""
    slots = world.experts.slots
    computed = rng.integers(0, slots.prompt_tokens + slots.generated + 1)
    slots = slots.replace(
        computed=jnp.asarray(computed, jnp.int32),
        preemptions=jnp.asarray(rng.integers(0, 3, (N, S)), jnp.int32),
        cached_blocks=jnp.asarray(rng.integers(0, 3, (N, S)), jnp.int32),
    )
    running, waiting = (jnp.sum(which, -1, dtype=jnp.int32) for which in (slots.running, slots.waiting))
    return world.replace(experts=world.experts.replace(slots=slots, running=running, waiting=waiting))


def seen(world: World) -> Observation:
    return observe(SPEC, EXPERTS, world, REQUEST)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_what_is_computed_and_who_was_preempted_is_hidden_between_two_scrapes(seed: int, other: int) -> None:
    world = filled(seed)
    changed = with_computed(world, np.random.default_rng(other))
    chex.assert_trees_all_equal(seen(world), seen(changed))


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_it_is_what_engines_know_but_for_what_is_hidden(seed: int) -> None:
    world = filled(seed)
    proxy = seen(record_arrival(SPEC, world, jnp.float32(0.5)))
    engine_spec = WorldSpec(N, EngineSpec(S))
    engine = observe(engine_spec, EXPERTS, World(world.experts, empty_world(engine_spec, EXPERTS).telemetry), REQUEST)
    live = np.asarray(engine.requests.running | engine.requests.waiting)
    np.testing.assert_array_equal(proxy.requests.running | proxy.requests.waiting, live)
    for name in ("prompt_tokens", "generated_tokens", "age_s", "predicted_tokens", "latency_limit_s"):
        np.testing.assert_array_equal(getattr(proxy.requests, name)[live], getattr(engine.requests, name)[live])
    np.testing.assert_array_equal(proxy.experts.kv_used_blocks, engine.experts.kv_used_blocks)
    np.testing.assert_array_equal(
        proxy.experts.running + proxy.experts.waiting, engine.experts.running + engine.experts.waiting
    )


def test_counts_are_those_of_the_last_scrape() -> None:
    """Every so often, for worlds side by side that differ in how often."""
    first, later = filled(1), filled(2)
    gaps_s = (0.2, 0.2, 0.2, 0.7, 0.1)

    def ages(scrape_s: jax.Array) -> tuple[list[Any], list[Any]]:
        world = empty_world(SPEC, EXPERTS, scrape_s)
        found = []
        for number, gap_s in enumerate(gaps_s):
            world = world.replace(experts=(first if number < 2 else later).experts)
            world = record_arrival(SPEC, world, jnp.float32(gap_s))
            found.append((world.telemetry.scrape.age_s, observe(SPEC, EXPERTS, world, REQUEST).experts.kv_used_blocks))
        return found

    found = jax.vmap(ages)(jnp.array([0.0, 0.5]))
    np.testing.assert_allclose([age for age, _ in found], [[0, 0.2], [0, 0.4], [0, 0], [0, 0], [0, 0.1]], atol=1e-6)
    blocks = [np.asarray(observe_fresh(world)) for world in (first, later)]
    for number, (_, used) in enumerate(found):
        np.testing.assert_array_equal(used[0], blocks[number >= 2])
        np.testing.assert_array_equal(used[1], 0 * blocks[0] if number < 2 else blocks[1])


def observe_fresh(world: World) -> Any:
    return seen(record_arrival(SPEC, world, jnp.float32(9.0))).experts.kv_used_blocks


def test_a_world_observes_as_a_proxy_by_its_configuration() -> None:
    env, params = make("paper-3", observe="proxy", scrape_s=0.25)
    assert env.spec.observe == "proxy"
    assert float(params.scrape_s) == 0.25
    obs, state = jax.eval_shape(env.reset, jax.random.key(0), params)
    default = jax.eval_shape(make("paper-3")[0].reset, jax.random.key(0), params)[0]
    chex.assert_trees_all_equal_shapes_and_dtypes(obs, default)
    after, *_ = jax.eval_shape(env.step, jax.random.key(0), state, jnp.int32(0), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, default)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"observe": "all"}, "observe is 'all', must be one of engine, proxy"),
        ({"scrape_s": 0.5}, "scrape_s is 0.5, must be 0 where observe is engine"),
        ({"observe": "proxy", "staleness_s": 0.5}, "staleness_s is 0.5, must be 0 where observe is proxy"),
        ({"observe": "proxy", "scrape_s": -1.0}, "scrape_s is -1.0"),
    ],
)
def test_what_does_not_go_together_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make("paper-3", **fields)
