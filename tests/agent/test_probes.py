"""The values of probes against brute force: a float64 replay of each alternative with the same later decisions.

The requests are a fixed table and the policy depends on their prompts only, so the later decisions are known.
"""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import struct
from jax import Array, lax

from qos_jax import ExpertProfile, Observation, Request, RequestLog, RequestTrace
from qos_jax.agent.probes import Probe, SoftQos, empty_probes, marginal_values, simulate, start_probe
from qos_jax.agent.rewards import RewardWeights
from qos_jax.evaluation.metrics import latency_per_token_s, select_assigned
from qos_jax.sim import engine
from qos_jax.sim.env import EnvParams, EnvState
from qos_jax.sim.replay import ReplayResult, replay_many
from tests.helpers.decision_processes import quick_jit, stacked
from tests.helpers.reference import standby_between
from tests.helpers.small_env import small_env, small_params

NUM_EXPERTS, DROP = 3, 3
PROBES, STRETCH = 3, 6  # probes at a time, and requests between the starts of two probes
HORIZON = PROBES * STRETCH
DECISIONS = STRETCH * np.arange(7)  # the numbers of the decisions that probes measure in each world
NUM_REQUESTS = DECISIONS[-1] + HORIZON
WIDTH_S = 2e-3
PLAIN = RewardWeights()
COSTS = {
    "plain": PLAIN,
    "violation": RewardWeights(violation=0.7),
    "drop": RewardWeights(drop=0.4),
    "kv_memory": RewardWeights(kv_memory=0.5),
    "energy": RewardWeights(energy=0.3),
    "all": RewardWeights(violation=0.2, drop=0.3, kv_memory=0.2, energy=0.1),
}

ENV = small_env(NUM_EXPERTS, history=4)


@struct.dataclass
class TableWorkload:
    """Requests one by one from a table; keys are ignored."""

    gap_s: Array  # [J]
    requests: Request  # leaves [J, ...]

    def init(self, key: Array) -> Array:
        return jnp.int32(0)

    def next(self, key: Array, state: Array) -> tuple[Array, Request, Array]:
        gap_s, request = jax.tree.map(lambda x: x[state], (self.gap_s, self.requests))
        return gap_s, request, state + 1


def world(seed: int, rate_per_s: float, **fields: Any) -> EnvParams:
    rng = np.random.default_rng(seed)
    score = rng.uniform(0.2, 1.0, (NUM_REQUESTS + 1, NUM_EXPERTS))
    output_tokens = rng.integers(1, 60, score.shape)
    requests = Request(
        prompt_tokens=rng.integers(1, 120, NUM_REQUESTS + 1),
        output_tokens=output_tokens,
        score=score,
        latency_limit_s=rng.choice([0.04, 0.06, 0.1], NUM_REQUESTS + 1),
        predicted_score=score,
        predicted_tokens=output_tokens.astype(float),
    )
    table = TableWorkload(rng.exponential(1.0 / rate_per_s, NUM_REQUESTS + 1), requests)
    unequal = {
        "busy_w": np.array([200.0, 300.0, 400.0]),
        "standby_s": np.array([0.0, 0.3, 2.0]),
        "network_s": np.array([0.0, 0.02, 0.05]),
    }
    fields = {"idle_w": 50.0, "standby_w": 100.0} | unequal | fields
    params = small_params(NUM_EXPERTS, max_steps_in_episode=10_000, **fields)
    return params.replace(
        workload=jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else None), table)
    )


# A quiet world; a busy one with stale metrics; full queues; KV memory for a few requests, but not for the longest.
WORLDS = [
    world(0, 2.0),
    world(1, 7.0, staleness_s=0.3),
    world(2, 25.0, max_waiting=2),
    world(3, 7.0, kv_blocks=np.array([9, 14, 9])),
]


def policy(key: Array, obs: Observation) -> Array:
    """Chooses an expert or sometimes the drop, by the length of the prompt alone."""
    return jnp.array([0, 1, 2, 0, DROP, 1, 2, 0, 1, DROP])[obs.arrived.prompt_tokens % 10]


@quick_jit
@functools.partial(jax.vmap, in_axes=(0, None))
def measured_in(params: EnvParams, soft_qos: SoftQos) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs the policy with probes, a row per stretch, and with ``env.step``, a row per request."""

    def stretch(carry: tuple[EnvState, Probe], x: tuple[Array, Array]) -> tuple[Any, dict[str, Any]]:
        (state, probes), (i, key) = carry, x
        which, obs = i % PROBES, ENV.observe(state, params)
        finished = jax.tree.map(lambda x: x[which], probes)
        row = {"state": state, "finished": finished, "value": marginal_values(ENV, params, soft_qos, state, finished)}
        probes = start_probe(ENV, params, soft_qos, state, probes, which, obs, policy(key, obs))
        state, probes, sums = simulate(ENV, params, policy, soft_qos, STRETCH, key, state, probes, which)
        return (state, probes), row | {"sums": sums}

    def step(carry: tuple[Observation, EnvState], key: Array) -> tuple[Any, dict[str, Any]]:
        obs, state = carry
        action = policy(key, obs)
        next_obs, next_state, reward, _, _, info = ENV.step(key, state, action, params)
        row = {"obs": obs, "state": state, "action": action, "reward": reward, "dropped": info["dropped"]}
        return (next_obs, next_state), row

    obs, state = ENV.reset(jax.random.key(0), params)
    stretches = 1 + NUM_REQUESTS // STRETCH
    xs = jnp.arange(stretches), jax.random.split(jax.random.key(1), stretches)
    _, measurements = lax.scan(stretch, (state, empty_probes(state, obs, PROBES)), xs)
    steps = jax.random.split(jax.random.key(2), NUM_REQUESTS + 1)
    return measurements, lax.scan(step, (obs, state), steps)[1]


@functools.cache
def measurements(costs: str = "plain", width_s: float = WIDTH_S) -> tuple[dict[str, Any], dict[str, Any]]:
    soft_qos = jax.tree.map(jnp.float32, SoftQos(COSTS[costs], width_s))
    return jax.tree.map(np.asarray, measured_in(stacked(WORLDS), soft_qos))


def values(costs: str = "plain", width_s: float = WIDTH_S) -> np.ndarray:
    """Returns the values by probes [worlds, decisions, N + 1]."""
    return measurements(costs, width_s)[0]["value"][:, PROBES:]


@functools.cache
def replays(of_world: int) -> list[list[tuple[RequestTrace, np.ndarray, ReplayResult]]]:
    """Returns for each decision replays up to its horizon: with its request on each of the experts, and without it."""
    workload = jax.tree.map(np.asarray, WORLDS[of_world].workload)
    actions = measurements()[1]["action"][of_world]
    arrival_s = np.cumsum(workload.gap_s.astype(np.float64))
    runs = []
    for at in DECISIONS:
        until = slice(0, at + HORIZON)
        fields = jax.tree.map(lambda x, until=until: x[until], vars(workload.requests))
        for place in (0, 1, 2, -1):
            assignment = np.where(actions == DROP, -1, actions)[until]
            assignment[at] = place
            runs.append((RequestTrace(arrival_s=arrival_s[until], **fields), assignment))
    experts = jax.tree.map(np.asarray, WORLDS[of_world].experts)
    done = replay_many(experts, *zip(*runs, strict=True))
    runs = [(*run, replayed) for run, replayed in zip(runs, done, strict=True)]
    return [runs[i : i + NUM_EXPERTS + 1] for i in range(0, len(runs), NUM_EXPERTS + 1)]


def return_of(of_world: int, run: tuple[Any, Any, Any], weights: RewardWeights, width_s: float) -> float:
    """Returns the soft QoS of all answers of a run minus all costs."""
    experts, (trace, assignment, replayed) = jax.tree.map(np.asarray, WORLDS[of_world].experts), run
    margin_s = trace.latency_limit_s - latency_per_token_s(experts, trace, assignment, replayed)
    in_time = scipy.special.expit(margin_s / width_s)
    answers = select_assigned(trace.score, assignment) * in_time - weights.violation * (1.0 - in_time)
    memory_gb_s = np.sum(replayed.kv_block_s * experts.kv_block_gb)
    busy_j = replayed.busy_s * (experts.busy_w - experts.idle_w)
    standby_j = standby_to_the_end_s(experts, trace, assignment, replayed.log) * (experts.standby_w - experts.idle_w)
    energy_kj = np.sum(busy_j + standby_j) / 1e3
    plain = np.sum(np.where(replayed.log.dropped, -weights.drop, answers))
    return plain - weights.kv_memory * memory_gb_s - weights.energy * energy_kj


def standby_to_the_end_s(
    experts: ExpertProfile, trace: RequestTrace, assignment: np.ndarray, log: RequestLog
) -> np.ndarray:
    """Returns the standby [N] s, that after each expert's last token included."""
    served = [(assignment == n) & ~log.dropped for n in range(NUM_EXPERTS)]
    return np.array(
        [
            standby_between(trace.arrival_s[mask], log.finish_s[mask], standby_s, np.inf)
            for mask, standby_s in zip(served, experts.standby_s, strict=True)
        ]
    )


def brute_force(costs: str, width_s: float = WIDTH_S) -> np.ndarray:
    """Returns values [worlds, decisions, N + 1] relative to a world without the request."""
    weights = COSTS[costs]

    def value(of_world: int, runs: list[Any]) -> np.ndarray:
        each = np.array([return_of(of_world, run, weights, width_s) for run in runs])
        return each - each[DROP] - weights.drop

    return np.array([[value(i, runs) for runs in replays(i)] for i in range(len(WORLDS))])


def refused() -> np.ndarray:
    """Returns [worlds, decisions, N] bool: the expert refuses the request."""
    return np.array(
        [
            [[run[2].log.dropped[at] for run in runs[:DROP]] for at, runs in zip(DECISIONS, replays(i), strict=True)]
            for i in range(len(WORLDS))
        ]
    )


@pytest.mark.parametrize("costs", COSTS)
def test_values_equal_those_of_brute_force(costs: str) -> None:
    np.testing.assert_allclose(values(costs), brute_force(costs), atol=3e-3)


def test_a_logistic_of_no_width_is_the_step_at_the_limit() -> None:
    np.testing.assert_allclose(values(width_s=1e-8), brute_force("plain", 1e-9), atol=1e-4)


def test_the_worlds_exercise_every_rule() -> None:
    """They have placements that help, that hurt others and that are refused, and later requests refused due to one."""
    measured = values()
    assert measured.max() > 0.5 and measured.min() < -0.5
    assert np.any(refused()) and not np.all(refused())
    drops = np.array([[[run[2].log.dropped.sum() for run in runs] for runs in replays(i)] for i in range(len(WORLDS))])
    later = drops[..., :DROP] - drops[..., DROP:] - refused() + 1
    assert later.min() >= 0 and later.max() > 0
    assert set(measurements()[0]["finished"].action[:, PROBES:].ravel()) == {0, 1, 2, DROP}


def test_the_value_of_a_drop_is_minus_its_cost() -> None:
    assert not np.any(values()[..., DROP])
    np.testing.assert_allclose(values("drop")[..., DROP], -0.4)


def test_a_refused_placement_has_the_value_of_a_drop() -> None:
    np.testing.assert_allclose(values()[..., :DROP][refused()], 0.0, atol=1e-6)
    np.testing.assert_allclose(values("drop")[..., :DROP][refused()], -0.4, atol=1e-6)


@pytest.mark.parametrize("resource", ["kv_memory", "energy"])
def test_costs_of_resources_lower_every_value_in_a_quiet_world(resource: str) -> None:
    assert np.all(values(resource)[0, :, :DROP] < values()[0, :, :DROP])


def test_the_actual_world_is_that_of_the_environment() -> None:
    probed, steps = measurements()
    state, expected = probed["state"], jax.tree.map(lambda x: x[:, ::STRETCH], steps["state"])
    for name in ("request", "workload", "time"):
        chex.assert_trees_all_equal(getattr(state, name), getattr(expected, name))
    for part in (lambda telemetry: telemetry.arrivals, lambda telemetry: telemetry.snapshots.age_s):
        chex.assert_trees_all_close(part(state.world.telemetry), part(expected.world.telemetry), rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(compacted(state), compacted(expected), rtol=1e-4, atol=1e-4)
    sums = jax.tree.map(lambda x: x[:, :-1], probed["sums"])
    by_stretch = (len(WORLDS), -1, STRETCH)
    np.testing.assert_allclose(sums.qos, steps["reward"][:, :-1].reshape(by_stretch).sum(-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sums.dropped, steps["dropped"][:, :-1].reshape(by_stretch).sum(-1))


def compacted(state: EnvState) -> tuple[Any, Any, Any]:
    """Returns the requests, the clocks and the standby left.

    Gaps between slots depend on the last compaction, and so do what a slot keeps of a request before and is not in use.
    """
    experts = engine.compact(ENV.spec.engine, jax.tree.map(jnp.asarray, state.world.experts))
    slots = experts.slots
    slots = slots.replace(
        first_token_s=jnp.where(slots.generated > 0, slots.first_token_s, 0.0),
        finish_s=0.0,
        taken_at=jnp.where(slots.cached_blocks > 0, slots.taken_at, 0),
    )
    return slots, experts.clock_s, experts.standby_left_s


def test_a_probe_keeps_the_observation_and_action_of_its_decision() -> None:
    probed, steps = measurements()
    finished = probed["finished"]
    np.testing.assert_array_equal(finished.valid, [np.arange(1 + NUM_REQUESTS // STRETCH) >= PROBES] * len(WORLDS))
    np.testing.assert_array_equal(finished.action[:, PROBES:], steps["action"][:, DECISIONS])

    def parts(obs: Observation) -> Any:
        return obs.arrived, obs.experts, obs.action_mask, jnp.sum(obs.requests.running, -1)

    kept = jax.tree.map(lambda x: x[:, PROBES:], finished.decision)
    chex.assert_trees_all_equal(parts(kept), parts(jax.tree.map(lambda x: x[:, DECISIONS], steps["obs"])))
