"""When an answer is in time: by its latency per token alone, or by further limits on its times, too.

A margin is in seconds per token of the answer: the time that the answer as a whole has to spare, spread over its
tokens. So margins to different limits are comparable, and one width makes a soft step of each of them.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax.numpy as jnp

from qos_jax.sim.types import AnyArray, ServiceLimits

_MISSED_S = -1.0  # s/token, far below 0: a margin that cannot be made good


class Limited(Protocol):
    """What has limits: a request, or the view of one or many."""

    latency_limit_s: Any  # [...] s/token
    limits: ServiceLimits | None  # [...] each


def margin_s(of: Limited, tokens: AnyArray, latency_s: AnyArray, ttft_s: AnyArray) -> AnyArray:
    """Returns the margin [...] of answers to the nearest of their limits, in s/token; below 0 if one is missed.

    Args:
      of: limits [...].
      tokens: [...] tokens of the answer.
      latency_s: [...] s from the arrival to the last token.
      ttft_s: [...] s from the arrival to the first token.
    """
    margin = of.latency_limit_s - latency_s / tokens
    if of.limits is None:
        return margin
    first = (of.limits.ttft_s - ttft_s) / tokens
    return jnp.minimum(jnp.minimum(margin, first), _later_margin_s(of.limits, tokens, latency_s, ttft_s))


def expected_margin_s(
    of: Limited, tokens: AnyArray, latency_s: AnyArray, ttft_s: AnyArray, has_first: AnyArray
) -> AnyArray:
    """Returns the margin [...] of answers that are still to end, by their expected times; see ``margin_s``.

    Where ``has_first`` [...], the first token is there: its limit is met or missed for good.
    """
    margin = of.latency_limit_s - latency_s / tokens
    if of.limits is None:
        return margin
    for_good = jnp.where(ttft_s <= of.limits.ttft_s, jnp.inf, _MISSED_S)
    first = jnp.where(has_first, for_good, (of.limits.ttft_s - ttft_s) / tokens)
    return jnp.minimum(jnp.minimum(margin, first), _later_margin_s(of.limits, tokens, latency_s, ttft_s))


def per_token_limit_s(of: Limited, tokens: AnyArray) -> AnyArray:
    """Returns the latency per token [...] that all limits together allow an answer of so many tokens, s/token."""
    if of.limits is None:
        return of.latency_limit_s
    limits, tokens = of.limits, jnp.maximum(tokens, 1.0)
    later_tokens = jnp.maximum(tokens - 1.0, 1e-6)  # the limit on them may be infinite
    allowed_s = jnp.minimum(limits.e2e_s, limits.ttft_s + limits.tpot_s * later_tokens)
    return jnp.minimum(of.latency_limit_s, allowed_s / tokens)


def _later_margin_s(limits: ServiceLimits, tokens: AnyArray, latency_s: AnyArray, ttft_s: AnyArray) -> AnyArray:
    """Returns the margin [...] to the limits on the tokens after the first and on the last, s/token."""
    later_tokens = tokens - 1.0
    allowed_s = jnp.where(later_tokens > 0, limits.tpot_s * jnp.maximum(later_tokens, 1.0), jnp.inf)
    return jnp.minimum(limits.e2e_s - latency_s, allowed_s - (latency_s - ttft_s)) / tokens
