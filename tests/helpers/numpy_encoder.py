"""A reference implementation of BERT and DistilBERT: float64, token by token, on the tensors of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]

_erf = np.vectorize(math.erf, otypes=[float])


def numpy_embedding(tensors: Tensors, config: Mapping[str, Any], ids: Sequence[int]) -> np.ndarray:
    """Returns the embedding [D]: the mean of the states, scaled to unit length."""
    mean = numpy_states(tensors, config, ids).mean(0)
    return mean / math.sqrt(mean @ mean)


def numpy_states(tensors: Tensors, config: Mapping[str, Any], ids: Sequence[int]) -> np.ndarray:
    """Returns the states [T, D] of a text without padding."""
    eps = config.get("layer_norm_eps", 1e-12)
    words, positions = (tensors[f"embeddings.{kind}_embeddings.weight"].astype(float) for kind in ("word", "position"))
    states = words[list(ids)] + positions[: len(ids)]
    if config["model_type"] == "bert":
        states = states + tensors["embeddings.token_type_embeddings.weight"][0]
    states = _norm(tensors, "embeddings.LayerNorm", states, eps)
    layer = _bert_layer if config["model_type"] == "bert" else _distilbert_layer
    for number in range(config.get("num_hidden_layers") or config["n_layers"]):
        states = layer(tensors, config, number, states)
    return states


def _bert_layer(tensors: Tensors, config: Mapping[str, Any], number: int, states: np.ndarray) -> np.ndarray:
    at, eps = f"encoder.layer.{number}.", config["layer_norm_eps"]
    query, key, value = (_linear(tensors, f"{at}attention.self.{x}", states) for x in ("query", "key", "value"))
    read = _attention(query, key, value, config["num_attention_heads"])
    read = _linear(tensors, f"{at}attention.output.dense", read)
    states = _norm(tensors, f"{at}attention.output.LayerNorm", states + read, eps)
    inner = _gelu(_linear(tensors, f"{at}intermediate.dense", states))
    return _norm(tensors, f"{at}output.LayerNorm", states + _linear(tensors, f"{at}output.dense", inner), eps)


def _distilbert_layer(tensors: Tensors, config: Mapping[str, Any], number: int, states: np.ndarray) -> np.ndarray:
    at, eps = f"transformer.layer.{number}.", 1e-12
    query, key, value = (_linear(tensors, f"{at}attention.{x}_lin", states) for x in "qkv")
    read = _linear(tensors, f"{at}attention.out_lin", _attention(query, key, value, config["n_heads"]))
    states = _norm(tensors, f"{at}sa_layer_norm", read + states, eps)
    inner = _gelu(_linear(tensors, f"{at}ffn.lin1", states))
    return _norm(tensors, f"{at}output_layer_norm", _linear(tensors, f"{at}ffn.lin2", inner) + states, eps)


def _attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, num_heads: int) -> np.ndarray:
    width = query.shape[1] // num_heads
    read = np.zeros_like(value)
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        for token in range(len(query)):
            weights = np.exp(key[:, part] @ query[token, part] / math.sqrt(width))
            read[token, part] = weights @ value[:, part] / weights.sum()
    return read


def _linear(tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    return x @ tensors[f"{name}.weight"].astype(float).T + tensors[f"{name}.bias"]


def _norm(tensors: Tensors, name: str, x: np.ndarray, eps: float) -> np.ndarray:
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + eps)
    return x * tensors[f"{name}.weight"].astype(float) + tensors[f"{name}.bias"]


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * (1.0 + _erf(x / math.sqrt(2.0))) / 2.0
