"""A router as a file: it decides as the router does, with its memory, and what is no such file is refused."""

from __future__ import annotations

import functools
import io
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from qos_jax import InputError
from qos_jax.gateway.decision import AVAILABLE, NUM_EXPERT_ROWS, SCORE, TOKENS, Decider, DecisionProgram, program_of
from qos_jax.gateway.exported import load_program, save_program
from qos_jax.gateway.ledger import NUM_COLUMNS
from qos_jax.routers.heuristics import round_robin
from tests.helpers.gateways import SLOTS, profile

EXPERTS = 3


@functools.cache
def program() -> DecisionProgram:
    """A router with a memory."""
    return program_of(round_robin(), profile(EXPERTS), SLOTS)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("exported") / "router.npz"
    save_program(path, program(), {"command": "test"})
    return path


def decisions(decider: Decider, number: int) -> list[tuple[int | None, list[float]]]:
    experts = np.zeros((NUM_EXPERT_ROWS, EXPERTS))
    experts[AVAILABLE], experts[SCORE], experts[TOKENS] = 1, [0.2, 0.5, 0.7], 30
    ledger = np.zeros((NUM_COLUMNS, EXPERTS, SLOTS))
    taken = [
        decider.decide(ledger, experts, prompt_tokens=9, limit_s=0.1, may_drop=True, rates_per_s=np.ones(3))
        for _ in range(number)
    ]
    return [(each.expert, each.estimate.qos.tolist()) for each in taken]


def test_it_decides_as_the_router_does(path: pathlib.Path) -> None:
    loaded = Decider(load_program(path, EXPERTS))
    assert loaded.name == "round_robin"
    found, expected = decisions(loaded, 7), decisions(Decider(program()), 7)
    assert found == expected
    assert {expert for expert, _ in found} == {0, 1, 2}  # its memory goes on


def test_it_is_for_one_fleet(path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"router.npz: is for 3 experts, must be for the 4 of the fleet"):
        load_program(path, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"program": np.zeros(40, np.uint8)}, "holds no program of a router"),
        ({"header": np.array(["{}"])}, "header.name is None, must be of the type str"),
        ({"header": {"format": 9}}, "format is 9, must be 2"),
        ({"header": {"slots": 3}}, "holds no program of a router"),
        ({"header": {"memory": []}}, "holds no program of a router"),
        ({"header": {"memory": [{"shape": [-4]}]}}, "holds no program of a router"),
        ({"kv_blocks": None}, "no column kv_blocks"),
    ],
)
def test_what_is_no_such_file_is_refused(path: pathlib.Path, tmp_path: pathlib.Path, change: Any, message: str) -> None:
    columns: dict[str, Any] = dict(np.load(path))
    for name, value in change.items():
        if isinstance(value, dict):
            columns[name] = np.array([json.dumps(json.loads(str(columns[name][0])) | value)])
        elif value is None:
            del columns[name]
        else:
            columns[name] = value
    packed = io.BytesIO()
    np.savez(packed, **columns)
    (tmp_path / "router.npz").write_bytes(packed.getvalue())
    with pytest.raises(InputError) as error:
        load_program(tmp_path / "router.npz", EXPERTS)
    assert message in str(error.value)
