"""Named worlds (presets) and their variations, as plain values; ``qos_jax.worlds.build`` makes environments of them.

A preset is a fleet file in the folder ``fleets``. The file has its saturation rate, as printed by
``python -m experiments.saturation``.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qos_jax.errors import InputError
from qos_jax.fleet.catalogue import LLMS
from qos_jax.fleet.experts import Expert, experts_of
from qos_jax.fleet.fleet_file import CONTENTS, Fleet, Quality, check_prompt_law, load_fleet
from qos_jax.fleet.profiles import check_engine
from qos_jax.io.text_files import shown
from qos_jax.sim.constants import MAX_AGE_S, MAX_HISTORY, MAX_LENGTH, MAX_QUEUE, OBSERVE
from qos_jax.sim.types import BLOCK_SIZE_TOKENS
from qos_jax.sim.validation import check_type, checked_number, checked_whole
from qos_jax.workload.arrivals import file_of_law, parse_arrivals
from qos_jax.workload.constants import MIX_INSTRUCT
from qos_jax.workload.prediction import parse_prediction
from qos_jax.workload.session_law import check_sessions
from qos_jax.worlds.failure_law import check_failures

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

_ENGINE_FIELDS = {"max_running": "max_num_seqs", "max_waiting": "max_waiting", "engine": "kind"}  # of all experts


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
    check_type("quality", preset.quality, Quality, "a Quality, as of qos_jax.fleet.fleet_file")
    checked_number("staleness_s", preset.staleness_s, or_zero=True, highest=MAX_AGE_S)
    _check_observe(preset)
    for field, example in (("sessions", "128:4:4096"), ("failures", "600:30")):
        if (text := getattr(preset, field)) is not None:
            check_type(field, text, str, f"text such as {example}")
            _check_law[field](text)
    check_type("allow_drop", preset.allow_drop, (bool, np.bool_), "True or False")
    return dataclasses.replace(preset, experts=experts)


def _check_observe(preset: Preset) -> None:
    """Checks what a router observes.

    Raises:
      InputError: it is unknown, or the times do not go with it.
    """
    checked_number("scrape_s", preset.scrape_s, or_zero=True, highest=MAX_AGE_S)
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
