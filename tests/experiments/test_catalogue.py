"""The catalogue is held to what was measured on boards, where the measurements are."""

from __future__ import annotations

import os
import pathlib

import numpy as np
import pytest

from experiments import catalogue as experiment
from qos_jax.fleet import scaling
from qos_jax.fleet.catalogue import DEVICES, llm_named

needs_data = pytest.mark.skipif("QOS_JAX_DATA" not in os.environ, reason="QOS_JAX_DATA is not set")


def folder() -> pathlib.Path:
    return pathlib.Path(os.environ["QOS_JAX_DATA"]) / "profiles"


@needs_data
def test_steps_are_within_8_and_prompts_within_10_percent_of_the_boards() -> None:
    rows = [row for row in experiment.read_rows(folder())[0] if row.exact]
    assert len(rows) == 42
    for row in rows:
        rates = DEVICES[row.device].fitted[row.format].rates
        assert abs(experiment.step_error(row, rates)) < 0.08, row
        if row.batch == 1:
            assert abs(experiment.prompt_error(row, rates)) < 0.10, row


@needs_data
def test_rows_that_miss_are_those_of_eight_prompts_in_one_iteration() -> None:
    """16,384 tokens at once take longer per token than 2,048; an iteration of the simulator has 2,048 to 8,192."""
    rows = [row for row in experiment.read_rows(folder())[0] if row.exact and row.batch == 8]
    errors = [experiment.prompt_error(row, DEVICES[row.device].fitted[row.format].rates) for row in rows]
    assert sum(abs(error) > 0.10 for error in errors) == 14
    assert max(errors) < 0.10


@needs_data
def test_the_catalogue_has_the_rates_that_the_fit_gives() -> None:
    for device, format, *cells in experiment.catalogue_rows(folder(), experiment.read_rows(folder())[0]):
        fitted = DEVICES[device].fitted[format]
        rates = [float(cell) for cell in cells[:7]]
        np.testing.assert_allclose(list(vars(fitted.rates).values()), rates, rtol=0.02)
        assert (fitted.step_error, fitted.prompt_error) == pytest.approx((float(cells[7]), float(cells[8])), abs=0.003)


@needs_data
def test_stated_errors_are_those_of_leaving_out() -> None:
    rows, _ = experiment.read_rows(folder())
    found = np.array(list(experiment.without_each_device(rows, experiment.all_rates(folder(), rows)).values()))
    np.testing.assert_allclose(found.mean(0), scaling.ERRORS["guessed"], rtol=0.05)
    assert (found.max(0) < (0.15, 0.5)).all()


@needs_data
def test_matrix_products_of_l40s_and_b60_follow_the_rates() -> None:
    for (device, format), (_, step_error, prompt_error) in experiment.gemm_rates(folder()).items():
        assert prompt_error < 0.12
        assert step_error < 0.06 or (device, format) == ("Arc Pro B60", "fp8")  # where matrices of 12,288 rows are slow


def test_a_row_is_predicted_as_the_simulator_would() -> None:
    row = experiment.Row("DGX Spark", "qwen3-8b", "nvfp4", 8, 16384, 1.0, 1.0, True)
    rates = DEVICES["DGX Spark"].fitted["nvfp4"].rates
    llm = llm_named("qwen3-8b:nvfp4")
    alone_s = scaling.prompt_s(llm, rates, 2048)
    together_s = 1 + experiment.prompt_error(row, rates)
    layers_s = llm.layers * (rates.layer_us + rates.prompt_layer_us) / 1e6
    assert together_s - layers_s == pytest.approx(8 * (alone_s - layers_s))
