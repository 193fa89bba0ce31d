"""How much traffic each router can take, as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qos_jax.report.style import display_name
from qos_jax.report.summary_table import markdown_origin, markdown_table

_HEADS = ("router", "requests/s", "of saturation", "good answers/s", "TTFT p95, ms", "TPOT p95, ms", "E2E p95, s",
          "dropped, %", "kJ per 1,000 good")  # fmt: skip


def capacity_markdown(found: Mapping[str, Any], name: str) -> str:
    """Returns the page: for each world the routers, the one with the largest capacity first.

    Args:
      found: what capacity.json holds, see ``qos_jax.programs.capacity``.
      name: of the world as it was given.
    """
    config = found["config"]
    parts = [
        f"# How much traffic {name} can take",
        markdown_origin(found),
        f"The largest rate at which {100 * config['share']:g} % of the requests meet their limits; a dropped request "
        f"does not. Mean of {len(config['seeds'])} seeds of {config['requests']} requests with its 95 % interval. The "
        "other columns are means at that rate.",
    ]
    for world in found["worlds"]:
        parts += [f"## {world['label']}", _table(world, priced=config["price_per_kwh"] or config["price_per_hour"])]
    return "\n\n".join(parts) + "\n"


def _table(world: Mapping[str, Any], *, priced: bool) -> str:
    rows = sorted(world["routers"], key=lambda row: -row["rate_per_s"]["mean"])
    cells = [_cells(row, world["saturation_per_s"]) + ([_cost(row)] if priced else []) for row in rows]
    return markdown_table([*_HEADS, "price per 1,000 good"] if priced else _HEADS, cells)


def _cells(row: Mapping[str, Any], saturation_per_s: float) -> list[str]:
    rate, metrics = row["rate_per_s"], row["metrics"]
    name = display_name(row["router"]) + (" (oracle)" if row["kind"] == "oracle" else "")
    if not rate["mean"]:
        return [name, "none", *["-"] * (len(_HEADS) - 2)]
    half = "" if rate["high"] is None else f" ± {rate['high'] - rate['mean']:.2f}"
    return [
        name,
        f"{rate['mean']:.2f}{half}",
        f"{rate['mean'] / saturation_per_s:.2f}",
        f"{row['good_per_s']:.2f}",
        _number(metrics["ttft_p95_s"], 1e3, 0),
        _number(metrics["tpot_p95_s"], 1e3, 1),
        _number(metrics["e2e_p95_s"], 1.0, 2),
        _number(metrics["drop_rate"], 100.0, 1),
        _number(row["energy_kj_per_1000_good"], 1.0, 1),
    ]


def _number(value: float | None, factor: float, digits: int) -> str:
    """Returns a number times a factor; a dash for one that nobody has, as the time per token of single tokens."""
    return "-" if value is None else f"{factor * value:.{digits}f}"


def _cost(row: Mapping[str, Any]) -> str:
    return f"{row['cost_per_1000_good']:.4f}" if row["rate_per_s"]["mean"] else "-"
