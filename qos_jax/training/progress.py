"""What a training run reports: records for the caller and the run folder, and how far it is."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from qos_jax.agent.learner import TrainState
from qos_jax.errors import InputError
from qos_jax.evaluation.statistics import summarise
from qos_jax.training.run_folder import RunFolder
from qos_jax.training.selection import Selection

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is."""

    steps: int  # requests routed so far, of each seed
    total_steps: int
    steps_per_s: float  # of all seeds, since this program began to train; NaN at the start
    left_s: float  # s, at that speed; NaN at the start
    record: Record  # the newest one
    evaluation: Record | None  # the newest record of an evaluation


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The outcome of a run."""

    weights: Any  # what ``Learner.router`` takes; leaves [seeds, ...] if there are several seeds
    steps: int  # requests routed, of each seed
    finished: bool  # False if it was stopped
    records: list[Record]
    kept: Record  # of the evaluation of these weights, see ``kept_evaluation``
    compile_s: float
    train_s: float  # of the whole run, without compilation


class Recorder:
    """Turns what happens into records, for the caller and for the run folder."""

    def __init__(
        self,
        steps_per_chunk: int,
        chunks: int,
        seeds: Sequence[int],
        folder: RunFolder | None,
        progress_fn: Callable[[Progress], None],
    ) -> None:
        """Takes up the records of the run's newest checkpoint."""
        self.steps_per_chunk, self.chunks, self.seeds = steps_per_chunk, chunks, seeds
        self.folder, self.progress_fn = folder, progress_fn
        self.records: list[Record] = [] if folder is None else folder.rewind(folder.latest)
        self.running: tuple[int, dict[str, Array]] | None = None  # a chunk that may not be done yet, and its metrics
        self.began = time.perf_counter() - (self.records[-1]["seconds"] if self.records else 0.0)
        self.start(0)

    def start(self, chunk: int) -> int:
        """Measures the speed from now on; returns ``chunk``, the number of chunks done."""
        self.first, self.first_at = chunk, time.perf_counter()
        return chunk

    def seconds(self) -> float:
        """Returns how long the run has trained."""
        return time.perf_counter() - self.began

    def trained(self, chunk: int, metrics: dict[str, Array]) -> None:
        """Takes the metrics of a chunk that has been started, and reports the one before it."""
        self._report()
        self.running = (chunk, metrics)

    def evaluated(self, chunk: int, weights: Any, qos: Array, reference: Array, selection: Selection) -> None:
        """Waits for the QoS [E] or [seeds, E] after so many chunks, and reports it beside the reference's.

        The selection keeps the weights if they are the best.
        """
        self._report()
        kept_after = selection.evaluated(chunk, weights, qos)
        each, other = (np.asarray(x, np.float64).reshape(len(self.seeds), -1) for x in (qos, reference))
        gains = each - other
        gain = summarise(gains.mean(1) if len(gains) > 1 else gains[0])
        values = {"qos": each.mean(1).tolist(), "gains": gains.mean(1).tolist(), "impact_greedy": float(other.mean())}
        values |= {"gain": gain["mean"], "low": gain["low"], "high": gain["high"]}
        values["kept_after"] = [kept * self.steps_per_chunk for kept in kept_after]
        self._tell("evaluation", chunk, values)

    def save(self, chunk: int, state: TrainState, weights: Any, selection: Selection) -> None:
        """Writes a checkpoint.

        Args:
          chunk: number of chunks done.
          state: after them.
          weights: of that state.
          selection: has the weights that routers get if training ends now.

        Raises:
          InputError: a weight is not finite, or the checkpoint cannot be written.
        """
        self._report()
        if self.folder is not None:
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(weights))):
                raise self._diverged("a weight is not finite", chunk)
            best = selection.best if selection.keep_best else None
            self.folder.save(chunk * self.steps_per_chunk, state, selection.of(weights), best)

    def _report(self) -> None:
        if self.running is None:
            return
        (chunk, metrics), self.running = self.running, None
        values = {name: np.atleast_1d(value).tolist() for name, value in jax.device_get(metrics).items()}
        for name, value in values.items():
            if "loss" in name and not np.isfinite(value).all():
                raise self._diverged(f"{name} is {value}", chunk)
        finite = {name: [x if math.isfinite(x) else None for x in value] for name, value in values.items()}
        self._tell("train", chunk, {"metrics": finite})

    def _tell(self, kind: str, chunk: int, values: Record) -> None:
        steps = chunk * self.steps_per_chunk
        record = {"kind": kind, "steps": steps, "seconds": round(self.seconds(), 3), **values}
        self.records.append(record)
        if self.folder is not None:
            self.folder.append(record)
        done = chunk - self.first
        chunk_s = (time.perf_counter() - self.first_at) / done if done else math.nan
        self.progress_fn(
            Progress(
                steps=steps,
                total_steps=self.chunks * self.steps_per_chunk,
                steps_per_s=len(self.seeds) * self.steps_per_chunk / chunk_s,
                left_s=(self.chunks - chunk) * chunk_s,
                record=record,
                evaluation=next((each for each in reversed(self.records) if each["kind"] == "evaluation"), None),
            )
        )

    def _diverged(self, what: str, chunk: int) -> InputError:
        good = "there is no checkpoint"
        if self.folder is not None and self.folder.latest is not None:
            good = f"the last good checkpoint is {self.folder.checkpoints.path(self.folder.latest)}"
        return InputError(
            f"training diverged: {what} after {chunk * self.steps_per_chunk} steps; {good}; try a lower learning_rate"
        )
