"""Named worlds, and ``make``, which builds one of them or a variation of it.

A load rho is a fraction of the fleet's saturation rate: the requests per second that it finishes when every expert
always has some waiting (``qos_jax.sim.capacity``). The rates of the presets as they stand are written down here, as
``python -m experiments.saturation`` prints them; a variation's is simulated when a load is asked for.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qos_jax.errors import InputError
from qos_jax.fleet.profiles import expert_profile
from qos_jax.sim.capacity import saturation_rate
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.validation import checked_experts
from qos_jax.sim.world import WorldSpec
from qos_jax.workload.arrivals import ArrivalProcess, parse_arrivals
from qos_jax.workload.content import RequestContent, generated_content, latency_limits, sharegpt_run_content
from qos_jax.workload.prediction import Predictions, parse_prediction
from qos_jax.workload.request_workload import RequestWorkload
from qos_jax.workload.tables import QualityTable


@dataclasses.dataclass(frozen=True)
class Preset:
    """A world by name; each field may be overridden in ``make``."""

    experts: tuple[tuple[str, str], ...]  # (LLM, GPU) of each expert
    saturation_per_s: float  # requests/s, of this preset unchanged
    latency_limit_s: float | tuple[float, ...] = 0.03  # s/token, of one class of users or of several
    latency_limit_weights: tuple[float, ...] | None = None
    max_running: int = 32
    max_waiting: int = 32
    arrivals: str = "poisson"
    prediction: str = "realistic"
    allow_drop: bool = True
    staleness_s: float = 0.0  # s, how late the router sees metrics, at least
    history: int | None = None  # snapshots kept for that, one per arrival; 64 by default
    requests: int = 5000  # of an episode
    content: str = "mix-instruct"  # law of prompts and answers: mix-instruct, or sharegpt-run for the measured vLLM run


PAPER_3 = (("alpaca-native", "A40"), ("chatglm-6b", "A40"), ("mpt-7b-instruct", "A40"))
PAPER_6 = (*PAPER_3, ("koala-7B-HF", "A40"), ("llama-7b-hf-baize-lora-bf16", "A40"), ("mpt-7b", "A40"))
EDGE_8 = (
    ("alpaca-native", "RTX 4090"),
    ("chatglm-6b", "A40"),
    ("mpt-7b-instruct", "RTX 4090"),
    ("stablelm-tuned-alpha-7b", "A40"),
    ("vicuna-13b-1.1", "A100"),
    ("oasst-sft-4-pythia-12b-epoch-3.5", "A100"),
    ("moss-moon-003-sft", "A100"),
    ("koala-7B-HF", "A40"),
)

PRESETS = {
    # On an A40 about 20 requests side by side reach the paper's limit, so that requests interfere as they do there.
    "paper-3": Preset(PAPER_3, saturation_per_s=22.9),
    "paper-6": Preset(PAPER_6, saturation_per_s=34.5),
    "edge-8": Preset(EDGE_8, saturation_per_s=68.2, latency_limit_s=0.036),
    "edge-64": Preset(EDGE_8 * 8, saturation_per_s=546.0, latency_limit_s=0.036),
    # The fleet and the requests of a measured vLLM run, whose 10 requests/s were far beyond saturation.
    "golden-rtx4090": Preset(
        (("llama-3.1-8b", "RTX 4090"),),
        saturation_per_s=1.71,
        latency_limit_s=0.05,
        max_running=256,
        max_waiting=256,
        content="sharegpt-run",
    ),
}

_DEFAULT_LOAD = 0.8
_LARGEST = 2**30  # counts stay within int32
_FLEET_FIELDS = {"experts", "max_running", "content"}  # what the saturation rate depends on


def make(
    name: str,
    *,
    load: float | None = None,
    rate_per_s: float | None = None,
    check: bool = False,
    quality_table: QualityTable | None = None,
    arrivals: str | ArrivalProcess | None = None,
    prediction: str | Predictions | None = None,
    **overrides: Any,
) -> tuple[Environment, EnvParams]:
    """Builds a preset world, or a variation of it.

    Args:
      name: one of ``PRESETS``.
      load: arrival rate as a fraction of the fleet's saturation rate; 0.8 without it and ``rate_per_s``.
      rate_per_s: arrival rate [requests/s].
      check: adds invariants to each step, see ``Environment``.
      quality_table: draws requests from this table, which must know the preset's LLMs, not from the built-in generator.
      arrivals: law of arrivals, as ``parse_arrivals`` reads it or as a process, whose rate is replaced.
      prediction: what routers are told, as ``parse_prediction`` reads it or as a model.
      **overrides: other values for the fields of ``Preset``.

    Returns:
      The environment and its parameters; ``params.experts`` is the ``ExpertProfile``.

    Raises:
      InputError: an unknown preset or field, or a value out of range.
    """
    preset = _preset(name, overrides)
    profile = checked_experts(
        expert_profile(preset.experts, max_running=preset.max_running, max_waiting=preset.max_waiting), np.float32
    )
    history = preset.history
    if history is None:
        history = 0 if preset.staleness_s == 0 else 64
    if preset.staleness_s > 0 and history < 1:
        raise InputError(f"history is {history}, must be at least 1 for staleness_s {preset.staleness_s}")
    spec = WorldSpec(
        num_experts=len(preset.experts),
        engine=EngineSpec(slots=int(preset.max_running + preset.max_waiting)),
        allow_drop=bool(preset.allow_drop),
        history=int(history),
    )
    env = Environment(spec, expert_names=tuple(f"{llm} @ {gpu}" for llm, gpu in preset.experts), check=check)
    workload = RequestWorkload(
        arrivals=_arrivals(preset.arrivals if arrivals is None else arrivals),
        content=_content(preset, quality_table),
        prediction=_prediction(preset.prediction if prediction is None else prediction),
    )
    params = EnvParams(
        experts=jax.tree.map(jnp.asarray, profile),
        workload=workload,
        max_steps_in_episode=jnp.int32(preset.requests),
        staleness_s=jnp.float32(preset.staleness_s),
    )
    if rate_per_s is not None:
        if load is not None:
            raise InputError(f"load {load} and rate_per_s {rate_per_s} are both given: give one")
        params = params.replace(workload=workload.with_rate(_positive("rate_per_s", rate_per_s)))
    else:
        varied = quality_table is not None or not _FLEET_FIELDS.isdisjoint(overrides)
        params = params.replace(saturation_per_s=saturation_rate(env, params) if varied else preset.saturation_per_s)
        params = params.at_load(_positive("load", _DEFAULT_LOAD if load is None else load))
    return env.with_default_params(params), params


def preset_named(name: str) -> Preset:
    """Returns the preset of this name.

    Raises:
      InputError: there is none.
    """
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown; choose from {', '.join(PRESETS)}")
    return PRESETS[name]


def _preset(name: str, overrides: dict[str, Any]) -> Preset:
    base = preset_named(name)
    known = {field.name for field in dataclasses.fields(Preset)} - {"saturation_per_s"}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise InputError(f"preset field {unknown[0]!r} is unknown; choose from {', '.join(sorted(known))}")
    preset = dataclasses.replace(base, **overrides)
    for field, lowest in (("max_running", 1), ("max_waiting", 1), ("requests", 1), ("history", 0)):
        value = getattr(preset, field)
        whole = isinstance(value, int | np.integer) and lowest <= value <= _LARGEST
        if not whole and not (field == "history" and value is None):
            raise InputError(f"{field} is {value!r}, must be a whole number from {lowest} to {_LARGEST}")
    _positive("staleness_s", preset.staleness_s, or_zero=True)
    return preset


def _positive(name: str, value: float, *, or_zero: bool = False) -> float:
    number = isinstance(value, int | float | np.number) and np.isfinite(value)
    if not number or value < 0 or (value == 0 and not or_zero):
        raise InputError(f"{name} is {value!r}, must be a finite number {'of at least' if or_zero else 'above'} 0")
    return float(value)


def _arrivals(law: str | ArrivalProcess) -> ArrivalProcess:
    return parse_arrivals(law, 1.0) if isinstance(law, str) else law


def _prediction(model: str | Predictions) -> Predictions:
    return parse_prediction(model) if isinstance(model, str) else model


def _content(preset: Preset, table: QualityTable | None) -> RequestContent:
    names = [llm for llm, _ in preset.experts]
    values = np.atleast_1d(preset.latency_limit_s).tolist()
    limits = latency_limits(values, preset.latency_limit_weights)
    if table is not None:
        return table.select(names).content(limits)
    if preset.content == "mix-instruct":
        return generated_content(names, limits)
    if preset.content == "sharegpt-run":
        return sharegpt_run_content(len(names), limits)
    raise InputError(f"content {preset.content!r} is unknown; choose mix-instruct or sharegpt-run")
