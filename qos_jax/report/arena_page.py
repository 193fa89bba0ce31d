"""The arena as a page of Markdown: who is better than impact_greedy where, and what refusing is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qos_jax.report.style import display_name
from qos_jax.report.summary_table import markdown_origin, markdown_table

REFERENCE = "impact_greedy"
"""The router that all others are compared with."""
_ADMISSION, _NO_DROP = "+admission", "+no_drop"


def arena_markdown(found: Mapping[str, Any]) -> str:
    """Returns the page: for each world and view the routers, best mean QoS first.

    Args:
      found: what arena.json holds, see ``qos_jax.programs.arena``.
    """
    config = found["config"]
    parts = [
        "# Arena",
        markdown_origin(found),
        f"Mean QoS of {len(config['seeds'])} seeds of {config['requests']} requests, {config['warmup']} of them not "
        f"counted, and in brackets the gain over {display_name(REFERENCE)} on the same requests with its 95 % "
        "interval, over training seeds as well where a router has several. All routers observe what a proxy can know. "
        "Intervals hold one by one: of twenty equals about one excludes 0.",
    ]
    for table in found["tables"]:
        parts += [
            f"## {table['world']}, metrics read every {table['scrape_s']:g} s",
            f"`{table['flags']}`",
            markdown_table(*_qos(table)),
        ]
        if any(row["router"].endswith(_ADMISSION) for row in table["rows"]):
            parts += ["Routing or refusing: QoS without drops, as it is, and with one rule of admission.",
                      markdown_table(*_refusing(table))]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _qos(table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    loads, means = _means(table["rows"])
    names = [name for name in means if "+" not in name]
    names.sort(key=lambda name: -float(np.mean(list(means[name].values()))))
    gains = {(gain["router"], gain["load"]): gain for gain in table["gains"]}
    kinds = {row["router"]: row["kind"] for row in table["rows"]}
    rows = [
        [display_name(name) + (" (oracle)" if kinds[name] == "oracle" else "")]
        + [f"{means[name][load]:.3f}{_gain(gains.get((name, load)))}" for load in loads]
        for name in names
    ]
    return ["router", *(f"load {load:g}" for load in loads)], rows


def _gain(gain: Mapping[str, Any] | None) -> str:
    if gain is None:
        return ""
    half = "" if gain["high"] is None else f" ± {gain['high'] - gain['mean']:.3f}"
    return f" ({gain['mean']:+.3f}{half})"


def _refusing(table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    loads, means = _means(table["rows"])
    names = [name for name in means if f"{name}{_ADMISSION}" in means]
    rows = [
        [display_name(name)]
        + [
            " / ".join(f"{means[f'{name}{variant}'][load]:.3f}" for variant in (_NO_DROP, "", _ADMISSION))
            for load in loads
        ]
        for name in names
    ]
    return ["router", *(f"load {load:g}" for load in loads)], rows


def _means(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], dict[str, dict[float, float]]]:
    """Returns the loads, and the mean QoS by router and load."""
    qos: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        qos.setdefault(row["router"], {}).setdefault(row["load"], []).append(row["qos"])
    loads = sorted({row["load"] for row in rows})
    return loads, {name: {load: float(np.mean(each[load])) for load in loads} for name, each in qos.items()}
