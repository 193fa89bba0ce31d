"""Sessions: contexts grow, and prefixes stay in the cache as in a free queue of blocks, kept here block by block."""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qos_jax import Request
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.sessions import contexts_of
from qos_jax.sim.types import Turn
from qos_jax.sim.world import WorldSpec, advance, collect, dispatch, empty_world, observe
from tests.helpers.small_env import small_experts

BLOCK, N, PLACES, MOST_TOKENS = 16, 2, 6, 400
SPEC = WorldSpec(N, EngineSpec(16), sessions=PLACES)
EXPERTS = small_experts(N, kv_blocks=60, prefix_cache=True)


@dataclasses.dataclass
class Queue:
    """The free queue of one expert's blocks, oldest first; a block with a name is in the prefix cache."""

    blocks: collections.deque[Any]

    @classmethod
    def of(cls, count: int) -> Queue:
        return cls(collections.deque(("empty", number) for number in range(count)))

    def found(self, session: tuple[int, int], most_blocks: int) -> int:
        """Blocks of a session from the first one on."""
        count = 0
        while count < most_blocks and (session, count) in self.blocks:
            count += 1
        return count

    def serve(self, session: tuple[int, int], found: int, computed_tokens: int) -> None:
        """A request takes its blocks and leaves them: full ones at the end, the last first; the other at the head."""
        full, held = computed_tokens // BLOCK, -(-computed_tokens // BLOCK)
        for number in range(found):
            self.blocks.remove((session, number))
        for _ in range(held - found):
            self.blocks.popleft()
        stale = [block for block in self.blocks if block[0] == session and block[1] < full]
        for block in stale:  # a block has one name; that of the newest copy counts
            self.blocks[self.blocks.index(block)] = ("empty", block)
        self.blocks.extend((session, number) for number in reversed(range(full)))
        self.blocks.extendleft(("empty", object()) for _ in range(held - full))


def turns(rng: np.random.Generator, count: int) -> list[tuple[Request, int]]:
    """Requests that are turns, each with the expert to which it is sent; now and then none."""
    found = []
    for _ in range(count):
        turn = Turn(jnp.int32(rng.integers(PLACES)), jnp.bool_(rng.random() < 0.25), jnp.int32(MOST_TOKENS))
        tokens = jnp.asarray(rng.integers(1, 40, N), jnp.int32)
        scores = jnp.full(N, 0.5)
        request = Request(jnp.int32(rng.integers(1, 60)), tokens, scores, jnp.float32(0.05), scores, scores, turn=turn)
        found.append((request, int(rng.integers(N + 1))))
    return found


@functools.partial(jax.jit, static_argnames="spec")
def served(world: Any, request: Request, action: int, experts: Any = EXPERTS, spec: WorldSpec = SPEC) -> Any:
    """The world once the request is finished, what was observed of it, and when its first token came."""
    obs = observe(spec, experts, world, request)
    world, _ = dispatch(spec, experts, world, request, action)
    world = advance(spec, experts, world, jnp.float32(60.0))
    newest = jnp.maximum(world.experts.used - 1, 0)[:, None]
    first_token_s = jnp.take_along_axis(world.experts.slots.first_token_s, newest, -1)[:, 0]
    return collect(experts, world)[0], obs.arrived, first_token_s


class TestOneAtATime:
    """Each request finishes before the next arrives."""

    @pytest.mark.parametrize("seed", range(4))
    def test_prefixes_are_those_of_the_queue_of_blocks(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        queues, world = [Queue.of(60) for _ in range(N)], empty_world(SPEC, EXPERTS)
        context, number = collections.Counter[int](), collections.Counter[int]()
        found_blocks, found, expected = 0, [], []
        for request, action in turns(rng, 120):
            turn, text = request.turn, int(request.prompt_tokens)
            assert turn is not None
            place = int(turn.place)
            if bool(turn.begins) or context[place] + text > MOST_TOKENS:
                context[place] = 0
                number[place] += 1
            session, prompt = (place, number[place]), context[place] + text
            cached = [queue.found(session, (prompt - 1) // BLOCK) for queue in queues]
            world, arrived, _ = served(world, request, action)
            assert int(arrived.prompt_tokens) == prompt
            found.append(np.asarray(arrived.cached_tokens) // BLOCK)
            expected.append(cached)
            if action < N:
                answer = int(request.output_tokens[action])
                queues[action].serve(session, cached[action], prompt + answer - 1)
                context[place] = prompt + answer
                found_blocks += cached[action]
        assert found_blocks > 50
        # A block that is not full goes back to the head of the queue, where the counters take it for one of the prefix.
        excess = np.array(found) - np.array(expected)
        assert set(np.unique(excess)) <= {0, 1}
        assert np.mean(excess) < 0.05

    @pytest.mark.slow
    def test_experts_without_a_prefix_cache_find_nothing(self) -> None:
        experts = EXPERTS.replace(prefix_cache=jnp.array([False, True]))
        (request, _), *_ = turns(np.random.default_rng(0), 1)
        assert request.turn is not None
        first = request.replace(prompt_tokens=jnp.int32(100), turn=request.turn.replace(begins=jnp.bool_(True)))
        second = request.replace(turn=request.turn.replace(begins=jnp.bool_(False)))
        found = []
        for expert in range(N):
            world, _, _ = served(empty_world(SPEC, experts), first, expert, experts)
            _, arrived, _ = served(world, second, expert, experts)
            found.append(np.asarray(arrived.cached_tokens))
        np.testing.assert_array_equal(found[0], 0)
        assert found[1][0] == 0
        assert found[1][1] >= 96


def test_a_cached_context_is_not_computed_again() -> None:
    (request, _), *_ = turns(np.random.default_rng(0), 1)
    assert request.turn is not None
    turn = request.turn.replace(begins=jnp.bool_(False))
    long, short = (request.replace(prompt_tokens=jnp.int32(tokens), turn=turn) for tokens in (300, 8))
    world, _, _ = served(empty_world(SPEC, EXPERTS), long, 0)
    first_s = [float(served(world, short, expert)[2][expert]) for expert in range(N)]
    # An iteration is bounded below by its base; the second expert is 1.3 times as slow and computes 300 tokens more.
    assert first_s[0] == pytest.approx(0.02 + 1e-3, rel=1e-3)
    assert first_s[1] > first_s[0] + 0.015


def test_no_more_is_cached_than_was_said() -> None:
    """A counterfactual copy of an expert may have given a longer answer than the actual one."""
    (request, _), *_ = turns(np.random.default_rng(0), 1)
    assert request.turn is not None
    asked = request.replace(turn=request.turn.replace(begins=jnp.bool_(False)), prompt_tokens=jnp.int32(100))
    world, _, _ = served(empty_world(SPEC, EXPERTS), asked, 0)
    assert world.said is not None
    shorter = world.replace(said=world.said.replace(tokens=jnp.full(PLACES, 40)))
    assert served(shorter, asked, 0)[1].cached_tokens.tolist() == [2 * BLOCK, 0]


@pytest.mark.slow
def test_a_late_turn_of_a_conversation_that_is_over_takes_nothing_from_the_next() -> None:
    """It began before, on a slow expert, and ends after the first turn of the next conversation has."""
    (request, _), *_ = turns(np.random.default_rng(0), 1)
    assert request.turn is not None

    def turn(begins: bool, answer: int) -> Request:
        asked = request.turn.replace(place=jnp.int32(0), begins=jnp.bool_(begins), max_prompt_tokens=jnp.int32(900))
        return request.replace(prompt_tokens=jnp.int32(100), output_tokens=jnp.full(N, answer, jnp.int32), turn=asked)

    @jax.jit
    def sent(world: Any, request: Request, duration_s: float) -> Any:
        world, _ = dispatch(SPEC, EXPERTS, world, request, 0)
        return collect(EXPERTS, advance(SPEC, EXPERTS, world, jnp.float32(duration_s)))[0]

    world = sent(empty_world(SPEC, EXPERTS), turn(True, 400), 0.1)  # of conversation 1, and so long that it goes on
    world = sent(world, turn(True, 3), 2.0)
    cached = observe(SPEC, EXPERTS, world, turn(False, 1)).arrived.cached_tokens
    world, _ = collect(EXPERTS, advance(SPEC, EXPERTS, world, jnp.float32(60.0)))
    assert int(world.experts.slots.live.sum()) == 0
    assert cached.tolist() == observe(SPEC, EXPERTS, world, turn(False, 1)).arrived.cached_tokens.tolist() == [96, 0]


def test_a_proxy_knows_what_an_expert_had_but_not_what_it_has_lost() -> None:
    spec = dataclasses.replace(SPEC, observe="proxy")
    (request, _), *_ = turns(np.random.default_rng(0), 1)
    assert request.turn is not None

    def turn(place: int, tokens: int) -> Request:
        asked = request.turn.replace(place=jnp.int32(place), begins=jnp.bool_(False), max_prompt_tokens=jnp.int32(900))
        return request.replace(prompt_tokens=jnp.int32(tokens), output_tokens=jnp.full(N, 4, jnp.int32), turn=asked)

    world = empty_world(spec, EXPERTS)
    for place in (0, 1):  # 41 of 60 blocks each, so that the second takes most of the first
        world, _, _ = served(world, turn(place, 650), 0, EXPERTS, spec)
    _, proxy, _ = served(world, turn(0, 9), 0, EXPERTS, spec)
    _, engine, _ = served(world.replace(telemetry=empty_world(SPEC, EXPERTS).telemetry), turn(0, 9), 0)
    assert proxy.cached_tokens.tolist() == [40 * BLOCK, 0]
    assert 0 < int(engine.cached_tokens[0]) <= 21 * BLOCK


def test_contexts_of_sessions_that_stay_grow_by_prompt_and_answer() -> None:
    turn = Turn(np.array([0, 1, 0, 0, 0]), np.array([True, True, False, False, True]), np.full(5, 100))
    contexts = contexts_of(turn, np.array([10, 20, 30, 40, 5]), np.full((5, 2), 7), np.array([0, 0, 0, 1, 0]))
    np.testing.assert_array_equal(contexts, [0, 0, 17, 0, 0])
    too_long = contexts_of(turn, np.array([10, 20, 84, 1, 5]), np.full((5, 2), 7), np.zeros(5, int))
    np.testing.assert_array_equal(too_long, [0, 0, 0, 91, 0])
