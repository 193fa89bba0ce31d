"""What placing the arrived request on each expert would do: to itself, and to the requests that are already there.

The estimate follows the cost model with predicted lengths in the place of true ones, in O(slots): every request left on an
expert is taken to keep decoding beside the new one for as long as both have tokens left. Lengths are lognormal and poorly
predicted, so a request that has outrun its prediction is taken to have as much left as it has emitted, and violations are
judged softly, by a logistic of the predicted latency per token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from qos_jax.routers.base import Router, best_legal
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, ExpertProfile, Observation

WIDTH_S = 1.0e-3  # s/token; see BUILD_NOTES.md for how width and price were tuned
PRICE = 0.3  # QoS


class Impact(struct.PyTreeNode):
    """What is predicted for each expert if it is given the arrived request."""

    latency_per_token_s: Array  # [N] s/token, of the request itself
    in_time: Array  # [N] probability that it meets its limit
    qos: Array  # [N] its expected QoS
    qos_change: Array  # [N] change of the expected QoS of the requests there, at most 0
    violations_change: Array  # [N] change of their expected violations, at least 0

    @property
    def net(self) -> Array:
        """[N] what the placement adds to the expected QoS of all requests."""
        return self.qos + self.qos_change


def impact(obs: Observation, width_s: float = WIDTH_S) -> Impact:
    """Returns the predicted impact of each placement.

    Args:
      obs: what the router sees.
      width_s: width of the logistic that turns a margin to the limit [s/token] into a probability.
    """
    arrived, profile, seen = obs.arrived, obs.experts.profile, obs.requests
    prompt, tokens = arrived.prompt_tokens.astype(jnp.float32), arrived.predicted_tokens  # [], [N]
    there = seen.running | seen.waiting
    emitted = seen.generated_tokens.astype(jnp.float32)
    left = jnp.where(there, jnp.maximum(seen.predicted_tokens - emitted, emitted), 0.0)
    context = seen.prompt_tokens + emitted

    wait = _wait_iterations(obs, left, context, prompt)
    stall_s = _step_s(profile, prompt) - profile.step_base_s
    cost_s = jnp.where(there, _wide(profile.per_sequence_s) + _wide(profile.per_kv_token_s) * context, 0.0)
    shared = jnp.minimum(left, _wide(wait + tokens))  # iterations that each request spends beside this one, or before it
    others_s = jnp.sum(shared * (cost_s + _wide(profile.per_kv_token_s) * shared / 2.0), -1)
    batch_share = jnp.minimum(profile.max_running / jnp.maximum(obs.experts.running + obs.experts.waiting, 1), 1.0)
    own_s = tokens * (profile.per_sequence_s + profile.per_kv_token_s * (prompt + tokens / 2.0))
    latency_s = stall_s + (wait + tokens) * profile.step_base_s + batch_share * others_s + own_s + profile.network_s
    latency_per_token_s = latency_s / tokens
    in_time = _in_time(arrived.latency_limit_s - latency_per_token_s, width_s)

    before_s = (seen.age_s + left * _wide(profile.step_base_s + batch_share * jnp.sum(cost_s, -1))) / (emitted + left)
    beside = jnp.minimum(left, _wide(tokens)) * (left > _wide(wait))
    slower_s = _wide(stall_s) + beside * (
        _wide(profile.per_sequence_s) + _wide(profile.per_kv_token_s) * (prompt + beside / 2.0)
    )
    margin_s = seen.latency_limit_s - before_s
    lost = _in_time(margin_s, width_s) - _in_time(margin_s - slower_s / (emitted + left), width_s)
    lost = jnp.where(there, lost, 0.0)
    return Impact(
        latency_per_token_s=latency_per_token_s,
        in_time=in_time,
        qos=arrived.predicted_score * in_time,
        qos_change=-jnp.sum(lost * seen.predicted_score, -1),
        violations_change=jnp.sum(lost, -1),
    )


def impact_greedy(name: str = "impact_greedy", width_s: float = WIDTH_S, price: float = PRICE, **fields: str) -> Router:
    """Takes the placement that adds most to the expected QoS of all requests.

    Args:
      name: of the router.
      width_s: see ``impact``.
      price: the request is dropped where that is legal and no placement adds as much as this, what its place is worth to
        those who come later; minus infinity never drops.
      **fields: other fields of the router.
    """

    def act(key: Array, obs: Observation, memory: tuple[()]) -> tuple[Array, tuple[()]]:
        del key
        net = impact(obs, width_s).net
        best = best_legal(obs, net)
        worthless = jnp.max(jnp.where(obs.action_mask[:-1], net, -jnp.inf)) < price
        return jnp.where(worthless & obs.action_mask[-1], net.shape[0], best).astype(jnp.int32), memory

    return Router(name, fields.pop("kind", "heuristic"), tuple, act, **fields)


def _wait_iterations(obs: Observation, left: Array, context: Array, prompt: Array) -> Array:
    """Returns how many iterations [N] the request waits until a place in the batch and memory are free.

    A full batch of M requests with L tokens left in all frees a place about every L / (M requests) iterations.
    """
    profile = obs.experts.profile
    requests = (obs.experts.running + obs.experts.waiting).astype(jnp.float32)
    excess = jnp.maximum(requests + 1.0 - profile.max_running, 0.0)
    for_place = jnp.sum(left, -1) * excess / (jnp.maximum(requests, 1.0) * profile.max_running)
    blocks = jnp.where(left > 0, jnp.ceil(context / BLOCK_SIZE_TOKENS), 0.0)
    held = jnp.sum(blocks, -1)
    excess = jnp.maximum(held + jnp.ceil(prompt / BLOCK_SIZE_TOKENS) - profile.kv_blocks, 0.0)
    for_memory = jnp.sum(blocks * left, -1) * excess / (jnp.maximum(held, 1.0) * profile.kv_blocks)
    return jnp.maximum(for_place, for_memory)


def _step_s(profile: ExpertProfile, prefill_tokens: Array) -> Array:
    return jnp.maximum(profile.step_base_s, profile.prefill_base_s + profile.prefill_per_token_s * prefill_tokens)


def _in_time(margin_s: Array, width_s: float) -> Array:
    return jax.nn.sigmoid(margin_s / width_s)


def _wide(per_expert: Array) -> Array:
    """Gives values of the experts [N] the axis of the slots."""
    return jnp.asarray(per_expert)[..., None]
