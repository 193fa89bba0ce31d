"""The wheel holds all that is needed: installed elsewhere, it works without the tree."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")


@pytest.mark.slow
def test_the_wheel_runs_the_readme_outside_of_the_tree(tmp_path: pathlib.Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([*PIP, "wheel", "--no-deps", f"--wheel-dir={tmp_path}", str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("qos_jax-*.whl")
    subprocess.run([*PIP, "install", "--no-deps", f"--target={site}", str(wheel)], check=True)
    assert (site / "qos_jax" / "py.typed").exists()
    assert not (site / "tests").exists() and not (site / "experiments").exists()

    where = f"import sys; sys.path.insert(0, {str(site)!r}); import qos_jax; assert {str(site)!r} in qos_jax.__file__\n"
    blocks = README_BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    done = subprocess.run(
        [sys.executable, "-c", where + "\n".join(blocks)], cwd=elsewhere, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

    command = [sys.executable, "-m", "qos_jax.programs", "evaluate", "--preset=paper-3", "--routers=round_robin"]
    command += ["--load=0.5", "--requests=100", "--seeds=1", f"--out={elsewhere}/out"]
    done = subprocess.run(
        command, cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "out" / "report.html").exists()


def test_the_licence_of_every_dependency_is_listed() -> None:
    listed = (ROOT / "docs" / "about" / "licences.md").read_text(encoding="utf-8").lower().replace("_", "-")
    locked = (ROOT / "requirements.lock").read_text(encoding="utf-8").split()
    missing = [line for line in locked if f"| {line.split('==')[0].lower().replace('_', '-')} " not in listed]
    assert not missing
    assert "unknown" not in listed


def test_the_lock_has_plain_lines_and_all_lower_bounds_are_met() -> None:
    locked = dict(
        line.split("==") for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines() if line
    )
    normal = {name.lower().replace("_", "-"): version for name, version in locked.items()}
    bounds = re.findall(r'"([A-Za-z0-9_-]+)>=([0-9.a-z]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert len(bounds) > 15
    for name, least in bounds:
        if name.lower() in normal:
            assert _numbers(normal[name.lower()]) >= _numbers(least), name


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
