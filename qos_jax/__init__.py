"""A fast, faithful simulator of LLM serving at the edge, and the router that learns on it."""

__version__ = "0.1.0"

from qos_jax.encoder.flat import flat_view
from qos_jax.encoder.jraph_views import graph_view
from qos_jax.errors import InputError
from qos_jax.evaluation.evaluate import Scenario, evaluate
from qos_jax.predictor.predictor import Predictor, load_predictor
from qos_jax.routers import Router, make_router, router_names
from qos_jax.sim.capacity import sample_requests, saturation_rate
from qos_jax.sim.env import Environment, EnvParams, EnvState
from qos_jax.sim.replay import replay
from qos_jax.sim.types import ExpertProfile, Observation, Request, RequestLog, RequestTrace
from qos_jax.training.load import load_router
from qos_jax.workload.tables import QualityTable, read_mix_instruct, read_npz
from qos_jax.workload.traces import ArrivalTrace, read_trace
from qos_jax.worlds.presets import PRESETS, make

__all__ = [
    "PRESETS",
    "ArrivalTrace",
    "EnvParams",
    "EnvState",
    "Environment",
    "ExpertProfile",
    "InputError",
    "Observation",
    "Predictor",
    "QualityTable",
    "Request",
    "RequestLog",
    "RequestTrace",
    "Router",
    "Scenario",
    "evaluate",
    "flat_view",
    "graph_view",
    "load_predictor",
    "load_router",
    "make",
    "make_router",
    "read_mix_instruct",
    "read_npz",
    "read_trace",
    "replay",
    "router_names",
    "sample_requests",
    "saturation_rate",
]
