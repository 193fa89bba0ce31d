"""Fast compilation for tests that compile the same programs repeatedly: without optimisation, and all of them kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

OPTIONS = {"jax_disable_most_optimizations": True, "jax_persistent_cache_min_compile_time_secs": 0.0}


@contextlib.contextmanager
def quick_compilation() -> Iterator[dict[str, str]]:
    """Keeps all compiled programs in the folder of this run of the tests.

    Yields the environment variables with which other processes compile in the same way; they have the folder already.
    """
    before = {name: jax.config.values[name] for name in OPTIONS}
    _configure(OPTIONS)
    try:
        yield {name.upper(): str(value) for name, value in OPTIONS.items()}
    finally:
        _configure(before)


def _configure(options: dict) -> None:
    if any(jax.config.values[name] != options[name] for name in OPTIONS):
        jax.clear_caches()  # what was compiled in the other way rounds differently
    for name, value in options.items():
        jax.config.update(name, value)
