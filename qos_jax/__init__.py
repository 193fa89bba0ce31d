"""A fast, faithful simulator of LLM serving at the edge, and the router that learns on it.

The names below are loaded when they are first used, so that ``import qos_jax`` costs next to nothing and the programs
can show their help without JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from qos_jax.agent.networks import register_network
    from qos_jax.agent.recipes import Recipe, recipe
    from qos_jax.agent.targets import register_targets
    from qos_jax.api import train
    from qos_jax.encoder.flat import flat_view
    from qos_jax.encoder.jraph_views import graph_view
    from qos_jax.errors import InputError
    from qos_jax.evaluation.capacity import Capacity, capacities
    from qos_jax.evaluation.evaluate import Scenario, evaluate, scenarios
    from qos_jax.fleet.fleet_file import Fleet, load_fleet
    from qos_jax.predictor.predictor import Predictor, load_predictor
    from qos_jax.routers import Router, make_router, register_router, router_names
    from qos_jax.sim.capacity import sample_requests, saturation_rate
    from qos_jax.sim.env import Environment, EnvParams, EnvState
    from qos_jax.sim.replay import replay
    from qos_jax.sim.types import ExpertProfile, Observation, Request, RequestLog, RequestTrace, ServiceLimits
    from qos_jax.training.load import load_router
    from qos_jax.workload.arrivals import register_arrivals
    from qos_jax.workload.tables import QualityTable, read_mix_instruct, read_npz
    from qos_jax.workload.trace_files import read_trace
    from qos_jax.workload.traces import ArrivalTrace
    from qos_jax.worlds.build import make
    from qos_jax.worlds.config import WorldConfig
    from qos_jax.worlds.presets import PRESETS

_MODULES = {
    "agent.networks": ("register_network",),
    "agent.recipes": ("Recipe", "recipe"),
    "agent.targets": ("register_targets",),
    "api": ("train",),
    "encoder.flat": ("flat_view",),
    "encoder.jraph_views": ("graph_view",),
    "errors": ("InputError",),
    "evaluation.capacity": ("Capacity", "capacities"),
    "evaluation.evaluate": ("Scenario", "evaluate", "scenarios"),
    "fleet.fleet_file": ("Fleet", "load_fleet"),
    "predictor.predictor": ("Predictor", "load_predictor"),
    "routers": ("Router", "make_router", "register_router", "router_names"),
    "sim.capacity": ("sample_requests", "saturation_rate"),
    "sim.env": ("EnvParams", "EnvState", "Environment"),
    "sim.replay": ("replay",),
    "sim.types": ("ExpertProfile", "Observation", "Request", "RequestLog", "RequestTrace", "ServiceLimits"),
    "training.load": ("load_router",),
    "workload.arrivals": ("register_arrivals",),
    "workload.tables": ("QualityTable", "read_mix_instruct", "read_npz"),
    "workload.trace_files": ("read_trace",),
    "workload.traces": ("ArrivalTrace",),
    "worlds.build": ("make",),
    "worlds.config": ("WorldConfig",),
    "worlds.presets": ("PRESETS",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "PRESETS",
    "ArrivalTrace",
    "Capacity",
    "EnvParams",
    "EnvState",
    "Environment",
    "ExpertProfile",
    "Fleet",
    "InputError",
    "Observation",
    "Predictor",
    "QualityTable",
    "Recipe",
    "Request",
    "RequestLog",
    "RequestTrace",
    "Router",
    "Scenario",
    "ServiceLimits",
    "WorldConfig",
    "capacities",
    "evaluate",
    "flat_view",
    "graph_view",
    "load_fleet",
    "load_predictor",
    "load_router",
    "make",
    "make_router",
    "read_mix_instruct",
    "read_npz",
    "read_trace",
    "recipe",
    "register_arrivals",
    "register_network",
    "register_router",
    "register_targets",
    "replay",
    "router_names",
    "sample_requests",
    "saturation_rate",
    "scenarios",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'qos_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"qos_jax.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
