"""Paired gains: who is better than whom at which load, by how much, and where it is worse.

All routers of an evaluation get the same requests, so the difference of two routers is taken seed by seed. What makes
the requests of a seed easy or hard cancels, and the interval is far narrower than those of the two means. Each interval
holds by itself: among twenty comparisons of equals about one excludes 0.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qos_jax.evaluation.statistics import crossed_interval
from qos_jax.report.summary_table import TERMINAL_COLUMNS, text_table

Gain = Mapping[str, Any]

BEST_HEURISTIC = "best_heuristic"
"""The reference that is the heuristic with the highest mean QoS at the load, other than the router itself."""

VERDICTS = ("better", "level", "worse", "unknown")
_IMPACT_GREEDY = "impact_greedy"


def paired_gains(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compares every router with each reference at each load.

    The references are ``BEST_HEURISTIC``, impact_greedy and every learned router, those that took part. The interval
    of a router with several training seeds is over both kinds of seeds; a reference with several is its mean over them.

    Args:
      rows: the ``rows`` of results.json; ``training_seed`` where a router has several.

    Returns:
      One object for each router, reference and load: ``router``, ``kind``, ``reference``, ``against`` (the router that
      the reference is at this load), ``load``, ``rate_per_s``, ``seeds`` (number of pairs), ``mean``, ``low`` and
      ``high`` of the difference in QoS with its 95 % interval over the seeds (NaN with one of each), and ``verdict``,
      one of ``VERDICTS``.
    """
    kinds = {row["router"]: row["kind"] for row in rows}
    rates_per_s = {row["load"]: row["rate_per_s"] for row in rows}
    qos: _Qos = {}
    for row in rows:
        of_seed = qos.setdefault((row["router"], row["load"]), {}).setdefault(row["seed"], {})
        of_seed[row.get("training_seed", 0)] = row["qos"]
    named = [name for name, kind in kinds.items() if name == _IMPACT_GREEDY or kind == "learned"]
    gains = []
    for reference in (BEST_HEURISTIC, *sorted(named, key=lambda name: name != _IMPACT_GREEDY)):
        for router, kind in kinds.items():
            for load in sorted(rates_per_s):
                against = _best_other(router, load, kinds, qos) if reference == BEST_HEURISTIC else reference
                if against and against != router and (difference := _difference(router, against, load, qos)):
                    gains.append(
                        {"router": router, "kind": kind, "reference": reference, "against": against, "load": load}
                        | {"rate_per_s": rates_per_s[load]}
                        | difference
                    )
    return gains


_Qos = dict[tuple[str, float], dict[int, dict[int, float]]]  # by router and load, by seed, and by training seed


def _best_other(router: str, load: float, kinds: Mapping[str, str], qos: _Qos) -> str | None:
    """Returns the heuristic with the highest mean QoS at a load, the router itself aside; None without one."""
    means = {
        name: float(np.mean([list(values.values()) for values in qos[name, load].values()]))
        for name, kind in kinds.items()
        if kind == "heuristic" and name != router and (name, load) in qos
    }
    return max(means, key=lambda name: means[name], default=None)


def _difference(router: str, other: str, load: float, qos: _Qos) -> dict[str, Any]:
    """Returns the mean difference over the seeds that both have, with its interval; empty where there are none."""
    first, second = qos.get((router, load), {}), qos.get((other, load), {})
    if not (seeds := sorted(first.keys() & second.keys())):
        return {}
    of_router = np.array([[first[seed][each] for each in sorted(first[seed])] for seed in seeds])
    of_other = np.array([np.mean(list(second[seed].values())) for seed in seeds])
    found = crossed_interval((of_router - of_other[:, None]).T)
    return {"seeds": len(seeds)} | found | {"verdict": verdict(found["low"], found["high"])}


def verdict(low: float, high: float) -> str:
    """Returns what the interval of a gain says: better, worse, level, or unknown where it has no ends."""
    if not np.isfinite([low, high]).all():
        return "unknown"
    return "better" if low > 0 else "worse" if high < 0 else "level"


def main_comparisons(gains: Sequence[Gain]) -> list[tuple[str, str]]:
    """Returns the pairs (router, reference) that a reader asks for first.

    These are every learned router against the best heuristic, impact_greedy and the learned ones before it; without a
    learned router, the heuristic with the largest gain over the best other one.
    """
    learned = list(dict.fromkeys(gain["router"] for gain in gains if gain["kind"] == "learned"))
    routers = learned or _strongest_heuristic(gains)
    pairs = []
    for number, router in enumerate(routers):
        for reference in (BEST_HEURISTIC, _IMPACT_GREEDY, *learned[:number]):
            rows = gains_of(gains, router, reference)
            same_as_best = reference != BEST_HEURISTIC and all(
                row["against"] == reference for row in gains_of(gains, router, BEST_HEURISTIC)
            )
            if rows and not same_as_best:
                pairs.append((router, reference))
    return pairs


def gains_of(gains: Sequence[Gain], router: str, reference: str) -> list[Gain]:
    """Returns the gains of one router over one reference, by load."""
    return [gain for gain in gains if (gain["router"], gain["reference"]) == (router, reference)]


def verdict_text(rows: Sequence[Gain]) -> str:
    """Returns in words at which loads a router is better, level and worse."""
    loads = {each: ", ".join(f"{row['load']:g}" for row in rows if row["verdict"] == each) for each in VERDICTS}
    parts = [f"{each} at load {found}" for each, found in loads.items() if found]
    if not loads["worse"] and not loads["unknown"]:
        parts.append("worse at none")
    return "; ".join(parts)


def opponents_text(rows: Sequence[Gain], name: Callable[[str], str] = str) -> str:
    """Returns which router, named by ``name``, the reference is at which loads."""
    loads: dict[str, list[str]] = {}
    for row in rows:
        loads.setdefault(row["against"], []).append(f"{row['load']:g}")
    return "; ".join(f"{name(router)} at load {', '.join(each)}" for router, each in loads.items())


def gain_text(row: Gain) -> tuple[str, str]:
    """Returns a gain and half the width of its interval, as text; the second is empty with one seed."""
    half = "" if row["low"] is None or not np.isfinite(row["low"]) else f"{(row['high'] - row['low']) / 2:.3f}"
    return f"{row['mean']:+.3f}", half


def terminal_gains(results: Mapping[str, Any]) -> str:
    """Returns a short table of the main comparisons for the terminal, and below it the verdicts in words."""
    gains = results["gains"]
    pairs = main_comparisons(gains)
    if not pairs:
        return ""
    loads = sorted({gain["load"] for gain in gains})
    heads, columns = ["load"], [[f"{load:g}"] for load in loads]
    verdicts = []
    for router in dict.fromkeys(router for router, _ in pairs):
        heads.append(router)
        _extend(columns, [""] * len(loads))
        for reference in [reference for each, reference in pairs if each == router]:
            rows = gains_of(gains, router, reference)
            found = {row["load"]: " +-".join(filter(None, gain_text(row))) for row in rows}
            is_best = reference == BEST_HEURISTIC
            heads.append(f"  over {'best heuristic' if is_best else reference}")
            _extend(columns, [found.get(load, "-") for load in loads])
            which = f"the best heuristic ({opponents_text(rows)})" if is_best else reference
            verdicts.append(f"{router} against {which}: {verdict_text(rows)}.")
    seeds = max(gain["seeds"] for gain in gains)
    title = f"Gain in QoS on the same requests, mean over {_seeds_text(seeds)}"
    wrapped = [textwrap.fill(each, TERMINAL_COLUMNS, subsequent_indent="  ") for each in verdicts]
    return "\n".join([title, *text_table(heads, columns), *wrapped, ""])


def _extend(columns: Sequence[list[str]], cells: Sequence[str]) -> None:
    for column, cell in zip(columns, cells, strict=True):
        column.append(cell)


def _seeds_text(seeds: int) -> str:
    return "1 seed, so without an interval" if seeds == 1 else f"{seeds} seeds +- half of the 95 % interval"


def _strongest_heuristic(gains: Sequence[Gain]) -> list[str]:
    sums: dict[str, list[float]] = {}
    for gain in gains:
        if gain["kind"] == "heuristic" and gain["reference"] == BEST_HEURISTIC:
            sums.setdefault(gain["router"], []).append(gain["mean"])
    return [max(sums, key=lambda name: float(np.mean(sums[name])))] if sums else []
