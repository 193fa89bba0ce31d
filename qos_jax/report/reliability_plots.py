"""Figures of predictions against outcomes: of the impact estimate and of the text predictor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qos_jax.report import style
from qos_jax.report.plots import column
from qos_jax.report.style import FULL, Width

_MIN_IN_BIN = 20  # requests


@style.styled
def reliability_curves(rows: Sequence[Mapping[str, Any]], *, width: Width = FULL) -> Figure:
    """Draws the share of requests that were in time against their predicted probability, a panel per prediction.

    Args:
      rows: ``rows`` of the calibration program's results.json, of one router. The width of the logistic that routes
        best and the one with the best probabilities are drawn.
      width: of the figure.
    """
    predictions = list(dict.fromkeys(row["prediction"] for row in rows))
    forms = list(dict.fromkeys(row["form"] for row in rows))
    figure, panels = _square_panels(len(predictions), width, sharex=True, sharey=True)
    for axes, prediction in zip(panels, predictions, strict=True):
        axes.plot([0, 1], [0, 1], color=style.PALE, linewidth=0.8, zorder=1)
        for row in rows:
            if row["prediction"] == prediction and (row["routing_width"] or row["best_width"]):
                bins = [each for each in row["reliability"] if each["number"] >= _MIN_IN_BIN]
                name, dashes = ("best", "-") if row["best_width"] else ("routing", (0, style.ORACLE_DASHES[1]))
                axes.plot(
                    column(bins, "predicted"), column(bins, "realised"), marker="o", linestyle=dashes,
                    color=style.EXPERT_COLOURS[forms.index(row["form"])], label=f"{row['form']}, {name} width",
                )  # fmt: skip
        axes.set(title=f"predictions: {prediction}", xlim=(0, 1), ylim=(0, 1.02), aspect="equal")
        axes.set_xlabel("predicted probability")
        axes.tick_params(labelbottom=True)
    panels[0].set_ylabel("share that was in time")
    handles, labels = panels[0].get_legend_handles_labels()
    style.legend_outside(figure, list(zip(handles, labels, strict=True)), width)
    figure.set_label(
        "Share of requests that were in time against the probability that the impact estimate gave them when they were "
        "placed; on the diagonal both are equal. Solid: the width of the logistic with the best probabilities. "
        f"Dotted: the width that routes best. Bins of fewer than {_MIN_IN_BIN} requests are left out."
    )
    return figure


@style.styled
def prediction_reliability(quantities: Mapping[str, Mapping[str, Any]], *, width: Width = FULL) -> Figure:
    """Draws the true means of answers against their predictions, a panel per quantity.

    Args:
      quantities: by name, each with the bins of ``reliability`` and the expected calibration error ``ece``, as
        ``predictor.metrics`` has them. Those with predictions above 1, such as tokens, get logarithmic axes.
      width: of the figure.
    """
    figure, panels = _square_panels(len(quantities), width)
    for axes, (name, quantity) in zip(panels, quantities.items(), strict=True):
        bins = quantity["reliability"]
        predicted, realised, error = (column(bins, field) for field in ("predicted", "realised", "standard_error"))
        is_share = max(predicted.max(), realised.max()) <= 1.0
        ends = np.concatenate([predicted, realised - error, realised + error])
        margin = 0.05 * np.ptp(ends)
        low, high = (ends.min() - margin, ends.max() + margin) if is_share else (ends.min() / 1.2, ends.max() * 1.2)
        if not is_share:
            axes.set(xscale="log", yscale="log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
                axis.set_major_formatter(ticker.ScalarFormatter())
                axis.set_minor_locator(ticker.NullLocator())
        axes.plot([low, high], [low, high], color=style.PALE, linewidth=0.8, zorder=1)
        axes.errorbar(predicted, realised, yerr=error, color=style.EXPERT_COLOURS[0], marker="o", linewidth=1)
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set_title(f"{name}\ncalibration error {quantity['ece']:.2g}")
        axes.set_xlabel("predicted")
    panels[0].set_ylabel("true mean")
    figure.set_label(
        "True means of answers against their predictions, on held-out prompts; on the diagonal both are equal. Each "
        "point is a tenth of all predictions, with the standard error of its mean. The expected calibration error is "
        "the mean distance of the points from the diagonal."
    )
    return figure


def _square_panels(number: int, width: Width, **options: Any) -> tuple[Figure, list[Axes]]:
    """Returns a figure with square panels: side by side at full width, otherwise two in a row."""
    columns = max(number, 2) if width == FULL else 2
    lines = math.ceil(number / columns)
    height = lines * (0.55 + (width.inches - 0.7) / columns)
    figure = Figure(figsize=(width.inches, height), layout="constrained")
    every = figure.subplots(lines, columns, squeeze=False, **options).flatten()
    for axes in every[number:]:
        axes.set_visible(False)
    return figure, list(every[:number])
