"""Figures show the data that they are given."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import FillBetweenPolyCollection, PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from qos_jax import InputError
from qos_jax.evaluation.metrics import latency_per_token_s
from qos_jax.report import expert_plots, plots, study_plots, style
from qos_jax.report.gains import paired_gains
from qos_jax.report.results import results_of
from qos_jax.report.style import COLUMN, FULL, display_name
from qos_jax.sim.iterations import Activity, iterations_of
from tests.helpers.reference import replay_reference
from tests.helpers.small_runs import EXPERT_NAMES, EXPERTS, KINDS, LIMIT_S, LOADS, WARM_UP, runs, runs_at


def line(figure: Figure, label: str):
    (found,) = [each for axes in figure.axes for each in axes.get_lines() if each.get_label() == label]
    return found


def summary() -> list[dict]:
    return results_of(runs(), {}, "")["summary"]


@pytest.fixture(scope="module", autouse=True)
def global_style_is_left_alone():
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before


class TestQosAgainstLoad:
    def test_has_a_curve_for_each_router(self) -> None:
        figure = plots.qos_against_load(summary())
        for router in KINDS:
            rows = [row for row in summary() if row["metric"] == "qos" and row["router"] == router]
            np.testing.assert_array_equal(line(figure, display_name(router)).get_xdata(), LOADS)
            np.testing.assert_array_equal(line(figure, display_name(router)).get_ydata(), [row["mean"] for row in rows])
        assert line(figure, "oracle").get_linestyle() == "--"
        assert line(figure, "round robin").get_color() == style.HIGHLIGHTED["round_robin"]

    def test_bands_are_the_intervals(self) -> None:
        figure = plots.qos_against_load(summary())
        bands = [each for each in figure.axes[0].collections if isinstance(each, FillBetweenPolyCollection)]
        rows = [row for row in summary() if row["metric"] == "qos" and row["router"] == "round_robin"]
        corners = {(row["load"], row[end]) for row in rows for end in ("low", "high")}
        drawn = [{tuple(point) for path in band.get_paths() for point in path.vertices.tolist()} for band in bands]
        assert corners in drawn

    def test_one_load_and_one_seed_can_be_drawn(self) -> None:
        one = [run for run in runs_at(LOADS[0]) if run.scenario.seed == 0]
        figure = plots.qos_against_load(results_of(one, {}, "")["summary"])
        assert set(line(figure, "round robin").get_ydata()) == {one[0].metrics["qos"]}

    def test_only_the_routers_that_are_asked_for_are_drawn(self) -> None:
        figure = plots.qos_against_load(summary(), routers=["only_gamma", "round_robin"])
        drawn = {each.get_label() for each in figure.axes[0].get_lines()}
        assert drawn == {"only gamma", "round robin"}
        with pytest.raises(InputError, match="'nothing' is not in the results"):
            plots.qos_against_load(summary(), routers=["nothing"])

    @pytest.mark.parametrize("width", [FULL, COLUMN])
    def test_the_legend_lies_in_the_figure_and_beside_the_curves(self, width) -> None:
        figure = plots.qos_against_load(many_routers(), width=width)
        FigureCanvasAgg(figure).draw()
        legend, panel = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
        assert legend.x0 >= 0 and legend.y0 >= 0
        assert legend.x1 <= figure.bbox.x1 and legend.y1 <= figure.bbox.y1
        assert not legend.overlaps(panel)
        assert panel.width > 0.5 * figure.bbox.width
        smallest = min(text.get_fontsize() for text in figure.legends[0].get_texts())
        assert smallest >= 7

    def test_grey_curves_have_one_entry_and_are_named_in_the_caption(self) -> None:
        figure = plots.qos_against_load(many_routers())
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["20 other heuristics"]
        assert all(f"router {i}" in figure.get_label() for i in range(20))


def many_routers() -> list[dict]:
    return [
        {"router": f"router_{i}", "kind": "heuristic", "load": load, "rate_per_s": load, "metric": "qos"}
        | dict.fromkeys(("mean", "low", "high"), 0.7 * math.exp(-i * load))
        for i in range(20)
        for load in (0.5, 1.0)
    ]


class TestGainsAgainstLoad:
    def gains(self, **shift: float) -> list[dict]:
        kinds = {"impact_greedy": "heuristic", "round_robin": "heuristic", "mvr": "learned", "oracle_impact": "oracle"}
        found = {"impact_greedy": 0.0, "round_robin": -0.3, "mvr": 0.01, "oracle_impact": 0.1} | shift
        rows = [
            {"router": name, "kind": kind, "load": load, "rate_per_s": 10 * load, "seed": seed}
            | {"qos": 0.6 + 0.1 * seed + found[name] * load + 0.001 * seed * load}
            for name, kind in kinds.items()
            for load in (0.5, 1.0)
            for seed in range(3)
        ]
        return paired_gains(rows)

    def test_curves_are_the_gains_over_impact_greedy(self) -> None:
        figure = plots.gains_against_load(self.gains())
        np.testing.assert_allclose(line(figure, "MVR (learned)").get_ydata(), [0.005, 0.01])
        assert "over\nimpact-greedy (zoomed)" in figure.axes[0].get_ylabel()

    def test_the_axis_is_zoomed_to_the_learned_router_and_the_caption_names_what_is_below(self) -> None:
        figure = plots.gains_against_load(self.gains())
        bottom, top = figure.axes[0].get_ylim()
        assert bottom < 0 < 0.01 < top < 0.03
        assert "round robin" not in {each.get_label() for each in figure.axes[0].get_lines()}
        assert "Below the picture at most loads: round robin." in figure.get_label()

    def test_reference_and_routers_can_be_chosen(self) -> None:
        figure = plots.gains_against_load(self.gains(), reference="mvr", routers=["oracle_impact"])
        np.testing.assert_allclose(line(figure, "impact oracle").get_ydata(), [0.045, 0.09])
        with pytest.raises(InputError, match="no gains over 'random'"):
            plots.gains_against_load(self.gains(), reference="random")

    def test_one_load_and_one_seed_can_be_drawn(self) -> None:
        rows = [row for row in results_of(runs_at(0.5), {}, "")["rows"] if row["seed"] == 0]
        figure = plots.gains_against_load(paired_gains(rows))
        FigureCanvasAgg(figure).draw()


class TestLatencyCdf:
    def test_curves_end_at_the_answered_share_and_cross_the_limit_at_the_share_in_time(self) -> None:
        figure = plots.latency_cdf(runs_at(1.5), EXPERTS, LIMIT_S)
        in_time = {
            text.get_text().split("%  ")[1]: text.get_text().split()[0] for text in figure.legends[0].get_texts()
        }
        for router in ("round_robin", "only_gamma", "oracle"):
            mine = [run for run in runs_at(1.5) if run.router.name == router]
            label = f"{in_time[router.replace('_', ' ')]} %  {router.replace('_', ' ')}"
            latency_ms, share = line(figure, label).get_data()
            assert share[-1] == pytest.approx(1 - np.mean([run.metrics["drop_rate"] for run in mine]))
            within = 1 - np.mean([run.metrics["violation_rate"] for run in mine])
            assert np.append(0, share)[(latency_ms <= 1e3 * LIMIT_S).sum()] == pytest.approx(within)
            assert int(in_time[router.replace("_", " ")]) == round(100 * within)
        assert share[-1] <= 1

    def test_latencies_are_those_of_the_counted_requests_of_all_seeds(self) -> None:
        mine = [run for run in runs_at(0.5) if run.router.name == "round_robin"]
        figure = plots.latency_cdf(mine, EXPERTS, LIMIT_S)
        (curve,) = [each for each in figure.axes[0].get_lines() if each.get_label().endswith("round robin")]
        each = [latency_per_token_s(EXPERTS, run.trace, run.assignment, run.replayed)[WARM_UP:] for run in mine]
        expected = np.sort(np.concatenate(each))
        np.testing.assert_allclose(curve.get_xdata(), 1e3 * expected[np.isfinite(expected)])


class TestRoutingShares:
    def test_bars_are_the_shares(self) -> None:
        figure = plots.routing_shares(runs_at(1.5), EXPERT_NAMES)
        (axes,) = figure.axes
        widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
        assert list(widths) == [*EXPERT_NAMES, "dropped"]
        np.testing.assert_allclose(np.sum(list(widths.values()), 0), 1.0)
        names = [text.get_text() for text in axes.get_yticklabels()]
        for router in KINDS:
            mine = [run for run in runs_at(1.5) if run.router.name == router]
            row = names.index(router.replace("_", " "))
            assert widths["dropped"][row] == pytest.approx(np.mean([run.metrics["drop_rate"] for run in mine]))
            for expert, name in enumerate(EXPERT_NAMES):
                answered = [(run.assignment == expert) & ~run.replayed.log.dropped for run in mine]
                assert widths[name][row] == pytest.approx(np.mean([each[WARM_UP:].mean() for each in answered]))

    def test_experts_of_one_name_are_one(self) -> None:
        figure = plots.routing_shares(
            [run for run in runs_at(0.5) if run.router.name == "round_robin"], ["a", "b", "a"]
        )
        widths = {bars.get_label(): bars[0].get_width() for bars in figure.axes[0].containers}
        assert widths["a"] + widths["b"] + widths["dropped"] == pytest.approx(1.0)
        assert widths["a"] > 1.5 * widths["b"]


class TestExpertTimeline:
    def test_counts_and_memory_are_those_of_the_requests_on_the_expert(self) -> None:
        (run, *_) = [run for run in runs_at(1.5) if run.router.name == "round_robin"]
        times_s = np.random.default_rng(0).uniform(0, 1.1 * run.trace.arrival_s[-1], 40)
        waiting, running, kv_share = expert_plots.expert_timeline(run, EXPERTS, times_s)
        log = run.replayed.log
        for t, time_s in enumerate(times_s):
            blocks = np.zeros(3)
            for expert in range(3):
                mine = (run.assignment == expert) & ~log.dropped
                assert waiting[t, expert] == np.sum(
                    mine & (run.trace.arrival_s <= time_s) & (log.first_token_s > time_s)
                )
                on_gpu = np.flatnonzero(mine & (log.first_token_s <= time_s) & (log.finish_s > time_s))
                assert running[t, expert] == len(on_gpu)
                for j in on_gpu:
                    done = (time_s - log.first_token_s[j]) / (log.finish_s[j] - log.first_token_s[j])
                    generated = 1 + done * (run.trace.output_tokens[j, expert] - 1)
                    blocks[expert] += (run.trace.prompt_tokens[j] + generated + 7.5) / 16
            np.testing.assert_allclose(kv_share[t], blocks / EXPERTS.kv_blocks, atol=1e-9)

    def test_memory_is_close_to_what_the_reference_holds(self) -> None:
        (run, *_) = [run for run in runs_at(0.5) if run.router.name == "round_robin"]
        assert not run.replayed.log.preemptions.any()
        iterations = replay_reference(EXPERTS, run.trace, run.assignment).experts[0].iterations
        middle_s = np.array([each.start_s + each.duration_s / 2 for each in iterations])
        held = np.array([each.blocks_held for each in iterations])
        _, running, kv_share = expert_plots.expert_timeline(run, EXPERTS, middle_s)
        after_prefill = np.array([each.prefill_tokens == 0 for each in iterations])
        error = np.abs(EXPERTS.kv_blocks[0] * kv_share[:, 0] - held)
        assert (error <= running[:, 0] + 1e-6)[after_prefill].all()

    def test_panels_show_every_expert(self) -> None:
        (run, *_) = [run for run in runs_at(1.5) if run.router.name == "round_robin"]
        figure = expert_plots.expert_timelines(run, EXPERTS, EXPERT_NAMES)
        for axes in figure.axes:
            assert [each.get_label() for each in axes.get_lines()] == list(EXPERT_NAMES)
        most = max(each.get_ydata().max() for each in figure.axes[1].get_lines())
        assert 1 <= most <= EXPERTS.max_running[0]


def test_gantt_has_a_cell_for_each_request_in_each_iteration() -> None:
    (run, *_) = [run for run in runs_at(1.5) if run.router.name == "only_gamma"]
    log = iterations_of(EXPERTS, run.trace, run.assignment, 2, 1.0, 3.0)
    figure = expert_plots.iteration_gantt(log, "gamma")
    cells = {each.get_label(): each for each in figure.axes[0].collections if isinstance(each, PolyCollection)}
    for activity, label in ((Activity.PREFILL, "prefill"), (Activity.DECODE, "decode"), (Activity.WAITING, "waiting")):
        iteration, row = np.nonzero(log.activity == activity)
        assert len(iteration) > 0
        corners = np.array([path.vertices[:4] for path in cells[label].get_paths()])
        np.testing.assert_allclose(corners[:, :, 0].min(1), log.start_s[iteration])
        np.testing.assert_allclose(corners[:, :, 0].max(1), (log.start_s + log.duration_s)[iteration])
        np.testing.assert_allclose(corners[:, :, 1].mean(1), row)
    bars = figure.axes[1].patches
    np.testing.assert_allclose([bar.get_height() for bar in bars], 1e3 * log.duration_s)
    assert to_rgba(bars[0].get_facecolor()) in {tuple(each.get_facecolor()[0]) for each in cells.values()}


def test_gantt_refuses_an_idle_expert() -> None:
    (run, *_) = [run for run in runs_at(1.5) if run.router.name == "only_gamma"]
    with pytest.raises(InputError, match="alpha runs no iteration"):
        expert_plots.iteration_gantt(iterations_of(EXPERTS, run.trace, run.assignment, 0, 1.0, 3.0), "alpha")


@pytest.mark.parametrize("width", [FULL, COLUMN])
def test_every_figure_has_a_caption_and_can_be_saved_at_both_widths(tmp_path, width) -> None:
    run = runs_at(1.5)[0]
    figures = {
        "qos": plots.qos_against_load(summary(), width=width),
        "gains": plots.gains_against_load(results_of(runs(), {}, "")["gains"], width=width),
        "cdf": plots.latency_cdf(runs_at(1.5), EXPERTS, LIMIT_S, width=width),
        "shares": plots.routing_shares(runs_at(1.5), EXPERT_NAMES, width=width),
        "timelines": expert_plots.expert_timelines(run, EXPERTS, EXPERT_NAMES, width=width),
        "gantt": expert_plots.iteration_gantt(
            iterations_of(EXPERTS, run.trace, run.assignment, 0, 0.0, 1.0), "alpha", width=width
        ),
    }
    for name, figure in figures.items():
        assert figure.get_label().endswith(".")
        assert figure.get_figwidth() == width.inches
        figure.savefig(tmp_path / f"{name}.png", dpi=width.dots_per_inch)
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


class TestLearningCurve:
    def records(self, num_seeds: int) -> list[dict]:
        rows = [
            {"kind": "evaluation", "steps": 1000 * i, "seconds": 30.0 * i, "impact_greedy": 0.6}
            | {"qos": [0.1 * i + seed for seed in range(num_seeds)]}
            for i in range(4)
        ]
        return [{"kind": "train", "steps": 10, "seconds": 1.0}, *rows]

    def test_shows_every_seed_and_their_mean_against_steps_and_minutes(self) -> None:
        figure = plots.learning_curve(self.records(num_seeds=3))
        for axes, done in zip(figure.axes, ([0, 1000, 2000, 3000], [0, 0.5, 1.0, 1.5]), strict=True):
            reference, *seeds, mean = axes.get_lines()
            assert set(reference.get_ydata()) == {0.6}
            np.testing.assert_allclose([line.get_ydata()[-1] for line in seeds], [0.3, 1.3, 2.3])
            np.testing.assert_allclose(mean.get_ydata(), [1.0, 1.1, 1.2, 1.3])
            np.testing.assert_allclose(mean.get_xdata(), done)
            assert mean.get_linewidth() > max(line.get_linewidth() for line in [reference, *seeds])

    def test_one_seed_is_one_line(self) -> None:
        figure = plots.learning_curve(self.records(num_seeds=1))
        assert [line.get_label() for line in figure.axes[0].get_lines()] == ["impact-greedy", "learned"]

    def test_needs_an_evaluation(self) -> None:
        with pytest.raises(InputError, match="no evaluation"):
            plots.learning_curve(self.records(1)[:1])


def test_learned_routers_stand_out() -> None:
    rows = [row for row in summary() if row["router"] in ("round_robin", "only_gamma")]
    rows = [row | ({"kind": "learned"} if row["router"] == "only_gamma" else {}) for row in rows]
    figure = plots.qos_against_load(rows)
    assert line(figure, "only gamma").get_linewidth() > line(figure, "round robin").get_linewidth()
    assert line(figure, "only gamma").get_color() not in style.HIGHLIGHTED.values()


def test_a_rule_with_admission_is_dashed_in_the_colour_of_the_rule() -> None:
    kinds = dict.fromkeys(("shortest_queue", "shortest_queue+admission", "impact_greedy"), "heuristic")
    plain, admitting, other = style.looks(kinds).values()
    assert admitting["color"] == plain["color"] != other["color"]
    assert admitting["linestyle"] != plain.get("linestyle")
    assert len(style.legend_entries(style.looks(kinds))) == 3


def test_no_two_learned_routers_look_alike():
    looks = style.looks({f"router {number}": "learned" for number in range(15)}).values()
    assert len({(look["color"], look["marker"]) for look in looks}) == 15


def test_learned_routers_of_different_panels_have_one_entry() -> None:
    kinds = dict.fromkeys(("mvr", "never_drops", "mvr_edge_8"), "learned")
    looks = style.looks(kinds, panels=[{name} for name in kinds])
    assert [label for _, label in style.legend_entries(looks)] == ["learned router, one per panel"]


def rows_of(x: float, *names: str, mean: float = 0.5) -> list[dict]:
    return [{"kind": "learned", "x": x, "mean": mean, "low": 0.4, "high": 0.6, "router": name} for name in names]


def test_learned_routers_share_a_colour_only_if_they_never_meet_in_a_panel():
    figure = study_plots.qos_panels(
        {"a": rows_of(0.9, "any", "of_a"), "b": rows_of(0.9, "of_b"), "c": rows_of(0.9, "of_b", "any")}, "load", "QoS."
    )
    colour = {line.get_label(): line.get_color() for axes in figure.axes for line in axes.get_lines()}
    assert colour["any"] == style.LEARNED_COLOUR
    assert colour["of a"] == colour["of b"] != colour["any"]


class TestStudyPanels:
    def test_routers_that_look_the_same_have_one_entry_in_the_legend(self) -> None:
        panels = {"paper-3": rows_of(0.9, "mvr"), "edge-8": rows_of(0.9, "mvr_edge_8")}
        figure = study_plots.qos_panels(panels, "load", "QoS.")
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["MVR (learned), one per panel"]

    def test_different_routers_of_a_panel_look_different(self) -> None:
        names = [f"agent_{i}" for i in range(7)]
        figure = study_plots.qos_panels({"a": rows_of(0.9, *names)}, "load", "QoS.")
        looks = {(line.get_color(), line.get_marker()) for line in figure.axes[0].get_lines()}
        assert len(looks) == len(names)

    def test_a_row_holds_panels_of_one_preset_only(self) -> None:
        titles = [f"{preset}, {law}" for preset in ("paper-3", "edge-8") for law in ("Poisson", "bursts")]
        figure = study_plots.qos_panels({title: rows_of(0.9, "mvr") for title in titles}, "load", "QoS.")
        row = {axes.get_title(loc="left"): axes.get_subplotspec().rowspan.start for axes in figure.axes}
        assert row["paper-3, Poisson"] == row["paper-3, bursts"] != row["edge-8, Poisson"] == row["edge-8, bursts"]

    def test_gains_have_an_axis_of_their_own_below_that_shows_them(self) -> None:
        gains = {"a": rows_of(0.6, "mvr", mean=0.01) + rows_of(0.9, "mvr", mean=0.02)}
        for row in gains["a"]:
            row |= {"low": row["mean"] - 0.001, "high": row["mean"] + 0.001}
        figure = study_plots.qos_panels({"a": rows_of(0.6, "mvr") + rows_of(0.9, "mvr")}, "load", "QoS.", gains=gains)
        qos, gain = [axes for axes in figure.axes if axes.get_visible()]
        assert qos.get_ylim()[0] == 0
        assert gain.get_ylabel() == "gain (zoomed)"
        assert gain.get_ylim()[1] < 0.03
        np.testing.assert_allclose(gain.get_lines()[1].get_ydata(), [0.01, 0.02])

    def test_routers_far_below_are_written_and_do_not_hide_the_others(self) -> None:
        costs = {"cost_mean": 10.0, "cost_low": 9.0, "cost_high": 11.0}
        rows = [row | costs for row in rows_of(0.9, "mvr") + rows_of(0.9, "never", mean=0.001)]
        figure = study_plots.qos_trade_off({"a": rows}, "J", "QoS.")
        assert [text.get_text() for text in figure.axes[0].texts] == ["Below: never 0.001"]
        assert figure.axes[0].get_ylim()[0] > 0.3


@pytest.mark.parametrize(
    ("router", "name"),
    {
        "vllm_dp": "vLLM data-parallel",
        "vllm_dp_2026": "vLLM data-parallel (2026)",
        "round_robin": "round robin",
        "shortest_queue": "shortest queue",
        "impact_greedy": "impact-greedy",
        "bert_router": "BERT router",
        "mvr": "MVR (learned)",
        "mvr_no_graph": "MVR (no graph)",
        "mvr_edge_8": "MVR (edge-8)",
        "mvr_jetson_4_stale": "MVR (jetson-4 stale)",
        "learner_sac_edge_8": "SAC (edge-8)",
        "sac_paper_reward": "SAC paper reward",
        "expert_2": "expert 2 only",
        "my_router": "my router",
        "runs/paper-3@1": "runs/paper-3@1",
    }.items(),
)
def test_routers_have_names_that_people_know(router, name) -> None:
    assert display_name(router) == name
