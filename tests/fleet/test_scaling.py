"""The catalogue and the law of scaling: sizes are those published, and the law is what the simulator computes."""

from __future__ import annotations

import csv
import pathlib

import numpy as np
import pytest

from qos_jax.errors import InputError
from qos_jax.fleet import scaling
from qos_jax.fleet.catalogue import DEVICES, FORMATS, LLMS, MEASURED, llm_named
from qos_jax.fleet.experts import Expert, experts_of
from qos_jax.fleet.profiles import profile_of
from qos_jax.sim.cost import Batch, iteration_s

DATA = pathlib.Path(scaling.__file__).with_name("data")


def rows(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((DATA / name).read_text(encoding="utf-8").splitlines()))


@pytest.mark.parametrize("file", sorted(path.name for path in DATA.glob("*.csv")))
def test_every_row_of_the_catalogue_names_its_source(file: str) -> None:
    assert all(len(row["source"]) > 5 for row in rows(file))
    names = [tuple(row.values())[:2] if file == "fitted_rates.csv" else next(iter(row.values())) for row in rows(file)]
    assert len(set(names)) == len(names) > 0


def test_parameters_of_a_shape_are_those_published() -> None:
    for row in rows("llms.csv"):
        assert LLMS[row["name"]].weights_gb / 2 == pytest.approx(float(row["published_params_billion"]), rel=0.01)


def test_fewer_bits_leave_the_head_and_the_embedding_in_16_bit() -> None:
    full = llm_named("qwen3-8b")
    small = llm_named("qwen3-8b:int4")
    assert full.matrix_gb == pytest.approx(2 * full.matrix_params)
    assert small.matrix_gb == pytest.approx(4.16 / 8 * full.layer_params + 2 * full.head_params)
    assert full.weights_gb - small.weights_gb == pytest.approx(full.matrix_gb - small.matrix_gb)
    assert small.weights_gb == pytest.approx(6.1, rel=0.01)  # the checkpoint Qwen3-8B-AWQ has 6.1 GB


def experts() -> list[Expert]:
    """One of each origin of timing."""
    pairs = [
        ("qwen3-8b:nvfp4", "Jetson AGX Thor"),  # fitted
        ("qwen3-1.7b", "Jetson AGX Orin 64GB"),  # another format on the device
        ("llama-3.2-3b:int4", "A40"),  # LLaMA-7B on the device
        ("gemma-3-4b:fp8", "RTX 5070"),  # data sheet
        *MEASURED,
    ]
    return list(experts_of(pairs))


def test_times_of_the_law_are_those_of_the_simulator() -> None:
    found = profile_of(experts())
    for batch, kv_tokens in ((1, 0), (8, 4096), (32, 16384)):
        requests = np.full(5, float(batch))
        simulated_s = iteration_s(found, Batch(requests, 0 * requests, requests * 0 + kv_tokens, requests))
        expected_s = [expert.timing().step_s(batch, kv_tokens) for expert in experts()]
        np.testing.assert_allclose(simulated_s, expected_s, rtol=1e-5)
    for tokens in (60.0, 512.0, 2048.0):
        one = np.ones(5)
        prompt = Batch(one, tokens * one, 0 * one, 0 * one, 0 * one, tokens**2 / 2 * one)
        expected_s = [expert.timing().prompt_s(tokens) for expert in experts()]
        np.testing.assert_allclose(iteration_s(found, prompt), expected_s, rtol=1e-5)


def test_without_tables_the_coefficients_say_the_same_of_steps() -> None:
    mixed = [*experts(), *experts_of([("qwen3-8b", "A40")])]
    assert [expert.timing().origin for expert in mixed] == [
        "fitted", "scaled", "scaled", "guessed", "measured", "scaled",
    ]  # fmt: skip
    found = profile_of(mixed)
    assert found.kernels is None  # an LLM in 16 bit is scaled from LLaMA-7B by five coefficients
    for at, expert in enumerate(mixed[:4]):
        timing = expert.timing()
        by_coefficients_s = found.step_base_s[at] + 8 * found.per_sequence_s[at] + 4096 * found.per_kv_token_s[at]
        assert by_coefficients_s == pytest.approx(timing.step_s(8, 4096), rel=1e-6)
        prompt_s = max(found.step_base_s[at], found.prefill_base_s[at] + 512 * found.prefill_per_token_s[at])
        # Near the knee the hinge is too fast: it has no time for the layers beside reading the weights.
        assert prompt_s + found.per_sequence_s[at] == pytest.approx(timing.prompt_s(512), rel=0.08)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_device_serves_every_format_at_sane_rates(device: str, format: str) -> None:
    timing = scaling.timing_of(llm_named(f"qwen3-4b:{format}"), DEVICES[device])
    weights_gb = llm_named(f"qwen3-4b:{format}").matrix_gb
    assert 1.0 < DEVICES[device].bandwidth_gb_per_s * timing.step_s(1, 0) / weights_gb < 3.0
    tflops = DEVICES[device].tflops.get(format, DEVICES[device].tflops["fp16"])
    assert 0.1 < 2 * 2048 * 3.63e-3 / timing.prompt_s(2048) / tflops < 1.0
    assert timing.origin in ("fitted", "scaled", "guessed")
    assert timing.step_s(1, 0) < timing.step_s(8, 8192) < timing.step_s(32, 32768)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="LLM 'gpt' is unknown; choose from alpaca-native"):
        llm_named("gpt:int4")
    with pytest.raises(InputError, match="GPU 'TPU' is unknown; choose from RTX 4090"):
        experts_of([("qwen3-8b", "TPU")])
