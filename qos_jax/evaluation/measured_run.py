"""Measured runs of a real engine on one GPU: the inputs of the engine, and the measurements.

A run is a folder in the format of LLMServingSim's benchmark: ``meta.json``, ``requests.jsonl`` and ``timeseries.csv``.
In ``prefix_blocks.jsonl`` it may have the ids of the blocks of each prompt, by which requests share prefixes.
``qos_jax.evaluation.fidelity`` compares a run with the simulator.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from qos_jax.errors import InputError
from qos_jax.io.files import parse_json
from qos_jax.io.text_files import CsvTable, json_lines, parse_count, parse_number, read_text, shown
from qos_jax.sim.types import BLOCK_SIZE_TOKENS
from qos_jax.workload.prefix_sharing import parse_block_ids

_REQUEST_FIELDS = ("input_toks", "output_toks", "arrival_time", "queued_ts", "first_token_ts", "last_token_ts")
_TICK_FIELDS = ("t", "running", "waiting", "kv_cache_pct", "prompt_throughput", "gen_throughput")


@dataclasses.dataclass(frozen=True)
class MeasuredRun:
    """The requests and limits of an engine, and its measurements; times are relative to the first arrival."""

    name: str  # model, GPU and engine, for messages and reports
    arrival_s: np.ndarray  # [J] s, not decreasing
    prompt_tokens: np.ndarray  # [J] tokens
    output_tokens: np.ndarray  # [J] tokens
    first_token_s: np.ndarray  # [J] s
    finish_s: np.ndarray  # [J] s
    tick_s: np.ndarray  # [T] s, times at which the state of the engine was sampled
    running: np.ndarray  # [T] requests
    waiting: np.ndarray  # [T] requests
    kv_share: np.ndarray  # [T] share of the KV blocks in use, NaN if it was not recorded
    prompt_tokens_per_s: np.ndarray  # [T] tokens/s since the last tick, each prompt counted once
    output_tokens_per_s: np.ndarray  # [T] tokens/s since the last tick
    kv_blocks: int  # usable ones
    block_size: int  # tokens per block
    max_running: int  # requests
    token_budget: int  # tokens per iteration
    async_scheduling: bool = False
    prefix_cache: bool = False
    prompt_blocks: list[list[int]] | None = None  # [J] ids of the full blocks of each prompt, if they are known
    shared_tokens: np.ndarray | None = None  # [J] prompt tokens that the cache has of other requests; None: all 0


def read_run(folder: str | os.PathLike[str], kv_blocks: int | None = None) -> MeasuredRun:
    """Reads a measured run.

    ``arrival_time`` is from one clock; ``queued_ts`` and all later times are from another. The engine takes a request
    at ``queued_ts``, between two iterations. The simulator models that wait, so arrivals are ``arrival_time``, and the
    smallest difference of the two times is the offset of the clocks. A KV memory that is empty at every tick, although
    requests ran, was not recorded.

    Args:
      folder: with the files; see the module.
      kv_blocks: usable KV blocks, for a run that did not record them. One of those that vLLM records holds no request.

    Raises:
      InputError: a file cannot be read, or lacks a field.
    """
    folder = pathlib.Path(folder)
    meta = _Meta(folder / "meta.json")
    requests = sorted(_json_lines(folder / "requests.jsonl"), key=lambda row: row["arrival_time"])
    column = {name: np.array([row[name] for row in requests], np.float64) for name in _REQUEST_FIELDS}
    tick = _ticks(folder / "timeseries.csv")
    begin_s = column["arrival_time"][0]
    arrival_s = column["arrival_time"] - begin_s
    offset_s = np.min(column["queued_ts"] - arrival_s)
    gpu = meta.get("hardware.device_name", str, default="a GPU that is not recorded")
    recorded = tick["kv_cache_pct"].any() or not tick["running"].any()
    return MeasuredRun(
        name=f"{meta.get('model', str)} on {gpu}, vLLM {meta.get('vllm_version', str)}",
        arrival_s=arrival_s,
        prompt_tokens=column["input_toks"].astype(np.int64),
        output_tokens=column["output_toks"].astype(np.int64),
        first_token_s=column["first_token_ts"] - offset_s,
        finish_s=column["last_token_ts"] - offset_s,
        tick_s=tick["t"] + meta.moment_s("started_at") - begin_s,
        running=tick["running"],
        waiting=tick["waiting"],
        kv_share=tick["kv_cache_pct"] / 100 if recorded else np.full_like(tick["kv_cache_pct"], np.nan),
        prompt_tokens_per_s=tick["prompt_throughput"],
        output_tokens_per_s=tick["gen_throughput"],
        kv_blocks=kv_blocks or meta.get("kv_cache.num_gpu_blocks") - 1,
        block_size=meta.get("kv_cache.block_size", default=BLOCK_SIZE_TOKENS),
        max_running=meta.get("engine_kwargs.max_num_seqs"),
        token_budget=meta.get("engine_kwargs.max_num_batched_tokens"),
        async_scheduling=meta.get("resolved_config.scheduler_config.async_scheduling", bool, default=False),
        prefix_cache=meta.get("kv_cache.enable_prefix_caching", bool, default=False),
        prompt_blocks=_prompt_blocks(folder / "prefix_blocks.jsonl", [row["request_id"] for row in requests]),
    )


class _Meta:
    """A JSON object in a file; every error names the file and the field."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.values = parse_json(read_text(path), str(path))

    def get(self, name: str, kind: type = int, default: Any = None) -> Any:
        """Returns the value of a field, or the default if it is not there; the name of a nested field has dots."""
        value = self.values
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is None and default is not None:
            return default
        if not isinstance(value, kind):
            raise InputError(f"{self.path}: {name} is {value!r}, must be of type {kind.__name__}")
        return value

    def moment_s(self, name: str) -> float:
        """Returns the ISO time in a field as seconds since 1970."""
        text = self.get(name, kind=str)
        try:
            return datetime.datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError) as error:
            raise InputError(f"{self.path}: {name} is {text!r}, must be an ISO time") from error


def _json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    rows = []
    for where, row in json_lines(read_text(path), path):
        if not isinstance(row, dict):
            raise InputError(f"{where}: is {shown(row)}, must be a JSON object with {', '.join(_REQUEST_FIELDS)}")
        numbers = {name: _number(row, name, where) for name in _REQUEST_FIELDS}
        rows.append({"request_id": row.get("request_id"), **numbers})
    if not rows:
        raise InputError(f"{path}: holds no request, must hold at least one")
    return rows


def _prompt_blocks(path: pathlib.Path, request_ids: list[Any]) -> list[list[int]] | None:
    """Returns the ids of the blocks of each request, in this order; None without the file."""
    if not path.exists():
        return None
    blocks = {}
    for where, row in json_lines(read_text(path), path):
        found = row if isinstance(row, dict) else {}
        if not isinstance(found.get("request_id"), str):
            raise InputError(f"{where}: request_id is {shown(found.get('request_id'))}, must be a text")
        blocks[found["request_id"]] = parse_block_ids(found.get("hash_ids"), where)
    for request_id in request_ids:
        if request_id not in blocks:
            raise InputError(f"{path}: has no line with request_id {shown(request_id)}, must have one for each request")
    return [blocks[request_id] for request_id in request_ids]


def _ticks(path: pathlib.Path) -> dict[str, np.ndarray]:
    rows = [
        [_number(dict(zip(_TICK_FIELDS, cells, strict=True)), name, where) for name in _TICK_FIELDS]
        for where, cells in CsvTable(read_text(path), path).rows(_TICK_FIELDS)
    ]
    if not rows:
        raise InputError(f"{path}: holds no row, must hold at least one")
    return dict(zip(_TICK_FIELDS, np.array(rows).T, strict=True))


def _number(row: Mapping[str, Any], name: str, where: str) -> float:
    counts = name.endswith("_toks")
    try:
        return (parse_count if counts else parse_number)(row.get(name))
    except ValueError:
        value = shown(row[name]) if name in row else "missing"
        raise InputError(f"{where}: {name} is {value}, must be a {'whole' if counts else 'finite'} number") from None
