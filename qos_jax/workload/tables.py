"""Quality tables: the length and score of each LLM's answer to real prompts, read from files and sampled by row.

Two formats are read. An ``.npz`` has the columns ``experts`` [N], ``prompt_tokens`` [M], ``out_tokens`` [M, N] and a
column of scores [M, N]. The JSON lines of mix-instruct each have ``instruction``, ``input`` and ``candidates``, a list
of ``{model, text, scores: {bertscore, ...}}``. Scores must lie in [0, 1]; BERTScore and ROUGE do, BARTScore does not.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from qos_jax.errors import InputError
from qos_jax.io.files import numbers_in, parse_json, read_columns
from qos_jax.workload.content import LatencyLimits, SampledContent, latency_limits

_MAX_TOKENS = 2**24  # of an answer or a prompt


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
        limit_s = self.limits.at(jax.random.uniform(user_key))
        return SampledContent(self.prompt_tokens[row], self.output_tokens[row], self.score[row], limit_s, row)


@dataclasses.dataclass(frozen=True, eq=False)
class QualityTable:
    """The answers of N LLMs to M prompts, as NumPy arrays that are validated on construction.

    Raises:
        InputError: shapes differ, an LLM is named twice, a length is below 1 token, or a score is outside [0, 1].
    """

    source: str  # the file that was read, for messages
    experts: tuple[str, ...]  # N names of LLMs
    prompt_tokens: np.ndarray  # [M] int32 tokens
    output_tokens: np.ndarray  # [M, N] int32 tokens
    score: np.ndarray  # [M, N] in [0, 1]
    prompts: tuple[str, ...] | None = None  # M texts

    def __post_init__(self) -> None:
        """Validates the fields."""
        shape = (len(self.prompt_tokens), len(self.experts))
        if 0 in shape or self.output_tokens.shape != shape or self.score.shape != shape:
            raise InputError(
                f"{self.source}: {shape[1]} experts and {shape[0]} prompts, but output tokens have the shape "
                f"{self.output_tokens.shape} and scores {self.score.shape}; both must be [prompts, experts], none empty"
            )
        if self.prompts is not None and len(self.prompts) != shape[0]:
            raise InputError(f"{self.source}: {len(self.prompts)} texts for {shape[0]} prompts, must be one for each")
        if len(set(self.experts)) != shape[1]:
            raise InputError(f"{self.source}: experts are {', '.join(self.experts)}, must be different names")
        shortest = min(self.prompt_tokens.min(), self.output_tokens.min())
        if shortest < 1:
            raise InputError(f"{self.source}: a length is {shortest} tokens, must be at least 1")
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
    prompt_tokens, output_tokens, score = (
        numbers_in(path, name, columns[name]) for name in ("prompt_tokens", "out_tokens", score_column)
    )
    return QualityTable(
        source=str(path),
        experts=tuple(str(name) for name in columns["experts"]),
        prompt_tokens=_whole(path, "prompt_tokens", prompt_tokens),
        output_tokens=_whole(path, "out_tokens", np.maximum(output_tokens, 1)),
        score=np.clip(score, 0.0, 1.0) if clip_scores else score,
    )


def _whole(path: str | os.PathLike[str], name: str, lengths: np.ndarray) -> np.ndarray:
    legal = np.isfinite(lengths) & (np.abs(lengths) < _MAX_TOKENS)
    if not legal.all():
        raise InputError(f"{path}: column {name} has a length of {lengths[~legal][0]:g}, must be below {_MAX_TOKENS}")
    return lengths.astype(np.int32)


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
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")  # splitlines() would cut inside texts
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not a readable text file: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt, answers = _parse_line(f"{path}, line {number}", line, score_name)
        experts = experts or tuple(answers)
        if set(answers) != set(experts):
            raise InputError(
                f"{path}, line {number}: the models are {', '.join(answers)}, "
                f"must be those of the first line, {', '.join(experts)}"
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


def _parse_line(where: str, line: str, score_name: str) -> tuple[str, dict[str, tuple[str, float]]]:
    """Returns the prompt of a line of mix-instruct, and the answer and score of each model."""
    record = parse_json(line, where)
    try:
        prompt = "\n".join(part for part in (record["instruction"], record["input"]) if part)
        candidates = [(c["model"], (c["text"], float(c["scores"][score_name]))) for c in record["candidates"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: {type(error).__name__} {error}; a line must have instruction, input and candidates, and a "
            f"candidate must have model, text and scores with a number {score_name}"
        ) from error
    answers = dict(candidates)
    if len(answers) != len(candidates) or not answers:
        raise InputError(f"{where}: {len(candidates)} candidates of {len(answers)} models, must be one of each model")
    return prompt, answers
