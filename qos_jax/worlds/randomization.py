"""Worlds to train in that differ from one environment to the next, so that one router learns to serve them all.

Loads, arrival laws, predictions, staleness, limits and fleets are all traced numbers, so a mixture of them is one set
of ``EnvParams`` with an axis for the environments.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qos_jax.errors import InputError
from qos_jax.fleet.profiles import expert_profile
from qos_jax.sim.capacity import saturation_rates
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.types import ExpertProfile
from qos_jax.sim.validation import checked_experts
from qos_jax.sim.world import WorldSpec
from qos_jax.workload.arrivals import parse_arrivals
from qos_jax.workload.content import LatencyLimits, generated_content
from qos_jax.workload.prediction import parse_prediction
from qos_jax.workload.request_workload import RequestWorkload

Pair = tuple[str, str]  # LLM, GPU

SMALL_GPUS = ("RTX 4090", "A30", "A40")


LOADS = (0.5, 1.4)
ARRIVALS = ("poisson", "gamma:2", "gamma:4", "mmpp:2:30", "mmpp:3:10", "sinusoidal:0.5:120", "sinusoidal:0.8:60")
PREDICTIONS = ("none", "realistic", "realistic", "r2:0.3:0.6", "perfect")
LATENCY_LIMITS_S = (0.024, 0.05)
PAIRS: tuple[Pair, ...] = (
    *((llm, gpu) for llm in ("alpaca-native", "chatglm-6b", "mpt-7b-instruct", "koala-7B-HF") for gpu in SMALL_GPUS),
    *((llm, "A100") for llm in ("vicuna-13b-1.1", "oasst-sft-4-pythia-12b-epoch-3.5", "moss-moon-003-sft")),
    ("stablelm-tuned-alpha-7b", "A40"),
)


@dataclasses.dataclass(frozen=True)
class Domain:
    """What the worlds are drawn from, each independently; an empty tuple keeps what is there."""

    loads: tuple[float, ...] = ()  # uniform between the least and the greatest
    arrivals: tuple[str, ...] = ()
    predictions: tuple[str, ...] = ()
    staleness_s: tuple[float, ...] = ()  # s, uniform between the least and the greatest
    latency_limits_s: tuple[float, ...] = ()  # s/token, likewise, of each class of users
    pairs: tuple[Pair, ...] = ()  # every environment gets a fleet of its own, drawn from these, with
    equal_gpus: float = 0.5  # probability that all are on GPUs of one kind


def rate_clip_per_s(env: Environment, params: EnvParams, load: float = 0.0) -> float:
    """Returns the mean rate of arrivals for each expert [requests/s] at the greatest load of training.

    That is the end of ``LOADS``, or ``load`` if it is greater, in the fastest of the worlds ``params``. Higher rates
    are known from bursts only, and all of them are far too many for the fleet.
    """
    fastest_per_s = float(np.max(params.saturation_per_s))
    return float(f"{max(load, LOADS[1]) * fastest_per_s / env.spec.num_experts:.3g}")


def sample_worlds(env: Environment, params: EnvParams, domain: Domain, key: Array, num_envs: int) -> EnvParams:
    """Draws the worlds of ``num_envs`` environments.

    Args:
      env: whose shapes the worlds fit.
      params: of one world, for whatever the domain keeps.
      domain: what is drawn.
      key: of the draws.
      num_envs: how many.

    Returns:
      Parameters with a leading axis [num_envs] on every leaf.

    Raises:
      InputError: a name is unknown, staleness is asked of an environment without history, or recorded arrivals are to
        be mixed with other laws.
    """
    if domain.staleness_s and max(domain.staleness_s) > 0 and env.spec.history < 1:
        raise InputError(f"staleness_s is {domain.staleness_s}, must be 0 in an environment without history")
    if domain.arrivals and params.workload.arrivals.recorded_gaps is not None:  # type: ignore[attr-defined]
        raise InputError("arrivals are recorded ones, which cannot be mixed with other laws")
    worlds = [_draw(env, params, domain, one) for one in jax.random.split(key, num_envs)]
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *worlds)


def _draw(env: Environment, params: EnvParams, domain: Domain, key: Array) -> EnvParams:
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    if domain.pairs:
        params = _fleet(env.spec, params, domain, rng)
    workload: RequestWorkload = params.workload  # type: ignore[assignment]
    if domain.arrivals:
        rate_per_s = workload.arrivals.rate_per_s
        law = parse_arrivals(domain.arrivals[rng.integers(len(domain.arrivals))], 1.0)
        workload = dataclasses.replace(workload, arrivals=law.with_rate(rate_per_s))
    if domain.predictions:
        model = parse_prediction(domain.predictions[rng.integers(len(domain.predictions))])
        workload = dataclasses.replace(workload, prediction=model)
    if domain.latency_limits_s:
        limits: LatencyLimits = workload.content.limits  # type: ignore[attr-defined]
        drawn_s = rng.uniform(min(domain.latency_limits_s), max(domain.latency_limits_s), limits.values_s.shape)
        limits = limits.replace(values_s=jnp.asarray(drawn_s, limits.values_s.dtype))  # type: ignore[attr-defined]
        workload = dataclasses.replace(workload, content=dataclasses.replace(workload.content, limits=limits))  # type: ignore[type-var]
    params = params.replace(workload=workload)
    if domain.staleness_s:
        params = params.replace(staleness_s=jnp.float32(rng.uniform(min(domain.staleness_s), max(domain.staleness_s))))
    if domain.loads:
        params = params.at_load(jnp.float32(rng.uniform(min(domain.loads), max(domain.loads))))
    return params


def _fleet(spec: WorldSpec, params: EnvParams, domain: Domain, rng: np.random.Generator) -> EnvParams:
    """Returns the parameters with another fleet, and with the answers of its LLMs."""
    pairs = domain.pairs
    if rng.random() < domain.equal_gpus:
        gpu = pairs[rng.integers(len(pairs))][1]
        pairs = tuple(pair for pair in pairs if pair[1] == gpu)
    chosen = [pairs[i] for i in rng.integers(len(pairs), size=spec.num_experts)]
    running, waiting = (int(np.max(limit)) for limit in (params.experts.max_running, params.experts.max_waiting))
    rates = _rates(domain.pairs, running, waiting, spec.engine)
    limits = params.workload.content.limits  # type: ignore[attr-defined]
    content = generated_content([llm for llm, _ in chosen], limits)
    return params.replace(
        experts=_profile(chosen, running, waiting),
        workload=dataclasses.replace(params.workload, content=content),  # type: ignore[type-var]
        saturation_per_s=jnp.float32(sum(rates[pair] for pair in chosen)),
    )


@cache
def _rates(pairs: tuple[Pair, ...], running: int, waiting: int, engine: EngineSpec) -> dict[Pair, float]:
    """Returns the saturation rate [requests/s] of each pair."""
    env = Environment(WorldSpec(len(pairs), engine))
    content = generated_content([llm for llm, _ in pairs])
    workload = RequestWorkload(parse_arrivals("poisson", 1.0), content, parse_prediction("none"))
    params = EnvParams(experts=_profile(list(pairs), running, waiting), workload=workload)
    return dict(zip(pairs, saturation_rates(env, params), strict=True))


def _profile(pairs: list[Pair], running: int, waiting: int) -> ExpertProfile:
    profile = checked_experts(expert_profile(pairs, max_running=running, max_waiting=waiting), np.float32)
    return jax.tree.map(jnp.asarray, profile)
