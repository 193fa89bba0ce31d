"""Fast compilation for tests that compile the same programs repeatedly: without optimisation, and with a cache."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

OPTIONS = {"jax_disable_most_optimizations": True, "jax_persistent_cache_min_compile_time_secs": 0.0}


@contextlib.contextmanager
def quick_compilation(cache: pathlib.Path) -> Iterator[dict[str, str]]:
    """Caches compiled programs in a folder; yields the environment variables with which other processes share it."""
    options = OPTIONS | {"jax_compilation_cache_dir": str(cache)}
    before = {name: jax.config.values[name] for name in options}
    _configure(options)
    try:
        yield {name.upper(): str(value) for name, value in options.items()}
    finally:
        _configure(before)


def _configure(options: dict) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # an open cache keeps its folder
