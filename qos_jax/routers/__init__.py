"""Every router by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from qos_jax.errors import InputError
from qos_jax.routers import heuristics
from qos_jax.routers.base import Router
from qos_jax.routers.impact_greedy import impact_greedy
from qos_jax.routers.planner import rollout_planner
from qos_jax.sim.types import Workload

__all__ = ["Router", "make_router", "router_names"]

_ROUTERS: dict[str, Callable[[], Router]] = {
    "random": heuristics.random,
    "round_robin": heuristics.round_robin,
    "shortest_queue": heuristics.shortest_queue,
    "shortest_tokens": heuristics.shortest_tokens,
    "least_kv": heuristics.least_kv,
    "power_of_two": heuristics.power_of_two,
    "vllm_dp": heuristics.vllm_dp,
    "latency_headroom": heuristics.latency_headroom,
    "bert_router": heuristics.bert_router,
    "bert_router_feasible": heuristics.bert_router_feasible,
    "impact_greedy": impact_greedy,
    # tuned on paper-3 alone, as ours has a number of its own for equal GPUs (experiments.tune_impact, BUILD_NOTES.md)
    "impact_greedy_equal_gpus": partial(impact_greedy, "impact_greedy_equal_gpus", width_s=1.5e-3, price=0.1),
    "impact_greedy_no_drop": partial(impact_greedy, "impact_greedy_no_drop", price=-math.inf),
    "oracle_score": partial(heuristics.bert_router, "oracle_score", kind="oracle", information="true_scores"),
    "oracle_impact": partial(
        impact_greedy,
        "oracle_impact",
        width_s=1.5e-3,
        length_cv=0.05,
        price=0.3,
        kind="oracle",
        information="true_scores_and_tokens",
    ),
}
PLANNERS: dict[str, Callable[[Workload], Router]] = {"rollout": rollout_planner}
_MOST_SINGLES = 8  # in a larger fleet, to compare all experts alone says little


def router_names(num_experts: int) -> list[str]:
    """Returns the names of all routers for a fleet, with each of its experts alone if they are few.

    Planners are left out: they simulate at every decision, and are slow.
    """
    singles = [f"expert_{i}" for i in range(num_experts)] if num_experts <= _MOST_SINGLES else []
    return [*_ROUTERS, *singles]


def make_router(name: str, num_experts: int, workload: Workload | None = None) -> Router:
    """Builds a router.

    Args:
      name: one of ``router_names``, or a planner's: rollout.
      num_experts: size of the fleet.
      workload: the law of requests, from which planners sample the future; ``EnvParams`` has it. Others need none.

    Raises:
      InputError: there is no router of this name for a fleet of this size, or a planner is given no workload.
    """
    if name in _ROUTERS:
        return _ROUTERS[name]()
    if name in PLANNERS:
        if workload is None:
            raise InputError(f"router {name!r} plans ahead, but workload is None: give the law of requests")
        return PLANNERS[name](workload)
    expert = name.removeprefix("expert_")
    if name != expert and expert.isdecimal() and int(expert) < num_experts:
        return heuristics.single_expert(int(expert))
    known = ", ".join([*_ROUTERS, *PLANNERS])
    raise InputError(f"router {name!r} is unknown; choose all, {known}, or expert_0 to expert_{num_experts - 1}")
