"""Replay against the reference implementation, queueing theory and a real system; illegal inputs are refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

import qos_jax
from qos_jax import ExpertProfile, InputError, RequestLog, RequestTrace
from qos_jax.sim import lanes
from qos_jax.sim.replay import ReplayResult, replay_many, run_end_s
from tests.helpers.reference import ReferenceRun, replay_reference
from tests.helpers.workloads import KINDS, UNLIMITED, World, profile, side_by_side, small_worlds

WORLDS_PER_KIND = 20
CROWDS = 3
REPLICAS, REPLICA_REQUESTS, WARM_UP_REQUESTS = 16, 1024, 200

STANDBY_S = (0.0, 0.02, 0.5, 1e6)  # none, within an iteration, between bursts, for ever

any_world = settings(deadline=None, max_examples=60)


def replay(world: World, dtype: Any = np.float64) -> RequestLog:
    return qos_jax.replay(world.experts, world.trace, world.assignment, dtype=dtype)


def replay_with_power(world: World, dtype: Any = np.float64) -> ReplayResult:
    return replay_many(world.experts, [world.trace], [world.assignment], dtype=dtype)[0]


def reference(world: World) -> ReferenceRun:
    return replay_reference(world.experts, world.trace, world.assignment)


@functools.cache
def batches(kind: str) -> list[tuple[World, ReferenceRun]]:
    """Random worlds of a kind and their runs by the reference; small worlds are joined into one program."""

    def with_standby(world: World) -> World:
        standby_s = np.resize(STANDBY_S, len(world.experts.step_base_s))
        return dataclasses.replace(world, experts=world.experts.replace(standby_s=standby_s))

    if kind == "crowd":
        worlds = [KINDS[kind](np.random.default_rng(seed)) for seed in range(CROWDS)]
    else:
        worlds = [side_by_side([KINDS[kind](np.random.default_rng(seed)) for seed in range(WORLDS_PER_KIND)])]
    return [(world, reference(world)) for world in map(with_standby, worlds)]


def expect_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has replays begin with 200 slots: three hundred requests on an expert double them once and not three times."""
    monkeypatch.setattr(lanes, "_MIN_LIVE", 100)


class TestAgreesWithTheReference:
    @pytest.mark.parametrize("kind", KINDS)
    def test_in_float64_on_every_request(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if kind == "crowd":
            expect_many(monkeypatch)
        for world, expected in batches(kind):
            result = replay_with_power(world)
            log = result.log
            np.testing.assert_array_equal(log.dropped, expected.dropped)
            np.testing.assert_array_equal(log.preemptions, expected.preemptions)
            np.testing.assert_allclose(log.finish_s, expected.finish_s, rtol=1e-9)
            np.testing.assert_allclose(log.first_token_s, expected.first_token_s, rtol=1e-9)
            end_s = run_end_s(world.trace, expected.log)
            standby_s = [expert.standby_until(end_s) for expert in expected.experts]
            np.testing.assert_allclose(result.standby_s, standby_s, rtol=1e-9, atol=1e-6)
            np.testing.assert_allclose(result.busy_s, [expert.busy_s for expert in expected.experts], rtol=1e-9)
            # An expert that stands by for ever is never idle after its first iteration.
            elapsed_s = [
                end_s - expert.iterations[0].start_s if expert.iterations else 0.0 for expert in expected.experts
            ]
            busy_or_standby_s, endless = result.busy_s + result.standby_s, world.experts.standby_s == max(STANDBY_S)
            np.testing.assert_allclose(busy_or_standby_s[endless], np.array(elapsed_s)[endless], rtol=1e-9, atol=1e-6)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["calm", "long_prompts"])
    def test_where_prompts_are_in_the_prefix_cache_in_part(self, kind: str) -> None:
        """Half of the requests, and only on experts that have such a cache."""
        rng = np.random.default_rng(5)
        world = side_by_side([KINDS[kind](np.random.default_rng(seed)) for seed in range(3)])
        world = dataclasses.replace(world, experts=world.experts.replace(kv_blocks=0 * world.experts.kv_blocks + 9999))
        prompts = world.trace.prompt_tokens
        shared_tokens = np.where(rng.random(len(prompts)) < 0.5, rng.integers(0, prompts), 0)
        shared = dataclasses.replace(world, trace=world.trace.replace(shared_tokens=shared_tokens))
        log, expected = replay(shared), reference(shared)
        np.testing.assert_allclose(log.finish_s, expected.finish_s, rtol=1e-9)
        np.testing.assert_allclose(log.first_token_s, expected.first_token_s, rtol=1e-9)
        caches = world.experts.prefix_cache[world.assignment] & (world.assignment >= 0)
        earlier = log.first_token_s < replay(world).first_token_s - 1e-9
        assert earlier[caches].any()
        assert not earlier[~caches].any()

    def test_in_float32_to_one_iteration_on_almost_every_request(self) -> None:
        agrees = []
        for kind in KINDS.keys() - {"crowd"}:  # the program of a crowd takes long to compile
            for world, expected in batches(kind):
                log = replay(world, np.float32)
                error_s = np.abs([log.finish_s - expected.finish_s, log.first_token_s - expected.first_token_s]).max(0)
                in_time = error_s <= iterations_at_the_end_s(world, expected)
                agrees.append(np.where(expected.dropped, log.dropped, in_time))
        assert np.concatenate(agrees).mean() >= 0.999

    @any_world
    @given(small_worlds())
    def test_to_the_last_bit_where_times_are_exact_sums(self, world: World) -> None:
        result, expected = replay_with_power(world), reference(world)
        log, end_s = result.log, run_end_s(world.trace, expected.log)
        np.testing.assert_array_equal(result.standby_s, [expert.standby_until(end_s) for expert in expected.experts])
        np.testing.assert_array_equal(log.dropped, expected.dropped)
        np.testing.assert_array_equal(log.preemptions, expected.preemptions)
        np.testing.assert_array_equal(log.finish_s, expected.finish_s)
        np.testing.assert_array_equal(log.first_token_s, expected.first_token_s)

    def test_in_float32_before_and_after_an_idle_month(self) -> None:
        month_s = 30 * 24 * 3600.0
        arrival_s = np.array([0.0, 0.1, month_s, month_s + 0.1])
        trace = RequestTrace(arrival_s, np.full(4, 20), np.full((4, 1), 50))
        world = World(profile(step_base_s=0.017, standby_s=17.5), trace, np.zeros(4, np.int32))
        latency_s = reference(world).finish_s - arrival_s
        result = replay_with_power(world, np.float32)
        np.testing.assert_allclose(result.log.finish_s - arrival_s, latency_s, rtol=1e-5)
        np.testing.assert_allclose(result.standby_s, 17.5, rtol=1e-5)

    @pytest.mark.slow
    def test_in_float32_after_a_million_requests_without_a_pause(self) -> None:
        rng, count = np.random.default_rng(0), 1_000_000
        arrival_s = np.cumsum(rng.exponential(1 / 6.5, count))
        prompt_tokens = np.clip(np.exp(rng.normal(3.2, 0.9, count)), 1, 512).astype(int)
        output_tokens = np.clip(np.exp(rng.normal(4.26, 1.0, (count, 1))), 1, 512).astype(int)
        experts = profile(
            step_base_s=0.024, prefill_base_s=0.016, prefill_per_token_s=0.000126, per_sequence_s=0.00011,
            per_kv_token_s=0.94e-6, kv_blocks=3361, max_running=32, max_waiting=32,
        )  # fmt: skip
        world = World(experts, RequestTrace(arrival_s, prompt_tokens, output_tokens), np.zeros(count, np.int32))
        exact, rounded = replay(world), replay(world, np.float32)
        error_s = np.abs([rounded.finish_s - exact.finish_s, rounded.first_token_s - exact.first_token_s]).max(0)
        assert (rounded.dropped == exact.dropped).mean() >= 0.999
        # The expert is never idle, so after rounding has moved an arrival to another iteration, the boundaries of all
        # later iterations differ. An iteration takes 27 to 33 ms, with prefill up to 40 ms.
        assert np.nanmean(error_s <= 0.033) >= 0.998
        assert np.nanmean(error_s <= 0.040) >= 0.999
        halves = np.nanmean(error_s[: count // 2]), np.nanmean(error_s[count // 2 :])
        assert halves[1] == pytest.approx(halves[0], rel=0.2)


class TestAtTheLargestNumbers:
    """One expert for each limit, in one program; iterations of one length, so that KV memory is integrated exactly."""

    REQUESTS = 64
    MOST_TOKENS, MOST_BLOCKS = 2**29, 2**26  # of a prompt; of a KV memory that both tokens of a request just fill
    EXPERTS = profile(
        step_base_s=[0.017, 1e-5, 1e6, 0.02, 0.01],
        prefill_per_token_s=[0.0, 0.0, 0.0, 0.0, 1e6],
        kv_blocks=[140_000, UNLIMITED, 10**12, MOST_BLOCKS, 10**9],
        max_running=[64, 1, 10**12, 8, 10**12],
        max_waiting=[10**12, 10**12, 10**12, 10**12, 0],
    )
    PROMPTS = (16, 5, 2**24, MOST_TOKENS, MOST_TOKENS)
    OUTPUTS = (32_768, 5_000, 2, 3, 2)

    def world(self) -> World:
        num_experts = len(self.PROMPTS)
        assignment = np.repeat(np.arange(num_experts), self.REQUESTS)
        outputs = np.tile(self.OUTPUTS, (len(assignment), 1))
        trace = RequestTrace(np.zeros(len(assignment)), np.repeat(self.PROMPTS, self.REQUESTS), outputs)
        return World(self.EXPERTS.replace(token_budget=2**24), trace, assignment)

    @pytest.mark.slow
    def test_every_request_and_the_memory_held_are_as_in_the_reference(self) -> None:
        world = self.world()
        expected = reference(world)
        (result,) = replay_many(world.experts, [world.trace], [world.assignment])
        np.testing.assert_array_equal(result.log.dropped, expected.dropped)
        np.testing.assert_array_equal(result.log.preemptions, expected.preemptions)
        np.testing.assert_allclose(result.log.finish_s, expected.finish_s, rtol=1e-9)
        np.testing.assert_allclose(result.log.first_token_s, expected.first_token_s, rtol=1e-9)
        held = [sum(each.duration_s * each.blocks_held for each in expert.iterations) for expert in expected.experts]
        np.testing.assert_allclose(result.kv_block_s, held, rtol=1e-6)
        assert expected.dropped.any()
        assert np.isfinite(expected.finish_s).any(where=world.assignment == 3)


def iterations_at_the_end_s(world: World, run: ReferenceRun) -> np.ndarray:
    """The longest of the iterations around each request's last token [J] s; NaN for dropped requests."""
    longest_s = np.full(len(world.assignment), np.nan)
    for n, expert in enumerate(run.experts):
        served = (world.assignment == n) & ~run.dropped
        start_s = np.array([iteration.start_s for iteration in expert.iterations])
        duration_s = np.pad([iteration.duration_s for iteration in expert.iterations], 1)
        last = np.searchsorted(start_s, run.finish_s[served]) - 1
        longest_s[served] = np.max([duration_s[last], duration_s[last + 1], duration_s[last + 2]], axis=0)
    return longest_s


class TestEveryLog:
    @any_world
    @given(small_worlds())
    def test_accounts_for_every_request(self, world: World) -> None:
        log = replay(world)
        done = np.isfinite(log.finish_s)
        np.testing.assert_array_equal(done, ~log.dropped)
        np.testing.assert_array_equal(done, np.isfinite(log.first_token_s))
        assert log.dropped[world.assignment < 0].all()
        assert (log.preemptions >= 0).all()
        assert (log.preemptions[log.dropped] == 0).all()

    @any_world
    @given(small_worlds())
    def test_orders_arrival_first_token_and_finish(self, world: World) -> None:
        log = replay(world)
        done = ~log.dropped
        output_tokens = world.trace.output_tokens[np.flatnonzero(done), world.assignment[done]]
        shortest_iteration_s = np.asarray(world.experts.step_base_s)[world.assignment[done]]
        assert (log.first_token_s[done] >= world.trace.arrival_s[done] + shortest_iteration_s).all()
        decoding_s = log.finish_s[done] - log.first_token_s[done]
        assert (decoding_s >= (output_tokens - 1) * shortest_iteration_s).all()

    @any_world
    @given(small_worlds())
    def test_serves_first_come_first(self, world: World) -> None:
        log = replay(world)
        for n in range(2):
            served = (world.assignment == n) & ~log.dropped
            assert (np.diff(log.first_token_s[served]) >= 0).all()

    @any_world
    @given(small_worlds(), st.permutations(range(2)))
    def test_does_not_depend_on_the_order_of_experts(self, world: World, order: list[int]) -> None:
        experts = jax.tree.map(lambda x: x[order] if np.ndim(x) else x, world.experts)
        trace = world.trace.replace(output_tokens=world.trace.output_tokens[:, order])
        new_index = np.array([*np.argsort(order), -1])
        permuted = World(experts, trace, new_index[world.assignment])
        jax.tree.map(np.testing.assert_array_equal, replay(permuted), replay(world))

    @any_world
    @given(small_worlds())
    def test_drops_from_an_empty_system_exactly_what_never_fits(self, world: World) -> None:
        arrival_s = 1e6 * np.arange(len(world.assignment))
        experts = world.experts.replace(max_waiting=np.maximum(world.experts.max_waiting, 1))
        log = replay(World(experts, world.trace.replace(arrival_s=arrival_s), world.assignment))
        sent = world.assignment >= 0
        output_tokens = world.trace.output_tokens[np.flatnonzero(sent), world.assignment[sent]]
        blocks = np.ceil((world.trace.prompt_tokens[sent] + output_tokens) / 16)
        np.testing.assert_array_equal(log.dropped[sent], blocks > experts.kv_blocks[world.assignment[sent]])


class TestQueueingTheory:
    """Independent replicas of one expert with iterations of 10 ms: the service of d tokens takes d iterations."""

    STEP_S = 0.01
    MEAN_TOKENS = 100
    LOAD = 0.5

    @property
    def mean_service_s(self) -> float:
        return self.STEP_S * self.MEAN_TOKENS

    def poisson_gaps(self, rng: np.random.Generator) -> np.ndarray:
        return rng.exponential(self.mean_service_s / self.LOAD, (REPLICA_REQUESTS, REPLICAS))

    def test_constant_gaps_and_service(self) -> None:
        """D/D/1: no request waits below saturation; above it, the wait grows by a constant with every request."""
        gap_s = self.mean_service_s * np.linspace(0.99, 1.5, REPLICAS)
        shape = (REPLICA_REQUESTS, REPLICAS)
        arrival_s, first_token_s, finish_s = serve(
            profile(step_base_s=self.STEP_S, max_running=1),
            np.broadcast_to(gap_s, shape),
            np.full(shape, self.MEAN_TOKENS),
        )
        wait_s = np.arange(REPLICA_REQUESTS)[:, None] * np.maximum(0, self.mean_service_s - gap_s)
        np.testing.assert_allclose(first_token_s - arrival_s, wait_s + self.STEP_S, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(finish_s - arrival_s, wait_s + self.mean_service_s, rtol=1e-3)

    @pytest.mark.parametrize("service", ["constant", pytest.param("geometric", marks=pytest.mark.slow)])
    def test_one_at_a_time_waits_as_pollaczek_and_khinchine_say(self, service: str) -> None:
        """M/G/1: mean wait = arrival rate x E[service^2] / (2 (1 - load))."""
        rng = np.random.default_rng(1)
        arrival_s, first_token_s, _ = serve(
            profile(step_base_s=self.STEP_S, max_running=1), self.poisson_gaps(rng), self.tokens(rng, service)
        )
        variance = {"constant": 0.0, "geometric": self.MEAN_TOKENS * (self.MEAN_TOKENS - 1)}[service]
        mean_square_s2 = self.STEP_S**2 * (self.MEAN_TOKENS**2 + variance)
        expected_s = self.LOAD / self.mean_service_s * mean_square_s2 / (2 * (1 - self.LOAD))
        assert_mean(first_token_s - self.STEP_S - arrival_s, expected_s)

    @pytest.mark.parametrize("service", ["constant", "geometric"])
    def test_batching_that_costs_by_the_request_is_processor_sharing(self, service: str) -> None:
        """M/G/1-PS: mean latency = mean service / (1 - load), whatever the distribution of service."""
        rng = np.random.default_rng(2)
        arrival_s, _, finish_s = serve(
            profile(per_sequence_s=self.STEP_S, max_running=256), self.poisson_gaps(rng), self.tokens(rng, service)
        )
        assert_mean(finish_s - arrival_s, self.mean_service_s / (1 - self.LOAD))

    def test_arrivals_see_as_many_requests_as_littles_law_says(self) -> None:
        """Poisson arrivals see time averages, so they find arrival rate x mean latency requests in the system."""
        rng = np.random.default_rng(3)
        arrival_s, _, finish_s = serve(
            profile(step_base_s=self.STEP_S / 2, per_sequence_s=self.STEP_S / 2, max_running=4),
            self.poisson_gaps(rng),
            self.tokens(rng, "geometric"),
        )
        found = np.array(
            [
                [(finish_s[:j, lane] > arrival_s[j, lane]).sum() for lane in range(REPLICAS)]
                for j in range(REPLICA_REQUESTS)
            ]
        )
        rate = self.LOAD / self.mean_service_s
        assert_mean(found - rate * (finish_s - arrival_s), 0.0, scale=found.mean())

    def tokens(self, rng: np.random.Generator, service: str) -> np.ndarray:
        shape = (REPLICA_REQUESTS, REPLICAS)
        return np.full(shape, self.MEAN_TOKENS) if service == "constant" else rng.geometric(1 / self.MEAN_TOKENS, shape)


def serve(
    expert: ExpertProfile, gaps_s: np.ndarray, output_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Serves ``gaps_s`` [J, R] on R copies of one expert; returns arrivals, first tokens and finishes [J, R]."""
    arrival_s = gaps_s.cumsum(axis=0)
    one_each, first = np.ones(len(gaps_s), np.int32), np.zeros(len(gaps_s), np.int32)
    columns = zip(arrival_s.T, output_tokens.T, strict=True)
    world = side_by_side(
        [World(expert, RequestTrace(arrivals, one_each, tokens[:, None]), first) for arrivals, tokens in columns]
    )
    log = replay(world)
    assert not log.dropped.any()
    place = np.argsort(world.assignment, kind="stable").reshape(gaps_s.T.shape).T
    return arrival_s, log.first_token_s[place], log.finish_s[place]


def assert_mean(values: np.ndarray, expected: float, scale: float | None = None) -> None:
    """Asserts that ``expected`` is in the 99.9 % interval of the mean over replicas, and that this is narrow."""
    scale = abs(expected) if scale is None else scale
    means = values[WARM_UP_REQUESTS:].mean(axis=0)
    half_width = scipy.stats.t.ppf(0.9995, REPLICAS - 1) * means.std(ddof=1) / np.sqrt(REPLICAS)
    assert half_width < 0.15 * scale
    assert abs(means.mean() - expected) < half_width


class TestRealSystem:
    def test_reproduces_a_saturated_vllm_run(self, data_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """300 ShareGPT requests on vLLM 0.19, Llama-3.1-8B, RTX 4090; the costs are fitted to that GPU's kernels."""
        expect_many(monkeypatch)
        lines = (data_dir / "golden-rtx4090" / "requests.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        rows.sort(key=lambda row: row["arrival_time"])
        run = {name: np.array([row[name] for row in rows]) for name in rows[0] if name != "request_id"}
        experts = profile(
            step_base_s=16.88e-3,
            prefill_base_s=8.53e-3,
            prefill_per_token_s=0.091e-3,
            per_sequence_s=0.0411e-3,
            per_kv_token_s=0.000158e-3,
            kv_blocks=2588,
            max_running=256,
        )
        trace = RequestTrace(run["arrival_time"], run["input_toks"], run["output_toks"][:, None])
        log = replay(World(experts, trace, np.zeros(len(rows), np.int32)))

        # The client and the server have different clocks: the server cannot queue a request before it arrives.
        arrival_s = run["arrival_time"] + (run["queued_ts"] - run["arrival_time"]).min()
        real = serving_means(arrival_s, run["first_token_ts"], run["last_token_ts"], run["output_toks"])
        simulated = serving_means(run["arrival_time"], log.first_token_s, log.finish_s, run["output_toks"])
        np.testing.assert_allclose(simulated, real, rtol=0.02)


def serving_means(
    arrival_s: np.ndarray, first_token_s: np.ndarray, finish_s: np.ndarray, output_tokens: np.ndarray
) -> tuple[float, float, float]:
    """Mean time to first token, time per further output token, and end-to-end latency."""
    time_per_token_s = (finish_s - first_token_s) / (output_tokens - 1)
    return (first_token_s - arrival_s).mean(), time_per_token_s.mean(), (finish_s - arrival_s).mean()


class TestBadInput:
    GOOD = World(
        profile(step_base_s=[0.01, 0.02]),
        RequestTrace(np.arange(3.0), np.ones(3, np.int32), np.ones((3, 2), np.int32)),
        np.array([0, 1, 0]),
    )

    @pytest.mark.parametrize(
        ("name", "values", "message"),
        [
            ("step_base_s", [0.01, np.nan], r"step_base_s.* nan .*finite"),
            ("prefill_base_s", [0.01, np.inf], r"prefill_base_s.* inf .*finite"),
            ("per_sequence_s", [-0.5, 0.0], r"per_sequence_s.* -0\.5 .*>= 0"),
            ("network_s", [0.0, -0.25], r"network_s.* -0\.25 .*>= 0"),
            ("standby_s", [0.0, np.inf], r"standby_s.* inf .*<= 1e\+06"),
            ("standby_w", [-90.0, 0.0], r"standby_w.* -90\.0 .*>= 0"),
            ("kv_blocks", [100, 0], r"kv_blocks.* 0.* >= 1"),
            ("kv_blocks", [100, 2.5], r"kv_blocks.* 2\.5.* whole"),
            ("max_running", [0, 1], r"max_running.* 0.* >= 1"),
            ("max_waiting", [1, -1], r"max_waiting.* -1.* >= 0"),
            ("max_waiting", [1, 1, 1], r"\(2,\)|\(3,\)"),
            ("step_base_s", [0.01, 1e29], r"step_base_s.* 1e\+29 .*<= 1e\+06"),
            ("per_kv_token_s", [2e6, 0.0], r"per_kv_token_s.* 2000000\.0 .*<= 1e\+06"),
            ("per_kv_token_s", [[0.0, 0.0]], r"per_kv_token_s.* \(1, 2\).* \[2\]"),
        ],
    )
    def test_in_a_profile_is_named(self, name: str, values: Any, message: str) -> None:
        experts = self.GOOD.experts.replace(**{name: np.array(values)})
        with pytest.raises(InputError, match=message):
            qos_jax.replay(experts, self.GOOD.trace, self.GOOD.assignment)

    @pytest.mark.parametrize(
        ("name", "values", "message"),
        [
            ("arrival_s", [0.0, 2.0, 1.0], r"arrival_s\[2\].* 1\.0.* sort"),
            ("arrival_s", [0.0, np.nan, 1.0], r"arrival_s\[1\].* nan.* finite"),
            ("arrival_s", [0.0, 1.0, 1e29], r"arrival_s\[2\].* 1e\+29.* within"),
            ("prompt_tokens", [1, 2**29 + 1, 1], r"prompt_tokens\[1\].* at most 536870912"),
            ("arrival_s", [[0.0, 1.0, 2.0]], r"arrival_s.* \(1, 3\).* \[J\]"),
            ("prompt_tokens", [1, 0, 1], r"prompt_tokens\[1\].* 0.* at least 1"),
            ("prompt_tokens", [1, 1, 1.5], r"prompt_tokens\[2\].* 1\.5.* whole"),
            ("prompt_tokens", [1, 1], r"prompt_tokens.* \(2,\).* \[3\]"),
            ("output_tokens", [[1, 1], [1, 1], [0, 1]], r"output_tokens\[2, 0\].* 0.* at least 1"),
            ("output_tokens", [[1, 1], [1, 1], [1, -7]], r"output_tokens\[2, 1\].* -7.* at least 1"),
            ("output_tokens", [1, 1, 1], r"output_tokens.* \(3,\).* \[3, 2\]"),
            ("shared_tokens", [0, -1, 0], r"shared_tokens\[1\].* -1.* whole number from 0"),
            ("shared_tokens", [10**6, 0, 0], r"shared_tokens\[0\].* 1000000.* below the \d+ tokens of the prompt"),
            ("shared_tokens", [0, 0], r"shared_tokens.* \(2,\).* \[3\]"),
        ],
    )
    def test_in_a_trace_is_named(self, name: str, values: Any, message: str) -> None:
        trace = self.GOOD.trace.replace(**{name: np.array(values)})
        with pytest.raises(InputError, match=message):
            qos_jax.replay(self.GOOD.experts, trace, self.GOOD.assignment)

    @pytest.mark.parametrize("name", ["token_budget", "block_size"])
    @pytest.mark.parametrize("value", [0, -1, 2**24 + 1, 2**31, 100.5, np.nan, True, "16"])
    def test_in_a_size_is_named(self, name: str, value: Any) -> None:
        with pytest.raises(InputError, match=f"{name} is {value!r}, must be a whole number from 1 to 16777216"):
            qos_jax.replay(self.GOOD.experts, self.GOOD.trace, self.GOOD.assignment, **{name: value})

    @pytest.mark.parametrize("dtype", [np.float16, np.int32, "f"])
    def test_in_the_type_of_times_is_named(self, dtype: Any) -> None:
        with pytest.raises(InputError, match=r"dtype is .*, must be np\.float64 or np\.float32"):
            qos_jax.replay(self.GOOD.experts, self.GOOD.trace, self.GOOD.assignment, dtype=dtype)

    def test_in_the_number_of_assignments_is_named(self) -> None:
        with pytest.raises(InputError, match=r"assignments has 2 entries, must have 1, one for each trace"):
            replay_many(self.GOOD.experts, [self.GOOD.trace], [self.GOOD.assignment] * 2)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([0, 1, 2], r"assignment\[2\].* 2.* 0 \.\. 1"),
            ([-2, 1, 0], r"assignment\[0\].* -2.* 0 \.\. 1"),
            ([0, 1], r"assignment.* \(2,\).* \[3\]"),
            ([0.0, 1.0, 0.5], r"assignment.* integers"),
        ],
    )
    def test_in_an_assignment_is_named(self, values: list[float], message: str) -> None:
        with pytest.raises(InputError, match=message):
            qos_jax.replay(self.GOOD.experts, self.GOOD.trace, np.array(values))
