"""Quality tables: the length and score of each LLM's answer to real prompts, read from files and sampled by row.

Two formats are read. An ``.npz`` has the columns ``experts`` [N], ``prompt_tokens`` [M], ``out_tokens`` [M, N] and a
column of scores [M, N]. The JSON lines of mix-instruct each have ``instruction``, ``input`` and ``candidates``, a list
of ``{model, text, scores: {bertscore, ...}}``. Scores must lie in [0, 1]; BERTScore and ROUGE do, BARTScore does not.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from qos_jax.errors import InputError
from qos_jax.io.files import names_in, numbers_in, read_columns
from qos_jax.io.text_files import json_lines, number_or_nan, read_text, shown
from qos_jax.workload.content import LatencyLimits, SampledContent, latency_limits

_MAX_TOKENS = 2**24 - 1  # of an answer or a prompt


@struct.dataclass
class TableContent:
    """Contents sampled uniformly from the rows of a table; `QualityTable.content` builds them."""

    prompt_tokens: Array  # [M] int32 tokens
    output_tokens: Array  # [M, N] int32 tokens
    score: Array  # [M, N] in [0, 1]
    score_mean: Array  # [N]
    score_sd: Array  # [N]
    log_length_mean: Array  # [N] of the natural logarithm of the output tokens
    log_length_sd: Array  # [N]
    score_correlation: Array  # [] between two experts, mean of all pairs
    log_length_correlation: Array  # [] between two experts, mean of all pairs
    max_output_tokens: Array  # [N] tokens, the longest answer of each expert
    limits: LatencyLimits

    def sample(self, key: Array) -> SampledContent:
        """Samples a row and a latency limit."""
        row_key, user_key = jax.random.split(key)
        row = jax.random.randint(row_key, (), 0, self.prompt_tokens.shape[0])
        limit_s, further = self.limits.at(jax.random.uniform(user_key))
        return SampledContent(self.prompt_tokens[row], self.output_tokens[row], self.score[row], limit_s, row, further)


@dataclasses.dataclass(frozen=True, eq=False)
class QualityTable:
    """The answers of N LLMs to M prompts, as NumPy arrays that are validated on construction.

    Raises:
        InputError: shapes differ, an LLM is named twice, a length is no whole number from 1 to 2**24 - 1 tokens, or a
            score is outside [0, 1].
    """

    source: str  # the file that was read, for messages
    experts: tuple[str, ...]  # N names of LLMs
    prompt_tokens: np.ndarray  # [M] int32 tokens
    output_tokens: np.ndarray  # [M, N] int32 tokens
    score: np.ndarray  # [M, N] in [0, 1]
    prompts: tuple[str, ...] | None = None  # M texts

    def __post_init__(self) -> None:
        """Validates the fields."""
        for name in ("prompt_tokens", "output_tokens", "score"):
            object.__setattr__(self, name, np.asarray(getattr(self, name)))
        shape = (self.prompt_tokens.size, len(self.experts))
        if 0 in shape or self.prompt_tokens.ndim != 1 or self.output_tokens.shape != shape or self.score.shape != shape:
            raise InputError(
                f"{self.source}: {shape[1]} experts and {shape[0]} prompts, but output tokens have the shape "
                f"{self.output_tokens.shape} and scores {self.score.shape}; both must be [prompts, experts], none empty"
            )
        if self.prompts is not None and len(self.prompts) != shape[0]:
            raise InputError(f"{self.source}: {len(self.prompts)} texts for {shape[0]} prompts, must be one for each")
        if len(set(self.experts)) != shape[1]:
            raise InputError(f"{self.source}: experts are {', '.join(self.experts)}, must be different names")
        for name in ("prompt_tokens", "output_tokens"):
            lengths = lengths_in(self.source, name, getattr(self, name), self.experts, least=1)
            object.__setattr__(self, name, lengths)
        object.__setattr__(self, "score", numbers_in(self.source, "score", self.score))
        check_scores(self.source, self.experts, self.score)

    def select(self, experts: Sequence[str]) -> QualityTable:
        """Returns the table of some LLMs, in the given order.

        Raises:
            InputError: no LLM is given, or one is not in the table.
        """
        unknown = [name for name in experts if name not in self.experts]
        if unknown or len(experts) == 0:
            problem = f"experts {unknown} are unknown" if unknown else "there are no experts"
            raise InputError(f"{self.source}: {problem}; choose from {', '.join(self.experts)}")
        columns = [self.experts.index(name) for name in experts]
        return dataclasses.replace(
            self,
            experts=tuple(experts),
            output_tokens=self.output_tokens[:, columns],
            score=self.score[:, columns],
        )

    def split(self, test_fraction: float, seed: int) -> tuple[QualityTable, QualityTable]:
        """Returns the tables (train, test) of a random partition of the prompts.

        Raises:
            InputError: a part is empty.
        """
        train, test = split_rows(self.source, len(self.prompt_tokens), test_fraction, seed)
        return self._rows(train), self._rows(test)

    def content(self, limits: LatencyLimits | None = None) -> TableContent:
        """Returns contents sampled from this table, by default with the limits `latency_limits()`."""
        log_length = np.log(self.output_tokens)
        return TableContent(
            prompt_tokens=jnp.asarray(self.prompt_tokens, jnp.int32),
            output_tokens=jnp.asarray(self.output_tokens, jnp.int32),
            score=jnp.asarray(self.score, float),
            score_mean=jnp.asarray(self.score.mean(0), float),
            score_sd=jnp.asarray(self.score.std(0), float),
            log_length_mean=jnp.asarray(log_length.mean(0), float),
            log_length_sd=jnp.asarray(log_length.std(0), float),
            score_correlation=jnp.asarray(_pair_correlation(self.score), float),
            log_length_correlation=jnp.asarray(_pair_correlation(log_length), float),
            max_output_tokens=jnp.asarray(self.output_tokens.max(0), float),
            limits=latency_limits() if limits is None else limits,
        )

    def _rows(self, rows: np.ndarray) -> QualityTable:
        return dataclasses.replace(
            self,
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            score=self.score[rows],
            prompts=None if self.prompts is None else tuple(self.prompts[row] for row in rows),
        )


def check_scores(source: str, experts: Sequence[str], score: np.ndarray) -> None:
    """Checks the scores [M, N] of a table.

    Raises:
        InputError: a score is outside [0, 1] or NaN.
    """
    bad = ~((score >= 0.0) & (score <= 1.0))  # also where a score is NaN
    if bad.any():
        row, expert = np.argwhere(bad)[0]
        raise InputError(
            f"{source}: score {score[row, expert]:g} of {experts[expert]} for prompt {row} "
            f"({bad.sum()} illegal scores in total), must lie in [0, 1]"
        )


def split_rows(source: str, num_prompts: int, test_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows (train, test) of a random partition of the prompts, both ascending.

    Args:
        source: the file, for messages.
        num_prompts: M.
        test_fraction: share of the prompts in the test part.
        seed: of the partition.

    Raises:
        InputError: a part is empty.
    """
    num_test = round(test_fraction * num_prompts)
    if not 0 < num_test < num_prompts:
        raise InputError(
            f"{source}: test_fraction {test_fraction:g} of {num_prompts} prompts leaves a part empty; "
            "both parts must have prompts"
        )
    order = np.random.default_rng(seed).permutation(num_prompts)
    return np.sort(order[num_test:]), np.sort(order[:num_test])


def _pair_correlation(columns: np.ndarray) -> float:
    """Returns the mean correlation over all pairs of columns [M, N]; 0 if it is negative or there is no pair."""
    experts = columns.shape[1]
    standard = (columns - columns.mean(0)) / np.maximum(columns.std(0), 1e-12)
    return float(np.clip((standard.sum(1).var() - experts) / max(experts * (experts - 1), 1), 0.0, 1.0))


def read_npz(path: str | os.PathLike[str], score_column: str, clip_scores: bool = False) -> QualityTable:
    """Reads a table from an ``.npz``; an answer of 0 tokens counts as 1, as the end of an answer is a token.

    Args:
        path: the file; the module describes its columns.
        score_column: name of the column of scores.
        clip_scores: clip scores to [0, 1]. A similarity of embeddings, such as AlpacaEval's
            ``quality_bertscore_minilm``, needs that: 5 of its 9,660 scores are negative and 37 exceed 1 by rounding.

    Raises:
        InputError: the file is missing or damaged, lacks a column, or holds an illegal value.
    """
    columns = read_columns(path, ("experts", "prompt_tokens", "out_tokens", score_column))
    experts = names_in(path, "experts", columns["experts"])
    score = numbers_in(path, score_column, columns[score_column])
    return QualityTable(
        source=str(path),
        experts=experts,
        prompt_tokens=lengths_in(path, "prompt_tokens", columns["prompt_tokens"], least=1),
        output_tokens=np.maximum(lengths_in(path, "out_tokens", columns["out_tokens"], experts), 1),
        score=np.clip(score, 0.0, 1.0) if clip_scores else score,
    )


def lengths_in(
    path: str | os.PathLike[str], name: str, column: np.ndarray, experts: Sequence[str] = (), least: int = 0
) -> np.ndarray:
    """Returns a column of lengths [M] or [M, N] as int32 tokens.

    Args:
      path: the file, for messages.
      name: of the column.
      column: the lengths.
      experts: names of the N experts, for messages.
      least: the smallest legal length.

    Raises:
      InputError: a length is no whole number or out of range; a negative one may stand for a missing answer.
    """
    lengths = numbers_in(path, name, column)
    bad = ~((lengths >= least) & (lengths <= _MAX_TOKENS) & (lengths == np.floor(lengths)))
    if bad.any():
        row, *expert = np.argwhere(bad)[0]
        of = f" of {experts[expert[0]]}" if expert and expert[0] < len(experts) else ""
        raise InputError(
            f"{path}: column {name} has a length of {lengths[row, *expert]:g} tokens{of} for prompt {row} "
            f"({bad.sum()} illegal lengths in total), must be a whole number from {least} to {_MAX_TOKENS}"
        )
    return lengths.astype(np.int32)


def read_table(path: str, score_column: str | None = None) -> QualityTable:
    """Reads a table by the ending of its name: ``.npz``, whose scores are clipped to [0, 1], else mix-instruct.

    Raises:
        InputError: the file is not in its format.
    """
    if path.endswith(".npz"):
        return read_npz(path, score_column or "quality_bertscore_minilm", clip_scores=True)
    return read_mix_instruct(path, score_column or "bertscore")


def read_tables(paths: Sequence[str], score_column: str | None = None) -> QualityTable:
    """Reads one table, or several as one; see ``read_table`` and ``joined``.

    Raises:
        InputError: a file is not in its format, or the tables have no LLM in common.
    """
    tables = [read_table(path, score_column) for path in paths]
    return tables[0] if len(tables) == 1 else joined(tables)


def joined(tables: Sequence[QualityTable]) -> QualityTable:
    """Returns the prompts of several tables, such as tasks of several kinds, as one of the LLMs that all tables have.

    Texts are kept if all tables have them.

    Raises:
        InputError: the tables have no LLM in common.
    """
    source = " + ".join(table.source for table in tables)
    common = [name for name in tables[0].experts if all(name in table.experts for table in tables)]
    if not common:
        raise InputError(f"{source}: have no LLM in common, must have one or more")
    parts = [table.select(common) for table in tables]
    texts = [part.prompts for part in parts if part.prompts is not None]
    return QualityTable(
        source=source,
        experts=tuple(common),
        prompt_tokens=np.concatenate([part.prompt_tokens for part in parts]),
        output_tokens=np.concatenate([part.output_tokens for part in parts]),
        score=np.concatenate([part.score for part in parts]),
        prompts=sum(texts, ()) if len(texts) == len(parts) else None,
    )


def approximate_tokens(text: str) -> int:
    """Returns the approximate number of tokens of a text: one for every 4 characters.

    On 644 English prompts the sum is 1 % too high, and the median error of one prompt is 11 %.
    """
    return max(1, round(len(text) / 4))


def read_mix_instruct(
    path: str | os.PathLike[str],
    score_name: str = "bertscore",
    count_tokens: Callable[[str], int] = approximate_tokens,
) -> QualityTable:
    """Reads the JSON lines of mix-instruct; experts are in the order of the first line, blank lines are skipped.

    Args:
        path: the file.
        score_name: name of the score of a candidate; it must lie in [0, 1].
        count_tokens: returns the number of tokens of a text, for example by an LLM's own tokenizer.

    Raises:
        InputError: a line is not in the format, or its experts differ from those of the first line.
    """
    experts: tuple[str, ...] = ()
    prompts: list[str] = []
    output_tokens: list[list[int]] = []
    scores: list[list[float]] = []
    for where, record in json_lines(read_text(path), path):
        prompt, answers = _parse_record(where, record, score_name)
        experts = experts or tuple(answers)
        if set(answers) != set(experts):
            raise InputError(
                f"{where}: the models are {', '.join(answers)}, must be those of the first line, {', '.join(experts)}"
            )
        prompts.append(prompt)
        output_tokens.append([max(1, count_tokens(answers[name][0])) for name in experts])
        scores.append([answers[name][1] for name in experts])
    if not prompts:
        raise InputError(f"{path}: has no prompts, must hold one JSON object per line")
    return QualityTable(
        source=str(path),
        experts=experts,
        prompt_tokens=np.array([max(1, count_tokens(prompt)) for prompt in prompts], np.int32),
        output_tokens=np.array(output_tokens, np.int32),
        score=np.array(scores),
        prompts=tuple(prompts),
    )


def _parse_record(where: str, record: Any, score_name: str) -> tuple[str, dict[str, tuple[str, float]]]:
    """Returns the prompt of a line of mix-instruct, and the answer and score of each model."""
    prompt = prompt_in(where, record, ("instruction", "input"))
    candidates = record.get("candidates")
    if not isinstance(candidates, list):
        raise InputError(f"{where}: candidates is {shown(candidates)}, must be a list of answers")
    answers = dict(_parse_answer(f"{where}: candidates[{i}]", each, score_name) for i, each in enumerate(candidates))
    if len(answers) != len(candidates) or not answers:
        raise InputError(f"{where}: {len(candidates)} candidates of {len(answers)} models, must be one of each model")
    return prompt, answers


def _parse_answer(where: str, answer: Any, score_name: str) -> tuple[str, tuple[str, float]]:
    model, text = (text_in(where, answer, name) for name in ("model", "text"))
    scores = answer.get("scores")
    score = scores.get(score_name) if isinstance(scores, dict) else None
    number = number_or_nan(score)
    if not 0.0 <= number <= 1.0:
        raise InputError(f"{where}: scores.{score_name} of {model} is {shown(score)}, must be a number in [0, 1]")
    return model, (text, number)


def prompt_in(where: str, record: Any, needed: Sequence[str]) -> str:
    """Returns the prompt of a JSON object: ``instruction`` and ``input``, each in lines of its own; null is "".

    Args:
      where: the file and the line, for messages.
      record: the object.
      needed: those of the two fields that must be there.

    Raises:
      InputError: a field is missing, or no text.
    """
    if not isinstance(record, dict):
        raise InputError(f"{where}: is {shown(record)}, must be a JSON object with {', '.join(needed)}")
    fields = {"instruction": "", "input": ""} | {name: record[name] for name in record if record[name] is not None}
    if missing := [name for name in needed if name not in record]:
        raise InputError(f"{where}: {missing[0]} is missing, must be a text")
    return "\n".join(part for name in ("instruction", "input") if (part := text_in(where, fields, name)))


def text_in(where: str, record: Any, name: str) -> str:
    """Returns a text of a JSON object.

    Raises:
      InputError: it is missing, no text, or not Unicode.
    """
    if not isinstance(record, dict):
        raise InputError(f"{where} is {shown(record)}, must be a JSON object with {name}")
    text = record.get(name)
    if not isinstance(text, str):
        raise InputError(f"{where}: {name} is {shown(text) if name in record else 'missing'}, must be a text")
    if re.search("[\ud800-\udfff]", text):
        raise InputError(f"{where}: {name} is {shown(text)}, must not hold half of a surrogate pair")
    return text
