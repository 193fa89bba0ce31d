"""What placing the arrived request on each expert would do: to itself, and to the requests that are already there.

The analytic form follows the cost model of the simulator with predicted lengths in the place of true ones, in O(slots):

* A request has left what is predicted, more the longer it has run: predictions are weak, and one that has outrun its
  prediction is long. Places that fall free are taken to be filled again, as the load will hardly end with this request.
* The time of a request is a delay that it meets once (waiting for a place, prefill) and a time for each of its tokens.
  It keeps its limit if the time per token does, judged softly, and if it is long enough to spread the delay, which for
  a lognormal length around the prediction is close to a logistic in the logarithm.

The rollout form runs the simulator itself on two copies of each expert, with the request and without it, until both are
idle. All have the lengths that are expected of them, and nobody arrives any more.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from qos_jax.impact.imagined_world import LENGTH_CV, sample_belief, sample_request, tokens_left
from qos_jax.sim import engine
from qos_jax.sim.cost import blocks_of
from qos_jax.sim.engine import EngineSpec, Slots
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, TOKEN_BUDGET, ExpertProfile, Observation
from qos_jax.sim.world import payload_of, slot_latency_per_token_s

WIDTH_S = 2.0e-3  # s/token. This width and

Form = Literal["analytic", "rollout"]


class Impact(struct.PyTreeNode):
    """What is predicted for each expert if it is given the arrived request."""

    latency_per_token_s: Array  # [N] s/token, of the request itself; infinite if the rollout cannot place it
    in_time: Array  # [N] probability that it meets its limit
    qos: Array  # [N] its expected QoS
    qos_change: Array  # [N] change of the expected QoS of the requests there: seldom a gain, in the analytic form never
    violations_change: Array  # [N] change of their expected violations

    @property
    def net(self) -> Array:
        """[N] what the placement adds to the expected QoS of all requests."""
        return self.qos + self.qos_change


class _Load(struct.PyTreeNode):
    """What is on the experts, and what it holds up."""

    there: Array  # [N, S] bool
    left: Array  # [N, S] tokens
    length: Array  # [N, S] tokens emitted and left
    cost_s: Array  # [N, S] s that each request adds to an iteration
    wait: Array  # [N] iterations until a place and memory are free for one more
    share: Array  # [N] of the requests there that are in the batch at a time
    stall_before_s: Array  # [N] s of prefill that lie ahead
    stall_after_s: Array  # [N] s, with the arrived request's


def impact(
    obs: Observation, width_s: Array | float = WIDTH_S, length_cv: float = LENGTH_CV, form: Form = "analytic"
) -> Impact:
    """Returns the predicted impact of each placement.

    Args:
      obs: what the router sees.
      width_s: width of the logistic that turns a margin to the limit [s/token] into a probability.
      length_cv: coefficient of variation of an output length given its prediction; above 0 in the analytic form.
      form: "analytic" for the closed form, "rollout" for two runs of the simulator; see the module.
    """
    return (_by_rollout if form == "rollout" else _by_formula)(obs, width_s, length_cv)


def in_flight_qos(obs: Observation, width_s: Array | float = WIDTH_S, length_cv: float = LENGTH_CV) -> Array:
    """Returns the expected QoS [] of all requests on the experts, if nobody arrives any more; see ``impact``."""
    margin_s, _ = _effect_on_others(obs, _load(obs, length_cv))
    there = obs.requests.running | obs.requests.waiting
    return jnp.sum(jnp.where(there, jax.nn.sigmoid(margin_s / width_s) * obs.requests.predicted_score, 0.0))


def _by_formula(obs: Observation, width_s: Array | float, length_cv: float) -> Impact:
    load = _load(obs, length_cv)
    latency_per_token_s, delay_per_token_s = _own_latency(obs, load)
    margin_s = obs.arrived.latency_limit_s - (latency_per_token_s - delay_per_token_s)
    spread = jnp.log(jnp.maximum(margin_s, 1e-6) / jnp.maximum(delay_per_token_s, 1e-9))
    steepness = 1.81 / math.sqrt(math.log1p(length_cv**2))  # a logistic's with the spread of the lognormal
    in_time = jax.nn.sigmoid(margin_s / width_s) * jax.nn.sigmoid(steepness * spread)

    margin_s, slower_s = _effect_on_others(obs, load)
    lost = jax.nn.sigmoid(margin_s / width_s) - jax.nn.sigmoid((margin_s - slower_s) / width_s)
    return Impact(
        latency_per_token_s=latency_per_token_s,
        in_time=in_time,
        qos=obs.arrived.predicted_score * in_time,
        qos_change=-jnp.sum(lost * obs.requests.predicted_score, -1),
        violations_change=jnp.sum(lost, -1),
    )


def _by_rollout(obs: Observation, width_s: Array | float, length_cv: float) -> Impact:
    slots, scores = _drained(obs, length_cv), obs.requests.predicted_score
    taken = slots.output_tokens > 0
    latency_per_token_s = slot_latency_per_token_s(obs.experts.profile, slots)
    margin_s = slots.payload.latency_limit_s - latency_per_token_s
    without, beside = jnp.where(taken, jax.nn.sigmoid(margin_s / width_s), 0.0)

    own = taken[1] & ~taken[0]
    in_time = jnp.sum(jnp.where(own, beside, 0.0), -1)
    own_latency_s = jnp.sum(jnp.where(own, latency_per_token_s[1], 0.0), -1)
    change = jnp.where(own, 0.0, beside - without)[:, :-1]
    return Impact(
        latency_per_token_s=jnp.where(jnp.any(own, -1), own_latency_s, jnp.inf),
        in_time=in_time,
        qos=obs.arrived.predicted_score * in_time,
        qos_change=jnp.sum(change * scores, -1),
        violations_change=-jnp.sum(change, -1),
    )


def _drained(obs: Observation, length_cv: float) -> Slots:
    """Returns the requests [2, N, S + 1] when all is done: without the arrived one, and with it on every expert."""
    profile, request = obs.experts.profile, sample_request(obs, length_cv)
    without = sample_belief(obs, length_cv).experts
    without = without.replace(slots=jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1))), without.slots))
    fits = blocks_of(request.prompt_tokens + request.output_tokens, BLOCK_SIZE_TOKENS) <= profile.kv_blocks
    beside = engine.push(without, fits, request.prompt_tokens, request.output_tokens, payload_of(request))
    pair = jax.tree.map(lambda *each: jnp.stack(each), without, beside)
    spec = EngineSpec(obs.requests.running.shape[-1] + 1)
    return jax.vmap(partial(engine.drain, spec, profile))(pair).slots


def _load(obs: Observation, length_cv: float) -> _Load:
    seen, experts, profile = obs.requests, obs.experts, obs.experts.profile
    there = seen.running | seen.waiting
    emitted = seen.generated_tokens.astype(jnp.float32)
    left = jnp.where(there, tokens_left(seen, length_cv), 0.0)
    known = seen.prompt_tokens + seen.generated_tokens
    missing = known - seen.computed_tokens
    to_prefill = jnp.sum(jnp.where(there & ~((emitted > 0) & (missing == 1)), missing, 0), -1)
    cost_s = _wide(profile.per_sequence_s) + _wide(profile.per_kv_token_s) * (known - 1)

    requests = (experts.running + experts.waiting).astype(jnp.float32)
    crowd = jnp.maximum(requests, 1.0)
    # A full batch of M requests with L tokens left in all frees a place about every L / (M requests) iterations.
    excess = jnp.maximum(requests + 1.0 - profile.max_running, 0.0)
    wait_for_place = jnp.sum(left, -1) * excess / (crowd * profile.max_running)
    blocks = jnp.where(there, blocks_of(known, BLOCK_SIZE_TOKENS), 0)
    held, own_blocks = jnp.sum(blocks, -1), blocks_of(obs.arrived.prompt_tokens, BLOCK_SIZE_TOKENS)
    excess = jnp.maximum(held + own_blocks - profile.kv_blocks, 0)
    wait_for_memory = jnp.sum(blocks * left, -1) * excess / (jnp.maximum(held, 1.0) * profile.kv_blocks)
    places = jnp.minimum((profile.max_running - 1.0) / crowd, (profile.kv_blocks - own_blocks) / jnp.maximum(held, 1.0))
    return _Load(
        there=there,
        left=left,
        length=emitted + left,
        cost_s=jnp.where(there, cost_s, 0.0),
        wait=jnp.maximum(wait_for_place, wait_for_memory),
        share=jnp.clip(places, 0.0, 1.0),
        stall_before_s=_prefill_s(profile, to_prefill),
        stall_after_s=_prefill_s(profile, to_prefill + obs.arrived.prompt_tokens),
    )


def _own_latency(obs: Observation, load: _Load) -> tuple[Array, Array]:
    """Returns the latency per token [N] of the arrived request, and the part of it that it meets once."""
    profile, tokens, prompt = obs.experts.profile, obs.arrived.predicted_tokens, obs.arrived.prompt_tokens
    all_cost_s = jnp.sum(load.cost_s, -1)
    horizon = load.wait + tokens  # iterations
    stay = jnp.minimum(load.left, _wide(horizon))
    # Whoever leaves is followed by one that costs what it costs now; with the mean cost of all in its place, the
    # estimate would fall when a cheap request joins a batch that is not full.
    growth_s = profile.per_kv_token_s * jnp.sum(jnp.where(load.there, stay * (stay - 1.0) / 2.0, 0.0), -1)
    others_s = horizon * all_cost_s + growth_s
    own_s = profile.per_sequence_s * tokens + profile.per_kv_token_s * (tokens - 1.0) * (prompt + (tokens - 2.0) / 2.0)
    latency_s = load.stall_after_s + horizon * profile.step_base_s + load.share * others_s + own_s + profile.network_s
    delay_s = load.stall_after_s + load.wait * (profile.step_base_s + load.share * all_cost_s)
    return latency_s / tokens, delay_s / tokens


def _effect_on_others(obs: Observation, load: _Load) -> tuple[Array, Array]:
    """Returns the margin to its limit of each request there, and by how much it shrinks, both [N, S] s/token."""
    seen, profile = obs.requests, obs.experts.profile
    iteration_s = _wide(profile.step_base_s + load.share * jnp.sum(load.cost_s, -1)) - _wide(load.share) * load.cost_s
    turn = jnp.cumsum(seen.waiting, -1) / (_wide(obs.experts.waiting) + 1.0)
    end = jnp.where(seen.waiting, _wide(load.wait) * turn, 0.0) + load.left  # iterations from now
    own_s = load.left * (load.cost_s + _wide(profile.per_kv_token_s) * (load.left - 1.0) / 2.0)
    remaining_s = _wide(load.stall_before_s + profile.network_s) + end * iteration_s + own_s
    margin_s = seen.latency_limit_s - (seen.age_s + remaining_s) / jnp.maximum(load.length, 1.0)

    beside = jnp.clip(end - _wide(load.wait), 0.0, _wide(obs.arrived.predicted_tokens))
    decoding = jnp.maximum(beside - 1.0, 0.0)
    slower_s = jnp.where(beside > 0, _wide(load.stall_after_s - load.stall_before_s), 0.0)
    slower_s += _wide(profile.per_sequence_s) * beside
    slower_s += _wide(profile.per_kv_token_s) * decoding * (obs.arrived.prompt_tokens + (decoding - 1.0) / 2.0)
    return margin_s, slower_s / jnp.maximum(load.length, 1.0)


def _prefill_s(profile: ExpertProfile, tokens: Array) -> Array:
    """Returns by how much [N] s so many prompt tokens lengthen iterations that would else only decode."""

    def step_s(tokens: Array | int) -> Array:
        prefill_s = profile.prefill_base_s + profile.prefill_per_token_s * tokens
        return jnp.maximum(profile.step_base_s, jnp.where(jnp.asarray(tokens) > 0, prefill_s, 0.0))

    full = jnp.maximum(jnp.ceil(tokens / TOKEN_BUDGET) - 1.0, 0.0)  # iterations that use up the budget
    last = jnp.maximum(tokens - full * TOKEN_BUDGET, 0.0)
    return full * step_s(TOKEN_BUDGET) + step_s(last) - profile.step_base_s


def _wide(per_expert: Array) -> Array:
    """Gives values of the experts [N] the axis of the slots."""
    return jnp.asarray(per_expert)[..., None]
