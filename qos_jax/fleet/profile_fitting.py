"""Fits the timing of an expert to kernel times measured on its GPU, and reads and writes the result.

Profilers measure the kernels of one layer. From their tables the iterations of the whole model are assembled, layers x
layer + embedding + head, and the simulator's cost form is fitted to them by relative least squares in two steps. The
iterations that only decode, most of what a GPU runs, give ``step_base_s``, ``per_sequence_s`` and ``per_kv_token_s``.
Those that only prefill and those that do both, with equal weight, then give ``prefill_base_s`` and
``prefill_per_token_s``. Chunks behind a cached part of their prompt, for which the form has no term, are held out.

Tables are read as three profilers write them:

- LLMServingSim: ``layer,tokens,time_us``; attention ``prefill_chunk,kv_prefill,n_decode,kv_decode,time_us``, mixed
  batches in one call; ``layer,sequences,time_us`` for the head.
- Vidur: ``time_stats.<operation>.median`` [ms] by ``num_tokens``; attention by ``batch_size``, ``prefill_chunk_size``,
  ``kv_cache_size``. Prefill and decode attention are separate calls, so those of a mixed iteration are added.
- A list of decode attention times: ``batch,kv,ms_layer``.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

from qos_jax.errors import InputError
from qos_jax.io.files import parse_json, write_whole
from qos_jax.sim.cost import iteration_s
from qos_jax.sim.types import TOKEN_BUDGET, ExpertProfile

TIMING_UNITS = {
    "step_base_s": "s",
    "prefill_base_s": "s",
    "prefill_per_token_s": "s/token",
    "per_sequence_s": "s/request",
    "per_kv_token_s": "s/token",
}
KINDS = ("decode", "prefill", "mixed", "chunked")

_ONCE_PER_MODEL = ("embedding", "emb", "final_layernorm")
_TWICE_PER_LAYER = ("layernorm",)  # before the attention and before the MLP, one entry in LLMServingSim's table
_LARGE_KERNELS = {
    "layer": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "num_tokens": ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj"),
}
_MIXED_PROMPTS = (64, 128, 256, 512, 1024)  # tokens, where mixed iterations are not measured but added up


@dataclasses.dataclass(frozen=True)
class AttentionTable:
    """Measured attention of one layer, one row per batch; a batch holds one prompt chunk at most."""

    prompt_tokens: np.ndarray  # [R] tokens of the chunk, 0 for none
    prefix_tokens: np.ndarray  # [R] tokens of the same prompt that are cached already
    decodes: np.ndarray  # [R] decoding requests
    decode_kv_tokens: np.ndarray  # [R] cached tokens of each of them
    layer_s: np.ndarray  # [R] s

    def rows(self, keep: np.ndarray) -> AttentionTable:
        """Returns the rows where ``keep`` [R] holds."""
        return AttentionTable(*(getattr(self, field.name)[keep] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class KernelTables:
    """Everything measured of one model on one GPU; a curve is (counts, ascending; seconds)."""

    dense: dict[str, tuple[np.ndarray, np.ndarray]]  # by tokens in the iteration, per layer or, for a few, per model
    attention: AttentionTable
    head: dict[str, tuple[np.ndarray, np.ndarray]]  # by requests in the iteration, per model; empty if not measured
    notes: tuple[str, ...]  # what a reader of the fit must know


@dataclasses.dataclass(frozen=True)
class Iterations:
    """Times of whole-model iterations."""

    kind: np.ndarray  # [R] one of KINDS; chunked: with a prompt of which a part is cached already
    prompt_tokens: np.ndarray  # [R] tokens P
    requests: np.ndarray  # [R] requests B
    kv_tokens: np.ndarray  # [R] tokens K
    time_s: np.ndarray  # [R] s


def read_tables(dense: str, attention: str, per_sequence: str | None = None) -> KernelTables:
    """Reads the tables of one model on one GPU from csv files; tensor-parallel measurements are left out.

    Raises:
      InputError: a file cannot be read, lacks a column, a kernel or rows, or a cell is not a number of legal size.
    """
    curves, notes = _read_dense(_Table(dense))
    batches = _read_attention(_Table(attention))
    if not (batches.prompt_tokens == 0).any():
        raise InputError(f"{attention}: no batch that only decodes, needed for step_base_s and per_kv_token_s")
    if (batches.prompt_tokens == 0).all():
        notes.append("attention of prompts not measured: counted as 0")
    elif not ((batches.prompt_tokens > 0) & (batches.decodes > 0)).any():
        notes.append("mixed attention not measured: prefill and decode attention added")
    if per_sequence is None:
        notes.append("head not measured: counted as 0")
        return KernelTables(curves, batches, {}, tuple(notes))
    table = _Table(per_sequence)
    return KernelTables(curves, batches, _curves_by_layer(table, "sequences"), tuple(notes))


def assemble(tables: KernelTables, num_layers: int, max_kv_tokens: int | None = None) -> Iterations:
    """Assembles iterations of the whole model, within the token budget and the range of the tables.

    Decode, mixed and chunked iterations are those of the attention table. Prefill ones are at every token count of the
    dense tables, with attention interpolated between the measured chunks, for the sake of the steps of matrix kernels.

    Args:
      tables: kernels of one layer.
      num_layers: layers of the model.
      max_kv_tokens: tokens that the model's KV memory holds; batches with more, measured on one layer, are left out.
    """
    prefill, rest = _prefill_batches(tables)
    batches = (prefill, rest, _added_batches(prefill, rest))
    prompt, prefix, decodes, decode_kv, layer_s = (
        np.concatenate([getattr(batch, field.name) for batch in batches])
        for field in dataclasses.fields(AttentionTable)
    )
    kind = np.select([prefix > 0, prompt == 0, decodes == 0], ["chunked", "decode", "prefill"], "mixed")
    tokens, requests, kv_tokens = prompt + decodes, decodes + (prompt > 0), decodes * decode_kv
    time_s = num_layers * layer_s
    for name, curve in tables.dense.items():
        count = 1 if name in _ONCE_PER_MODEL else num_layers * (2 if name in _TWICE_PER_LAYER else 1)
        time_s = time_s + count * np.interp(tokens, *curve)
    for curve in tables.head.values():
        time_s = time_s + np.interp(requests, *curve)
    usable = (requests > 0) & (tokens <= TOKEN_BUDGET)
    if max_kv_tokens is not None:
        usable &= kv_tokens + prefix <= max_kv_tokens
    for counts, curves in ((tokens, tables.dense), (requests, tables.head)):
        for measured, _ in curves.values():
            usable &= (counts >= measured[0]) & (counts <= measured[-1])
    return Iterations(kind[usable], prompt[usable], requests[usable], kv_tokens[usable], time_s[usable])


def fit_timing(iterations: Iterations) -> dict[str, float]:
    """Fits the five coefficients of ``TIMING_UNITS``, none negative.

    Raises:
      InputError: the iterations do not tell the coefficients apart.
    """
    step_s, sequence_s, kv_s = _fit_decode(iterations)
    prompt, target_s, weight = _prefill_targets(iterations, sequence_s, kv_s)
    best = (math.inf, 0.0, 0.0)
    for first in np.unique(prompt)[:-1]:  # iterations with fewer prompt tokens than this lie on the floor
        above = prompt >= first
        line = np.stack([np.ones(above.sum()), prompt[above]], 1)
        base_s, token_s = _nnls(line, target_s[above], weight[above])
        residual = (np.maximum(step_s, base_s + token_s * prompt) - target_s) * weight
        best = min(best, (float(residual @ residual), base_s, token_s))
    _, base_s, token_s = best
    return dict(zip(TIMING_UNITS, (step_s, base_s, token_s, sequence_s, kv_s), strict=True))


def fit_affine(iterations: Iterations) -> dict[str, float]:
    """Fits the same way without the floor, for comparison: every prompt token adds to ``step_base_s``."""
    step_s, sequence_s, kv_s = _fit_decode(iterations)
    prompt, target_s, weight = _prefill_targets(iterations, sequence_s, kv_s)
    (token_s,) = _nnls(prompt[:, None], target_s - step_s, weight)
    return dict(zip(TIMING_UNITS, (step_s, step_s, token_s, sequence_s, kv_s), strict=True))


def relative_errors(timing: dict[str, float], iterations: Iterations) -> dict[str, dict[str, float]]:
    """Returns for each kind of iteration the mean absolute, mean signed and largest relative error of the simulator."""
    counts = (iterations.prompt_tokens, iterations.requests, iterations.kv_tokens)
    experts = ExpertProfile(**timing, kv_blocks=0, max_running=0, max_waiting=0)  # the cost reads none of the three
    error = np.asarray(iteration_s(experts, *map(jnp.asarray, counts)), np.float64) / iterations.time_s - 1
    return {
        kind: {
            "mape": float(np.abs(error[mine]).mean()),
            "bias": float(error[mine].mean()),
            "max": float(np.abs(error[mine]).max()),
            "iterations": int(mine.sum()),
        }
        for kind in KINDS
        if (mine := iterations.kind == kind).any()
    }


def save_profile(path: str, profile: dict[str, Any]) -> None:
    """Writes a profile as JSON, wholly or not at all.

    Raises:
      InputError: the file cannot be written.
    """
    write_whole(path, json.dumps(profile, indent=2, allow_nan=False) + "\n")


def load_profile(path: str) -> dict[str, float]:
    """Returns the timing fields of ``ExpertProfile`` from a file that ``save_profile`` wrote.

    Raises:
      InputError: the file cannot be read, or a coefficient is missing, not a finite number, or negative.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    profile = parse_json(text, path, parse_int=float)
    timing = profile.get("timing") if isinstance(profile, dict) else None
    if not isinstance(timing, dict):
        raise InputError(f"{path}: no object 'timing', must hold {', '.join(TIMING_UNITS)}")
    for name in TIMING_UNITS:
        if name not in timing:
            raise InputError(f"{path}: timing.{name} is missing")
        value = timing[name]
        if not isinstance(value, float) or not 0 <= value < math.inf:
            raise InputError(f"{path}: timing.{name} is {value!r}, must be a finite number >= 0")
    return {name: timing[name] for name in TIMING_UNITS}


class _Table:
    """A csv file by columns; every error names the file, the column and the line."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            with open(path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                rows = list(reader)
                self.columns = list(reader.fieldnames or [])
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: cannot be read as csv: {error}") from error
        if "num_tensor_parallel_workers" in self.columns:
            rows = [row for row in rows if row["num_tensor_parallel_workers"] == "1"]
        if not rows:
            raise InputError(f"{path}: no rows (of one GPU)")
        self.rows = rows

    def text(self, column: str) -> np.ndarray:
        """Returns the cells [rows], "" where blank."""
        if column not in self.columns:
            raise InputError(f"{self.path}: no column {column!r}, found {', '.join(self.columns[:8])}")
        return np.array([row[column] or "" for row in self.rows])

    def counts(self, column: str) -> np.ndarray:
        """Returns whole numbers >= 0 [rows]."""
        values = self._numbers(column)
        self._check(column, values, values == np.floor(values), "a whole number >= 0")
        return values

    def seconds(self, column: str, per_second: float, blank_is_nan: bool = False) -> np.ndarray:
        """Returns times [rows] in seconds, from a unit of which there are ``per_second``."""
        values = self._numbers(column)
        self._check(column, values, ~np.isnan(values) | blank_is_nan, "a time >= 0")
        return values / per_second

    def _numbers(self, column: str) -> np.ndarray:
        """Returns the cells as numbers, NaN where blank or not a number."""
        values = np.full(len(self.rows), np.nan)
        for row, cell in enumerate(self.text(column)):
            with contextlib.suppress(ValueError):
                values[row] = float(cell)
        return values

    def _check(self, column: str, values: np.ndarray, legal: np.ndarray, what: str) -> None:
        cells = self.text(column)
        legal = legal & ~(values < 0) & ~np.isinf(values) & ((cells == "") | ~np.isnan(values))
        if not legal.all():
            row = int(np.argmin(legal))
            raise InputError(f"{self.path}: {column} is {str(cells[row])!r} in data row {row + 1}, must be {what}")


def _read_dense(table: _Table) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """Returns the curves over tokens, and notes on cells that were left out."""
    notes = []
    if "layer" in table.columns:
        curves, key = _curves_by_layer(table, "tokens"), "layer"
    else:
        tokens, key = table.counts("num_tokens"), "num_tokens"
        curves = {}
        for column in table.columns:
            if column.startswith("time_stats.") and column.endswith(".median"):
                name = column.split(".")[1]
                seconds = table.seconds(column, 1e3, blank_is_nan=True)
                kept = _measured(tokens, seconds)
                if not kept.any():
                    raise InputError(f"{table.path}: {column} has no time in any row")
                if not kept.all():
                    notes.append(f"{name}: {(~kept).sum()} of {len(kept)} times blank or failed: interpolated")
                curves[name] = _curve(tokens[kept], seconds[kept])
    for name in _LARGE_KERNELS[key]:
        if name not in curves:
            raise InputError(f"{table.path}: no times of {name!r}, found {', '.join(curves)}")
    return curves, notes


def _read_attention(table: _Table) -> AttentionTable:
    if "n_decode" in table.columns:
        chunk, prefix, decodes = (table.counts(column) for column in ("prefill_chunk", "kv_prefill", "n_decode"))
        return AttentionTable(chunk, prefix, decodes, table.counts("kv_decode"), table.seconds("time_us", 1e6))
    if "ms_layer" in table.columns:
        batch, kv, layer_s = table.counts("batch"), table.counts("kv"), table.seconds("ms_layer", 1e3)
        return AttentionTable(0 * batch, 0 * batch, batch, kv, layer_s)
    batch, chunk, kv = (table.counts(column) for column in ("batch_size", "prefill_chunk_size", "kv_cache_size"))
    medians = [c for c in table.columns if c.startswith("time_stats.attn_") and c.endswith(".median")]
    if not medians:
        raise InputError(f"{table.path}: no column time_stats.attn_*.median")
    layer_s = np.sum([table.seconds(column, 1e3) for column in medians], axis=0)
    decode = chunk == 0
    every = AttentionTable(chunk, np.where(decode, 0, kv), batch * decode, kv * decode, layer_s)
    return every.rows(decode | (batch == 1))


def _curves_by_layer(table: _Table, count: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    layer, counts, seconds = table.text("layer"), table.counts(count), table.seconds("time_us", 1e6)
    return {str(name): _curve(counts[layer == name], seconds[layer == name]) for name in np.unique(layer)}


def _curve(counts: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts a curve and averages repeated measurements."""
    unique, where = np.unique(counts, return_inverse=True)
    return unique, np.bincount(where, seconds) / np.bincount(where)


def _measured(counts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Returns which times stand: not blank, and not below a tenth of the median of those at fewer tokens.

    A kernel does not get ten times faster with more tokens; Vidur's timers sometimes catch only a launch of 2 us.
    """
    kept = np.zeros(len(counts), bool)
    stand: list[float] = []
    for row in np.argsort(counts, kind="stable"):
        if not np.isnan(seconds[row]) and (not stand or seconds[row] >= 0.1 * np.median(stand)):
            kept[row] = True
            stand.append(seconds[row])
    return kept


def _prefill_batches(tables: KernelTables) -> tuple[AttentionTable, AttentionTable]:
    """Returns whole prompts at the token counts of the dense tables, and the measured batches of every other kind."""
    table = tables.attention
    whole = (table.prompt_tokens > 0) & (table.prefix_tokens == 0) & (table.decodes == 0)
    tokens = np.unique(np.concatenate([counts for counts, _ in tables.dense.values()]))
    if whole.any():
        prompt, layer_s = _curve(table.prompt_tokens[whole], table.layer_s[whole])
        tokens = tokens[(tokens >= prompt[0]) & (tokens <= prompt[-1])]
        attention_s = np.interp(tokens, prompt, layer_s)
    else:
        attention_s = np.zeros(len(tokens))
    none = np.zeros(len(tokens))
    return AttentionTable(tokens, none, none, none, attention_s), table.rows(~whole)


def _added_batches(prefill: AttentionTable, rest: AttentionTable) -> AttentionTable:
    """Returns mixed batches as the sum of a prefill and a decode batch; none if the table measured mixed ones."""
    decode = rest.rows(rest.prompt_tokens == 0)
    measured = ((rest.prompt_tokens > 0) & (rest.decodes > 0)).any()
    chosen = prefill.rows(np.isin(prefill.prompt_tokens, () if measured else _MIXED_PROMPTS))
    first, second = (x.ravel() for x in np.indices((len(chosen.layer_s), len(decode.layer_s))))
    chosen, decode = chosen.rows(first), decode.rows(second)
    return AttentionTable(
        chosen.prompt_tokens,
        chosen.prefix_tokens,
        decode.decodes,
        decode.decode_kv_tokens,
        chosen.layer_s + decode.layer_s,
    )


def _fit_decode(iterations: Iterations) -> tuple[float, float, float]:
    """Returns step_base_s, per_sequence_s and per_kv_token_s from the iterations that only decode."""
    mine = iterations.kind == "decode"
    columns = np.stack([np.ones(mine.sum()), iterations.requests[mine], iterations.kv_tokens[mine]], 1)
    if np.linalg.matrix_rank(columns) < 3:
        raise InputError(
            f"the {len(columns)} decode batches within the ranges of the tables and max_kv_tokens are too alike to "
            "tell step_base_s, per_sequence_s and per_kv_token_s apart"
        )
    step_s, sequence_s, kv_s = _nnls(columns, iterations.time_s[mine], 1 / iterations.time_s[mine])
    return step_s, sequence_s, kv_s


def _prefill_targets(
    iterations: Iterations, sequence_s: float, kv_s: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns of prefill and mixed iterations the prompt tokens, the time that these must explain, and the weight."""
    prefill, mixed = iterations.kind == "prefill", iterations.kind == "mixed"
    lengths = len(np.unique(iterations.prompt_tokens[prefill]))
    if lengths < 3:
        raise InputError(f"prompts of {lengths} lengths within the ranges of the tables, at least 3 must be measured")
    target_s = iterations.time_s - sequence_s * iterations.requests - kv_s * iterations.kv_tokens
    weight = 1 / (iterations.time_s * np.sqrt(np.where(prefill, prefill.sum(), mixed.sum())))
    mine = prefill | mixed
    return iterations.prompt_tokens[mine], target_s[mine], weight[mine]


def _nnls(columns: np.ndarray, target: np.ndarray, weight: np.ndarray) -> list[float]:
    """Returns the non-negative least-squares coefficients; columns are scaled to be alike."""
    scale = columns.max(0)
    solution, _ = nnls(columns / scale * weight[:, None], target * weight)
    return [float(x) for x in solution / scale]
