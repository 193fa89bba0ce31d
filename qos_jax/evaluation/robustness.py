"""Which decisions survive an error of the model: worlds with stated changes, and what becomes of the order of routers.

A router is tuned and trained in one world and serves in another. Every router is judged in the unchanged world and in
each changed one, at the same arrival rates and on the same requests. By default routers still observe the profile of
the unchanged world, as an operator's model of a fleet keeps its errors while the fleet runs.

An order of two routers is decided where the 95 % interval of their paired difference excludes 0. Of the orders that are
decided in the unchanged world a changed world keeps some, leaves some undecided, and reverses some. Each interval
holds by itself, so a few orders are lost by chance; the change ``other requests`` shows how many.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qos_jax.evaluation.evaluate import Scenario
from qos_jax.evaluation.statistics import summarise
from qos_jax.fleet.engines import ENGINES
from qos_jax.fleet.experts import Expert
from qos_jax.fleet.profile_fitting import TIMING_UNITS
from qos_jax.fleet.profiles import engine_fields
from qos_jax.sim.env import EnvParams
from qos_jax.sim.types import AnyArray, ExpertProfile
from qos_jax.workload.arrivals import parse_arrivals
from qos_jax.workload.prediction import parse_prediction
from qos_jax.worlds.config import WorldConfig

COEFFICIENTS = tuple(TIMING_UNITS)
TABLES = tuple(f"kernels.{name}" for name in ("dense_s", "head_s", "attention_s", "host_s", "host_per_sequence_s"))
GROUPS = ("control", "coefficients", "engine", "predictions", "clock", "arrivals")
BELIEFS = ("stale", "true", "both")
_PREDICTIONS = ("none", "realistic", "perfect")
_BURSTY = "gamma:2"


@dataclasses.dataclass(frozen=True)
class Amounts:
    """How far worlds are changed."""

    coefficient: float = 0.1  # share of a coefficient of the profile
    rate: float = 0.05  # share of the arrival rate
    late_s: float = 0.1  # s that metrics are older


@dataclasses.dataclass(frozen=True)
class Change:
    """One change of a world; fields at their defaults change nothing."""

    label: str = "unchanged"
    factors: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of fields of the profile
    engine: str | None = None  # a name in ``ENGINES``
    prediction: str | None = None  # see ``parse_prediction``
    arrivals: str | None = None  # see ``parse_arrivals``
    late_s: float = 0.0  # s that metrics are older
    rate_factor: float = 1.0  # of the arrival rates
    seeds_on: int = 0  # added to the seeds of the requests
    told: bool = False  # routers observe the changed profile, not the unchanged one

    @property
    def can_be_told(self) -> bool:
        """Routers observe what is changed of the profile; they observe no tables of kernels."""
        return self.engine is not None or any(not name.startswith("kernels.") for name in self.factors)

    def params(self, world: WorldConfig, params: EnvParams) -> EnvParams:
        """Returns the parameters of the changed world, with the profile that routers observe there.

        Args:
          world: the unchanged world.
          params: its parameters.
        """
        experts = scaled(params.experts, self.factors)
        if self.engine is not None:
            experts = with_engine(experts, world.fleet_experts, self.engine)
        workload: Any = params.workload
        if self.prediction is not None:
            workload = dataclasses.replace(workload, prediction=parse_prediction(self.prediction))
        if self.arrivals is not None:
            workload = dataclasses.replace(workload, arrivals=parse_arrivals(self.arrivals, 1.0))
        return params.replace(
            experts=experts,
            believed_experts=experts if self.told else params.experts,
            workload=workload,
            staleness_s=jnp.float32(params.staleness_s + self.late_s),
        )

    def scenario(self, scenario: Scenario) -> Scenario:
        """Returns what becomes of a scenario; its load stays the one that the operator believes in."""
        rate_per_s, seed = scenario.rate_per_s * self.rate_factor, scenario.seed + self.seeds_on
        return dataclasses.replace(scenario, rate_per_s=rate_per_s, seed=seed)


def changes(
    world: WorldConfig,
    experts: ExpertProfile,
    amounts: Amounts,
    *,
    groups: Sequence[str] = GROUPS,
    belief: str = "stale",
    seeds: int,
) -> list[Change]:
    """Returns the changes of a world, each by itself.

    Args:
      world: the unchanged world; its engine, predictions and law of arrivals are replaced by other ones.
      experts: its profile; where it has tables of measured kernels, these are changed, and their summary only with all.
      amounts: how far it is changed.
      groups: of ``GROUPS``, the kinds of changes.
      belief: of ``BELIEFS``: routers observe the unchanged profile, the changed one, or once each.
      seeds: number of seeds of the evaluation, after which those of ``other requests`` begin.
    """
    preset = world.base
    engine = world.engine or preset.engine
    prediction = world.prediction or (preset.prediction if world.predictor is None else "of a predictor")
    law = world.arrivals or ("trace" if world.trace is not None else preset.arrivals)
    other_law = _BURSTY if law == "poisson" else "poisson"
    timing = COEFFICIENTS if experts.kernels is None else TABLES
    by, clock = _signed(amounts.coefficient), _signed(amounts.rate)
    (_, less), (_, more) = by
    all_timing = (*timing, *COEFFICIENTS)  # also the summary of tables, which is what routers observe
    worse = dict.fromkeys(all_timing, more) | {"kv_blocks": less}
    better = dict.fromkeys(all_timing, less) | {"kv_blocks": more}
    together = f"all {100 * amounts.coefficient:g} %"
    found = {
        "control": [Change("other requests", seeds_on=seeds)],
        "coefficients": [
            *(Change(f"{name} {text}", {name: factor}) for name in (*timing, "kv_blocks") for text, factor in by),
            Change(f"{together} worse", worse),
            Change(f"{together} better", better),
        ],
        "engine": [Change(f"engine {name}", engine=name) for name in ENGINES if name != engine],
        "predictions": [
            Change(f"predictions {name}", prediction=name) for name in _PREDICTIONS if name != prediction
        ],
        "clock": [
            *(Change(f"arrival rate {text}", rate_factor=factor) for text, factor in clock),
            Change(f"metrics {amounts.late_s:g} s later", late_s=amounts.late_s),
        ],
        "arrivals": [Change(f"arrivals {other_law}", arrivals=other_law)],
    }  # fmt: skip
    asked = [change for group in groups for change in found[group]]
    told = [
        dataclasses.replace(change, label=f"{change.label}, told", told=True) for change in asked if change.can_be_told
    ]
    untouched = [change for change in asked if not change.can_be_told]
    return {"stale": asked, "true": untouched + told, "both": asked + told}[belief]


def scaled(experts: ExpertProfile, factors: Mapping[str, float]) -> ExpertProfile:
    """Returns a profile with some fields multiplied; whole numbers are rounded, and stay 1 or more.

    Args:
      experts: the profile.
      factors: by the names of fields; ``kernels.NAME`` is one of its tables.
    """

    def times(values: AnyArray, factor: float) -> AnyArray:
        values = jnp.asarray(values)
        if jnp.issubdtype(values.dtype, jnp.integer):
            return jnp.maximum(jnp.round(values * factor), 1).astype(values.dtype)
        return values * jnp.asarray(factor, values.dtype)

    for name, factor in factors.items():
        table = name.removeprefix("kernels.")
        if table == name:
            experts = experts.replace(**{name: times(getattr(experts, name), factor)})
        else:
            kernels = experts.kernels
            assert kernels is not None
            experts = experts.replace(kernels=kernels.replace(**{table: times(getattr(kernels, table), factor)}))
    return experts


def with_engine(experts: ExpertProfile, fleet: Sequence[Expert], engine: str) -> ExpertProfile:
    """Returns a profile whose experts run another engine.

    Args:
      experts: the profile.
      fleet: its experts.
      engine: a name in ``ENGINES``.
    """
    fields = engine_fields(fleet, engine)
    return experts.replace(
        **{name: jnp.asarray(values, jnp.asarray(getattr(experts, name)).dtype) for name, values in fields.items()}
    )


def orders(names: Sequence[str], loads: Sequence[float], before: np.ndarray, after: np.ndarray) -> list[dict[str, Any]]:
    """Compares the orders that are decided before a change with the same ones after it.

    Args:
      names: of R routers.
      loads: L loads.
      before: QoS [R, L, S] in the unchanged world; all routers have the same requests in each of the S columns.
      after: QoS [R, L, S] in the changed world.

    Returns:
      One object for each load and each two routers whose order is decided before: ``load``, ``better``, ``worse``, the
      difference ``before`` and ``after`` (``mean``, ``low`` and ``high``), and ``outcome``: ``kept``, ``undecided`` or
      ``reversed``.
    """
    found = []
    pairs = list(itertools.combinations(range(len(names)), 2))
    for (place, load), (one, other) in itertools.product(enumerate(loads), pairs):
        better, worse = (one, other) if before[one, place].mean() > before[other, place].mean() else (other, one)
        was, now = (summarise(qos[better, place] - qos[worse, place]) for qos in (before, after))
        if was["low"] > 0:
            found.append(
                {"load": load, "better": names[better], "worse": names[worse], "before": was, "after": now}
                | {"outcome": _outcome(was, now)}
            )
    return found


def claims(
    kinds: Mapping[str, str], loads: Sequence[float], before: np.ndarray, after: np.ndarray
) -> list[dict[str, Any]]:
    """Compares gains over the best heuristic before and after a change.

    The routers are the learned ones; without any, the heuristic with the highest mean before. The best heuristic is the
    best other one at that load, before and after.

    Args:
      kinds: of the R routers by name, in order.
      loads: L loads.
      before: QoS [R, L, S] in the unchanged world.
      after: QoS [R, L, S] in the changed world.

    Returns:
      One object for each router and load: ``router``, ``load``, ``against_before`` and ``against_after``, the gains
      ``before`` and ``after`` (``mean``, ``low`` and ``high``), and ``outcome``: ``kept``, ``undecided`` or
      ``reversed``, or ``open`` where the gain is undecided already before.
    """
    names = list(kinds)
    heuristics = [place for place, name in enumerate(names) if kinds[name] == "heuristic"]
    learned = [place for place, name in enumerate(names) if kinds[name] == "learned"]
    routers = learned or sorted(heuristics, key=lambda place: -before[place].mean())[:1]
    found = []
    for router, (place, load) in itertools.product(routers, enumerate(loads)):
        others = [other for other in heuristics if other != router]
        if not others:
            continue
        (best, was), (best_now, now) = (_gain(qos[:, place], router, others) for qos in (before, after))
        found.append(
            {"router": names[router], "load": load, "against_before": names[best], "against_after": names[best_now]}
            | {"before": was, "after": now, "outcome": _outcome(was, now)}
        )
    return found


def _gain(qos: np.ndarray, router: int, others: Sequence[int]) -> tuple[int, dict[str, float]]:
    """Returns the best of the others by mean QoS, of [R, S], and the paired gain of the router over it."""
    best = max(others, key=lambda other: qos[other].mean())
    return best, summarise(qos[router] - qos[best])


def rank_correlations(before: np.ndarray, after: np.ndarray) -> list[float]:
    """Returns Kendall's tau-b [L] between the rankings by mean QoS, of [R, L, S] each; NaN for one router."""
    import scipy.stats  # slow to import

    if len(before) < 2:
        return [float("nan")] * before.shape[1]
    means = np.stack([before.mean(-1), after.mean(-1)])
    return [float(scipy.stats.kendalltau(*means[:, :, place]).statistic) for place in range(means.shape[2])]


def _outcome(was: Mapping[str, float], now: Mapping[str, float]) -> str:
    """Returns what becomes of a difference, by the intervals before and after."""
    sign = 1 if was["low"] > 0 else -1 if was["high"] < 0 else 0
    if sign == 0 or not np.isfinite(was["low"]):
        return "open"
    low, high = sorted((sign * now["low"], sign * now["high"]))
    return "kept" if low > 0 else "reversed" if high < 0 else "undecided"


def _signed(amount: float) -> list[tuple[str, float]]:
    return [(f"{sign * 100 * amount:+g} %", 1 + sign * amount) for sign in (-1, 1)]
