"""Capacity: the largest arrival rate at which a share of the requests meets the service level.

A request that is dropped does not meet it. The rate is found by bisection for each seed, with the same requests at
every rate, only further apart or closer together; the mean over the seeds has Student's t interval.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Callable, Sequence

import numpy as np

from qos_jax.errors import InputError
from qos_jax.evaluation.evaluate import RouterRun, run_router, sample_scenarios, scenarios
from qos_jax.evaluation.statistics import summarise
from qos_jax.routers.base import Router
from qos_jax.sim.env import Environment, EnvParams

LOWEST_LOAD, HIGHEST_LOAD = 0.02, 4.0  # of the fleet's saturation rate, between which is searched
_PRECISION = 0.005  # of the rate, relative
_REPORTED = ("qos", "violation_rate", "drop_rate", "ttft_p95_s", "tpot_p95_s", "e2e_p95_s", "energy_j_per_request")


@dataclasses.dataclass(frozen=True)
class Capacity:
    """How many requests/s a router can take in a world."""

    router: Router
    rates_per_s: np.ndarray  # [R] requests/s of each seed; 0 where not even the lowest load meets the level
    share: float  # of the requests that is to meet the level
    metrics: dict[str, float]  # means over the seeds at these rates; NaN if no seed has one

    @property
    def interval(self) -> dict[str, float]:
        """``mean``, ``low`` and ``high`` [requests/s]."""
        return summarise(self.rates_per_s)

    @property
    def good_per_s(self) -> float:
        """Answers per second that meet the level (goodput)."""
        return float(self.rates_per_s.mean() * (1.0 - self.metrics["violation_rate"]))

    @property
    def energy_kj_per_1000_good(self) -> float:
        """Energy of the whole fleet for 1,000 answers that meet the level, kJ."""
        return self.metrics["energy_j_per_request"] / max(1.0 - self.metrics["violation_rate"], 1e-9)

    def cost_per_1000_good(self, price_per_kwh: float = 0.0, price_per_hour: float = 0.0) -> float:
        """Returns the price of 1,000 answers that meet the level.

        Args:
          price_per_kwh: of electricity.
          price_per_hour: of the whole fleet, for rent or depreciation.
        """
        hours = 1000.0 / max(self.good_per_s, 1e-9) / 3600.0
        return self.energy_kj_per_1000_good / 3600.0 * price_per_kwh + hours * price_per_hour


def capacities(
    env: Environment,
    params: EnvParams,
    routers: Sequence[Router],
    seeds: Sequence[int],
    num_requests: int,
    *,
    share: float = 0.95,
    warmup: int = 0,
    progress: Callable[[Router], None] = lambda router: None,
) -> list[Capacity]:
    """Returns the capacity of each router, in parallel threads.

    Args:
      env: the environment.
      params: its parameters; the saturation rate bounds the search.
      routers: to compare.
      seeds: R seeds of the requests.
      num_requests: of each seed.
      share: of the requests that is to meet the level, between 0 and 1.
      warmup: number of leading requests that do not count.
      progress: called with each router that is done.

    Raises:
      InputError: a number is out of range, or the saturation rate of the world is unknown.
    """
    if not 0 < share < 1:
        raise InputError(f"share is {share!r}, must be a number between 0 and 1")
    scenarios(params, [LOWEST_LOAD], seeds)  # checks them and the saturation rate
    together = tuple(routers)

    def search(which: int) -> Capacity:
        found = _search(env, params, together, which, seeds, num_requests, share, warmup)
        progress(together[which])
        return found

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(search, range(len(together))))


def _search(
    env: Environment,
    params: EnvParams,
    routers: tuple[Router, ...],
    which: int,
    seeds: Sequence[int],
    num_requests: int,
    share: float,
    warmup: int,
) -> Capacity:
    """Halves the range of rates of every seed at once, until it is narrow."""
    low, high = np.full(len(seeds), LOWEST_LOAD), np.full(len(seeds), HIGHEST_LOAD)
    best: list[RouterRun | None] = [None] * len(seeds)

    def judge(loads: np.ndarray) -> np.ndarray:
        asked = [scenarios(params, [load], [seed])[0] for load, seed in zip(loads, seeds, strict=True)]
        runs = run_router(env, params, routers, which, sample_scenarios(params, asked, num_requests), warmup)
        meets = np.array([run.metrics["violation_rate"] <= 1.0 - share for run in runs])
        for i in np.flatnonzero(meets):
            best[i] = runs[i]
        return meets

    possible = judge(low)
    while np.max(np.log(high / low), where=possible, initial=0.0) > _PRECISION:
        middle = np.sqrt(low * high)
        meets = judge(middle)
        low, high = np.where(meets, middle, low), np.where(meets, high, middle)
    found = [run.metrics for run in best if run is not None]
    metrics = {name: float(np.mean([each[name] for each in found])) if found else math.nan for name in _REPORTED}
    return Capacity(routers[which], np.where(possible, low, 0.0) * float(params.saturation_per_s), share, metrics)
