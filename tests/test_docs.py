"""What the documentation says can be done: its Python runs, its programs have the flags it names, its links lead on."""

from __future__ import annotations

import pathlib
import re
import runpy
import shlex
from typing import NamedTuple
from unittest import mock

import pytest
from absl import flags
from absl.testing import flagsaver

from qos_jax.fleet.profiles import GPUS, LLMS
from qos_jax.workload.constants import MIX_INSTRUCT
from qos_jax.worlds.presets import PRESETS

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "sh", "json", "text"}  # what is checked here, and what is only shown
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)(?P<path>[^)#]*)(?:#(?P<anchor>[^)]*))?\)")


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    body: str
    first_line: int


def blocks_of(page: pathlib.Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(m["language"], m["body"], 1 + text.count("\n", 0, m.start("body"))) for m in FENCE.finditer(text)]


def commands() -> list[str]:
    shell = "\n".join(block.body for page in PAGES for block in blocks_of(page) if block.language == "sh")
    return [line for line in shell.replace("\\\n", " ").splitlines() if line.startswith("python -m experiments.")]


def anchors_of(page: pathlib.Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_closed_and_of_a_known_language(page: pathlib.Path) -> None:
    blocks = blocks_of(page)
    assert {block.language for block in blocks} <= LANGUAGES
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_runs(page: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "docs"}
    with mock.patch.dict(PRESETS), mock.patch.dict(LLMS), mock.patch.dict(GPUS), mock.patch.dict(MIX_INSTRUCT):
        for block in blocks_of(page):
            if block.language == "python":
                source = "\n" * (block.first_line - 1) + block.body  # so that a traceback names the line of the page
                exec(compile(source, str(page), "exec"), namespace)


@pytest.mark.parametrize("command", commands())
def test_programs_have_the_flags_that_are_named(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")  # the benchmark sets it where it is not set, and this process lives on
    _, _, program, *arguments = shlex.split(command, comments=True)
    with flagsaver.flagsaver():  # forgets the new flags, so that the next program may have its own of the same name
        runpy.run_module(program)["define_flags"]()
        assert flags.FLAGS([program, *arguments]) == [program]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    for link in LINK.finditer(page.read_text(encoding="utf-8")):
        target = page.parent / link["path"] if link["path"] else page
        assert target.exists(), link[0]
        assert not link["anchor"] or link["anchor"] in anchors_of(target), link[0]
