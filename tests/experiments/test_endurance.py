"""The long run in float32 is compared with float64, and a difference shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.helpers.programs import assert_refused, program_of

ENVS, STRETCH, PARTS = 4, 100, 10


class Made(NamedTuple):
    """What one run of the program came to."""

    rows: dict[tuple[str, str], dict[str, float]]
    replays: list[tuple[Any, Any, np.ndarray]]  # of each environment: experts, what was served, counts in float64


@pytest.fixture(scope="module")
def endurance() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "")  # it sets it where it is not set, and this process lives on
        from experiments.benchmarks import endurance

        patch.setattr(endurance, "_STRETCH", STRETCH)
        yield endurance


@pytest.fixture(scope="module")
def program(endurance):
    yield from program_of(endurance)


@pytest.fixture(scope="module")
def made(endurance, program, tmp_path_factory) -> Made:
    out, replays, float64 = tmp_path_factory.mktemp("endurance") / "endurance.json", [], endurance._float64

    def kept(experts: Any, served: Any) -> np.ndarray:
        replays.append((experts, served, float64(experts, served)))
        return replays[-1][-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(endurance, "_float64", kept)
        assert program("--hours=0.0305", f"--num_envs={ENVS}", "--load=0.8", f"--out={out}") == 0
    return Made({(row["metric"], row["part"]): row for row in json.loads(out.read_text())["rows"]}, replays)


def test_both_count_the_same_but_for_what_finishes_as_a_part_ends(made):
    assert {part for _, part in made.rows} == {"whole", *(f"{i + 1} of {PARTS}" for i in range(PARTS))}
    for row in made.rows.values():
        assert row["float32"] == pytest.approx(row["float64"], abs=3 / STRETCH)
    assert made.rows["qos", "whole"]["float64"] > 0.3


def test_what_finished_in_the_parts_adds_up_to_the_whole(made):
    parts = [row["float64"] for (metric, part), row in made.rows.items() if metric == "finished" and part != "whole"]
    assert np.mean(parts) == pytest.approx(made.rows["finished", "whole"]["float64"])


def test_a_clock_that_is_off_by_a_hundredth_shows(endurance, made):
    slower = [
        endurance._float64(experts.replace(step_base_s=1.01 * experts.step_base_s), served)
        for experts, served, _ in made.replays
    ]
    true = np.stack([counts for *_, counts in made.replays])
    row = next(row for row in endurance._compared(true, np.stack(slower)) if row["metric"] == "latency_per_token_s")
    assert row["difference"] + 3 * row["difference_half"] < 0


def test_too_short_a_run_is_refused(program, capsys):
    assert_refused(program, capsys, "--hours=0.01", "--hours=0.01", "--num_envs=2")
