"""Routers that are part of the package: they load, are small, and reach what their cards say."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from qos_jax import InputError, evaluate, load_router, make, scenarios
from qos_jax.training.shipped import PREFIX, shipped_card, shipped_folder, shipped_names
from tests.helpers.programs import program_of


def test_there_is_one_for_the_main_preset() -> None:
    assert "paper-3" in shipped_names()


@pytest.mark.parametrize("name", shipped_names())
def test_it_is_small_and_says_how_it_was_made(name: str) -> None:
    files = [path for path in shipped_folder(PREFIX + name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 300_000
    card = shipped_card(PREFIX + name)
    assert f"--preset={name}" in card["trained"]
    assert card["versions"]["jax"]
    assert min(card["seeds"]) >= 1000


def test_another_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"router 'pretrained:mars' is unknown; choose from pretrained:"):
        load_router("pretrained:mars")


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_names())
def test_it_reaches_what_its_card_says(name: str) -> None:
    card, (env, params) = shipped_card(PREFIX + name), make(name)
    seeds, published = card["seeds"][:4], card["qos"]["0.9"][:4]
    asked = scenarios(params, [0.9], seeds)
    runs = evaluate(env, params, [load_router(PREFIX + name)], asked, card["requests"], warmup=card["warmup"])
    assert np.mean([run.metrics["qos"] for run in runs]) == pytest.approx(np.mean(published), abs=0.005)


@pytest.mark.slow
def test_programs_take_it_by_name(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    routers = "--routers=shortest_queue,pretrained:paper-3"
    few = ("--load=0.9", "--requests=100", "--seeds=2")
    assert program_of("evaluate")("--preset=paper-3", routers, *few, f"--out={tmp_path}") == 0
    assert "pretrained_paper_3" in capsys.readouterr().out
