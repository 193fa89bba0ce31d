"""Studies are made once, go on after a kill, and their page reads well in a browser."""

from __future__ import annotations

import html.parser
import json
import pathlib
import re
import subprocess

import pytest

from qos_jax import InputError
from qos_jax.programs import reproduce, studies
from qos_jax.programs.studies import Budget, Study, World
from qos_jax.training.config import TrainingConfig
from tests.helpers.browser import BROWSER_FLAGS, CHROMIUM
from tests.helpers.programs import program_of

_ROUNDING = 1e-6  # of float32 metrics
BUDGET = Budget(requests=40, seeds=2, most_steps=1, most_training_seeds=1, ends_only=False)
SMALL = Study(
    "Small",
    "Which of two is better?",
    (World("Poisson"), World("bursts", fields={"arrivals": "gamma:3"})),
    loads=(0.9,),
    routers=("shortest_queue", "round_robin"),
    hindsight=True,
)


@pytest.fixture(scope="module")
def program():
    yield program_of("reproduce")


@pytest.fixture(scope="module")
def made(program, tmp_path_factory) -> pathlib.Path:
    """The folder of one small study."""
    out = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(studies.STUDIES, "small", SMALL)
        patch.setitem(studies.BUDGETS, "quick", BUDGET)
        assert program("--figure=small", "--budget=quick", f"--out={out}") == 0
    return out


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(studies.STUDIES, "small", SMALL)
    monkeypatch.setitem(studies.BUDGETS, "quick", BUDGET)


@pytest.mark.slow
def test_a_study_is_written_in_every_form(made):
    study = json.loads((made / "small.json").read_text())
    assert {row["world"] for row in study["rows"]} == {"Poisson", "bursts"}
    assert len(study["rows"]) == 2 * (2 + 2) * BUDGET.seeds
    assert (made / "small.csv").read_text().count("\n") == 1 + len(study["rows"])
    assert (made / "small.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_nobody_beats_the_plan_and_the_plan_not_the_bound(made):
    rows = json.loads((made / "small.json").read_text())["rows"]
    for world, seed in {(row["world"], row["seed"]) for row in rows}:
        qos = {row["router"]: row["qos"] for row in rows if (row["world"], row["seed"]) == (world, seed)}
        assert max(qos["shortest_queue"], qos["round_robin"]) <= qos["hindsight_plan"] + _ROUNDING
        assert qos["hindsight_plan"] <= qos["upper_bound"] + _ROUNDING


@pytest.mark.slow
def test_what_is_there_is_not_made_again_but_what_is_missing_is(made, small, program):
    kept, lost = sorted((made / "cells").iterdir())
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    assert program("--figure=small", "--budget=quick", f"--out={made}") == 0
    assert kept.stat().st_mtime_ns == before
    assert json.loads(lost.read_text())["rows"] == json.loads(content)["rows"]


@pytest.mark.slow
def test_a_damaged_cell_is_named(made, small, program, capsys):
    cell = min((made / "cells").iterdir())
    content = cell.read_bytes()
    cell.write_bytes(content[: len(content) // 2])
    assert program("--figure=small", "--budget=quick", f"--out={made}") == 2
    assert str(cell) in capsys.readouterr().err
    cell.write_bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        b"[1]",
        b"5",
        b"{}",
        b"\xff",
        b"[" * 5000,
        b'{"asked": {}, "rows": 5}',
        b'{"asked": {}, "rows": [5]}',
        b'{"rows": []}',
    ],
)
def test_a_cell_that_is_none_is_refused_with_its_path(content, tmp_path):
    (tmp_path / "cell.json").write_bytes(content)
    with pytest.raises(InputError, match=r"cell\.json.*; delete the file, which is damaged"):
        reproduce._read(tmp_path / "cell.json")


def test_an_unknown_study_is_refused(program, capsys, tmp_path):
    assert program("--figure=nothing", f"--out={tmp_path}") == 2
    assert "--figure=nothing" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["nothing", "edge-64"])
def test_a_preset_without_a_world_is_refused(program, capsys, tmp_path, preset):
    assert program("--figure=load", f"--presets={preset}", f"--out={tmp_path}/new") == 2
    assert f"--presets={preset}: choose all, or some of paper-3, paper-6, edge-8" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_study_may_be_of_some_presets_only(tmp_path):
    """So that each of several machines makes a part; whoever has all parts in one folder makes the whole of them."""
    presets = ("paper-3", "paper-6", "edge-8")
    parts = [reproduce._Maker(tmp_path, "full", [preset]).worlds("load") for preset in presets]
    assert [[world.preset for world in part] for part in parts] == [[preset] for preset in presets]
    assert [world for part in parts for world in part] == reproduce._Maker(tmp_path, "full").worlds("load")


def test_every_study_names_what_there_is():
    for study in studies.STUDIES.values():
        for world in study.worlds:
            assert {reproduce._run_of(name) for name in world.trained} <= set(studies.TRAINED)
            reproduce.make(world.preset, rate_per_s=1.0, **world.fields)


class _Title(html.parser.HTMLParser):
    text = ""

    def handle_starttag(self, tag, attrs):
        if tag == "body":
            self.text = dict(attrs).get("data-width", "")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.slow
def test_the_page_fits_a_browser_and_raises_no_error_there(made, tmp_path, width):
    script = "<script>document.body.dataset.width = document.documentElement.scrollWidth</script></body>"
    page = tmp_path / "page.html"
    page.write_text((made / "index.html").read_text().replace("</body>", script))
    command = [CHROMIUM, *BROWSER_FLAGS, f"--user-data-dir={tmp_path}/profile", f"--window-size={width},900"]
    shown = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in shown.stderr
    title = _Title()
    title.feed(shown.stdout)
    assert int(title.text) <= max(width, 500)  # Chromium has no window below 500 pixels
    assert not re.search(r"(src|href)=.https?:", shown.stdout)


def test_fields_that_came_later_do_not_void_a_cell():
    training = TrainingConfig().to_dict()
    early = json.loads(json.dumps(training))
    del early["agent"]["network"]["later_prompts"], early["agent"]["copies"]
    assert reproduce._upgraded({"trained": {"mvr": early}}) == {"trained": {"mvr": training}}
    early["steps"] += 1
    assert reproduce._upgraded({"trained": {"mvr": early}}) != {"trained": {"mvr": training}}
