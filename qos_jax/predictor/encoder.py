"""The text encoder: a transformer of the BERT family (Devlin et al. 2019), from the tokens of a text to one vector.

The same network serves BERT, MiniLM (a small BERT) and DistilBERT (a BERT without token types). As in the published
BERT, layers are normalised after the residual connection, and GELU is exact. There is no pooler: a text is embedded by
the mean over its tokens, as sentence-transformers does with MiniLM. There is no dropout: the encoder is either frozen
or fine-tuned for a few epochs with early stopping.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from qos_jax.errors import InputError

_MAX_SIZE = 2**24  # of any field
_MAX_LAYERS = 100
_MASKED = -1e9  # instead of minus infinity, whose gradient is NaN if all tokens are masked


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the encoder.

    Raises:
      InputError: a size is out of range, or ``hidden_size`` is no multiple of ``num_heads``.
    """

    vocab_size: int
    hidden_size: int  # D, a multiple of num_heads
    num_layers: int
    num_heads: int
    intermediate_size: int  # width of the hidden layer after attention
    max_positions: int  # maximum number of tokens of a text
    num_token_types: int  # 0 for none, as in DistilBERT
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        """Validates the fields."""
        for name, value in dataclasses.asdict(self).items():
            min_size = 0 if name == "num_token_types" else 1
            if name != "layer_norm_eps" and not min_size <= value <= _MAX_SIZE:
                raise InputError(f"{name} is {value}, must be at least {min_size} and at most {_MAX_SIZE}")
        if self.num_layers > _MAX_LAYERS:
            raise InputError(f"num_layers is {self.num_layers}, must be at most {_MAX_LAYERS}")
        if not 0.0 < self.layer_norm_eps < 1.0:
            raise InputError(f"layer_norm_eps is {self.layer_norm_eps}, must lie between 0 and 1")
        if self.hidden_size % self.num_heads:
            raise InputError(f"hidden_size is {self.hidden_size}, must be a multiple of num_heads, {self.num_heads}")


class TextEncoder(nn.Module):
    """The transformer, without the pooling of its states by ``mean_pool``."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, token_ids: Array, mask: Array) -> Array:
        """Returns the states of the last layer [B, T, D].

        Args:
          token_ids: [B, T] int32.
          mask: [B, T] bool, False for padding, to which no token attends.
        """
        config = self.config
        states = nn.Embed(config.vocab_size, config.hidden_size, name="word_embedding")(token_ids)
        positions = jnp.arange(token_ids.shape[-1])
        states += nn.Embed(config.max_positions, config.hidden_size, name="position_embedding")(positions)
        if config.num_token_types:
            # A single text has the first token type.
            token_type = jnp.zeros(1, jnp.int32)
            states += nn.Embed(config.num_token_types, config.hidden_size, name="token_type_embedding")(token_type)
        states = nn.LayerNorm(config.layer_norm_eps, name="embedding_norm")(states)
        for layer in range(config.num_layers):
            states = _Layer(config, name=f"layer_{layer}")(states, mask)
        return states


class _Layer(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, states: Array, mask: Array) -> Array:
        config = self.config

        def dense(name: str, x: Array, width: int = config.hidden_size) -> Array:
            return nn.Dense(width, name=name)(x)

        def heads(name: str) -> Array:
            return dense(name, states).reshape(*states.shape[:-1], config.num_heads, -1).swapaxes(-2, -3)

        attended = _attend(heads("query"), heads("key"), heads("value"), mask)
        attended = attended.swapaxes(-2, -3).reshape(states.shape)
        attended = dense("attention_output", attended)
        states = nn.LayerNorm(config.layer_norm_eps, name="attention_norm")(states + attended)
        inner = nn.gelu(dense("intermediate", states, config.intermediate_size), approximate=False)
        return nn.LayerNorm(config.layer_norm_eps, name="output_norm")(states + dense("output", inner))


def _attend(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """Returns the attention over the tokens with mask [B, T]; all other arrays are [B, H, T, D / H].

    This order of axes, an additive mask, and normalising the result instead of the weights make attention over 256
    tokens 4 times as fast on a CPU as the usual formulation.
    """
    logits = query / query.shape[-1] ** 0.5 @ key.swapaxes(-1, -2) + jnp.where(mask, 0.0, _MASKED)[:, None, None, :]
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    return weights @ value / weights.sum(-1, keepdims=True)


def mean_pool(states: Array, mask: Array) -> Array:
    """Returns the mean of the states [B, T, D] over the tokens with mask [B, T], scaled to unit length, [B, D]."""
    count = jnp.maximum(jnp.sum(mask, -1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(mask[..., None], states, 0.0), -2) / count
    squared_length = jnp.sum(jnp.square(mean), -1, keepdims=True)
    return mean / jnp.sqrt(jnp.maximum(squared_length, 1e-24))
