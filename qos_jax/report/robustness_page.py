"""What survives an error of the model, as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qos_jax.report.style import display_name
from qos_jax.report.summary_table import markdown_origin, markdown_table

_OUTCOMES = ("kept", "undecided", "reversed")


def robustness_markdown(found: Mapping[str, Any], name: str) -> str:
    """Returns the page: orders and claims by change, what was reversed, and the QoS of each router.

    Args:
      found: what robustness.json holds, see ``qos_jax.programs.robustness``.
      name: of the world.
    """
    worlds = found["worlds"]
    parts = [
        f"# What survives an error of the model: {name}",
        markdown_origin(found),
        "## Orders and claims",
        f"{_decided(found)} A changed world keeps an order, leaves it undecided, or reverses it.",
        markdown_table(*_summary(worlds[1:])),
        "## Gain over the best heuristic",
        markdown_table(*_gains(worlds)),
        "## Reversed",
        "\n".join(_reversed(worlds)) or "Nothing was reversed.",
        "## Mean QoS over the loads",
        markdown_table(*_levels(found)),
    ]
    return "\n\n".join(parts) + "\n"


def _decided(found: Mapping[str, Any]) -> str:
    """Returns in words how many orders are decided in the unchanged world."""
    decided, pairs = len(found["worlds"][0]["orders"]), found["pairs"]
    return (
        f"In the unchanged world the 95 % interval of the paired difference excludes 0 for {decided} of {pairs} pairs "
        "of routers and load."
    )


def _summary(worlds: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for world in worlds:
        correlation = ", ".join("-" if each is None else f"{each:.2f}" for each in world["rank_correlation"].values())
        orders = [sum(order["outcome"] == outcome for order in world["orders"]) for outcome in _OUTCOMES]
        claims = [claim["outcome"] for claim in world["claims"] if claim["outcome"] != "open"]
        kept = f"{claims.count('kept')} of {len(claims)}"
        rows.append([world["label"], correlation, *map(str, orders), kept])
    loads = ", ".join(f"{load}" for load in worlds[0]["rank_correlation"]) if worlds else ""
    return ["change", f"rank correlation at load {loads}", *_OUTCOMES, "gains kept"], rows


def _gains(worlds: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    heads = [f"{display_name(claim['router'])}, load {claim['load']:g}" for claim in worlds[0]["claims"]]
    rows = [[world["label"], *(_gain_text(claim) for claim in world["claims"])] for world in worlds]
    return ["change", *heads], rows


def _gain_text(claim: Mapping[str, Any]) -> str:
    text = _interval(claim["after"])
    return text if claim["outcome"] in ("kept", "open") else f"{text} {claim['outcome']}"


def _reversed(worlds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line for each order and each gain that a change reverses."""
    lines = []
    for world in worlds:
        for order in world["orders"]:
            if order["outcome"] == "reversed":
                pair = f"{display_name(order['better'])} over {display_name(order['worse'])}"
                lines.append(_line(world["label"], order, pair))
        for claim in world["claims"]:
            if claim["outcome"] == "reversed":
                lines.append(_line(world["label"], claim, f"{display_name(claim['router'])} over the best heuristic"))
    return lines


def _line(label: str, row: Mapping[str, Any], pair: str) -> str:
    return f"- {label}, load {row['load']:g}: {pair} {_interval(row['before'])}, now {_interval(row['after'])}"


def _levels(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    routers = sorted(found["kinds"], key=lambda name: (found["kinds"][name] == "oracle", -_mean(found, 0, name)))
    rows = [
        [world["label"], *(f"{_mean(found, place, name):.3f}" for name in routers)]
        for place, world in enumerate(found["worlds"])
    ]
    return ["change", *map(display_name, routers)], rows


def _mean(found: Mapping[str, Any], place: int, router: str) -> float:
    return float(np.mean(list(found["worlds"][place]["qos"][router].values())))


def _interval(row: Mapping[str, Any]) -> str:
    if row["low"] is None:  # of one seed
        return f"{row['mean']:+.3f}"
    return f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
