"""Notebooks are kept without outputs, install qos_jax and leave jax alone, and run; build/notebooks then shows them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import tempfile
from typing import Any

import pytest

from qos_jax.io.files import write_whole

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/OWNER/qos_jax/blob/main/notebooks"
METADATA = {"kernelspec", "language_info"}
LONGEST_S = 900  # of a cell; on two quiet cores a whole notebook takes less than 180

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _cells(path: pathlib.Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def _run_install_cell(path: pathlib.Path, source: str) -> list[list[str]]:
    """Runs the cell as IPython would, and returns the arguments of each call of pip."""
    code = re.sub(r"%pip (.*)", r"pip(f'\1')", _cells(path)[2]["source"])
    calls: list[str] = []
    exec(compile(code, path.name, "exec"), {"SOURCE": source, "pip": calls.append})
    return [[part.strip('"') for part in re.findall(r'"[^"]*"|\S+', call)] for call in calls]


def test_there_are_notebooks() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@each_notebook
def test_no_output_is_kept(path: pathlib.Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert set(notebook["metadata"]) <= METADATA
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@each_notebook
def test_the_readme_opens_it_in_colab(path: pathlib.Path) -> None:
    assert f": {COLAB}/{path.name}\n" in (ROOT / "README.md").read_text(encoding="utf-8")


@each_notebook
def test_only_the_reader_names_an_address(path: pathlib.Path) -> None:
    title, source, install, *_ = _cells(path)
    assert title["source"].startswith("# ")
    assert source["source"].splitlines()[-1] == 'SOURCE = ""'
    assert [cell["source"] for cell in _cells(NOTEBOOKS[0])[1:3]] == [source["source"], install["source"]]
    addresses = re.findall(r"https?://[^\s)]+", "".join(cell["source"] for cell in _cells(path)))
    assert addresses == ["https://github.com/OWNER/qos_jax"]


@each_notebook
def test_nothing_is_installed_where_qos_jax_is(path: pathlib.Path) -> None:
    assert _run_install_cell(path, "qos_jax.whl") == []


@each_notebook
def test_it_installs_qos_jax_beside_the_jax_that_is_installed(
    path: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssertionError, match="set SOURCE"):
        _run_install_cell(path, "")
    [arguments] = _run_install_cell(path, "my wheels/qos_jax.whl")
    assert arguments[:2] == ["install", "--constraint"]
    assert arguments[3:] == ["my wheels/qos_jax.whl"]
    kept = pathlib.Path(arguments[2]).read_text(encoding="utf-8").split()
    assert sorted(kept) == [f"{name}=={importlib.metadata.version(name)}" for name in ("jax", "jaxlib")]


@pytest.mark.slow
@each_notebook
def test_it_runs_from_a_clean_kernel(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    import nbclient  # not at the top, since only this test needs the extra
    import nbconvert
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=LONGEST_S, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    found = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    client.execute(env=os.environ | {"PYTHONPATH": found})
    page, _ = nbconvert.HTMLExporter(embed_images=True).from_notebook_node(notebook)
    write_whole(ROOT / "build" / "notebooks" / f"{path.stem}.html", page)
    printed = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert "all is well" in printed
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
