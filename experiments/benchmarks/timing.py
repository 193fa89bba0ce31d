"""Time that calls take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

_CALLS = 20


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """Returns the result, wall-clock seconds and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(function())
    return result, time.perf_counter() - wall, time.process_time() - cpu


def median_s(function: Callable[..., Any], *arguments: Any) -> float:
    """Returns the median time [s] of 20 calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    return statistics.median(timed(lambda: function(*arguments))[1] for _ in range(_CALLS))
