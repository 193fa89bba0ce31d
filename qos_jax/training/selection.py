"""Which weights of a run its router gets: the last ones, or those of its best evaluation.

A router may get worse in training. Its evaluations are made anyway, on requests that it is not judged by later (see
``validation``), so to keep the best one costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qos_jax.agent.sac import Weights
from qos_jax.evaluation.statistics import summarise

Record = Mapping[str, Any]


class Selection:
    """The weights that the routers get if training ends now; leaves [seeds, ...] if there are several seeds."""

    def __init__(self, keep_best: bool, weights: Weights, num_seeds: int) -> None:
        """Begins with the weights before training."""
        self.keep_best, self.weights = keep_best, weights
        self.qos = np.full(num_seeds, -np.inf)

    def go_on(self, weights: Weights, records: Sequence[Record]) -> None:
        """Takes the weights that a checkpoint has kept, and the records of the run until then."""
        self.weights = weights
        self.qos = np.max([record["qos"] for record in evaluations(records)], 0)

    def evaluated(self, weights: Weights, qos: Array) -> None:
        """Takes weights and their QoS [E] or [seeds, E]."""
        each = np.asarray(qos, np.float64).reshape(len(self.qos), -1).mean(1)
        better = each > self.qos
        self.qos = np.where(better, each, self.qos)
        if self.keep_best:
            self.weights = _chosen(better if len(better) > 1 else better[0], weights, self.weights)

    def of(self, last: Weights) -> Weights:
        """Returns the weights that are kept, where ``last`` are the newest ones."""
        return self.weights if self.keep_best else last


@jax.jit
def _chosen(better: Array, weights: Weights, others: Weights) -> Weights:
    """Returns the weights where ``better`` [] or [seeds] is set, and the others elsewhere."""

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(better.reshape(*better.shape, *[1] * (new.ndim - better.ndim)), new, old)

    return jax.tree.map(choose, weights, others)


def evaluations(records: Sequence[Record]) -> list[Record]:
    """Returns the records of evaluations."""
    return [record for record in records if record["kind"] == "evaluation"]


def kept_evaluation(records: Sequence[Record], keep_best: bool) -> dict[str, Any]:
    """Returns the record of the evaluation of the weights that are kept.

    Args:
      records: of a run, with at least one evaluation.
      keep_best: whether the best are kept, or the last ones.

    Returns:
      A record as of an evaluation, with ``kept_after``: after how many steps, for each seed.
    """
    rows = evaluations(records)
    qos = np.array([row["qos"] for row in rows])  # [evaluations, seeds]
    which = np.argmax(qos, 0) if keep_best else np.full(qos.shape[1], len(rows) - 1)
    kept = {"kept_after": [rows[row]["steps"] for row in which]}
    if len(which) == 1:
        return {**rows[which[0]], **kept}
    gains = [rows[row]["gains"][seed] for seed, row in enumerate(which)]
    gain = summarise(np.array(gains))
    of_seeds = {"qos": [float(qos[row, seed]) for seed, row in enumerate(which)], "gains": gains}
    return {**rows[-1], **of_seeds, "gain": gain["mean"], "low": gain["low"], "high": gain["high"], **kept}
