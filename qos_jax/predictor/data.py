"""Training data of predictors: prompts as texts or embeddings, with scores and output lengths of each LLM's answer.

Two formats are read. An ``.npz`` has the columns ``experts`` [N] and scores [M, N]. It may have ``out_tokens`` [M, N],
without which predictors learn no lengths, and ``prompt_emb_minilm`` [M, D]. The texts of its prompts may be in JSON
lines in another file, each with ``instruction`` and optionally ``input`` and ``prompt_id``. The other format is the
JSON lines of mix-instruct, which ``workload.tables`` reads. Tables are split by prompt, so no prompt is in both parts.
"""

from __future__ import annotations

import collections
import dataclasses
import os

import numpy as np

from qos_jax.errors import InputError
from qos_jax.io.files import names_in, numbers_in, read_columns
from qos_jax.io.text_files import json_lines, read_text
from qos_jax.workload.tables import check_scores, lengths_in, prompt_in, read_mix_instruct, split_rows

DEFAULT_SCORES = "quality_bertscore_minilm"
EMBEDDINGS = "prompt_emb_minilm"


@dataclasses.dataclass(frozen=True, eq=False)
class PredictionTable:
    """The answers of N LLMs to M prompts, as NumPy arrays that are validated on construction.

    Raises:
      InputError: shapes differ, an LLM is named twice, a score is outside [0, 1], a length is below 1 token, an
        embedding is not finite, a prompt is empty, or there are neither texts nor embeddings.
    """

    source: str  # the file that was read, for messages
    experts: tuple[str, ...]  # N names of LLMs
    score: np.ndarray  # [M, N] in [0, 1]
    output_tokens: np.ndarray | None  # [M, N] tokens
    texts: tuple[str, ...] | None  # M prompts
    embeddings: np.ndarray | None  # [M, D] of the prompts

    def __post_init__(self) -> None:
        """Validates the fields."""
        _check_experts(self.source, self.experts)
        shape = (len(self.score), len(self.experts))
        if 0 in shape or self.score.shape != shape:
            raise InputError(
                f"{self.source}: scores have the shape {self.score.shape}, "
                f"must be [prompts, experts] with {shape[1]} experts, none empty"
            )
        check_scores(self.source, self.experts, self.score)
        if self.output_tokens is not None:
            _check_tokens(self.source, self.output_tokens, shape)
        if self.texts is None and self.embeddings is None:
            raise InputError(f"{self.source}: has neither texts nor embeddings of its prompts, must have one of them")
        if self.texts is not None:
            _check_texts(self.source, self.texts, shape[0])
        if self.embeddings is not None:
            _check_embeddings(self.source, self.embeddings, shape[0])

    def __len__(self) -> int:
        """Returns the number of prompts M."""
        return len(self.score)

    def rows(self, rows: np.ndarray) -> PredictionTable:
        """Returns the table of the prompts with these indices, in this order."""
        return dataclasses.replace(
            self,
            score=self.score[rows],
            output_tokens=None if self.output_tokens is None else self.output_tokens[rows],
            texts=None if self.texts is None else tuple(self.texts[row] for row in rows),
            embeddings=None if self.embeddings is None else self.embeddings[rows],
        )

    def split_rows(self, test_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows (train, test) of a random partition of the prompts, the same as ``QualityTable.split``.

        Raises:
          InputError: a part is empty.
        """
        return split_rows(self.source, len(self), test_fraction, seed)

    def folds(self, count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns the rows (train, test) of each fold of a cross-validation; each prompt is in one test part.

        Raises:
          InputError: there are fewer than 2 folds, or more folds than prompts.
        """
        if not 2 <= count <= len(self):
            raise InputError(f"{self.source}: {count} folds of {len(self)} prompts, must be 2 to {len(self)} folds")
        number = fold_numbers(len(self), count, seed)
        return [(np.flatnonzero(number != fold), np.flatnonzero(number == fold)) for fold in range(count)]


def fold_numbers(num_prompts: int, count: int, seed: int) -> np.ndarray:
    """Returns a random fold for each prompt [M]; the sizes of the folds differ by at most one prompt."""
    return np.random.default_rng(seed).permutation(np.arange(num_prompts) % count)


def read_prediction_table(
    path: str | os.PathLike[str], score_column: str | None = None, prompts: str | os.PathLike[str] | None = None
) -> PredictionTable:
    """Reads an ``.npz``, recognised by the end of its name, or the JSON lines of mix-instruct.

    Scores of an ``.npz`` are clipped to [0, 1], and an answer of 0 tokens counts as 1, as in ``workload.tables``.

    Args:
      path: the file.
      score_column: name of the column of an ``.npz``, or of the score of a candidate; by default
        ``quality_bertscore_minilm`` and ``bertscore``.
      prompts: JSON lines with the texts of an ``.npz``, see the module. They are matched by ``prompt_id`` if both files
        have it, else by order.

    Raises:
      InputError: a file is missing or damaged, lacks a column, or holds an illegal value.
    """
    if str(path).endswith(".npz"):
        return _read_npz(path, score_column or DEFAULT_SCORES, prompts)
    if prompts is not None:
        raise InputError(f"prompts is {prompts}, must not be given, as {path} has texts of its own")
    table = read_mix_instruct(path, score_column or "bertscore")
    return PredictionTable(table.source, table.experts, table.score, table.output_tokens, table.prompts, None)


def _read_npz(
    path: str | os.PathLike[str], score_column: str, prompts: str | os.PathLike[str] | None
) -> PredictionTable:
    columns = read_columns(path, ("experts", score_column), ("out_tokens", EMBEDDINGS, "prompt_id"))
    tokens, embeddings = (columns.get(name) for name in ("out_tokens", EMBEDDINGS))
    ids = names_in(path, "prompt_id", columns["prompt_id"]) if "prompt_id" in columns else None
    experts = names_in(path, "experts", columns["experts"])
    return PredictionTable(
        source=str(path),
        experts=experts,
        score=np.clip(numbers_in(path, score_column, columns[score_column]).astype(np.float64), 0.0, 1.0),
        output_tokens=None if tokens is None else np.maximum(lengths_in(path, "out_tokens", tokens, experts), 1),
        texts=None if prompts is None else _read_texts(prompts, ids),
        embeddings=None if embeddings is None else numbers_in(path, EMBEDDINGS, embeddings).astype(np.float32),
    )


def _read_texts(path: str | os.PathLike[str], ids: tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the texts of JSON lines in the order of the ids, or in the file's order if either has no ids."""
    texts: list[str] = []
    found: list[str] = []
    for where, record in json_lines(read_text(path), path):
        texts.append(prompt_in(where, record, ("instruction",)))
        if record.get("prompt_id") is not None:
            found.append(str(record["prompt_id"]))
    if ids is None or len(found) < len(texts):
        return tuple(texts)
    by_id = dict(zip(found, texts, strict=True))
    if len(by_id) < len(found):
        twice = next(prompt_id for prompt_id, count in collections.Counter(found).items() if count > 1)
        raise InputError(f"{path}: the prompt_id {twice} is in several lines, must be in one")
    if missing := [prompt_id for prompt_id in ids if prompt_id not in by_id]:
        raise InputError(f"{path}: no line has the prompt_id {missing[0]} ({len(missing)} missing in total)")
    return tuple(by_id[prompt_id] for prompt_id in ids)


def _check_experts(source: str, experts: tuple[str, ...]) -> None:
    if len(set(experts)) != len(experts):
        raise InputError(f"{source}: experts are {', '.join(experts)}, must be different names")


def _check_tokens(source: str, output_tokens: np.ndarray, shape: tuple[int, int]) -> None:
    if output_tokens.shape != shape:
        raise InputError(
            f"{source}: output tokens have the shape {output_tokens.shape}, must have that of the scores, {shape}"
        )
    if not (np.isfinite(output_tokens).all() and output_tokens.min() >= 1):
        raise InputError(f"{source}: a length is {output_tokens.min():g} tokens, must be finite and at least 1")


def _check_texts(source: str, texts: tuple[str, ...], num_prompts: int) -> None:
    if len(texts) != num_prompts:
        raise InputError(f"{source}: {len(texts)} texts for {num_prompts} prompts, must be one for each")
    for row, text in enumerate(texts):
        if not text.strip():
            raise InputError(f"{source}: prompt {row} is {text!r}, must not be empty")


def _check_embeddings(source: str, embeddings: np.ndarray, num_prompts: int) -> None:
    if embeddings.ndim != 2 or len(embeddings) != num_prompts or embeddings.shape[1] == 0:
        raise InputError(
            f"{source}: embeddings have the shape {embeddings.shape}, must be [prompts, D] with {num_prompts} prompts"
        )
    if not np.isfinite(embeddings).all():
        row = np.flatnonzero(~np.isfinite(embeddings).all(1))[0]
        raise InputError(f"{source}: the embedding of prompt {row} has an entry that is not finite, must be finite")
