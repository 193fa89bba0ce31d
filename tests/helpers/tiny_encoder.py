"""Small checkpoints with random weights in Hugging Face's format, so that tests need no download."""

from __future__ import annotations

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file
from tokenizers.implementations import BertWordPieceTokenizer

HIDDEN, LAYERS, HEADS, INTERMEDIATE, POSITIONS = 16, 2, 4, 24, 64
MAX_TOKENS = 48
_TEXT = (
    "a an and answer apple bake big blue book bread can cat code cold count day do dog draw eat explain fast "
    "find fox give green how i in is it learn list long make my new of old on one plan poem red river run short "
    "sing slow story sum tell the to tree two what why with write you"
)
WORDS = tuple(_TEXT.split())  # a text of these words has no unknown token
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s", "##ing", "##er", ".", ",", "?", "é", "e")


def write_tiny_encoder(folder: pathlib.Path, layout: str = "bert", seed: int = 0, prefix: str = "") -> pathlib.Path:
    """Writes the checkpoint of an encoder, with both tokenizer.json and vocab.txt.

    Args:
      folder: to create.
      layout: "bert" or "distilbert".
      seed: of the weights.
      prefix: of the name of every tensor, such as "bert.".

    Returns:
      The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[layout]), encoding="utf-8")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": MAX_TOKENS}), encoding="utf-8")
    tensors = tiny_tensors(layout, seed)
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    BertWordPieceTokenizer({word: i for i, word in enumerate(VOCABULARY)}).save(str(folder / "tokenizer.json"))
    return folder


def tiny_tensors(layout: str, seed: int) -> dict[str, np.ndarray]:
    """Returns random tensors by their names in the layout, including some that an encoder does not need."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        tensors[f"{name}.weight"] = rng.normal(0.0, inputs**-0.5, (outputs, inputs))
        tensors[f"{name}.bias"] = rng.normal(0.0, 0.1, outputs)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = rng.normal(1.0, 0.2, HIDDEN)
        tensors[f"{name}.bias"] = rng.normal(0.0, 0.2, HIDDEN)

    names = _BERT if layout == "bert" else _DISTILBERT
    tensors["embeddings.word_embeddings.weight"] = rng.normal(0.0, 0.5, (len(VOCABULARY), HIDDEN))
    tensors["embeddings.position_embeddings.weight"] = rng.normal(0.0, 0.5, (POSITIONS, HIDDEN))
    if layout == "bert":
        tensors["embeddings.token_type_embeddings.weight"] = rng.normal(0.0, 0.5, (2, HIDDEN))
        linear("pooler.dense", HIDDEN, HIDDEN)
    norm("embeddings.LayerNorm")
    for layer in range(LAYERS):
        for name in names["square"]:
            linear(names["layer"].format(layer) + name, HIDDEN, HIDDEN)
        linear(names["layer"].format(layer) + names["inner"], HIDDEN, INTERMEDIATE)
        linear(names["layer"].format(layer) + names["outer"], INTERMEDIATE, HIDDEN)
        for name in names["norms"]:
            norm(names["layer"].format(layer) + name)
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    return tensors | {"embeddings.position_ids": np.arange(POSITIONS)[None]}


CONFIGS = {
    "bert": {
        "model_type": "bert",
        "vocab_size": len(VOCABULARY),
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
    },
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": len(VOCABULARY),
        "dim": HIDDEN,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "hidden_dim": INTERMEDIATE,
        "max_position_embeddings": POSITIONS,
        "activation": "gelu",
        "sinusoidal_pos_embds": False,
    },
}

_BERT = {
    "layer": "encoder.layer.{}.",
    "square": ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"],
    "inner": "intermediate.dense",
    "outer": "output.dense",
    "norms": ["attention.output.LayerNorm", "output.LayerNorm"],
}
_DISTILBERT = {
    "layer": "transformer.layer.{}.",
    "square": ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"],
    "inner": "ffn.lin1",
    "outer": "ffn.lin2",
    "norms": ["sa_layer_norm", "output_layer_norm"],
}
