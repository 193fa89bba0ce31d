"""Readers of recorded requests: public traces, logs of engines and gateways, and results of benchmarks.

``COLUMNS`` names the formats:

* csv: Azure LLM inference 2023 and 2024, BurstGPT, Vidur, Splitwise, inference-sim (BLIS), spend logs of LiteLLM, a
  plain one of ``arrival_s, prompt_tokens, output_tokens``, and one of ``arrival_s`` alone. Columns are found by name;
  other columns are ignored.
* JSON lines: Mooncake; the request log of SGLang (``--log-requests --log-requests-format=json``).
* ``benchmark``: the result of vLLM's ``vllm bench serve --save-result --save-detailed`` or SGLang's ``bench_serving
  --output-details``, one JSON object.

A turn of a session in Mooncake's format may have, in place of its ``timestamp``, a ``delay`` in ms after the answer to
the turn before it. No file says how long that answer took. The turn is read as arriving ``delay`` after the arrival of
the turn before it in its session, which is the earliest that it can be; ``ArrivalTrace.num_delayed`` counts such turns.

Failed requests are left out and counted: those without a response token of BurstGPT, LiteLLM and benchmarks, and those
that SGLang received and did not finish.
"""

from __future__ import annotations

import datetime
import itertools
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from qos_jax.errors import InputError
from qos_jax.io.text_files import (
    MAX_TOKENS,
    CsvTable,
    json_lines,
    number_or_nan,
    parse_count,
    parse_json,
    parse_number,
    read_text,
    shown,
)
from qos_jax.workload.traces import ArrivalTrace

COLUMNS: dict[str, tuple[str, ...]] = {  # format -> names of time, prompt tokens and output tokens
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "burstgpt": ("Timestamp", "Request tokens", "Response tokens"),
    "mooncake": ("timestamp", "input_length", "output_length"),
    "vidur": ("arrived_at", "num_prefill_tokens", "num_decode_tokens"),
    "splitwise": ("arrival_timestamp", "prompt_size", "token_size"),
    "blis": ("arrival_time_us", "input_tokens", "output_tokens"),
    "litellm": ("startTime", "prompt_tokens", "completion_tokens"),
    "sglang": ("timestamp", "prompt_tokens", "completion_tokens"),
    "benchmark": ("start_times", "input_lens", "output_lens"),
    "csv": ("arrival_s", "prompt_tokens", "output_tokens"),
    "arrivals": ("arrival_s",),
}
_ISO = ("azure", "litellm", "sglang")  # formats with dates, whose traces begin at their first request
_FROM_FIRST = (*_ISO, "benchmark")  # formats whose times count from another moment than the begin of the trace
_PER_S = {"mooncake": 1e3, "blis": 1e6} | dict.fromkeys(_ISO, 1e6)  # units of time; others are in seconds
_MAY_FAIL = ("burstgpt", "litellm", "sglang", "benchmark")  # a request without an output token has failed


class _Row(NamedTuple):
    """A request of a file."""

    where: str  # file and line
    time: float  # us since 1970 in a format with dates; others: as in the file
    tokens: list[int]  # of prompt and output, as far as the format has them
    delayed: bool = False  # the file has a delay after another request in place of the time


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
    if format is not None and not (isinstance(format, str) and format in COLUMNS):
        raise InputError(f"format must be one of {', '.join(COLUMNS)}, got {format!r}")
    if spread_s is not None and not number_or_nan(spread_s) > 0:
        raise InputError(f"spread_s is {shown(spread_s)}, must be above 0 and finite, in s")
    text = read_text(path)
    format = format or _detect(text, path)
    readers = {"mooncake": _mooncake_rows, "sglang": _sglang_rows, "benchmark": _benchmark_rows}
    rows = list(readers.get(format, _csv_rows)(text, path, format))
    kept = [row for row in rows if format not in _MAY_FAIL or row.tokens[1] > 0]
    if not kept:
        raise InputError(f"{path}: holds no request" + f" but {len(rows)} that failed" * bool(rows))
    if sort:
        kept.sort(key=lambda row: row.time)
    _check_order([row for row in kept if not row.delayed], format)
    if num_delayed := sum(row.delayed for row in kept):
        kept.sort(key=lambda row: row.time)  # a file may hold one session after the other
    times = np.array([row.time for row in kept])
    times = (times - times[0] if format in _FROM_FIRST else times) / _PER_S.get(format, 1.0)
    prompt_tokens, output_tokens = np.array([row.tokens for row in kept]).T if kept[0].tokens else (None, None)
    return ArrivalTrace(
        arrival_s=times if spread_s is None else _spread(times, spread_s, [row.where for row in kept]),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        source=str(path),
        num_skipped=len(rows) - len(kept),
        num_delayed=num_delayed,
    )


def _detect(text: str, path: str | pathlib.Path) -> str:
    if text.lstrip().startswith(("{", "[")):
        first, _, _ = text.lstrip().partition("\n")
        if '"event"' in first and '"rid"' in first:
            return "sglang"
        return "benchmark" if '"start_times"' in text and '"input_lens"' in text else "mooncake"
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
        if format in _MAY_FAIL:
            cells[2] = cells[2] or "0"
        yield _parse(where, cells, format)


def _mooncake_rows(text: str, path: str | pathlib.Path, format: str) -> Iterator[_Row]:
    """Yields the requests; a turn with a delay arrives that long after the turn before it in its session."""
    columns = COLUMNS[format]
    last_ms: dict[str | int, float] = {}  # arrival of the last turn of each session
    for where, record in json_lines(text, path):
        delayed = isinstance(record, dict) and record.get(columns[0]) is None and record.get("delay") is not None
        if not isinstance(record, dict) or not set(columns[delayed:]) <= set(record):
            raise InputError(f"{where}: must be a JSON object with {', '.join(columns)}")
        session: Any = record.get("session_id")
        known = isinstance(session, str | int)
        if delayed and not (known and session in last_ms):
            raise InputError(
                f"{where}: has a delay but no timestamp, and session_id is {shown(session)}, "
                "must be that of a line above it"
            )
        first = last_ms[session] + _time(record["delay"], f"{where}: delay") if delayed else record[columns[0]]
        row = _parse(where, [first, *(record[name] for name in columns[1:])], format)._replace(delayed=delayed)
        if known:
            last_ms[session] = row.time
        yield row


def _sglang_rows(text: str, path: str | pathlib.Path, format: str) -> Iterator[_Row]:
    """Yields what was received, with the tokens of what was finished; both name the request."""
    columns = COLUMNS[format]
    received: dict[str, tuple[str, Any]] = {}
    tokens: dict[str, list[Any]] = {}
    for where, record in json_lines(text, path):
        if not isinstance(record, dict) or "event" not in record:
            raise InputError(f"{where}: must be a JSON object with event, rid and timestamp")
        if record["event"] == "request.received":
            received[str(record.get("rid"))] = where, record.get("timestamp")
        elif record["event"] == "request.finished":
            out = record.get("out")
            meta = out.get("meta_info") if isinstance(out, dict) else None
            if not isinstance(meta, dict) or not set(columns[1:]) <= set(meta):
                raise InputError(f"{where}: out.meta_info must have {', '.join(columns[1:])}")
            tokens[str(record.get("rid"))] = [meta[name] for name in columns[1:]]
    for rid, (where, time) in received.items():
        yield _parse(where, [time, *tokens.get(rid, (0, 0))], format)


def _benchmark_rows(text: str, path: str | pathlib.Path, format: str) -> Iterator[_Row]:
    columns, found = COLUMNS[format], parse_json(text, str(path))
    arrays = [found.get(name) if isinstance(found, dict) else None for name in columns]
    lists = [values for values in arrays if isinstance(values, list)]
    if len(lists) < len(columns) or len({len(values) for values in lists}) > 1:
        raise InputError(f"{path}: must be a JSON object with the lists {', '.join(columns)}, all of one length")
    for number, values in enumerate(zip(*lists, strict=True), 1):
        yield _parse(f"{path}, request {number}", values, format)


def _parse(where: str, values: Sequence[Any], format: str) -> _Row:
    columns = COLUMNS[format]
    time = (_microseconds if format in _ISO else _time)(values[0], f"{where}: {columns[0]}")
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


def _microseconds(text: Any, where: str) -> float:
    """Returns an ISO time as us since 1970; it is UTC where it has no time zone."""
    try:
        iso = re.sub(r"\s+([+-]\d\d:?\d\d)$", r"\1", re.sub(r"\s*(UTC|GMT)$", "+00:00", text))
        moment = datetime.datetime.fromisoformat(iso)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
        return (moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) / datetime.timedelta(microseconds=1)
    except (ValueError, OverflowError, TypeError):
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
