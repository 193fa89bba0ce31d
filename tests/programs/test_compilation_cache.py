"""Compiled programs are kept whole, and a program that is killed spoils nothing."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import zlib

import pytest

from qos_jax.programs import compilation_cache

PROGRAM = """
import sys
from qos_jax.programs.compilation_cache import use_cache
import jax
use_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
print(jax.jit(lambda x: x * float(sys.argv[1]) + 1.0)(2.0), flush=True)
if len(sys.argv) > 2:
    sys.stdin.read()
"""


def start(home: pathlib.Path, *arguments: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def compiled(home: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (home / "qos_jax").iterdir() if file.is_file()}


def test_a_program_leaves_what_it_compiled_and_no_folder_of_its_own(tmp_path):
    program = start(tmp_path, "3")
    assert float(program.communicate()[0]) == 7.0
    first = compiled(tmp_path)
    assert first
    assert not list((tmp_path / "qos_jax").glob("run-*"))
    again = start(tmp_path, "3")
    assert float(again.communicate()[0]) == 7.0
    assert compiled(tmp_path) == first  # nothing was compiled anew


def test_a_killed_program_adds_nothing(tmp_path):
    with start(tmp_path, "3") as program:
        assert program.wait() == 0
    before = compiled(tmp_path)
    program = start(tmp_path, "5", "wait")
    assert float(program.stdout.readline()) == 11.0  # compiled by now
    program.send_signal(signal.SIGKILL)
    program.communicate()
    assert compiled(tmp_path) == before


def test_only_what_reads_back_whole_is_shared(tmp_path):
    """As after a full disk: files that are empty or cut, its own and shared ones."""
    own, shared, whole = tmp_path / "own", tmp_path / "shared", zlib.compress(bytes(range(256)) * 20)
    for folder in (own, shared):
        folder.mkdir()
        for name, content in (("whole", whole), ("empty", b""), ("cut", whole[:-9]), ("other", b"\x28\xb5\x2f\xfd..")):
            (folder / f"{folder.name}-{name}-cache").write_bytes(content)
        (folder / "both-cache").write_bytes(whole)
    compilation_cache._link(shared, own)
    assert {file.name for file in shared.iterdir()} == {"shared-whole-cache", "both-cache"}
    compilation_cache._link(own, shared)
    assert {file.name for file in shared.iterdir()} == {"own-whole-cache", "shared-whole-cache", "both-cache"}
    assert all(file.read_bytes() == whole for file in shared.iterdir())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_home_that_cannot_be_written_to_is_no_error(tmp_path):
    tmp_path.chmod(0o500)
    assert float(start(tmp_path, "3").communicate()[0]) == 7.0
