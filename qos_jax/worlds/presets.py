"""Named worlds (presets), and ``make``, which builds a preset or a variation of it.

A load is a fraction of the fleet's saturation rate: the rate at which it finishes requests while every expert has some
waiting (``qos_jax.sim.capacity``). The saturation rates of the presets are constants in this module, as printed by
``python -m experiments.saturation``; that of a variation is simulated when ``make`` needs it for a load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qos_jax.errors import InputError
from qos_jax.fleet.profiles import LLMS, expert_profile
from qos_jax.sim.capacity import saturation_rate
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.validation import checked_experts, checked_whole
from qos_jax.sim.world import WorldSpec
from qos_jax.workload.arrivals import ArrivalProcess, Arrivals, parse_arrivals
from qos_jax.workload.constants import MIX_INSTRUCT
from qos_jax.workload.content import RequestContent, generated_content, latency_limits, sharegpt_run_content
from qos_jax.workload.prediction import Predictions, TablePredictions, parse_prediction
from qos_jax.workload.request_workload import RequestWorkload
from qos_jax.workload.tables import QualityTable


@dataclasses.dataclass(frozen=True)
class Preset:
    """The fields of a world; ``make`` takes other values for all of them but ``saturation_per_s``."""

    experts: tuple[tuple[str, str], ...]  # (LLM, GPU) of each expert
    saturation_per_s: float  # requests/s, of the preset without other values
    latency_limit_s: float | tuple[float, ...] = 0.03  # s/token, of one class of users or of several
    latency_limit_weights: tuple[float, ...] | None = None  # relative frequency of each class; equal by default
    max_running: int = 32  # requests of an expert in one iteration
    max_waiting: int = 32  # requests in the queue of an expert
    arrivals: str = "poisson"
    prediction: str = "realistic"
    allow_drop: bool = True  # the router may drop a request
    staleness_s: float = 0.0  # s, minimum age of the metrics that a router observes
    history: int | None = None  # snapshots kept for stale metrics, one per arrival; 64 by default
    requests: int = 5000  # of an episode
    engine: str = "vllm"  # a name in ``ENGINES``
    content: str = "mix-instruct"  # distribution of contents: mix-instruct, or sharegpt-run as in the measured vLLM run


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
    # On an A40 a batch of about 20 requests reaches the paper's latency limit, so requests interfere as in the paper.
    # Iterations are scheduled one after the other, as in the vLLM of its time.
    "paper-3": Preset(PAPER_3, saturation_per_s=22.9, engine="vllm-sync"),
    "paper-6": Preset(PAPER_6, saturation_per_s=34.5, engine="vllm-sync"),
    "edge-8": Preset(EDGE_8, saturation_per_s=67.8, latency_limit_s=0.036),
    "edge-64": Preset(EDGE_8 * 8, saturation_per_s=544.0, latency_limit_s=0.036),
    # The fleet and the requests of a measured vLLM run, whose rate of 10 requests/s was far beyond saturation.
    "golden-rtx4090": Preset(
        (("llama-3.1-8b", "RTX 4090"),),
        saturation_per_s=1.72,
        latency_limit_s=0.05,
        max_running=256,
        max_waiting=256,
        content="sharegpt-run",
    ),
}

_DEFAULT_LOAD = 0.8
_FLEET_FIELDS = {"experts", "max_running", "content", "engine"}  # fields on which the saturation rate depends


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
      load: arrival rate as a fraction of the fleet's saturation rate; 0.8 by default.
      rate_per_s: arrival rate [requests/s], instead of ``load``.
      check: adds invariants to each step, see ``Environment``.
      quality_table: samples requests from this table instead of the built-in generator; it must have the fleet's LLMs.
      arrivals: arrival process, or its name for ``parse_arrivals``; its rate is replaced.
      prediction: prediction model, or its name for ``parse_prediction``.
      **overrides: other values for the fields of ``Preset``.

    Returns:
      The environment and its parameters; ``params.experts`` is the ``ExpertProfile``.

    Raises:
      InputError: a preset or field is unknown, or a value has the wrong type or is out of range.
    """
    preset = _preset(name, overrides)
    _check_type("check", check, (bool, np.bool_), "True or False")
    if quality_table is not None:
        _check_type("quality_table", quality_table, QualityTable, "a QualityTable, as read_npz returns it")
    _check_llms(preset, quality_table)
    profile = checked_experts(
        expert_profile(preset.experts, preset.max_running, preset.max_waiting, preset.engine), np.float32
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
    env = Environment(spec, expert_names=tuple(f"{llm} @ {gpu}" for llm, gpu in preset.experts), check=bool(check))
    workload = RequestWorkload(
        arrivals=_arrivals(preset.arrivals if arrivals is None else arrivals),
        content=_content(preset, quality_table),
        prediction=_prediction(preset.prediction if prediction is None else prediction),
    )
    if quality_table is not None:
        workload = _with_shared_answers(workload, [llm for llm, _ in preset.experts])
    params = EnvParams(
        experts=jax.tree.map(jnp.asarray, profile),
        workload=workload,
        max_steps_in_episode=jnp.int32(preset.requests),
        staleness_s=jnp.float32(preset.staleness_s),
    )
    if rate_per_s is not None:
        if load is not None:
            raise InputError(f"load {load} and rate_per_s {rate_per_s} are both given, must be one of them")
        params = params.replace(workload=workload.with_rate(_positive("rate_per_s", rate_per_s)))
    else:
        base = preset_named(name)
        changed = {field for field in _FLEET_FIELDS & set(overrides) if overrides[field] != getattr(base, field)}
        varied = quality_table is not None or bool(changed)
        params = params.replace(saturation_per_s=saturation_rate(env, params) if varied else preset.saturation_per_s)
        params = params.at_load(_positive("load", _DEFAULT_LOAD if load is None else load))
    return env.with_default_params(params), params


def preset_named(name: str) -> Preset:
    """Returns the preset with this name.

    Raises:
      InputError: the name is unknown.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown; choose from {', '.join(PRESETS)}")
    return PRESETS[name]


def _preset(name: str, overrides: dict[str, Any]) -> Preset:
    """Returns the preset with other values for some fields, all of them checked."""
    base = preset_named(name)
    fields = {field.name for field in dataclasses.fields(Preset)} - {"saturation_per_s"}
    unknown = sorted(set(overrides) - fields)
    if unknown:
        raise InputError(f"preset field {unknown[0]!r} is unknown; choose from {', '.join(sorted(fields))}")
    preset = dataclasses.replace(base, **overrides)
    for field, lowest in (("max_running", 1), ("max_waiting", 1), ("requests", 1), ("history", 0)):
        if field != "history" or preset.history is not None:
            checked_whole(field, getattr(preset, field), lowest)
    _positive("staleness_s", preset.staleness_s, or_zero=True)
    _check_type("allow_drop", preset.allow_drop, (bool, np.bool_), "True or False")
    return dataclasses.replace(preset, experts=_pairs(preset.experts))


def _pairs(experts: Any) -> tuple[tuple[str, str], ...]:
    """Returns the LLM and the GPU of each expert; ``expert_profile`` checks the names."""
    if isinstance(experts, str) or not isinstance(experts, Sequence) or not experts:
        raise InputError(f"experts is {experts!r}, must be one or more pairs (LLM, GPU) of names")
    for number, pair in enumerate(experts):
        is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not is_pair or not all(isinstance(name, str) for name in pair):
            legal = "a pair (LLM, GPU) of names such as ('alpaca-native', 'A40')"
            raise InputError(f"experts[{number}] is {pair!r}, must be {legal}")
    return tuple((llm, gpu) for llm, gpu in experts)


def _check_llms(preset: Preset, table: QualityTable | None) -> None:
    """Checks that each LLM has a profile and answers; the message offers only those that have both.

    Raises:
      InputError: an LLM has not.
    """
    answers = {"mix-instruct": (MIX_INSTRUCT, "the built-in generator")}
    answered, source = answers.get(preset.content, (LLMS, "")) if table is None else (table.experts, table.source)
    legal = [llm for llm in LLMS if llm in answered]
    for llm, _ in preset.experts:
        if llm not in legal:
            what = f"has no answers in {source}" if llm in LLMS else "is unknown"
            also = "; or give a quality table with its answers" if llm in LLMS and table is None else ""
            raise InputError(f"LLM {llm!r} {what}; choose from {', '.join(legal) or 'another table'}{also}")


def _positive(name: str, value: float, *, or_zero: bool = False) -> float:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool) and np.isfinite(value)
    if not number or value < 0 or (value == 0 and not or_zero):
        raise InputError(f"{name} is {value!r}, must be a finite number {'of at least' if or_zero else 'above'} 0")
    return float(value)


def _numbers(name: str, values: Any) -> list[float]:
    """Returns one or more numbers, given alone or as a sequence."""
    try:
        array = np.asarray(values)
    except ValueError:  # sequences of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "iuf" or array.ndim > 1:
        raise InputError(f"{name} is {values!r}, must be a number or a sequence of numbers")
    return [float(value) for value in np.atleast_1d(array)]


def _check_type(name: str, value: Any, types: Any, legal: str) -> None:
    if not isinstance(value, types):
        raise InputError(f"{name} is {value!r}, must be {legal}")


def _arrivals(process: str | ArrivalProcess) -> ArrivalProcess:
    if isinstance(process, str):
        return parse_arrivals(process, 1.0)
    _check_type("arrivals", process, Arrivals, "an arrival process or the name of one, such as 'poisson'")
    return process


def _prediction(model: str | Predictions) -> Predictions:
    if isinstance(model, str):
        return parse_prediction(model)
    _check_type("prediction", model, Predictions, "a prediction model or the name of one, such as 'realistic'")
    return model


def _with_shared_answers(workload: RequestWorkload, llms: Sequence[str]) -> RequestWorkload:
    """Returns a workload from a table in which experts with one LLM give the same answers."""
    distinct = list(dict.fromkeys(llms))
    if len(distinct) == len(llms):
        return workload
    prediction = workload.prediction
    if isinstance(prediction, TablePredictions):  # which has a column for each expert
        first = np.array([llms.index(llm) for llm in distinct])
        prediction = TablePredictions(prediction.score[:, first], prediction.output_tokens[:, first])
    answers_of = jnp.asarray([distinct.index(llm) for llm in llms], jnp.int32)
    return dataclasses.replace(workload, prediction=prediction, answers_of=answers_of)


def _content(preset: Preset, table: QualityTable | None) -> RequestContent:
    names = [llm for llm, _ in preset.experts]
    weights = preset.latency_limit_weights
    limits = latency_limits(
        _numbers("latency_limit_s", preset.latency_limit_s),
        None if weights is None else _numbers("latency_limit_weights", weights),
    )
    if table is not None:
        return table.select(list(dict.fromkeys(names))).content(limits)
    if preset.content == "mix-instruct":
        return generated_content(names, limits)
    if preset.content == "sharegpt-run":
        return sharegpt_run_content(len(names), limits)
    raise InputError(f"content {preset.content!r} is unknown; choose mix-instruct or sharegpt-run")
