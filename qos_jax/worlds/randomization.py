"""Randomised training worlds: every environment has its own world, so that one router learns to serve all of them.

Loads, arrival laws, predictions, staleness, latency limits and fleets are traced numbers, so a mixture of worlds is one
``EnvParams`` with an axis for the environments.
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
from qos_jax.sim.types import ExpertProfile, Preferences
from qos_jax.sim.validation import checked_experts
from qos_jax.sim.world import WorldSpec
from qos_jax.workload.arrivals import ArrivalProcess, parse_arrivals
from qos_jax.workload.content import LatencyLimits, generated_content
from qos_jax.workload.prediction import parse_prediction
from qos_jax.workload.request_workload import RequestWorkload

Pair = tuple[str, str]  # LLM, GPU

SMALL_GPUS = ("RTX 4090", "A30", "A40")

LOADS = (0.5, 1.4)
ARRIVALS = ("poisson", "gamma:2", "gamma:4", "mmpp:2:30", "mmpp:3:10", "sinusoidal:0.5:120", "sinusoidal:0.8:60")
PREDICTIONS = ("none", "realistic", "realistic", "r2:0.3:0.6", "perfect")
LATENCY_LIMITS_S = (0.024, 0.05)
PREFERENCES = (("score", 0.1, 1.0), ("violation", 0.05, 1.0), ("drop", 0.05, 1.0), ("energy", 0.1, 10.0))
"""Name, minimum and maximum of each weight of the preferences."""
PAIRS: tuple[Pair, ...] = (
    *((llm, gpu) for llm in ("alpaca-native", "chatglm-6b", "mpt-7b-instruct", "koala-7B-HF") for gpu in SMALL_GPUS),
    *((llm, "A100") for llm in ("vicuna-13b-1.1", "oasst-sft-4-pythia-12b-epoch-3.5", "moss-moon-003-sft")),
    ("stablelm-tuned-alpha-7b", "A40"),
)


@dataclasses.dataclass(frozen=True)
class Domain:
    """Distributions from which the worlds are sampled independently; an empty tuple keeps the value of the world."""

    loads: tuple[float, ...] = ()  # uniform between minimum and maximum
    arrivals: tuple[str, ...] = ()  # uniform over these laws
    predictions: tuple[str, ...] = ()  # uniform over these models
    staleness_s: tuple[float, ...] = ()  # s, uniform between minimum and maximum
    latency_limits_s: tuple[float, ...] = ()  # s/token, uniform between minimum and maximum, for each class of users
    pairs: tuple[Pair, ...] = ()  # the experts of every environment are sampled from these, with
    equal_gpus: float = 0.5  # probability that all experts have the same kind of GPU
    synchronous: float = 0.5  # probability that their engines are vllm-sync, else vllm; only of sampled experts
    preferences: tuple[tuple[str, float, float], ...] = ()
    """Each weight has its default in half of the environments, and is log-uniform between minimum and maximum else."""


def rate_clip_per_s(env: Environment, params: EnvParams, load: float = 0.0) -> float:
    """Returns the mean arrival rate per expert [requests/s] at the highest training load, for clipping observed rates.

    Training covers higher rates only in bursts, and at all higher rates the fleet is far beyond saturation.

    Args:
      env: gives the number of experts.
      params: one world, or several with an axis for the environments; the fastest fleet counts.
      load: highest training load, if it is above the maximum of ``LOADS``.
    """
    fastest_per_s = float(np.max(params.saturation_per_s))
    return float(f"{max(load, LOADS[1]) * fastest_per_s / env.spec.num_experts:.3g}")


def sample_worlds(env: Environment, params: EnvParams, domain: Domain, key: Array, num_envs: int) -> EnvParams:
    """Samples the worlds of ``num_envs`` environments.

    Args:
      env: gives the shapes of the worlds.
      params: of one world, for everything that the domain keeps.
      domain: distributions of the worlds.
      key: random key.
      num_envs: number of environments.

    Returns:
      Parameters with a leading axis [num_envs] on every leaf.

    Raises:
      InputError: a name is unknown, the environment has no history for stale metrics, or the arrivals cannot be mixed
        with other laws.
    """
    if domain.staleness_s and max(domain.staleness_s) > 0 and env.spec.history < 1:
        raise InputError(f"staleness_s is {domain.staleness_s}, must be 0 in an environment without history")
    arrivals = params.workload.arrivals  # type: ignore[attr-defined]
    if domain.arrivals and (not isinstance(arrivals, ArrivalProcess) or arrivals.recorded_gaps is not None):
        raise InputError("the arrivals of the world are recorded or of a type of their own, must mix with other laws")
    worlds = [_sample_world(env, params, domain, env_key) for env_key in jax.random.split(key, num_envs)]
    # Stacked on the host: to concatenate a thousand arrays, XLA compiles for seconds.
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack([jnp.asarray(leaf) for leaf in leaves])), *worlds)


def _sample_world(env: Environment, params: EnvParams, domain: Domain, key: Array) -> EnvParams:
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    if domain.pairs:
        params = _sample_fleet(env.spec, params, domain, rng)
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
        values_s = rng.uniform(min(domain.latency_limits_s), max(domain.latency_limits_s), limits.values_s.shape)
        values_s = np.where(np.isfinite(limits.values_s), values_s, np.inf)  # no limit stays none
        limits = limits.replace(values_s=jnp.asarray(values_s, limits.values_s.dtype))  # type: ignore[attr-defined]
        workload = dataclasses.replace(workload, content=dataclasses.replace(workload.content, limits=limits))  # type: ignore[type-var]
    params = params.replace(workload=workload)
    if domain.staleness_s:
        params = params.replace(staleness_s=jnp.float32(rng.uniform(min(domain.staleness_s), max(domain.staleness_s))))
    if domain.loads:
        params = params.at_load(jnp.float32(rng.uniform(min(domain.loads), max(domain.loads))))
    if domain.preferences:
        params = params.replace(preferences=_sample_preferences(domain, rng))
    return params


def _sample_preferences(domain: Domain, rng: np.random.Generator) -> Preferences:
    drawn = {name: np.exp(rng.uniform(*np.log(ends))) for name, *ends in domain.preferences if rng.random() < 0.5}
    return Preferences(**{name: jnp.float32(weight) for name, weight in (vars(Preferences()) | drawn).items()})


def _sample_fleet(spec: WorldSpec, params: EnvParams, domain: Domain, rng: np.random.Generator) -> EnvParams:
    """Returns the parameters with a sampled fleet and the contents of its LLMs."""
    pairs = domain.pairs
    if rng.random() < domain.equal_gpus:
        gpu = pairs[rng.integers(len(pairs))][1]
        pairs = tuple(pair for pair in pairs if pair[1] == gpu)
    fleet = [pairs[i] for i in rng.integers(len(pairs), size=spec.num_experts)]
    max_running, max_waiting = (int(np.max(n)) for n in (params.experts.max_running, params.experts.max_waiting))
    engine = "vllm-sync" if rng.random() < domain.synchronous else "vllm"
    rates = _saturation_rates(domain.pairs, max_running, max_waiting, engine, spec.engine)
    limits = params.workload.content.limits  # type: ignore[attr-defined]
    content = generated_content([llm for llm, _ in fleet], limits)
    return params.replace(
        experts=_profile(fleet, max_running, max_waiting, engine),
        workload=dataclasses.replace(params.workload, content=content, answers_of=None),  # type: ignore[type-var]
        saturation_per_s=jnp.float32(sum(rates[pair] for pair in fleet)),
    )


@cache
def _saturation_rates(
    pairs: tuple[Pair, ...], max_running: int, max_waiting: int, engine: str, spec: EngineSpec
) -> dict[Pair, float]:
    """Returns the saturation rate [requests/s] of each pair."""
    env = Environment(WorldSpec(len(pairs), spec))
    content = generated_content([llm for llm, _ in pairs])
    workload = RequestWorkload(parse_arrivals("poisson", 1.0), content, parse_prediction("none"))
    params = EnvParams(experts=_profile(list(pairs), max_running, max_waiting, engine), workload=workload)
    return dict(zip(pairs, saturation_rates(env, params), strict=True))


def _profile(pairs: list[Pair], max_running: int, max_waiting: int, engine: str) -> ExpertProfile:
    profile = expert_profile(pairs, max_running, max_waiting, engine)
    profile = profile.replace(kernels=None)  # not every pair was measured, and all worlds have the same fields
    return jax.tree.map(jnp.asarray, checked_experts(profile, np.float32))
