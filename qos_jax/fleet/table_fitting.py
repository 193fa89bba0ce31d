"""Fits the tables of an iteration (``IterationTables``) to kernel times measured on a GPU.

Matrix kernels and the output head are taken as measured, over all tokens and over all requests of an iteration: they
run in tiles, so their times rise in steps that no line follows. Of the measured points those are kept that the others
do not imply. Attention is linear in sums over the requests (``ATTENTION_TERMS``), and its coefficients are fitted to
the rest of the time by relative least squares. All kinds of iterations weigh the same, and no coefficient is negative,
so that no iteration gets faster by what is added to it.

Where whole iterations of an engine were timed and not its kernels, all of it is fitted at once.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from qos_jax.fleet.kernel_tables import Curve, KernelTables
from qos_jax.fleet.profile_fitting import Iterations, times_per_model
from qos_jax.sim.cost import Batch, attention_terms
from qos_jax.sim.types import ATTENTION_TERMS, IterationTables

_KNOT_TOLERANCE = 0.01  # largest relative error of a measured point that is left out
_LARGE_ERROR = 0.1  # beyond, an iteration pulls no more: one long context beside few others, which no sum can tell
_PASSES = 12
_ROUNDS = 4  # of a fit whose errors are relative to what the round before it gave
_KNOTS = np.sort(np.append(2.0 ** np.arange(24), [3.0, 6.0, 12.0]))  # tokens
_FEW_TOKENS = 16
_NO_HEAD: Curve = (np.array([1.0, 2.0]), np.zeros(2))


def fit_tables(tables: KernelTables, iterations: Iterations, num_layers: int) -> IterationTables:
    """Fits the tables of one expert; the host takes no time, as kernels do not show it.

    Args:
      tables: measured kernels.
      iterations: of these kernels, as ``assemble`` returns them.
      num_layers: layers of the model.

    Returns:
      Tables with N = 1.
    """
    dense = _thinned(*_sum_of((count, curve) for count, curve in times_per_model(tables, num_layers)))
    head = _thinned(*_sum_of((1, curve) for curve in tables.head.values())) if tables.head else _NO_HEAD
    batch = iterations.batch
    kernels_s = np.interp(batch.prefill_tokens + batch.decodes, *dense) + np.interp(batch.requests, *head)
    attention_s = _fit_attention(iterations, kernels_s)
    return IterationTables(
        dense_tokens=dense[0][None],
        dense_s=dense[1][None],
        head_requests=head[0][None],
        head_s=head[1][None],
        attention_s=attention_s[None],
        host_s=np.zeros(1),
        host_per_sequence_s=np.zeros(1),
    )


def fit_whole(iterations: Iterations) -> IterationTables:
    """Fits the tables of one expert to iterations of an engine, with what its host did in them.

    The matrix kernels rise with the tokens, in a line with knots up to the largest iteration. At few tokens they may be
    dearer than that: on a CPU two tokens can take longer than four. What requests add to them is in the attention, so
    the head takes no time.

    Args:
      iterations: timed as a whole, of all kinds, with 1 to many requests.

    Returns:
      Tables with N = 1.
    """
    tokens = np.asarray(iterations.prompt_tokens + iterations.decodes, float)
    most = max(tokens.max(), 2.0)
    knots = np.append(_KNOTS[: np.searchsorted(_KNOTS, most)], most)
    rise = np.clip(knots[:, None] - knots[:-1], 0.0, np.diff(knots))
    above = np.eye(len(knots))[:, knots < min(_FEW_TOKENS, most)]
    curves = np.concatenate([np.ones((len(knots), 1)), rise, above], 1)  # of which the kernels are a sum, at the knots
    of_kernels = np.stack([np.interp(tokens, knots, curve) for curve in curves.T], 1)
    columns = np.concatenate([of_kernels, _terms(iterations)], 1)
    expected_s = iterations.time_s
    for _ in range(_ROUNDS):  # in errors of a time that scatters, the least squares would be too short
        found = _robust_nnls(columns, iterations.time_s, iterations.kind, expected_s)
        expected_s = columns @ found
    kernels_s, attention_s = np.split(found, [curves.shape[1]])
    return IterationTables(
        dense_tokens=knots[None],
        dense_s=(curves @ kernels_s)[None],
        head_requests=_NO_HEAD[0][None],
        head_s=_NO_HEAD[1][None],
        attention_s=attention_s[None],
        host_s=np.zeros(1),
        host_per_sequence_s=np.zeros(1),
    )


def _sum_of(curves: Iterable[tuple[int, Curve]]) -> Curve:
    """Returns the sum of curves, each as often as stated, at all points within the range of all of them."""
    curves = list(curves)
    counts = np.unique(np.concatenate([counts for _, (counts, _) in curves]))
    lowest, highest = max(c[0] for _, (c, _) in curves), min(c[-1] for _, (c, _) in curves)
    counts = counts[(counts >= lowest) & (counts <= highest)]
    return counts, np.sum([times * np.interp(counts, *curve) for times, curve in curves], axis=0)


def _thinned(counts: np.ndarray, seconds: np.ndarray) -> Curve:
    """Returns the curve without the points that the line between their neighbours implies.

    It does not fall at its end, as its last slope goes on beyond.
    """
    keep = np.zeros(len(counts), bool)
    keep[[0, -1]] = True
    spans = [(0, len(counts) - 1)]
    while spans:
        first, last = spans.pop()
        inner = slice(first + 1, last)
        line = np.interp(counts[inner], counts[[first, last]], seconds[[first, last]])
        error = np.abs(line / seconds[inner] - 1)
        if error.size and error.max() > _KNOT_TOLERANCE:
            worst = first + 1 + int(error.argmax())
            keep[worst] = True
            spans += [(first, worst), (worst, last)]
    counts, seconds = counts[keep], seconds[keep]
    return counts, np.append(seconds[:-1], seconds[-2:].max())


def _fit_attention(iterations: Iterations, kernels_s: np.ndarray) -> np.ndarray:
    """Returns the coefficients of ``ATTENTION_TERMS`` [12], 0 where nothing was measured.

    But without a mixed batch that goes on with a prompt, such a batch counts as one that begins it.
    """
    terms = _terms(iterations)
    coefficients = _robust_nnls(terms, iterations.time_s - kernels_s, iterations.kind, iterations.time_s)
    mixed, chunked = ATTENTION_TERMS.index("mixed"), ATTENTION_TERMS.index("mixed_chunked")
    if not terms[:, chunked].any():
        coefficients[chunked] = coefficients[mixed]
    return coefficients


def _terms(iterations: Iterations) -> np.ndarray:
    """Returns what multiplies the coefficients of ``ATTENTION_TERMS``, [R, 12]."""
    fields = {name: np.asarray(x, float) for name, x in vars(iterations.batch).items()}
    return np.asarray(attention_terms(Batch(**fields)), float)


def _robust_nnls(columns: np.ndarray, target_s: np.ndarray, kind: np.ndarray, whole_s: np.ndarray) -> np.ndarray:
    """Returns the non-negative coefficients [C] of columns [R, C] that give targets [R], in errors of ``whole_s`` [R].

    All kinds [R] of iterations weigh the same, and those with a large error less with each pass.
    """
    from scipy.optimize import nnls  # slow to import

    scale = np.where(columns.max(0) > 0, columns.max(0), 1.0)
    _, number, size = np.unique(kind, return_inverse=True, return_counts=True)
    equal = 1 / (whole_s * np.sqrt(size[number]))
    weight = equal
    for _ in range(_PASSES):
        solution, _ = nnls(columns / scale * weight[:, None], target_s * weight)
        error = np.abs((columns / scale) @ solution - target_s) / whole_s
        weight = equal / np.sqrt(np.maximum(error / _LARGE_ERROR, 1.0))
    return np.asarray(solution / scale)
