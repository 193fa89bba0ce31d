"""Recorded traces of LLM serving: scaling, cutting and looping of a trace, and its playback as a workload."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from qos_jax.errors import InputError
from qos_jax.workload.arrivals import ArrivalProcess, recorded
from qos_jax.workload.request_workload import RecordedLengths


@dataclasses.dataclass(frozen=True)
class ArrivalTrace:
    """J recorded requests in order of arrival, as NumPy arrays that are validated on construction.

    Raises:
        InputError: there is no request, the arrays differ in shape, times decrease, or a number is not finite and >= 0.
    """

    arrival_s: np.ndarray  # [J] float64 s since the trace began, not decreasing
    prompt_tokens: np.ndarray | None  # [J] int64 tokens; None where the file has arrivals only
    output_tokens: np.ndarray | None  # [J] int64 tokens, likewise
    source: str  # the file that was read, for messages and reports
    num_skipped: int = 0  # failed requests of the recording, which this trace leaves out
    num_delayed: int = (
        0  # requests whose file gives no time but a delay after an answer, which is taken to take no time
    )

    def __post_init__(self) -> None:
        """Validates the arrays and converts their types."""
        dtypes = {"arrival_s": np.float64, "prompt_tokens": np.int64, "output_tokens": np.int64}
        known = [name for name in dtypes if getattr(self, name) is not None]
        for name in known:
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtypes[name]))
        shapes = {name: getattr(self, name).shape for name in known}
        if self.arrival_s.ndim != 1 or len(set(shapes.values())) > 1:
            raise InputError(f"{self.source}: the fields of a trace must be vectors of one length, got {shapes}")
        if not self.arrival_s.size:
            raise InputError(f"{self.source}: holds no request")
        earlier_s = np.append(0.0, self.arrival_s[:-1])
        self._check(np.isfinite(self.arrival_s), "arrival_s", "must be finite")
        self._check(self.arrival_s >= earlier_s, "arrival_s", "must be 0 or more and never before the request above it")
        for name in known[1:]:
            self._check(getattr(self, name) >= 0, name, "must be 0 or more")

    def __len__(self) -> int:
        """Returns the number of requests."""
        return self.arrival_s.size

    @property
    def gaps_s(self) -> np.ndarray:
        """Gaps between successive arrivals [J - 1] s."""
        return np.diff(self.arrival_s)

    @property
    def rate_per_s(self) -> float:
        """Mean rate [requests/s] from the first arrival to the last.

        Raises:
            InputError: all requests arrive at the same time.
        """
        if not self.arrival_s[-1] > self.arrival_s[0]:
            raise InputError(f"{self.source}: {len(self)} requests at one instant have no rate")
        return float((len(self) - 1) / (self.arrival_s[-1] - self.arrival_s[0]))

    @property
    def gap_cv(self) -> float:
        """Coefficient of variation of the gaps; 1 for Poisson arrivals."""
        return float(np.std(self.gaps_s)) * self.rate_per_s

    def index_of_dispersion(self, window_s: float) -> float:
        """Returns the variance over the mean of the arrivals per window; 1 for Poisson arrivals.

        Args:
            window_s: length of a window [s].

        Raises:
            InputError: the trace does not span two windows.
        """
        span_s = self.arrival_s[-1] - self.arrival_s[0]
        if not 0 < 2 * window_s <= span_s:
            raise InputError(f"{self.source}: window_s must lie in (0, {span_s / 2:g}], half the span; got {window_s}")
        windows = int(span_s / window_s)
        edges = self.arrival_s[0] + window_s * np.arange(windows + 1)
        counts = np.diff(np.searchsorted(self.arrival_s, edges))
        return float(np.var(counts, ddof=1) / np.mean(counts))

    def scaled_to(self, rate_per_s: float) -> ArrivalTrace:
        """Returns the trace with time stretched to a mean rate of ``rate_per_s`` [requests/s]."""
        if not (math.isfinite(rate_per_s) and rate_per_s > 0):
            raise InputError(f"rate_per_s must be positive and finite, got {rate_per_s}")
        return dataclasses.replace(self, arrival_s=self.arrival_s * (self.rate_per_s / rate_per_s))

    def cut(self, start_s: float, stop_s: float) -> ArrivalTrace:
        """Returns the requests that arrive in [start_s, stop_s), with times relative to ``start_s``.

        Raises:
            InputError: there are none.
        """
        kept = slice(*np.searchsorted(self.arrival_s, (start_s, stop_s)))
        if not self.arrival_s[kept].size:
            raise InputError(
                f"{self.source}: no request arrives in [{start_s}, {stop_s}) s; "
                f"the arrivals are in [{self.arrival_s[0]}, {self.arrival_s[-1]}] s"
            )
        return self._select(kept, self.arrival_s[kept] - start_s)

    def halves(self) -> tuple[ArrivalTrace, ArrivalTrace]:
        """Returns the first and the second half of the time span, for training and test."""
        start_s, last_s = self.arrival_s[[0, -1]]
        middle_s = (start_s + last_s) / 2
        return self.cut(start_s, middle_s), self.cut(middle_s, np.nextafter(last_s, np.inf))

    def looped(self, num_requests: int) -> ArrivalTrace:
        """Returns ``num_requests`` requests: the trace repeated, with one mean gap between two rounds, or its begin."""
        if num_requests < 1:
            raise InputError(f"num_requests must be at least 1, got {num_requests}")
        rounds, index = np.divmod(np.arange(num_requests), len(self))
        round_s = len(self) / self.rate_per_s if rounds[-1] else 0.0
        return self._select(index, self.arrival_s[index] + rounds * round_s)

    def clipped(self, max_prompt_tokens: int, max_output_tokens: int) -> tuple[ArrivalTrace, int]:
        """Returns the trace with prompts and outputs clipped to these lengths, and the number of longer requests.

        Raises:
            InputError: a length is below 1, or the trace has no lengths.
        """
        if self.prompt_tokens is None or self.output_tokens is None:
            raise InputError(f"{self.source}: has arrivals only, must have the lengths of its requests to clip them")
        limits = {"max_prompt_tokens": max_prompt_tokens, "max_output_tokens": max_output_tokens}
        for name, limit in limits.items():
            if limit < 1:
                raise InputError(f"{name} must be at least 1, got {limit}")
        too_long = (self.prompt_tokens > max_prompt_tokens) | (self.output_tokens > max_output_tokens)
        clipped = dataclasses.replace(
            self,
            prompt_tokens=np.minimum(self.prompt_tokens, max_prompt_tokens),
            output_tokens=np.minimum(self.output_tokens, max_output_tokens),
        )
        return clipped, int(too_long.sum())

    def _check(self, legal: np.ndarray, name: str, rule: str) -> None:
        if not legal.all():
            first = int(np.argmin(legal))
            raise InputError(f"{self.source}: {name} of request {first + 1} is {getattr(self, name)[first]}, {rule}")

    def _select(self, index: np.ndarray | slice, arrival_s: np.ndarray) -> ArrivalTrace:
        return dataclasses.replace(
            self,
            arrival_s=arrival_s,
            prompt_tokens=None if self.prompt_tokens is None else self.prompt_tokens[index],
            output_tokens=None if self.output_tokens is None else self.output_tokens[index],
        )


def with_gaps(trace: ArrivalTrace, rate_per_s: float | None = None, random_start: bool = True) -> ArrivalProcess:
    """Returns an arrival process that plays the gaps of a trace in order, repeatedly.

    Args:
        trace: at least two arrivals at different times.
        rate_per_s: mean rate [requests/s] to scale to; by default the trace's own.
        random_start: start at a random gap instead of the first one.

    Raises:
        InputError: the trace has no rate, or ``rate_per_s`` is out of range.
    """
    return recorded(trace.gaps_s, trace.rate_per_s if rate_per_s is None else rate_per_s, random_start)


def recorded_lengths(trace: ArrivalTrace) -> RecordedLengths:
    """Returns the lengths of a trace, to go with the gaps of ``with_gaps``; an empty prompt or answer has one token.

    Raises:
        InputError: the trace has arrivals only, or less than two requests.
    """
    if trace.prompt_tokens is None or trace.output_tokens is None:
        raise InputError(f"{trace.source}: has arrivals only, must have the lengths of its requests (--trace_lengths)")
    if len(trace) < 2:
        raise InputError(f"{trace.source}: has {len(trace)} request, must have at least two")
    prompt_tokens, output_tokens = (np.maximum(each[1:], 1) for each in (trace.prompt_tokens, trace.output_tokens))
    return RecordedLengths(jnp.asarray(prompt_tokens, jnp.int32), jnp.asarray(output_tokens, jnp.int32))
