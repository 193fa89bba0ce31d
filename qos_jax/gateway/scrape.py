"""Reading the load of engines from their own metrics: vLLM, SGLang and llama.cpp."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from qos_jax.io.text_files import shown
from qos_jax.sim.validation import MAX_COUNT

_SLOT_TOKENS = ("n_past", "n_prompt_tokens")
MAX_BYTES = 4 * 2**20  # of a page of metrics


@dataclasses.dataclass(frozen=True)
class Load:
    """The load of one engine; None where it does not say."""

    running: int  # requests
    waiting: int
    kv_share: float | None = None  # of its KV memory, in [0, 1]
    kv_tokens: int | None = None  # tokens that its KV memory holds


@dataclasses.dataclass(frozen=True)
class _Names:
    """Names of the metrics of one kind of engine; the first that is there counts."""

    running: str
    waiting: str
    kv_share: tuple[str, ...] = ()
    capacity: str | None = None  # whose labels hold the size of a block and the number of blocks
    block_size: str = ""
    num_blocks: str = ""


_NAMES = {
    "vllm": _Names(
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        "vllm:cache_config_info",
        "block_size",
        "num_gpu_blocks",
    ),
    "sglang": _Names(
        "sglang:num_running_reqs",
        "sglang:num_queue_reqs",
        ("sglang:token_usage",),
        "sglang:cache_config_info",
        "page_size",
        "num_pages",
    ),
    "llama.cpp": _Names("llamacpp:requests_processing", "llamacpp:requests_deferred"),
}
_NAMES["vllm-sync"] = _NAMES["vllm"]
KINDS = tuple(_NAMES)


def read_load(kind: str, page: str) -> Load:
    """Returns the load that a page of Prometheus metrics tells; several replicas behind it are added up.

    Args:
      kind: of the engine, one of ``KINDS``.
      page: the text of its /metrics.

    Raises:
      ValueError: the page is no such text, or lacks the counts of requests, or a count or share is no legal number.
    """
    names = _NAMES[kind]
    values: dict[str, list[float]] = {}
    labels: dict[str, Mapping[str, str]] = {}
    for sample in _samples(page):
        values.setdefault(sample.name, []).append(sample.value)
        labels.setdefault(sample.name, sample.labels)
    share = next((name for name in names.kv_share if name in values), None)
    return Load(
        running=int(_total(values, names.running)),
        waiting=int(_total(values, names.waiting)),
        kv_share=None if share is None else min(_total(values, share) / len(values[share]), 1.0),
        kv_tokens=_capacity(labels.get(names.capacity or "", {}), names),
    )


def _samples(page: str) -> list[Sample]:
    try:
        return [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    except Exception as error:  # the library raises whatever it likes on a broken page
        raise ValueError(f"is no text of metrics: {type(error).__name__}: {error}") from error


def _total(values: Mapping[str, list[float]], name: str) -> float:
    """Returns the sum of a metric over the replicas."""
    if name not in values:
        raise ValueError(f"lacks the metric {name}")
    total = sum(values[name])
    if not min(values[name]) >= 0 or not total <= MAX_COUNT:
        raise ValueError(f"the metric {name} is {shown(values[name])}, must be numbers from 0 to {MAX_COUNT}")
    return total


def _capacity(labels: Mapping[str, str], names: _Names) -> int | None:
    try:
        return int(labels[names.block_size]) * int(labels[names.num_blocks])
    except (KeyError, ValueError):  # not there, or "None", as vLLM says before its memory is profiled
        return None


def kv_share_of_slots(slots: Any) -> float | None:
    """Returns the share of KV memory in use on llama.cpp, from its /slots: each slot has memory for ``n_ctx`` tokens.

    A slot that works tells the tokens in it, prompt and answer, by a name that depends on the release. None where no
    such name is known.
    """
    if not isinstance(slots, list) or not slots or not all(isinstance(slot, dict) for slot in slots):
        return None
    busy = [slot for slot in slots if slot.get("is_processing")]
    tokens = [next((slot[name] for name in _SLOT_TOKENS if _is_size(slot.get(name))), None) for slot in busy]
    context = [slot.get("n_ctx") for slot in slots]
    if None in tokens or not all(_is_size(size) and size > 0 for size in context):
        return None
    return min(sum(filter(None, tokens)) / sum(filter(None, context)), 1.0)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value <= MAX_COUNT
