"""The program that says how much traffic a router can take: what it writes, and what it refuses."""

from __future__ import annotations

import json
import pathlib

import pytest

from tests.helpers.programs import assert_refused, program_of

WORLD = "--fleet=qos_jax/worlds/fleets/paper-3.toml"
PLAIN = (WORLD, "--routers=shortest_queue", "--requests=200", "--seeds=2", "--noallow_drop")


@pytest.mark.slow
def test_worlds_are_compared(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    what_if = "--latency_limit=60ms --ttft_limit=1s"
    price = ("--price_per_kwh=0.3", "--price_per_hour=2")
    assert program_of("capacity")(*PLAIN, f"--what_if={what_if}", *price, f"--out={tmp_path}") == 0
    found = json.loads((tmp_path / "capacity.json").read_text())
    assert [world["label"] for world in found["worlds"]] == ["as given", what_if]
    given, looser = (world["routers"][0] for world in found["worlds"])
    assert looser["rate_per_s"]["mean"] > 1.1 * given["rate_per_s"]["mean"]
    hours = 1000 / given["good_per_s"] / 3600
    energy_kwh = given["energy_kj_per_1000_good"] / 3600
    assert given["cost_per_1000_good"] == pytest.approx(2 * hours + 0.3 * energy_kwh)
    page = (tmp_path / "capacity.md").read_text()
    assert page.startswith("# How much traffic paper-3 can take")
    assert f"## {what_if}" in page
    assert page in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--share=1", "--share=1"),
        ("--what_if=--requests=3", "--what_if=--requests=3: Unknown command line flag 'requests'"),
        ("--what_if=--engine=tgi", "--what_if=--engine=tgi: "),
        ("--what_if='", "--what_if='"),
        ("--ttft_limit=none", "--ttft_limit=none: give numbers above 0, in s or ms"),
        ("--ttft_limit=1s,2s,3s", "latency_limit_s is [0.03, 0.06]; must be one number, or one for each class"),
        ("--latency_limit=none", "there is no limit: give one of latency_limit_s, ttft_limit_s"),
    ],
)
def test_bad_input_is_one_line(
    flag: str, message: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = () if "_limit" not in flag else ("--latency_limit=30ms,60ms",)
    assert_refused(program_of("capacity"), capsys, message, *PLAIN, *limits, flag, f"--out={tmp_path}")
