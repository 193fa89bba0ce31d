"""Randomised worlds: sampled values, kept values, and refused distributions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qos_jax.errors import InputError
from qos_jax.sim.capacity import saturation_rate
from qos_jax.sim.types import Preferences
from qos_jax.workload.traces import ArrivalTrace, with_gaps
from qos_jax.worlds.build import make
from qos_jax.worlds.randomization import ARRIVALS, PREFERENCES, Domain, rate_clip_per_s, sample_worlds

KEY = jax.random.key(0)
TRACE = ArrivalTrace(np.arange(3.0), np.ones(3), np.ones(3), "made up")
PAIRS = (("alpaca-native", "A40"), ("alpaca-native", "RTX 4090"), ("vicuna-13b-1.1", "A100"))


def test_loads_and_laws_differ_and_the_rest_is_kept() -> None:
    env, params = make("paper-3")
    sampled = sample_worlds(env, params, Domain((0.5, 1.4), ARRIVALS), KEY, 64)
    loads = np.asarray(sampled.workload.arrivals.rate_per_s) / float(params.saturation_per_s)  # type: ignore[attr-defined]
    assert loads.min() >= 0.5 and loads.max() <= 1.4 and loads.std() > 0.2
    assert len(np.unique(np.asarray(sampled.workload.arrivals.gap_quantiles), axis=0)) > 2  # type: ignore[attr-defined]
    for field in ("step_base_s", "kv_blocks"):
        assert (np.asarray(getattr(sampled.experts, field)) == np.asarray(getattr(params.experts, field))).all()


def test_preferences_are_drawn_beside_the_world() -> None:
    env, params = make("paper-3")
    domain = Domain((0.5, 1.4), ARRIVALS)
    plain, drawn = (
        sample_worlds(env, params, each, KEY, 64)
        for each in (domain, dataclasses.replace(domain, preferences=PREFERENCES))
    )
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), plain, drawn.replace(preferences=None))
    assert plain.preferences is None and all(jax.tree.leaves(same))
    for name, low, high in PREFERENCES:
        weights = np.asarray(getattr(drawn.preferences, name))
        default = getattr(Preferences(), name)
        others = weights[weights != np.float32(default)]
        assert 16 < len(others) < 48 and low <= others.min() and others.max() <= high * (1 + 1e-6)
        assert 0.3 < np.mean(others < np.sqrt(low * high)) < 0.7  # log-uniform


def test_the_key_decides_which_worlds_are_sampled() -> None:
    env, params = make("paper-3")
    first, again, other = (
        sample_worlds(env, params, Domain((0.5, 1.4), ARRIVALS), key, 4) for key in (KEY, KEY, jax.random.key(1))
    )
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), first, again)
    assert all(jax.tree.leaves(same))
    assert not jnp.all(first.workload.arrivals.rate_per_s == other.workload.arrivals.rate_per_s)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_sampled_fleet_has_its_own_saturation_rate() -> None:
    env, params = make("paper-3")
    domain = Domain(loads=(1.0,), pairs=PAIRS, equal_gpus=0.0)
    sampled = sample_worlds(env, params, domain, KEY, 6)
    assert len(np.unique(np.asarray(sampled.experts.step_base_s), axis=0)) > 1
    one = jax.tree.map(lambda x: x[0], sampled)
    assert float(sampled.saturation_per_s[0]) == pytest.approx(saturation_rate(env, one), rel=0.06)
    assert float(one.workload.arrivals.rate_per_s) == pytest.approx(float(sampled.saturation_per_s[0]))


def test_a_share_of_the_fleets_has_equal_gpus() -> None:
    env, params = make("paper-3")
    sampled = sample_worlds(env, params, Domain(pairs=PAIRS, equal_gpus=0.5), KEY, 64)
    base_s = np.asarray(sampled.experts.step_base_s)
    assert 16 < (base_s.min(1) == base_s.max(1)).sum() < 60  # about 7 of 64 without equal_gpus


def test_engines_of_sampled_fleets_differ_and_so_do_their_saturation_rates() -> None:
    env, params = make("paper-3")
    sampled = sample_worlds(env, params, Domain(pairs=PAIRS), KEY, 64)
    is_async = np.asarray(sampled.experts.async_scheduling)
    assert (is_async.all(1) | ~is_async.any(1)).all() and 16 < is_async[:, 0].sum() < 48
    only = [sample_worlds(env, params, Domain(pairs=PAIRS, synchronous=share), KEY, 8) for share in (0.0, 1.0)]
    assert (np.asarray(only[0].experts.step_base_s) == np.asarray(only[1].experts.step_base_s)).all()
    assert (np.asarray(only[0].saturation_per_s) != np.asarray(only[1].saturation_per_s)).all()


def test_the_rate_clip_is_the_rate_at_the_highest_load_of_the_fastest_world() -> None:
    env, params = make("paper-3")
    sampled = sample_worlds(env, params, Domain(loads=(0.5, 1.4)), KEY, 64)
    greatest = float(sampled.workload.arrivals.rate_per_s.max())  # type: ignore[attr-defined]
    assert greatest < 3 * rate_clip_per_s(env, params) < 1.1 * greatest
    assert rate_clip_per_s(env, params, load=0.9) == rate_clip_per_s(env, params)
    assert rate_clip_per_s(env, params, load=2.8) == pytest.approx(2 * rate_clip_per_s(env, params), rel=0.01)
    fleets = sample_worlds(env, params, Domain(loads=(1.4,), pairs=PAIRS), KEY, 8)
    rates = np.asarray(fleets.workload.arrivals.rate_per_s)  # type: ignore[attr-defined]
    assert rates.max() > 1.2 * rates.min()
    assert 3 * rate_clip_per_s(env, fleets) == pytest.approx(rates.max(), rel=0.01)


def test_predictions_and_staleness_are_sampled() -> None:
    env, params = make("paper-3", staleness_s=0.5)
    sampled = sample_worlds(env, params, Domain(predictions=("realistic", "none"), staleness_s=(0.0, 0.5)), KEY, 32)
    assert len(np.unique(np.asarray(sampled.workload.prediction.score_r2))) == 2  # type: ignore[attr-defined]
    assert 0.0 <= float(sampled.staleness_s.min()) < 0.1 and 0.4 < float(sampled.staleness_s.max()) <= 0.5


def test_every_class_of_users_has_its_own_limit_on_any_fleet() -> None:
    env, params = make("paper-3", latency_limit_s=(0.03, 0.04))
    sampled = sample_worlds(env, params, Domain(latency_limits_s=(0.024, 0.05), pairs=PAIRS), KEY, 32)
    limits = sampled.workload.content.limits  # type: ignore[attr-defined]
    assert limits.values_s.shape == (32, 2) and len(np.unique(np.asarray(limits.values_s))) == 64
    assert 0.024 <= float(limits.values_s.min()) < 0.027 and 0.047 < float(limits.values_s.max()) <= 0.05
    assert (np.asarray(limits.weights) == 0.5).all()


def test_illegal_distributions_are_refused() -> None:
    env, params = make("paper-3")
    recorded = dataclasses.replace(params.workload, arrivals=with_gaps(TRACE))  # type: ignore[type-var]
    with pytest.raises(InputError, match="arrivals of the world are recorded"):
        sample_worlds(env, params.replace(workload=recorded), Domain(arrivals=("poisson",)), KEY, 2)
    with pytest.raises(InputError, match=r"staleness_s is \(0.5,\)"):
        sample_worlds(env, params, Domain(staleness_s=(0.5,)), KEY, 2)
    with pytest.raises(InputError, match="daily"):
        sample_worlds(env, params, Domain(arrivals=("daily",)), KEY, 2)
