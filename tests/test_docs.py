"""The documentation: its Python runs, its commands have the flags they name, its links and figures are right."""

from __future__ import annotations

import contextlib
import importlib
import pathlib
import re
import shlex
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import pytest
import yaml
from absl.flags import FlagValues

from qos_jax import load_fleet, make, routers
from qos_jax.agent import networks, targets
from qos_jax.fleet.catalogue import DEVICES, LLMS
from qos_jax.programs import app
from qos_jax.programs.fleet import catalogue_text
from qos_jax.programs.main import PROGRAMS
from qos_jax.workload import arrivals
from qos_jax.workload.constants import MIX_INSTRUCT
from qos_jax.worlds.presets import PRESETS
from tests.helpers.quick_compilation import quick_compilation

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
LANGUAGES = {"python", "sh", "json", "toml", "text"}  # of which text is only shown
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\((?!https?://)(?P<path>[^)#]*)(?:#(?P<anchor>[^)]*))?\)")
STUDIES_OF_GAINS = [DOCS / "results" / f"{name}.md" for name in ("load", "edge")]
REGISTRIES = (
    PRESETS,
    LLMS,
    DEVICES,
    MIX_INSTRUCT,
    routers._registered,
    arrivals._LAWS,
    networks._NETWORKS,
    targets._TARGETS,
)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    body: str
    first_line: int


def blocks_of(page: pathlib.Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(m["language"], m["body"], 1 + text.count("\n", 0, m.start("body"))) for m in FENCE.finditer(text)]


def shell_of(page: pathlib.Path) -> Iterator[str]:
    """Yields what a page shows as shell code: fenced blocks, and code within lines."""
    yield from (block.body for block in blocks_of(page) if block.language == "sh")
    yield from CODE_SPAN.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


def commands() -> list[str]:
    """Returns all commands of the programs, without duplicates; loop variables have the value 1."""
    found = []
    for code in (code for page in PAGES for code in shell_of(page)):
        for line in re.split(r"\n|; |&& ", code.replace("\\\n", " ")):
            line = re.sub(r"\$[a-z]\b", "1", line.strip().removeprefix("do "))
            if re.match(r"(\w+='[^']*' )?(qos-jax [a-z]|python -m experiments\.[a-z])", line):
                found.append(line)
    return list(dict.fromkeys(found))


def program_of(words: list[str]) -> tuple[Callable[[FlagValues], None], list[str]]:
    """Returns what defines the flags of a program, and its arguments."""
    if "=" in words[0]:  # an environment variable
        words = words[1:]
    if words[0] == "qos-jax":
        return PROGRAMS[words[1]].define, PROGRAMS[words[1]].as_flags(words[2:])
    module = words[2]
    launched = module.removeprefix("experiments.").replace("_", "-")
    return PROGRAMS[launched].define if launched in PROGRAMS else importlib.import_module(module).define, words[3:]


def anchors_of(page: pathlib.Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def table_of_gains() -> list[str]:
    """Returns the README's table, from the tables of gains of two studies."""
    fleets: dict[str, dict[str, str]] = {}
    for page in STUDIES_OF_GAINS:
        section = page.read_text(encoding="utf-8").split("## Gains over the best heuristic\n")[1].split("##")[0]
        table = [
            [cell.strip() for cell in row.strip("| ").split("|")] for row in section.splitlines() if row[:1] == "|"
        ]
        for _, world, load, _, qos, gain, *_ in table[2:]:
            if load not in ("0.3", "0.5"):  # which one of the studies has
                fleets.setdefault(world.partition(",")[0], {})[f"load {load}"] = f"{qos}: {gain}"
    lines = [" | ".join(["| fleet", *next(iter(fleets.values()))]) + " |"]
    lines += [" | ".join([f"| {fleet}", *cells.values()]) + " |" for fleet, cells in fleets.items()]
    return lines


@each_page
def test_every_block_is_closed_and_of_a_known_language(page: pathlib.Path) -> None:
    blocks = blocks_of(page)
    assert {block.language for block in blocks} <= LANGUAGES
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks)


@pytest.fixture(scope="module")
def quickly() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.mark.parametrize(
    "page",
    [page if page == ROOT / "README.md" else pytest.param(page, marks=pytest.mark.slow) for page in PAGES],
    ids=lambda page: str(page.relative_to(ROOT)),
)
@pytest.mark.usefixtures("quickly")
def test_python_runs(page: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "docs"}
    with contextlib.ExitStack() as stack:
        for registry in REGISTRIES:
            stack.enter_context(mock.patch.dict(registry))
        for block in blocks_of(page):
            if block.language == "python":
                source = "\n" * (block.first_line - 1) + block.body  # so that a traceback names the line of the page
                exec(compile(source, str(page), "exec"), namespace)


@each_page
def test_fleet_files_are_legal(page: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for number, block in enumerate(block for block in blocks_of(page) if block.language == "toml"):
        (tmp_path / f"{number}.toml").write_text(block.body)
        make(load_fleet(tmp_path / f"{number}.toml"), rate_per_s=1.0)


def test_the_catalogue_is_the_one_that_is_shipped() -> None:
    page = (DOCS / "reference" / "catalogue.md").read_text(encoding="utf-8")
    assert catalogue_text() in page


@pytest.mark.parametrize("command", commands())
def test_programs_have_the_flags_that_are_named(command: str) -> None:
    define, arguments = program_of(shlex.split(command, comments=True))
    values = FlagValues()
    define(values)
    if arguments not in ([], ["--help"]):
        app.parse(values, arguments)


@each_page
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    for link in LINK.finditer(page.read_text(encoding="utf-8")):
        target = page.parent / link["path"] if link["path"] else page
        assert target.exists(), link[0]
        assert not link["anchor"] or link["anchor"] in anchors_of(target), link[0]


def test_every_page_is_in_the_navigation() -> None:
    def pages_in(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict | list):
            for each in entry.values() if isinstance(entry, dict) else entry:
                yield from pages_in(each)

    listed = set(pages_in(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    numbered = {path.relative_to(DOCS).as_posix() for path in (DOCS / "decisions").glob("[0-9]*.md")}  # by their index
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - numbered == listed


def test_readme_is_short_and_its_table_is_generated() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(readme) < 100
    rows = [line for line in readme if line.startswith(("| fleet", *(f"| {name} " for name in PRESETS)))]
    assert rows == table_of_gains()
