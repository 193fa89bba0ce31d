"""The predicted impact of placing the arrived request on each expert: on itself, and on the requests on that expert.

The analytic form applies the simulator's cost model to predicted lengths, in O(slots):

* The expected number of tokens left grows with the tokens already emitted, because predictions are weak and a request
  beyond its prediction is usually long. A place that becomes free is assumed to be taken by another request. Its prompt
  stalls the batch, which is left out unless ``later_prompts`` is set: it matters where prompts are dear.
* An LLM that is not loaded waits until the requests on its card have ended, and is loaded then. Until it is, the card
  earns nothing from its share of the arrivals, as far as these keep it at work; each is worth as much as the arrived
  request would be there.
* The latency of a request is a one-time delay (wait for a place, prefill) plus a time for each token. The request meets
  its limit if the time per token does, with a logistic in place of the step, and if it has enough tokens to spread the
  delay over. For a lognormal length, that probability is close to a logistic in the logarithm of the length.

The rollout form runs the simulator on two copies of each expert, with and without the request, until both are idle. All
requests have their expected lengths, and none arrives later.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from qos_jax.errors import InputError
from qos_jax.impact.imagined_world import LENGTH_CV, expected_remaining_tokens, sample_belief, sample_request
from qos_jax.sim import engine
from qos_jax.sim.cost import blocks_of, fits_in_memory
from qos_jax.sim.engine import EngineSpec, Slots
from qos_jax.sim.service_level import expected_margin_s
from qos_jax.sim.shared_cards import first_loaded, largest_of_others
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, ExpertProfile, Observation
from qos_jax.sim.validation import check_shapes
from qos_jax.sim.world import payload_of, slot_latency_per_token_s, slot_margin_s

WIDTH_S = 2.0e-3  # s/token, tuned on training seeds of paper-3 and edge-8

ImpactForm = Literal["analytic", "rollout"]


class Impact(struct.PyTreeNode):
    """The predicted impact of placing the arrived request, for each expert."""

    latency_per_token_s: Array  # [N] s/token of the request; infinite if the rollout cannot place it
    in_time: Array  # [N] probability that the request meets its limit
    qos: Array  # [N] expected QoS of the request
    qos_change: Array  # [N] change of the others' expected QoS: at most 0 in the analytic form, seldom above in rollout
    violations_change: Array  # [N] change of the others' expected violations

    @property
    def net(self) -> Array:
        """[N] change of the expected QoS of all requests."""
        return self.qos + self.qos_change


class _Load(struct.PyTreeNode):
    """The requests on each expert, and the delays that they cause."""

    present: Array  # [N, S] bool
    left: Array  # [N, S] tokens expected to follow
    length: Array  # [N, S] tokens emitted and expected
    cost_s: Array  # [N, S] s that each request adds to an iteration
    wait: Array  # [N] iterations until a place and memory are free for one more request
    ahead: Array  # [N] iterations that are scheduled already, and which the arrived request cannot join
    share: Array  # [N] of the requests that are in the batch at a time
    later_prompts_s: Array  # [N] s for each iteration, of prompts that take the places of finished requests
    stall_before_s: Array  # [N] s of outstanding prefill
    stall_after_s: Array  # [N] s of outstanding prefill, with the arrived request
    load_s: Array | float  # [N] s until its LLM is loaded, with the wait for those on its card


def impact(
    obs: Observation,
    width_s: Array | float = WIDTH_S,
    length_cv: float = LENGTH_CV,
    form: ImpactForm = "analytic",
    later_prompts: bool = False,
) -> Impact:
    """Returns the predicted impact of each placement.

    Args:
      obs: one observation; ``jax.vmap`` takes a batch.
      width_s: width of the logistic that converts a margin to the limit [s/token] into a probability.
      length_cv: coefficient of variation of an output length given its prediction; above 0 in the analytic form.
      form: "analytic" for the closed form, "rollout" for two runs of the simulator; see the module.
      later_prompts: the closed form counts the prompts of the requests that take the places of those on the expert.

    Raises:
      InputError: the observation is a batch, or its arrays do not belong together; or LLMs share a card, which the
        rollout form does not know.
    """
    _check_one(obs)
    if form == "rollout" and obs.experts.load_left_s is not None:
        raise InputError('form is "rollout", must be "analytic" where LLMs share a card')
    if form == "rollout":
        return _by_rollout(obs, width_s, length_cv)
    return _by_formula(obs, width_s, length_cv, later_prompts)


def in_flight_qos(obs: Observation, width_s: Array | float = WIDTH_S, length_cv: float = LENGTH_CV) -> Array:
    """Returns the expected QoS [] of all requests on the experts if no request arrives later; see ``impact``."""
    return jnp.sum(expert_in_flight_qos(obs, width_s, length_cv))


def expert_in_flight_qos(obs: Observation, width_s: Array | float = WIDTH_S, length_cv: float = LENGTH_CV) -> Array:
    """Returns the part [N] of ``in_flight_qos`` of each expert's requests."""
    _check_one(obs)
    load = _load(obs, length_cv)
    margin_s, _ = _effect_on_others(obs, load)
    in_time = jax.nn.sigmoid(margin_s / width_s)
    return jnp.sum(jnp.where(load.present, in_time * obs.requests.predicted_score, 0.0), -1)


def _check_one(obs: Observation) -> None:
    """Checks that an observation is not a batch: its leading axis would broadcast against the experts."""
    *_, num_experts, slots = (0, 0, *jnp.shape(obs.requests.running))
    views = {
        "arrived": (obs.arrived, {"prompt_tokens": "", "latency_limit_s": "", "predicted_score": "N"}),
        "experts": (obs.experts, {"running": "N", "waiting": "N"}),
        "requests": (obs.requests, {"running": "NS", "waiting": "NS", "predicted_tokens": "NS"}),
    }
    arrays = {
        f"obs.{view}.{name}": (getattr(node, name), axes)
        for view, (node, names) in views.items()
        for name, axes in names.items()
    }
    check_shapes(arrays, N=num_experts, S=slots)


def _by_formula(obs: Observation, width_s: Array | float, length_cv: float, later_prompts: bool) -> Impact:
    load = _load(obs, length_cv, later_prompts)
    latency_per_token_s, delay_per_token_s = _own_latency(obs, load)
    margin_s = obs.arrived.latency_limit_s - (latency_per_token_s - delay_per_token_s)
    spread = jnp.log(jnp.maximum(margin_s, 1e-6) / jnp.maximum(delay_per_token_s, 1e-9))
    steepness = 1.81 / math.sqrt(math.log1p(length_cv**2))  # of the logistic with the SD of the lognormal's logarithm
    in_time = jax.nn.sigmoid(margin_s / width_s) * jax.nn.sigmoid(steepness * spread)
    if obs.arrived.limits is not None:
        in_time = jnp.minimum(
            in_time, _in_further_limits(obs, latency_per_token_s, delay_per_token_s, width_s, steepness)
        )

    margin_s, slower_s = _effect_on_others(obs, load)
    lost = jax.nn.sigmoid(margin_s / width_s) - jax.nn.sigmoid((margin_s - slower_s) / width_s)
    qos = obs.arrived.predicted_score * in_time
    return Impact(
        latency_per_token_s=latency_per_token_s,
        in_time=in_time,
        qos=qos,
        qos_change=-jnp.sum(lost * obs.requests.predicted_score, -1) - _lost_by_loading(obs, load, qos),
        violations_change=jnp.sum(lost, -1),
    )


def _lost_by_loading(obs: Observation, load: _Load, qos: Array) -> Array | float:
    """Returns the QoS [N] of later requests that a card loses while an LLM is loaded; ``qos`` [N] is of the arrived."""
    experts, arrived = obs.experts, obs.arrived
    if experts.load_left_s is None:
        return 0.0
    profile, tokens = experts.profile, arrived.predicted_tokens
    rate_per_s = arrived.recent_rate_per_s[-1] / jnp.sum(first_loaded(profile.cards))
    kv_tokens = _real(arrived.prompt_tokens) + tokens / 2.0
    work_s = tokens * (
        profile.step_base_s / profile.max_running + profile.per_sequence_s + profile.per_kv_token_s * kv_tokens
    )
    share_of_time = jnp.minimum(rate_per_s * work_s, 1.0)
    loads = (experts.load_left_s > 0) & (experts.running + experts.waiting == 0)
    lost_per_s = largest_of_others(profile.cards, rate_per_s * share_of_time * qos)
    return jnp.where(loads, load.load_s * lost_per_s, 0.0)


def _in_further_limits(
    obs: Observation, per_token_s: Array, delay_per_token_s: Array, width_s: Array | float, steepness: float
) -> Array:
    """Returns the probability [N] that the arrived request meets the limit that is hardest to meet, of ``limits``."""
    limits, tokens = obs.arrived.limits, obs.arrived.predicted_tokens
    assert limits is not None
    delay_s, rate_s = delay_per_token_s * tokens, per_token_s - delay_per_token_s
    ttft = jax.nn.sigmoid((limits.ttft_s - delay_s - rate_s) / (width_s * tokens))  # an iteration after the delay
    tpot = jax.nn.sigmoid((limits.tpot_s - rate_s) / width_s)
    spread = jnp.log(jnp.maximum(limits.e2e_s - delay_s, 1e-6) / jnp.maximum(rate_s * tokens, 1e-9))
    return jnp.minimum(jnp.minimum(ttft, tpot), jax.nn.sigmoid(steepness * spread))


def _by_rollout(obs: Observation, width_s: Array | float, length_cv: float) -> Impact:
    slots, scores = _simulate(obs, length_cv), obs.requests.predicted_score
    occupied = slots.output_tokens > 0
    latency_per_token_s = slot_latency_per_token_s(obs.experts.profile, slots)
    margin_s = slot_margin_s(obs.experts.profile, slots)
    without, together = jnp.where(occupied, jax.nn.sigmoid(margin_s / width_s), 0.0)

    is_arrived = occupied[1] & ~occupied[0]
    in_time = jnp.sum(jnp.where(is_arrived, together, 0.0), -1)
    own_latency_s = jnp.sum(jnp.where(is_arrived, latency_per_token_s[1], 0.0), -1)
    change = jnp.where(is_arrived, 0.0, together - without)[:, :-1]
    return Impact(
        latency_per_token_s=jnp.where(jnp.any(is_arrived, -1), own_latency_s, jnp.inf),
        in_time=in_time,
        qos=obs.arrived.predicted_score * in_time,
        qos_change=jnp.sum(change * scores, -1),
        violations_change=-jnp.sum(change, -1),
    )


def _simulate(obs: Observation, length_cv: float) -> Slots:
    """Returns the finished requests [2, N, S + 1]: without the arrived request, and with it on every expert."""
    profile, request = obs.experts.profile, sample_request(obs, length_cv)
    without = sample_belief(obs, length_cv).experts
    without = without.replace(slots=jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1))), without.slots))
    fits = fits_in_memory(profile, request.prompt_tokens, request.output_tokens, BLOCK_SIZE_TOKENS)
    cached_tokens = obs.arrived.cached_tokens
    cached_blocks = None if cached_tokens is None else cached_tokens // BLOCK_SIZE_TOKENS
    lengths = request.prompt_tokens, request.output_tokens
    together = engine.push(without, fits, *lengths, payload_of(request), cached_blocks)
    pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), without, together)
    spec = EngineSpec(obs.requests.running.shape[-1] + 1)
    return jax.vmap(partial(engine.drain, spec, profile))(pair).slots


def _load(obs: Observation, length_cv: float, later_prompts: bool = False) -> _Load:
    requests, experts, profile = obs.requests, obs.experts, obs.experts.profile
    present = requests.running | requests.waiting
    emitted = _real(requests.generated_tokens)
    left = jnp.where(present, expected_remaining_tokens(requests, length_cv), 0.0)
    known_tokens = requests.prompt_tokens + requests.generated_tokens
    uncached_tokens = known_tokens - requests.computed_tokens
    decoding = (emitted > 0) & (uncached_tokens <= 1)  # 0 if its next token is scheduled already
    prefill_tokens = jnp.sum(jnp.where(present & ~decoding, _real(uncached_tokens), 0.0), -1)
    cost_s = _over_slots(profile.per_sequence_s) + _over_slots(profile.per_kv_token_s) * _real(known_tokens - 1)

    count, max_running = _real(experts.running + experts.waiting), _real(profile.max_running)
    divisor = jnp.maximum(count, 1.0)
    # A full batch of M requests, with L tokens left on the expert, frees a place about every L / (M count) iterations.
    excess = jnp.maximum(count + 1.0 - max_running, 0.0)
    wait_for_place = jnp.sum(left, -1) * excess / (divisor * max_running)
    blocks = jnp.where(present, _real(blocks_of(known_tokens, BLOCK_SIZE_TOKENS)), 0.0)
    held, own_blocks = jnp.sum(blocks, -1), _real(blocks_of(obs.arrived.prompt_tokens, BLOCK_SIZE_TOKENS))
    kv_blocks = _real(profile.kv_blocks)
    excess = jnp.maximum(held + own_blocks - kv_blocks, 0.0)
    wait_for_memory = jnp.sum(blocks * left, -1) * excess / (jnp.maximum(held, 1.0) * kv_blocks)
    memory_share = (kv_blocks - own_blocks) / jnp.maximum(held, 1.0)
    share = jnp.minimum((max_running - 1.0) / divisor, memory_share)
    # Each place takes a new prompt, here as long as its last one, once in a request's length of iterations.
    prompts_s = _prefill_s(profile, _real(requests.prompt_tokens)) / jnp.maximum(emitted + left, 1.0)
    load = _Load(
        present=present,
        left=left,
        length=emitted + left,
        cost_s=jnp.where(present, cost_s, 0.0),
        wait=jnp.maximum(wait_for_place, wait_for_memory),
        ahead=jnp.where(profile.async_scheduling & (count > 0), 1.0, 0.0),
        share=jnp.clip(share, 0.0, 1.0),
        later_prompts_s=jnp.sum(jnp.where(present & later_prompts, prompts_s, 0.0), -1),
        stall_before_s=_prefill_s(profile, prefill_tokens),
        stall_after_s=_prefill_s(profile, prefill_tokens + _real(_uncached_tokens(obs))),
        load_s=0.0,
    )
    return load.replace(load_s=_load_s(obs, load))


def _load_s(obs: Observation, load: _Load) -> Array | float:
    """Returns how long [N] s the request waits for the requests of the other LLMs on a card, and then for loading."""
    experts, profile, load_left_s = obs.experts, obs.experts.profile, obs.experts.load_left_s
    if load_left_s is None:
        return 0.0
    iterations = jnp.max(load.left, -1) + jnp.where(experts.waiting > 0, load.wait, 0.0)
    last_s = load.stall_before_s + iterations * (profile.step_base_s + load.share * jnp.sum(load.cost_s, -1))
    last_s = jnp.where(experts.running + experts.waiting > 0, last_s, 0.0)
    return jnp.where(experts.running > 0, 0.0, load_left_s + largest_of_others(profile.cards, last_s))


def _uncached_tokens(obs: Observation) -> Array:
    """Returns the tokens [] or [N] of the arrived prompt that an expert has to compute."""
    arrived = obs.arrived
    return arrived.prompt_tokens if arrived.cached_tokens is None else arrived.prompt_tokens - arrived.cached_tokens


def _own_latency(obs: Observation, load: _Load) -> tuple[Array, Array]:
    """Returns the latency per token of the arrived request, and its part from the one-time delay, both [N] s/token."""
    profile, tokens, prompt = obs.experts.profile, obs.arrived.predicted_tokens, _real(obs.arrived.prompt_tokens)
    all_cost_s = jnp.sum(load.cost_s, -1)
    horizon = load.wait + tokens  # iterations
    stay = jnp.minimum(load.left, _over_slots(horizon))
    # A request that finishes is replaced by one with the same cost. If the replacement had the mean cost of all, the
    # estimate would fall when a cheap request joins a batch that is not full.
    growth_s = profile.per_kv_token_s * jnp.sum(jnp.where(load.present, stay * (stay - 1.0) / 2.0, 0.0), -1)
    others_s = horizon * (all_cost_s + load.later_prompts_s) + growth_s
    own_s = profile.per_sequence_s * tokens + profile.per_kv_token_s * (tokens - 1.0) * (prompt + (tokens - 2.0) / 2.0)
    iteration_s = profile.step_base_s + load.share * (all_cost_s + load.later_prompts_s)
    lag_s = load.load_s + load.stall_after_s + load.ahead * iteration_s
    latency_s = lag_s + horizon * profile.step_base_s + load.share * others_s + own_s + profile.network_s
    delay_s = lag_s + load.wait * iteration_s
    return latency_s / tokens, delay_s / tokens


def _effect_on_others(obs: Observation, load: _Load) -> tuple[Array, Array]:
    """Returns each request's margin to its limit, and the reduction of the margin by the placement, [N, S] s/token."""
    requests, profile = obs.requests, obs.experts.profile
    all_cost_s = jnp.sum(load.cost_s, -1)
    all_s = profile.step_base_s + load.share * (all_cost_s + load.later_prompts_s)
    iteration_s = _over_slots(all_s) - _over_slots(load.share) * load.cost_s
    queue_share = jnp.cumsum(_real(requests.waiting), -1) / _over_slots(_real(obs.experts.waiting + 1))
    end = jnp.where(requests.waiting, _over_slots(load.wait) * queue_share, 0.0) + load.left  # iterations from now
    own_s = load.left * (load.cost_s + _over_slots(profile.per_kv_token_s) * (load.left - 1.0) / 2.0)
    lag_s = load.load_s + load.stall_before_s + profile.network_s
    remaining_s = _over_slots(lag_s) + end * iteration_s + own_s
    has_first = requests.generated_tokens > 0
    before_first_s = _over_slots(lag_s) + (end - load.left + 1.0) * iteration_s
    ttft_s = requests.age_s + before_first_s
    if requests.first_token_s is not None:
        ttft_s = jnp.where(has_first, requests.first_token_s + _over_slots(profile.network_s), ttft_s)
    length = jnp.maximum(load.length, 1.0)
    margin_s = expected_margin_s(requests, length, requests.age_s + remaining_s, ttft_s, has_first)

    shared = jnp.clip(end - _over_slots(load.wait), 0.0, _over_slots(obs.arrived.predicted_tokens))  # iterations
    decoding = jnp.maximum(shared - 1.0, 0.0)
    slower_s = jnp.where(shared > 0, _over_slots(load.stall_after_s - load.stall_before_s), 0.0)
    slower_s += _over_slots(profile.per_sequence_s) * shared
    prompt = _real(obs.arrived.prompt_tokens)
    slower_s += _over_slots(profile.per_kv_token_s) * decoding * (prompt + (decoding - 1.0) / 2.0)
    return margin_s, slower_s / jnp.maximum(load.length, 1.0)


def _prefill_s(profile: ExpertProfile, tokens: Array) -> Array:
    """Returns the time s that ``tokens`` [N] or [N, S] of prefill add to iterations that would else only decode."""
    step_base_s, base_s, per_token_s, budget = (
        jnp.reshape(x, (-1, *[1] * (tokens.ndim - 1)))
        for x in (profile.step_base_s, profile.prefill_base_s, profile.prefill_per_token_s, _real(profile.token_budget))
    )

    def step_s(tokens: Array) -> Array:
        return jnp.maximum(step_base_s, jnp.where(tokens > 0, base_s + per_token_s * tokens, 0.0))

    full = jnp.maximum(jnp.ceil(tokens / budget) - 1.0, 0.0)  # iterations that use the whole budget
    last = jnp.maximum(tokens - full * budget, 0.0)
    return full * step_s(budget) + step_s(last) - step_base_s


def _real(numbers: Array) -> Array:
    """Returns numbers of tokens, blocks or requests as float32: their sums and products may exceed int32."""
    return jnp.asarray(numbers, jnp.float32)


def _over_slots(per_expert: Array) -> Array:
    """Returns values of the experts [N] as [N, 1], to broadcast over the slots."""
    return jnp.asarray(per_expert)[..., None]
