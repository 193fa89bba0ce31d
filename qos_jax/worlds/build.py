"""``make``: the environment of a preset or a fleet file, or of a variation of it.

A load is a fraction of the fleet's saturation rate: the rate at which it finishes requests while every expert has some
waiting (``qos_jax.sim.capacity``). That of a variation is simulated when ``make`` needs it for a load.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qos_jax.errors import InputError
from qos_jax.fleet.catalogue import LLMS
from qos_jax.fleet.fleet_file import Fleet
from qos_jax.fleet.profiles import profile_of
from qos_jax.io.text_files import shown
from qos_jax.sim.capacity import saturation_rate
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.validation import check_type, checked_experts, checked_number
from qos_jax.sim.world import WorldSpec
from qos_jax.workload.arrivals import ArrivalProcess, Arrivals, parse_arrivals
from qos_jax.workload.constants import MIX_INSTRUCT, answer_law
from qos_jax.workload.content import (
    GeneratedContent,
    RequestContent,
    generated_content,
    generated_content_of,
    latency_limits,
    sharegpt_run_content,
)
from qos_jax.workload.prediction import Predictions, TablePredictions, parse_prediction
from qos_jax.workload.request_workload import RecordedLengths, RequestWorkload
from qos_jax.workload.session_law import check_sessions, parse_sessions
from qos_jax.workload.tables import QualityTable, read_tables
from qos_jax.worlds.failure_law import parse_failures
from qos_jax.worlds.presets import FURTHER_LIMITS, Preset, preset_named, preset_of, varied

_DEFAULT_LOAD = 0.8
_HISTORY = 64  # snapshots, where metrics are stale
_P90 = 1.2816  # standard normal variate at the 90th percentile


def make(
    name: str | Fleet,
    *,
    load: float | None = None,
    rate_per_s: float | None = None,
    check: bool = False,
    quality_table: QualityTable | None = None,
    arrivals: str | ArrivalProcess | None = None,
    prediction: str | Predictions | None = None,
    lengths: RecordedLengths | None = None,
    **overrides: Any,
) -> tuple[Environment, EnvParams]:
    """Builds the world of a preset or of a fleet file, or a variation of it.

    Args:
      name: one of ``PRESETS``, or what ``load_fleet`` returns.
      load: arrival rate as a fraction of the fleet's saturation rate; 0.8 by default.
      rate_per_s: arrival rate [requests/s], instead of ``load``.
      check: adds invariants to each step, see ``Environment``.
      quality_table: samples requests from this table instead of the built-in generator; it must have the fleet's LLMs.
      arrivals: arrival process, or its name for ``parse_arrivals``; its rate is replaced.
      prediction: prediction model, or its name for ``parse_prediction``.
      lengths: of the prompts and answers behind the gaps of recorded ``arrivals``, instead of those of the content.
      **overrides: other values for the fields of ``Preset``, of which ``experts`` may be pairs of names; and
        ``max_running``, ``max_waiting`` and ``engine`` of all experts.

    Returns:
      The environment and its parameters; ``params.experts`` is the ``ExpertProfile``.

    Raises:
      InputError: a preset or field is unknown, or a value has the wrong type or is out of range.
    """
    base = preset_of(name) if isinstance(name, Fleet) else preset_named(name)
    preset = varied(base, overrides)
    check_type("check", check, (bool, np.bool_), "True or False")
    table = _table(preset, quality_table)
    if lengths is not None:
        if preset.sessions is not None:
            raise InputError(f"sessions is {preset.sessions}, must be None with lengths, which hold contexts already")
        check_type("lengths", lengths, RecordedLengths, "RecordedLengths, as recorded_lengths returns them")
    _check_llms(preset, table)
    profile = checked_experts(profile_of(preset.experts), np.float32)
    spec = _spec(preset, shared_cards=profile.cards is not None)
    env = Environment(spec, expert_names=tuple(expert.name for expert in preset.experts), check=bool(check))
    params = EnvParams(
        experts=jax.tree.map(jnp.asarray, profile),
        workload=_workload(preset, table, arrivals, prediction, lengths),
        max_steps_in_episode=jnp.int32(preset.requests),
        staleness_s=jnp.float32(preset.staleness_s),
        scrape_s=jnp.float32(preset.scrape_s),
        failure_law=None if preset.failures is None else parse_failures(preset.failures, spec.num_experts),
    )
    if rate_per_s is not None:
        if load is not None:
            raise InputError(f"load {load} and rate_per_s {rate_per_s} are both given, must be one of them")
        workload = params.workload.with_rate(checked_number("rate_per_s", rate_per_s))
        params = params.replace(workload=workload)
    else:
        load = checked_number("load", _DEFAULT_LOAD if load is None else load)
        is_own = quality_table is None and lengths is None
        known_per_s = base.saturation_per_s if is_own and _as_fast(preset, base) else None
        params = params.replace(saturation_per_s=saturation_rate(env, params) if known_per_s is None else known_per_s)
        params = params.at_load(load)
    return env.with_default_params(params), params


def _as_fast(preset: Preset, base: Preset) -> bool:
    """Returns whether a variation has the saturation rate of its preset."""
    return all(getattr(preset, field) == getattr(base, field) for field in ("experts", "content", "sessions"))


def _table(preset: Preset, given: QualityTable | None) -> QualityTable | None:
    """Returns the table that requests are sampled from, one that is given or the preset's own."""
    if given is not None:
        check_type("quality_table", given, QualityTable, "a QualityTable, as read_npz returns it")
        return given
    return read_tables(preset.quality.tables, preset.quality.score_column) if preset.quality.tables else None


def _spec(preset: Preset, *, shared_cards: bool) -> WorldSpec:
    """Returns the static shapes and rules of a world.

    Raises:
      InputError: two fields contradict each other.
    """
    if shared_cards and preset.failures is not None:
        raise InputError(f"failures is {preset.failures}, must be None where LLMs share a card")
    history = preset.history
    if history is None:
        history = _HISTORY if preset.staleness_s > 0 else 0
    if preset.staleness_s > 0 and history < 1:
        raise InputError(f"history is {history}, must be at least 1 for staleness_s {preset.staleness_s}")
    return WorldSpec(
        num_experts=len(preset.experts),
        engine=EngineSpec(slots=max(each.engine.max_num_seqs + each.engine.max_waiting for each in preset.experts)),
        allow_drop=bool(preset.allow_drop),
        history=int(history),
        service_limits=any(np.size(getattr(preset, name)) for name in FURTHER_LIMITS),
        observe=preset.observe,
        sessions=0 if preset.sessions is None else check_sessions(preset.sessions)[0],
        failures=preset.failures is not None,
        shared_cards=shared_cards,
    )


def _check_llms(preset: Preset, table: QualityTable | None) -> None:
    """Checks that each LLM has a profile and answers; the message offers only those that have both.

    Raises:
      InputError: an LLM has not.
    """
    answers: dict[str, tuple[Iterable[str], str]] = {
        "mix-instruct": (MIX_INSTRUCT, "the built-in generator"),
        "quality": (preset.quality.mean_score, "quality.mean_score"),
    }
    answered, source = answers.get(preset.content, (LLMS, "")) if table is None else (table.experts, table.source)
    legal = [llm for llm in LLMS if llm in answered]
    for expert in preset.experts:
        if expert.answers not in answered and source:
            also = "; or give a quality table with its answers" if table is None else ""
            raise InputError(
                f"LLM {expert.answers!r} has no answers in {source}; "
                f"choose from {', '.join(legal) or 'another table'}{also}"
            )


def _workload(
    preset: Preset,
    table: QualityTable | None,
    arrivals: str | ArrivalProcess | None,
    prediction: str | Predictions | None,
    lengths: RecordedLengths | None,
) -> RequestWorkload:
    """Returns the requests of a world; what is not given is the preset's."""
    content = _content(preset, table)
    if lengths is not None:
        content = dataclasses.replace(content, **lengths.moments(content.score_mean.shape[-1]))  # type: ignore[type-var]
    workload = RequestWorkload(
        arrivals=_arrivals(preset.arrivals if arrivals is None else arrivals),
        content=content,
        prediction=_prediction(preset.prediction if prediction is None else prediction),
        lengths=lengths,
        sessions=None if preset.sessions is None else parse_sessions(preset.sessions),
    )
    if table is not None or preset.content == "quality":
        return _with_shared_answers(workload, [expert.answers for expert in preset.experts])
    return workload


def _arrivals(process: str | ArrivalProcess) -> ArrivalProcess:
    if isinstance(process, str):
        return parse_arrivals(process, 1.0)
    check_type("arrivals", process, Arrivals, "an arrival process or the name of one, such as 'poisson'")
    return process


def _prediction(model: str | Predictions) -> Predictions:
    if isinstance(model, str):
        return parse_prediction(model)
    check_type("prediction", model, Predictions, "a prediction model or the name of one, such as 'realistic'")
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
    names = [expert.answers for expert in preset.experts]
    weights = preset.latency_limit_weights
    limits = latency_limits(
        _numbers("latency_limit_s", preset.latency_limit_s),
        None if weights is None else _numbers("latency_limit_weights", weights),
        **{name.replace("_limit_", "_"): _numbers(name, getattr(preset, name)) for name in FURTHER_LIMITS},
    )
    if table is not None:
        return table.select(list(dict.fromkeys(names))).content(limits)
    if preset.content == "mix-instruct":
        return _with_lengths(generated_content(names, limits), preset)
    if preset.content == "sharegpt-run":
        return sharegpt_run_content(len(names), limits)
    quality = preset.quality
    laws = [answer_law(quality.mean_score[name], quality.mean_output_tokens.get(name)) for name in dict.fromkeys(names)]
    return _with_lengths(generated_content_of(laws, limits), preset)


def _with_lengths(content: GeneratedContent, preset: Preset) -> GeneratedContent:
    """Returns contents with the preset's lengths of prompts and its caps."""
    fields: dict[str, Any] = {
        name: jnp.asarray(value, float)
        for name in ("max_prompt_tokens", "max_output_tokens")
        if (value := getattr(preset, name)) is not None
    }
    if preset.prompt_tokens_median is not None and preset.prompt_tokens_p90 is not None:
        spread = math.log(preset.prompt_tokens_p90 / preset.prompt_tokens_median) / _P90
        fields["log_prompt_tokens"] = jnp.asarray([math.log(preset.prompt_tokens_median), spread, 0.0], float)
    return content.replace(**fields)  # type: ignore[attr-defined]


def _numbers(name: str, values: Any) -> list[float]:
    """Returns one or more numbers, given alone or as a sequence."""
    try:
        array = np.asarray(values)
    except ValueError:  # sequences of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "iuf" or array.ndim > 1:
        raise InputError(f"{name} is {shown(values)}, must be a number or a sequence of numbers")
    return [float(value) for value in np.atleast_1d(array)]
