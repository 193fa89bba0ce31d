"""The shipped catalogue: LLMs and devices, read from the csv files in ``data``, where each row names its source.

Another LLM or device is another row; at run time, another entry of ``LLMS`` or ``DEVICES``. Nothing here imports JAX.

``llama_7b.csv`` has the timing of LLaMA-7B in 16 bit, from two sources. [LLMServingSim]: casys-kaist/LLMServingSim (RTX
4090 at 5daddb2), Llama-3.1-8B with output head, scaled to LLaMA-7B by parameters (6.607 / 7.505) and KV bytes. [Vidur]:
microsoft/vidur 7d47513 and AKafakA/vidur_opt_scheduler 20bdc49, Llama-2-7B without output head, with the step base
scaled by 6.607 / 6.476. KV slopes are measured on RTX 4090 and A100; the others assume 80 to 83 % of the memory
bandwidth, as on RTX 4090.

Of ``devices.csv``, busy power is the vendor's limit (TDP) but where the row says otherwise. Idle power is as published
in the row's sources; where nothing is, it is assumed (``IDLE_SHARE``). Standby was measured on A6000 only. A40, A100
and H100 keep their clocks up for as long as a model is loaded, so their idle power is already that of standby. All
others are assumed to be idle at once, and their energy is a lower bound.

flan-t5-xxl has no row, as the cost model of an iteration does not hold for an encoder-decoder.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from qos_jax.errors import InputError
from qos_jax.io.files import parse_json
from qos_jax.io.text_files import CsvTable, parse_number, read_text, shown

IDLE_SHARE = 0.1  # of the busy power: 5 to 17 % on consumer and small cards, more on those that keep their clocks up

FORMATS = {"fp16": 16.0, "fp8": 8.0, "int4": 4.16, "nvfp4": 4.5}
"""How weights are stored and multiplied, and bits per weight with its scales: groups of 128 in int4, of 16 in nvfp4."""

_DATA = pathlib.Path(__file__).with_name("data")
_HEAD_BITS = 16.0  # AWQ, GPTQ and NVFP4 exports leave the output head and the embedding as they are


@dataclasses.dataclass(frozen=True)
class Llm:
    """Size of an LLM."""

    weights_gb: float  # in memory
    matrix_params: float  # 10^9 parameters in the matrices that each iteration reads
    kv_bytes_per_token: float  # 2 x layers x KV heads x head size x 2 bytes
    layers: int
    attention_size: int  # attention heads x head size
    head_params: float = 0.0  # 10^9 of matrix_params: the output head, if it stays in 16 bit when the rest does not
    format: str = "fp16"  # of FORMATS
    bits: float = 16.0  # per weight, of all matrices but the head
    source: str = ""

    @property
    def matrix_gb(self) -> float:
        """What each iteration reads of the weights."""
        return ((self.matrix_params - self.head_params) * self.bits + self.head_params * _HEAD_BITS) / 8

    @property
    def layer_params(self) -> float:
        """10^9 parameters by which each prompt token is multiplied; of the head, only the last token is."""
        return self.matrix_params - self.head_params

    def quantised(self, format: str, bits: float | None = None) -> Llm:
        """Returns the LLM, which is in 16 bit, in a format of FORMATS."""
        bits = FORMATS[format] if bits is None else bits
        weights_gb = self.weights_gb - self.layer_params * (16.0 - bits) / 8
        return dataclasses.replace(self, weights_gb=weights_gb, format=format, bits=bits)


@dataclasses.dataclass(frozen=True)
class Llama7bTiming:
    """Timing of LLaMA-7B in 16 bit, from measured kernels."""

    step_base_ms: float
    kv_ms_per_1000_tokens: float
    prefill_base_ms: float
    prefill_ms_per_token: float
    per_sequence_ms: float


@dataclasses.dataclass(frozen=True)
class Rates:
    """How fast a device serves one format of the weights; ``qos_jax.fleet.scaling`` makes times of them."""

    layer_us: float  # of each layer, whatever it computes
    weight_gb_per_s: float
    kv_gb_per_s: float
    sequence_us: float  # of each request in an iteration
    prompt_layer_us: float  # more of each layer in an iteration that computes prompts
    prompt_tflops: float  # of matrix products
    attention_tflops: float  # of prompt tokens with those before them


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Rates that were fitted to measurements, and the largest relative errors on these."""

    rates: Rates
    step_error: float
    prompt_error: float
    source: str


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU or a board: data sheet, power, and what was measured on it."""

    memory_gb: float  # as CUDA reports it; on boards, as Linux does
    bandwidth_gb_per_s: float
    tflops: Mapping[str, float]  # dense, by format of the arithmetic; fp16 is always there
    idle_w: float  # with a model in memory and no request
    busy_w: float
    standby_w: float = 0.0  # after the last token of a batch
    standby_s: float = 0.0  # for this time; without a measurement, the device is idle at once
    llama_7b: Llama7bTiming | None = None
    fitted: Mapping[str, Fitted] = dataclasses.field(default_factory=dict)  # by format of the weights
    source: str = ""


def llm_named(name: str) -> Llm:
    """Returns the LLM of a name in ``LLMS``, which ``:FORMAT`` may follow, as in ``qwen3-8b:int4``.

    Raises:
      InputError: the name or the format is unknown.
    """
    base, colon, format = name.partition(":")
    if base not in LLMS:
        raise InputError(f"LLM {base!r} is unknown; choose from {', '.join(LLMS)}")
    if colon and format not in FORMATS:
        raise InputError(f"LLM {name!r}: format {format!r} is unknown; choose from {', '.join(FORMATS)}")
    return LLMS[base].quantised(format) if colon else LLMS[base]


def llm_of_shape(shape: Mapping[str, float], tied_embeddings: bool, source: str) -> Llm:
    """Returns an LLM in 16 bit from the shape of its layers, which have a gated MLP and no experts.

    Args:
      shape: the numbers ``SHAPE``.
      tied_embeddings: the output head is the embedding, and in memory once.
      source: for the record.
    """
    hidden, heads_size = shape["hidden_size"], shape["attention_heads"] * shape["head_size"]
    kv_size = shape["kv_heads"] * shape["head_size"]
    layer = 2 * hidden * heads_size + 2 * hidden * kv_size + 3 * hidden * shape["intermediate_size"]
    layers_params, head_params = shape["layers"] * layer / 1e9, shape["vocab_size"] * hidden / 1e9
    return Llm(
        weights_gb=2 * (layers_params + (1 if tied_embeddings else 2) * head_params),
        matrix_params=layers_params + head_params,
        kv_bytes_per_token=4 * shape["layers"] * kv_size,
        layers=int(shape["layers"]),
        attention_size=int(heads_size),
        head_params=head_params,
        source=source,
    )


SHAPE = ("layers", "hidden_size", "intermediate_size", "attention_heads", "kv_heads", "head_size", "vocab_size")

_IN_CONFIG = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "attention_heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "vocab_size": "vocab_size",
}
_TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3", "gemma3_text")  # families whose config.json may leave it out


def read_config(path: str) -> Llm:
    """Returns the LLM, in 16 bit, of a ``config.json`` as Hugging Face has it.

    Raises:
      InputError: the file cannot be read, a number is missing or not legal, or the LLM is a mixture of experts.
    """
    config = parse_json(read_text(path), path)
    config = config.get("text_config", config) if isinstance(config, dict) else config
    if not isinstance(config, dict):
        raise InputError(f"{path}: is {shown(config)}, must be a JSON object")
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(name):
            raise InputError(f"{path}: {name} is {shown(config[name])}: mixtures of experts have no law of timing here")
    values: dict[str, Any] = {field: config.get(name) for field, name in _IN_CONFIG.items()}
    if values["kv_heads"] is None:
        values["kv_heads"] = values["attention_heads"]
    if values["head_size"] is None and values["attention_heads"]:
        values["head_size"] = values["hidden_size"] / values["attention_heads"]
    for field, name in _IN_CONFIG.items():
        value = values[field]
        if isinstance(value, bool) or not isinstance(value, int | float) or not (value >= 1 and value == int(value)):
            raise InputError(f"{path}: {name} is {shown(config.get(name))}, must be a whole number of at least 1")
    tied = config.get("tie_word_embeddings", config.get("model_type") in _TIED_BY_DEFAULT)
    return llm_of_shape(values, bool(tied), path)


def _rows(file: str) -> list[dict[str, str]]:
    path = _DATA / file
    table = CsvTable(read_text(path), path)
    return [dict(zip(table.header, cells, strict=True)) for _, cells in table.rows(table.header)]


def _numbers(row: Mapping[str, str], fields: Any) -> dict[str, float]:
    return {name: parse_number(row[name]) for name in fields}


def _read_llms() -> dict[str, Llm]:
    llms = {
        row["name"]: Llm(
            weights_gb=parse_number(row["weights_gb"]),
            matrix_params=parse_number(row["matrix_params_billion"]),
            kv_bytes_per_token=parse_number(row["kv_bytes_per_token"]),
            layers=int(row["layers"]),
            attention_size=int(row["attention_size"]),
            source=row["source"],
        )
        for row in _rows("llms_2023.csv")
    }
    for row in _rows("llms.csv"):
        llms[row["name"]] = llm_of_shape(_numbers(row, SHAPE), row["tied_embeddings"] == "yes", row["source"])
    return llms


def _read_devices() -> dict[str, Device]:
    measured = {row["device"]: row for row in _rows("llama_7b.csv")}
    timing = [field.name for field in dataclasses.fields(Llama7bTiming)]
    rates = [field.name for field in dataclasses.fields(Rates)]
    fitted: dict[str, dict[str, Fitted]] = {}
    for row in _rows("fitted_rates.csv"):
        errors = _numbers(row, ("step_error", "prompt_error"))
        fitted.setdefault(row["device"], {})[row["format"]] = Fitted(
            Rates(**_numbers(row, rates)), **errors, source=row["source"]
        )
    devices = {}
    for row in _rows("devices.csv"):
        name, busy_w = row["name"], parse_number(row["busy_w"])
        devices[name] = Device(
            **_numbers(row, ("memory_gb", "bandwidth_gb_per_s")),
            tflops={name: parse_number(value) for name in TENSOR_FORMATS if (value := row[f"{name}_tflops"])},
            idle_w=parse_number(row["idle_w"]) if row["idle_w"] else IDLE_SHARE * busy_w,
            busy_w=busy_w,
            standby_w=parse_number(row["standby_w"] or 0),
            standby_s=parse_number(row["standby_s"] or 0),
            llama_7b=Llama7bTiming(**_numbers(measured[name], timing)) if name in measured else None,
            fitted=fitted.get(name, {}),
            source=row["source"],
        )
    return devices


TENSOR_FORMATS = ("fp16", "fp8", "nvfp4")  # of arithmetic; weights in int4 are multiplied in fp16

LLMS = _read_llms()
DEVICES = _read_devices()

MEASURED = {
    ("llama-3.1-8b", "RTX 4090"): pathlib.Path(__file__).with_name("measured") / "llama-3.1-8b_rtx-4090.json",
}
"""Pairs whose own kernels were measured: files of qos-jax fit-profile for [LLMServingSim], with errors and sources."""
