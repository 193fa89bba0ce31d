"""The content of a request: prompt length, length and score of each expert's answer, and latency limit.

`GeneratedContent` samples them from distributions fitted to measurements (see `constants`). All experts share one
normal variate per prompt for the score and another for the log length. The shortfall of a score, ``1 - score``, is
lognormal. A third shared variate sets the spread of the experts on the prompt: with equal spreads on all prompts, the
best of many experts would score higher than measured. Scores and lengths are independent of each other and of the
prompt's length; the measured correlations (0.1 to 0.2, and 0) are neglected.

One random draw serves a whole request, as this runs in the simulator's innermost loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.scipy.special import ndtr

from qos_jax.errors import InputError
from qos_jax.sim.types import ServiceLimits
from qos_jax.workload import constants


@struct.dataclass
class LatencyLimits:
    """Limits of C classes of users, and the share of each class; see `latency_limits`."""

    values_s: Array  # [C] s/token
    weights: Array  # [C] shares, which sum to 1
    further: ServiceLimits | None = None  # [C] each, beside the limit per token

    def at(self, quantile: Array) -> tuple[Array, ServiceLimits | None]:
        """Returns the limits [s/token] and [s] of the user at a quantile in [0, 1) of the population."""
        user_class = jnp.sum(quantile >= jnp.cumsum(self.weights[:-1]))
        return self.values_s[user_class], jax.tree.map(lambda values: values[user_class], self.further)


class SampledContent(NamedTuple):
    """One prompt, the answers that the N experts would give, and the latency limit."""

    prompt_tokens: Array  # [] int32 tokens
    output_tokens: Array  # [N] int32 tokens
    score: Array  # [N] in [0, 1]
    latency_limit_s: Array  # [] s/token
    row: Array  # [] int32 row of the table; 0 for generated content
    limits: ServiceLimits | None = None  # [] each, beside the limit per token


class RequestContent(Protocol):
    """A distribution of contents, with the moments to which predictions are calibrated."""

    score_mean: Array  # [N]
    score_sd: Array  # [N]
    log_length_mean: Array  # [N] of the natural logarithm of the output tokens
    log_length_sd: Array  # [N]
    score_correlation: Array  # [] between two experts, over the prompts
    log_length_correlation: Array  # [] between two experts, over the prompts
    max_output_tokens: Array  # [] or [N] tokens, where answers are cut off

    def sample(self, key: Array) -> SampledContent:
        """Samples a prompt with its answers and its latency limit."""


@struct.dataclass
class GeneratedContent:
    """Contents sampled from fitted distributions; `generated_content` builds them."""

    score_mean: Array  # [N]
    score_sd: Array  # [N]
    log_length_mean: Array  # [N] of the natural logarithm of the output tokens, before the cap
    log_length_sd: Array  # [N]
    score_correlation: Array  # [] between the log shortfalls of two experts
    log_spread_sd: Array  # [] of the logarithm of the experts' spread on a prompt
    log_length_correlation: Array  # [] between two experts
    log_prompt_tokens: Array  # [3] coefficients of 1, z and z^2, for a standard normal z
    max_prompt_tokens: Array  # [] tokens
    max_output_tokens: Array  # [] tokens
    limits: LatencyLimits

    def sample(self, key: Array) -> SampledContent:
        """Samples a prompt with its answers and its latency limit."""
        num_experts = self.score_mean.shape[-1]
        normals = jax.random.normal(key, (5 + 2 * num_experts,), self.score_mean.dtype)
        prompt, user, shared_score, spread, shared_length = normals[:5]
        own_score, own_length = normals[5 : 5 + num_experts], normals[5 + num_experts :]

        level, slope, curvature = self.log_prompt_tokens
        prompt_tokens = _whole_tokens(level + (slope + curvature * prompt) * prompt, self.max_prompt_tokens)
        length = correlate(shared_length, own_length, self.log_length_correlation)
        output_tokens = _whole_tokens(self.log_length_mean + self.log_length_sd * length, self.max_output_tokens)
        # The relative spread has a mean square of 1 over the prompts, so it does not change the SD of the scores.
        relative_spread = jnp.exp(self.log_spread_sd * (spread - self.log_spread_sd))
        score = self._score(correlate(shared_score, relative_spread * own_score, self.score_correlation))
        limit_s, further = self.limits.at(ndtr(user))
        return SampledContent(prompt_tokens, output_tokens, score, limit_s, jnp.int32(0), further)

    def _score(self, standard: Array) -> Array:
        """Returns the scores [N] at standard normal variates [N]: 1 minus a lognormal with the given mean and SD."""
        shortfall_mean = 1.0 - self.score_mean
        log_sd = jnp.sqrt(jnp.log1p((self.score_sd / shortfall_mean) ** 2))
        shortfall = shortfall_mean * jnp.exp(-log_sd * (standard + log_sd / 2.0))
        return 1.0 - jnp.minimum(shortfall, 1.0)


def correlate(shared: Array, own: Array, correlation: Array) -> Array:
    """Returns standard normals [N] with a pairwise correlation, from one shared by all [] and one per expert [N]."""
    return jnp.sqrt(correlation) * shared + jnp.sqrt(1.0 - correlation) * own


def _whole_tokens(log_tokens: Array, max_tokens: Array) -> Array:
    return jnp.clip(jnp.round(jnp.exp(log_tokens)), 1.0, max_tokens).astype(jnp.int32)


def latency_limits(
    values_s: Sequence[float] = (0.03,),
    weights: Sequence[float] | None = None,
    *,
    ttft_s: Sequence[float] = (),
    tpot_s: Sequence[float] = (),
    e2e_s: Sequence[float] = (),
) -> LatencyLimits:
    """Builds the limits of one or several classes of users.

    Each kind of limit has a value for each class, one for all of them, or none, which is no limit of that kind.
    Infinity is no limit for one class among others.

    Args:
        values_s: latency per token [s/token]; by default one class with the paper's limit.
        weights: relative frequency of each class; equal by default.
        ttft_s: time to the first token [s].
        tpot_s: time per token after the first [s].
        e2e_s: time to the last token [s].

    Raises:
        InputError: there is no limit at all, a limit is not above 0, a weight is negative, or their numbers differ.
    """
    kinds = {"latency_limit_s": values_s, "ttft_limit_s": ttft_s, "tpot_limit_s": tpot_s, "e2e_limit_s": e2e_s}
    classes = max(map(len, kinds.values()))
    if classes == 0:
        raise InputError(f"there is no limit: give one of {', '.join(kinds)}")
    for name, values in kinds.items():
        legal = len(values) in (0, 1, classes) and all(value > 0.0 for value in values)
        if not legal or (np.isinf(values).all() and len(values)):
            numbers = "one number, or one for each class of users" if classes > 1 else "a finite number"
            raise InputError(f"{name} is {list(values)}; must be {numbers}, all above 0")
    shares = np.ones(classes) if weights is None else np.asarray(weights, float)
    if shares.shape != (classes,) or not (shares >= 0).all() or not 0 < shares.sum() < np.inf:
        raise InputError(
            f"the weights of the {classes} latency limits are {shares.tolist()}; "
            "must be one for each limit, none negative and not all 0"
        )
    table = np.array([np.broadcast_to(values if len(values) else np.inf, classes) for values in kinds.values()])
    if np.isinf(table).all(0).any():
        raise InputError(
            f"class {np.isinf(table).all(0).argmax()} of the users has no limit: give one of {', '.join(kinds)}"
        )
    per_token_s, *further = (jnp.asarray(values, float) for values in table)
    are_further = any(len(values) for values in (ttft_s, tpot_s, e2e_s))
    return LatencyLimits(
        per_token_s,
        jnp.asarray(shares / shares.sum(), float),
        ServiceLimits(*further) if are_further else None,
    )


def generated_content(experts: Sequence[str], limits: LatencyLimits | None = None) -> GeneratedContent:
    """Builds the generator for LLMs of mix-instruct.

    Args:
        experts: LLM of each of the N experts, a name in `constants.MIX_INSTRUCT`; several experts may serve one LLM.
        limits: latency limits of the users; by default `latency_limits()`.

    Raises:
        InputError: there is no expert, or an LLM is unknown.
    """
    unknown = [name for name in experts if name not in constants.MIX_INSTRUCT]
    if unknown or len(experts) == 0:
        problem = f"experts {unknown} are unknown" if unknown else "there are no experts"
        raise InputError(f"{problem}; choose from {', '.join(constants.MIX_INSTRUCT)}")
    return generated_content_of([constants.MIX_INSTRUCT[name] for name in experts], limits)


def generated_content_of(laws: Sequence[constants.AnswerLaw], limits: LatencyLimits | None = None) -> GeneratedContent:
    """Builds the generator for N LLMs whose answers follow these laws, by default with `latency_limits()`."""
    return GeneratedContent(
        score_mean=jnp.asarray([law.score_mean for law in laws], float),
        score_sd=jnp.full(len(laws), constants.SCORE_SD, float),
        log_length_mean=jnp.asarray([law.log_length_mean for law in laws], float),
        log_length_sd=jnp.asarray([law.log_length_sd for law in laws], float),
        score_correlation=jnp.asarray(constants.LATENT_SCORE_CORRELATION, float),
        log_spread_sd=jnp.asarray(constants.LOG_SPREAD_SD, float),
        log_length_correlation=jnp.asarray(constants.LOG_LENGTH_CORRELATION, float),
        log_prompt_tokens=jnp.asarray(constants.LOG_PROMPT_TOKENS, float),
        max_prompt_tokens=jnp.asarray(constants.MAX_PROMPT_TOKENS, float),
        max_output_tokens=jnp.asarray(constants.MAX_OUTPUT_TOKENS, float),
        limits=latency_limits() if limits is None else limits,
    )


def sharegpt_run_content(num_experts: int, limits: LatencyLimits | None = None) -> GeneratedContent:
    """Builds a generator with the lengths of the measured vLLM run.

    All answers score 1, so QoS is the share of requests within their latency limit.
    """
    log_prompt, log_output = constants.SHAREGPT_RUN_LOG_PROMPT, constants.SHAREGPT_RUN_LOG_OUTPUT
    max_prompt_tokens, max_output_tokens = constants.SHAREGPT_RUN_MAX_TOKENS
    return GeneratedContent(
        score_mean=jnp.full(num_experts, 1.0 - 1e-6),
        score_sd=jnp.zeros(num_experts),
        log_length_mean=jnp.full(num_experts, log_output[0]),
        log_length_sd=jnp.full(num_experts, log_output[1]),
        score_correlation=jnp.asarray(constants.LATENT_SCORE_CORRELATION, float),
        log_spread_sd=jnp.asarray(constants.LOG_SPREAD_SD, float),
        log_length_correlation=jnp.asarray(1.0),
        log_prompt_tokens=jnp.asarray([*log_prompt, 0.0], float),
        max_prompt_tokens=jnp.asarray(max_prompt_tokens, float),
        max_output_tokens=jnp.asarray(max_output_tokens, float),
        limits=latency_limits() if limits is None else limits,
    )
