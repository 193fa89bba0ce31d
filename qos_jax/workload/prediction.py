"""Models of what routers are given before a request is served: predicted scores and output lengths with errors.

A prediction model splits the standardised true values of the experts on one prompt into their mean, which describes the
prompt, and the deviations from it, which describe how each expert does on this prompt compared with its usual level.
Measured predictors explain more of the mean than of the deviations, so each part has its own explained share of
variance, A and B. Noise with the distribution of the true values is added, and each part is shrunk so that predictions
are calibrated (the expected true value, given all predictions, equals the prediction):

    z = sqrt(share) part + sqrt(1 - share) noise,    prediction = mean + sd (sqrt(A) z_mean + sqrt(B) z_deviation).

``r2`` is the explained share in total, A v + B (1 - v), where v is the variance of the mean. B is ``within_r2``, by
default equal to ``r2``, and A follows from both. Like the paper's predictors, the realistic model predicts one of five
equally likely buckets, and the mean of that bucket; its R^2 is that of the bucketed prediction. The bucket means are
those of a normal variate. Scores have heavier tails, so a nominal R^2 of 0.10 yields 0.09, and predicted scores are 5 %
too far apart.

Lengths are predicted as logarithms. Routers are given the expected number of tokens, which is larger than the
exponential of the expected logarithm: it is the mean of a lognormal that is cut off at ``max_output_tokens``. Generated
lengths are such lognormals. The lengths of AlpacaEval's table have a lighter tail, so for them the expected number is 5
to 12 % too high.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.scipy.special import ndtr

from qos_jax.errors import InputError
from qos_jax.workload import constants
from qos_jax.workload.content import RequestContent, SampledContent, correlate

NUM_BUCKETS = 5  # of equal probability
_EDGES = np.array([NormalDist().inv_cdf(i / NUM_BUCKETS) for i in range(1, NUM_BUCKETS)])
_EDGE_DENSITIES = np.array([0.0, *(NormalDist().pdf(edge) for edge in _EDGES), 0.0])
_CENTRES = -NUM_BUCKETS * np.diff(_EDGE_DENSITIES)  # mean of a standard normal within each bucket
_BUCKETED_SHARE = float(np.mean(_CENTRES**2))  # of the variance that bucketing preserves: 0.897


@runtime_checkable
class Predictions(Protocol):
    """A source of the predictions that routers observe."""

    def predict(self, key: Array, content: RequestContent, sampled: SampledContent) -> tuple[Array, Array]:
        """Returns the predicted score [N] in [0, 1] and the predicted tokens [N] of one request."""


@struct.dataclass
class TablePredictions:
    """A trained predictor's predictions for each prompt of a table; requests must be sampled from that table."""

    score: Array  # [M, N] in [0, 1]
    output_tokens: Array  # [M, N] tokens

    def predict(self, key: Array, content: RequestContent, sampled: SampledContent) -> tuple[Array, Array]:
        """Returns the predictions for the sampled row."""
        del key, content
        return self.score[sampled.row], self.output_tokens[sampled.row]


@struct.dataclass
class PredictionModel:
    """Predictions of a given accuracy; all numbers are traced, so a sweep over them compiles once."""

    score_r2: Array | float  # [] explained share of the variance of a score
    log_length_r2: Array | float  # [] explained share of the variance of a log length
    bucketed: Array | bool = False  # [] predict one of 5 buckets, which limits R^2 to 0.897
    score_within_r2: Array | float = -1.0  # [] explained share of the deviations between experts on one prompt;
    log_length_within_r2: Array | float = -1.0  # [] below 0 it is the share in total

    def predict(self, key: Array, content: RequestContent, sampled: SampledContent) -> tuple[Array, Array]:
        """Returns the predicted score [N] in [0, 1] and predicted tokens [N] of one request; exact where R^2 is 1."""
        score, output_tokens = sampled.score, sampled.output_tokens
        num_experts = score.shape[-1]
        normals = jax.random.normal(key, (2 + 2 * num_experts,), score.dtype)
        correlation = _pair(content.score_correlation, content.log_length_correlation)
        expected_score, log_length = self._expected(
            _pair(score, jnp.log(output_tokens.astype(score.dtype))),
            (
                _pair(content.score_mean, content.log_length_mean),
                _pair(content.score_sd, content.log_length_sd),
                correlation,
            ),
            (
                _pair(self.score_r2, self.log_length_r2),
                _pair(self.score_within_r2, self.log_length_within_r2),
            ),
            correlate(normals[:2, None], normals[2:].reshape(2, num_experts), correlation),
        )
        unexplained_sd = content.log_length_sd * jnp.sqrt(1.0 - self.log_length_r2)
        tokens = _capped_lognormal_mean(log_length, unexplained_sd, content.max_output_tokens)
        return (
            jnp.where(self.score_r2 < 1.0, jnp.clip(expected_score, 0.0, 1.0), score),
            jnp.where(self.log_length_r2 < 1.0, tokens, output_tokens.astype(tokens.dtype)),
        )

    def _expected(
        self, truth: Array, moments: tuple[Array, Array, Array], shares: tuple[Array, Array], noise: Array
    ) -> Array:
        """Returns calibrated predictions [2, N] of true scores and log lengths.

        Args:
          truth: [2, N].
          moments: mean and SD of the true values [2, N], and their correlation between experts [2, 1].
          shares: ``r2`` and ``within_r2``, [2, 1].
          noise: [2, N] standard normals with the same correlation.
        """
        (mean, sd, correlation), (r2, within_r2) = moments, shares
        within_r2 = jnp.where(within_r2 >= 0.0, within_r2, r2)
        preserved = jnp.where(self.bucketed, _BUCKETED_SHARE, 1.0)
        latent_r2, within = jnp.minimum(r2 / preserved, 1.0), jnp.minimum(within_r2 / preserved, 1.0)
        shared_variance = correlation + (1.0 - correlation) / truth.shape[-1]
        common = jnp.clip((latent_r2 - within * (1.0 - shared_variance)) / shared_variance, 0.0, 1.0)

        standard = (truth - mean) / jnp.maximum(sd, 1e-9)
        expected = _shrink(jnp.mean(standard, -1, keepdims=True), jnp.mean(noise, -1, keepdims=True), common)
        expected += _shrink(_deviation(standard), _deviation(noise), within)
        spread = jnp.sqrt(common * shared_variance + within * (1.0 - shared_variance))
        edges = jnp.asarray(_EDGES, expected.dtype)[:, None, None]
        bucket = jnp.sum(expected[None] > spread[None] * edges, axis=0)
        bucket_mean = spread * jnp.asarray(_CENTRES, expected.dtype)[bucket]
        return mean + sd * jnp.where(self.bucketed, bucket_mean, expected)


def _pair(of_score: Array | float, of_log_length: Array | float) -> Array:
    """Returns both as [2, N], or [2, 1] if they are the same for all experts."""
    return jnp.stack([jnp.atleast_1d(of_score), jnp.atleast_1d(of_log_length)])


def _shrink(truth: Array, noise: Array, share: Array) -> Array:
    """Returns the expected true value, given an observation with this share of its variance and noise for the rest."""
    return jnp.sqrt(share) * (jnp.sqrt(share) * truth + jnp.sqrt(1.0 - share) * noise)


def _deviation(x: Array) -> Array:
    return x - jnp.mean(x, -1, keepdims=True)


def _capped_lognormal_mean(log_mean: Array, log_sd: Array, cap: Array) -> Array:
    """Returns the mean of min(exp(X), cap) for a normal X."""
    log_sd = jnp.maximum(log_sd, 1e-6)
    distance = (jnp.log(cap) - log_mean) / log_sd
    below, at_cap = ndtr(jnp.stack([distance - log_sd, -distance]))
    return jnp.exp(log_mean + log_sd**2 / 2.0) * below + cap * at_cap


def parse_prediction(text: str) -> PredictionModel:
    """Builds a prediction model from its name.

    Args:
        text: ``realistic`` (as accurate as measured predictors on embeddings of the prompt), ``perfect`` (the true
            values), ``none`` (each expert's mean) or ``r2:SCORE:LENGTH`` with the two R^2, for example ``r2:0.3:0.5``.

    Raises:
        InputError: the text is none of these, or an R^2 is outside [0, 1].
    """
    named = {
        "realistic": PredictionModel(
            constants.REALISTIC_SCORE_R2,
            constants.REALISTIC_LOG_LENGTH_R2,
            bucketed=True,
            score_within_r2=constants.REALISTIC_SCORE_WITHIN_R2,
            log_length_within_r2=constants.REALISTIC_LOG_LENGTH_WITHIN_R2,
        ),
        "perfect": PredictionModel(1.0, 1.0),
        "none": PredictionModel(0.0, 0.0),
    }
    if text in named:
        return named[text]
    try:
        kind, score_r2, log_length_r2 = text.split(":")
        model = PredictionModel(float(score_r2), float(log_length_r2))
        if kind == "r2" and 0.0 <= model.score_r2 <= 1.0 and 0.0 <= model.log_length_r2 <= 1.0:
            return model
    except ValueError:
        pass  # raises the same error as numbers out of range
    raise InputError(
        f"prediction {text!r} is unknown; choose realistic, perfect, none or r2:SCORE:LENGTH with two numbers in [0, 1]"
    )
