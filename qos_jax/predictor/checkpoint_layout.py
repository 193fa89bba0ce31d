"""How Hugging Face's folders of BERT and DistilBERT name settings and tensors."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from qos_jax.errors import InputError
from qos_jax.predictor.encoder import EncoderConfig


@dataclasses.dataclass(frozen=True)
class CheckpointLayout:
    """Names of the settings and tensors of a family of models."""

    model_type: str
    architecture: str
    fields: Mapping[str, str]  # field of EncoderConfig -> key of config.json
    supported: Mapping[str, Any]  # key of config.json -> its only supported value, which is also its default
    modules: Mapping[str, str]  # module of TextEncoder -> module of the checkpoint
    layer: str  # prefix of the modules of a layer
    layer_modules: Mapping[str, str]

    def config(self, path: pathlib.Path, settings: Mapping[str, Any]) -> EncoderConfig:
        """Returns the sizes of a model.

        Raises:
          InputError: a setting of the config.json at ``path`` is missing, of another type or not supported.
        """
        for key, value in self.supported.items():
            if settings.get(key, value) != value:
                raise InputError(f"{path}: {key} is {settings[key]!r}, only {value!r} is supported")
        values: dict[str, Any] = {"num_token_types": 0}
        for field, key in self.fields.items():
            values[field] = settings.get(key)
            kind = float if field == "layer_norm_eps" else int
            if type(values[field]) is not kind:  # not isinstance, as a bool is an int
                raise InputError(f"{path}: {key} is {values[field]!r}, must be of type {kind.__name__}")
        try:
            return EncoderConfig(**values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def settings(self, config: EncoderConfig) -> dict[str, Any]:
        """Returns the content of config.json."""
        kind = {"model_type": self.model_type, "architectures": [self.architecture]}
        return kind | {key: getattr(config, field) for field, key in self.fields.items()} | dict(self.supported)

    def tensor_name(self, path: tuple[str, ...]) -> str:
        """Returns the name of a weight without prefix; its path ends with kernel, scale, embedding or bias."""
        *modules, leaf = path
        if len(modules) == 2:
            number = modules[0].removeprefix("layer_")
            module = self.layer.format(number) + self.layer_modules[modules[1]]
        else:
            module = self.modules[modules[0]]
        return f"{module}.{'bias' if leaf == 'bias' else 'weight'}"


BERT = CheckpointLayout(
    model_type="bert",
    architecture="BertModel",
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "num_token_types": "type_vocab_size",
        "layer_norm_eps": "layer_norm_eps",
    },
    supported={"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False},
    modules={
        "word_embedding": "embeddings.word_embeddings",
        "position_embedding": "embeddings.position_embeddings",
        "token_type_embedding": "embeddings.token_type_embeddings",
        "embedding_norm": "embeddings.LayerNorm",
    },
    layer="encoder.layer.{}.",
    layer_modules={
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
        "output_norm": "output.LayerNorm",
    },
)
DISTILBERT = CheckpointLayout(
    model_type="distilbert",
    architecture="DistilBertModel",
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "dim",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "max_positions": "max_position_embeddings",
    },
    supported={"activation": "gelu"},
    modules={
        "word_embedding": "embeddings.word_embeddings",
        "position_embedding": "embeddings.position_embeddings",
        "embedding_norm": "embeddings.LayerNorm",
    },
    layer="transformer.layer.{}.",
    layer_modules={
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "attention_output": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "intermediate": "ffn.lin1",
        "output": "ffn.lin2",
        "output_norm": "output_layer_norm",
    },
)


def layout_of(path: pathlib.Path, settings: Mapping[str, Any]) -> CheckpointLayout:
    """Returns the layout that a config.json names.

    Raises:
      InputError: the model is of another kind.
    """
    for layout in (BERT, DISTILBERT):
        if settings.get("model_type") == layout.model_type:
            return layout
    raise InputError(f"{path}: model_type is {settings.get('model_type')!r}, must be 'bert' or 'distilbert'")
