"""Notebooks are kept without outputs, open in Colab, and run from a clean kernel; build/notebooks then shows them."""

from __future__ import annotations

import json
import os
import pathlib

import pytest

from qos_jax.io.files import write_whole

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/qos-jax/qos_jax/blob/main/notebooks"
METADATA = {"kernelspec", "language_info"}
LONGEST_S = 900  # of a cell; on two quiet cores a whole notebook takes less than 180

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


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
def test_it_opens_in_colab_and_installs_what_it_needs(path: pathlib.Path) -> None:
    first, second = ("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"][:2])
    assert f"]({COLAB}/{path.name})" in first
    assert "%pip install" in second
    assert 'if importlib.util.find_spec("qos_jax") is None' in second


@pytest.mark.slow
@each_notebook
def test_it_runs_from_a_clean_kernel(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    import nbclient  # here, as the extra is not needed for the others
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
