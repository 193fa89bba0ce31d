"""Shared fixtures, and how programs are compiled for tests."""

import gc
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("jit", deadline=None)  # the first example of a test compiles
settings.load_profile("jit")


def pytest_configure(config: pytest.Config) -> None:
    """Has programs compile fast and not well: most tests run one for a moment after compiling it for seconds.

    Without XLA's fusion emitters compilation takes three quarters of the time. The default suite leaves out nearly all
    optimisation too. Slow tests run longer, so they are optimised, but not to the utmost. Each program is compiled once
    in all processes, and in those that they start, as all keep them in a folder that belongs to this run alone.
    """
    slow = config.option.markexpr == "slow"
    flags = (os.environ.get("XLA_FLAGS", ""), "--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join((*flags, "--xla_backend_optimization_level=2") if slow else flags)
    if not slow:
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers inherit that of the process that starts them
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.stash.setdefault(_CACHE, tempfile.TemporaryDirectory()).name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"
    gc.set_threshold(20_000, 20, 50)  # tracing allocates much that stays, so to look for garbage often is in vain


_CACHE = pytest.StashKey[tempfile.TemporaryDirectory]()
_MOST_BYTES = 2 << 30  # that a worker may take


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Frees compiled programs after a module that leaves many: a worker would else keep gigabytes of them to the end.

    Few are kept, since most modules need the same small ones.
    """
    yield
    if _resident_bytes() > _MOST_BYTES:
        import jax

        jax.clear_caches()
        gc.collect()


def _resident_bytes() -> int:
    """The memory that this process takes; more than any limit where the system does not say it."""
    try:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return sys.maxsize


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of measured data; tests that need it are skipped where it is not there."""
    folder = os.environ.get("QOS_JAX_DATA")
    if not folder:
        pytest.skip("QOS_JAX_DATA is not set: the measured traces and tables are not at hand")
    return pathlib.Path(folder)
