"""The encoder: from an observation to embeddings of the arrived request and of the experts."""

from qos_jax.encoder.han import HAN, Embedding, HANConfig
from qos_jax.encoder.nodes import Nodes, nodes
from qos_jax.encoder.segment import segment_encode, to_graphs

__all__ = ["HAN", "Embedding", "HANConfig", "Nodes", "nodes", "segment_encode", "to_graphs"]
