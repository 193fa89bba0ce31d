"""Heads: from an embedding of the prompt to the score, or the log length, of each expert's answer.

There are two forms, each with a proper loss. ``buckets`` predicts, as the paper does, the probability of each of a few
buckets, which hold equally many training values of the expert; the expected value follows from the buckets' means.
``regression`` predicts the value, in standard deviations from the expert's mean. Both start from the prediction without
a prompt (the shares of the buckets, or the mean) and learn the difference from it.

A head is an ensemble of members with the same inputs. In a member, all experts share all layers but the last.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax import Array

from qos_jax.errors import InputError
from qos_jax.io.text_files import shown

HeadForm = Literal["buckets", "regression"]

MAX_SIZE = 2**20  # of a width, and of numbers of buckets and members; products of three fit in 64 bits
_MAX_LAYERS = 100
_POWERS = np.linspace(0.0, 1.5, 31)
_EMPTY = -1e9  # log share of an empty bucket, instead of minus infinity, which has no gradient


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Shape of a head."""

    form: HeadForm = "buckets"
    hidden: tuple[int, ...] = (64,)  # widths of the shared layers; empty for a linear model
    num_buckets: int = 5  # K, at most: buckets with equal edges are merged

    def __post_init__(self) -> None:
        """Validates the fields.

        Raises:
          InputError: a field is out of range.
        """
        if self.form not in get_args(HeadForm):
            raise InputError(f"form is {self.form!r}, must be one of {', '.join(get_args(HeadForm))}")
        if not all(isinstance(width, int) and 1 <= width <= MAX_SIZE for width in self.hidden):
            raise InputError(f"hidden is {shown(self.hidden)}, must be whole numbers from 1 to {MAX_SIZE}")
        if len(self.hidden) > _MAX_LAYERS:
            raise InputError(f"hidden has {len(self.hidden)} layers, must have at most {_MAX_LAYERS}")
        if not (isinstance(self.num_buckets, int) and 2 <= self.num_buckets <= MAX_SIZE):
            raise InputError(f"num_buckets is {shown(self.num_buckets)}, must be a whole number from 2 to {MAX_SIZE}")

    @property
    def num_outputs(self) -> int:
        """Number of outputs of each expert."""
        return self.num_buckets if self.form == "buckets" else 1


class HeadNetwork(nn.Module):
    """One member: shared layers, then a layer with the outputs of each expert, initialised to 0."""

    config: HeadConfig
    num_experts: int

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """Returns outputs [..., N, K] for features [..., D] of about unit variance, with K ``num_outputs``."""
        for width in self.config.hidden:
            features = nn.gelu(nn.Dense(width)(features))
        shape = (self.num_experts, self.config.num_outputs)
        return nn.DenseGeneral(shape, kernel_init=nn.initializers.zeros)(features)


class Buckets(struct.PyTreeNode):
    """Quantile buckets of each expert's values; an expert with fewer than K buckets has empty ones at the end."""

    edges: Array  # [N, K - 1], the largest value of each bucket but the last; infinite before empty buckets
    means: Array  # [N, K] mean value in each bucket
    amounts: Array  # [N, K] mean amount in each bucket: the score itself, or tokens for log lengths
    log_shares: Array  # [N, K] logarithm of the share of each bucket

    def losses(self, outputs: Array, values: Array) -> Array:
        """Returns the cross-entropy [..., B, N] of outputs [..., B, N, K] given values [B, N]."""
        label = jax.nn.one_hot(bucket_of(self.edges, values), outputs.shape[-1])
        return -jnp.sum(label * jax.nn.log_softmax(outputs + self.log_shares), -1)


class Standard(struct.PyTreeNode):
    """Mean and spread of each expert's values, for regression."""

    means: Array  # [N]
    sds: Array  # [N], 1 where all values are equal
    of_logarithms: Array  # [] bool: values are logarithms of amounts
    ratio: Array  # [N] of the expected amount of a logarithm, ratio exp(power value); see ``fit_amounts``
    power: Array  # []

    def losses(self, outputs: Array, values: Array) -> Array:
        """Returns half the squared error [..., B, N], in SDs, of outputs [..., B, N, 1] given values [B, N]."""
        return 0.5 * jnp.square(outputs[..., 0] - (values - self.means) / self.sds)


class Forecast(struct.PyTreeNode):
    """Predictions of a head for B prompts."""

    value: Array  # [B, N] expected value
    amount: Array  # [B, N] expected amount: of a score the score, of a log length the number of tokens
    probabilities: Array | None  # [B, N, K] probability of each bucket; None for regression


class Head(struct.PyTreeNode):
    """A fitted ensemble of R members for one quantity of N experts."""

    config: HeadConfig = struct.field(pytree_node=False)
    scale: Buckets | Standard
    weights: Any  # of HeadNetwork, each leaf with a leading axis [R]

    def outputs(self, features: Array) -> Array:
        """Returns the outputs [R, B, N, K] of each member for features [B, D]."""
        network = HeadNetwork(self.config, self.scale.means.shape[0])
        return jax.vmap(lambda weights: cast(Array, network.apply(weights, features)))(self.weights)

    def losses(self, features: Array, values: Array) -> Array:
        """Returns the loss [R, B, N] of each member for features [B, D] and values [B, N]."""
        return self.scale.losses(self.outputs(features), values)

    def forecast(self, features: Array) -> Forecast:
        """Returns the predictions of the ensemble, from the mean of its members' outputs, for features [B, D]."""
        return self.decode(self.outputs(features).mean(0))

    def decode(self, outputs: Array) -> Forecast:
        """Returns the predictions for outputs [B, N, K]."""
        if isinstance(self.scale, Buckets):
            probabilities = jax.nn.softmax(outputs + self.scale.log_shares)
            value = jnp.sum(probabilities * self.scale.means, -1)
            return Forecast(value, jnp.sum(probabilities * self.scale.amounts, -1), probabilities)
        value = self.scale.means + self.scale.sds * outputs[..., 0]
        amount = self.scale.ratio * jnp.exp(self.scale.power * value)
        return Forecast(value, jnp.where(self.scale.of_logarithms, amount, value), None)


def bucket_edges(values: np.ndarray, num_buckets: int) -> np.ndarray:
    """Returns the edges [N, K - 1] of the quantile buckets of each column of values [M, N].

    An edge is a value and belongs to the bucket below it. An edge that would be the largest value is replaced by the
    next smaller value, so no bucket is empty, and a very common largest value, such as a score of 1, has its own
    bucket. Duplicate edges are replaced by infinite ones at the end.
    """
    quantiles = np.quantile(values, np.arange(1, num_buckets) / num_buckets, axis=0, method="inverted_cdf").T
    edges = np.full((values.shape[1], num_buckets - 1), np.inf, np.float32)
    for expert, (column, column_edges) in enumerate(zip(values.T, quantiles, strict=True)):
        below_largest = column[column < column.max()].max(initial=-np.inf)
        distinct = np.unique(np.minimum(column_edges, below_largest))
        edges[expert, : len(distinct)] = np.where(distinct > -np.inf, distinct, np.inf)
    return edges


def bucket_of(edges: Any, values: Any) -> Any:
    """Returns the bucket [..., N] of values [..., N], given edges [N, K - 1]; a NumPy array if both are."""
    return (values.astype(np.float32)[..., None] > edges).sum(-1)


def fit_scale(config: HeadConfig, values: np.ndarray, amounts: np.ndarray | None = None) -> Buckets | Standard:
    """Returns the buckets, or mean and spread, of training values.

    Args:
      config: shape of the head.
      values: [M, N] training values.
      amounts: [M, N] amounts of which the values are the logarithms; None if the values are the amounts.
    """
    if config.form == "regression":
        sds = values.std(0)
        sds, ones = np.where(sds > 0, sds, 1.0), np.ones(values.shape[1])
        of_logarithms = jnp.asarray(amounts is not None)
        return Standard(_float32(values.mean(0)), _float32(sds), of_logarithms, _float32(ones), jnp.ones(()))
    edges = bucket_edges(values, config.num_buckets)
    in_bucket = bucket_of(edges, values)[..., None] == np.arange(config.num_buckets)  # [M, N, K]
    count = in_bucket.sum(0)

    def mean_of(x: np.ndarray) -> Array:
        return _float32(np.sum(in_bucket * x[..., None], 0) / np.maximum(count, 1))

    with np.errstate(divide="ignore"):
        log_shares = np.log(count / len(values))
    means, amount_means = mean_of(values), mean_of(values if amounts is None else amounts)
    return Buckets(jnp.asarray(edges), means, amount_means, _float32(np.maximum(log_shares, _EMPTY)))


def fit_amounts(scale: Standard, predicted: np.ndarray, amounts: np.ndarray) -> Standard:
    """Fits the expected amount as a function of the predicted logarithm, on held-out prompts.

    The exponential of an expected logarithm is below the expected amount, by a factor that decreases with the expected
    length, because long answers vary less. All experts share the power with the lowest Poisson deviance, a proper loss
    of means, and each expert has the ratio that makes its mean correct.

    Args:
      scale: of the regression.
      predicted: [M, N] predicted logarithms.
      amounts: [M, N] true amounts.
    """

    def fit(power: float) -> tuple[float, np.ndarray]:
        unscaled = np.exp(power * predicted.astype(np.float64))
        ratio = amounts.sum(0) / unscaled.sum(0)
        return float(np.mean(ratio * unscaled - amounts * np.log(ratio * unscaled))), ratio

    power = min(_POWERS, key=lambda power: fit(power)[0])
    return scale.replace(ratio=_float32(fit(power)[1]), power=_float32(power))


def _float32(x: np.ndarray) -> Array:
    return jnp.asarray(x, jnp.float32)
