"""Files that appear whole, under any name that the file system takes."""

from __future__ import annotations

import os
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qos_jax.io.files import shortened, write_whole


@pytest.mark.parametrize("name", ["a", 255 * "x", 127 * "ä", os.fsdecode(b"run-\xff")], ids=ascii)
def test_a_file_is_written_under_any_name_and_nothing_beside_it(tmp_path: pathlib.Path, name: str) -> None:
    write_whole(tmp_path / name, f"--out={name}")
    (path,) = tmp_path.iterdir()
    assert path.name == name
    assert path.read_text(encoding="utf-8") == f"--out={name}".encode(errors="backslashreplace").decode()


@given(st.text(st.characters(codec="utf-8"), min_size=1), st.text(max_size=2), st.integers(20, 60))
def test_a_shortened_name_fits_and_is_still_another_than_others(name: str, ending: str, most: int) -> None:
    one, other = (shortened(each, most) for each in (20 * name, 20 * name + ending + "."))
    assert max(len(os.fsencode(one)), len(os.fsencode(other))) <= most
    assert one != other
    assert shortened(one, most) == one
