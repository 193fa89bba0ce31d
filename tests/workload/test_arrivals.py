"""Arrivals compared to their laws: gaps, mean rate, dispersion, and the integral of the rate between arrivals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qos_jax import InputError
from qos_jax.workload import arrivals

LEAST_P = 1e-3
WIDE, LONG = (100, 200), (64, 20_000)  # environments x gaps; few shapes, so that few programs are compiled


@jax.jit
def play(process, init_keys, gap_keys):
    """Returns gaps [E, G] and the states [E, G + 1] around them; keys [E] and [E, G]."""

    def step(state, key):
        gap_s, state = process.next_gap(key, state)
        return state, (gap_s, state)

    def one(init_key, gap_keys):
        first = process.init(init_key)
        _, (gaps_s, later) = jax.lax.scan(step, first, gap_keys)
        return gaps_s, jax.tree.map(lambda a, b: jnp.append(a, b), first, later)

    return jax.vmap(one)(init_keys, gap_keys)


# A million gaps take longer than the compilation of a program, so theirs is optimised.
play_long = jax.jit(
    play, compiler_options={"xla_backend_optimization_level": 2, "xla_llvm_disable_expensive_passes": False}
)


def keys_of(shape):
    init_key, gaps_key = jax.random.split(jax.random.key(0))
    return jax.random.split(init_key, shape[0]), jax.random.split(gaps_key, shape)


def draw(process, shape=WIDE):
    """Returns gaps [E, G] in float64 and the states around them; every process gets the same keys."""
    gaps_s, states = (play_long if shape == LONG else play)(process, *keys_of(shape))
    return np.asarray(gaps_s, np.float64), jax.tree.map(np.asarray, states)


def lag_correlation(values):
    return np.corrcoef(values[:, 1:].ravel(), values[:, :-1].ravel())[0, 1]


@pytest.mark.parametrize("cv", [0.2, 1.0, 3.0])
def test_gaps_are_independent_and_follow_their_law(cv):
    process = arrivals.poisson(5.0) if cv == 1.0 else arrivals.gamma(5.0, cv)
    quantiles = stats.gamma(cv**-2, scale=cv**2 / 5.0).cdf(draw(process)[0])
    assert stats.kstest(quantiles.ravel(), "uniform").pvalue > LEAST_P
    assert abs(lag_correlation(quantiles)) < 4 / np.sqrt(quantiles.size)


def test_renewal_gaps_follow_a_law_given_by_its_quantiles():
    shape = 0.8
    process = arrivals.renewal(5.0, 7.0 * arrivals.quantile_grid() ** (1 / shape))  # Weibull, in any unit
    mean_s = math.gamma(1 + 1 / shape)
    gaps_s, _ = draw(process)
    quantiles = stats.weibull_min(shape, scale=1 / (5.0 * mean_s)).cdf(gaps_s)
    assert stats.kstest(quantiles.ravel(), "uniform").pvalue > LEAST_P
    assert jax.tree.structure(process) == jax.tree.structure(arrivals.poisson(1.0))  # so that both mix in one vmap


@pytest.mark.parametrize("gaps", [np.ones(3), -arrivals.quantile_grid(), np.zeros(257), arrivals.quantile_grid()[::-1]])
def test_bad_quantiles_are_refused(gaps):
    with pytest.raises(InputError, match=r"gaps must be \[257\] finite numbers >= 0 that do not decrease"):
        arrivals.renewal(1.0, gaps)


@pytest.mark.parametrize("cv", [*arrivals.CV_RANGE, 5.0])
def test_gamma_keeps_mean_and_cv_over_its_whole_range(cv):
    gaps_s = draw(arrivals.gamma(1.0, cv), LONG)[0]
    kurtosis = 6 * cv**2  # of the gamma law, beyond that of the normal one
    assert gaps_s.mean() == pytest.approx(1.0, abs=4 * cv / np.sqrt(gaps_s.size))
    assert gaps_s.std() == pytest.approx(cv, rel=0.005 + 4 * np.sqrt((kurtosis + 2) / 4 / gaps_s.size))


def mmpp_survival_exponents(gaps_s, rates, leave_per_s):
    """Returns -log P(gap > observed | all earlier arrivals) [E, G]: independent Exp(1) variates if the MMPP is exact.

    An arrival and a gap multiply the law of the hidden state by ``rates`` and by ``expm((Q - diag(rates)) gap)``.
    """
    generator = np.array([[-leave_per_s[0], leave_per_s[0]], [leave_per_s[1], -leave_per_s[1]]])
    eigenvalues, right = np.linalg.eig(generator - np.diag(rates))
    left = np.linalg.inv(right)
    law = np.broadcast_to(leave_per_s[::-1] / leave_per_s.sum(), (len(gaps_s), 2))
    exponents = []
    for gap_s in gaps_s.T:
        law = ((law @ right) * np.exp(eigenvalues * gap_s[:, None])) @ left
        exponents.append(-np.log(law.sum(1)))
        law = law * rates
        law /= law.sum(1, keepdims=True)
    return np.array(exponents).T


@pytest.mark.parametrize(("burst", "burst_s", "calm_s"), [(20.0, 0.3, 0.5), (4.0, 2.0, 2.0), (8.0, 5.0, 30.0)])
def test_mmpp_is_exact(burst, burst_s, calm_s):
    rate_per_s = 2.0
    calm_rate = rate_per_s * (calm_s + burst_s) / (calm_s + burst * burst_s)
    gaps_s, _ = draw(arrivals.mmpp(rate_per_s, burst, burst_s, calm_s))
    exponents = mmpp_survival_exponents(gaps_s, np.array([1.0, burst]) * calm_rate, 1.0 / np.array([calm_s, burst_s]))
    assert stats.kstest(exponents.ravel(), "expon").pvalue > LEAST_P
    assert abs(lag_correlation(exponents)) < 4 / np.sqrt(exponents.size)


def test_mmpp_has_its_index_of_dispersion():
    rate_per_s, burst, sojourn_s, window_s = 20.0, 4.0, 1.0, 25.0
    gaps_s, _ = draw(arrivals.mmpp(rate_per_s, burst, sojourn_s), LONG)
    counts = [np.histogram(np.cumsum(env), np.arange(0.0, 900.0, window_s))[0] for env in gaps_s]
    low, high = np.array([2.0, 2.0 * burst]) * rate_per_s / (1 + burst)
    decay_per_s = 2 / sojourn_s
    asymptote = (high - low) ** 2 / (2 * decay_per_s * rate_per_s)
    approach = 1 - (1 - np.exp(-decay_per_s * window_s)) / (decay_per_s * window_s)
    assert np.var(counts) / np.mean(counts) == pytest.approx(1 + asymptote * approach, rel=0.12)


@pytest.mark.parametrize("period_s", [0.05, 1.0, 3.0, 1e5])
@pytest.mark.parametrize("amplitude", [0.3, arrivals.MAX_AMPLITUDE])
@pytest.mark.parametrize("x64", [False, True])
def test_sinusoidal_rate_integrates_to_the_poisson_gaps(period_s, amplitude, x64):
    with jax.enable_x64(x64):
        operational, _ = draw(arrivals.poisson(1.0))
        gaps_s, states = draw(arrivals.sinusoidal(2.0, amplitude, period_s))
    phase = 2 * np.pi * states.phase[:, :-1] / 2.0**32
    half = np.pi * gaps_s / period_s
    integral = 2.0 * (gaps_s + amplitude * period_s / np.pi * np.sin(half) * np.sin(phase + half))
    np.testing.assert_allclose(integral, operational, rtol=1e-10 if x64 else 3e-5, atol=1e-12 if x64 else 3e-7)
    assert stats.kstest(integral.ravel(), "expon").pvalue > LEAST_P


def test_the_phase_keeps_time_with_gaps_below_the_resolution_of_float32():
    period_s = 86_400.0
    gaps_s, states = draw(arrivals.sinusoidal(1000.0, 0.5, period_s, random_start=False), LONG)
    assert not states.phase[:, 0].any()
    phase_s, passed_s = states.phase[:, -1] / 2.0**32 * period_s, gaps_s.sum(1)
    np.testing.assert_allclose(phase_s, passed_s, rtol=3e-4)  # each gap is rounded to 2^-32 of a day, 20 us
    assert phase_s.mean() == pytest.approx(passed_s.mean(), rel=5e-5)  # without bias


def test_sinusoidal_load_rises_first_when_it_starts_at_time_zero():
    gaps_s, _ = draw(arrivals.sinusoidal(10.0, 0.9, 100.0, random_start=False), LONG)
    arrival_s = np.cumsum(gaps_s, axis=1)
    surplus = (arrival_s < 50.0).sum() - ((arrival_s >= 50.0) & (arrival_s < 100.0)).sum()
    assert surplus / LONG[0] == pytest.approx(10.0 * 0.9 * 2 * 100.0 / np.pi, rel=0.03)


KINDS = {
    "poisson": lambda rate_per_s: arrivals.poisson(rate_per_s),
    "gamma": lambda rate_per_s: arrivals.gamma(rate_per_s, 2.0),
    "mmpp": lambda rate_per_s: arrivals.mmpp(rate_per_s, 4.0, 2.0, 6.0),
    "sinusoidal": lambda rate_per_s: arrivals.sinusoidal(rate_per_s, 0.8, 10.0),
    "both": lambda rate_per_s: arrivals.sinusoidal(rate_per_s, 0.8, 10.0).replace(
        multipliers=jnp.array([0.0, 4.0]), mean_sojourns_s=jnp.array([6.0, 2.0])
    ),
}


def test_kinds_mix_in_one_vmap():
    kinds = [build(rate_per_s) for rate_per_s, build in zip([0.5, 2.0, 8.0, 20.0, 3.0], KINDS.values(), strict=True)]
    mixed = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kinds)
    gaps_s, _ = jax.vmap(play, (0, None, None))(mixed, *keys_of(WIDE))
    alone = np.array([draw(kind)[0] for kind in kinds])
    np.testing.assert_allclose(gaps_s, alone, rtol=1e-3)  # XLA fuses, and so rounds, differently


@pytest.mark.parametrize("kind", KINDS)
def test_mean_rate_is_kept(kind):
    gaps_s, states = draw(KINDS[kind](3.0), LONG)
    assert 1 / gaps_s.mean() == pytest.approx(3.0, rel=0.01)
    if kind == "both":  # the phase also counts sojourns that pass within a gap
        drift_s = (states.phase[:, -1] - states.phase[:, 0]).astype(np.float64) / 2.0**32 * 10.0 - gaps_s.sum(1)
        np.testing.assert_allclose(drift_s / 10.0, np.rint(drift_s / 10.0), atol=1e-4)


def test_all_kinds_and_rates_run_in_one_traced_program():
    traces = []

    @jax.jit
    def gap_s(process, key):
        traces.append(None)
        return process.next_gap(key, process.init(key))[0]

    for build in KINDS.values():
        assert gap_s(build(1.0).with_rate(3.0), jax.random.key(0)) > 0
    assert len(traces) == 1


def test_with_rate_under_vmap_scales_the_gaps():
    rates_per_s = jnp.array([0.25, 4.0])
    processes = jax.vmap(arrivals.gamma(1.0, 2.0).with_rate)(rates_per_s)
    gaps_s, _ = jax.vmap(play, (0, None, None))(processes, *keys_of((3, 2)))
    at_one, _ = draw(arrivals.gamma(1.0, 2.0), (3, 2))
    np.testing.assert_allclose(gaps_s * rates_per_s[:, None, None], np.stack([at_one, at_one]), rtol=1e-6)


def test_recorded_gaps_play_in_order_and_loop():
    gaps_s = [0.5, 0.0, 3.0, 0.25]
    played, _ = draw(arrivals.recorded(gaps_s, random_start=False), (2, 10))
    np.testing.assert_allclose(played, np.tile(gaps_s * 3, (2, 1))[:, :10], rtol=1e-6)


def test_recorded_gaps_start_at_random_and_take_another_rate():
    gaps_s = np.array([1.0, 2.0, 4.0, 8.0])
    played, _ = draw(arrivals.recorded(gaps_s, rate_per_s=10.0), (400, 4))
    np.testing.assert_allclose(played.mean(1), 0.1, rtol=1e-6)
    starts = np.searchsorted(gaps_s / gaps_s.mean() / 10.0 * 0.99, played[:, 0]) - 1
    assert stats.chisquare(np.bincount(starts, minlength=4)).pvalue > LEAST_P
    rotations = np.array([np.roll(gaps_s, -start) for start in starts])
    np.testing.assert_allclose(played, rotations / gaps_s.mean() / 10.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "process"),
    [
        ("poisson", lambda: arrivals.poisson(7.0)),
        ("gamma:3", lambda: arrivals.gamma(7.0, 3.0)),
        ("mmpp", lambda: arrivals.mmpp(7.0)),
        ("mmpp:4:30", lambda: arrivals.mmpp(7.0, 4.0, 30.0, 30.0)),
        ("mmpp:8:5:20", lambda: arrivals.mmpp(7.0, 8.0, 5.0, 20.0)),
        ("sinusoidal:0.5:600", lambda: arrivals.sinusoidal(7.0, 0.5, 600.0)),
    ],
)
def test_texts_name_processes(text, process):
    jax.tree.map(np.testing.assert_array_equal, arrivals.parse_arrivals(text, 7.0), process())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform", "legal is poisson, gamma:CV"),
        ("", "legal is poisson"),
        ("gamma", "legal is"),
        ("poisson:3", "legal is"),
        ("mmpp:4:30:30:1", r"legal is .*mmpp\[:BURST\[:BURST_S\[:CALM_S\]\]\], sinusoidal\[:AMPLITUDE\[:PERIOD_S\]\]"),
        ("gamma:three", "must be numbers; legal is poisson, gamma:CV"),
        ("gamma:50", r"cv must lie in \[0.1, 10\], got 50"),
        ("gamma:nan", "cv must lie in"),
        ("mmpp:0.5", "burst must lie in"),
        ("mmpp:4:0", "burst_s must lie in"),
        ("mmpp:4:1:inf", "calm_s must lie in"),
        ("sinusoidal:1", r"amplitude must lie in \[0, 0.95\], got 1"),
        ("sinusoidal:0.5:-1", "period_s must lie in"),
    ],
)
def test_errors_say_what_is_legal(text, message):
    with pytest.raises(InputError, match=message):
        arrivals.parse_arrivals(text, 1.0)


@pytest.mark.parametrize("rate_per_s", [0.0, -1.0, np.nan, np.inf])
def test_bad_rates_are_refused(rate_per_s):
    for build in (*KINDS.values(), arrivals.poisson(1.0).with_rate, lambda rate: arrivals.recorded([1.0], rate)):
        with pytest.raises(InputError, match="rate_per_s must lie in"):
            build(rate_per_s)


@pytest.mark.parametrize("gaps_s", [[], [0.0, 0.0], [1.0, -1.0], [1.0, np.nan], [[1.0]], 1.0])
def test_bad_recordings_are_refused(gaps_s):
    with pytest.raises(InputError, match="gaps_s must be a vector"):
        arrivals.recorded(gaps_s)
