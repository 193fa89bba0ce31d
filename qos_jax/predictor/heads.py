"""Heads: from an embedding of the prompt to what each expert's answer will be, a score or the logarithm of a length.

There are two forms, each with a proper loss. ``buckets`` names, as the paper does, the probability of each of a few
buckets, which hold equally many training values of that expert; the expected value follows from the buckets' means.
``regression`` predicts the value, in standard deviations from the expert's mean. Both start from what is known without
the prompt, the shares of the buckets or the mean, and learn only what differs from it.

A head is an ensemble of members with the same inputs. The experts of one member share all layers but the last.
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

Form = Literal["buckets", "regression"]

_POWERS = np.linspace(0.0, 1.5, 31)
_EMPTY = -1e9  # log share of a bucket that is not there; not minus infinity, which has no gradient


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Shape of a head."""

    form: Form = "buckets"
    hidden: tuple[int, ...] = (64,)  # widths of the shared layers; none for a linear model
    num_buckets: int = 5  # at most: where many values are equal, some fall together

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
          InputError: a field is out of range.
        """
        if self.form not in get_args(Form):
            raise InputError(f"form is {self.form!r}, must be one of {', '.join(get_args(Form))}")
        if not all(isinstance(width, int) and width >= 1 for width in self.hidden):
            raise InputError(f"hidden is {self.hidden}, must be whole numbers of at least 1")
        if not (isinstance(self.num_buckets, int) and self.num_buckets >= 2):
            raise InputError(f"num_buckets is {self.num_buckets}, must be a whole number of at least 2")

    @property
    def num_outputs(self) -> int:
        """Outputs of each expert."""
        return self.num_buckets if self.form == "buckets" else 1


class Network(nn.Module):
    """One member: shared layers, then the outputs of each expert, which are 0 at first."""

    config: HeadConfig
    num_experts: int

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """Returns outputs [..., N, K] for features [..., D] of about unit variance; K is ``num_outputs``."""
        for width in self.config.hidden:
            features = nn.gelu(nn.Dense(width)(features))
        shape = (self.num_experts, self.config.num_outputs)
        return nn.DenseGeneral(shape, kernel_init=nn.initializers.zeros)(features)


class Buckets(struct.PyTreeNode):
    """Quantile buckets of each expert's values; an expert with fewer than K has empty ones at the end."""

    edges: Array  # [N, K - 1], the largest value of each bucket but the last; infinite before empty ones
    means: Array  # [N, K] mean of the values in each
    amounts: Array  # [N, K] mean of what the values are a function of: scores themselves, tokens for log lengths
    log_shares: Array  # [N, K] logarithm of their shares

    def losses(self, outputs: Array, values: Array) -> Array:
        """Returns the cross-entropy [..., B, N] of outputs [..., B, N, K] given values [B, N]."""
        label = jax.nn.one_hot(bucket_of(self.edges, values), outputs.shape[-1])
        return -jnp.sum(label * jax.nn.log_softmax(outputs + self.log_shares), -1)


class Standard(struct.PyTreeNode):
    """Mean and spread of each expert's values, for regression."""

    means: Array  # [N]
    sds: Array  # [N], 1 where all values are equal
    of_logarithms: Array  # [] bool: values are logarithms of amounts
    ratio: Array  # [N] if so, the expected amount is ratio exp(power value), see ``fit_amounts``
    power: Array  # []

    def losses(self, outputs: Array, values: Array) -> Array:
        """Returns half the squared error [..., B, N], in SDs, of outputs [..., B, N, 1] given values [B, N]."""
        return 0.5 * jnp.square(outputs[..., 0] - (values - self.means) / self.sds)


class Forecast(struct.PyTreeNode):
    """What a head says of B prompts."""

    value: Array  # [B, N] expected value
    amount: Array  # [B, N] expected amount: of a score the score, of a log length the number of tokens
    probabilities: Array | None  # [B, N, K] of the buckets; None for regression


class Head(struct.PyTreeNode):
    """A fitted ensemble of R members for one quantity of N experts."""

    config: HeadConfig = struct.field(pytree_node=False)
    scale: Buckets | Standard
    weights: Any  # of Network, each leaf with a leading axis [R]

    def outputs(self, features: Array) -> Array:
        """Returns the outputs [R, B, N, K] of each member for features [B, D]."""
        network = Network(self.config, self.scale.means.shape[0])
        return jax.vmap(lambda weights: cast(Array, network.apply(weights, features)))(self.weights)

    def losses(self, features: Array, values: Array) -> Array:
        """Returns the loss [R, B, N] of each member."""
        return self.scale.losses(self.outputs(features), values)

    def forecast(self, features: Array) -> Forecast:
        """Returns what the ensemble says: the mean of its members' outputs is decoded."""
        return self.decode(self.outputs(features).mean(0))

    def decode(self, outputs: Array) -> Forecast:
        """Returns what outputs [B, N, K] say."""
        if isinstance(self.scale, Buckets):
            probabilities = jax.nn.softmax(outputs + self.scale.log_shares)
            value = jnp.sum(probabilities * self.scale.means, -1)
            return Forecast(value, jnp.sum(probabilities * self.scale.amounts, -1), probabilities)
        value = self.scale.means + self.scale.sds * outputs[..., 0]
        amount = self.scale.ratio * jnp.exp(self.scale.power * value)
        return Forecast(value, jnp.where(self.scale.of_logarithms, amount, value), None)


def bucket_edges(values: np.ndarray, num_buckets: int) -> np.ndarray:
    """Returns the edges [N, K - 1] of the quantile buckets of each column of values [M, N].

    An edge is a value and belongs to the bucket below it. Where it would be the largest value, it is the one before, so
    that no bucket is empty and a value that very many answers have, such as a score of 1, has a bucket of its own.
    Equal edges are dropped; infinite ones are put in their place.
    """
    quantiles = np.quantile(values, np.arange(1, num_buckets) / num_buckets, axis=0, method="inverted_cdf").T
    edges = np.full((values.shape[1], num_buckets - 1), np.inf, np.float32)
    for expert, (column, found) in enumerate(zip(values.T, quantiles, strict=True)):
        below_largest = column[column < column.max()].max(initial=-np.inf)
        distinct = np.unique(np.minimum(found, below_largest))
        edges[expert, : len(distinct)] = np.where(distinct > -np.inf, distinct, np.inf)
    return edges


def bucket_of(edges: Any, values: Any) -> Any:
    """Returns the bucket [..., N] of values [..., N], given the edges [N, K - 1]; NumPy if both are."""
    return (values.astype(np.float32)[..., None] > edges).sum(-1)


def fit_scale(config: HeadConfig, values: np.ndarray, amounts: np.ndarray | None = None) -> Buckets | Standard:
    """Returns the buckets, or mean and spread, of training values [M, N].

    Args:
      config: shape of the head.
      values: what is learned.
      amounts: [M, N] if the values are their logarithms; the values themselves without it.
    """
    if config.form == "regression":
        sds = values.std(0)
        sds, ones = np.where(sds > 0, sds, 1.0), np.ones(values.shape[1])
        of_logarithms = jnp.asarray(amounts is not None)
        return Standard(_float32(values.mean(0)), _float32(sds), of_logarithms, _float32(ones), jnp.ones(()))
    edges = bucket_edges(values, config.num_buckets)
    member = bucket_of(edges, values)[..., None] == np.arange(config.num_buckets)  # [M, N, K]
    count = member.sum(0)

    def mean_of(x: np.ndarray) -> Array:
        return _float32(np.sum(member * x[..., None], 0) / np.maximum(count, 1))

    with np.errstate(divide="ignore"):
        log_shares = np.log(count / len(values))
    means, amount_means = mean_of(values), mean_of(values if amounts is None else amounts)
    return Buckets(jnp.asarray(edges), means, amount_means, _float32(np.maximum(log_shares, _EMPTY)))


def fit_amounts(scale: Standard, predicted: np.ndarray, amounts: np.ndarray) -> Standard:
    """Fits expected amounts to amounts [M, N] and their predicted logarithms [M, N], of prompts not learned from.

    The exponential of an expected logarithm is too little, and how much too little differs: where long answers are
    expected, they vary less. So the power of all experts is that with the lowest deviance of Poisson's, a proper loss
    of means, and each expert's mean is right.
    """

    def fitted(power: float) -> tuple[float, np.ndarray]:
        told = np.exp(power * predicted.astype(np.float64))
        ratio = amounts.sum(0) / told.sum(0)
        return float(np.mean(ratio * told - amounts * np.log(ratio * told))), ratio

    power = min(_POWERS, key=lambda power: fitted(power)[0])
    return scale.replace(ratio=_float32(fitted(power)[1]), power=_float32(power))


def _float32(x: np.ndarray) -> Array:
    return jnp.asarray(x, jnp.float32)
