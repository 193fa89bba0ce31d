"""Small tables with a known predictable share of scores and lengths."""

from __future__ import annotations

import json
import pathlib

import numpy as np

from qos_jax.predictor.data import PredictionTable
from tests.helpers.tiny_encoder import WORDS

EXPERTS = ("small", "medium", "large")
LENGTH_SD = 0.8  # of log lengths
_SIZE = 8  # of embeddings


def made_up_table(num_prompts: int = 60, r2: float = 0.5, seed: int = 0, with_lengths: bool = True) -> PredictionTable:
    """Returns a table whose embeddings explain this share of the variance of scores and of log lengths.

    Each expert depends on one direction of the embedding, plus normal noise; scores have the SD 0.1.
    """
    rng = np.random.default_rng(seed)
    num_experts = len(EXPERTS)
    embeddings = rng.normal(size=(num_prompts, _SIZE)).astype(np.float32)

    def standard(offset: int) -> np.ndarray:
        predictable = embeddings[:, offset : offset + num_experts]
        return r2**0.5 * predictable + (1.0 - r2) ** 0.5 * rng.normal(size=predictable.shape)

    score = np.clip(np.array([0.4, 0.5, 0.6]) + 0.1 * standard(0), 0.0, 1.0)
    output_tokens = np.maximum(1, np.exp(np.array([4.0, 5.0, 5.5]) + LENGTH_SD * standard(num_experts))).astype(int)
    texts = tuple(" ".join(rng.choice(WORDS, rng.integers(1, 13))) for _ in range(num_prompts))
    return PredictionTable("made up", EXPERTS, score, output_tokens if with_lengths else None, texts, embeddings)


def write_npz(path: pathlib.Path, table: PredictionTable, **changes: np.ndarray | None) -> pathlib.Path:
    """Writes the columns of a table; a change to None leaves a column out."""
    columns = {
        "experts": np.array(table.experts),
        "quality": table.score,
        "out_tokens": table.output_tokens,
        "prompt_emb_minilm": table.embeddings,
        "prompt_id": np.arange(len(table)) + 100,
    } | changes
    np.savez(path, **{name: column for name, column in columns.items() if column is not None})
    return path


def write_prompts(path: pathlib.Path, texts: list[str] | tuple[str, ...], ids: bool = True) -> pathlib.Path:
    """Writes the texts as JSON lines, in reverse order if they have ids."""
    records = [({"prompt_id": 100 + i} if ids else {}) | {"instruction": text} for i, text in enumerate(texts)]
    lines = [json.dumps(record) for record in (reversed(records) if ids else records)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_mix_instruct(path: pathlib.Path, table: PredictionTable) -> pathlib.Path:
    """Writes a table in mix-instruct's format; an answer has as many words as the table has tokens for it."""
    lines = []
    for row in range(len(table)):
        candidates = [
            {"model": name, "text": "word" * table.output_tokens[row, n], "scores": {"bertscore": table.score[row, n]}}
            for n, name in enumerate(table.experts)
        ]
        lines.append(json.dumps({"instruction": table.texts[row], "input": "", "candidates": candidates}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
