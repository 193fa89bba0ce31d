"""Fits the timing of an expert to kernel times measured on its GPU.

Profilers measure the kernels of one layer. Iterations of the whole model are assembled from their tables (layers x
layer + embedding + head), and the cost model of the simulator is fitted to them by relative least squares in two steps.
Iterations that only decode, the most common ones, give ``step_base_s``, ``per_sequence_s`` and ``per_kv_token_s``.
Iterations that only prefill and mixed iterations, with equal weight, then give ``prefill_base_s`` and
``prefill_per_token_s``. Chunks of a prompt whose earlier part is cached are held out, as the model has no term for it.

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
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from qos_jax.errors import InputError
from qos_jax.fleet.profile_file import PROFILE_VERSION as PROFILE_VERSION
from qos_jax.fleet.profile_file import TIMING_UNITS, load_kernels
from qos_jax.fleet.profile_file import load_profile as load_profile
from qos_jax.fleet.profile_file import save_profile as save_profile
from qos_jax.io.text_files import CsvTable, parse_number, read_text, shown
from qos_jax.sim.cost import Batch, iteration_s
from qos_jax.sim.types import ATTENTION_TERMS, TOKEN_BUDGET, ExpertProfile, IterationTables
from qos_jax.sim.validation import checked_tables

KINDS = ("decode", "prefill", "mixed", "chunked")

Curve = tuple[np.ndarray, np.ndarray]  # ascending counts, seconds

_ONCE_PER_MODEL = ("embedding", "emb", "final_layernorm", "embedding_allreduce")
_TWICE_PER_LAYER = ("layernorm",)  # before the attention and before the MLP, one entry in LLMServingSim's table
_LARGE_KERNELS = {
    "layer": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "num_tokens": ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj"),
}
_ALLREDUCES_PER_LAYER = 2  # after the attention and after the MLP
_ACTIVATION_BYTES = 2
_MIXED_PROMPTS = (64, 128, 256, 512, 1024)  # tokens, for mixed iterations that are sums of prefill and decode


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

    dense: dict[str, Curve]  # curves over tokens, per layer; per model for _ONCE_PER_MODEL
    attention: AttentionTable
    head: dict[str, Curve]  # curves over requests, per model; empty if not measured
    notes: tuple[str, ...]  # deviations from complete measurements, to be reported with the fit


@dataclasses.dataclass(frozen=True)
class Iterations:
    """Times of whole-model iterations."""

    kind: np.ndarray  # [R] one of KINDS; chunked: with a prompt whose earlier part is cached
    prompt_tokens: np.ndarray  # [R] tokens P
    requests: np.ndarray  # [R] requests B
    kv_tokens: np.ndarray  # [R] tokens K
    time_s: np.ndarray  # [R] s
    prefix_tokens: np.ndarray  # [R] tokens of the prompts that are cached already
    pairs: np.ndarray  # [R] for each prompt, tokens computed x (tokens cached + half of those computed)
    decodes: np.ndarray  # [R] decoding requests

    def rows(self, keep: np.ndarray) -> Iterations:
        """Returns the rows where ``keep`` [R] is set."""
        return Iterations(*(getattr(self, field.name)[keep] for field in dataclasses.fields(self)))

    @property
    def batch(self) -> Batch:
        """What each iteration computes, for ``qos_jax.sim.cost``."""
        return Batch(self.requests, self.prompt_tokens, self.kv_tokens, self.decodes, self.prefix_tokens, self.pairs)


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


@dataclasses.dataclass(frozen=True)
class Link:
    """The link between two GPUs that share every layer of a model, and what they exchange over it in 16 bit."""

    gb_per_s: float  # 10^9 bytes/s in one direction
    latency_us: float  # of one exchange, whatever its size
    hidden_size: int
    vocab_size: int | None = None  # of a vocabulary that they share, too; None: embedding and logits are not exchanged

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
          InputError: one is out of range.
        """
        for name, value in vars(self).items():
            lowest = "at least 0" if name == "latency_us" else "above 0"
            if value is not None and not (0 < value < math.inf or (value == 0 and lowest == "at least 0")):
                raise InputError(f"{name} of the link is {shown(value)}, must be {lowest}")

    def exchange_s(self, values: np.ndarray) -> np.ndarray:
        """Returns the duration [s] of an exchange in which each GPU sends so many values."""
        return self.latency_us / 1e6 + values * _ACTIVATION_BYTES / (self.gb_per_s * 1e9)


def with_exchange(tables: KernelTables, link: Link) -> KernelTables:
    """Adds what two GPUs exchange to the kernels of one of them, as if no kernel ran meanwhile.

    Each layer sums its activations over both GPUs twice, after the attention and after the MLP. An all-reduce between
    two GPUs sends as many values as it sums, tokens x hidden size. With the vocabulary, the embedding takes another
    one, and each GPU sends its half of the logits of each request.

    Returns:
      The tables with the curves ``allreduce``, per layer, and ``embedding_allreduce`` over the token counts of the
      others, and with ``logits`` over the requests of the head, if it was measured.
    """
    tokens = np.unique(np.concatenate([counts for counts, _ in tables.dense.values()]))
    allreduce_s = link.exchange_s(tokens * link.hidden_size)
    dense, head = {"allreduce": (tokens, _ALLREDUCES_PER_LAYER * allreduce_s)}, {}
    if link.vocab_size is not None:
        dense["embedding_allreduce"] = tokens, allreduce_s
        for requests, _ in list(tables.head.values())[:1]:
            head["logits"] = requests, link.exchange_s(requests * link.vocab_size / 2)
    note = f"exchange between two GPUs assumed: {link.gb_per_s:g} GB/s and {link.latency_us:g} us for each"
    return dataclasses.replace(tables, dense=tables.dense | dense, head=tables.head | head, notes=(*tables.notes, note))


def assemble(tables: KernelTables, num_layers: int, max_kv_tokens: int | None = None) -> Iterations:
    """Assembles iterations of the whole model, within the token budget and the range of the tables.

    Decode, mixed and chunked iterations are the batches of the attention table. Prefill iterations are at every token
    count of the dense tables, which resolves the steps of matrix kernels; their attention is interpolated.

    Args:
      tables: kernels of one layer.
      num_layers: layers of the model.
      max_kv_tokens: tokens that the model's KV memory holds; larger batches, measured on one layer, are left out.
    """
    prefill, rest = _prefill_batches(tables)
    batches = (prefill, rest, _sum_mixed_batches(prefill, rest))
    prompt, prefix, decodes, decode_kv, layer_s = (
        np.concatenate([getattr(batch, field.name) for batch in batches])
        for field in dataclasses.fields(AttentionTable)
    )
    kind = np.select([prefix > 0, prompt == 0, decodes == 0], ["chunked", "decode", "prefill"], "mixed")
    tokens, requests, kv_tokens = prompt + decodes, decodes + (prompt > 0), decodes * decode_kv
    time_s = num_layers * layer_s
    for count, curve in times_per_model(tables, num_layers):
        time_s = time_s + count * np.interp(tokens, *curve)
    for curve in tables.head.values():
        time_s = time_s + np.interp(requests, *curve)
    usable = (requests > 0) & (tokens <= TOKEN_BUDGET)
    if max_kv_tokens is not None:
        usable &= kv_tokens + prefix <= max_kv_tokens
    for counts, curves in ((tokens, tables.dense), (requests, tables.head)):
        for measured, _ in curves.values():
            usable &= (counts >= measured[0]) & (counts <= measured[-1])
    pairs = prompt * (prefix + prompt / 2)
    return Iterations(kind, prompt, requests, kv_tokens, time_s, prefix, pairs, decodes).rows(usable)


def times_per_model(tables: KernelTables, num_layers: int) -> list[tuple[int, Curve]]:
    """Returns how often an iteration runs each matrix kernel, and its curve."""
    return [
        (1 if name in _ONCE_PER_MODEL else num_layers * (2 if name in _TWICE_PER_LAYER else 1), curve)
        for name, curve in tables.dense.items()
    ]


def fit_timing(iterations: Iterations) -> dict[str, float]:
    """Fits the five coefficients of ``TIMING_UNITS``, none negative.

    Raises:
      InputError: the iterations do not determine the coefficients.
    """
    step_s, sequence_s, kv_s = _fit_decode(iterations)
    prompt, target_s, weight = _prefill_targets(iterations, sequence_s, kv_s)
    best = (math.inf, 0.0, 0.0)
    for knee_tokens in np.unique(prompt)[:-1]:  # iterations with fewer prompt tokens take step_base_s
        above = prompt >= knee_tokens
        line = np.stack([np.ones(above.sum()), prompt[above]], 1)
        base_s, token_s = _nnls(line, target_s[above], weight[above])
        residual = (np.maximum(step_s, base_s + token_s * prompt) - target_s) * weight
        best = min(best, (float(residual @ residual), base_s, token_s))
    _, base_s, token_s = best
    return dict(zip(TIMING_UNITS, (step_s, base_s, token_s, sequence_s, kv_s), strict=True))


def fit_affine(iterations: Iterations) -> dict[str, float]:
    """Fits the coefficients without the lower bound, for comparison: every prompt token adds to ``step_base_s``."""
    step_s, sequence_s, kv_s = _fit_decode(iterations)
    prompt, target_s, weight = _prefill_targets(iterations, sequence_s, kv_s)
    (token_s,) = _nnls(prompt[:, None], target_s - step_s, weight)
    return dict(zip(TIMING_UNITS, (step_s, step_s, token_s, sequence_s, kv_s), strict=True))


def relative_errors(timing: Mapping[str, Any], iterations: Iterations) -> dict[str, dict[str, float]]:
    """Returns the relative errors of the simulator's cost model, by kind of iteration.

    Args:
      timing: the five coefficients, and ``kernels`` if the tables count.
      iterations: measured iterations.

    Returns:
      For each kind: mean absolute error ``mape``, mean error ``bias``, largest absolute error ``max``, and the number
      of ``iterations``.
    """
    error = predicted_s(timing, iterations) / iterations.time_s - 1
    return {
        kind: {
            "mape": float(np.abs(error[of_kind]).mean()),
            "bias": float(error[of_kind].mean()),
            "max": float(np.abs(error[of_kind]).max()),
            "iterations": int(of_kind.sum()),
        }
        for kind in KINDS
        if (of_kind := iterations.kind == kind).any()
    }


def predicted_s(timing: Mapping[str, Any], iterations: Iterations) -> np.ndarray:
    """Returns the durations [R] s by the simulator's cost model; see ``relative_errors``."""
    experts = ExpertProfile(**timing, kv_blocks=0, max_running=0, max_waiting=0)  # iteration_s uses none of the three
    return np.asarray(iteration_s(experts, iterations.batch), np.float64)


def load_tables(path: str | os.PathLike[str]) -> IterationTables:
    """Returns the tables in a profile file, with N = 1.

    Raises:
      InputError: the file cannot be read, is of version 1, which has no tables, or a field is missing or illegal.
    """
    return checked_tables(tables_from_json(load_kernels(path)), 1, name=f"{path}: kernels")


def tables_from_json(kernels: Mapping[str, Any]) -> IterationTables:
    """Returns the tables, with N = 1, of what ``tables_as_json`` returned."""
    attention = [kernels["attention_s"][name] for name in ATTENTION_TERMS]
    return IterationTables(**{name: np.array([value]) for name, value in {**kernels, "attention_s": attention}.items()})


def tables_as_json(tables: IterationTables) -> dict[str, Any]:
    """Returns the tables of one expert as ``load_tables`` reads them under ``kernels``."""
    fields = {field.name: np.asarray(getattr(tables, field.name))[0].tolist() for field in dataclasses.fields(tables)}
    return fields | {"attention_s": dict(zip(ATTENTION_TERMS, fields["attention_s"], strict=True))}


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
                curves[name] = _curve(tokens[usable], seconds[usable])
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
    return {str(name): _curve(counts[layer == name], seconds[layer == name]) for name in np.unique(layer)}


def _curve(counts: np.ndarray, seconds: np.ndarray) -> Curve:
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


def _prefill_batches(tables: KernelTables) -> tuple[AttentionTable, AttentionTable]:
    """Returns prefills at the token counts of the dense tables, and the measured batches of all other kinds."""
    table = tables.attention
    prefill = (table.prompt_tokens > 0) & (table.prefix_tokens == 0) & (table.decodes == 0)
    tokens = np.unique(np.concatenate([counts for counts, _ in tables.dense.values()]))
    if prefill.any():
        prompt, layer_s = _curve(table.prompt_tokens[prefill], table.layer_s[prefill])
        tokens = tokens[(tokens >= prompt[0]) & (tokens <= prompt[-1])]
        attention_s = np.interp(tokens, prompt, layer_s)
    else:
        attention_s = np.zeros(len(tokens))
    zeros = np.zeros(len(tokens))
    return AttentionTable(tokens, zeros, zeros, zeros, attention_s), table.rows(~prefill)


def _sum_mixed_batches(prefill: AttentionTable, rest: AttentionTable) -> AttentionTable:
    """Returns mixed batches as sums of a prefill and a decode batch; no rows if mixed batches were measured."""
    decode = rest.rows(rest.prompt_tokens == 0)
    measured = ((rest.prompt_tokens > 0) & (rest.decodes > 0)).any()
    prefill = prefill.rows(np.isin(prefill.prompt_tokens, () if measured else _MIXED_PROMPTS))
    first, second = (x.ravel() for x in np.indices((len(prefill.layer_s), len(decode.layer_s))))
    prefill, decode = prefill.rows(first), decode.rows(second)
    return AttentionTable(
        prefill.prompt_tokens,
        prefill.prefix_tokens,
        decode.decodes,
        decode.decode_kv_tokens,
        prefill.layer_s + decode.layer_s,
    )


def _fit_decode(iterations: Iterations) -> tuple[float, float, float]:
    """Returns step_base_s, per_sequence_s and per_kv_token_s from the iterations that only decode."""
    decode = iterations.kind == "decode"
    columns = np.stack([np.ones(decode.sum()), iterations.requests[decode], iterations.kv_tokens[decode]], 1)
    if np.linalg.matrix_rank(columns) < 3:
        raise InputError(
            f"the {len(columns)} decode batches within the ranges of the tables and max_kv_tokens are too alike to "
            "fit step_base_s, per_sequence_s and per_kv_token_s; they must differ in requests and in cached tokens"
        )
    step_s, sequence_s, kv_s = _nnls(columns, iterations.time_s[decode], 1 / iterations.time_s[decode])
    return step_s, sequence_s, kv_s


def _prefill_targets(
    iterations: Iterations, sequence_s: float, kv_s: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns prompt tokens, the time to explain by them, and the weight of each prefill and mixed iteration."""
    prefill, mixed = iterations.kind == "prefill", iterations.kind == "mixed"
    lengths = len(np.unique(iterations.prompt_tokens[prefill]))
    if lengths < 3:
        raise InputError(f"there are prompts of {lengths} lengths within the ranges of the tables, must be at least 3")
    target_s = iterations.time_s - sequence_s * iterations.requests - kv_s * iterations.kv_tokens
    weight = 1 / (iterations.time_s * np.sqrt(np.where(prefill, prefill.sum(), mixed.sum())))
    selected = prefill | mixed
    return iterations.prompt_tokens[selected], target_s[selected], weight[selected]


def _nnls(columns: np.ndarray, target: np.ndarray, weight: np.ndarray) -> list[float]:
    """Returns the non-negative least-squares coefficients; columns are scaled to a common size for accuracy."""
    from scipy.optimize import nnls  # slow to import

    scale = columns.max(0)
    solution, _ = nnls(columns / scale * weight[:, None], target * weight)
    return [float(x) for x in solution / scale]
