"""What each action was worth, measured by the simulator: the same world with and without the request on each expert.

A reward tells what a hundred decisions together have earned; which of them earned it, value learning must find out
under noise many times as large as what one decision is worth. A simulator can be asked directly. From one decision on,
twins of all experts run beside the real ones: where the real expert has the request its twin does not, and where it
does not its twin does. Real ones and twins are given the same later requests, those that the router sends there in the
real world, and when the horizon is reached both are drained. The difference in what they earn is the marginal value of
the placement.

* The noise of the later requests is in both and cancels. What remains is what this request changed.
* Holding the later decisions fixed is right to first order for a router that is near its optimum: what it would gain by
  reacting to one more request is of second order there (the envelope theorem). It makes the experts independent, so
  that N placements cost one extra copy of the fleet, not N + 1 fleets with a router each.
* The horizon must be long: if later requests that are held up do not count, the router learns to crowd experts.
* Answers are judged by a narrow logistic in the place of the step at the limit: a small slowdown seldom turns an answer
  over the limit, and then by its whole score; the logistic spreads that over all answers near it.
* A router that reacts would refuse one later request rather than let several be late. With the later decisions fixed
  that is not seen, so harm is overrated; ``Hyperparameters.most_harm`` can cut it.

Several sets of twins are under way at a time, each from a decision of its own. The true lengths and scores are used
here, in training only: the network that learns these values sees predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from qos_jax.agent.rewards import RewardWeights, earned
from qos_jax.sim import engine
from qos_jax.sim.engine import ExpertState
from qos_jax.sim.env import Environment, EnvParams, EnvState
from qos_jax.sim.types import ExpertProfile, Observation, Request
from qos_jax.sim.world import World, WorldSpec, collect, dispatch, remember

Policy = Callable[[Array, Observation], Array]  # key, observation -> action


class Twins(struct.PyTreeNode):
    """The sets of twins under way in one environment, T of them, and the decision that each set is from.

    Of one set alone the axis T is left out.
    """

    experts: ExpertState  # [T, N]
    decision: Any  # leaves [T, ...]: whatever the caller keeps of what the router saw
    action: Array  # [T] int32, what it did
    gain: Array  # [T, N] what twins have earned more than real experts
    whole: Array  # [T] bool: followed from its decision on; else the set means nothing


class Judge(NamedTuple):
    """By what answers are judged."""

    weights: RewardWeights
    width_s: Array | float  # s/token, of the logistic at the limit


class Followed(struct.PyTreeNode):
    """What happened in the real world, summed over the requests of a stretch."""

    qos: Array  # []
    dropped: Array  # []


def no_twins(state: EnvState, decision: Any, sets: int) -> Twins:
    """Returns sets of twins that mean nothing yet, for decisions like ``decision``."""
    num_experts = state.world.experts.clock_s.shape[-1]
    return Twins(
        experts=_stacked(state.world.experts, sets),
        decision=_stacked(decision, sets),
        action=jnp.zeros(sets, jnp.int32),
        gain=jnp.zeros((sets, num_experts)),
        whole=jnp.zeros(sets, bool),
    )


def measured(env: Environment, params: EnvParams, judge: Judge, state: EnvState, ended: Twins) -> Array:
    """Returns what the actions [N + 1] were worth at the decision of one set of twins, a drop last."""
    pair = jax.tree.map(lambda real, twin: jnp.stack([real, twin]), state.world.experts, ended.experts)
    drained = jax.vmap(lambda experts: engine.drain(env.spec.engine, params.experts, experts))(pair)
    real, twin = jax.vmap(lambda experts: earned(params.experts, experts, *judge))(drained)
    gain = ended.gain + twin - real
    place = jnp.where(jnp.arange(gain.shape[0]) == ended.action, -gain, gain)
    return jnp.append(place, -jnp.asarray(judge.weights.drop, place.dtype))


def begun(
    env: Environment,
    params: EnvParams,
    judge: Judge,
    state: EnvState,
    twins: Twins,
    which: Array,
    decision: Any,
    action: Array,
) -> Twins:
    """Returns the twins with set ``which`` from the decision that is due in ``state``, which will be ``action``."""
    num_experts = env.spec.num_experts

    def twin(expert: Array) -> tuple[ExpertState, Array]:
        to = jnp.where(expert == action, num_experts, expert)
        experts, dropped = _send(env.spec, params.experts, state.request, state.world.experts, to)
        return jax.tree.map(lambda x: x[expert], experts), dropped & (to == expert)

    experts, refused = jax.vmap(twin)(jnp.arange(num_experts))
    fresh = Twins(experts, decision, action, -judge.weights.drop * refused, jnp.bool_(True))
    is_it = jnp.arange(twins.whole.shape[0]) == which
    # A select, as scatters are slow where environments are mapped.
    return jax.tree.map(lambda sets, one: jnp.where(is_it.reshape(-1, *[1] * jnp.ndim(one)), one, sets), twins, fresh)


def follow(
    env: Environment,
    params: EnvParams,
    policy: Policy,
    judge: Judge,
    requests: int,
    key: Array,
    state: EnvState,
    twins: Twins,
    newest: Array,
) -> tuple[EnvState, Twins, Followed]:
    """Lets the router decide on some requests, in the real world and for all twins alike.

    Args:
      env: the environment; its time limit plays no part here.
      params: its parameters.
      policy: the router, but for the first request, whose decision set ``newest`` is from.
      judge: by what answers are judged.
      requests: how many.
      key: of the router and the workload.
      state: before the first decision.
      twins: the sets under way.
      newest: [] int32.

    Returns:
      The state after these requests, the twins then, and what happened.
    """
    spec, profile = env.spec, params.experts
    sets = twins.whole.shape[0]

    def step(carry: tuple[Any, ...], x: tuple[Array, Array]) -> tuple[tuple[Any, ...], tuple[Array, Array, Array]]:
        (experts, memory, request, action, workload), (is_first, key) = carry, x
        key_next, key_policy = jax.random.split(key)
        # The newest twins have, or lack, the first request already.
        had = is_first & (jnp.arange(1 + sets) == 1 + newest)
        actions = jnp.where(had, spec.num_experts, action)
        experts, dropped = jax.vmap(lambda e, a: _send(spec, profile, request, e, a))(experts, actions)
        refused = (dropped & (actions < spec.num_experts)).astype(jnp.float32)
        gap_s, request, workload = params.workload.next(key_next, workload)
        experts = jax.vmap(lambda e: engine.advance(spec.engine, profile, e, gap_s))(experts)
        income = jax.vmap(lambda e: earned(profile, e, *judge))(experts)
        # A queue that is full for one of them may not be for the other.
        income -= judge.weights.drop * refused[:, None] * (jnp.arange(spec.num_experts) == action)
        worlds, answers = jax.vmap(lambda e: collect(profile, World(e, None)))(experts)
        real = remember(spec, World(_at(worlds.experts, 0), memory), gap_s)
        later = policy(key_policy, env.observe(EnvState(state.time, real, request, workload), params))
        carry = worlds.experts, real.memory, request, later, workload
        return carry, (income[1:] - income[0], answers.qos[0], dropped[0])

    experts = jax.tree.map(lambda real, twin: jnp.concatenate([real[None], twin]), state.world.experts, twins.experts)
    carry = experts, state.world.memory, state.request, twins.action[newest], state.workload
    steps = jnp.arange(requests) == 0, jax.random.split(key, requests)
    (experts, memory, request, _, workload), (gain, qos, dropped) = lax.scan(step, carry, steps)
    twins = twins.replace(experts=jax.tree.map(lambda x: x[1:], experts), gain=twins.gain + jnp.sum(gain, 0))
    state = EnvState(state.time + requests, World(_at(experts, 0), memory), request, workload)
    return state, twins, Followed(jnp.sum(qos), jnp.sum(dropped))


def _send(
    spec: WorldSpec, profile: ExpertProfile, request: Request, experts: ExpertState, action: Array
) -> tuple[ExpertState, Array]:
    world, dropped = dispatch(spec, profile, World(experts, None), request, action)
    return world.experts, dropped


def _stacked(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), tree)


def _at(experts: ExpertState, which: int) -> ExpertState:
    return jax.tree.map(lambda x: x[which], experts)
