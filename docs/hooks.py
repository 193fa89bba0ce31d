"""What the site needs beside Markdown: generated text, executed notebooks, and formulas without JavaScript."""

from __future__ import annotations

import html
import inspect
import pathlib
import re
from collections.abc import Callable
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import qos_jax
from qos_jax.programs.main import flags_reference

ROOT = pathlib.Path(__file__).parent.parent
EXECUTED = ROOT / "build" / "notebooks"  # written by the slow tests

_EXTERNAL_SCRIPT = re.compile(r'<script[^>]*\bsrc="https?://[^>]*>\s*</script>')
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
_MODULES = re.compile(r"<!-- modules of (?P<package>[\w.]+) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the executed notebooks, without the scripts that they would load from the network."""
    for path in sorted(EXECUTED.glob("*.html")):
        page = _EXTERNAL_SCRIPT.sub("", path.read_text(encoding="utf-8"))
        files.append(File.generated(config, f"notebooks/{path.name}", content=page))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Completes the pages that are generated."""
    complete = _GENERATED.get(page.file.src_uri, lambda markdown: markdown)
    return _MODULES.sub(lambda match: _modules(match["package"]), complete(markdown))


def on_page_content(content: str, **kwargs: Any) -> str:
    """Converts formulas to MathML, which browsers render themselves."""
    return _FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match["open"] == "[" else "inline"
    return str(convert(html.unescape(match["tex"]), display=display))


def _root_page(name: str) -> str:
    """Returns a file of the root as a page in ``about``."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](../")
    return text.replace("](CONTRIBUTING.md", "](contributing.md").replace("](CHANGELOG.md", "](changelog.md")


def _modules(package: str) -> str:
    """Returns the directives that document a package and all modules in it."""
    folder = ROOT / package.replace(".", "/")
    found = [path.relative_to(ROOT).with_suffix("").parts for path in sorted(folder.rglob("*.py"))]
    names = [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in found]
    return "\n\n".join(f"::: {name}" for name in names)


def _public_names() -> str:
    rows = ["| name | |", "|---|---|"]
    for name in qos_jax.__all__:
        value = getattr(qos_jax, name)
        summary, entry = "the presets by name", f"`{name}`"
        if hasattr(value, "__qualname__"):
            summary = (inspect.getdoc(value) or "").partition("\n")[0].replace("|", "\\|")
            entry = f"[`{name}`][{value.__module__}.{value.__qualname__}]"
        rows.append(f"| {entry} | {summary} |")
    return "\n".join(rows)


def _notebooks() -> str:
    names = [path.stem for path in sorted(EXECUTED.glob("*.html"))]
    if not names:
        return "This site was built without them."
    return "\n".join(f"- [{name}](../notebooks/{name}.html)" for name in names)


_GENERATED: dict[str, Callable[[str], str]] = {
    "about/changelog.md": lambda markdown: _root_page("CHANGELOG.md"),
    "about/contributing.md": lambda markdown: _root_page("CONTRIBUTING.md"),
    "reference/api/index.md": lambda markdown: markdown.replace("<!-- public names -->", _public_names()),
    "reference/flags.md": lambda markdown: markdown.replace("<!-- flags of the programs -->", flags_reference()),
    "start/notebooks.md": lambda markdown: markdown.replace("<!-- executed notebooks -->", _notebooks()),
}
