"""Probes: the marginal value of every action, measured on counterfactual copies of the experts.

Reward-based learning must separate the effect of one decision from that of a hundred others. A simulator can measure it
directly. A probe starts at a decision and keeps a copy of every expert. The expert that got the request has a copy
without it; every other expert has a copy with it. Experts and copies receive the same later requests, namely those that
the router sends to that expert in the actual world. At the horizon both are drained. The difference of their returns is
the marginal value of placing the request there.

In the queueing literature the additional request is a *virtual (phantom) customer* (zbMATH 0787.60057). In
reinforcement learning the values are *difference rewards*, or a *counterfactual baseline* with the other actions fixed
(COMA, arXiv 1705.08926).

* The noise of later requests is common to an expert and its copy and cancels.
* Later decisions are held fixed. This makes the experts independent: N placements cost one copy of the fleet instead of
  N + 1 fleets with a router each. For a router near its optimum the error is of second order (envelope theorem).
* The horizon must be long. If delays of later requests do not count, the router learns to crowd experts.
* Soft QoS replaces the step at the latency limit by a narrow logistic. A small slowdown seldom makes an answer late,
  and then costs its whole score; the logistic spreads this cost over all answers near the limit.
* In worlds with sessions, copies see the turns that the actual world sees, but keep the prefixes that they served.
* An expert that fails does so in every copy, and what is lost there earns nothing.
* A reactive router would drop one later request rather than let several be late. Fixed decisions exclude this, so the
  cost of a placement to later requests is overestimated. ``Hyperparameters.max_externality`` clips it.

Several probes run at a time, each from its own decision. Probes use true lengths and scores, and run in training only.
The network that learns their values observes predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from qos_jax.agent.rewards import RewardWeights, expert_returns
from qos_jax.sim import engine
from qos_jax.sim.engine import ExpertState
from qos_jax.sim.env import Environment, EnvParams, EnvState
from qos_jax.sim.failures import next_interval, run
from qos_jax.sim.types import ExpertProfile, Observation
from qos_jax.sim.world import World, WorldSpec, collect, dispatch, record_arrival

Policy = Callable[[Array, Observation], Array]  # key, observation -> action [] int32


class Probe(struct.PyTreeNode):
    """The probes of one environment, T of them; a single probe lacks the axis T."""

    experts: ExpertState  # [T, N] the copies
    decision: Any  # leaves [T, ...], what the caller keeps of the observation
    action: Array  # [T] int32, the action taken
    gain: Array  # [T, N] return of the copies minus that of the experts so far, in reward units
    valid: Array  # [T] bool; False until the probe has been started, or after an interruption


class SoftQos(NamedTuple):
    """QoS with a logistic in place of the step at the latency limit."""

    weights: RewardWeights
    width_s: Array | float  # s/token, of the logistic


class ChunkSums(struct.PyTreeNode):
    """Sums over the requests of a chunk in the actual world."""

    qos: Array  # []
    dropped: Array  # []


def empty_probes(state: EnvState, decision: Any, count: int) -> Probe:
    """Returns ``count`` invalid probes.

    Args:
      state: of one environment; gives the shapes of the copies.
      decision: gives the shapes of what is kept of a decision.
      count: T.
    """
    num_experts = state.world.experts.clock_s.shape[-1]
    return Probe(
        experts=_stacked(state.world.experts, count),
        decision=_stacked(decision, count),
        action=jnp.zeros(count, jnp.int32),
        gain=jnp.zeros((count, num_experts)),
        valid=jnp.zeros(count, bool),
    )


def marginal_values(env: Environment, params: EnvParams, soft_qos: SoftQos, state: EnvState, probe: Probe) -> Array:
    """Finishes a probe.

    Args:
      env: the environment.
      params: its parameters.
      soft_qos: the return of an answer.
      state: at the horizon of the probe.
      probe: a single one.

    Returns:
      The value of each action [N + 1] at the decision of the probe, in reward units; the drop is last.
    """
    pair = jax.tree.map(lambda actual, copy: jnp.stack([actual, copy]), state.world.experts, probe.experts)
    drained = jax.vmap(lambda experts: engine.drain(env.spec.engine, params.experts, experts))(pair)
    actual, copy = jax.vmap(lambda experts: expert_returns(params.experts, experts, *soft_qos))(drained)
    gain = probe.gain + copy - actual
    place = jnp.where(jnp.arange(gain.shape[0]) == probe.action, -gain, gain)
    return jnp.append(place, -jnp.asarray(soft_qos.weights.drop, place.dtype))


def start_probe(
    env: Environment,
    params: EnvParams,
    soft_qos: SoftQos,
    state: EnvState,
    probes: Probe,
    which: Array,
    decision: Any,
    action: Array,
) -> Probe:
    """Starts one of the probes at the decision that is due.

    Args:
      env: the environment.
      params: its parameters.
      soft_qos: the return of an answer.
      state: before the decision.
      probes: T of them.
      which: [] int32, the probe to start.
      decision: what to keep of the observation.
      action: [] int32, the router's decision.

    Returns:
      The T probes.
    """
    num_experts = env.spec.num_experts

    def copy(expert: Array) -> tuple[ExpertState, Array]:
        to = jnp.where(expert == action, num_experts, expert)
        world, dropped = dispatch(env.spec, params.experts, state.world.replace(telemetry=None), state.request, to)
        experts = world.experts
        return jax.tree.map(lambda x: x[expert], experts), dropped & (to == expert)

    experts, dropped = jax.vmap(copy)(jnp.arange(num_experts))
    fresh = Probe(experts, decision, action, -soft_qos.weights.drop * dropped.astype(jnp.float32), jnp.bool_(True))
    replaced = jnp.arange(probes.valid.shape[0]) == which
    # A select, as scatters are slow where environments are mapped.
    return jax.tree.map(lambda old, new: jnp.where(replaced.reshape(-1, *[1] * jnp.ndim(new)), new, old), probes, fresh)


def simulate(
    env: Environment,
    params: EnvParams,
    policy: Policy,
    soft_qos: SoftQos,
    requests: int,
    key: Array,
    state: EnvState,
    probes: Probe,
    newest: Array,
) -> tuple[EnvState, Probe, ChunkSums]:
    """Routes some requests in the actual world and in all probes by the same decisions.

    Args:
      env: the environment; its time limit is not used.
      params: its parameters.
      policy: the router; the first request gets the action that probe ``newest`` was started with.
      soft_qos: the return of an answer.
      requests: number of requests.
      key: of the router and the workload.
      state: before the first decision.
      probes: T of them.
      newest: [] int32, the probe that was started at the first decision.

    Returns:
      The state and the probes after these requests, and sums over the requests.
    """
    spec, profile = env.spec, params.experts
    count = probes.valid.shape[0]

    def step(carry: tuple[Any, ...], x: tuple[Array, Array]) -> tuple[tuple[Any, ...], tuple[Array, Array, Array]]:
        (experts, actual, request, action, workload), (is_first, key) = carry, x
        key_next, key_policy = jax.random.split(key)
        # The copies of the newest probe have, or lack, the first request since its start.
        settled = is_first & (jnp.arange(1 + count) == 1 + newest)
        actions = jnp.where(settled, spec.num_experts, action)

        def send(experts: ExpertState, action: Array) -> tuple[World, Array]:
            return dispatch(spec, profile, actual.replace(experts=experts, telemetry=None), request, action)

        worlds, dropped = jax.vmap(send)(experts, actions)
        actual = actual.replace(said=_at(worlds.said, 0))
        refused = (dropped & (actions < spec.num_experts)).astype(jnp.float32)
        gap_s, request, workload = params.workload.next(key_next, workload)
        experts, actual = _worked(spec, profile, worlds.experts, actual, gap_s)
        returns = jax.vmap(lambda e: expert_returns(profile, e, *soft_qos))(experts)
        # A full queue may refuse a request in one copy and not in another.
        sent_to = (jnp.arange(spec.num_experts) == action).astype(refused.dtype)
        returns -= soft_qos.weights.drop * refused[:, None] * sent_to[None]
        worlds, completions = jax.vmap(lambda e: collect(profile, World(e, None)))(experts)
        actual = record_arrival(spec, actual.replace(experts=_at(worlds.experts, 0)), gap_s)
        next_action = policy(key_policy, env.observe(EnvState(state.time, actual, request, workload), params))
        carry = worlds.experts, actual.replace(experts=None), request, next_action, workload
        return carry, (returns[1:] - returns[:1], completions.qos[0], dropped[0])

    experts = jax.tree.map(
        lambda actual, copy: jnp.concatenate([actual[None], copy]), state.world.experts, probes.experts
    )
    actual = state.world.replace(experts=None)
    carry = experts, actual, state.request, probes.action[newest], state.workload
    steps = jnp.arange(requests) == 0, jax.random.split(key, requests)
    (experts, actual, request, _, workload), (gain, qos, dropped) = lax.scan(step, carry, steps)
    probes = probes.replace(experts=jax.tree.map(lambda x: x[1:], experts), gain=probes.gain + jnp.sum(gain, 0))
    state = EnvState(state.time + requests, actual.replace(experts=_at(experts, 0)), request, workload)
    return state, probes, ChunkSums(jnp.sum(qos), jnp.sum(dropped))


def _worked(
    spec: WorldSpec, profile: ExpertProfile, experts: ExpertState, actual: World, gap_s: Array
) -> tuple[ExpertState, World]:
    """Returns all copies of the experts at the next arrival, and the actual world; an expert fails in all of them."""
    if actual.failures is None:
        return jax.vmap(lambda copy: engine.advance(spec.engine, profile, copy, gap_s))(experts), actual
    interval, failures = next_interval(actual.failures, gap_s)
    experts, _ = jax.vmap(lambda copy: run(spec.engine, profile, copy, interval))(experts)
    return experts, actual.replace(failures=failures)


def _stacked(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), tree)


def _at(tree: Any, which: int) -> Any:
    return jax.tree.map(lambda x: x[which], tree)
