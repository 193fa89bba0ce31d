"""The comparison of a long run in float32 with float64, and its power to find a difference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from qos_jax.programs.app import run_program
from tests.helpers.programs import Program, assert_refused

ENVS, STRETCH, PARTS = 4, 100, 10

pytestmark = pytest.mark.slow


class Comparison(NamedTuple):
    """The results of one run of the program."""

    rows: dict[tuple[str, str], dict[str, float]]  # by metric and part
    replays: list[tuple[Any, Any, np.ndarray]]  # of each environment: experts, requests served, counts in float64


@pytest.fixture(scope="module")
def endurance() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "")  # the program sets it if it is not set, and would change this process
        from experiments.benchmarks import endurance

        patch.setattr(endurance, "_STRETCH", STRETCH)
        yield endurance


@pytest.fixture(scope="module")
def program(endurance: Any) -> Program:
    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            run_program(endurance.define, endurance.main, name="endurance", summary="", arguments=arguments)
        return stopped.value.code or 0

    return run


@pytest.fixture(scope="module")
def comparison(endurance: Any, program: Program, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    out, replays, float64 = tmp_path_factory.mktemp("endurance") / "endurance.json", [], endurance._float64

    def recorded(experts: Any, served: Any) -> np.ndarray:
        replays.append((experts, served, float64(experts, served)))
        return replays[-1][-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(endurance, "_float64", recorded)
        assert program("--hours=0.0305", f"--num_envs={ENVS}", "--load=0.8", f"--out={out}") == 0
    return Comparison({(row["metric"], row["part"]): row for row in json.loads(out.read_text())["rows"]}, replays)


def test_both_count_the_same_but_for_requests_that_finish_as_a_part_ends(comparison: Comparison) -> None:
    assert {part for _, part in comparison.rows} == {"whole", *(f"{i + 1} of {PARTS}" for i in range(PARTS))}
    for row in comparison.rows.values():
        assert row["float32"] == pytest.approx(row["float64"], abs=3 / STRETCH)
    assert comparison.rows["qos", "whole"]["float64"] > 0.3


def test_the_parts_add_up_to_the_whole(comparison: Comparison) -> None:
    finished = {part: row["float64"] for (metric, part), row in comparison.rows.items() if metric == "finished"}
    whole = finished.pop("whole")
    assert np.mean(list(finished.values())) == pytest.approx(whole)


def test_a_clock_that_is_off_by_one_per_cent_is_found(endurance: Any, comparison: Comparison) -> None:
    slower = [
        endurance._float64(experts.replace(step_base_s=1.01 * experts.step_base_s), served)
        for experts, served, _ in comparison.replays
    ]
    true = np.stack([counts for *_, counts in comparison.replays])
    row = next(row for row in endurance._compared(true, np.stack(slower)) if row["metric"] == "latency_per_token_s")
    assert row["difference"] + 3 * row["difference_half"] < 0


def test_a_run_that_is_too_short_is_refused(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(program, capsys, "--hours=0.01", "--hours=0.01", "--num_envs=2")
