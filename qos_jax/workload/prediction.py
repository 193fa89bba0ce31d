"""What the router is told of a request before it is served: predicted scores and output lengths, right in part.

The standardised truths of the experts for one prompt are taken apart: their mean says how the prompt is, deviations
from it say which expert does better on it than it usually does. Measured predictors know more of the first than of the
second. So each part has a share of its variance that is predicted, A and B; noise is added that is distributed as the
truths are, and each part is shrunk, such that predictions are calibrated (the expected truth, given all predictions, is
the prediction):

    z = sqrt(share) part + sqrt(1 - share) noise,    prediction = mean + sd (sqrt(A) z_mean + sqrt(B) z_deviation).

``r2`` is what this explains in all, A v + B (1 - v) where v is the variance of the mean; B is ``within_r2``, by default
the same, and A is what then is missing. Like the paper's predictors, the realistic one names a bucket, a fifth of all
requests each, and predicts the mean of that bucket; the R^2 given is that of the bucket. The means are those of a
normal variate; scores have heavier tails, so of the .10 that is asked .09 remains, and they are 5 % too far apart.

Lengths are predicted as logarithms. The router is told the expected number of tokens, which is more than the
exponential of the expected logarithm: the mean of a lognormal cut off at ``max_output_tokens``. Generated lengths are
such lognormals. Those of AlpacaEval's table fall off faster above their mean, so for them it is 5 to 12 % too high.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.scipy.special import ndtr

from qos_jax.errors import InputError
from qos_jax.workload import constants
from qos_jax.workload.content import Answers, RequestContent, correlated

NUM_BUCKETS = 5  # of equal probability
_EDGES = np.array([NormalDist().inv_cdf(i / NUM_BUCKETS) for i in range(1, NUM_BUCKETS)])
_EDGE_DENSITIES = np.array([0.0, *(NormalDist().pdf(edge) for edge in _EDGES), 0.0])
_CENTRES = -NUM_BUCKETS * np.diff(_EDGE_DENSITIES)  # mean of a standard normal within each bucket
_BUCKETED_SHARE = float(np.mean(_CENTRES**2))  # .897 of the variance survives


class Predictions(Protocol):
    """What says what a router is told."""

    def predict(self, key: Array, content: RequestContent, answers: Answers) -> tuple[Array, Array]:
        """Returns the predicted score [N] in [0, 1] and predicted tokens [N] of one request."""


@struct.dataclass
class TablePredictions:
    """What a trained predictor said of each prompt of a table, to go with the content of that table."""

    score: Array  # [M, N] in [0, 1]
    output_tokens: Array  # [M, N] tokens

    def predict(self, key: Array, content: RequestContent, answers: Answers) -> tuple[Array, Array]:
        """Returns the predictions for the row that was drawn."""
        del key, content
        return self.score[answers.row], self.output_tokens[answers.row]


@struct.dataclass
class PredictionModel:
    """How much of the truth the predictions hold; all numbers are traced, so that a sweep over them compiles once."""

    score_r2: Array | float  # [] share of a score's variance that is predicted
    log_length_r2: Array | float  # [] share of a log length's variance that is predicted
    bucketed: Array | bool = False  # [] name one of 5 buckets only; R^2 is .897 at most then
    score_within_r2: Array | float = math.nan  # [] the same share of what sets the experts apart on one prompt;
    log_length_within_r2: Array | float = math.nan  # [] that of all where it is NaN

    def predict(self, key: Array, content: RequestContent, answers: Answers) -> tuple[Array, Array]:
        """Returns the predicted score [N] in [0, 1] and predicted tokens [N] of one request; exact where R^2 is 1."""
        score, output_tokens = answers.score, answers.output_tokens
        num_experts = score.shape[-1]
        normals = jax.random.normal(key, (2 + 2 * num_experts,), score.dtype)
        score_noise = correlated(normals[0], normals[2 : 2 + num_experts], content.score_correlation)
        length_noise = correlated(normals[1], normals[2 + num_experts :], content.log_length_correlation)

        predicted_score = self._expected(
            score,
            (content.score_mean, content.score_sd, content.score_correlation),
            (self.score_r2, self.score_within_r2),
            score_noise,
        )
        log_length = self._expected(
            jnp.log(output_tokens.astype(score.dtype)),
            (content.log_length_mean, content.log_length_sd, content.log_length_correlation),
            (self.log_length_r2, self.log_length_within_r2),
            length_noise,
        )
        unexplained_sd = content.log_length_sd * jnp.sqrt(1.0 - self.log_length_r2)
        tokens = _capped_lognormal_mean(log_length, unexplained_sd, content.max_output_tokens)
        return (
            jnp.where(self.score_r2 < 1.0, jnp.clip(predicted_score, 0.0, 1.0), score),
            jnp.where(self.log_length_r2 < 1.0, tokens, output_tokens),
        )

    def _expected(
        self,
        truth: Array,
        law: tuple[Array, Array, Array],
        shares: tuple[Array | float, Array | float],
        noise: Array,
    ) -> Array:
        """Returns the calibrated prediction of a truth [N] with a mean [N], an SD [N] and a correlation []."""
        (mean, sd, correlation), (r2, within_r2) = law, shares
        within_r2 = jnp.where(jnp.isnan(within_r2), r2, within_r2)
        lost = jnp.where(self.bucketed, _BUCKETED_SHARE, 1.0)
        latent_r2, within = jnp.minimum(r2 / lost, 1.0), jnp.minimum(within_r2 / lost, 1.0)
        shared_variance = correlation + (1.0 - correlation) / truth.shape[-1]
        common = jnp.clip((latent_r2 - within * (1.0 - shared_variance)) / shared_variance, 0.0, 1.0)

        standard = (truth - mean) / jnp.maximum(sd, 1e-9)
        told = _seen(jnp.mean(standard, -1, keepdims=True), jnp.mean(noise, -1, keepdims=True), common)
        told += _seen(_deviation(standard), _deviation(noise), within)
        spread = jnp.sqrt(common * shared_variance + within * (1.0 - shared_variance))
        bucket = jnp.sum(told[..., None] > spread * _EDGES.astype(told.dtype), axis=-1)
        return mean + sd * jnp.where(self.bucketed, spread * jnp.asarray(_CENTRES, told.dtype)[bucket], told)


def _seen(truth: Array, noise: Array, share: Array) -> Array:
    """Returns the expected truth, given one of which a share of the variance is left and the rest is noise."""
    return jnp.sqrt(share) * (jnp.sqrt(share) * truth + jnp.sqrt(1.0 - share) * noise)


def _deviation(x: Array) -> Array:
    return x - jnp.mean(x, -1, keepdims=True)


def _capped_lognormal_mean(log_mean: Array, log_sd: Array, cap: Array) -> Array:
    """Returns the mean of min(exp(X), cap) for a normal X."""
    log_sd = jnp.maximum(log_sd, 1e-6)
    distance = (jnp.log(cap) - log_mean) / log_sd
    return jnp.exp(log_mean + log_sd**2 / 2.0) * ndtr(distance - log_sd) + cap * ndtr(-distance)


def parse_prediction(text: str) -> PredictionModel:
    """Builds a prediction model from its name.

    Args:
        text: ``realistic`` (what embeddings of the prompt were measured to give), ``perfect`` (the truth), ``none``
            (each expert's mean) or ``r2:SCORE:LENGTH`` with the two R^2, for instance ``r2:0.3:0.5``.

    Raises:
        InputError: if the text is none of these, or an R^2 is outside [0, 1].
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
        pass  # the same message as for numbers out of range
    raise InputError(
        f"prediction {text!r} is unknown; choose realistic, perfect, none or r2:SCORE:LENGTH with two numbers in [0, 1]"
    )
