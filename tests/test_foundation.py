"""The lock files agree with setup.py, and the package has one version."""

import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import qos_jax

ROOT = pathlib.Path(__file__).parent.parent
MAIN_LOCK = "requirements.lock"
SB3_LOCK = "requirements-sb3.lock"
MINILM_LOCK = "requirements-minilm.lock"  # installed for its files, without its requirements


def locked_versions(file_name: str) -> dict[str, Version]:
    lines = (ROOT / file_name).read_text(encoding="utf-8").splitlines()
    not_plain = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)]
    assert not not_plain, f"{file_name}: not name==version: {not_plain}"
    pairs = [line.split("==") for line in lines]
    versions = {canonicalize_name(name): Version(version) for name, version in pairs}
    assert len(versions) == len(lines), f"{file_name}: a package is listed twice"
    return versions


def requirements(extra: str) -> list[Requirement]:
    """Returns the requirements in the metadata of the installed project."""
    declared = map(Requirement, importlib.metadata.requires("qos_jax") or [])
    return [needed for needed in declared if needed.marker is None or needed.marker.evaluate({"extra": extra})]


@pytest.mark.parametrize(
    ("extra", "file_names"),
    [
        ("", [MAIN_LOCK]),
        ("gym", [MAIN_LOCK]),
        ("gateway", [MAIN_LOCK]),
        ("notebooks", [MAIN_LOCK]),
        ("dev", [MAIN_LOCK]),
        ("sb3", [MAIN_LOCK, SB3_LOCK]),
    ],
)
def test_the_lock_covers_the_requirements(extra: str, file_names: list[str]) -> None:
    locked = {name: version for file_name in file_names for name, version in locked_versions(file_name).items()}
    for needed in requirements(extra):
        version = locked.get(canonicalize_name(needed.name))
        assert version is not None, f"{needed} is in none of {file_names}"
        assert needed.specifier.contains(version, prereleases=True), f"{needed} is locked at {version}"


def test_no_package_is_locked_twice() -> None:
    names = [name for file_name in (MAIN_LOCK, SB3_LOCK, MINILM_LOCK) for name in locked_versions(file_name)]
    assert len(names) == len(set(names))


def test_installed_versions_are_the_locked_ones() -> None:
    locked = locked_versions(MAIN_LOCK)
    assert {name: Version(importlib.metadata.version(name)) for name in locked} == locked


def test_package_and_metadata_have_one_version() -> None:
    assert importlib.metadata.version("qos_jax") == qos_jax.__version__


@pytest.mark.slow
def test_locked_packages_fit_together() -> None:
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    complaints = check.stdout.splitlines() if check.returncode else []
    assert not check.stderr, check.stderr
    apart = locked_versions(MINILM_LOCK) | locked_versions("requirements-gymnax.lock")  # without dependencies
    assert [line for line in complaints if canonicalize_name(line.split()[0]) not in apart] == []
