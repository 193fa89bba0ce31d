"""Superposed clients compared to their laws: rates, shares, gaps, the shape of the day; and bad files."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qos_jax import InputError
from qos_jax.workload import arrivals
from qos_jax.workload.client_arrivals import (
    GAMMA,
    MAX_ENTRIES,
    NONE,
    WEIBULL,
    ClientTraffic,
    read_clients,
    servegen,
    superposition,
    weibull_power,
)

LEAST_P = 1e-3
TRAFFIC = ClientTraffic(  # of 4 clients in 3 bins; the third does not send in the first bin, the last in none
    rate_per_s=[[4.0, 1.0, 2.0], [2.0, 0.5, 9.0], [0.0, 1.0, 0.5], [0.0, 0.0, 0.0]],
    cv=[[1.0, 3.0, 0.5], [3.0, 2.0, 2.0], [0.0, 1.5, 4.0], [0.0, 0.0, 0.0]],
    family=[[GAMMA, GAMMA, WEIBULL], [WEIBULL, WEIBULL, GAMMA], [NONE, GAMMA, WEIBULL], [NONE, NONE, NONE]],
    bin_s=30.0,
)


@jax.jit
def play(process, keys):
    """Returns gaps [E, G] and the clients [E, G] that send, -1 for the first request of a bin; keys [E, G]."""

    def step(state, key):
        gap_s, later = process.next_gap(key, state)
        same = state.is_met & (state.bin == later.bin)
        return later, (gap_s, jnp.where(same, jnp.argmin(state.next_time), -1))

    return jax.vmap(lambda keys: jax.lax.scan(step, process.init(keys[0]), keys[1:])[1])(keys)


def draw(process, shape):
    """Returns times of arrival [E, G] in float64, and the clients."""
    gaps_s, clients = play(process, jax.random.split(jax.random.key(0), (shape[0], shape[1] + 1)))
    return np.cumsum(np.asarray(gaps_s, np.float64), axis=1), np.asarray(clients)


def counts_of(times_s, edges_s):
    """Returns the arrivals [E, W] of each environment between the edges, all of which its arrivals pass."""
    assert times_s[:, -1].min() > edges_s[-1]
    return np.array([np.histogram(each, edges_s)[0] for each in times_s])


def assert_mean(samples, expected):
    """The mean over the first axis is what is expected, within four standard errors."""
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(0) - expected) < 4 * error), (samples.mean(0), expected, error)


@pytest.mark.parametrize("cv", [0.4, 2.0])
@pytest.mark.parametrize("family", [GAMMA, WEIBULL])
def test_gaps_of_one_client_follow_its_law_and_the_first_is_the_rest_of_one(family, cv):
    power = float(weibull_power(np.array(cv)))
    law = stats.gamma(cv**-2, scale=cv**2) if family == GAMMA else stats.weibull_min(1 / power)
    mean = law.mean()
    assert law.std() / mean == pytest.approx(cv, rel=1e-6)
    traffic = ClientTraffic([[5.0]], [[cv]], [[family]], 3600.0)
    times_s, _ = draw(superposition(traffic, random_start=False), (200, 100))
    gaps, unit = np.diff(times_s) * 5.0 * mean, 3600.0 / 2**32 * 5.0 * mean  # a gap is a whole number of units
    low, high = law.cdf(gaps - unit / 2), law.cdf(gaps + unit / 2)
    quantiles = low + (high - low) * np.random.default_rng(0).uniform(size=low.shape)
    assert stats.kstest(quantiles.ravel(), "uniform").pvalue > LEAST_P
    assert abs(np.corrcoef(quantiles[:, 1:].ravel(), quantiles[:, :-1].ravel())[0, 1]) < 4 / np.sqrt(quantiles.size)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.08)
    grid = np.linspace(0.0, law.isf(1e-9), 200_001)  # the rest of a gap has the density of its survival over its mean
    below = np.concatenate([[0.0], np.cumsum((law.sf(grid[1:]) + law.sf(grid[:-1])) / 2 * grid[1])]) / mean
    assert stats.kstest(np.interp(times_s[:, 0] * 5.0 * mean, grid, below), "uniform").pvalue > LEAST_P


@pytest.mark.parametrize("rate_per_s", [pytest.param(0.5, marks=pytest.mark.slow), 8.0, 500.0])
def test_the_mean_rate_is_as_asked_from_the_first_second_on(rate_per_s):
    times_s, _ = draw(superposition(TRAFFIC, rate_per_s), (500, 120))
    window_s = 30.0 / rate_per_s
    assert_mean(counts_of(times_s, [0.0, window_s / 3, window_s]), [10.0, 20.0])


@pytest.mark.slow
def test_every_client_has_its_rate_in_every_bin():
    process = superposition(TRAFFIC, 8.0, random_start=False)
    times_s, clients = draw(process, (200, 1_600))
    edges_s = TRAFFIC.bin_s * np.arange(5)  # the bins follow each other in a loop
    expected = TRAFFIC.rate_per_s * TRAFFIC.bin_s * 8.0 / (20.0 / 3)
    assert_mean(counts_of(times_s, edges_s), expected.sum(0)[[0, 1, 2, 0]])
    for client in range(3):
        sent = np.where(clients == client, times_s, np.inf)
        in_bins = np.array([np.histogram(each[np.isfinite(each)], edges_s[:4])[0] for each in sent])
        # The first request of a bin is of any client, so up to one is missing.
        assert np.all(in_bins.mean(0) < expected[client] + 5 * in_bins.std(0) / np.sqrt(len(sent)) + 1e-9)
        assert np.all(in_bins.mean(0) > expected[client] - 1.0 - 5 * in_bins.std(0) / np.sqrt(len(sent)))
    assert not (clients == 3).any()


def test_bins_without_traffic_are_left_out():
    rates = np.insert(TRAFFIC.rate_per_s, 1, 0.0, axis=1)
    with_hole = dataclasses.replace(
        TRAFFIC,
        rate_per_s=rates,
        cv=np.insert(TRAFFIC.cv, 1, 0.0, axis=1),
        family=np.insert(TRAFFIC.family, 1, NONE, axis=1),
    )
    assert with_hole.mean_rate_per_s == TRAFFIC.mean_rate_per_s == pytest.approx(20.0 / 3)
    jax.tree.map(np.testing.assert_array_equal, superposition(with_hole), superposition(TRAFFIC))


@pytest.mark.slow
def test_short_bins_and_rare_requests_keep_the_rate():
    """Most bins end before anybody sends, so a request comes after many of them."""
    slow = superposition(dataclasses.replace(TRAFFIC, bin_s=1.0), 0.25)
    times_s, _ = draw(slow, (300, 16))
    assert_mean(counts_of(times_s, [0.0, 12.0]), [3.0])


def test_an_hour_is_played_alone():
    hourly = ClientTraffic([[1.0, 2.0, 3.0, 5.0]], np.ones((1, 4)), np.ones((1, 4)), 1800.0)
    assert hourly.in_hour(1).rate_per_s.tolist() == [[3.0, 5.0]]
    with pytest.raises(InputError, match=r"clients: hour is 2, must be a whole number from 0 to 1"):
        hourly.in_hour(2)
    with pytest.raises(InputError, match=r"hour is 0\.5, must be a whole number"):
        hourly.in_hour(0.5)
    silent = dataclasses.replace(hourly, rate_per_s=[[0.0, 0.0, 3.0, 5.0]])
    with pytest.raises(InputError, match="no client sends in hour 0"):
        silent.in_hour(0)


def test_rates_and_traffic_share_one_traced_program_and_vmap():
    traces = []
    other = dataclasses.replace(
        TRAFFIC, rate_per_s=TRAFFIC.rate_per_s[::-1], cv=np.ones((4, 3)), family=np.ones((4, 3))
    )

    @jax.jit
    def gap_s(process, key):
        traces.append(None)
        return process.next_gap(key, process.init(key))[0]

    processes = [superposition(TRAFFIC), superposition(TRAFFIC).with_rate(30.0), superposition(other, 2.0)]
    alone_s = [float(gap_s(each, jax.random.key(3))) for each in processes]
    assert len(traces) == 1
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *processes)
    np.testing.assert_allclose(jax.vmap(gap_s, (0, None))(stacked, jax.random.key(3)), alone_s, rtol=1e-4)
    rates = jax.vmap(superposition(TRAFFIC).with_rate)(jnp.array([1.0, 2.0])).rate_per_s
    np.testing.assert_array_equal(rates, [1.0, 2.0])


@pytest.mark.slow
def test_double_precision_follows_the_same_law():
    with jax.enable_x64(True):
        process = superposition(TRAFFIC, 8.0)
        times_s, _ = draw(process, (100, 60))
        gap_s, state = jax.eval_shape(process.next_gap, jax.random.key(1), process.init(jax.random.key(0)))
    assert gap_s.dtype == jnp.float64 and state.next_time.dtype == jnp.uint32
    assert_mean(counts_of(times_s, [0.0, 1.0]), [8.0])


def test_the_state_has_a_number_for_each_client_and_none_for_each_bin():
    many = ClientTraffic(np.ones((5, 700)), np.ones((5, 700)), np.ones((5, 700)))
    state = superposition(many).init(jax.random.key(0))
    assert sum(np.size(leaf) for leaf in jax.tree.leaves(state)) == 5 + 3


@pytest.mark.parametrize("cv", [0.05, 1.0, 20.0, 800.0])
def test_the_power_of_a_weibull_law_gives_its_cv(cv):
    power = float(weibull_power(np.array(cv)))
    log_ratio = math.lgamma(1 + 2 * power) - 2 * math.lgamma(1 + power)
    assert math.sqrt(math.expm1(log_ratio)) == pytest.approx(cv, rel=1e-6)


def columns(**changes):
    """Columns of a file of 2 clients in 3 bins, with others in place of some; None leaves a column out."""
    given = {
        "rate_per_s": np.array([[1.0, 0.0, 2.0], [0.5, 0.5, 0.0]], np.float16),
        "cv": np.array([[1.0, 0.0, 2.0], [1.5, 0.5, 0.0]], np.float16),
        "family": np.array([[1, 0, 2], [2, 1, 0]], np.int8),
        "t_s": np.array([0, 600, 1200]),
    } | changes
    return {name: value for name, value in given.items() if value is not None}


def test_a_file_is_read_and_named_in_a_text(tmp_path):
    path = tmp_path / "clients.npz"
    np.savez_compressed(path, **columns(t_s=np.array([0, 1800, 3600])), client=np.arange(2))
    traffic = read_clients(path)
    assert traffic.bin_s == 1800.0 and traffic.rate_per_s.tolist() == [[1.0, 0.0, 2.0], [0.5, 0.5, 0.0]]
    whole = arrivals.parse_arrivals(f"servegen:{path}", 7.0)
    jax.tree.map(np.testing.assert_array_equal, whole, superposition(traffic, 7.0))
    hour = arrivals.parse_arrivals(f"servegen:{path}:1", 7.0)
    jax.tree.map(np.testing.assert_array_equal, hour, servegen(7.0, str(path), 1))
    assert hour.power.shape == (1, 2) and float(hour.rate_per_s) == 7.0
    assert arrivals.file_of_law(f"servegen:{path}:1") == str(path)
    assert arrivals.file_of_law("gamma:2") is arrivals.file_of_law("servegen") is None
    np.savez(path, **columns(t_s=None))
    assert read_clients(path).bin_s == 600.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("servegen", r"legal is .*servegen:FILE\[:HOUR\]"),
        ("servegen:{path}:1:2", r"legal is .*servegen:FILE\[:HOUR\]"),
        ("servegen:{path}:noon", "after the law there must be numbers"),
        ("servegen:{path}:7", "clients.npz: hour is 7, must be a whole number from 0 to 0"),
        ("servegen:{path}:nan", "hour is nan, must be a whole number"),
        ("servegen:{path}.none", r"clients.npz.none: is not a readable .npz file"),
    ],
)
def test_bad_texts_are_refused(tmp_path, text, message):
    np.savez(tmp_path / "clients.npz", **columns())
    with pytest.raises(InputError, match=message):
        arrivals.parse_arrivals(text.format(path=tmp_path / "clients.npz"), 1.0)


RATES = columns()["rate_per_s"].astype(float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cv": None}, "no column cv; it has rate_per_s, family, t_s"),
        ({"cv": np.ones((2, 2))}, r"arrays of one shape \[clients, bins\], none of them 0; got .*'cv': \(2, 2\)"),
        ({"rate_per_s": np.ones(3)}, r"arrays of one shape \[clients, bins\]"),
        ({name: np.ones((2, 0)) for name in ("rate_per_s", "cv", "family")} | {"t_s": None}, r"got .*\(2, 0\)"),
        ({"rate_per_s": -RATES}, r"rate_per_s\[0, 0\] is -1, must be from 0 to 1e\+06"),
        ({"rate_per_s": RATES + np.array([0, 0, np.nan])}, r"rate_per_s\[0, 2\] is nan, must be from 0"),
        ({"rate_per_s": RATES + np.array([0, np.inf, 0])}, r"rate_per_s\[0, 1\] is inf, must be from 0"),
        ({"rate_per_s": 0 * RATES}, "rate_per_s is 0 everywhere, must be above 0 for some client and bin"),
        ({"family": np.full((2, 3), 3)}, r"family\[0, 0\] is 3, must be 1 \(gamma\), 2 \(Weibull\) or 0 \(none\)"),
        ({"family": np.full((2, 3), 1.5)}, r"family\[0, 0\] is 1.5, must be 1"),
        ({"family": np.zeros((2, 3))}, r"family\[0, 0\] is 0, must be 1 \(gamma\) or 2 \(Weibull\) where the rate is"),
        ({"cv": np.zeros((2, 3))}, r"cv\[0, 0\] is 0, must be from 0.01 to 1000 where the rate is above 0"),
        ({"cv": np.full((2, 3), np.nan)}, r"cv\[0, 0\] is nan, must be from 0.01"),
        ({"cv": np.full((2, 3), "1")}, "column cv is of type <U1, must be numbers"),
        ({"t_s": np.array([0, 600, 1300])}, r"t_s is \[   0.  600. 1300.\], must be the begin of each of 3 bins in s"),
        ({"t_s": np.array([0, 600])}, "t_s is .*, must be the begin of each of 3 bins"),
        ({"t_s": np.array([0, np.nan, 1200])}, "t_s is .*, must be the begin"),
        ({"t_s": np.array([1200, 600, 0])}, r"length of a bin in s must lie in \[1, 86400\], got -600"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, changes, message):
    np.savez(tmp_path / "clients.npz", **columns(**changes))
    with pytest.raises(InputError, match=message) as raised:
        read_clients(tmp_path / "clients.npz")
    assert str(raised.value).startswith(f"{tmp_path / 'clients.npz'}: ") and "\n" not in str(raised.value)


class Executed:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_python_objects_in_a_file_are_never_executed(tmp_path):
    made = tmp_path / "made"
    objects = np.array([[Executed(made)] * 3] * 2, object)
    np.savez(tmp_path / "clients.npz", **columns(cv=objects))
    with pytest.raises(InputError, match=r"clients\.npz: is not a readable .npz file: Object arrays"):
        read_clients(tmp_path / "clients.npz")
    assert not made.exists()


def test_too_large_files_are_refused(tmp_path):
    shape = (3, MAX_ENTRIES // 3 + 1)
    with pytest.raises(InputError, match=f"clients: has {math.prod(shape)} clients x bins, must have {MAX_ENTRIES}"):
        ClientTraffic(*np.ones((3, *shape), np.float32))
    packed = dict.fromkeys(("rate_per_s", "cv", "family"), np.zeros((2**13, 2**13), np.int8))
    np.savez_compressed(tmp_path / "clients.npz", **packed)
    with pytest.raises(InputError, match="its columns unpack to 201326592 bytes, more than the"):
        read_clients(tmp_path / "clients.npz")


@pytest.mark.slow
def test_clients_of_deepseek_r1_keep_shares_and_bursts(data_dir):
    traffic = read_clients(data_dir / "traces" / "servegen_deepseek-r1.npz").in_hour(22)
    times_s, clients = draw(superposition(traffic, 30.0), (64, 2_500))
    counts = counts_of(times_s, np.arange(0.0, 51.0, 10.0))
    assert_mean(counts.sum(1), 5 * 300.0)
    within = counts.var(1, ddof=1).mean() / counts.mean()  # of the windows of one environment, so without the drift
    assert within > 2.0, within
    sent = np.array([np.bincount(each[each >= 0], minlength=73) for each in clients]) / np.sum(clients >= 0, 1)[:, None]
    largest = np.argsort(-traffic.rate_per_s.sum(1))[:5]
    shares = traffic.rate_per_s.sum(1)[largest] / traffic.rate_per_s.sum()
    assert np.all(np.abs(sent[:, largest].mean(0) - shares) < 4 * sent[:, largest].std(0) / np.sqrt(64) + 0.002)


@pytest.mark.slow
def test_the_day_of_deepseek_r1_has_its_peak_and_trough(data_dir):
    traffic = read_clients(data_dir / "traces" / "servegen_deepseek-r1.npz")
    totals = traffic.rate_per_s.sum(0)
    assert totals.max() / totals.min() == pytest.approx(9.9, abs=0.05)  # as the data's README says
    times_s, _ = draw(superposition(traffic, 0.5, random_start=False), (32, 52_000))
    counts = counts_of(times_s, np.arange(0.0, 86_401.0, 600.0))
    error = counts.std(0, ddof=1) / np.sqrt(len(counts))
    scores = (counts.mean(0) - 300.0 * totals / totals.mean()) / error
    assert np.abs(scores).max() < 6 and 0.8 < scores.std() < 1.4  # Student's t of 31 degrees of freedom
    ratio = counts.mean(0)[totals.argmax()] / counts.mean(0)[totals.argmin()]
    assert ratio == pytest.approx(9.86, rel=0.3), ratio


def test_m_small_is_read_with_its_holes(data_dir):
    traffic = read_clients(data_dir / "traces" / "servegen_m-small.npz")
    process = superposition(traffic)
    assert traffic.rate_per_s.shape == (43, 2016) and process.power.shape == (2016 - 37, 43)
    assert float(process.rate_per_s) == pytest.approx(1196, abs=1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(process))
