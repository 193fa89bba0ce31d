"""A fast, faithful simulator of LLM serving at the edge, and the router that learns on it."""

__version__ = "0.1.0"

from qos_jax.errors import InputError
from qos_jax.sim.replay import replay
from qos_jax.sim.types import ExpertProfile, Observation, Request, RequestLog, RequestTrace

__all__ = [
    "ExpertProfile",
    "InputError",
    "Observation",
    "Request",
    "RequestLog",
    "RequestTrace",
    "replay",
]
