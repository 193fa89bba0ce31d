"""Arrival processes. The numbers of all built-in laws are traced, so that laws mix in one compiled program.

In operational time the gaps between arrivals are independent with mean 1: exponential (Poisson), gamma, or the gaps of
a recording. Operational time runs at the rate ``rate_per_s * multiplier(t) * (1 + amplitude sin(2 pi t / period_s))``,
where a two-state Markov chain sets the multiplier. Poisson, gamma, Markov-modulated, sinusoidal and recorded arrivals
are therefore values of one pytree, not types. Traffic of many clients is a type of its own, ``client_arrivals``.

The state holds no clock. The remaining sojourn of the chain is memoryless, so it is sampled anew at every arrival, and
the phase is an integer that counts 2^-32 of a period and wraps. Float32 is therefore precise in runs of any length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from qos_jax.errors import InputError
from qos_jax.workload.client_arrivals import servegen
from qos_jax.workload.ranges import RATE_RANGE_PER_S, check_within, checked_rate

NUM_QUANTILES = 257
QUANTILES_REACH = 16.0  # float32 samples of unit exponentials reach 23 log 2 = 15.94
CV_RANGE = (0.1, 10.0)  # where tabulated gamma gaps have the right CV to 0.5 %
MAX_AMPLITUDE = 0.95
DURATION_RANGE_S = (1e-3, 1e9)  # of a mean sojourn or a period
NEVER_S = 1e20  # a mean sojourn longer than any run; infinity would turn the phase into NaN
LAGUERRE_STEPS = 6  # enough for float64 precision at every phase, gap and legal amplitude


@runtime_checkable
class Arrivals(Protocol):
    """An arrival process: a pytree of traced numbers whose methods work under jit and vmap.

    ``ArrivalProcess`` is one. Another law may be any other pytree with these methods. Such a process works everywhere
    but in a mixture: ``sample_worlds`` stacks the processes of all environments, which must then have one structure.
    """

    def init(self, key: Array) -> Any:
        """Returns the state at time 0, a pytree of constant structure and shapes."""

    def next_gap(self, key: Array, state: Any) -> tuple[Array, Any]:
        """Returns the time to the next arrival [s] and the state at that arrival."""

    def with_rate(self, rate_per_s: ArrayLike) -> Arrivals:
        """Returns the same process at another mean rate [requests/s], which may be traced."""


@struct.dataclass
class ArrivalState:
    """State of the process at the last arrival."""

    chain: Array  # [] int32, state of the Markov chain: 0 calm, 1 burst
    phase: Array  # [] uint32, position in the sinusoidal period, in 2^-32 of the period
    recorded_index: Array  # [] int32, index of the next recorded gap


@struct.dataclass
class ArrivalProcess:
    """A renewal process in operational time; build it with the functions below.

    Processes of all laws but recordings have the same structure and shapes, so that they stack and vmap together.
    Recordings stack with recordings of the same length.
    """

    rate_per_s: Array  # [] requests/s, the mean
    gap_quantiles: Array  # [NUM_QUANTILES] gap of mean 1 at ``quantile_grid()``
    multipliers: Array  # [2] rate in each state of the chain, relative to the mean rate
    mean_sojourns_s: Array  # [2] s
    amplitude: Array  # [] of the sinusoid, relative to the mean rate
    period_s: Array  # [] s
    random_start: Array  # [] bool: start at a random point of the period and of the recording, else at their beginning
    recorded_gaps: Array | None = None  # [G] gaps of mean 1, played in order and looped, instead of sampled gaps

    def with_rate(self, rate_per_s: ArrayLike) -> ArrivalProcess:
        """Returns the same process at another mean rate [requests/s]; sojourns and period do not change.

        Raises:
            InputError: the rate is outside ``RATE_RANGE_PER_S``; a traced rate is not checked.
        """
        return self.replace(rate_per_s=checked_rate(rate_per_s, self.gap_quantiles.dtype))  # type: ignore[attr-defined]

    def init(self, key: Array) -> ArrivalState:
        """Returns the state at time 0; the chain starts in its stationary distribution."""
        chain_key, phase_key, index_key = jax.random.split(key, 3)
        burst_share = self.mean_sojourns_s[1] / (self.mean_sojourns_s[0] + self.mean_sojourns_s[1])
        phase = jax.random.bits(phase_key, (), jnp.uint32)
        index = jnp.int32(0)
        if self.recorded_gaps is not None:
            index = jax.random.randint(index_key, (), 0, self.recorded_gaps.shape[0], jnp.int32)
        return ArrivalState(
            chain=jax.random.bernoulli(chain_key, burst_share).astype(jnp.int32),
            phase=jnp.where(self.random_start, phase, jnp.zeros_like(phase)),
            recorded_index=jnp.where(self.random_start, index, 0),
        )

    def next_gap(self, key: Array, state: ArrivalState) -> tuple[Array, ArrivalState]:
        """Returns the time to the next arrival [s] and the state at that arrival."""
        draws_key, switches_key = jax.random.split(key)
        unit_gap, unit_sojourn = jax.random.exponential(draws_key, (2,), self.gap_quantiles.dtype)
        if self.recorded_gaps is None:
            gap, index = self._renewal_gap(unit_gap), state.recorded_index
        else:
            gap = self.recorded_gaps[state.recorded_index]
            index = (state.recorded_index + 1) % self.recorded_gaps.shape[0]
        left_s = unit_sojourn * self.mean_sojourns_s[state.chain]
        work_s, passed_s, chain, phase = self._pass_sojourns(switches_key, gap / self.rate_per_s, left_s, state)
        rest_s = self._integral_inverse_s(work_s / self.multipliers[chain], phase)
        return passed_s + rest_s, ArrivalState(chain, self._advance(phase, rest_s), index)

    def _pass_sojourns(
        self, key: Array, work_s: Array, left_s: Array, state: ArrivalState
    ) -> tuple[Array, Array, Array, Array]:
        """Returns the work left for the last sojourn [s at the mean rate], the time before it [s], its chain and phase.

        The loop runs once for each switch of the chain before the arrival, so not at all without modulation.
        """

        def ends_first(carry: tuple[Array, ...]) -> Array:
            _, work_s, _, chain, phase, left_s = carry
            return work_s >= self.multipliers[chain] * self._integral_s(left_s, phase)

        def switch(carry: tuple[Array, ...]) -> tuple[Array, ...]:
            trip, work_s, passed_s, chain, phase, left_s = carry
            work_s -= self.multipliers[chain] * self._integral_s(left_s, phase)
            sojourn_s = jax.random.exponential(jax.random.fold_in(key, trip), (), left_s.dtype)
            sojourn_s *= self.mean_sojourns_s[1 - chain]
            return trip + 1, work_s, passed_s + left_s, 1 - chain, self._advance(phase, left_s), sojourn_s

        start: tuple[Array, ...] = (jnp.int32(0), work_s, jnp.zeros_like(work_s), state.chain, state.phase, left_s)
        _, work_s, passed_s, chain, phase, _ = jax.lax.while_loop(ends_first, switch, start)
        return work_s, passed_s, chain, phase

    def _renewal_gap(self, unit_gap: Array) -> Array:
        """Returns the tabulated gap at a unit exponential variate; the last line of the table is extrapolated."""
        intervals = NUM_QUANTILES - 1
        step = QUANTILES_REACH / intervals**2
        i = jnp.minimum(jnp.sqrt(unit_gap / step).astype(jnp.int32), intervals - 1)
        knot = i.astype(unit_gap.dtype)
        weight = (unit_gap / step - knot * knot) / (2.0 * knot + 1.0)
        low, high = self.gap_quantiles[i], self.gap_quantiles[i + 1]
        return low + weight * (high - low)

    def _integral_s(self, duration_s: Array, phase: Array) -> Array:
        """Returns the integral [s] of the sinusoidal factor over a duration that starts at a phase."""
        periods = duration_s / self.period_s
        return duration_s + self.period_s * self._excess(periods - jnp.floor(periods), self._cycles(phase))

    def _integral_inverse_s(self, work_s: Array, phase: Array) -> Array:
        """Returns the duration [s] over which the sinusoidal factor integrates to ``work_s``.

        The equation is Kepler's, with the amplitude as eccentricity. Laguerre's iteration converges from any start.
        """
        start = self._cycles(phase)
        whole = jnp.floor(work_s / self.period_s)  # over a whole period the factor averages 1
        target = work_s / self.period_s - whole
        slope = 1.0 + self.amplitude * jnp.sin(2 * jnp.pi * start)
        bound = self.amplitude / jnp.pi
        low = jnp.maximum(target / (1.0 + self.amplitude), target - bound)
        high = jnp.minimum(target / (1.0 - self.amplitude), target + bound)

        def step(_: int, x: Array) -> Array:
            error = x + self._excess(x, start) - target
            angle = 2 * jnp.pi * (start + x)
            slope = 1.0 + self.amplitude * jnp.sin(angle)
            curvature = 2 * jnp.pi * self.amplitude * jnp.cos(angle)
            root = jnp.sqrt(jnp.abs(16.0 * slope**2 - 20.0 * error * curvature))
            return jnp.clip(x - 5.0 * error / (slope + root), low, high)

        steps = jnp.where(self.amplitude > 0.0, LAGUERRE_STEPS, 0)  # a constant rate needs none
        return (whole + jax.lax.fori_loop(0, steps, step, jnp.clip(target / slope, low, high))) * self.period_s

    def _excess(self, x: Array, start: Array) -> Array:
        """Returns the integral of the sinusoid alone over x in [0, 1] periods, as a product, to avoid cancellation."""
        return self.amplitude / jnp.pi * jnp.sin(jnp.pi * x) * jnp.sin(jnp.pi * (2 * start + x))

    def _cycles(self, phase: Array) -> Array:
        return phase.astype(self.gap_quantiles.dtype) * 2.0**-32

    def _advance(self, phase: Array, duration_s: Array) -> Array:
        periods = duration_s / self.period_s
        return phase + jnp.round((periods - jnp.floor(periods)) * 2.0**32).astype(jnp.uint32)


def quantile_grid() -> np.ndarray:
    """Returns the unit exponential variates [NUM_QUANTILES] at which gaps are tabulated; they are dense near 0.

    The variate x is the quantile 1 - exp(-x) of a law.
    """
    return QUANTILES_REACH * np.linspace(0.0, 1.0, NUM_QUANTILES) ** 2


def poisson(rate_per_s: float) -> ArrivalProcess:
    """Returns Poisson arrivals.

    Raises:
        InputError: the rate lies outside ``RATE_RANGE_PER_S``.
    """
    return _process(rate_per_s)


def gamma(rate_per_s: float, cv: float) -> ArrivalProcess:
    """Returns arrivals with independent gamma gaps of this coefficient of variation (1 is Poisson).

    Raises:
        InputError: the rate is outside ``RATE_RANGE_PER_S`` or the CV outside ``CV_RANGE``.
    """
    from scipy import stats  # not needed by the other laws

    check_within("cv", cv, *CV_RANGE)
    shape, grid = cv**-2, quantile_grid()
    near, far = stats.gamma.ppf(-np.expm1(-grid), shape), stats.gamma.isf(np.exp(-grid), shape)
    return renewal(rate_per_s, np.where(grid < 1.0, near, far))  # each from the tail whose probability is not near 1


def renewal(rate_per_s: float, gaps: ArrayLike) -> ArrivalProcess:
    """Returns arrivals with independent gaps of any law.

    Args:
        rate_per_s: the mean rate [requests/s].
        gaps: [NUM_QUANTILES] gap at each unit exponential variate of ``quantile_grid()``, in any unit, as gaps are
            scaled to the rate.

    Raises:
        InputError: the gaps are not finite, negative, decreasing or all 0, or the rate is outside
            ``RATE_RANGE_PER_S``.
    """
    gaps, grid = np.asarray(gaps, np.float64), quantile_grid()
    legal = gaps.shape == grid.shape and np.all(np.isfinite(gaps)) and gaps[0] >= 0 and np.all(np.diff(gaps) >= 0)
    if not legal or gaps[-1] == 0:
        raise InputError(f"gaps must be [{NUM_QUANTILES}] finite numbers >= 0 that do not decrease, some above 0")
    slopes = np.diff(gaps) / np.diff(grid)
    survival = np.exp(-grid)
    mean = gaps[0] + np.sum(slopes * (survival[:-1] - survival[1:])) + slopes[-1] * survival[-1]
    return _process(rate_per_s, gap_quantiles=gaps / mean)  # the mean of interpolated gaps, so the mean rate is exact


def mmpp(rate_per_s: float, burst: float = 4.0, burst_s: float = 30.0, calm_s: float | None = None) -> ArrivalProcess:
    """Returns Poisson arrivals whose rate a two-state Markov chain switches (MMPP).

    Args:
        rate_per_s: the mean rate [requests/s] over both states.
        burst: the rate in a burst over the rate in a calm, at least 1.
        burst_s: mean length of a burst [s].
        calm_s: mean length of a calm [s]; that of a burst if left out.

    Raises:
        InputError: an argument is not finite or out of range.
    """
    calm_s = burst_s if calm_s is None else calm_s
    check_within("burst", burst, 1.0, 1e6)
    check_within("burst_s", burst_s, *DURATION_RANGE_S)
    check_within("calm_s", calm_s, *DURATION_RANGE_S)
    calm_multiplier = (calm_s + burst_s) / (calm_s + burst * burst_s)
    multipliers = np.array([calm_multiplier, burst * calm_multiplier])
    return _process(rate_per_s, multipliers=multipliers, mean_sojourns_s=np.array([calm_s, burst_s]))


def sinusoidal(
    rate_per_s: float, amplitude: float = 0.5, period_s: float = 600.0, *, random_start: bool = True
) -> ArrivalProcess:
    """Returns Poisson arrivals at the drifting rate ``rate_per_s (1 + amplitude sin(2 pi t / period_s))``.

    Args:
        rate_per_s: the mean rate [requests/s].
        amplitude: in [0, ``MAX_AMPLITUDE``].
        period_s: s.
        random_start: start at a random point of the period instead of at t = 0.

    Raises:
        InputError: an argument is not finite or out of range.
    """
    check_within("amplitude", amplitude, 0.0, MAX_AMPLITUDE)
    check_within("period_s", period_s, *DURATION_RANGE_S)
    return _process(rate_per_s, amplitude=amplitude, period_s=period_s, random_start=random_start)


def recorded(
    gaps_s: Sequence[float] | np.ndarray, rate_per_s: float | None = None, random_start: bool = True
) -> ArrivalProcess:
    """Returns arrivals that play recorded gaps in order, in a loop.

    Args:
        gaps_s: [G] s, at least one of them positive.
        rate_per_s: mean rate [requests/s] that the gaps are scaled to; that of the recording by default.
        random_start: start at a random point of the recording instead of at its first gap.

    Raises:
        InputError: the gaps are not a vector of finite numbers >= 0 with a positive mean, or the rate is out of range.
    """
    gaps = np.asarray(gaps_s, np.float64)
    if gaps.ndim != 1 or not gaps.size or not np.all(np.isfinite(gaps)) or np.any(gaps < 0) or not np.any(gaps > 0):
        raise InputError(
            f"gaps_s must be a vector of finite gaps >= 0 s, one of them positive; got shape {gaps.shape}"
            + (f" with values in [{gaps.min()}, {gaps.max()}]" if gaps.size else "")
        )
    mean_s = gaps.mean()
    return _process(
        1.0 / mean_s if rate_per_s is None else rate_per_s, recorded_gaps=gaps / mean_s, random_start=random_start
    )


_LAWS: dict[str, Callable[..., Arrivals]] = {
    "poisson": poisson,
    "gamma": gamma,
    "mmpp": mmpp,
    "sinusoidal": sinusoidal,
    "servegen": servegen,
}
_BUILT_IN = tuple(_LAWS)


def register_arrivals(name: str, parser: Callable[..., Arrivals]) -> None:
    """Registers a law of arrivals under a name for ``parse_arrivals``, and so for ``--arrivals`` and ``qos_jax.make``.

    A later registration under the same name replaces the earlier one.

    Args:
        name: letters, digits and underscores.
        parser: returns the process; called as ``parser(rate_per_s, *arguments)`` with what follows the name. Its
            positional parameters say how many arguments are legal. They are numbers, but for the parameters annotated
            as ``str``, which are names of files. An ``ArrivalProcess``, as from ``renewal``, mixes with the laws of
            that type in randomised training worlds; see ``Arrivals`` for other processes.

    Raises:
        InputError: the name is not of this form, or is a built-in law's.
    """
    if not name.isidentifier():
        raise InputError(f"name {name!r} of a law of arrivals must consist of letters, digits and underscores")
    if name in _BUILT_IN:
        raise InputError(f"law of arrivals {name!r} is built in: choose another name")
    _LAWS[name] = parser


def parse_arrivals(text: str, rate_per_s: float) -> ArrivalProcess:
    """Returns the arrivals that a text names: a law and, after colons, its arguments.

    ``poisson``, ``gamma:CV``, ``mmpp[:BURST[:BURST_S[:CALM_S]]]``, ``sinusoidal[:AMPLITUDE[:PERIOD_S]]``,
    ``servegen:FILE[:HOUR]`` or a law registered with ``register_arrivals``. A FILE has no colon in its name.

    Raises:
        InputError: the text is none of these, a number is out of range, or a file cannot be used.
    """
    law, *texts = text.split(":")
    legal = ", ".join(_usage(each) for each in _LAWS)
    parameters = _parameters_of(law) if law in _LAWS else []
    required = sum(each.default is each.empty for each in parameters)
    if law not in _LAWS or not required <= len(texts) <= len(parameters):
        raise InputError(f"arrivals {text!r}: legal is {legal}")
    try:
        arguments = [each if _is_file(of) else float(each) for of, each in zip(parameters, texts, strict=False)]
    except ValueError:
        raise InputError(f"arrivals {text!r}: after the law there must be numbers; legal is {legal}") from None
    process = _LAWS[law](rate_per_s, *arguments)
    if not isinstance(process, Arrivals):
        raise InputError(f"arrivals {text!r}: its parser returned {type(process).__name__}, must return Arrivals")
    return cast(ArrivalProcess, process)  # or one like it


def file_of_law(text: str) -> str | None:
    """Returns the file that a text for ``parse_arrivals`` names; None if its law has none."""
    law, *texts = text.split(":")
    named = zip(_parameters_of(law) if law in _LAWS else [], texts, strict=False)
    return next((each for of, each in named if _is_file(of)), None)


def _parameters_of(law: str) -> list[inspect.Parameter]:
    """Returns the parameters of a law that follow its name in a text."""
    _, *parameters = inspect.signature(_LAWS[law]).parameters.values()
    return [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]


def _is_file(parameter: inspect.Parameter) -> bool:
    return parameter.annotation in (str, "str")


def _usage(law: str) -> str:
    """Returns how a law is written, as in ``gamma:CV``, with optional arguments in brackets."""
    parameters = _parameters_of(law)
    required = [f":{each.name.upper()}" for each in parameters if each.default is each.empty]
    optional = [f"[:{each.name.upper()}" for each in parameters if each.default is not each.empty]
    return "".join([law, *required, *optional, "]" * len(optional)])


def _process(rate_per_s: float, **fields: ArrayLike) -> ArrivalProcess:
    """Returns a process with these fields, otherwise Poisson arrivals, all of the default float type."""
    check_within("rate_per_s", rate_per_s, *RATE_RANGE_PER_S)
    random_start = jnp.asarray(fields.pop("random_start", True))
    numbers: dict[str, ArrayLike] = {
        "rate_per_s": rate_per_s,
        "gap_quantiles": quantile_grid(),
        "multipliers": np.ones(2),
        "mean_sojourns_s": np.full(2, NEVER_S),
        "amplitude": 0.0,
        "period_s": 1.0,
    }
    numbers |= fields
    return ArrivalProcess(random_start=random_start, **{k: jnp.asarray(v, float) for k, v in numbers.items()})
