"""The law by which the timing of an LLM on a device follows from their sizes, and where its numbers come from.

An iteration reads all weight matrices once, or multiplies its tokens by them, whichever takes longer. Each of ``L``
layers takes a time of its own, and the attention reads the keys and values of the cached tokens. So an iteration that
only decodes ``B`` requests with ``K`` cached tokens takes

    L layer + matrix_bytes / weight_rate + B sequence + K kv_bytes / kv_rate,

and a prompt of ``P`` tokens takes

    L (layer + prompt_layer) + max(matrix_bytes / weight_rate, 2 P layer_params / prompt_rate)
      + 2 P^2 L attention_size / attention_rate.

``Rates`` are the constants of a device for one format of the weights. They are, in this order:

* fitted to measurements of that format on the device;
* those of LLaMA-7B in 16 bit, which was measured on it. For an LLM in 16 bit, the LLaMA's timing is scaled as a whole:
  step base and both prefill terms by the parameters in the matrices, the KV slope by the KV bytes of a token. The
  prefill line is the affine fit to prefills of 16 to 2,048 tokens; its intercept lies below the step base, which is the
  lower bound for short prompts. Output heads that share their weights with the embedding are not counted for LLMs of
  2023, which neglects 3 % of mpt-7b's step and 9 % of chatglm-6b's;
* fitted to another format on the device, with the arithmetic of its data sheet;
* the data sheet alone, times the shares of it that measured devices reach.

``python -m experiments.catalogue`` prints how far the law is from the measurements, also where the device or the LLM
is left out of the fit. Nothing here imports JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qos_jax.fleet.catalogue import Device, Llama7bTiming, Llm, Rates
from qos_jax.sim.constants import ATTENTION_TERMS, EARLY_PROMPT_TOKENS

LLAMA_7B_MATRIX_PARAMS = 6.607  # 10^9
LLAMA_7B_KV_BYTES = 524_288
_LLAMA_7B_LAYERS = 32

_SUMMARY_TOKENS = 512  # the prompt at which the coefficients agree with the tables


@dataclasses.dataclass(frozen=True)
class Shares:
    """What measured devices reach of their data sheets."""

    weight: float  # of the memory bandwidth, where weights are read
    kv: float  # of it, where keys and values are
    prompt: Mapping[str, float]  # of the arithmetic, by format
    attention: float  # of the arithmetic in 16 bit
    layer_us: float
    prompt_layer_us: float
    sequence_us: float


SHARES = Shares(
    weight=0.83,
    kv=0.83,
    prompt={"fp16": 0.74, "fp8": 0.66, "int4": 0.47, "nvfp4": 0.39},
    attention=0.31,
    layer_us=41.0,
    prompt_layer_us=260.0,
    sequence_us=45.0,  # of vLLM, median of the devices with LLaMA-7B
)
"""Geometric means over the measured devices, by ``python -m experiments.catalogue``."""

ERRORS = {"scaled": (0.025, 0.076), "guessed": (0.06, 0.23)}
"""Errors to expect of a step and of a prompt: mean |error| where the LLM, or the device, is left out of the fit."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """The timing of one expert, and how it was got."""

    coefficients: dict[str, float]  # of an ``ExpertProfile``
    kernels: dict[str, Any] | None  # as in a profile file; without it, the coefficients hold
    origin: str  # measured, fitted, scaled or guessed
    basis: str  # from what
    step_error: float | None  # relative error to expect; None: unknown
    prompt_error: float | None

    def step_s(self, requests: float, kv_tokens: float) -> float:
        """Returns the duration of an iteration that only decodes, s."""
        return self._iteration_s(requests, kv_tokens, 0.0)

    def prompt_s(self, tokens: float) -> float:
        """Returns the duration of an iteration that computes one prompt and nothing else, s."""
        return self._iteration_s(1.0, 0.0, tokens)

    def _iteration_s(self, requests: float, kv_tokens: float, prompt_tokens: float) -> float:
        """Returns what ``sim.cost.iteration_s`` does, for iterations that only decode or only compute a prompt."""
        if self.kernels is None:
            c = self.coefficients
            prompt_s = (c["prefill_base_s"] + c["prefill_per_token_s"] * prompt_tokens) if prompt_tokens else 0.0
            return max(c["step_base_s"], prompt_s) + c["per_sequence_s"] * requests + c["per_kv_token_s"] * kv_tokens
        k, attention = self.kernels, self.kernels["attention_s"]
        fixed_s = _interpolated(k["dense_tokens"], k["dense_s"], prompt_tokens or requests) + k["host_s"]
        fixed_s += _interpolated(k["head_requests"], k["head_s"], requests) + k["host_per_sequence_s"] * requests
        if not prompt_tokens:
            terms = {"decode": 1.0, "decode_per_request": requests, "decode_per_kv_token": kv_tokens}
        else:
            early = min(prompt_tokens, EARLY_PROMPT_TOKENS)
            terms = {"prompt": 1.0, "per_pair": prompt_tokens**2 / 2, "per_early_prompt_token": early}
            terms["per_late_prompt_token"] = prompt_tokens - early
        return fixed_s + sum(attention[name] * amount for name, amount in terms.items())


def timing_of(llm: Llm, device: Device) -> Timing:
    """Returns the timing of an LLM on a device whose pair was not measured."""
    if device.llama_7b is not None and llm.format == "fp16" and "fp16" not in device.fitted:
        basis = "kernels of LLaMA-7B on the device, by parameters and KV bytes"
        return Timing(_from_llama_7b(llm, device.llama_7b), None, "scaled", basis, *ERRORS["scaled"])
    if fitted := device.fitted.get(llm.format):
        step, prompt = ERRORS["scaled"]  # another LLM is further from the law than those of the fit
        errors = max(fitted.step_error, step), max(fitted.prompt_error, prompt)
        return _by_law(llm, fitted.rates, "fitted", fitted.source, *errors)
    if device.llama_7b is not None:
        basis = "kernels of LLaMA-7B on the device, by bytes and arithmetic"
        return _by_law(llm, rates_from_llama_7b(llm, device), "scaled", basis, *ERRORS["scaled"])
    if device.fitted:
        format, fitted = next(iter(device.fitted.items()))
        rates = dataclasses.replace(fitted.rates, prompt_tflops=_prompt_tflops(llm, device))
        return _by_law(llm, rates, "scaled", f"{format} on the device, arithmetic of its data sheet", *ERRORS["scaled"])
    return _by_law(llm, rates_from_sheet(llm, device), "guessed", "the data sheet", *ERRORS["guessed"])


def step_s(llm: Llm, rates: Rates, requests: float, kv_tokens: float) -> float:
    """Returns the duration of an iteration that only decodes, s."""
    kv_s = kv_tokens * llm.kv_bytes_per_token / rates.kv_gb_per_s / 1e9
    return llm.layers * rates.layer_us / 1e6 + _weights_s(llm, rates) + requests * rates.sequence_us / 1e6 + kv_s


def prompt_s(llm: Llm, rates: Rates, tokens: float) -> float:
    """Returns the duration of an iteration that computes one prompt, without ``sequence_us``, s."""
    matrices_s = max(_weights_s(llm, rates), tokens * _token_s(llm, rates))
    layers_s = llm.layers * (rates.layer_us + rates.prompt_layer_us) / 1e6
    return layers_s + matrices_s + tokens**2 / 2 * per_pair_s(llm, rates)


def rates_from_sheet(llm: Llm, device: Device, shares: Shares = SHARES) -> Rates:
    """Returns the rates that measured devices would reach with this data sheet."""
    return Rates(
        layer_us=shares.layer_us,
        weight_gb_per_s=shares.weight * device.bandwidth_gb_per_s,
        kv_gb_per_s=shares.kv * device.bandwidth_gb_per_s,
        sequence_us=shares.sequence_us,
        prompt_layer_us=shares.prompt_layer_us,
        prompt_tflops=_prompt_tflops(llm, device, shares),
        attention_tflops=shares.attention * device.tflops["fp16"],
    )


def _by_law(llm: Llm, rates: Rates, origin: str, basis: str, step_error: float, prompt_error: float) -> Timing:
    layers_s, prompt_layers_s = llm.layers * rates.layer_us / 1e6, llm.layers * rates.prompt_layer_us / 1e6
    weights_s, token_s, pair_s = _weights_s(llm, rates), _token_s(llm, rates), per_pair_s(llm, rates)
    sequence_s, kv_s = rates.sequence_us / 1e6, llm.kv_bytes_per_token / rates.kv_gb_per_s / 1e9
    knee = max(weights_s / token_s, 2.0)  # tokens from which on the arithmetic takes longer than to read the weights
    kernels = {
        "dense_tokens": [1.0, knee, 2 * knee],
        "dense_s": [layers_s + weights_s, layers_s + weights_s, layers_s + weights_s + knee * token_s],
        "head_requests": [1.0, 2.0],
        "head_s": [sequence_s, 2 * sequence_s],
        "attention_s": dict.fromkeys(ATTENTION_TERMS, 0.0)
        | dict.fromkeys(("decode_per_kv_token", "mixed_per_kv_token"), kv_s)
        | dict.fromkeys(("prompt", "mixed", "mixed_chunked"), prompt_layers_s)
        | {"per_pair": pair_s},
        "host_s": 0.0,
        "host_per_sequence_s": 0.0,
    }
    coefficients = {
        "step_base_s": layers_s + weights_s,
        "prefill_base_s": layers_s + prompt_layers_s,
        "prefill_per_token_s": token_s + _SUMMARY_TOKENS / 2 * pair_s,
        "per_sequence_s": sequence_s,
        "per_kv_token_s": kv_s,
    }
    return Timing(coefficients, kernels, origin, basis, step_error, prompt_error)


def _from_llama_7b(llm: Llm, measured: Llama7bTiming) -> dict[str, float]:
    size = llm.matrix_params / LLAMA_7B_MATRIX_PARAMS
    return {
        "step_base_s": measured.step_base_ms * size / 1e3,
        "prefill_base_s": measured.prefill_base_ms * size / 1e3,
        "prefill_per_token_s": measured.prefill_ms_per_token * size / 1e3,
        "per_sequence_s": measured.per_sequence_ms / 1e3,
        "per_kv_token_s": measured.kv_ms_per_1000_tokens * llm.kv_bytes_per_token / LLAMA_7B_KV_BYTES / 1e6,
    }


def rates_from_llama_7b(llm: Llm, device: Device) -> Rates:
    """Returns the rates at which the device served LLaMA-7B, with the arithmetic of the LLM's format."""
    measured = device.llama_7b
    assert measured is not None
    layers_ms = _LLAMA_7B_LAYERS * SHARES.layer_us / 1e3  # of its step; the rest is to read the weights
    arithmetic = _prompt_tflops(llm, device) / SHARES.prompt["fp16"] / device.tflops["fp16"]
    prompt_tflops = 2 * LLAMA_7B_MATRIX_PARAMS / measured.prefill_ms_per_token * arithmetic
    return Rates(
        layer_us=SHARES.layer_us,
        weight_gb_per_s=2 * LLAMA_7B_MATRIX_PARAMS / (measured.step_base_ms - layers_ms) * 1e3,
        kv_gb_per_s=LLAMA_7B_KV_BYTES / measured.kv_ms_per_1000_tokens / 1e3,
        sequence_us=1e3 * measured.per_sequence_ms,
        prompt_layer_us=1e3 * measured.prefill_base_ms / _LLAMA_7B_LAYERS,
        prompt_tflops=prompt_tflops,
        attention_tflops=SHARES.attention * device.tflops["fp16"],
    )


def _prompt_tflops(llm: Llm, device: Device, shares: Shares = SHARES) -> float:
    """Returns what a device of this data sheet reaches; weights that it cannot multiply are multiplied in 16 bit."""
    arithmetic = llm.format if llm.format in device.tflops else "fp16"
    share = llm.format if llm.format == "int4" else arithmetic
    return shares.prompt[share] * device.tflops[arithmetic]


def _weights_s(llm: Llm, rates: Rates) -> float:
    return llm.matrix_gb / rates.weight_gb_per_s


def _token_s(llm: Llm, rates: Rates) -> float:
    return 2 * llm.layer_params / rates.prompt_tflops / 1e3


def per_pair_s(llm: Llm, rates: Rates) -> float:
    """Returns the time of a prompt token with one token before it: two products over all layers."""
    return 4 * llm.layers * llm.attention_size / rates.attention_tflops / 1e12


def _interpolated(knots: list[float], values: list[float], at: float) -> float:
    """Returns a piecewise linear function; beyond the last knot its last slope goes on."""
    if at <= knots[-1]:
        return float(np.interp(at, knots, values))
    return values[-1] + (values[-1] - values[-2]) / (knots[-1] - knots[-2]) * (at - knots[-1])
