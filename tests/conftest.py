"""Shared fixtures."""

import os
import pathlib

import pytest
from hypothesis import settings

settings.register_profile("jit", deadline=None)  # the first example of a test compiles
settings.load_profile("jit")


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of measured data; tests that need it are skipped where it is not there."""
    folder = os.environ.get("QOS_JAX_DATA")
    if not folder:
        pytest.skip("QOS_JAX_DATA is not set: the measured traces and tables are not at hand")
    return pathlib.Path(folder)
