"""What is written is complete, strict, self-contained, and never half there."""

from __future__ import annotations

import base64
import html.parser
import json
import pathlib
import re

import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure

from qos_jax import InputError
from qos_jax.evaluation import metrics
from qos_jax.io import provenance
from qos_jax.report import results, summary_table
from tests.helpers.small_runs import KINDS, LOADS, SEEDS, runs, runs_at

COMMAND = "qos-jax evaluate --name='<b>&'"


def small_results(**config) -> dict:
    return results.results_of(runs(), {"preset": "small", **config}, COMMAND)


def figure(caption: str = "A line.") -> Figure:
    drawn = Figure(figsize=(2, 1))
    drawn.add_subplot().plot([0, 1])
    drawn.set_label(caption)
    return drawn


def broken_figure() -> Figure:
    drawn = figure()
    drawn.text(0.5, 0.5, r"$\frac{$")  # not mathtext: fails when it is drawn
    return drawn


class Page(html.parser.HTMLParser):
    """The attributes and texts of an HTML page, and its tables as rows of (text, is bold) cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.images, self.texts, self.tables = [], [], [], []
        self.bold = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[name] for name in ("href", "src", "srcset", "data", "action") if name in values]
        if tag == "img":
            self.images.append(values)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append(["", False])
        if tag == "strong" and self.tables and self.tables[-1]:
            self.tables[-1][-1][-1][1] = True

    def handle_data(self, data):
        self.texts.append(data)
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1][0] += data


class TestResults:
    def test_rows_are_the_metrics_of_the_runs(self) -> None:
        rows = small_results()["rows"]
        assert len(rows) == len(KINDS) * len(LOADS) * len(SEEDS)
        for row, run in zip(rows, runs(), strict=True):
            scenario = run.scenario
            assert (row["router"], row["kind"]) == (run.router.name, KINDS[run.router.name])
            assert (row["load"], row["rate_per_s"], row["seed"]) == (scenario.load, scenario.rate_per_s, scenario.seed)
            for metric, value in run.metrics.items():
                assert row[metric] == (None if np.isnan(value) else value)

    def test_summary_has_mean_and_interval_over_seeds(self) -> None:
        for row in small_results()["summary"]:
            group = [run for run in runs_at(row["load"]) if run.router.name == row["router"]]
            values = [run.metrics[row["metric"]] for run in group]
            if np.isnan(values).any():
                assert row["mean"] is None
                continue
            assert row["mean"] == pytest.approx(np.mean(values))
            if np.std(values) > 0:
                interval = scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values))
                assert (row["low"], row["high"]) == pytest.approx(interval)

    def test_what_nobody_measured_is_null(self) -> None:
        dropped = [row for row in small_results()["rows"] if row["router"] == "refuse_all"]
        assert {row["latency_per_token_s"] for row in dropped} == {None}
        one_seed = results.results_of([run for run in runs() if run.scenario.seed == 0], {}, "")["summary"]
        assert {(row["low"], row["high"]) for row in one_seed} == {(None, None)}

    def test_config_may_hold_arrays(self) -> None:
        config = small_results(limits=np.float32([0.5, np.inf]), sizes=(1, 2), path=None)["config"]
        assert config == {"preset": "small", "limits": [0.5, None], "sizes": [1, 2], "path": None}

    def test_every_metric_is_explained(self) -> None:
        assert set(metrics.METRICS) == set(runs()[0].metrics)

    def test_versions_are_told(self) -> None:
        assert {"python", "jax", "jaxlib", "numpy", "flax", "qos_jax", "platform", "processor", "device"} <= set(
            provenance.versions()
        )
        assert provenance.versions()["numpy"] == np.__version__


class TestFiles:
    def test_json_is_strict_and_round_trips(self, tmp_path: pathlib.Path) -> None:
        written = small_results()
        results.write_report(tmp_path, written, {})
        text = (tmp_path / "results.json").read_text()

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        assert json.loads(text, parse_constant=refuse) == written

    def test_page_is_self_contained(self, tmp_path: pathlib.Path) -> None:
        path = results.write_report(
            tmp_path / "new" / "folder", small_results(), {"one": figure(), "two": figure("Two < 3.")}
        )
        text = path.read_text()
        page = Page(text)
        assert path == tmp_path / "new" / "folder" / "results.html"
        assert all(link.startswith("data:") for link in page.links)
        assert not re.search(r"https?:|//\w|url\(|@import|<script", re.sub(r'"data:[^"]*"', "", text))
        for name, image in zip(("one", "two"), page.images, strict=True):
            picture = base64.b64decode(image["src"].partition("base64,")[2])
            assert picture == (path.parent / f"{name}.png").read_bytes()
            assert picture.startswith(b"\x89PNG")
        assert page.images[1]["alt"] == "Two < 3."

    def test_page_says_how_it_was_made(self, tmp_path: pathlib.Path) -> None:
        written = small_results()
        page = Page(results.write_report(tmp_path, written, {}, title="Small & simple").read_text())
        assert {COMMAND, "Small & simple", written["date"], "0, 1"} <= set(page.texts)
        assert set(written["versions"].values()) <= set(page.texts)
        assert {metric.meaning for metric in metrics.METRICS.values()} <= set(page.texts)

    def test_tables_show_the_means_and_mark_the_best_that_is_no_oracle(self, tmp_path: pathlib.Path) -> None:
        written = small_results()
        (qos, *loads) = Page(results.write_report(tmp_path, written, {}).read_text()).tables
        assert [row[0][0] for row in qos[1:]] == ["round robin", "only gamma", "refuse all", "oracle"]
        means = {(row["router"], row["load"]): row["mean"] for row in written["summary"] if row["metric"] == "qos"}
        for row in qos[1:]:
            for load, (text, is_bold) in zip(LOADS, row[1:], strict=False):
                assert text.startswith(f"{means[row[0][0].replace(' ', '_'), load]:.3f}")
                assert is_bold == (row[0][0] == "round robin")
        assert len(loads) == len(LOADS)
        heads = [text.strip() for text, _ in loads[0][0]]
        assert heads == ["router", *(metric.title for metric in metrics.METRICS.values())]
        latency = heads.index("ms per token")
        assert loads[0][-2][latency][0] == "-"  # refuse all

    @pytest.mark.parametrize("obstacle", ["file where the folder should be", "folder where a file should be"])
    def test_refuses_a_place_that_cannot_be_written(self, tmp_path: pathlib.Path, obstacle: str) -> None:
        if obstacle.startswith("file"):
            folder = tmp_path / "taken" / "out"
            (tmp_path / "taken").write_text("")
        else:
            folder = tmp_path / "out"
            (folder / "results.json").mkdir(parents=True)
        with pytest.raises(InputError, match=re.escape(str(folder))):
            results.write_report(folder, small_results(), {})
        assert [path.name for path in folder.parent.rglob("*") if path.is_file()] in ([], ["taken"])

    def test_writes_nothing_when_a_figure_fails(self, tmp_path: pathlib.Path) -> None:
        results.write_report(tmp_path / "old", small_results(), {"one": figure()})
        before = {path: path.read_bytes() for path in (tmp_path / "old").iterdir()}
        for folder in (tmp_path / "old", tmp_path / "new"):
            with pytest.raises(ValueError, match="frac"):
                results.write_report(folder, small_results(), {"one": figure(), "two": broken_figure()})
        assert {path: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
        assert not (tmp_path / "new").exists()


class TestTerminalTable:
    def test_shows_the_means_and_marks_the_best_that_is_no_oracle(self) -> None:
        written = small_results()
        head, loads, *rows = summary_table.terminal_table(written).splitlines()
        assert head.startswith("QoS")
        assert loads.split() == ["load", "0.5", "1.5"]
        assert [row.split()[0] for row in rows] == ["round_robin", "only_gamma", "refuse_all", "oracle"]
        assert ["*" in row for row in rows] == [True, False, False, False]
        means = {(row["router"], row["load"]): row["mean"] for row in written["summary"] if row["metric"] == "qos"}
        for row in rows:
            numbers = re.findall(r"(\d\.\d{3}) \+-", row)
            assert numbers == [f"{means[row.split()[0], load]:.3f}" for load in LOADS]

    def test_fits_the_terminal_whatever_the_number_of_loads(self) -> None:
        loads = np.linspace(0.1, 2.0, 20)
        labels = {"router": "a_router_with_a_rather_long_name", "kind": "heuristic", "rate_per_s": 1.0}
        summary = [
            labels | {"load": load, "metric": metric, "mean": 10 * load, "low": 9 * load, "high": 11 * load}
            for load in loads
            for metric in ("qos", "ttft_s")
        ]
        text = summary_table.terminal_table({"summary": summary}, ("qos", "ttft_s"))
        assert max(map(len, text.splitlines())) <= 120
        for load in loads:
            assert f"{10 * load:.3f} +-{load:.3f}" in text
            assert f"{10_000 * load:.0f} +-{1000 * load:.0f}" in text
