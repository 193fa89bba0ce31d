"""Tables of real prompts: what each LLM answered, how long and how well; read from files, then drawn from as they are.

Two formats are read. An ``.npz`` with the columns ``experts`` [N], ``prompt_tokens`` [M], ``out_tokens`` [M, N] and any
column of scores [M, N]; and the JSON lines of mix-instruct, each with ``instruction``, ``input`` and ``candidates``, a
list of ``{model, text, scores: {bertscore, ...}}``. Scores must lie in [0, 1]: BERTScore and ROUGE do, BARTScore not.
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
from qos_jax.workload.content import Answers, LatencyLimits, latency_limits

_MOST_TOKENS = 2**24  # of an answer or a prompt


@struct.dataclass
class TableContent:
    """Requests drawn uniformly from the rows of a table; build it with `QualityTable.content`."""

    prompt_tokens: Array  # [M] int32 tokens
    output_tokens: Array  # [M, N] int32 tokens
    score: Array  # [M, N] in [0, 1]
    score_mean: Array  # [N]
    score_sd: Array  # [N]
    log_length_mean: Array  # [N] of the natural logarithm of the output tokens
    log_length_sd: Array  # [N]
    score_correlation: Array  # [] between two experts, mean of all pairs
    log_length_correlation: Array  # []
    max_output_tokens: Array  # [N] tokens, the longest answer of each
    limits: LatencyLimits

    def sample(self, key: Array) -> Answers:
        """Draws a row."""
        row_key, user_key = jax.random.split(key)
        row = jax.random.randint(row_key, (), 0, self.prompt_tokens.shape[0])
        limit_s = self.limits.at(jax.random.uniform(user_key))
        return Answers(self.prompt_tokens[row], self.output_tokens[row], self.score[row], limit_s, row)


@dataclasses.dataclass(frozen=True, eq=False)
class QualityTable:
    """The answers of N LLMs to M prompts, on the host; checked when it is made.

    Raises:
        InputError: if shapes do not agree, an LLM is named twice, a length is below 1 token or a score outside [0, 1].
    """

    source: str  # the file it came from, for messages
    experts: tuple[str, ...]  # N names
    prompt_tokens: np.ndarray  # [M] int32 tokens
    output_tokens: np.ndarray  # [M, N] int32 tokens
    score: np.ndarray  # [M, N] in [0, 1]
    prompts: tuple[str, ...] | None = None  # M texts

    def __post_init__(self) -> None:
        """Checks what the fields say of each other."""
        shape = (len(self.prompt_tokens), len(self.experts))
        if 0 in shape or self.output_tokens.shape != shape or self.score.shape != shape:
            raise InputError(
                f"{self.source}: {shape[1]} experts and {shape[0]} prompts, but output tokens have the shape "
                f"{self.output_tokens.shape} and scores {self.score.shape}; both must be [prompts, experts], none empty"
            )
        if self.prompts is not None and len(self.prompts) != shape[0]:
            raise InputError(f"{self.source}: {len(self.prompts)} texts for {shape[0]} prompts; give one for each")
        if len(set(self.experts)) != shape[1]:
            raise InputError(f"{self.source}: experts {', '.join(self.experts)} are not all different")
        shortest = min(self.prompt_tokens.min(), self.output_tokens.min())
        if shortest < 1:
            raise InputError(f"{self.source}: a length of {shortest} tokens; lengths are 1 or more")
        bad = ~((self.score >= 0.0) & (self.score <= 1.0))  # NaN is bad, too
        if bad.any():
            row, expert = np.argwhere(bad)[0]
            raise InputError(
                f"{self.source}: score {self.score[row, expert]:g} of {self.experts[expert]} for prompt {row} "
                f"({bad.sum()} such in all); scores must lie in [0, 1]"
            )

    def select(self, experts: Sequence[str]) -> QualityTable:
        """Returns the table of these LLMs only, in this order; an unknown one raises `InputError`."""
        unknown = [name for name in experts if name not in self.experts]
        if unknown or len(experts) == 0:
            raise InputError(f"{self.source}: experts {unknown} are unknown; choose from {', '.join(self.experts)}")
        columns = [self.experts.index(name) for name in experts]
        return dataclasses.replace(
            self,
            experts=tuple(experts),
            output_tokens=self.output_tokens[:, columns],
            score=self.score[:, columns],
        )

    def split(self, test_fraction: float, seed: int) -> tuple[QualityTable, QualityTable]:
        """Returns the tables (train, test) of a random partition of the prompts; an empty part raises `InputError`."""
        train, test = split_rows(self.source, len(self.prompt_tokens), test_fraction, seed)
        return self._rows(train), self._rows(test)

    def content(self, limits: LatencyLimits | None = None) -> TableContent:
        """Returns what draws requests from this table, by default for users with the limits `latency_limits()`."""
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


def split_rows(source: str, num_prompts: int, test_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows (train, test) of a random partition of the prompts, each in order.

    Raises:
        InputError: naming ``source``, if a part is empty.
    """
    num_test = round(test_fraction * num_prompts)
    if not 0 < num_test < num_prompts:
        raise InputError(f"{source}: test_fraction {test_fraction:g} of {num_prompts} prompts; both parts need some")
    order = np.random.default_rng(seed).permutation(num_prompts)
    return np.sort(order[num_test:]), np.sort(order[:num_test])


def _pair_correlation(columns: np.ndarray) -> float:
    """Returns the mean correlation of two columns [M, N] over all pairs, 0 where it is negative or there is no pair."""
    experts = columns.shape[1]
    standard = (columns - columns.mean(0)) / np.maximum(columns.std(0), 1e-12)
    return float(np.clip((standard.sum(1).var() - experts) / max(experts * (experts - 1), 1), 0.0, 1.0))


def read_npz(path: str | os.PathLike[str], score_column: str, clip_scores: bool = False) -> QualityTable:
    """Reads a table from an ``.npz``; answers of 0 tokens count as 1, as the end of an answer is a token.

    Args:
        path: the file, with the columns named at the head of this module.
        score_column: the column that is the score.
        clip_scores: move scores outside [0, 1] to its ends. A similarity of embeddings, such as AlpacaEval's
            ``quality_bertscore_minilm``, needs that: 5 of its 9,660 scores are negative and 37 pass 1 by rounding.

    Raises:
        InputError: if the file is missing or damaged, lacks a column, or makes no `QualityTable`.
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
    if not (np.isfinite(lengths) & (np.abs(lengths) < _MOST_TOKENS)).all():
        raise InputError(f"{path}: column {name} holds lengths that no answer has; they must be below {_MOST_TOKENS}")
    return lengths.astype(np.int32)


def approximate_tokens(text: str) -> int:
    """Returns about how many tokens a text has: one for every 4 characters.

    On 644 English prompts this is 1 % above the true sum, and the median error of one prompt is 11 %.
    """
    return max(1, round(len(text) / 4))


def read_mix_instruct(
    path: str | os.PathLike[str],
    score_name: str = "bertscore",
    count_tokens: Callable[[str], int] = approximate_tokens,
) -> QualityTable:
    """Reads mix-instruct's JSON lines; the order of the experts is that of the first line, blank lines are skipped.

    Args:
        path: the file.
        score_name: which of a candidate's scores is the score, as it stands; only those in [0, 1] can be.
        count_tokens: the number of tokens of a text, for instance by an LLM's own tokenizer.

    Raises:
        InputError: naming the line, if it is not in the format or its experts differ from those of the first.
    """
    experts: tuple[str, ...] = ()
    prompts: list[str] = []
    output_tokens: list[list[int]] = []
    scores: list[list[float]] = []
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")  # splitlines() would cut inside texts
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable text file: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt, answers = _parse_line(f"{path}, line {number}", line, score_name)
        experts = experts or tuple(answers)
        if set(answers) != set(experts):
            raise InputError(
                f"{path}, line {number}: answers of {', '.join(answers)}; "
                f"as on the first line, they must be of {', '.join(experts)}"
            )
        prompts.append(prompt)
        output_tokens.append([max(1, count_tokens(answers[name][0])) for name in experts])
        scores.append([answers[name][1] for name in experts])
    if not prompts:
        raise InputError(f"{path}: no prompts in it; one JSON object a line is needed")
    return QualityTable(
        source=str(path),
        experts=experts,
        prompt_tokens=np.array([max(1, count_tokens(prompt)) for prompt in prompts], np.int32),
        output_tokens=np.array(output_tokens, np.int32),
        score=np.array(scores),
        prompts=tuple(prompts),
    )


def _parse_line(where: str, line: str, score_name: str) -> tuple[str, dict[str, tuple[str, float]]]:
    """Returns the prompt of a line of mix-instruct and each model's answer and score."""
    record = parse_json(line, where)
    try:
        prompt = "\n".join(part for part in (record["instruction"], record["input"]) if part)
        candidates = [(c["model"], (c["text"], float(c["scores"][score_name]))) for c in record["candidates"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: {type(error).__name__} {error}; a line needs instruction, input and candidates, "
            f"each of these model, text and scores with a number {score_name}"
        ) from error
    answers = dict(candidates)
    if len(answers) != len(candidates) or not answers:
        raise InputError(f"{where}: {len(candidates)} candidates of {len(answers)} models; each model must answer once")
    return prompt, answers
