"""What the router is told of a request before it is served: predicted scores and output lengths, right in part.

A prediction is made from the truth by adding noise and shrinking towards the expert's mean, such that it is calibrated
(the expected truth, given the prediction, is the prediction) and explains a given share R^2 of the variance:

    z = sqrt(R^2) (truth - mean) / sd + sqrt(1 - R^2) noise,    prediction = mean + sqrt(R^2) sd z.

The noise correlates between experts as the truths do, so that the predictions for the others tell nearly nothing more
of an expert than its own. Like the paper's predictors, the realistic one names a bucket, a fifth of all requests each,
and predicts the mean of that bucket; the R^2 given is that of the bucket, not of the finer z. The means are those of a
normal z; scores have heavier tails, so of the .10 that is asked for them .09 remains, and they are 5 % too far apart.

Lengths are predicted as logarithms. The router is told the expected number of tokens, which is more than the
exponential of the expected logarithm: the mean of a lognormal cut off at ``max_output_tokens``. Generated lengths are
such lognormals. Those of AlpacaEval's table fall off faster above their mean, so for them it is 5 to 12 % too high.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.scipy.special import ndtr

from qos_jax.errors import InputError
from qos_jax.workload import calibration
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

    def predict(self, key: Array, content: RequestContent, answers: Answers) -> tuple[Array, Array]:
        """Returns the predicted score [N] in [0, 1] and predicted tokens [N] of one request; exact where R^2 is 1."""
        score, output_tokens = answers.score, answers.output_tokens
        num_experts = score.shape[-1]
        normals = jax.random.normal(key, (2 + 2 * num_experts,), score.dtype)
        score_noise = correlated(normals[0], normals[2 : 2 + num_experts], content.score_correlation)
        length_noise = correlated(normals[1], normals[2 + num_experts :], content.log_length_correlation)

        predicted_score = self._expected(score, content.score_mean, content.score_sd, self.score_r2, score_noise)
        log_length = self._expected(
            jnp.log(output_tokens.astype(score.dtype)),
            content.log_length_mean,
            content.log_length_sd,
            self.log_length_r2,
            length_noise,
        )
        unexplained_sd = content.log_length_sd * jnp.sqrt(1.0 - self.log_length_r2)
        tokens = _capped_lognormal_mean(log_length, unexplained_sd, content.max_output_tokens)
        return (
            jnp.where(self.score_r2 < 1.0, jnp.clip(predicted_score, 0.0, 1.0), score),
            jnp.where(self.log_length_r2 < 1.0, tokens, output_tokens),
        )

    def _expected(self, truth: Array, mean: Array, sd: Array, r2: Array | float, noise: Array) -> Array:
        """Returns the calibrated prediction of a truth [N]."""
        latent_r2 = jnp.where(self.bucketed, jnp.minimum(r2 / _BUCKETED_SHARE, 1.0), r2)
        standard = (truth - mean) / jnp.maximum(sd, 1e-9)
        z = jnp.sqrt(latent_r2) * standard + jnp.sqrt(1.0 - latent_r2) * noise
        bucket = jnp.sum(z[..., None] > _EDGES.astype(z.dtype), axis=-1)
        return mean + jnp.sqrt(latent_r2) * sd * jnp.where(self.bucketed, jnp.asarray(_CENTRES, z.dtype)[bucket], z)


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
    realistic_r2 = calibration.REALISTIC_SCORE_R2, calibration.REALISTIC_LOG_LENGTH_R2
    named = {
        "realistic": PredictionModel(*realistic_r2, bucketed=True),
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
