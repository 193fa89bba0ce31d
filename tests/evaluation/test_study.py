"""Means, intervals, tables and figures of studies, on grids with known results."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from qos_jax.evaluation.metrics import METRICS
from qos_jax.evaluation.statistics import crossed_p_value
from qos_jax.evaluation.study import StudyResult
from qos_jax.report.pictures import Picture
from qos_jax.report.study_report import study_figure, study_html, study_markdown


def row(world: str, router: str, kind: str, load: float, seed: int, qos: float, training_seed: int = 0) -> dict:
    others = {metric: 1.0 for metric in METRICS}
    place = {"world": world, "load": load, "seed": seed, "training_seed": training_seed}
    return place | {"router": router, "kind": kind} | others | {"qos": qos}


def result(axis: str | None = None) -> StudyResult:
    difficulty = {1000: 0.0, 1001: 0.2}  # of the requests, the same for all routers
    rows = []
    for world, shift in (("easy", 0.1), ("hard", 0.0)):
        for load in (0.6, 0.9):
            for seed, change in difficulty.items():
                base = 0.4 + shift + change
                rows += [
                    row(world, "slow", "heuristic", load, seed, base - 0.1),
                    row(world, "quick", "heuristic", load, seed, base),
                    row(world, "oracle_impact", "oracle", load, seed, base + 0.2),
                    *(row(world, "mvr", "learned", load, seed, base + 0.05 + 0.01 * t, t) for t in (0, 1, 2)),
                ]
    return StudyResult("small", "Small", "Who?", axis, rows)


def test_gains_are_paired_with_the_best_heuristic():
    gain = next(gain for gain in result().gains if gain["world"] == "hard" and gain["load"] == 0.9)
    assert gain["best"] == "quick"
    assert gain["best_qos"] == pytest.approx(0.5)
    assert gain["oracle"] == pytest.approx(0.7)
    assert (gain["least"], gain["mean"], gain["greatest"]) == pytest.approx((0.05, 0.06, 0.07))
    # The difficulty of the requests differs by 0.2 and cancels; the spread over training seeds remains.
    assert gain["high"] - gain["mean"] == pytest.approx(12.706 * 0.01 / math.sqrt(3), rel=1e-3)
    assert gain["training_seeds"] == 3


def test_p_values_of_gains_are_corrected_for_their_number():
    alone = crossed_p_value(np.array([[0.05, 0.05], [0.06, 0.06], [0.07, 0.07]]))
    assert [gain["p"] for gain in result().gains] == pytest.approx([4 * alone] * 4)  # two worlds at two loads, alike


def with_a_plan():
    rows = list(result().rows)
    for seed, difficulty in ((1000, 0.0), (1001, 0.2)):
        for name, advantage in (("hindsight_plan", 0.24), ("upper_bound", 0.3)):
            rows.append(row("hard", name, "oracle", 0.9, seed, 0.4 + difficulty + advantage) | {"ttft_s": None})
        rows.append(row("hard", "idle", "heuristic", 0.9, seed, 0.3) | {"ttft_s": None})
    return StudyResult("small", "Small", "Who?", None, rows)


def test_with_a_plan_routers_are_in_order_down_to_half_of_the_bound():
    panels = {axes.get_title(loc="left"): axes for axes in study_figure(with_a_plan()).axes}
    upwards = [text.get_text() for text in panels["hard, load 0.9"].get_yticklabels()]
    assert upwards == ["slow", "quick", "MVR (learned)", "impact oracle", "hindsight plan", "upper bound"]


def test_more_learned_routers_than_colours_are_levels():
    def title(count):
        rows = [row("w", f"mvr_{i}", "learned", 0.9, seed, 0.5) for i in range(count) for seed in (1000, 1001)]
        return study_figure(StudyResult("small", "Small", "Who?", None, rows)).axes[0].get_title(loc="left")

    assert (title(8), title(9)) == ("w", "w, load 0.9")


def test_against_a_cost_every_router_is_a_point_in_the_panel_of_its_world_and_load():
    figure = study_figure(dataclasses.replace(result(), cost="drop_rate"))
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(panels) == ["easy, load 0.6", "easy, load 0.9", "hard, load 0.6", "hard, load 0.9"]
    points = {line.get_label(): line.get_xydata() for line in panels["hard, load 0.9"].get_lines()}
    assert points["MVR (learned)"] == pytest.approx(np.array([[1.0, 0.56]]))
    assert points["quick"] == pytest.approx(np.array([[1.0, 0.5]]))


def test_shares_are_of_the_gap_between_the_best_heuristic_and_the_plan():
    assert not result().shares
    planned = with_a_plan()
    shares = {share["router"]: share for share in planned.shares}
    assert {name: share["mean"] for name, share in shares.items()} == pytest.approx(
        {"mvr": 0.06 / 0.24, "quick": 0.0, "slow": -0.1 / 0.24, "idle": -0.2 / 0.24, "oracle_impact": 0.2 / 0.24}
    )
    assert all((share["world"], share["load"], share["best"]) == ("hard", 0.9, "quick") for share in shares.values())
    assert (shares["mvr"]["plan"], shares["mvr"]["bound"]) == pytest.approx((0.74, 0.8))
    assert shares["mvr"]["high"] - shares["mvr"]["mean"] == pytest.approx(12.706 * 0.01 / math.sqrt(3) / 0.24, rel=1e-3)
    assert "| MVR (learned) | hard | 0.9 | quick 0.500 | 0.740 | 0.800 | +25% [" in study_markdown(planned, "", {})


def test_oracles_come_last_and_the_best_first():
    assert list(result().kinds) == ["mvr", "quick", "slow", "oracle_impact"]


def test_a_router_without_runs_in_a_world_is_left_out_there():
    rows = [entry for entry in result().rows if not (entry["world"] == "hard" and entry["router"] == "mvr")]
    partial = StudyResult("small", "Small", "Who?", None, rows)
    assert {gain["world"] for gain in partial.gains} == {"easy"}
    assert not any(entry["world"] == "hard" and entry["router"] == "mvr" for entry in partial.summary)
    assert study_figure(partial).get_label()


def test_a_metric_without_a_value_is_a_dash_on_the_page():
    rows = [entry | {"ttft_s": None} for entry in result().rows]
    page = study_html(StudyResult("small", "Small", "Who?", None, rows), Picture("A picture.", {".png": b"png"}))
    assert "nan" not in page.lower()
    assert "<td>-</td>" in page


@pytest.mark.parametrize("axis", [None, "difficulty"])
def test_a_figure_has_a_panel_for_each_world_or_one_for_each_load(axis):
    figure = study_figure(result(axis))
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    gains = ["", ""]  # a panel of gains below each panel of QoS
    assert titles == (["easy", "hard"] if axis is None else ["load 0.6", "load 0.9"]) + gains


def test_the_markdown_table_has_a_line_for_each_gain():
    lines = study_markdown(result(), "", {}).splitlines()
    assert sum(line.startswith("| MVR (learned)") for line in lines) == 4


def test_requested_metrics_are_shown_for_every_router_at_the_load_nearest_to_09():
    rows = [row("w", "mvr", "learned", load, seed, seed / 2000) for load in (0.6, 0.9) for seed in (1000, 1002)]
    rows = [entry | {"drop_rate": 0.25, "qos_per_kj": None} for entry in rows]
    text = study_markdown(StudyResult("small", "Small", "Who?", None, rows, ("drop_rate", "qos_per_kj")), "", {})
    (line,) = [line for line in text.splitlines() if line.startswith("| MVR (learned) | w | 0.9 |")]
    # Student's quantile of 1 degree of freedom times the standard error of 0.500 and 0.501
    assert line == "| MVR (learned) | w | 0.9 | 0.500 ± 0.006 | 25.0 ± 0.0 | - |"
    assert "| MVR (learned) | w | 0.6 |" not in text


def test_claims_are_against_the_best_of_the_papers_heuristics_in_each_metric():
    rows = [row("w", "mvr", "learned", 0.9, seed, 0.6) | {"latency_per_token_s": 0.02} for seed in (1000, 1001)]
    for name, qos, latency_s in (
        ("bert_router", 0.2, 0.05),
        ("round_robin", 0.5, 0.04),
        ("shortest_queue", 0.4, 0.025),
    ):
        rows += [
            row("w", name, "heuristic", 0.9, seed, qos) | {"latency_per_token_s": latency_s} for seed in (1000, 1001)
        ]
    (claim,) = StudyResult("small", "Small", "Who?", None, rows).claims
    assert claim["qos"] == pytest.approx(0.2)
    assert claim["latency_per_token_s"] == pytest.approx(-0.2)
    assert claim["qos_per_gb_s"] == pytest.approx(0.0)
    assert not result().claims  # some of the three did not take part
