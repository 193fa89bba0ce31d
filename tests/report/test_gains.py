"""Paired gains are right on numbers that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import scipy.stats

from qos_jax.report.gains import BEST_HEURISTIC, gains_of, main_comparisons, paired_gains, terminal_gains, verdict_text

KINDS = {"round_robin": "heuristic", "impact_greedy": "heuristic", "mvr": "learned", "oracle_impact": "oracle"}
# QoS of seeds 0, 1 and 2 at each load. The seeds differ by far more than the routers.
QOS = {
    ("round_robin", 0.5): (0.50, 0.70, 0.90),
    ("impact_greedy", 0.5): (0.45, 0.66, 0.84),
    ("mvr", 0.5): (0.46, 0.68, 0.84),
    ("oracle_impact", 0.5): (0.60, 0.80, 0.99),
    ("round_robin", 1.0): (0.10, 0.30, 0.50),
    ("impact_greedy", 1.0): (0.40, 0.60, 0.80),
    ("mvr", 1.0): (0.41, 0.62, 0.83),
    ("oracle_impact", 1.0): (0.50, 0.70, 0.90),
}


def rows(seeds: tuple[int, ...] = (0, 1, 2), names: tuple[str, ...] = tuple(KINDS)) -> list[dict]:
    return [
        {"router": name, "kind": KINDS[name], "load": load, "rate_per_s": 20 * load, "seed": seed, "qos": each[seed]}
        for (name, load), each in QOS.items()
        for seed in seeds
        if name in names
    ]


def gain(router: str, reference: str, load: float, found: list[dict] | None = None) -> dict:
    (row,) = [each for each in gains_of(found or paired_gains(rows()), router, reference) if each["load"] == load]
    return row


def test_a_gain_is_the_mean_of_the_differences_with_its_student_interval():
    row = gain("mvr", "impact_greedy", 1.0)
    assert row["mean"] == pytest.approx(0.02)  # of 0.01, 0.02 and 0.03, whose standard deviation is 0.01
    half = scipy.stats.t.ppf(0.975, 2) * 0.01 / math.sqrt(3)
    assert half == pytest.approx(4.303 * 0.00577, rel=1e-3)
    assert (row["low"], row["high"]) == pytest.approx((0.02 - half, 0.02 + half))
    assert (row["kind"], row["against"], row["rate_per_s"], row["seeds"]) == ("learned", "impact_greedy", 20.0, 3)


def test_the_interval_of_several_training_seeds_is_over_both_kinds_of_seeds():
    """One training seed is 0.02 better than the other on all requests, so the spread of the two counts."""
    learned = [row | {"training_seed": seed, "qos": row["qos"] + 0.02 * seed} for row in rows() for seed in (0, 1)]
    heuristics = [row for row in rows() if row["kind"] != "learned"]
    found = paired_gains(heuristics + [row for row in learned if row["kind"] == "learned"])
    row = gain("mvr", "impact_greedy", 1.0, found)
    error = math.sqrt(0.01**2 / 3 + 0.0002 / 2)  # variances over seeds and over training seeds
    assert row["mean"] == pytest.approx(0.03)
    assert row["high"] - row["mean"] == pytest.approx(scipy.stats.t.ppf(0.975, 1) * error)
    assert (row["seeds"], gain("round_robin", "mvr", 1.0, found)["mean"]) == (3, pytest.approx(-0.33))


def test_pairing_cancels_what_the_seeds_have_in_common():
    # The means of three seeds are uncertain by far more than what the routers differ by.
    row = gain("oracle_impact", "impact_greedy", 1.0)
    assert row["mean"] == pytest.approx(0.1)
    assert row["high"] - row["low"] < 1e-9


@pytest.mark.parametrize(
    ("router", "reference", "load", "verdict"),
    [
        ("oracle_impact", "impact_greedy", 1.0, "better"),
        ("round_robin", "impact_greedy", 1.0, "worse"),
        ("mvr", "impact_greedy", 1.0, "level"),  # 0.020 +- 0.025
        ("mvr", BEST_HEURISTIC, 0.5, "level"),  # -0.040 +- 0.050
        ("round_robin", BEST_HEURISTIC, 1.0, "worse"),
    ],
)
def test_the_verdict_is_that_of_the_interval(router, reference, load, verdict):
    assert gain(router, reference, load)["verdict"] == verdict


def test_the_best_heuristic_is_that_of_the_load_and_never_the_router_itself():
    assert gain("mvr", BEST_HEURISTIC, 0.5)["against"] == "round_robin"
    assert gain("mvr", BEST_HEURISTIC, 1.0)["against"] == "impact_greedy"
    assert gain("impact_greedy", BEST_HEURISTIC, 1.0)["against"] == "round_robin"
    assert gain("impact_greedy", BEST_HEURISTIC, 1.0)["mean"] == pytest.approx(0.3)


def test_every_router_is_compared_with_each_reference_but_itself():
    found = paired_gains(rows())
    pairs = {(each["router"], each["reference"]) for each in found}
    expected = {(router, reference) for router in KINDS for reference in (BEST_HEURISTIC, "impact_greedy", "mvr")}
    assert pairs == expected - {("impact_greedy", "impact_greedy"), ("mvr", "mvr")}
    assert len(found) == 2 * len(pairs)


def test_only_seeds_that_both_routers_have_are_paired():
    partial = [row for row in rows() if not (row["router"] == "mvr" and row["seed"] == 2)]
    row = gain("mvr", "impact_greedy", 1.0, paired_gains(partial))
    assert (row["seeds"], row["mean"]) == (2, pytest.approx(0.015))


def test_one_seed_has_no_interval_and_no_verdict():
    found = paired_gains(rows(seeds=(1,)))
    row = gain("mvr", "impact_greedy", 1.0, found)
    assert math.isnan(row["low"]) and row["verdict"] == "unknown"
    assert "1 seed" in terminal_gains({"gains": found})


def test_the_main_comparisons_are_those_of_learned_routers_or_of_the_strongest_heuristic():
    assert main_comparisons(paired_gains(rows())) == [("mvr", BEST_HEURISTIC), ("mvr", "impact_greedy")]
    without = paired_gains(rows(names=("round_robin", "impact_greedy")))
    assert main_comparisons(without) == [("impact_greedy", BEST_HEURISTIC)]
    assert main_comparisons(paired_gains(rows(names=("mvr",)))) == []


def test_the_terminal_says_who_is_better_at_which_load_by_how_much_and_where_it_is_worse():
    text = terminal_gains({"gains": paired_gains(rows())})
    lines = [line.split() for line in text.splitlines()]
    assert ["load", "0.5", "1"] in lines
    assert ["over", "best", "heuristic", "-0.040", "+-0.050", "+0.020", "+-0.025"] in lines
    assert ["over", "impact_greedy", "+0.010", "+-0.025", "+0.020", "+-0.025"] in lines
    assert "mvr against impact_greedy: level at load 0.5, 1; worse at none." in text
    assert "(round_robin at load 0.5; impact_greedy at load 1)" in text.replace("\n  ", " ")
    assert max(map(len, text.splitlines())) <= 120


def test_verdicts_in_words_name_the_loads():
    found = [{"load": load, "verdict": verdict} for load, verdict in ((0.3, "worse"), (0.6, "level"), (0.9, "better"))]
    assert verdict_text(found) == "better at load 0.9; level at load 0.6; worse at load 0.3"
    assert verdict_text(found[1:]) == "better at load 0.9; level at load 0.6; worse at none"
