"""Recorded traces of LLM serving: readers for public formats, and scaling, cutting and looping of a trace.

``COLUMNS`` names the formats: Azure LLM inference 2023 and 2024, BurstGPT, Vidur, Splitwise and inference-sim (BLIS) as
csv, Mooncake as JSON lines, a plain csv of ``arrival_s, prompt_tokens, output_tokens``, and one of ``arrival_s`` alone.
Columns are found by name; other columns are ignored. Failed requests of BurstGPT (no response tokens) are left out and
counted.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from qos_jax.errors import InputError
from qos_jax.io.text_files import MAX_TOKENS, CsvTable, json_lines, parse_count, parse_number, read_text, shown
from qos_jax.workload.arrivals import ArrivalProcess, recorded

COLUMNS: dict[str, tuple[str, ...]] = {  # format -> names of time, prompt tokens and output tokens
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "burstgpt": ("Timestamp", "Request tokens", "Response tokens"),
    "mooncake": ("timestamp", "input_length", "output_length"),
    "vidur": ("arrived_at", "num_prefill_tokens", "num_decode_tokens"),
    "splitwise": ("arrival_timestamp", "prompt_size", "token_size"),
    "blis": ("arrival_time_us", "input_tokens", "output_tokens"),
    "csv": ("arrival_s", "prompt_tokens", "output_tokens"),
    "arrivals": ("arrival_s",),
}
_PER_S = {"azure": 1e6, "mooncake": 1e3, "blis": 1e6}  # units of time; others are in seconds


class _Row(NamedTuple):
    """A request of a file."""

    where: str  # file and line
    time: float  # azure: us since 1970; others: as in the file
    tokens: list[int]  # of prompt and output, as far as the format has them


@dataclasses.dataclass(frozen=True)
class ArrivalTrace:
    """J recorded requests in order of arrival, as NumPy arrays that are validated on construction.

    Raises:
        InputError: there is no request, the arrays differ in shape, times decrease, or a number is not finite and >= 0.
    """

    arrival_s: np.ndarray  # [J] float64 s since the trace began, not decreasing
    prompt_tokens: np.ndarray | None  # [J] int64 tokens; None where the file has arrivals only
    output_tokens: np.ndarray | None  # [J] int64 tokens, likewise
    source: str  # the file that was read, for messages and reports
    num_skipped: int = 0  # failed requests of the recording, which this trace leaves out

    def __post_init__(self) -> None:
        """Validates the arrays and converts their types."""
        dtypes = {"arrival_s": np.float64, "prompt_tokens": np.int64, "output_tokens": np.int64}
        known = [name for name in dtypes if getattr(self, name) is not None]
        for name in known:
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtypes[name]))
        shapes = {name: getattr(self, name).shape for name in known}
        if self.arrival_s.ndim != 1 or len(set(shapes.values())) > 1:
            raise InputError(f"{self.source}: the fields of a trace must be vectors of one length, got {shapes}")
        if not self.arrival_s.size:
            raise InputError(f"{self.source}: holds no request")
        earlier_s = np.append(0.0, self.arrival_s[:-1])
        self._check(np.isfinite(self.arrival_s), "arrival_s", "must be finite")
        self._check(self.arrival_s >= earlier_s, "arrival_s", "must be 0 or more and never before the request above it")
        for name in known[1:]:
            self._check(getattr(self, name) >= 0, name, "must be 0 or more")

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
        """Returns the trace with prompts and outputs clipped to these lengths, and the number of longer requests.

        Raises:
            InputError: a length is below 1, or the trace has no lengths.
        """
        if self.prompt_tokens is None or self.output_tokens is None:
            raise InputError(f"{self.source}: has arrivals only, must have the lengths of its requests to clip them")
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
            prompt_tokens=None if self.prompt_tokens is None else self.prompt_tokens[index],
            output_tokens=None if self.output_tokens is None else self.output_tokens[index],
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


def read_trace(
    path: str | pathlib.Path, format: str | None = None, *, sort: bool = False, spread_s: float | None = None
) -> ArrivalTrace:
    """Returns the trace in a file.

    Args:
        path: the file, in UTF-8; may be packed by gzip.
        format: a key of ``COLUMNS``; by default recognised from the first line.
        sort: sort the rows by time, rather than refuse rows that are out of order.
        spread_s: the file's times are rounded to steps of so many seconds; spread the requests of each step uniformly
            over it, in the order of the file and always in the same way. Mooncake's published times have steps of 3 s.

    Raises:
        InputError: the file cannot be read, has no known format, or holds an illegal value.
    """
    if format is not None and format not in COLUMNS:
        raise InputError(f"format must be one of {', '.join(COLUMNS)}, got {format!r}")
    if spread_s is not None and not 0 < spread_s < math.inf:
        raise InputError(f"spread_s is {spread_s!r}, must be above 0 and finite, in s")
    text = read_text(path)
    format = format or _detect(text, path)
    rows = list((_json_rows if format == "mooncake" else _csv_rows)(text, path, format))
    kept = [row for row in rows if format != "burstgpt" or row.tokens[1] > 0]
    if not kept:
        raise InputError(f"{path}: holds no request" + f" but {len(rows)} that failed" * bool(rows))
    if sort:
        kept.sort(key=lambda row: row.time)
    _check_order(kept, format)
    times = np.array([row.time for row in kept])
    times = (times - times[0] if format == "azure" else times) / _PER_S.get(format, 1.0)
    prompt_tokens, output_tokens = np.array([row.tokens for row in kept]).T if kept[0].tokens else (None, None)
    return ArrivalTrace(
        arrival_s=times if spread_s is None else _spread(times, spread_s, [row.where for row in kept]),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        source=str(path),
        num_skipped=len(rows) - len(kept),
    )


def _detect(text: str, path: str | pathlib.Path) -> str:
    if text.lstrip().startswith(("{", "[")):
        return "mooncake"
    table = CsvTable(text, path)
    fitting = [format for format, columns in COLUMNS.items() if set(columns) <= set(table.header)]
    if {"prompt_tokens", "output_tokens"}.intersection(table.header) and "arrivals" in fitting:
        fitting = [*(format for format in fitting if format not in ("csv", "arrivals")), "csv"]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise InputError(f"{path}: has the columns of the formats {', '.join(fitting)}; give format (--trace_format)")
    legal = "; ".join(f"{format}: {', '.join(columns)}" for format, columns in COLUMNS.items())
    first = ",".join(table.header)
    raise InputError(f"{path}: no known trace begins with {shown(first)}; columns must be those of {legal}")


def _csv_rows(text: str, path: str | pathlib.Path, format: str) -> Iterator[_Row]:
    for where, cells in CsvTable(text, path).rows(COLUMNS[format]):
        if format == "burstgpt":
            cells[2] = cells[2] or "0"
        yield _parse(where, cells, format)


def _json_rows(text: str, path: str | pathlib.Path, format: str) -> Iterator[_Row]:
    columns = COLUMNS[format]
    for where, record in json_lines(text, path):
        if isinstance(record, dict) and record.get("delay") is not None:
            raise InputError(
                f"{where}: has a delay, the ms after the request before it in its session has ended; only requests "
                "with a timestamp, whenever others end, can be read"
            )
        if not isinstance(record, dict) or not set(columns) <= set(record):
            raise InputError(f"{where}: must be a JSON object with {', '.join(columns)}")
        yield _parse(where, [record[name] for name in columns], format)


def _parse(where: str, values: Sequence[Any], format: str) -> _Row:
    columns = COLUMNS[format]
    time = (_microseconds if format == "azure" else _time)(values[0], f"{where}: {columns[0]}")
    tokens = [_count(value, f"{where}: {name}") for name, value in zip(columns[1:], values[1:], strict=True)]
    return _Row(where, time, tokens)


def _time(value: Any, where: str) -> float:
    try:
        number = parse_number(value)
    except ValueError:
        number = -1.0
    if number < 0:
        raise InputError(f"{where} is {shown(value)}, must be a time, a number from 0")
    return number


def _count(value: Any, where: str) -> int:
    try:
        return parse_count(value)
    except ValueError:
        raise InputError(f"{where} is {shown(value)}, must be a whole number from 0 to {MAX_TOKENS}") from None


def _microseconds(text: str, where: str) -> float:
    """Returns an ISO time as us since 1970; it is UTC where it has no time zone."""
    iso = re.sub(r"\s+([+-]\d\d:?\d\d)$", r"\1", re.sub(r"\s*(UTC|GMT)$", "+00:00", text))
    try:
        moment = datetime.datetime.fromisoformat(iso)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
        return (moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) / datetime.timedelta(microseconds=1)
    except (ValueError, OverflowError):
        raise InputError(
            f"{where} is {shown(text)}, must be an ISO time, as in 2023-11-16 18:15:46.68 or 2024-05-10T00:00:00+00:00"
        ) from None


def _check_order(rows: Sequence[_Row], format: str) -> None:
    for before, row in itertools.pairwise(rows):
        if row.time < before.time:
            raise InputError(
                f"{row.where}: {COLUMNS[format][0]} is before that of the request above it, must not decrease; "
                "sort=True (--trace_sort) sorts the rows"
            )


def _spread(times_s: np.ndarray, step_s: float, where: Sequence[str]) -> np.ndarray:
    """Returns times spread uniformly over their steps, in the order of the file."""
    times_ms, step_ms = 1e3 * times_s, 1e3 * step_s
    steps = np.rint(times_ms / step_ms)
    finer = np.abs(times_ms - steps * step_ms) > 1.0 + 1e-6  # published times are rounded to 1 ms
    if finer.any():
        first = int(np.argmax(finer))
        raise InputError(
            f"{where[first]}: the time {times_s[first]:g} s is no multiple of {step_s:g} s, so times are not "
            "rounded to such steps; leave spread_s (--trace_spread) out to take them as they are"
        )
    within = np.random.default_rng(0).uniform(size=times_ms.size)
    order = np.lexsort((within, np.cumsum(np.diff(steps, prepend=0.0) != 0.0)))
    return (steps + within[order]) * step_ms / 1e3
