"""What a study found: rows of many worlds brought down to means, gains, a picture and a part of a page.

Routers are compared on the same requests, so a gain is the mean of paired differences. A learned router stands for all
its training seeds: its interval holds the spread over them and that over the evaluation's seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from qos_jax.evaluation.metrics import METRICS
from qos_jax.evaluation.statistics import crossed_interval

Row = Mapping[str, Any]

PLAN, BOUND = "hindsight_plan", "upper_bound"  # names of what is no router, in rows of kind oracle
_REFERENCE = "oracle_impact"
_PAPERS_HEURISTICS = ("bert_router", "round_robin", "shortest_queue")


@dataclasses.dataclass(frozen=True)
class StudyResult:
    """The rows of a study: one for each world, router, training seed, load and seed, with all metrics; None for NaN."""

    name: str
    title: str
    question: str
    axis: str | None  # what differs between the worlds, if that is drawn
    rows: Sequence[Row]
    metrics: tuple[str, ...] = ()  # told in the tables beside QoS
    cost: str | None = None  # a metric, if QoS is drawn against that

    @property
    def worlds(self) -> list[str]:
        """Labels, in order."""
        return list(dict.fromkeys(row["world"] for row in self.rows))

    @property
    def kinds(self) -> dict[str, str]:
        """Kind of each router by name, the best mean QoS first and oracles last."""
        kinds = {row["router"]: row["kind"] for row in self.rows}
        means = {name: np.mean([row["qos"] for row in self.rows if row["router"] == name]) for name in kinds}
        return {name: kinds[name] for name in sorted(kinds, key=lambda name: (kinds[name] == "oracle", -means[name]))}

    def loads(self, world: str) -> list[float]:
        """Returns the loads of a world."""
        return sorted({row["load"] for row in self.rows if row["world"] == world})

    @cached_property
    def summary(self) -> list[dict[str, Any]]:
        """``world``, ``load``, ``router``, ``kind``, ``metric``, ``mean``, ``low`` and ``high``."""
        return [
            {"world": world, "load": load, "router": router, "kind": kind, "metric": metric} | crossed_interval(grid)
            for world in self.worlds
            for load in self.loads(world)
            for router, kind in self.kinds.items()
            for metric in METRICS
            if (grid := self._grid(world, load, router, metric)).size
        ]

    @cached_property
    def cells(self) -> dict[tuple[str, float, str, str], dict[str, Any]]:
        """Rows of the summary by world, load, router and metric."""
        return {(row["world"], row["load"], row["router"], row["metric"]): row for row in self.summary}

    @cached_property
    def gains(self) -> list[dict[str, Any]]:
        """What learned routers gain: ``world``, ``load``, ``router``, ``best`` and ``best_qos`` of the heuristics.

        Also ``mean``, ``low``, ``high`` of the paired gain over it, ``least`` and ``greatest`` of a training seed, and
        ``oracle``, the QoS of the impact-greedy oracle, or None.
        """
        return [
            gain
            for world in self.worlds
            for load in self.loads(world)
            for router, kind in self.kinds.items()
            if kind == "learned" and (gain := self._gain(world, load, router))
        ]

    @cached_property
    def claims(self) -> list[dict[str, Any]]:
        """What the paper claims of its router, for learned ones: ``world``, ``load``, ``router`` and relative changes.

        ``qos`` and ``latency_per_token_s`` are against the best of the paper's three heuristics in that metric,
        ``qos_per_gb_s`` against round robin.
        """
        means = {place: row["mean"] for place, row in self.cells.items()}
        rows = []
        for gain in self.gains:
            world, load = gain["world"], gain["load"]
            if not all((world, load, name, "qos") in means for name in _PAPERS_HEURISTICS):
                continue
            against = {
                "qos": max(means[world, load, name, "qos"] for name in _PAPERS_HEURISTICS),
                "latency_per_token_s": min(
                    means[world, load, name, "latency_per_token_s"] for name in _PAPERS_HEURISTICS
                ),
                "qos_per_gb_s": means[world, load, "round_robin", "qos_per_gb_s"],
            }
            changes = {
                metric: means[world, load, gain["router"], metric] / other - 1 for metric, other in against.items()
            }
            rows.append({"world": world, "load": load, "router": gain["router"]} | changes)
        return rows

    @cached_property
    def shares(self) -> list[dict[str, Any]]:
        """Which part of the gap between the best heuristic and a hindsight plan each router closes.

        ``world``, ``load``, ``router``, ``kind``, ``best`` and ``best_qos`` of the heuristics, ``plan`` and ``bound``,
        the QoS of the plan and the bound, and ``mean``, ``low``, ``high`` of the share: paired gains over the mean gap.
        """
        return [
            share
            for world in self.worlds
            for load in self.loads(world)
            if (planned := self._grid(world, load, PLAN, "qos")).size
            for router, kind in self.kinds.items()
            if router not in (PLAN, BOUND) and (share := self._share(world, load, router, planned))
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain values."""
        return dataclasses.asdict(self) | {
            "gains": self.gains,
            "claims": self.claims,
            "shares": self.shares,
            "summary": self.summary,
        }

    def _gain(self, world: str, load: float, router: str) -> dict[str, Any]:
        grid, (best, best_grid) = self._grid(world, load, router, "qos"), self._best(world, load)
        if not grid.size or not best_grid.size:
            return {}
        gains, oracle = grid - best_grid, self._grid(world, load, _REFERENCE, "qos")
        return {
            "world": world, "load": load, "router": router, "best": best, "best_qos": float(best_grid.mean()),
            **crossed_interval(gains), "least": float(gains.mean(1).min()), "greatest": float(gains.mean(1).max()),
            "oracle": float(oracle.mean()) if oracle.size else None,
        }  # fmt: skip

    def _share(self, world: str, load: float, router: str, planned: np.ndarray) -> dict[str, Any]:
        grid, (best, best_grid) = self._grid(world, load, router, "qos"), self._best(world, load)
        if not grid.size or not best_grid.size:
            return {}
        gap = float(planned.mean() - best_grid.mean())
        return {
            "world": world, "load": load, "router": router, "kind": self.kinds[router],
            "best": best, "best_qos": float(best_grid.mean()), "plan": float(planned.mean()),
            "bound": float(self._grid(world, load, BOUND, "qos").mean()),
            **crossed_interval((grid - best_grid) / gap),
        }  # fmt: skip

    def _best(self, world: str, load: float) -> tuple[str, np.ndarray]:
        """Returns the best heuristic and its QoS [1, seeds]; empty without one."""
        grids = {name: self._grid(world, load, name, "qos") for name, kind in self.kinds.items() if kind == "heuristic"}
        return max(grids.items(), key=lambda item: item[1].mean() if item[1].size else -1.0, default=("", np.empty(0)))

    def _grid(self, world: str, load: float, router: str, metric: str) -> np.ndarray:
        """Returns a metric [training seeds, seeds]."""
        rows = [row for row in self.rows if row["world"] == world and row["load"] == load and row["router"] == router]
        training_seeds = sorted({row["training_seed"] for row in rows})
        values = [
            [row[metric] for row in sorted(rows, key=lambda row: row["seed"]) if row["training_seed"] == each]
            for each in training_seeds
        ]
        return np.array(values, np.float64)  # None becomes NaN
