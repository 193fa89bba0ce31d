"""The program that changes a world and judges routers again: what it writes, and what it refuses."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from tests.helpers.programs import assert_refused, program_of

PLAIN = (
    "--fleet=qos_jax/worlds/fleets/paper-3.toml",
    "--routers=round_robin,shortest_queue,oracle_score",
    "--load=0.9",
    "--requests=100",
)


def mean_of(rows: list[dict[str, Any]], world: str, name: str) -> float:
    """The mean over the runs of shortest queue in a world."""
    return float(np.mean([row[name] for row in rows if (row["world"], row["router"]) == (world, "shortest_queue")]))


@pytest.mark.slow
def test_it_judges_every_router_in_every_world(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The unchanged world is judged like the others, so a change that changes nothing would keep every number."""
    run = program_of("robustness")
    changes = "--changes=coefficients,predictions,clock"
    assert run(*PLAIN, "--seeds=3", changes, f"--out={tmp_path}") == 0
    found = json.loads((tmp_path / "robustness.json").read_text())
    labels = [world["label"] for world in found["worlds"]]
    assert (labels[0], len(labels)) == ("unchanged", 1 + 14 + 2 + 3)
    assert len(found["rows"]) == len(labels) * 3 * 3
    assert found["pairs"] == 1  # oracles are not ranked
    qos = {world["label"]: world["qos"]["shortest_queue"]["0.9"] for world in found["worlds"]}
    assert qos["predictions none"] == qos["unchanged"]  # a router that looks at queues only
    latency_s = {label: mean_of(found["rows"], label, "latency_per_token_s") for label in labels}
    assert latency_s["all 10 % worse"] > 1.05 * latency_s["unchanged"] > 1.1 * latency_s["all 10 % better"]
    rate_per_s = {label: mean_of(found["rows"], label, "rate_per_s") for label in labels}
    assert rate_per_s["arrival rate +5 %"] == pytest.approx(1.05 * rate_per_s["unchanged"])
    assert found["worlds"][0]["rank_correlation"] == {"0.9": pytest.approx(1.0)}
    page = (tmp_path / "robustness.md").read_text()
    assert all(f"| {label} |" in page for label in labels)
    assert page in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--changes=weather", "--changes=weather: choose some of control, coefficients"),
        ("--load=0", "--load=0: give numbers above 0"),
        ("--routers=fastest", "router 'fastest' is unknown"),
    ],
)
def test_bad_input_is_one_line(
    flag: str, message: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(program_of("robustness"), capsys, message, *PLAIN, flag, f"--out={tmp_path}")
