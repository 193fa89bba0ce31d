"""Recorded traces of LLM serving: readers for public formats, and scaling, cutting and looping of a trace.

Formats: Azure LLM inference 2023 and 2024 (csv), BurstGPT (csv), Mooncake (JSON lines) and a plain csv of ``arrival_s,
prompt_tokens, output_tokens``. Columns are found by name; other columns are ignored. Two kinds of rows are changed:
failed requests of BurstGPT (no response tokens) are skipped and counted, and times of Mooncake, which lie on a grid of
3 s, are spread uniformly over their step.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import math
import pathlib
from collections.abc import Iterator

import numpy as np

from qos_jax.errors import InputError
from qos_jax.workload.arrivals import ArrivalProcess, recorded

MOONCAKE_STEP_MS = 3000
COLUMNS = {  # format -> names of time, prompt tokens and output tokens
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "burstgpt": ("Timestamp", "Request tokens", "Response tokens"),
    "mooncake": ("timestamp", "input_length", "output_length"),
    "csv": ("arrival_s", "prompt_tokens", "output_tokens"),
}
TraceRow = tuple[int, list[str]]  # number of the line, and its texts of time, prompt tokens and output tokens


@dataclasses.dataclass(frozen=True)
class ArrivalTrace:
    """J recorded requests in order of arrival, as NumPy arrays that are validated on construction.

    Raises:
        InputError: there is no request, the arrays differ in shape, times decrease, or a number is not finite and >= 0.
    """

    arrival_s: np.ndarray  # [J] float64 s since the trace began, not decreasing
    prompt_tokens: np.ndarray  # [J] int64 tokens
    output_tokens: np.ndarray  # [J] int64 tokens
    source: str  # the file that was read, for messages and reports
    num_skipped: int = 0  # failed requests of the recording, which this trace leaves out

    def __post_init__(self) -> None:
        """Validates the arrays and converts their types."""
        dtypes = {"arrival_s": np.float64, "prompt_tokens": np.int64, "output_tokens": np.int64}
        for name, dtype in dtypes.items():
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))
        shapes = {name: getattr(self, name).shape for name in dtypes}
        if self.arrival_s.ndim != 1 or len(set(shapes.values())) > 1:
            raise InputError(f"{self.source}: the fields of a trace must be vectors of one length, got {shapes}")
        if not self.arrival_s.size:
            raise InputError(f"{self.source}: holds no request")
        earlier_s = np.append(0.0, self.arrival_s[:-1])
        self._check(np.isfinite(self.arrival_s), "arrival_s", "must be finite")
        self._check(self.arrival_s >= earlier_s, "arrival_s", "must be 0 or more and never before the request above it")
        self._check(self.prompt_tokens >= 0, "prompt_tokens", "must be 0 or more")
        self._check(self.output_tokens >= 0, "output_tokens", "must be 0 or more")

    def __len__(self) -> int:
        """Returns the number of requests."""
        return self.arrival_s.size

    @property
    def gaps_s(self) -> np.ndarray:
        """Gaps between successive arrivals [J - 1] s."""
        return np.diff(self.arrival_s)

    @property
    def rate_per_s(self) -> float:
        """Mean rate [requests/s] from the first arrival to the last.

        Raises:
            InputError: all requests arrive at the same time.
        """
        if not self.arrival_s[-1] > self.arrival_s[0]:
            raise InputError(f"{self.source}: {len(self)} requests at one instant have no rate")
        return float((len(self) - 1) / (self.arrival_s[-1] - self.arrival_s[0]))

    @property
    def gap_cv(self) -> float:
        """Coefficient of variation of the gaps; 1 for Poisson arrivals."""
        return float(np.std(self.gaps_s)) * self.rate_per_s

    def index_of_dispersion(self, window_s: float) -> float:
        """Returns the variance over the mean of the arrivals per window; 1 for Poisson arrivals.

        Args:
            window_s: length of a window [s].

        Raises:
            InputError: the trace does not span two windows.
        """
        span_s = self.arrival_s[-1] - self.arrival_s[0]
        if not 0 < 2 * window_s <= span_s:
            raise InputError(f"{self.source}: window_s must lie in (0, {span_s / 2:g}], half the span; got {window_s}")
        windows = int(span_s / window_s)
        edges = self.arrival_s[0] + window_s * np.arange(windows + 1)
        counts = np.diff(np.searchsorted(self.arrival_s, edges))
        return float(np.var(counts, ddof=1) / np.mean(counts))

    def scaled_to(self, rate_per_s: float) -> ArrivalTrace:
        """Returns the trace with time stretched to a mean rate of ``rate_per_s`` [requests/s]."""
        if not (math.isfinite(rate_per_s) and rate_per_s > 0):
            raise InputError(f"rate_per_s must be positive and finite, got {rate_per_s}")
        return dataclasses.replace(self, arrival_s=self.arrival_s * (self.rate_per_s / rate_per_s))

    def cut(self, start_s: float, stop_s: float) -> ArrivalTrace:
        """Returns the requests that arrive in [start_s, stop_s), with times relative to ``start_s``.

        Raises:
            InputError: there are none.
        """
        kept = slice(*np.searchsorted(self.arrival_s, (start_s, stop_s)))
        if not self.arrival_s[kept].size:
            raise InputError(
                f"{self.source}: no request arrives in [{start_s}, {stop_s}) s; "
                f"the arrivals are in [{self.arrival_s[0]}, {self.arrival_s[-1]}] s"
            )
        return self._select(kept, self.arrival_s[kept] - start_s)

    def halves(self) -> tuple[ArrivalTrace, ArrivalTrace]:
        """Returns the first and the second half of the time span, for training and test."""
        start_s, last_s = self.arrival_s[[0, -1]]
        middle_s = (start_s + last_s) / 2
        return self.cut(start_s, middle_s), self.cut(middle_s, np.nextafter(last_s, np.inf))

    def looped(self, num_requests: int) -> ArrivalTrace:
        """Returns ``num_requests`` requests: the trace repeated, with one mean gap between two rounds, or its begin."""
        if num_requests < 1:
            raise InputError(f"num_requests must be at least 1, got {num_requests}")
        rounds, index = np.divmod(np.arange(num_requests), len(self))
        round_s = len(self) / self.rate_per_s if rounds[-1] else 0.0
        return self._select(index, self.arrival_s[index] + rounds * round_s)

    def clipped(self, max_prompt_tokens: int, max_output_tokens: int) -> tuple[ArrivalTrace, int]:
        """Returns the trace with prompts and outputs clipped to these lengths, and the number of longer requests."""
        limits = {"max_prompt_tokens": max_prompt_tokens, "max_output_tokens": max_output_tokens}
        for name, limit in limits.items():
            if limit < 1:
                raise InputError(f"{name} must be at least 1, got {limit}")
        too_long = (self.prompt_tokens > max_prompt_tokens) | (self.output_tokens > max_output_tokens)
        clipped = dataclasses.replace(
            self,
            prompt_tokens=np.minimum(self.prompt_tokens, max_prompt_tokens),
            output_tokens=np.minimum(self.output_tokens, max_output_tokens),
        )
        return clipped, int(too_long.sum())

    def _check(self, legal: np.ndarray, name: str, rule: str) -> None:
        if not legal.all():
            first = int(np.argmin(legal))
            raise InputError(f"{self.source}: {name} of request {first + 1} is {getattr(self, name)[first]}, {rule}")

    def _select(self, index: np.ndarray | slice, arrival_s: np.ndarray) -> ArrivalTrace:
        return dataclasses.replace(
            self,
            arrival_s=arrival_s,
            prompt_tokens=self.prompt_tokens[index],
            output_tokens=self.output_tokens[index],
        )


def with_gaps(trace: ArrivalTrace, rate_per_s: float | None = None, random_start: bool = True) -> ArrivalProcess:
    """Returns an arrival process that plays the gaps of a trace in order, repeatedly.

    Args:
        trace: at least two arrivals at different times.
        rate_per_s: mean rate [requests/s] to scale to; by default the trace's own.
        random_start: start at a random gap instead of the first one.

    Raises:
        InputError: the trace has no rate, or ``rate_per_s`` is out of range.
    """
    return recorded(trace.gaps_s, trace.rate_per_s if rate_per_s is None else rate_per_s, random_start)


def read_trace(path: str | pathlib.Path, format: str | None = None) -> ArrivalTrace:
    """Returns the trace in a file.

    Args:
        path: the file, in UTF-8.
        format: a key of ``COLUMNS``; by default recognised from the first line.

    Raises:
        InputError: the file cannot be read, has no known format, or holds an illegal value.
    """
    if format is not None and format not in COLUMNS:
        raise InputError(f"format must be one of {', '.join(COLUMNS)}, got {format!r}")
    lines = _read_lines(path)
    format = format or _detect(lines[0], path)
    rows = _json_rows(lines, path) if format == "mooncake" else _csv_rows(lines, COLUMNS[format], path)
    parsed = [_parse(row, format, path) for row in rows]
    kept = [row for row in parsed if format != "burstgpt" or row[2] > 0]  # a request without response tokens failed
    times, prompt_tokens, output_tokens = np.array(kept, np.float64).reshape(-1, 3).T
    return ArrivalTrace(
        arrival_s=_seconds(times, format),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        source=str(path),
        num_skipped=len(parsed) - len(kept),
    )


def _read_lines(path: str | pathlib.Path) -> list[str]:
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    if not lines:
        raise InputError(f"{path}: is empty")
    return lines


def _detect(first_line: str, path: str | pathlib.Path) -> str:
    if first_line.lstrip().startswith("{"):
        return "mooncake"
    for format, columns in COLUMNS.items():
        if set(columns) <= set(first_line.split(",")):
            return format
    legal = "; ".join(f"{format}: {', '.join(columns)}" for format, columns in COLUMNS.items())
    raise InputError(f"{path}: no known trace begins with {first_line[:80]!r}; columns must be those of {legal}")


def _csv_rows(lines: list[str], columns: tuple[str, ...], path: str | pathlib.Path) -> Iterator[TraceRow]:
    reader = csv.DictReader(lines)
    missing = set(columns) - set(reader.fieldnames or ())
    if missing:
        raise InputError(f"{path}: lacks the column(s) {', '.join(sorted(missing))}; it has {lines[0][:80]!r}")
    try:
        for row in reader:
            yield reader.line_num, [row[column] or "" for column in columns]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num + 1}: {error}") from None


def _json_rows(lines: list[str], path: str | pathlib.Path) -> Iterator[TraceRow]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            yield number, [str(record[field]) for field in COLUMNS["mooncake"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            legal = ", ".join(COLUMNS["mooncake"])
            raise InputError(f"{path}, line {number}: must be a JSON object with {legal}, got {line[:80]!r}") from None


def _parse(row: TraceRow, format: str, path: str | pathlib.Path) -> tuple[float, int, int]:
    """Returns time (azure: us since 1970, mooncake: ms, others: s), prompt tokens and output tokens."""
    number, texts = row
    columns = COLUMNS[format]
    try:
        time = _microseconds(texts[0]) if format == "azure" else float(texts[0])
    except ValueError:
        raise InputError(f"{path}, line {number}: {columns[0]} must be a time, got {texts[0][:80]!r}") from None
    tokens = []
    for column, text in zip(columns[1:], texts[1:], strict=True):
        try:
            tokens.append(int(np.int64(text)))
        except (ValueError, OverflowError):
            raise InputError(f"{path}, line {number}: {column} must be a whole number, got {text[:80]!r}") from None
    return time, tokens[0], tokens[1]


def _microseconds(text: str) -> float:
    moment = datetime.datetime.fromisoformat(text)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    return (moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) / datetime.timedelta(microseconds=1)


def _seconds(times: np.ndarray, format: str) -> np.ndarray:
    """Returns seconds since the trace began: since the first request in azure, since time 0 of the file in others."""
    if format == "azure":
        return (times - times[:1]) / 1e6
    if format == "mooncake":
        return _spread_over_steps(times) / 1e3
    return times


def _spread_over_steps(times_ms: np.ndarray) -> np.ndarray:
    """Returns times spread uniformly over their steps, in the order of the file; unchanged if any time is finer."""
    steps = np.rint(times_ms / MOONCAKE_STEP_MS)
    if np.any(np.abs(times_ms - steps * MOONCAKE_STEP_MS) > 1.0):  # the published times are rounded to 1 ms
        return times_ms
    within = np.random.default_rng(0).uniform(size=times_ms.size)
    order = np.lexsort((within, np.cumsum(np.diff(steps, prepend=0.0) != 0.0)))
    return (steps + within[order]) * MOONCAKE_STEP_MS
