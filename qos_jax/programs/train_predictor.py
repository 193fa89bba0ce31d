"""Trains a predictor of scores and output lengths, and says how good it is on prompts that it has not learned from.

qos-jax predictor --data=table.npz --prompts=prompts.jsonl --encoder=DIR --out=runs/predictor

It is cross-validated first, on all prompts. The predictor that is kept learns from the training part only, the one that
the other programs draw from with --table_part=train, so what these find on the test part is honest.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
import shlex
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from absl.flags import FlagValues

from qos_jax.errors import InputError
from qos_jax.io.files import writable_folder, write_whole
from qos_jax.io.provenance import versions, write_result
from qos_jax.predictor import FineTuning, HeadConfig, fine_tune, fit_frozen, load_pretrained, read_prediction_table
from qos_jax.predictor.data import PredictionTable
from qos_jax.predictor.fitting import Epoch
from qos_jax.predictor.metrics import held_out_columns, scores_of
from qos_jax.predictor.predictor import RUN_SUBFOLDER, Predictor
from qos_jax.predictor.pretrained import Pretrained
from qos_jax.programs.progress_bar import ProgressBar
from qos_jax.programs.world_flags import numbers
from qos_jax.report import reliability_plots
from qos_jax.report.pictures import write_figure

_SPLIT_SEED = 0  # of the table's parts in all programs


def main(values: FlagValues) -> None:
    """Trains, prints a table and writes the results."""
    if values.data is None:
        raise InputError("--data is not given: give a table of prompts and answers")
    if values.mode == "fine_tuned" and values.encoder is None:
        raise InputError("--mode=fine_tuned trains an encoder: give --encoder, too")
    head_config = HeadConfig(values.heads, _widths(values.hidden), values.buckets)
    folder = writable_folder(values.out)
    encoder = None if values.encoder is None else load_pretrained(values.encoder)
    table = _with_embeddings(read_prediction_table(values.data, values.score_column, values.prompts), encoder)
    train, test = table.split_rows(values.test_fraction, _SPLIT_SEED)
    folds = table.folds(values.folds, values.seed) if values.folds else []
    steps_per_fit = 1 if values.mode == "frozen" else values.epochs + 1
    with ProgressBar((len(folds) + 1) * steps_per_fit, "step") as bar:
        fit = _fitter(values, encoder, head_config, bar)
        parts: dict[str, dict[str, np.ndarray]] = {}
        if folds:
            each = [
                _held_out(values, fit, table, *rows, f"fold {n} of {len(folds)}")[1] for n, rows in enumerate(folds, 1)
            ]
            parts["folds"] = {name: np.concatenate([columns[name] for columns in each]) for name in each[0]}
        predictor, parts["test"] = _held_out(values, fit, table, train, test, "training part")
    scores = {part: scores_of(columns) for part, columns in parts.items()}
    _write(values, folder, predictor, parts, scores)
    print(_table(scores))
    print(f"written: {folder / 'metrics.json'}")


def _with_embeddings(table: PredictionTable, encoder: Pretrained | None) -> PredictionTable:
    """Returns the table with the encoder's embeddings of its texts, or with its own and no texts without an encoder."""
    if encoder is None:
        if table.embeddings is None:
            raise InputError(f"{table.source}: has no embeddings: give --encoder, which makes them of the texts")
        return dataclasses.replace(table, texts=None)
    if table.texts is None:
        raise InputError(f"{table.source}: has no texts for the encoder: give --prompts, or leave --encoder out")
    return dataclasses.replace(table, embeddings=encoder.embed(table.texts))


def _widths(texts: list[str]) -> tuple[int, ...]:
    return tuple(int(width) if width == int(width) else -1 for width in numbers("hidden", [t for t in texts if t]))


Fit = Callable[[PredictionTable, str], Predictor]


def _fitter(values: FlagValues, encoder: Pretrained | None, head_config: HeadConfig, bar: ProgressBar) -> Fit:
    """Returns what trains a predictor on a table, as the flags say, and moves the bar."""

    def fit(table: PredictionTable, name: str) -> Predictor:
        bar.update(bar.done, doing=name)
        if values.mode == "frozen" or encoder is None:
            predictor = fit_frozen(table, head_config, seed=values.seed, encoder=encoder)
            bar.update(bar.done + 1, doing=name)
            return predictor

        def progress(epoch: Epoch) -> None:
            bar.update(bar.done + 1, doing=f"{name}, validation loss {epoch.validation_loss:.4f}")

        tuning = FineTuning(layers=values.layers, epochs=values.epochs)
        return fine_tune(table, encoder, head_config, tuning, seed=values.seed, progress=progress)

    return fit


def _held_out(
    values: FlagValues, fit: Fit, table: PredictionTable, train: np.ndarray, test: np.ndarray, name: str
) -> tuple[Predictor, dict[str, np.ndarray]]:
    """Returns a predictor that has learned from rows of the table, and what it says of others."""
    learned, others = table.rows(train), table.rows(test)
    predictor = fit(learned, name)
    if values.mode == "fine_tuned":
        others = _with_embeddings(others, predictor.encoder)
    return predictor, {"row": test} | held_out_columns(predictor, learned, others, values.buckets)


def _write(
    values: FlagValues,
    folder: pathlib.Path,
    predictor: Predictor,
    parts: dict[str, dict[str, np.ndarray]],
    scores: dict[str, dict[str, Any]],
) -> None:
    asked = {name: values[name].value for name in ("score_column", "heads", "hidden", "buckets", "mode", "folds")}
    asked |= {"data": os.path.basename(values.data), "test_fraction": values.test_fraction, "seed": values.seed}
    asked |= {"layers": values.layers, "epochs": values.epochs} if values.mode == "fine_tuned" else {}
    about = {
        "config": asked,
        "command": shlex.join(["qos-jax", "predictor", *sys.argv[1:]]),
        "versions": versions(),
    }
    predictor.save(folder / RUN_SUBFOLDER, **about)
    for part, columns in parts.items():
        file = io.BytesIO()
        np.savez_compressed(file, experts=np.array(predictor.experts), **columns)  # type: ignore[arg-type]
        write_whole(folder / f"predictions_{part}.npz", file.getvalue())
    results = about | {"experts": predictor.experts, **scores}
    write_result(folder / "metrics.json", results)
    write_figure(folder, "reliability", partial(reliability_plots.prediction_reliability, _pictured(scores["test"])))


def _pictured(scores: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the panels of the picture."""
    panels = {"score": scores["score"]}
    if "output_tokens" in scores:
        panels["output tokens"] = scores["output_tokens"]
    if "bucket_reliability" in scores["score"]:
        buckets = {"reliability": scores["score"]["bucket_reliability"], "ece": scores["score"]["bucket_ece"]}
        panels["probability of a score's bucket"] = buckets
    return panels


def _table(scores: dict[str, dict[str, Any]]) -> str:
    """Returns a table for the terminal, a row for each part and quantity."""
    lines = [
        f"{'':27}         within                                  bucket",
        f"{'':27}    R^2  prompt  slope     MAE (mean's)   ranks  exact (most)    ECE",
    ]
    for part, of_part in scores.items():
        for name in ("score", "log_length", "output_tokens"):
            if name not in of_part:
                continue
            one, digits = of_part[name], 1 if name == "output_tokens" else 3
            label = f"{part} {name.replace('_', ' ')}"
            buckets = f"{one['accuracy']:6.3f} ({one['majority']:.3f})" if "accuracy" in one else 14 * " "
            lines.append(
                f"{label:27}{one['r2']:7.3f}{one['within_r2']:8.3f}{one['slope']:7.2f}{one['mae']:8.{digits}f} "
                f"({one['baseline_mae']:.{digits}f}){one['rank_correlation']:8.3f}{buckets}{one['ece']:7.{digits}f}"
            )
        routed = {name.replace("_", " "): f"{value:.3f}" for name, value in of_part["routing"].items()}
        lines.append(f"{part} score by routing: " + ", ".join(f"{name} {value}" for name, value in routed.items()))
    return "\n".join(lines)
