"""Progress of a program: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType

from tqdm import tqdm

_BAR = "{desc}{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {unit}{postfix}"
_LINE_EVERY_S, _LINE_EVERY_SHARE = 10.0, 0.01


class ProgressBar:
    """Shows how much is done, and the time left by the speed since compilation ended.

    Where standard error is no terminal, a line is written at most every 10 s and every 1 %.
    """

    def __init__(self, total: int, unit: str, doing: str = "") -> None:
        """Shows a bar at 0 of ``total``; ``doing`` is what happens now, such as compilation."""
        self.total, self.done, self.doing, self.unit = total, 0, doing, unit
        self.first: tuple[int, float] | None = None  # done, and when, at the first update after compilation
        self.line = (-math.inf, -math.inf)  # when the last line was written, and the share done then
        self.bar = tqdm(
            total=total, unit=f"{unit}s", bar_format=_BAR, desc=f"{doing} " if doing else "", unit_scale=total > 9999,
            dynamic_ncols=True, disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._show("")

    def __enter__(self) -> ProgressBar:
        """Returns the bar."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the bar."""
        self.bar.close()

    def update(self, done: int, *, total: int | None = None, note: str = "", doing: str = "") -> None:
        """Moves the bar.

        Args:
          done: how much is done in all.
          total: of how much, if that has changed.
          note: shown behind the numbers.
          doing: what happens now.
        """
        self.total, self.doing = total or self.total, doing
        if done > self.done and self.first is None:
            self.first = (done, time.perf_counter())
        self.done = done
        left_s = self.left_s()
        left = "" if math.isnan(left_s) or done >= self.total else f"{tqdm.format_interval(left_s)} left"
        self._show(", ".join(part for part in (note, left) if part))

    def left_s(self) -> float:
        """Returns the seconds left, by the speed since the first update; NaN until there is one."""
        if self.first is None or self.done <= self.first[0]:
            return math.nan
        return (self.total - self.done) * (time.perf_counter() - self.first[1]) / (self.done - self.first[0])

    def _show(self, note: str) -> None:
        if not self.bar.disable:
            self.bar.total, self.bar.n = self.total, self.done
            self.bar.desc = f"{self.doing} " if self.doing else ""
            self.bar.set_postfix_str(note)
            return
        now, share = time.perf_counter(), self.done / max(self.total, 1)
        due = now - self.line[0] >= _LINE_EVERY_S and share - self.line[1] >= _LINE_EVERY_SHARE
        if due or (share >= 1 and self.line[1] < 1):
            self.line = (now, share)
            parts = [self.doing, f"{100 * share:.0f} %, {self.done:,} of {self.total:,} {self.unit}s", note]
            print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)
