"""Routers by name, and how to register another one."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from qos_jax.errors import InputError
from qos_jax.io.imports import import_named, in_one_line
from qos_jax.io.text_files import shown
from qos_jax.routers import heuristics, production
from qos_jax.routers.base import Router
from qos_jax.routers.impact_greedy import impact_greedy
from qos_jax.routers.planner import rollout_planner
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.types import Workload
from qos_jax.sim.world import WorldSpec

__all__ = ["Router", "RouterFactory", "make_router", "register_router", "router_names"]

RouterFactory = Callable[[Environment, EnvParams], Router]

_ROUTERS: dict[str, Callable[[], Router]] = {
    "random": heuristics.random,
    "round_robin": heuristics.round_robin,
    "shortest_queue": heuristics.shortest_queue,
    "shortest_tokens": heuristics.shortest_tokens,
    "least_kv": heuristics.least_kv,
    "power_of_two": heuristics.power_of_two,
    "vllm_dp": heuristics.vllm_dp,
    "vllm_dp_2026": heuristics.vllm_dp_2026,
    "latency_headroom": heuristics.latency_headroom,
    "bert_router": heuristics.bert_router,
    "bert_router_feasible": heuristics.bert_router_feasible,
    "score_threshold": production.score_threshold,
    "multi_factor": production.multi_factor,
    "route_balance": production.route_balance,
    "latency_scorer": production.latency_scorer,
    "prefix_affinity": production.prefix_affinity,
    "impact_greedy": impact_greedy,
    # Tuned on paper-3 alone, by ``python -m experiments.tune_impact``: the best values differ where GPUs are equal.
    "impact_greedy_equal_gpus": partial(impact_greedy, "impact_greedy_equal_gpus", width_s=1.5e-3, price=0.1),
    "impact_greedy_later_prompts": partial(impact_greedy, "impact_greedy_later_prompts", later_prompts=True),
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
"""Routers that simulate ahead at every decision, and are therefore slow."""
VARIANTS: dict[str, Callable[[Router], Router]] = {
    "+admission": production.with_admission,
    "+no_drop": production.without_drop,
}
"""What may stand behind the name of a router, once: another rule for what is refused."""
_registered: dict[str, RouterFactory] = {}
_MAX_SINGLE_EXPERTS = 8  # larger fleets have no rows of one expert alone in tables of all routers


def register_router(name: str, factory: RouterFactory) -> None:
    """Registers a router under a name for ``make_router`` and ``router_names``.

    A later registration under the same name replaces the earlier one.

    Args:
      name: letters, digits and underscores.
      factory: returns the router of a world; called as ``factory(env, params)``.

    Raises:
      InputError: the name is not of this form, or is one of the library's.
    """
    if not name.isidentifier():
        raise InputError(f"router name {name!r} must consist of letters, digits and underscores")
    if name in (*_ROUTERS, *PLANNERS, "all") or name.startswith("expert_"):
        raise InputError(f"router {name!r} is one of the library: choose another name")
    _registered[name] = factory


def router_names(env: Environment) -> list[str]:
    """Returns the names of all routers for a fleet: the library's, registered ones, and each expert of a small fleet.

    Planners are left out, as they are slow, and so is ``prefix_affinity`` where there are no sessions.
    """
    if isinstance(env, int):
        env, _ = _earlier_call(env)
    num_experts = env.spec.num_experts
    singles = [f"expert_{i}" for i in range(num_experts)] if num_experts <= _MAX_SINGLE_EXPERTS else []
    named = [name for name in _ROUTERS if env.spec.sessions or name != "prefix_affinity"]
    return [*named, *_registered, *singles]


def make_router(name: str, env: Environment, params: EnvParams | None = None) -> Router:
    """Builds a router for a world.

    Args:
      name: one of ``router_names(env)``, the planner ``rollout``, or ``package.module:factory`` for a ``RouterFactory``
        of the user's, which is imported. Behind any of them ``+admission`` has it refuse what impact_greedy
        refuses, and ``+no_drop`` nothing.
      env: the environment.
      params: its parameters. The library's routers do not need them, except for planners, which sample future requests
        from ``params.workload``.

    Raises:
      InputError: the name is unknown for a fleet of this size, ``params`` is needed and missing, or a factory cannot be
        imported or fails.
    """
    if isinstance(env, int):
        env, params = _earlier_call(env, params)
    if not isinstance(name, str):
        raise InputError(f"router is {shown(name)}, must be a name such as 'round_robin'")
    before, plus, variant = name.rpartition("+")
    if plus and "+" not in before and (change := VARIANTS.get(plus + variant)):
        return change(make_router(before, env, params))
    if name in _ROUTERS:
        return _ROUTERS[name]()
    if name in PLANNERS:
        if params is None or params.workload is None:
            raise InputError(f"router {name!r} plans ahead, but workload is None: give the law of requests")
        return PLANNERS[name](params.workload)
    if name in _registered or ":" in name:
        return _made_by_user(name, env, params)
    num_experts = env.spec.num_experts
    expert = name.removeprefix("expert_")
    if name != expert and expert.isascii() and expert.isdecimal() and int(expert) < num_experts:
        return heuristics.single_expert(int(expert))
    known = ", ".join([*_ROUTERS, *PLANNERS, *_registered])
    raise InputError(
        f"router {name!r} is unknown; choose all, {known}, expert_0 to expert_{num_experts - 1}, "
        "or package.module:factory for a router of your own"
    )


def _made_by_user(name: str, env: Environment, params: EnvParams | None) -> Router:
    """Returns the router of a registered or imported factory."""
    if params is None:
        raise InputError(f"router {name!r} is made for a world: give env and params")
    factory = _registered[name] if name in _registered else import_named(name)
    try:
        router = factory(env, params)
    except Exception as error:
        raise InputError(f"router {name!r}: its factory failed: {in_one_line(error)}") from error
    if not isinstance(router, Router):
        raise InputError(f"router {name!r}: its factory returned {type(router).__name__}, must return a Router")
    return dataclasses.replace(router, name=name) if name in _registered else router


def _earlier_call(num_experts: int, workload: Any = None) -> tuple[Environment, EnvParams | None]:
    """Returns the arguments for a call as in release 0.1, ``make_router(name, num_experts, workload)``."""
    warnings.warn(
        "give env and params; a number of experts and a workload will not be accepted in the next release",
        DeprecationWarning,
        stacklevel=3,
    )
    env = Environment(WorldSpec(num_experts, EngineSpec(slots=1)))
    return env, None if workload is None else EnvParams(None, workload)  # type: ignore[arg-type]
