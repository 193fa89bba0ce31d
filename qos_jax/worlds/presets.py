"""Named worlds (presets), and ``make``, which builds a preset or a variation of it.

A load is a fraction of the fleet's saturation rate: the rate at which it finishes requests while every expert has some
waiting (``qos_jax.sim.capacity``). A preset is a fleet file in the folder ``fleets``. The file has its saturation rate,
as printed by ``python -m experiments.saturation``; that of a variation is simulated when ``make`` needs it for a load.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qos_jax.errors import InputError
from qos_jax.fleet.catalogue import LLMS
from qos_jax.fleet.experts import Expert, experts_of
from qos_jax.fleet.fleet_file import CONTENTS, Fleet, Quality, check_prompt_law, load_fleet
from qos_jax.fleet.profiles import check_engine, profile_of
from qos_jax.io.text_files import number_or_nan, shown
from qos_jax.sim.capacity import saturation_rate
from qos_jax.sim.constants import MAX_AGE_S, MAX_HISTORY, MAX_LENGTH, MAX_QUEUE, OBSERVE
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.types import BLOCK_SIZE_TOKENS
from qos_jax.sim.validation import checked_experts, checked_whole
from qos_jax.sim.world import WorldSpec
from qos_jax.workload.arrivals import ArrivalProcess, Arrivals, file_of_law, parse_arrivals
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
from qos_jax.worlds.failure_law import check_failures, parse_failures

Pair = tuple[str, str]  # names of an LLM and of a device


@dataclasses.dataclass(frozen=True)
class Preset:
    """The fields of a world; ``make`` takes other values for all of them but ``saturation_per_s``."""

    experts: tuple[Expert, ...]
    saturation_per_s: float | None  # requests/s, of the preset without other values; None: not measured yet
    latency_limit_s: float | tuple[float, ...] = 0.03  # s/token, of one class of users or of several; () is no limit
    ttft_limit_s: float | tuple[float, ...] = ()  # s from arrival to first token
    tpot_limit_s: float | tuple[float, ...] = ()  # s per token after the first
    e2e_limit_s: float | tuple[float, ...] = ()  # s from arrival to last token
    latency_limit_weights: tuple[float, ...] | None = None  # relative frequency of each class; equal by default
    arrivals: str = "poisson"
    prediction: str = "realistic"
    allow_drop: bool = True  # the router may drop a request
    staleness_s: float = 0.0  # s, minimum age of the metrics that a router observes
    observe: str = "engine"  # what a router observes: all that an engine knows, or what a proxy in front of it does
    scrape_s: float = 0.0  # s between two readings of the engines' metrics by a proxy
    sessions: str | None = None  # conversations to which the requests belong, see ``parse_sessions``
    failures: str | None = None  # how experts fail, see ``parse_failures``
    history: int | None = None  # snapshots kept for stale metrics, one per arrival; 64 by default
    requests: int = 5000  # of an episode
    content: str = "mix-instruct"  # distribution of contents, of ``fleet_file.CONTENTS``
    prompt_tokens_median: float | None = None  # of generated prompts; None: as in mix-instruct, as for the next three
    prompt_tokens_p90: float | None = None
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    quality: Quality = dataclasses.field(default_factory=Quality)  # of the LLMs, for the content ``quality``

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """LLM and device of each expert."""
        return tuple((expert.llm_name, expert.device_name) for expert in self.experts)

    @property
    def engine(self) -> str | None:
        """The engine of all experts; None if they run different ones."""
        kinds = {expert.engine.kind for expert in self.experts}
        return kinds.pop() if len(kinds) == 1 else None


def preset_of(fleet: Fleet) -> Preset:
    """Returns the world that a fleet file describes.

    Raises:
      InputError: its law of arrivals, its prediction, or its law of sessions or failures is unknown.
    """
    law = fleet.workload.arrivals
    if law is not None and (file := file_of_law(law)) is not None:  # which lies beside the fleet file
        law = law.replace(file, str(pathlib.Path(fleet.path).parent / file))
        fleet = dataclasses.replace(fleet, workload=dataclasses.replace(fleet.workload, arrivals=law))
    for field in _check_law:
        if (text := getattr(fleet.workload, field)) is not None:
            try:
                _check_law[field](text)
            except InputError as error:
                raise InputError(f"{fleet.path}: workload.{field}: {error}") from error
    return _unchecked(fleet)


def _unchecked(fleet: Fleet) -> Preset:
    limits = fleet.limits
    given = {
        field.name: value
        for field in dataclasses.fields(fleet.workload)
        if (value := getattr(fleet.workload, field.name)) is not None
    }
    return Preset(
        experts=fleet.experts,
        latency_limit_s=_alone(limits.latency_s_per_token),
        ttft_limit_s=_alone(limits.ttft_s),
        tpot_limit_s=_alone(limits.tpot_s),
        e2e_limit_s=_alone(limits.e2e_s),
        latency_limit_weights=limits.shares,
        quality=fleet.quality,
        **({"saturation_per_s": None} | given),
    )


def _alone(values: tuple[float, ...]) -> float | tuple[float, ...]:
    """Returns the limit of one class of users as a number."""
    return values[0] if len(values) == 1 else values


_check_law: dict[str, Callable[[str], Any]] = {
    "arrivals": lambda text: parse_arrivals(text, 1.0),
    "prediction": parse_prediction,
    "sessions": check_sessions,
    "failures": check_failures,
}

_FOLDER = pathlib.Path(__file__).with_name("fleets")
_NAMES = ("paper-3", "paper-6", "edge-8", "edge-64", "golden-rtx4090", "jetson-4", "edge-2026", "campus-16")

PRESETS = {name: _unchecked(load_fleet(_FOLDER / f"{name}.toml")) for name in _NAMES}
"""The shipped fleet files, by name. Laws are not checked here: that would start JAX when this module is imported."""

FURTHER_LIMITS = ("ttft_limit_s", "tpot_limit_s", "e2e_limit_s")  # fields, beside that on the latency per token

_DEFAULT_LOAD = 0.8
_P90 = 1.2816  # standard normal variate at the 90th percentile
_ENGINE_FIELDS = {"max_running": "max_num_seqs", "max_waiting": "max_waiting", "engine": "kind"}  # of all experts


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
    _check_type("check", check, (bool, np.bool_), "True or False")
    own_table = quality_table is None
    if own_table and preset.quality.tables:
        quality_table = read_tables(preset.quality.tables, preset.quality.score_column)
    if quality_table is not None:
        _check_type("quality_table", quality_table, QualityTable, "a QualityTable, as read_npz returns it")
    if lengths is not None:
        if preset.sessions is not None:
            raise InputError(f"sessions is {preset.sessions}, must be None with lengths, which hold contexts already")
        _check_type("lengths", lengths, RecordedLengths, "RecordedLengths, as recorded_lengths returns them")
    _check_llms(preset, quality_table)
    profile = checked_experts(profile_of(preset.experts), np.float32)
    if profile.cards is not None and preset.failures is not None:
        raise InputError(f"failures is {preset.failures}, must be None where LLMs share a card")
    history = preset.history
    if history is None:
        history = 0 if preset.staleness_s == 0 else 64
    if preset.staleness_s > 0 and history < 1:
        raise InputError(f"history is {history}, must be at least 1 for staleness_s {preset.staleness_s}")
    spec = WorldSpec(
        num_experts=len(preset.experts),
        engine=EngineSpec(slots=max(each.engine.max_num_seqs + each.engine.max_waiting for each in preset.experts)),
        allow_drop=bool(preset.allow_drop),
        history=int(history),
        service_limits=any(np.size(getattr(preset, name)) for name in FURTHER_LIMITS),
        observe=preset.observe,
        sessions=0 if preset.sessions is None else check_sessions(preset.sessions)[0],
        failures=preset.failures is not None,
        shared_cards=profile.cards is not None,
    )
    env = Environment(spec, expert_names=tuple(expert.name for expert in preset.experts), check=bool(check))
    content = _content(preset, quality_table)
    if lengths is not None:
        content = dataclasses.replace(content, **lengths.moments(content.score_mean.shape[-1]))  # type: ignore[type-var]
    workload = RequestWorkload(
        arrivals=_arrivals(preset.arrivals if arrivals is None else arrivals),
        content=content,
        prediction=_prediction(preset.prediction if prediction is None else prediction),
        lengths=lengths,
        sessions=None if preset.sessions is None else parse_sessions(preset.sessions),
    )
    if quality_table is not None or preset.content == "quality":
        workload = _with_shared_answers(workload, [expert.answers for expert in preset.experts])
    params = EnvParams(
        experts=jax.tree.map(jnp.asarray, profile),
        workload=workload,
        max_steps_in_episode=jnp.int32(preset.requests),
        staleness_s=jnp.float32(preset.staleness_s),
        scrape_s=jnp.float32(preset.scrape_s),
        failure_law=None if preset.failures is None else parse_failures(preset.failures, spec.num_experts),
    )
    if rate_per_s is not None:
        if load is not None:
            raise InputError(f"load {load} and rate_per_s {rate_per_s} are both given, must be one of them")
        params = params.replace(workload=workload.with_rate(_checked_number("rate_per_s", rate_per_s)))
    else:
        load = _checked_number("load", _DEFAULT_LOAD if load is None else load)
        deciding = "experts", "content", "sessions"
        unchanged = all(getattr(preset, field) == getattr(base, field) for field in deciding)
        same = own_table and lengths is None and unchanged
        known_per_s = base.saturation_per_s if same else None
        params = params.replace(saturation_per_s=saturation_rate(env, params) if known_per_s is None else known_per_s)
        params = params.at_load(load)
    return env.with_default_params(params), params


def preset_named(name: str) -> Preset:
    """Returns the preset with this name.

    Raises:
      InputError: the name is unknown.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown; choose from {', '.join(PRESETS)}")
    return PRESETS[name]


def varied(base: Preset, overrides: dict[str, Any]) -> Preset:
    """Returns a preset with other values for some fields, all of them checked; see ``make``."""
    fields = {field.name for field in dataclasses.fields(Preset)} - {"saturation_per_s"} | set(_ENGINE_FIELDS)
    unknown = sorted(set(overrides) - fields)
    if unknown:
        raise InputError(f"preset field {unknown[0]!r} is unknown; choose from {', '.join(sorted(fields))}")
    if "latency_limit_s" in overrides:
        overrides = {"latency_limit_weights": None} | overrides
    own = {field: value for field, value in overrides.items() if field not in _ENGINE_FIELDS}
    preset = dataclasses.replace(base, **own)
    experts = _experts(base, preset.experts)
    for field, name in _ENGINE_FIELDS.items():
        if field in overrides:
            check_engine(overrides[field]) if field == "engine" else checked_whole(
                field, overrides[field], 1, MAX_QUEUE
            )
            settings = {name: overrides[field] if field == "engine" else int(overrides[field])}
            experts = tuple(_with_settings(expert, settings) for expert in experts)
    checked_whole("requests", preset.requests, 1)
    if preset.history is not None:
        checked_whole("history", preset.history, 0, MAX_HISTORY)
    for field in ("max_prompt_tokens", "max_output_tokens"):
        if getattr(preset, field) is not None:
            checked_whole(field, getattr(preset, field), 1, MAX_LENGTH)
    check_prompt_law(preset.prompt_tokens_median, preset.prompt_tokens_p90)
    if preset.content not in CONTENTS:
        raise InputError(f"content {shown(preset.content)} is unknown; choose from {', '.join(CONTENTS)}")
    _check_type("quality", preset.quality, Quality, "a Quality, as of qos_jax.fleet.fleet_file")
    _checked_number("staleness_s", preset.staleness_s, or_zero=True, highest=MAX_AGE_S)
    _check_observe(preset)
    for field, example in (("sessions", "128:4:4096"), ("failures", "600:30")):
        if (text := getattr(preset, field)) is not None:
            _check_type(field, text, str, f"text such as {example}")
            _check_law[field](text)
    _check_type("allow_drop", preset.allow_drop, (bool, np.bool_), "True or False")
    return dataclasses.replace(preset, experts=experts)


def _check_observe(preset: Preset) -> None:
    """Checks what a router observes.

    Raises:
      InputError: it is unknown, or the times do not go with it.
    """
    _checked_number("scrape_s", preset.scrape_s, or_zero=True, highest=MAX_AGE_S)
    if preset.observe not in OBSERVE:
        raise InputError(f"observe is {preset.observe!r}, must be one of {', '.join(OBSERVE)}")
    if preset.observe == "engine" and preset.scrape_s > 0:
        raise InputError(f"scrape_s is {preset.scrape_s}, must be 0 where observe is engine: give staleness_s")
    if preset.observe == "proxy" and preset.staleness_s > 0:
        raise InputError(f"staleness_s is {preset.staleness_s}, must be 0 where observe is proxy: give scrape_s")


def _with_settings(expert: Expert, settings: dict[str, Any]) -> Expert:
    """Returns an expert with other settings of its engine; another kind brings its own switches and token budget."""
    if "kind" in settings:
        settings = settings | dict.fromkeys(("token_budget", "prefix_cache", "async_scheduling"))
    return dataclasses.replace(expert, engine=dataclasses.replace(expert.engine, **settings))


def _experts(base: Preset, experts: Any) -> tuple[Expert, ...]:
    """Returns experts, which may be given as pairs of names; these get the engine of the preset's first expert."""
    if isinstance(experts, str) or not isinstance(experts, Sequence) or not experts:
        raise InputError(f"experts is {experts!r}, must be one or more pairs (LLM, GPU) of names")
    found = []
    settings = dataclasses.replace(base.experts[0].engine, kv_blocks=None)
    for number, each in enumerate(experts):
        if isinstance(each, Expert):
            found.append(each)
            continue
        is_pair = isinstance(each, Sequence) and not isinstance(each, str) and len(each) == 2
        if not is_pair or not all(isinstance(name, str) for name in each):
            legal = "a pair (LLM, GPU) of names such as ('alpaca-native', 'A40')"
            raise InputError(f"experts[{number}] is {each!r}, must be {legal}")
        if (llm := each[0].partition(":")[0]) not in LLMS:
            answered = ", ".join(name for name in LLMS if name in MIX_INSTRUCT)
            raise InputError(
                f"LLM {llm!r} is unknown; the built-in generator has answers of {answered}; for a quality table or a "
                "fleet file with quality.mean_score, qos-jax fleet catalogue lists all LLMs"
            )
        found.append(dataclasses.replace(experts_of([tuple(each)])[0], engine=settings))
    for expert in found:
        if expert.engine.block_size != BLOCK_SIZE_TOKENS:
            legal = f"{BLOCK_SIZE_TOKENS}, the only one that is simulated"
            raise InputError(f"{expert.name}: engine.block_size is {expert.engine.block_size}, must be {legal}")
    return tuple(found)


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


def _checked_number(name: str, value: Any, *, or_zero: bool = False, highest: float = math.inf) -> float:
    """Returns a finite number above 0, or from 0 on, and up to ``highest``."""
    number = number_or_nan(value.item() if isinstance(value, np.number) else value)
    if not 0 <= number <= highest or (number == 0 and not or_zero):
        legal = f"a finite number {'of at least' if or_zero else 'above'} 0"
        legal += f" and at most {highest:g}" if highest < math.inf else ""
        raise InputError(f"{name} is {shown(value)}, must be {legal}")
    return number


def _numbers(name: str, values: Any) -> list[float]:
    """Returns one or more numbers, given alone or as a sequence."""
    try:
        array = np.asarray(values)
    except ValueError:  # sequences of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "iuf" or array.ndim > 1:
        raise InputError(f"{name} is {shown(values)}, must be a number or a sequence of numbers")
    return [float(value) for value in np.atleast_1d(array)]


def _check_type(name: str, value: Any, types: Any, legal: str) -> None:
    if not isinstance(value, types):
        raise InputError(f"{name} is {shown(value)}, must be {legal}")


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
