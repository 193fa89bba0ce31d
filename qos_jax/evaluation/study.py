"""Results of a study: summaries, gains, claims and gaps, computed from one row per run.

Routers are compared on the same requests, so a gain is the mean of paired differences. The results of a learned router
are over all its training seeds: intervals include the spread over training seeds and over evaluation seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from qos_jax.evaluation.metrics import METRICS
from qos_jax.evaluation.statistics import crossed_interval, crossed_p_value, holm

ResultRow = Mapping[str, Any]

PLAN, BOUND = "hindsight_plan", "upper_bound"  # in rows of kind oracle: results that are not from a router
_REFERENCE = "oracle_impact"
_PAPERS_HEURISTICS = ("bert_router", "round_robin", "shortest_queue")


@dataclasses.dataclass(frozen=True)
class StudyResult:
    """The rows of a study: one per world, router, training seed, load and seed, with all metrics; None for NaN."""

    name: str
    title: str
    question: str
    axis: str | None  # the quantity that differs between worlds, if it is the x axis of the picture
    rows: Sequence[ResultRow]
    metrics: tuple[str, ...] = ()  # shown in the tables besides QoS
    cost: str | None = None  # a metric, if it is the x axis of the picture

    @property
    def worlds(self) -> list[str]:
        """Labels of the worlds, in order."""
        return list(dict.fromkeys(row["world"] for row in self.rows))

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Kind of each router by name, ordered by decreasing mean QoS, with oracles last."""
        kinds = {row["router"]: row["kind"] for row in self.rows}
        values: dict[str, list[float]] = {name: [] for name in kinds}
        for row in self.rows:
            values[row["router"]].append(row["qos"])
        means = {name: np.mean(of_router) for name, of_router in values.items()}
        return {name: kinds[name] for name in sorted(kinds, key=lambda name: (kinds[name] == "oracle", -means[name]))}

    def loads(self, world: str) -> list[float]:
        """Returns the loads of a world, ascending."""
        return sorted({row["load"] for row in self.rows if row["world"] == world})

    @cached_property
    def summary(self) -> list[dict[str, Any]]:
        """Rows of ``world``, ``load``, ``router``, ``kind``, ``metric``, ``mean``, ``low`` and ``high``."""
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
        """Gains of learned routers over the best heuristic, by world, load and router.

        Rows of ``world``, ``load``, ``router``, ``best`` heuristic and its ``best_qos``; ``mean``, ``low`` and ``high``
        of the paired gain in QoS; ``least`` and ``greatest`` gain of the ``training_seeds``, their number; ``p``,
        the p-value of no gain, corrected for the number of these rows; and ``oracle``, the QoS of the impact-greedy
        oracle, or None.
        """
        gains = [
            gain
            for world in self.worlds
            for load in self.loads(world)
            for router, kind in self.kinds.items()
            if kind == "learned" and (gain := self._gain(world, load, router))
        ]
        corrected = holm([gain["p"] for gain in gains])
        return [gain | {"p": p_value} for gain, p_value in zip(gains, corrected, strict=True)]

    @cached_property
    def claims(self) -> list[dict[str, Any]]:
        """The quantities of the paper's claims, for learned routers.

        Rows of ``world``, ``load``, ``router`` and relative changes: ``qos`` and ``latency_per_token_s`` against the
        best of the paper's three heuristics in that metric, and ``qos_per_gb_s`` against round robin.
        """
        means = {cell: row["mean"] for cell, row in self.cells.items()}
        rows = []
        for gain in self.gains:
            world, load = gain["world"], gain["load"]
            if not all((world, load, name, "qos") in means for name in _PAPERS_HEURISTICS):
                continue
            reference = {
                "qos": max(means[world, load, name, "qos"] for name in _PAPERS_HEURISTICS),
                "latency_per_token_s": min(
                    means[world, load, name, "latency_per_token_s"] for name in _PAPERS_HEURISTICS
                ),
                "qos_per_gb_s": means[world, load, "round_robin", "qos_per_gb_s"],
            }
            changes = {
                metric: means[world, load, gain["router"], metric] / value - 1 for metric, value in reference.items()
            }
            rows.append({"world": world, "load": load, "router": gain["router"]} | changes)
        return rows

    @cached_property
    def shares(self) -> list[dict[str, Any]]:
        """The share of the gap between the best heuristic and a hindsight plan that each router closes.

        Rows of ``world``, ``load``, ``router``, ``kind``, ``best`` heuristic and its ``best_qos``; ``plan`` and
        ``bound``, the QoS of the plan and the bound; and ``mean``, ``low``, ``high`` of the share, the paired gains
        over the mean gap.
        """
        return [
            share
            for world in self.worlds
            for load in self.loads(world)
            if (plan_grid := self._grid(world, load, PLAN, "qos")).size
            for router, kind in self.kinds.items()
            if router not in (PLAN, BOUND) and (share := self._share(world, load, router, plan_grid))
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns the rows and all results as plain values."""
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
            "training_seeds": len(gains), "p": crossed_p_value(gains),
            "oracle": float(oracle.mean()) if oracle.size else None,
        }  # fmt: skip

    def _share(self, world: str, load: float, router: str, plan_grid: np.ndarray) -> dict[str, Any]:
        grid, (best, best_grid) = self._grid(world, load, router, "qos"), self._best(world, load)
        if not grid.size or not best_grid.size:
            return {}
        gap = float(plan_grid.mean() - best_grid.mean())
        return {
            "world": world, "load": load, "router": router, "kind": self.kinds[router],
            "best": best, "best_qos": float(best_grid.mean()), "plan": float(plan_grid.mean()),
            "bound": float(self._grid(world, load, BOUND, "qos").mean()),
            **crossed_interval((grid - best_grid) / gap),
        }  # fmt: skip

    def _best(self, world: str, load: float) -> tuple[str, np.ndarray]:
        """Returns the name and the QoS [1, seeds] of the best heuristic; "" and an empty array without heuristics."""
        grids = {name: self._grid(world, load, name, "qos") for name, kind in self.kinds.items() if kind == "heuristic"}
        return max(grids.items(), key=lambda item: item[1].mean() if item[1].size else -1.0, default=("", np.empty(0)))

    @cached_property
    def _runs(self) -> dict[tuple[str, float, str], list[ResultRow]]:
        """The rows of each world, load and router, in the order of their seeds."""
        runs: dict[tuple[str, float, str], list[ResultRow]] = {}
        for row in sorted(self.rows, key=lambda row: row["seed"]):
            runs.setdefault((row["world"], row["load"], row["router"]), []).append(row)
        return runs

    def _grid(self, world: str, load: float, router: str, metric: str) -> np.ndarray:
        """Returns the values of a metric [training seeds, seeds]."""
        by_seed: dict[int, list[Any]] = {}
        for row in self._runs.get((world, load, router), ()):
            if metric in row:
                by_seed.setdefault(row["training_seed"], []).append(row[metric])
        values = [by_seed[training_seed] for training_seed in sorted(by_seed)]
        return np.array(values, np.float64)  # None becomes NaN
