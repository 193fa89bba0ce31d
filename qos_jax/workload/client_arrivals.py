"""Production traffic as a superposition of clients, whose rates and burstiness change from bin to bin (ServeGen).

Source: alibaba/ServeGen (Apache-2.0), "ServeGen: Workload Characterization and Generation of Large Language Model
Serving in Production", NSDI 2026. It describes a client by its rate, by the coefficient of variation (CV) of its gaps
and by the family of their law, gamma or Weibull, in bins of 10 minutes.

Within a bin a client is a stationary renewal process, in operational time: the time that its rate turns into gaps of
mean 1. The law of a gap is ``G^power Gamma(c) / Gamma(c + power)`` with G of the gamma law of concentration c. For
gamma gaps c is CV^-2 and ``power`` 1, for Weibull gaps c is 1 and ``power`` the inverse of the shape, so one formula
serves both.

Each bin begins anew, with the law of the rest of a gap at a random moment: a uniform share of a gap that is sampled in
proportion to its length, ``U H^power Gamma(c) / Gamma(c + power)`` with H of concentration ``c + power``. Every client
then has in every bin exactly its mean rate and the law of its gaps. A gap that went on into the next bin would not do:
where one is met at a CV of 20, 200 mean gaps of it are left, so the bins after it would lack requests.

Times are whole numbers of 2^-32 of a bin, so they are precise at any rate and in runs of any length.
"""

from __future__ import annotations

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from qos_jax.errors import InputError
from qos_jax.io.files import numbers_in, read_columns
from qos_jax.workload.ranges import RATE_RANGE_PER_S, check_within, checked_rate

GAMMA, WEIBULL, NONE = 1, 2, 0  # families of the gaps
CV_RANGE = (0.01, 1000.0)
BIN_RANGE_S = (1.0, 86_400.0)
MAX_ENTRIES = 2**22  # clients x bins, 48 MiB of tables
_BIN_S = 600.0  # the default
_HOUR_S = 3600.0
_LATER = np.uint32(2**32 - 1)  # the time of an arrival that is not in this bin
_ALMOST_A_BIN = 1.0 - 2.0**-24  # the largest float32 below 1, whose time is a uint32
_MAX_POWER = 16.0  # of Weibull gaps, at a CV of 24,000


@dataclasses.dataclass(frozen=True)
class ClientTraffic:
    """Traffic of C clients in B bins of time, as NumPy arrays that are validated on construction.

    Raises:
        InputError: the arrays are not [C, B] of one shape or too large, a number is out of range, or no client sends.
    """

    rate_per_s: np.ndarray  # [C, B] float64 requests/s
    cv: np.ndarray  # [C, B] float64, of the gaps; counts where the rate is above 0, as the family does
    family: np.ndarray  # [C, B] int64: GAMMA, WEIBULL or, of a client that does not send, NONE
    bin_s: float = _BIN_S  # s, length of a bin
    source: str = "clients"  # the file that was read, for messages

    def __post_init__(self) -> None:
        """Validates the arrays and converts their types."""
        for name in ("rate_per_s", "cv", "family"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))
        shapes = {name: getattr(self, name).shape for name in ("rate_per_s", "cv", "family")}
        if self.rate_per_s.ndim != 2 or not self.rate_per_s.size or len(set(shapes.values())) > 1:
            raise InputError(
                f"{self.source}: must have arrays of one shape [clients, bins], none of them 0; got {shapes}"
            )
        if self.rate_per_s.size > MAX_ENTRIES:
            raise InputError(
                f"{self.source}: has {self.rate_per_s.size} clients x bins, must have {MAX_ENTRIES} or less"
            )
        check_within(f"{self.source}: length of a bin in s", self.bin_s, *BIN_RANGE_S)
        highest = RATE_RANGE_PER_S[1]
        self._check("rate_per_s", (self.rate_per_s >= 0) & (self.rate_per_s <= highest), f"from 0 to {highest:g}")
        self._check("family", np.isin(self.family, (NONE, GAMMA, WEIBULL)), "1 (gamma), 2 (Weibull) or 0 (none)")
        silent = self.rate_per_s == 0
        self._check("family", silent | (self.family != NONE), "1 (gamma) or 2 (Weibull) where the rate is above 0")
        legal = (self.cv >= CV_RANGE[0]) & (self.cv <= CV_RANGE[1])
        self._check("cv", silent | legal, f"from {CV_RANGE[0]:g} to {CV_RANGE[1]:g} where the rate is above 0")
        if silent.all():
            raise InputError(f"{self.source}: rate_per_s is 0 everywhere, must be above 0 for some client and bin")
        object.__setattr__(self, "family", self.family.astype(np.int64))

    @property
    def mean_rate_per_s(self) -> float:
        """Mean rate [requests/s] of all clients together, over the bins in which one of them sends."""
        totals = self.rate_per_s.sum(0)
        return float(totals[totals > 0].mean())

    def in_hour(self, hour: float) -> ClientTraffic:
        """Returns the bins that begin in one hour, counted from 0 at the first bin.

        Raises:
            InputError: there is no such hour, or no client sends in it.
        """
        hours = (np.arange(self.rate_per_s.shape[1]) * self.bin_s) // _HOUR_S
        kept = hours == hour
        if not kept.any():
            raise InputError(f"{self.source}: hour is {hour:g}, must be a whole number from 0 to {hours[-1]:g}")
        if not self.rate_per_s[:, kept].any():
            raise InputError(f"{self.source}: no client sends in hour {hour:g}, must be another one")
        parts = {name: getattr(self, name)[:, kept] for name in ("rate_per_s", "cv", "family")}
        return dataclasses.replace(self, **parts)

    def _check(self, name: str, legal: np.ndarray, rule: str) -> None:
        if not legal.all():
            client, time = np.argwhere(~legal)[0]
            value = getattr(self, name)[client, time]
            raise InputError(f"{self.source}: {name}[{client}, {time}] is {value:g}, must be {rule}")


def read_clients(path: str | os.PathLike[str]) -> ClientTraffic:
    """Returns the clients in an ``.npz`` with ``rate_per_s``, ``cv`` and ``family``, each [C, B]; nothing is executed.

    ``t_s`` [B], the begin of each bin in s, is optional; without it, or with one bin, bins have 600 s.

    Raises:
        InputError: the file is missing or damaged, lacks a column, or holds an illegal value.
    """
    columns = read_columns(path, ("rate_per_s", "cv", "family"), ("t_s",))
    numbers = {name: numbers_in(path, name, column).astype(np.float64) for name, column in columns.items()}
    rate_per_s, cv, family = (numbers[name] for name in ("rate_per_s", "cv", "family"))
    bin_s = _bin_length_s(path, numbers["t_s"], rate_per_s.shape[-1]) if "t_s" in numbers else _BIN_S
    return ClientTraffic(rate_per_s, cv, family, bin_s, str(path))


def _bin_length_s(path: str | os.PathLike[str], t_s: np.ndarray, bins: int) -> float:
    """Returns the steps of the begins of the bins, or the default for one bin."""
    steps_s = np.diff(t_s)
    even = t_s.shape == (bins,) and np.all(np.isfinite(t_s)) and np.all(np.abs(steps_s - steps_s[:1]) < 1e-3)
    if not even:
        shown = np.array2string(t_s, threshold=6, edgeitems=3)
        raise InputError(f"{path}: t_s is {shown}, must be the begin of each of {bins} bins in s, at even steps")
    return float(steps_s[0]) if steps_s.size else _BIN_S


@struct.dataclass
class ClientState:
    """State of the clients at the last arrival."""

    bin: Array  # [] int32, the present bin
    time: Array  # [] uint32, in 2^-32 of the bin
    is_met: Array  # [] bool: the next arrivals are sampled; at time 0 that is left to the first request
    next_time: Array  # [C] uint32, the next arrival of each client, likewise; 2^32 - 1 if it is in a later bin


@struct.dataclass
class ClientArrivals:
    """The superposition of C clients over B bins, which follow each other in a loop; ``superposition`` builds it."""

    rate_per_s: Array  # [] requests/s of all clients together, the mean over the bins
    relative_rates: Array  # [B, C] rates relative to that mean
    concentration: Array  # [B, C] of the gamma variate whose power is a gap
    power: Array  # [B, C]
    bin_s: Array  # [] s
    random_start: Array  # [] bool: start at a random moment, else at the beginning of the first bin

    def with_rate(self, rate_per_s: ArrayLike) -> ClientArrivals:
        """Returns the same traffic at another mean rate [requests/s]; shares of the clients and bins do not change.

        Raises:
            InputError: the rate is outside ``RATE_RANGE_PER_S``; a traced rate is not checked.
        """
        return self.replace(rate_per_s=checked_rate(rate_per_s, self.power.dtype))  # type: ignore[attr-defined]

    def init(self, key: Array) -> ClientState:
        """Returns the state at time 0."""
        bin_key, time_key = jax.random.split(key)
        bin_ = jax.random.randint(bin_key, (), 0, self.power.shape[0], jnp.int32)
        time = jax.random.bits(time_key, (), jnp.uint32)
        return ClientState(
            bin=jnp.where(self.random_start, bin_, 0),
            time=jnp.where(self.random_start, time, jnp.zeros_like(time)),
            is_met=jnp.asarray(False),
            next_time=jnp.full(self.power.shape[1], _LATER),
        )

    def next_gap(self, key: Array, state: ClientState) -> tuple[Array, ClientState]:
        """Returns the time to the next arrival [s] and the state at that arrival."""
        gap_key, bins_key = jax.random.split(key)
        passed_s, state = self._pass_bins(bins_key, state)
        client = jnp.argmin(state.next_time)
        time = state.next_time[client]
        numbers = (each[state.bin, client] for each in (self.relative_rates, self.concentration, self.power))
        relative_rate, concentration, power = numbers
        variate = jax.random.loggamma(gap_key, concentration, dtype=power.dtype)
        own = self._time_after(time, power * variate, relative_rate, concentration, power)
        gap_s = passed_s + self._seconds(time - state.time)
        return gap_s, ClientState(state.bin, time, state.is_met, state.next_time.at[client].set(own))

    def _pass_bins(self, key: Array, state: ClientState) -> tuple[Array, ClientState]:
        """Returns the time to the beginning of the bin of the next arrival [s], 0 if that is this one, and the state.

        The loop meets the clients at time 0 and in each bin that begins before the arrival, so mostly not at all.
        """

        def nobody_left(carry: tuple[Array, Array, ClientState]) -> Array:
            return jnp.min(carry[2].next_time) == _LATER

        def meet(carry: tuple[Array, Array, ClientState]) -> tuple[Array, Array, ClientState]:
            trip, passed_s, state = carry
            rest_s = jnp.where(state.time == 0, self.bin_s, self._seconds(jnp.uint32(0) - state.time))
            bin_ = jnp.where(state.is_met, (state.bin + 1) % self.power.shape[0], state.bin)
            time = jnp.where(state.is_met, jnp.zeros_like(state.time), state.time)
            next_time = self._met(jax.random.fold_in(key, trip), bin_, time)
            passed_s += jnp.where(state.is_met, rest_s, 0.0)
            return trip + 1, passed_s, ClientState(bin_, time, jnp.ones_like(state.is_met), next_time)

        start = (jnp.int32(0), jnp.zeros_like(self.bin_s), state)
        _, passed_s, state = jax.lax.while_loop(nobody_left, meet, start)
        return passed_s, state

    def _met(self, key: Array, bin_: Array, time: Array) -> Array:
        """Returns the next arrivals [C] of stationary clients that are met at a time of a bin."""
        variate_key, share_key = jax.random.split(key)
        relative_rate, concentration, power = self.relative_rates[bin_], self.concentration[bin_], self.power[bin_]
        variate = jax.random.loggamma(variate_key, concentration + power, dtype=power.dtype)
        log_share = -jax.random.exponential(share_key, power.shape, power.dtype)
        return self._time_after(time, power * variate + log_share, relative_rate, concentration, power)

    def _time_after(
        self, time: Array, log_gap: Array, relative_rate: Array, concentration: Array, power: Array
    ) -> Array:
        """Returns the time in the bin [uint32] after a gap, given as its logarithm before it is scaled to mean 1."""
        log_mean = jax.lax.lgamma(concentration + power) - jax.lax.lgamma(concentration)
        rate_per_bin = self.rate_per_s * self.bin_s * relative_rate
        bins = jnp.where(rate_per_bin > 0, jnp.exp(log_gap - log_mean) / rate_per_bin, jnp.inf)
        later = time + jnp.round(jnp.minimum(bins, _ALMOST_A_BIN) * 2.0**32).astype(jnp.uint32)
        return jnp.where((bins >= _ALMOST_A_BIN) | (later < time), _LATER, later)  # an overflow begins again at 0

    def _seconds(self, duration: Array) -> Array:
        return duration.astype(self.bin_s.dtype) * (self.bin_s * 2.0**-32)


def superposition(
    traffic: ClientTraffic, rate_per_s: float | None = None, *, random_start: bool = True
) -> ClientArrivals:
    """Returns arrivals from all clients, each with its rate and the CV and family of its gaps in each bin.

    Bins in which no client sends are holes of the recording and left out.

    Args:
        traffic: the clients.
        rate_per_s: mean rate [requests/s] over the bins that all rates are scaled to; by default the traffic's own.
        random_start: start at a random moment instead of at the beginning of the first bin.

    Raises:
        InputError: the rate is outside ``RATE_RANGE_PER_S``.
    """
    totals = traffic.rate_per_s.sum(0)
    rates, cv, family = (each[:, totals > 0].T for each in (traffic.rate_per_s, traffic.cv, traffic.family))
    cv = np.where(rates > 0, cv, 1.0)
    is_weibull = (family == WEIBULL) & (rates > 0)
    mean_per_s = traffic.mean_rate_per_s
    return ClientArrivals(
        rate_per_s=checked_rate(mean_per_s if rate_per_s is None else rate_per_s, float),
        relative_rates=jnp.asarray(rates / mean_per_s, float),
        concentration=jnp.asarray(np.where(is_weibull, 1.0, cv**-2), float),
        power=jnp.asarray(np.where(is_weibull, weibull_power(cv), 1.0), float),
        bin_s=jnp.asarray(traffic.bin_s, float),
        random_start=jnp.asarray(random_start),
    )


def servegen(rate_per_s: float, file: str, hour: float | None = None, *, random_start: bool = True) -> ClientArrivals:
    """Returns arrivals from the clients in a file for ``read_clients``.

    Args:
        rate_per_s: the mean rate [requests/s] over the bins that are played.
        file: its name.
        hour: play the bins of this hour only, counted from 0 at the file's first bin; all bins if left out.
        random_start: start at a random moment instead of at the beginning of the first bin.

    Raises:
        InputError: the file cannot be used, it has no such hour, or the rate is outside ``RATE_RANGE_PER_S``.
    """
    traffic = read_clients(file)
    return superposition(traffic if hour is None else traffic.in_hour(hour), rate_per_s, random_start=random_start)


def weibull_power(cv: np.ndarray) -> np.ndarray:
    """Returns the inverse of the shape of Weibull laws with these coefficients of variation in ``CV_RANGE``.

    It solves ``1 + CV^2 = Gamma(1 + 2 power) / Gamma(1 + power)^2`` by bisection.
    """
    from scipy import special  # not needed by other laws

    low, high = np.zeros_like(cv), np.full_like(cv, _MAX_POWER)
    for _ in range(60):
        middle = (low + high) / 2
        too_low = special.gammaln(1 + 2 * middle) - 2 * special.gammaln(1 + middle) < np.log1p(cv**2)
        low, high = np.where(too_low, middle, low), np.where(too_low, high, middle)
    return (low + high) / 2
