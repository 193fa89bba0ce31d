"""A planner: it simulates every action in sampled futures and deviates from impact-greedy only for a clear gain.

At each decision the planner samples worlds from the observation (``qos_jax.impact.imagined_world``) with random output
lengths. In each world it takes one action and lets impact-greedy route the requests that arrive next, whose law is
known. The requests then in flight are served without further arrivals. All actions are tried in the same futures, so
that sampling noise cancels in their differences.

The arrival rate is not given but estimated: the age of the youngest request on the experts is the time since the last
arrival, unless that request was dropped.

The return of a future depends more on chance than on the action, and its end is too optimistic: no arrivals slow down
the last requests. Without the following three corrections the planner is worse than impact-greedy:

* Answers are scored by a soft QoS, as in the impact estimate: the predicted score times a logistic in place of the step
  at the limit. A small slowdown then costs a little instead of sometimes a whole score.
* Requests in flight at the end of the horizon pay impact-greedy's price of a placement for their remaining tokens.
* The gain of an action over impact-greedy's must exceed the standard error of the difference.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from qos_jax.impact.estimate import WIDTH_S
from qos_jax.impact.imagined_world import LENGTH_CV, expected_remaining_tokens, sample_belief, sample_request
from qos_jax.routers.base import Router, drawn_best
from qos_jax.routers.impact_greedy import PRICE, impact_greedy
from qos_jax.sim import engine
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.types import ExpertProfile, Observation, RequestView, Workload
from qos_jax.sim.world import World, WorldSpec, advance, collect, dispatch, observe, slot_margin_s

HORIZON = 40  # decisions
FUTURES = 8
_GAP_DECAY = 0.98  # weight of a gap relative to the next gap


class Gaps(struct.PyTreeNode):
    """Exponentially weighted sums over the observed gaps between arrivals."""

    sum_s: Array  # [] s
    weight: Array  # [] gaps
    sent: Array  # [] bool: the last request was not dropped, so the next gap can be observed


def rollout_planner(
    workload: Workload,
    *,
    name: str = "rollout",
    horizon: int = HORIZON,
    futures: int = FUTURES,
    length_cv: float = LENGTH_CV,
) -> Router:
    """Takes the legal action with the highest return in sampled futures, if its gain over impact-greedy is clear.

    In a world with sessions, failures or shared cards its futures have none: each prompt is what the user adds, nobody
    fails, and every LLM is loaded.

    Args:
      workload: the law of requests. Its rate is used only until a gap between arrivals has been observed.
      name: of the router.
      horizon: number of decisions of impact-greedy after the action in each future.
      futures: number of sampled futures, at least 2.
      length_cv: coefficient of variation of an output length given its prediction, above 0.
    """
    greedy = impact_greedy(length_cv=length_cv)

    def act(key: Array, obs: Observation, gaps: Gaps) -> tuple[Array, Gaps]:
        key_futures, key_default, key_ties = jax.random.split(key, 3)
        gaps = _with_gap(gaps, obs)
        law = _at_rate(workload, gaps)
        actions = jnp.arange(obs.action_mask.shape[0])

        def value(action: Array, key: Array) -> Array:
            return _value(obs, action, key, law, greedy, horizon, length_cv)

        in_all_futures = jax.vmap(value, in_axes=(None, 0))
        values = jax.vmap(in_all_futures, in_axes=(0, None))(actions, jax.random.split(key_futures, futures))
        default, _ = greedy.act(key_default, obs, ())
        gain = values - values[default][None]
        clear_gain = gain.mean(-1) - gain.std(-1) / math.sqrt(futures - 1)
        best = drawn_best(key_ties, clear_gain, obs.action_mask)
        action = jnp.where(obs.action_mask[best] & (clear_gain[best] > 0.0), best, default)
        return action, gaps.replace(sent=action < actions[-1])

    def init() -> Gaps:
        return Gaps(jnp.float32(0.0), jnp.float32(0.0), jnp.bool_(False))

    return Router(name=name, kind="heuristic", init=init, act=act)


def _value(
    obs: Observation, action: Array, key: Array, workload: Workload, router: Router, horizon: int, length_cv: float
) -> Array:
    """Returns the soft QoS [] of all requests in one sampled future from the action on, less the cost at its end.

    ``router`` must have no memory.
    """
    profile = obs.experts.profile
    num_experts, slots = obs.requests.running.shape
    spec = WorldSpec(num_experts, EngineSpec(slots))
    world_key, request_key, start_key, key = jax.random.split(key, 4)
    request = sample_request(obs, length_cv, request_key)
    world, _ = dispatch(spec, profile, sample_belief(obs, length_cv, world_key), request, action)

    def decide(carry: tuple[World, Array], key: Array) -> tuple[tuple[World, Array], Array]:
        world, arrivals = carry
        next_key, router_key = jax.random.split(key)
        gap_s, request, arrivals = workload.next(next_key, arrivals)
        world = advance(spec, profile, world, gap_s)
        qos, world = _soft_qos(profile, world), collect(profile, world)[0]
        next_obs = observe(spec, profile, world, request)
        next_obs = next_obs.replace(action_mask=next_obs.action_mask.at[-1].set(obs.action_mask[-1]))
        action, _ = router.act(router_key, next_obs, router.init())
        world, _ = dispatch(spec, profile, world, request, action)
        return (world, arrivals), qos

    start = (world, workload.init(start_key))
    (world, _), qos = lax.scan(decide, start, jax.random.split(key, horizon))
    cost = _remaining_cost(observe(spec, profile, world, request).requests, length_cv)
    world = world.replace(experts=engine.drain(spec.engine, profile, world.experts))
    return jnp.sum(qos) + _soft_qos(profile, world) - cost


def _soft_qos(profile: ExpertProfile, world: World) -> Array:
    """Returns the soft QoS [] of the finished requests."""
    slots = world.experts.slots
    qos = slots.payload.predicted_score * jax.nn.sigmoid(slot_margin_s(profile, slots) / WIDTH_S)
    return jnp.sum(jnp.where(slots.finished, qos, 0.0))


def _remaining_cost(requests: RequestView, length_cv: float) -> Array:
    """Returns the price [] of the placements of all requests, each times the remaining share of its tokens."""
    remaining = expected_remaining_tokens(requests, length_cv)
    share = remaining / (requests.generated_tokens.astype(remaining.dtype) + remaining)
    return PRICE * jnp.sum(jnp.where(requests.running | requests.waiting, share, 0.0))


def _with_gap(gaps: Gaps, obs: Observation) -> Gaps:
    """Returns the sums with the last gap, if it can be observed."""
    present = obs.requests.running | obs.requests.waiting
    gap_s = jnp.min(jnp.where(present, obs.requests.age_s, jnp.inf))
    observed = gaps.sent & jnp.isfinite(gap_s)
    return gaps.replace(
        sum_s=jnp.where(observed, _GAP_DECAY * gaps.sum_s + gap_s, gaps.sum_s),
        weight=jnp.where(observed, _GAP_DECAY * gaps.weight + 1.0, gaps.weight),
    )


def _at_rate(workload: Workload, gaps: Gaps) -> Workload:
    """Returns the workload at the observed arrival rate, or unchanged before the first gap."""
    estimated = workload.with_rate(gaps.weight / jnp.maximum(gaps.sum_s, 1e-6))
    return jax.tree.map(lambda new, old: jnp.where(gaps.weight > 0, new, old), estimated, workload)
