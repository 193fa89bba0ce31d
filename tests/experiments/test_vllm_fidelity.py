"""A real vLLM on one CPU core, at loads that operators choose: as measured by ``experiments/vllm_engine.py``."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from experiments.vllm_fidelity import compare, read_iterations
from qos_jax import InputError

RUNS = pathlib.Path(__file__).parents[1] / "data" / "vllm-cpu"
COLUMNS = "prompt_tokens,requests,kv_tokens,prefix_tokens,pairs,decodes,time_s"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return compare(RUNS)


@pytest.mark.slow
def test_answers_take_as_long_as_the_tables_say(found: dict[str, Any]) -> None:
    """End to end within 8 % at each load, also near saturation, where a queue multiplies errors of iterations."""
    tables = {run: forms["tables"] for run, forms in found["runs"].items()}
    assert list(tables) == ["load-0.6", "load-0.8", "load-1.0", "load-1.2"]
    assert max(abs(errors["latencies"]["e2e_s"]["mean_error"]) for errors in tables.values()) < 0.08
    assert max(abs(errors["iterations"]) for errors in tables.values()) < 0.02


@pytest.mark.slow
def test_the_profile_shows_what_the_coefficients_leave_out(found: dict[str, Any]) -> None:
    """They have no term for prompts that go on; single times scatter by 10 %, so the bias is what tells."""
    bias = {form: found["profile"][form]["chunked"]["bias"] for form in ("tables", "coefficients")}
    assert abs(bias["tables"]) < 0.015
    assert bias["coefficients"] < -0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (COLUMNS, "holds no row, must hold at least one"),
        ("requests\n1", "lacks the column.* prompt_tokens"),
        (f"{COLUMNS}\n1,1,0,0,0.5,0,x", "time_s is 'x', must be a finite number"),
    ],
)
def test_bad_iterations_are_refused(tmp_path: pathlib.Path, text: str, message: str) -> None:
    path = tmp_path / "iterations.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_iterations(path)


def test_a_folder_without_runs_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"has no folder load-\*"):
        compare(tmp_path)
