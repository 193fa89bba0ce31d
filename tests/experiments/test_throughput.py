"""Throughput of measured runs: spans and curves by hand, and the measured runs, where they are."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from experiments import throughput
from qos_jax import InputError, RequestLog


def test_tokens_of_each_second_by_hand() -> None:
    """Three tokens at 0.5, 1.5 and 2.5 s, and one at 2.9 s."""
    times = np.array([0.5, 2.9]), np.array([2.5, 2.9])
    log = RequestLog(times[1], times[0], np.zeros(2, int), np.zeros(2, bool))
    assert throughput.tokens_per_s(np.array([3, 1]), log).tolist() == [1, 1, 2]


def test_spans_and_differences_by_hand() -> None:
    constant = np.ones(10)
    assert throughput.span_s(constant, 0.05, 0.95) == pytest.approx(9.0)
    later = np.append(np.zeros(7), constant)
    assert throughput.curve_difference(constant, later) == pytest.approx(0.0, abs=1e-9)
    twice_as_fast = 2 * np.ones(5)
    assert throughput.curve_difference(constant, twice_as_fast) == pytest.approx(0.25)


def test_two_measured_engines_have_the_simulated_shape(data_dir: pathlib.Path) -> None:
    folder = data_dir / "golden-throughput"
    runs = throughput.measured_runs(folder / "throughput.csv")
    assert len(runs) == 4
    trace, log = throughput.simulated_run(folder / "requests.jsonl", "llama-3.1-8b", "A6000", 2, 128)
    simulated = throughput.tokens_per_s(trace.output_tokens[:, 0], log)
    measured = runs["A6000", "two_instances"]
    assert measured.sum() == pytest.approx(simulated.sum(), rel=0.01)
    assert throughput.curve_difference(measured, simulated) < 0.03
    spans = [throughput.span_s(tokens, 0.05, 0.95) for tokens in (simulated, measured)]
    assert spans[0] / spans[1] - 1 == pytest.approx(-0.035, abs=0.01)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("A6000,three_instances,0,5", r"line 2: setup is 'three_instances', must be one of "),
        ("A6000,two_instances,0,fast", r"line 2: tokens_per_s is 'fast', must be a finite number"),
    ],
)
def test_bad_rows_are_named(row: str, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "t.csv").write_text(f"gpu,setup,t_s,tokens_per_s\n{row}\n")
    with pytest.raises(InputError, match=message):
        throughput.measured_runs(tmp_path / "t.csv")
