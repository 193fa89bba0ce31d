"""A planner: tries every action in imagined futures, and leaves impact-greedy's only for one that earns more.

At each decision the world is imagined from the observation (``qos_jax.impact.imagined_world``) with drawn lengths, one
action is taken, and impact-greedy decides on the requests that arrive next, whose law is known. What then is in flight
is served without further arrivals. All actions are tried in the same futures, so that their luck cancels.

How fast requests arrive is not told but seen: the youngest request on the experts is as old as the last arrival is long
ago, unless that was dropped.

What futures earn differs far more by luck than by the action, and their end is too good to be true: nobody arrives then
to be slowed down. Three things make up for that, and without them the planner is worse than impact-greedy:

* Answers are judged as the impact estimate does, by the predicted score and a logistic in the place of the step at the
  limit: to be a little slower costs a little, and not seldom a whole score.
* What is in flight at the end of the horizon pays impact-greedy's price of a place for the tokens that it has left.
* Another action than impact-greedy's must be better by more than the standard error of the difference.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from qos_jax.impact.estimate import WIDTH_S
from qos_jax.impact.imagined_world import LENGTH_CV, sample_belief, sample_request, tokens_left
from qos_jax.routers.base import Router
from qos_jax.routers.impact_greedy import PRICE, impact_greedy
from qos_jax.sim import engine
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.types import ExpertProfile, Observation, RequestView, Workload
from qos_jax.sim.world import World, WorldSpec, advance, collect, dispatch, observe, slot_latency_per_token_s

HORIZON = 40  # decisions
FUTURES = 8
_GAP_MEMORY = 0.98  # weight of a gap against the next one


class Gaps(struct.PyTreeNode):
    """What the planner remembers of the gaps between arrivals, older ones with less weight."""

    sum_s: Array  # [] s
    weight: Array  # [] gaps
    sent: Array  # [] bool: the last request was not dropped, so the next gap will be seen


def rollout_planner(
    workload: Workload,
    *,
    name: str = "rollout",
    horizon: int = HORIZON,
    futures: int = FUTURES,
    length_cv: float = LENGTH_CV,
) -> Router:
    """Takes the legal action that earns most in imagined futures, if it clearly earns more than impact-greedy's.

    Args:
      workload: the law of requests. Its rate is used only until a gap between arrivals has been seen.
      name: of the router.
      horizon: decisions of impact-greedy that follow the action in each future.
      futures: how many are imagined, at least 2.
      length_cv: coefficient of variation of an output length given its prediction, above 0.
    """
    greedy = impact_greedy(length_cv=length_cv)

    def act(key: Array, obs: Observation, gaps: Gaps) -> tuple[Array, Gaps]:
        key_futures, key_default = jax.random.split(key)
        gaps = _with_gap(gaps, obs)
        law = _at_rate(workload, gaps)
        actions = jnp.arange(obs.action_mask.shape[0])

        def value(action: Array, key: Array) -> Array:
            return _value(obs, action, key, law, greedy, horizon, length_cv)

        in_all_futures = jax.vmap(value, in_axes=(None, 0))
        values = jax.vmap(in_all_futures, in_axes=(0, None))(actions, jax.random.split(key_futures, futures))
        default, _ = greedy.act(key_default, obs, ())
        gain = values - values[default]
        surely = gain.mean(-1) - gain.std(-1) / math.sqrt(futures - 1)
        surely = jnp.where(obs.action_mask, surely, -jnp.inf)
        best = jnp.argmax(surely)
        action = jnp.where(surely[best] > 0.0, best, default)
        return action, gaps.replace(sent=action < actions[-1])

    def init() -> Gaps:
        return Gaps(jnp.float32(0.0), jnp.float32(0.0), jnp.bool_(False))

    return Router(name=name, kind="heuristic", init=init, act=act)


def _value(
    obs: Observation, action: Array, key: Array, workload: Workload, router: Router, horizon: int, length_cv: float
) -> Array:
    """Returns what all requests of one imagined future earn [], from the action on, less what the last ones will cost.

    The router must not need a memory.
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
        qos, world = _earned(profile, world), collect(profile, world)[0]
        seen = observe(spec, profile, world, request)
        seen = seen.replace(action_mask=seen.action_mask.at[-1].set(obs.action_mask[-1]))
        action, _ = router.act(router_key, seen, router.init())
        world, _ = dispatch(spec, profile, world, request, action)
        return (world, arrivals), qos

    start = (world, workload.init(start_key))
    (world, _), qos = lax.scan(decide, start, jax.random.split(key, horizon))
    cost = _still_to_pay(observe(spec, profile, world, request).requests, length_cv)
    world = world.replace(experts=engine.drain(spec.engine, profile, world.experts))
    return jnp.sum(qos) + _earned(profile, world) - cost


def _earned(profile: ExpertProfile, world: World) -> Array:
    """Returns the QoS [] of the finished requests, softly judged."""
    slots = world.experts.slots
    margin_s = slots.payload.latency_limit_s - slot_latency_per_token_s(profile, slots)
    qos = slots.payload.predicted_score * jax.nn.sigmoid(margin_s / WIDTH_S)
    return jnp.sum(jnp.where(slots.finished, qos, 0.0))


def _still_to_pay(requests: RequestView, length_cv: float) -> Array:
    """Returns the price [] of the places of all requests, each for the share of its tokens that it has left."""
    left = tokens_left(requests, length_cv)
    share = left / (requests.generated_tokens + left)
    return PRICE * jnp.sum(jnp.where(requests.running | requests.waiting, share, 0.0))


def _with_gap(gaps: Gaps, obs: Observation) -> Gaps:
    there = obs.requests.running | obs.requests.waiting
    gap_s = jnp.min(jnp.where(there, obs.requests.age_s, jnp.inf))
    seen = gaps.sent & jnp.isfinite(gap_s)
    return gaps.replace(
        sum_s=jnp.where(seen, _GAP_MEMORY * gaps.sum_s + gap_s, gaps.sum_s),
        weight=jnp.where(seen, _GAP_MEMORY * gaps.weight + 1.0, gaps.weight),
    )


def _at_rate(workload: Workload, gaps: Gaps) -> Workload:
    seen = workload.with_rate(gaps.weight / jnp.maximum(gaps.sum_s, 1e-6))
    return jax.tree.map(lambda new, old: jnp.where(gaps.weight > 0, new, old), seen, workload)
