"""Reads kernel times that profilers measured on a GPU, of one layer and of one model.

Tables are read in the formats of three profilers:

- LLMServingSim: ``layer,tokens,time_us``; for attention ``prefill_chunk,kv_prefill,n_decode,kv_decode,time_us``, with
  mixed batches in one call; for the head ``layer,sequences,time_us``.
- Vidur: ``time_stats.<operation>.median`` [ms] by ``num_tokens``; attention by ``batch_size``, ``prefill_chunk_size``,
  ``kv_cache_size``. Prefill and decode attention are separate calls, so a mixed iteration is the sum of both.
- A list of decode attention times: ``batch,kv,ms_layer``.
"""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np

from qos_jax.errors import InputError
from qos_jax.io.text_files import CsvTable, parse_number, read_text, shown

Curve = tuple[np.ndarray, np.ndarray]  # ascending counts, seconds
ONCE_PER_MODEL = ("embedding", "emb", "final_layernorm", "embedding_allreduce")
_LARGE_KERNELS = {
    "layer": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "num_tokens": ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj"),
}


@dataclasses.dataclass(frozen=True)
class AttentionTable:
    """Measured attention of one layer, one row per batch; a batch has at most one prompt chunk."""

    prompt_tokens: np.ndarray  # [R] tokens of the chunk, 0 for none
    prefix_tokens: np.ndarray  # [R] tokens of the same prompt that are already cached
    decodes: np.ndarray  # [R] decoding requests
    decode_kv_tokens: np.ndarray  # [R] cached tokens of each decoding request
    layer_s: np.ndarray  # [R] s

    def rows(self, keep: np.ndarray) -> AttentionTable:
        """Returns the rows where ``keep`` [R] is set."""
        return AttentionTable(*(getattr(self, field.name)[keep] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class KernelTables:
    """All measurements of one model on one GPU."""

    dense: dict[str, Curve]  # curves over tokens, per layer; per model for ONCE_PER_MODEL
    attention: AttentionTable
    head: dict[str, Curve]  # curves over requests, per model; empty if not measured
    notes: tuple[str, ...]  # deviations from complete measurements, to be reported with the fit


def read_tables(dense: str, attention: str, per_sequence: str | None = None) -> KernelTables:
    """Reads the tables of one model on one GPU from csv files; tensor-parallel measurements are ignored.

    Args:
      dense: file with the times of matrix kernels.
      attention: file with the times of attention.
      per_sequence: file with the times of the head; None if it was not measured.

    Raises:
      InputError: a file cannot be read, lacks a column, a kernel or rows, or a cell is not a legal number.
    """
    curves, notes = _read_dense(_Table(dense))
    batches = _read_attention(_Table(attention))
    if not (batches.prompt_tokens == 0).any():
        raise InputError(f"{attention}: has no batch that only decodes, must have some to fit step_base_s")
    if (batches.prompt_tokens == 0).all():
        notes.append("attention of prompts not measured: counted as 0")
    elif not ((batches.prompt_tokens > 0) & (batches.decodes > 0)).any():
        notes.append("mixed attention not measured: prefill and decode attention added")
    if per_sequence is None:
        notes.append("head not measured: counted as 0")
        return KernelTables(curves, batches, {}, tuple(notes))
    table = _Table(per_sequence)
    return KernelTables(curves, batches, _curves_by_layer(table, "sequences"), tuple(notes))


class _Table:
    """The columns of a csv file; every error names the file, the line and the column."""

    def __init__(self, path: str) -> None:
        self.path = path
        table = CsvTable(read_text(path), path)
        self.columns = table.header
        rows = [(where, dict(zip(table.header, cells, strict=True))) for where, cells in table.rows(table.header)]
        self.rows = [(where, row) for where, row in rows if row.get("num_tensor_parallel_workers", "1") == "1"]
        if not self.rows:
            raise InputError(f"{path}: has no rows of one GPU, must have some")

    def text(self, column: str) -> np.ndarray:
        """Returns the cells [rows], "" for a blank cell."""
        if column not in self.columns:
            raise InputError(f"{self.path}: has no column {column!r}, only {', '.join(self.columns[:8])}")
        return np.array([row[column] for _, row in self.rows])

    def counts(self, column: str) -> np.ndarray:
        """Returns a column of whole numbers >= 0 [rows]."""
        values = self._numbers(column)
        self._check(column, values, values == np.floor(values), "a whole number >= 0")
        return values

    def seconds(self, column: str, per_second: float, blank_is_nan: bool = False) -> np.ndarray:
        """Returns a column of times [rows] s, whose unit is 1 / ``per_second`` s."""
        values = self._numbers(column)
        self._check(column, values, ~np.isnan(values) | blank_is_nan, "a time >= 0")
        return values / per_second

    def _numbers(self, column: str) -> np.ndarray:
        """Returns the cells as numbers [rows], NaN for a blank cell or text."""
        values = np.full(len(self.rows), np.nan)
        for row, cell in enumerate(self.text(column)):
            with contextlib.suppress(ValueError):
                values[row] = parse_number(cell)
        return values

    def _check(self, column: str, values: np.ndarray, legal: np.ndarray, rule: str) -> None:
        cells = self.text(column)
        legal = legal & ~(values < 0) & ((cells == "") | ~np.isnan(values))
        if not legal.all():
            row = int(np.argmin(legal))
            raise InputError(f"{self.rows[row][0]}: {column} is {shown(str(cells[row]))}, must be {rule}")


def _read_dense(table: _Table) -> tuple[dict[str, Curve], list[str]]:
    """Returns the curves over tokens, and notes on cells that are interpolated."""
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
                usable = _is_usable(tokens, seconds)
                if not usable.any():
                    raise InputError(f"{table.path}: {column} has no time in any row, must have some")
                if not usable.all():
                    notes.append(f"{name}: {(~usable).sum()} of {len(usable)} times blank or failed: interpolated")
                curves[name] = curve_of(tokens[usable], seconds[usable])
    for name in _LARGE_KERNELS[key]:
        if name not in curves:
            raise InputError(f"{table.path}: has no times of {name!r}, only of {', '.join(curves)}")
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
        raise InputError(f"{table.path}: has no column time_stats.attn_*.median, must have one")
    layer_s = np.sum([table.seconds(column, 1e3) for column in medians], axis=0)
    decode = chunk == 0
    batches = AttentionTable(chunk, np.where(decode, 0, kv), batch * decode, kv * decode, layer_s)
    return batches.rows(decode | (batch == 1))


def _curves_by_layer(table: _Table, count: str) -> dict[str, Curve]:
    layer, counts, seconds = table.text("layer"), table.counts(count), table.seconds("time_us", 1e6)
    return {str(name): curve_of(counts[layer == name], seconds[layer == name]) for name in np.unique(layer)}


def curve_of(counts: np.ndarray, seconds: np.ndarray) -> Curve:
    """Returns the curve in ascending order, with repeated measurements averaged."""
    unique, index = np.unique(counts, return_inverse=True)
    return unique, np.bincount(index, seconds) / np.bincount(index)


def _is_usable(counts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Returns which times [rows] are usable: not blank, and at least a tenth of the median of those at fewer tokens.

    A kernel does not get ten times faster with more tokens, but Vidur's timers sometimes catch only a launch of 2 us.
    """
    usable = np.zeros(len(counts), bool)
    usable_s: list[float] = []
    for row in np.argsort(counts, kind="stable"):
        if not np.isnan(seconds[row]) and (not usable_s or seconds[row] >= 0.1 * np.median(usable_s)):
            usable[row] = True
            usable_s.append(seconds[row])
    return usable
