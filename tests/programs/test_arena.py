"""The arena: every router in every world under one rule, and what it refuses."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import pytest

from qos_jax.training.shipped import shipped_folder
from tests.helpers.programs import assert_refused, program_of

EXPERTS = "--experts=alpaca-native@A40,koala-7B-HF@A40"
WORLD = f"two: {EXPERTS}"


def train_two_seeds(folder: pathlib.Path) -> None:
    small = "--set=chunk=8,updates=2,batch_size=16,capacity=64,prefill=4,hidden=8x8"
    little = ("--num_envs=4", "--randomise=none", "--evaluation_envs=2", "--evaluation_steps=20", "--steps=64")
    assert program_of("train")(EXPERTS, "--agent=baseline_rl", small, *little, "--seeds=2", f"--out={folder}") == 0


@pytest.mark.slow
def test_all_meet_the_same_requests(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    routers = "--routers=round_robin,shortest_queue,oracle_impact"
    small = ("--requests=120", "--seeds=3", "--load=0.9", "--scrape=0.1,5")
    shutil.copytree(shipped_folder("pretrained:paper-3"), tmp_path / "trained" / "two" / "first")
    train_two_seeds(tmp_path / "trained" / "two" / "second")
    trained = f"--trained={tmp_path / 'trained'}"
    assert program_of("arena")("--worlds=", f"--world={WORLD}", routers, trained, *small, f"--out={tmp_path}") == 0
    found = json.loads((tmp_path / "arena.json").read_text())
    assert [(each["world"], each["scrape_s"]) for each in found["tables"]] == [("two", 0.1), ("two", 5.0)]
    names = {"round_robin", "shortest_queue", "impact_greedy", "first", "second"}
    varied = {f"{name}{rule}" for name in names for rule in ("+admission", "+no_drop")}
    for table in found["tables"]:
        assert {row["router"] for row in table["rows"]} == names | varied | {"oracle_impact"}
        dropped = {row["router"]: row["drop_rate"] for row in table["rows"]}
        assert dropped["impact_greedy+no_drop"] <= dropped["impact_greedy"]
        rates = {row["rate_per_s"] for row in table["rows"]}
        assert len(rates) == 1
        assert {gain["against"] for gain in table["gains"]} == {"impact_greedy"}
    page = (tmp_path / "arena.md").read_text()
    assert "## two, metrics read every 5 s" in page and "second@" not in page
    assert page in capsys.readouterr().out
    of_second = {row["training_seed"] for row in found["tables"][0]["rows"] if row["router"] == "second+no_drop"}
    assert of_second == {0, 1}
    assert (tmp_path / "arena.csv").read_text().count("\n") == 1 + 2 * 3 * (16 + 3)


@pytest.mark.slow
def test_an_arena_that_was_killed_goes_on_and_another_one_begins_anew(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "arena.json"

    def tables(*flags: str) -> list[dict[str, Any]]:
        small = ("--routers=round_robin", "--norefusing", "--requests=60", "--load=0.9", "--scrape=0.1,5")
        assert program_of("arena")("--worlds=", f"--world={WORLD}", *small, *flags, f"--out={tmp_path}") == 0
        return json.loads(path.read_text())["tables"]

    whole = tables("--seeds=2")
    for flags, goes_on in (("--seeds=2", True), ("--seeds=1", False)):
        killed = json.loads(path.read_text())
        del killed["tables"][1:]
        killed["tables"][0]["rows"][0]["qos"] = 0.125
        path.write_text(json.dumps(killed))
        again = tables(flags)
        assert len(again) == 2 and (again[0]["rows"][0]["qos"] == 0.125) == goes_on
        assert (again[1] == whole[1]) == goes_on


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--worlds=mars", "--worlds=mars: choose some of paper-3"),
        ("--world=--preset=paper-3", "--world=--preset=paper-3: give NAME: FLAGS"),
        ("--world=mine: --engine=tgi", "--world=mine: "),
        ("--world=paper-3: --preset=paper-6", "give NAME: FLAGS with a name of its own"),
        ("--scrape=0", "--scrape=0: give numbers above 0"),
        ("--routers=fastest", "router 'fastest' is unknown"),
    ],
)
def test_bad_input_is_one_line(
    flag: str, message: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(program_of("arena"), capsys, message, "--worlds=paper-3", flag, f"--out={tmp_path}")
