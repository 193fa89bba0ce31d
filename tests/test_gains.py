"""The table of gains: paired, over the best heuristic of each load, with one line for what cannot be read."""

from __future__ import annotations

import json
import pathlib

import pytest

from experiments import gains
from qos_jax.errors import InputError

QOS = {  # by router and evaluation seed
    ("steady", "heuristic"): (0.5, 0.6),
    ("poor", "heuristic"): (0.1, 0.9),
    ("run-0", "learned"): (0.6, 0.7),
    ("run-1", "learned"): (0.7, 0.8),
    ("oracle_impact", "oracle"): (0.9, 0.9),
}


def written(folder: pathlib.Path, kinds: set[str]) -> str:
    rows = [
        {"router": name, "kind": kind, "load": 0.9, "seed": seed, "qos": qos}
        for (name, kind), each in QOS.items()
        if kind in kinds
        for seed, qos in enumerate(each)
    ]
    (folder / "results.json").write_text(json.dumps({"rows": rows[::-1]}))
    return str(folder)


def test_gains_are_paired_with_the_best_heuristic(tmp_path: pathlib.Path) -> None:
    line = gains.table([written(tmp_path, {"heuristic", "learned", "oracle"})]).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    # Both evaluation seeds gain .15 on the mean of the training seeds, so the interval has no width.
    assert cells[1:] == ["0.9", "steady 0.550", "0.700", "+0.150 [+0.150, +0.150]", "+0.100 to +0.200", "0.900"]


def test_without_a_learned_router_there_is_nothing_to_gain(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="no learned router"):
        gains.table([written(tmp_path, {"heuristic"})])


def test_what_is_no_evaluation_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match=r"results\.json is no"):
        gains.table([str(tmp_path)])
