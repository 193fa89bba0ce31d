"""What each action was worth, measured by the simulator: the same world with and without the request on each expert.

A reward tells what a hundred decisions together have earned; which of them earned it, value learning must find out
under noise many times as large as what one decision is worth. A simulator can be asked directly. From one decision on,
twins of every expert run side by side for ``horizon`` arrivals: one has the request and one does not. Both are given
the same later requests, those that the router sends there in the world that goes on, and at last both are drained. The
difference in what they earn is the marginal value of the placement.

* The noise of the later requests is in both twins and cancels. What remains is what this request changed.
* Holding the later decisions fixed is right to first order for a router that is near its optimum: what it would gain by
  reacting to one more request is of second order there (the envelope theorem). It makes the experts independent, so
  that N placements cost one extra copy of the fleet, not N + 1 fleets with a router each.
* Answers are judged by a narrow logistic in the place of the step at the limit: a small slowdown seldom turns an answer
  over the limit, and then by its whole score; the logistic spreads that over all answers near it.

The true lengths and scores are used here, in training only: the network that learns these values sees predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from qos_jax.agent.rewards import RewardWeights, earned
from qos_jax.sim import engine
from qos_jax.sim.engine import ExpertState
from qos_jax.sim.env import Environment, EnvParams, EnvState
from qos_jax.sim.types import Observation, Request
from qos_jax.sim.world import Snapshots, World, collect, dispatch, remember

Policy = Callable[[Array, Observation], Array]  # key, observation -> action

_REAL, _OTHER = 0, 1


class Measured(struct.PyTreeNode):
    """One decision, what each of its alternatives was worth, and what happened until the next one was measured."""

    obs: Observation
    value: Array  # [N + 1] QoS; the last one is that of a drop
    qos: Array  # [] of the answers in the world that went on
    dropped: Array  # [] requests


class _Twins(struct.PyTreeNode):
    experts: ExpertState  # [2, N]: as they are, and as they would be with the other choice
    snapshots: Snapshots | None
    request: Request  # waits for its decision, which is
    action: Array  # []
    workload: Any


def branch(
    env: Environment,
    params: EnvParams,
    policy: Policy,
    weights: RewardWeights,
    width_s: Array | float,
    horizon: int,
    key: Array,
    state: EnvState,
) -> tuple[EnvState, Measured]:
    """Measures the alternatives of one decision while following the policy for ``horizon`` requests.

    Args:
      env: the environment; its time limit plays no part here.
      params: its parameters.
      policy: decides on this and all later requests.
      weights: what costs how much, see ``RewardWeights``.
      width_s: of the logistic by which answers are judged [s/token].
      horizon: requests, the measured one included.
      key: of the policy and the workload.
      state: before the decision.

    Returns:
      The state after ``horizon`` requests, and what was measured.
    """
    spec, profile = env.spec, params.experts
    num_experts = spec.num_experts

    def step(twins: _Twins, x: tuple[Array, Array]) -> tuple[_Twins, tuple[Array, Array, Array]]:
        """Sends the request to where it goes in both, and runs them to the next arrival."""
        is_first, key = x
        key_next, key_policy = jax.random.split(key)
        # The other twin already has (or lacks) the first request.
        actions = jnp.stack([twins.action, jnp.where(is_first, num_experts, twins.action)])
        experts, dropped = jax.vmap(lambda e, a: _send(spec, profile, e, twins.request, a))(twins.experts, actions)
        gap_s, request, workload = params.workload.next(key_next, twins.workload)
        experts = jax.vmap(lambda e: engine.advance(spec.engine, profile, e, gap_s))(experts)
        experts, gain, qos = _collect_both(profile, experts, weights, width_s)
        world = remember(spec, World(_pick(experts, _REAL), twins.snapshots), gap_s)
        action = policy(key_policy, env.observe(EnvState(state.time, world, request, workload), params))
        return _Twins(experts, world.snapshots, request, action, workload), (gain, qos, dropped[_REAL])

    key_first, key_later = jax.random.split(key)
    obs = env.observe(state, params)
    action = policy(key_first, obs)
    other = _with_other_choice(env, params, state, action)
    experts = jax.tree.map(lambda *pair: jnp.stack(pair), state.world.experts, other)
    twins = _Twins(experts, state.world.snapshots, state.request, action, state.workload)
    steps = jnp.arange(horizon) == 0, jax.random.split(key_later, horizon)
    twins, (gain, qos, dropped) = lax.scan(step, twins, steps)

    real = World(_pick(twins.experts, _REAL), twins.snapshots)
    drained = jax.vmap(lambda e: engine.drain(spec.engine, profile, e))(twins.experts)
    gain = jnp.sum(gain, 0) + _collect_both(profile, drained, weights, width_s)[1]
    place = jnp.where(jnp.arange(num_experts) == action, -gain, gain)
    value = jnp.append(place, -jnp.asarray(weights.drop, place.dtype))
    state = EnvState(state.time + horizon, real, twins.request, twins.workload)
    return state, Measured(obs, value, jnp.sum(qos), jnp.sum(dropped))


def _with_other_choice(env: Environment, params: EnvParams, state: EnvState, action: Array) -> ExpertState:
    """Returns the experts [N] with the waiting request on each of them but the one that gets it."""

    def lane(expert: Array) -> ExpertState:
        to = jnp.where(expert == action, env.spec.num_experts, expert)
        experts, _ = _send(env.spec, params.experts, state.world.experts, state.request, to)
        return jax.tree.map(lambda x: x[expert], experts)

    return jax.vmap(lane)(jnp.arange(env.spec.num_experts))


def _send(spec: Any, profile: Any, experts: ExpertState, request: Request, action: Array) -> tuple[ExpertState, Array]:
    world, dropped = dispatch(spec, profile, World(experts, None), request, action)
    return world.experts, dropped


def _collect_both(
    profile: Any, experts: ExpertState, weights: RewardWeights, width_s: Array | float
) -> tuple[ExpertState, Array, Array]:
    """Returns both twins with answers collected, what the other one earned more [N], and the QoS of the real one []."""
    income = jax.vmap(lambda e: earned(profile, e, weights, width_s))(experts)
    worlds, answers = jax.vmap(lambda e: collect(profile, World(e, None)))(experts)
    return worlds.experts, income[_OTHER] - income[_REAL], answers.qos[_REAL]


def _pick(experts: ExpertState, twin: int) -> ExpertState:
    return jax.tree.map(lambda x: x[twin], experts)
