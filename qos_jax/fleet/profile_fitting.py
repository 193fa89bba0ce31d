"""Fits the timing of an expert to kernel times measured on its GPU.

Profilers measure the kernels of one layer. Iterations of the whole model are assembled from their tables (layers x
layer + embedding + head), and the cost model of the simulator is fitted to them by relative least squares in two steps.
Iterations that only decode, the most common ones, give ``step_base_s``, ``per_sequence_s`` and ``per_kv_token_s``.
Iterations that only prefill and mixed iterations, with equal weight, then give ``prefill_base_s`` and
``prefill_per_token_s``. Chunks of a prompt whose earlier part is cached are held out, as the model has no term for it.
``qos_jax.fleet.kernel_tables`` reads the tables.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from qos_jax.errors import InputError
from qos_jax.fleet.kernel_tables import ONCE_PER_MODEL, AttentionTable, Curve, KernelTables, curve_of
from qos_jax.fleet.profile_file import PROFILE_VERSION as PROFILE_VERSION
from qos_jax.fleet.profile_file import TIMING_UNITS, load_kernels
from qos_jax.fleet.profile_file import load_profile as load_profile
from qos_jax.fleet.profile_file import save_profile as save_profile
from qos_jax.io.text_files import shown
from qos_jax.sim.cost import Batch, iteration_s
from qos_jax.sim.types import ATTENTION_TERMS, TOKEN_BUDGET, ExpertProfile, IterationTables
from qos_jax.sim.validation import checked_tables

KINDS = ("decode", "prefill", "mixed", "chunked")

_TWICE_PER_LAYER = ("layernorm",)  # before the attention and before the MLP, one entry in LLMServingSim's table
_ALLREDUCES_PER_LAYER = 2  # after the attention and after the MLP
_ACTIVATION_BYTES = 2
_MIXED_PROMPTS = (64, 128, 256, 512, 1024)  # tokens, for mixed iterations that are sums of prefill and decode


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
        (1 if name in ONCE_PER_MODEL else num_layers * (2 if name in _TWICE_PER_LAYER else 1), curve)
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


def _prefill_batches(tables: KernelTables) -> tuple[AttentionTable, AttentionTable]:
    """Returns prefills at the token counts of the dense tables, and the measured batches of all other kinds."""
    table = tables.attention
    prefill = (table.prompt_tokens > 0) & (table.prefix_tokens == 0) & (table.decodes == 0)
    tokens = np.unique(np.concatenate([counts for counts, _ in tables.dense.values()]))
    if prefill.any():
        prompt, layer_s = curve_of(table.prompt_tokens[prefill], table.layer_s[prefill])
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
