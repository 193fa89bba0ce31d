"""Which weights of a run its router gets: the last ones, unless those of an earlier evaluation were better.

A router may get worse in training. Its evaluations are made anyway, on requests that it is not judged by later (see
``validation``), so to keep the best one costs nothing. The best of several is best by luck in part. It is therefore
kept only if its lead over the newest one, environment by environment, is more than noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from qos_jax.agent.sac import Weights
from qos_jax.evaluation.statistics import summarise

Record = Mapping[str, Any]

_CONFIDENCE = 0.99  # that the best evaluation is better than the newest, as it is the best of about ten


class Best(struct.PyTreeNode):
    """The best evaluation of each seed so far."""

    weights: Weights  # leaves [seeds, ...] if there are several seeds
    qos: Array  # [seeds, E]
    chunk: Array  # [seeds] int32, after how many; steps may be too many for an int32
    leads: Array  # [seeds] bool: it is better than the newest evaluation


class Selection:
    """The weights that the routers get if training ends now."""

    def __init__(
        self,
        keep_best: bool,
        weights: Weights,
        num_seeds: int,
        num_envs: int,
        place: Callable[[Any], Any] = jax.device_put,
    ) -> None:
        """Begins before the first evaluation.

        Args:
          keep_best: whether the best weights may be kept; else it is always the newest.
          weights: before training.
          num_seeds: of the run.
          num_envs: E, of an evaluation.
          place: puts arrays where the weights are, as several processes keep them together.
        """
        self.keep_best, self.place = keep_best, place
        none = np.full((num_seeds, num_envs), -np.inf, np.float32)
        self.best = Best(weights, *place((none, np.zeros(num_seeds, np.int32), np.zeros(num_seeds, bool))))

    def evaluated(self, chunk: int, weights: Weights, qos: Array) -> list[int]:
        """Takes the newest weights and their QoS [E] or [seeds, E].

        Returns:
          After how many chunks each seed's router has its weights, if training ends now.
        """
        best, best_qos, best_chunk = self.best, np.asarray(self.best.qos), np.asarray(self.best.chunk)
        if not self.keep_best:
            return [chunk] * len(best_chunk)
        newest = np.asarray(qos, np.float32).reshape(best_qos.shape)
        higher = newest.mean(1) > best_qos.mean(1)
        best_qos = np.where(higher[:, None], newest, best_qos)
        best_chunk = np.where(higher, chunk, best_chunk).astype(np.int32)
        leads = np.array([summarise(lead, _CONFIDENCE)["low"] > 0 for lead in best_qos - newest])
        chosen = _chosen(_one_if_alone(higher), weights, best.weights)
        self.best = Best(chosen, *self.place((best_qos, best_chunk, leads)))
        return np.where(leads, best_chunk, chunk).tolist()

    def of(self, newest: Weights) -> Weights:
        """Returns the weights of the routers, where ``newest`` are those of the training state."""
        if not self.keep_best:
            return newest
        return _chosen(_one_if_alone(np.asarray(self.best.leads)), self.best.weights, newest)


def _one_if_alone(of_seeds: np.ndarray) -> np.ndarray:
    """Returns what weights are chosen by: [seeds], or [] for weights without an axis of seeds."""
    return of_seeds if len(of_seeds) > 1 else of_seeds[0]


@jax.jit
def _chosen(mask: Array, weights: Weights, others: Weights) -> Weights:
    """Returns the weights where ``mask`` [] or [seeds] is set, and the others elsewhere."""

    def choose(one: Array, other: Array) -> Array:
        return jnp.where(mask.reshape(*mask.shape, *[1] * (one.ndim - mask.ndim)), one, other)

    return jax.tree.map(choose, weights, others)


def evaluations(records: Sequence[Record]) -> list[Record]:
    """Returns the records of evaluations."""
    return [record for record in records if record["kind"] == "evaluation"]


def kept_evaluation(records: Sequence[Record]) -> dict[str, Any]:
    """Returns what the evaluations of a run, at least one, say of the weights that its routers have.

    That is the record of one evaluation, or of several seeds one put together from the evaluations of each.
    """
    rows = {row["steps"]: row for row in evaluations(records)}
    last = rows[max(rows)]
    after = last.get("kept_after", [last["steps"]] * len(last["qos"]))  # early records lack it
    kept = {"kept_after": after}
    if len(after) == 1:
        return {**rows[after[0]], **kept}
    kept |= {name: [rows[steps][name][seed] for seed, steps in enumerate(after)] for name in ("qos", "gains")}
    gain = summarise(kept["gains"])
    return {**last, **kept, "gain": gain["mean"], "low": gain["low"], "high": gain["high"]}
