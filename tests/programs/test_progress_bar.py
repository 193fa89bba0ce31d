"""Progress: lines now and then where there is no terminal, and times left that know nothing of compilation."""

from __future__ import annotations

import math

import pytest

from qos_jax.programs import progress_bar
from qos_jax.programs.progress_bar import ProgressBar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until it is set."""
    now = [0.0]
    monkeypatch.setattr(progress_bar.time, "perf_counter", lambda: now[0])
    return now


def test_the_time_left_does_not_count_compilation(clock: list[float]) -> None:
    bar = ProgressBar(10, "router", "compiles")
    assert math.isnan(bar.left_s())
    clock[0] = 100.0  # of compilation, and of the first router
    bar.update(1)
    assert math.isnan(bar.left_s())
    clock[0] = 104.0
    bar.update(3)
    assert bar.left_s() == pytest.approx(7 * 2.0)


def test_lines_are_few_and_whole(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(1000, "step", "compiles") as bar:
        for done in range(1, 1001):
            clock[0] += 0.5
            bar.update(done, note="QoS 0.5")
    printed = capsys.readouterr().err
    assert "\r" not in printed
    lines = printed.splitlines()
    assert lines[0] == "compiles, 0 %, 0 of 1,000 steps"
    assert lines[-1] == "100 %, 1,000 of 1,000 steps, QoS 0.5"
    assert 500 / 10 - 2 <= len(lines) <= 500 / 10 + 2
    assert lines[1] == "2 %, 20 of 1,000 steps, QoS 0.5, 08:10 left"
