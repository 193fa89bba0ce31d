"""A fleet as a TOML file: its experts, the limits of its users, the quality of its answers, and its requests.

    format = 1
    name = "two boards"

    [limits]
    latency_ms_per_token = 60

    [quality]
    mean_score = { "qwen3-8b" = 0.71, "qwen3-1.7b" = 0.58 }

    [[experts]]
    llm = "qwen3-8b:int4"
    device = "Jetson AGX Orin 64GB"
    engine = { kind = "vllm", max_num_seqs = 16 }

    [[experts]]
    llm = { config = "config.json", bits = 4.16 }
    device = { name = "my card", memory_gb = 15.8, bandwidth_gb_per_s = 432, fp16_tflops = 90, busy_w = 200 }
    count = 2

Every error names the file, the field, its value and what is legal. Nothing here imports JAX.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from qos_jax.errors import InputError
from qos_jax.fleet import catalogue
from qos_jax.fleet.catalogue import DEVICES, FORMATS, TENSOR_FORMATS, Device, Llm
from qos_jax.fleet.engines import KINDS, EngineSettings
from qos_jax.fleet.experts import Expert
from qos_jax.io.text_files import number_or_nan, shown
from qos_jax.io.toml_file import Section, read_toml
from qos_jax.sim.constants import MAX_AGE_S, MAX_HISTORY, MAX_LENGTH, MAX_QUEUE, OBSERVE

FORMAT = 1
MAX_EXPERTS = 64
MAX_LOAD_S = 1e4  # s to load an LLM
CONTENTS = ("mix-instruct", "sharegpt-run", "quality")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of C classes of users; () where no class has a limit of that kind, infinity where one has none."""

    latency_s_per_token: tuple[float, ...] = (0.03,)  # [C] s/token, mean over the answer
    ttft_s: tuple[float, ...] = ()  # [C] s from arrival to first token
    tpot_s: tuple[float, ...] = ()  # [C] s per token after the first
    e2e_s: tuple[float, ...] = ()  # [C] s from arrival to last token
    shares: tuple[float, ...] | None = None  # [C] relative frequency; equal by default
    names: tuple[str, ...] = ()  # [C] of the classes, if they have names


@dataclasses.dataclass(frozen=True)
class Quality:
    """What is known of the answers, by ``Expert.answers``."""

    mean_score: dict[str, float] = dataclasses.field(default_factory=dict)  # in [0, 1)
    mean_output_tokens: dict[str, float] = dataclasses.field(default_factory=dict)
    tables: tuple[str, ...] = ()  # files of quality tables, instead
    score_column: str | None = None


@dataclasses.dataclass(frozen=True)
class Workload:
    """The requests; None takes the default of ``worlds.presets.Preset``."""

    content: str | None = None  # of CONTENTS
    arrivals: str | None = None
    prediction: str | None = None
    sessions: str | None = None
    failures: str | None = None
    staleness_s: float | None = None
    observe: str | None = None  # engine or proxy
    scrape_s: float | None = None
    history: int | None = None
    allow_drop: bool | None = None
    requests: int | None = None
    prompt_tokens_median: float | None = None  # of generated prompts, whose lengths are lognormal, as for the next
    prompt_tokens_p90: float | None = None
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None  # where answers are cut off
    saturation_per_s: float | None = None  # requests/s, as measured of this file; simulated without it


@dataclasses.dataclass(frozen=True)
class Fleet:
    """A fleet file, checked."""

    name: str
    path: str
    experts: tuple[Expert, ...]  # N, one for each replica
    tables: tuple[int, ...]  # [N] which table [[experts]] of the file each comes from
    limits: Limits = Limits()
    quality: Quality = dataclasses.field(default_factory=Quality)
    workload: Workload = Workload()


def load_fleet(path: str | os.PathLike[str]) -> Fleet:
    """Reads and checks a fleet file.

    Files that it names are beside it, unless their path is absolute.

    Raises:
      InputError: the file, or one that it names, cannot be read, or a field is missing, unknown or not legal.
    """
    top = read_toml(path)
    version = top.required(top.value("format"), "format")
    if version != FORMAT or isinstance(version, bool):
        raise top.error("format", version, str(FORMAT))
    name = top.text("name", pathlib.Path(path).stem)
    shared, copies = _engine(top.section("engine"), EngineSettings()), top.whole("copies", 1, high=MAX_EXPERTS)
    limits, quality = _limits(top.section("limits")), _quality(top.section("quality"))
    workload = _workload(top.section("workload"), quality)
    rows = top.sections("experts")
    if not rows:
        raise InputError(f"{path}: experts is missing, must be one or more tables [[experts]]")
    top.done()
    _check_labels(rows)
    found = [(table, expert) for table, row in enumerate(rows) for expert in _replicas(row, shared)]
    _check_cards(rows, found)
    found = [(table, _of_copy(expert, copy)) for copy in range(copies) for table, expert in found]
    tables, experts = zip(*found, strict=True)
    if len(experts) > MAX_EXPERTS:
        raise InputError(f"{path}: experts are {len(experts)} with all replicas, must be at most {MAX_EXPERTS}")
    return Fleet(name, str(path), tuple(_numbered(path, experts)), tables, limits, quality, workload)


def _check_labels(rows: list[Section]) -> None:
    labels: dict[str, str] = {}
    for row in rows:
        if (label := row.text("name")) is not None:
            if label in labels:
                raise row.error("name", label, f"another one than that of {labels[label]}")
            labels[label] = row.place


def _check_cards(rows: list[Section], found: list[tuple[int, Expert]]) -> None:
    """Checks that the LLMs of a card are on one device."""
    first: dict[str, Expert] = {}
    for table, expert in found:
        if expert.card is not None:
            other = first.setdefault(expert.card, expert)
            if expert.device != other.device:
                legal = f"another card, as that of {other.name} is a {other.device_name}"
                raise rows[table].error("card", expert.card, legal)


def _of_copy(expert: Expert, copy: int) -> Expert:
    """Returns the expert in a copy of the fleet, which has cards of its own."""
    return expert if copy == 0 or expert.card is None else dataclasses.replace(expert, card=f"{expert.card}-{copy + 1}")


def _replicas(row: Section, shared: EngineSettings) -> list[Expert]:
    """Returns the experts of one table, one for each replica."""
    engine, count = _engine(row.section("engine"), shared), row.whole("count", 1, high=MAX_EXPERTS)
    llm_name, llm = _llm(row)
    device_name, device, profile = _device(row)
    if "url" in row and isinstance(row.value("url"), list):
        urls = row.value("url")
        if len(urls) != count or not all(isinstance(url, str) and url for url in urls):
            raise row.error("url", urls, f"one text, or a list of {count} of them, one for each replica")
    else:
        urls = [row.text("url")] * count
    expert = Expert(
        llm_name=llm_name,
        device_name=device_name,
        llm=llm,
        device=device,
        engine=engine,
        label=row.text("name"),
        model=row.text("model"),
        api_key_env=row.text("api_key_env"),
        answers_of=row.text("answers"),
        link_delay_s=row.number("link_delay_s", 0.0, high=1e3),
        profile=profile,
        card=row.text("card"),
        load_s=row.number("load_s", 0.0, high=MAX_LOAD_S),
    )
    if expert.card is None and "load_s" in row:
        raise row.error("load_s", expert.load_s, "left out: the expert has no card that it shares")
    if expert.card is not None:
        row.required(row.value("load_s"), "load_s")
        if count != 1:
            raise row.error("count", count, "1: an expert with a card is not several")
    row.done()
    try:
        _ = expert.kv_blocks, expert.timing()  # fits its device, and its profile can be read
    except InputError as error:
        raise InputError(f"{row.file}: {row.place}: {error}") from error
    return [dataclasses.replace(expert, url=url) for url in urls]


def _numbered(path: str | os.PathLike[str], experts: Sequence[Expert]) -> list[Expert]:
    """Returns the experts with a number behind the names of replicas, so that names differ."""
    seen: dict[str, int] = {}
    numbered = []
    for expert in experts:
        if expert.label is not None:
            seen[expert.label] = number = seen.get(expert.label, 0) + 1
            expert = expert if number == 1 else dataclasses.replace(expert, label=f"{expert.label}-{number}")
        numbered.append(expert)
    labels = [expert.label for expert in numbered if expert.label is not None]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise InputError(f"{path}: experts have the name {twice[0]!r} twice, must have different ones")
    return numbered


def _engine(section: Section, shared: EngineSettings) -> EngineSettings:
    """Returns the settings of a table, and those of all experts for what it leaves out."""
    found = EngineSettings(
        kind=section.text("kind", shared.kind, legal=tuple(KINDS)),
        max_num_seqs=section.whole("max_num_seqs", shared.max_num_seqs, high=MAX_QUEUE),
        max_waiting=section.whole("max_waiting", shared.max_waiting, high=MAX_QUEUE),
        token_budget=section.whole("token_budget", shared.token_budget, high=2**24),
        block_size=section.whole("block_size", shared.block_size, high=1024),
        memory_share=section.number("memory_share", shared.memory_share, high=1.0, above=True),
        kv_blocks=section.whole("kv_blocks", shared.kv_blocks),
        prefix_cache=section.switch("prefix_cache", shared.prefix_cache),
        async_scheduling=section.switch("async_scheduling", shared.async_scheduling),
    )
    section.done()
    return found


def _llm(row: Section) -> tuple[str, Llm]:
    """Returns the LLM of an expert and its name."""
    value = row.required(row.value("llm"), "llm")
    if isinstance(value, str):
        try:
            return value, catalogue.llm_named(value)
        except InputError as error:
            raise InputError(f"{row.file}: {row.place}.llm: {error}") from error
    section = row.section("llm")
    format, bits = section.text("format", legal=tuple(FORMATS)), section.number("bits", low=1.0, high=16.0)
    if bits is not None or format is not None:
        format = format or ("fp16" if bits and bits > 12 else "fp8" if bits and bits > 6 else "int4")
    name = section.text("name")
    if "config" in section:
        path = _beside(row.file, section.required(section.text("config"), "config"))
        llm, name = catalogue.read_config(path), name or pathlib.Path(path).parent.name or "llm"
    elif "weights_gb" in section:
        llm, name = _llm_by_numbers(section), section.required(name, "name")
    else:
        try:
            llm = catalogue.llm_named(str(section.required(name, "name")))
        except InputError as error:
            raise InputError(f"{row.file}: {section.place}: {error}; or give config or weights_gb") from error
    section.done()
    if format is not None and format != "fp16":
        if llm.format != "fp16":
            raise section.error("format", format, f"left out: {name} names one")
        llm, name = llm.quantised(format, bits), f"{name}:{format}"
    return str(name), llm


def _llm_by_numbers(section: Section) -> Llm:
    """Returns an LLM whose sizes in 16 bit are given."""
    need = section.required
    return Llm(
        weights_gb=need(section.number("weights_gb", above=True), "weights_gb"),
        matrix_params=need(section.number("matrix_params_billion", above=True), "matrix_params_billion"),
        kv_bytes_per_token=need(section.number("kv_bytes_per_token", above=True), "kv_bytes_per_token"),
        layers=need(section.whole("layers", high=1000), "layers"),
        attention_size=need(section.whole("attention_size", high=10**6), "attention_size"),
        head_params=section.number("head_params_billion", 0.0),
        source=section.file,
    )


def _device(row: Section) -> tuple[str, Device, str | None]:
    """Returns the name of an expert's device, the device, and the file of its measured profile, if it has one."""
    value = row.required(row.value("device"), "device")
    if isinstance(value, str):
        if value not in DEVICES:
            raise row.error("device", value, f"a table, or one of {', '.join(DEVICES)}")
        return value, DEVICES[value], None
    section, profile = row.section("device"), None
    name = section.text("name")
    known = DEVICES.get(name or "")
    if "profile" in section:
        profile = _beside(row.file, section.required(section.text("profile"), "profile"))
        name = name or pathlib.Path(profile).stem
    name = str(section.required(name, "name"))
    given = {
        field: section.number(field, above=field == "memory_gb")
        for field in ("memory_gb", "idle_w", "busy_w", "standby_w", "standby_s")
    }
    sheet = {field: section.number(field, above=True) for field in ("bandwidth_gb_per_s", *_TFLOPS.values())}
    section.done()
    if known is not None:
        changed: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
        if any(value is not None for value in sheet.values()):
            field = next(field for field, value in sheet.items() if value is not None)
            raise section.error(field, sheet[field], f"left out: {name} is in the catalogue")
        return name, dataclasses.replace(known, **changed), profile
    needed = () if profile else ("bandwidth_gb_per_s", "fp16_tflops")
    for field in ("memory_gb", *needed):
        section.required((given | sheet)[field], field)
    return name, _device_of_sheet(given, sheet, row.file), profile


_TFLOPS = {format: f"{format}_tflops" for format in TENSOR_FORMATS}


def _device_of_sheet(given: dict[str, float | None], sheet: dict[str, float | None], source: str) -> Device:
    """Returns the device of a data sheet; one with a measured profile needs no rates."""
    busy_w = given["busy_w"] or 0.0
    idle_w = given["idle_w"]
    return Device(
        memory_gb=given["memory_gb"] or 0.0,
        bandwidth_gb_per_s=sheet["bandwidth_gb_per_s"] or 0.0,
        tflops={format: value for format, field in _TFLOPS.items() if (value := sheet[field]) is not None},
        idle_w=catalogue.IDLE_SHARE * busy_w if idle_w is None else idle_w,
        busy_w=busy_w,
        standby_w=given["standby_w"] or 0.0,
        standby_s=given["standby_s"] or 0.0,
        source=source,
    )


_LIMITS = {  # field of the file -> field of ``Limits``
    "latency_ms_per_token": "latency_s_per_token",
    "ttft_ms": "ttft_s",
    "tpot_ms": "tpot_s",
    "e2e_ms": "e2e_s",
}


def _limits(section: Section) -> Limits:
    classes = section.sections("classes")
    for field in _LIMITS:
        if classes and field in section:
            raise section.error(field, section.value(field), "left out: classes have limits of their own")
    of_all = _limits_of(section)
    section.done()
    if not classes:
        given: dict[str, Any] = {field: (value,) for field, value in of_all.items()}
        return Limits(**({"latency_s_per_token": ()} | given)) if given else Limits()
    limits, shares, names = [], [], []
    for index, each in enumerate(classes):
        names.append(each.text("name", f"class {index}"))
        if not (found := _limits_of(each)):
            raise InputError(f"{each.file}: {each.place} has no limit, must have one of {', '.join(_LIMITS)}")
        limits.append(found)
        shares.append(each.number("share", 1.0, above=True))
        each.done()
    by_field = {
        field: tuple(found.get(field, math.inf) for found in limits) if any(field in found for found in limits) else ()
        for field in _LIMITS.values()
    }
    return Limits(**by_field, shares=tuple(shares), names=tuple(names))


def _limits_of(section: Section) -> dict[str, float]:
    """Returns the limits [s] that a table has, by field of ``Limits``."""
    given = {field: section.number(name, above=True) for name, field in _LIMITS.items()}
    return {field: value / 1e3 for field, value in given.items() if value is not None}


def _quality(section: Section) -> Quality:
    scores, tokens = section.section("mean_score"), section.section("mean_output_tokens")
    mean_score = scores.numbers()
    for name, score in mean_score.items():
        if not 0.0 <= score < 1.0:
            raise scores.error(name, score, "a number of at least 0 and below 1")
    mean_tokens = tokens.numbers()
    for name, mean in mean_tokens.items():
        if not mean >= 1.0:
            raise tokens.error(name, mean, "a number of at least 1")
        if name not in mean_score:
            raise InputError(f"{section.file}: {tokens.place}.{name} has no {scores.place}.{name}")
    tables = section.texts("table")
    if tables and mean_score:
        raise section.error("table", tables[0], "left out where mean_score is given")
    beside = tuple(_beside(section.file, table) for table in tables)
    quality = Quality(mean_score, mean_tokens, beside, section.text("score_column"))
    section.done()
    return quality


def _workload(section: Section, quality: Quality) -> Workload:
    workload = Workload(
        content=section.text("content", "quality" if quality.mean_score else None, legal=CONTENTS),
        arrivals=section.text("arrivals"),
        prediction=section.text("prediction"),
        sessions=section.text("sessions"),
        failures=section.text("failures"),
        staleness_s=section.number("staleness_s", high=MAX_AGE_S),
        observe=section.text("observe", legal=OBSERVE),
        scrape_s=section.number("scrape_s", high=MAX_AGE_S),
        history=section.whole("history", low=0, high=MAX_HISTORY),
        allow_drop=section.switch("allow_drop"),
        requests=section.whole("requests"),
        prompt_tokens_median=section.number("prompt_tokens_median", low=1.0),
        prompt_tokens_p90=section.number("prompt_tokens_p90", low=1.0),
        max_prompt_tokens=section.whole("max_prompt_tokens", high=MAX_LENGTH),
        max_output_tokens=section.whole("max_output_tokens", high=MAX_LENGTH),
        saturation_per_s=section.number("saturation_per_s", above=True),
    )
    section.done()
    place = f"{section.file}: {section.place}."
    check_prompt_law(workload.prompt_tokens_median, workload.prompt_tokens_p90, place)
    if (workload.content == "quality") != bool(quality.mean_score):
        raise section.error("content", workload.content, "quality where quality.mean_score is given, and only there")
    return workload


def check_prompt_law(median: float | None, p90: float | None, place: str = "") -> None:
    """Checks the median and the 90th percentile of generated prompts, tokens; the place of both is for messages.

    Raises:
      InputError: one is given alone or is no number of at least 1, or the percentile is not above the median.
    """
    values = {"prompt_tokens_median": median, "prompt_tokens_p90": p90}
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == 1:
        raise InputError(f"{place}{missing[0]} is missing, must be given with the other")
    for name, value in values.items():
        if value is not None and not number_or_nan(value) >= 1.0:
            raise InputError(f"{place}{name} is {shown(value)}, must be a finite number of at least 1")
    if median is not None and p90 is not None and p90 <= median:
        raise InputError(f"{place}prompt_tokens_p90 is {p90}, must be above the median, {median:g}")


def _beside(file: str, path: str) -> str:
    """Returns a path that is relative to the folder of a file."""
    return str(pathlib.Path(file).parent / path)
