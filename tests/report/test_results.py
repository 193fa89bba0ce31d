"""What is written is complete, strict, self-contained, and never half there."""

from __future__ import annotations

import base64
import csv
import dataclasses
import html.parser
import json
import os
import pathlib
import re
import subprocess
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure

from qos_jax import InputError
from qos_jax.evaluation import metrics
from qos_jax.io import provenance
from qos_jax.report import plots, results, summary_table
from qos_jax.report.style import COLUMN, FULL, Width
from tests.helpers.browser import BROWSER_FLAGS, CHROMIUM
from tests.helpers.small_runs import KINDS, LOADS, SEEDS, runs, runs_at

COMMAND = "qos-jax evaluate --name='<b>&'"


def small_results(**config) -> dict:
    return results.results_of(runs(), {"preset": "small", **config}, COMMAND)


def figure(caption: str = "Points.") -> Figure:
    """A figure that takes more bytes as an SVG than as a PNG."""
    drawn = Figure(figsize=(2, 1))
    drawn.add_subplot().scatter(*np.random.default_rng(0).uniform(size=(2, 500)), s=4)
    drawn.set_label(caption)
    return drawn


def broken_figure() -> Figure:
    drawn = figure()
    drawn.text(0.5, 0.5, r"$\frac{$")  # not mathtext: fails when it is drawn
    return drawn


STRANGE_NAMES = {
    "formula": "cost $x_{$ per",
    "bytes": os.fsdecode(b"run-\xff\xfe"),
    "long": 241 * "x",
    "long in bytes": 120 * "ä",
    "two lines": "new\nline",
}


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
        self.texts.append(data.strip())
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1][0] += data


def shown() -> dict[str, metrics.Metric]:
    """Metrics of a world without sessions and failures."""
    return {name: metric for name, metric in metrics.METRICS.items() if name in runs()[0].metrics}


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
        assert set(runs()[0].metrics) == set(shown())
        assert set(metrics.METRICS) - set(shown()) == {"lost_rate", "cached_share"}  # of failures and sessions

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
        figures = {
            "one": figure(),
            "two": figure("Two < 3."),
            "qos_against_load": partial(plots.qos_against_load, small_results()["summary"]),
        }
        path = results.write_report(tmp_path / "new" / "folder", small_results(), figures)
        text = path.read_text()
        page = Page(text)
        assert path == tmp_path / "new" / "folder" / "report.html"
        assert all(link.startswith(("data:", "#")) for link in page.links)
        assert not re.search(r"https?:|url\((?!#)|@import|<link|<script ", re.sub(r'"data:[^"]*"', "", text))
        for name, image in zip(("one", "two"), page.images, strict=True):
            picture = base64.b64decode(image["src"].partition("base64,")[2])
            assert picture == (path.parent / f"{name}.png").read_bytes()
            assert picture.startswith(b"\x89PNG")
        assert page.images[1]["alt"] == "Two < 3."

    def test_identifiers_of_pictures_are_unique(self, tmp_path: pathlib.Path) -> None:
        draw = partial(plots.qos_against_load, small_results()["summary"], routers=["round_robin"])
        text = results.write_report(tmp_path, small_results(), {"one": draw}).read_text()
        wide, narrow = (
            (set(re.findall(r' id="([^"]*)"', svg)), set(re.findall(r'(?:url\(|href=")#([^")]*)', svg)))
            for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)
        )
        assert not wide[0] & narrow[0]
        assert all(used and used <= ids for ids, used in (wide, narrow))

    def test_page_says_how_it_was_made(self, tmp_path: pathlib.Path) -> None:
        written = small_results()
        page = Page(results.write_report(tmp_path, written, {}, title="Small & simple").read_text())
        assert {COMMAND, "Small & simple", written["date"], "0, 1"} <= set(page.texts)
        assert set(written["versions"].values()) <= set(page.texts)
        assert {metric.meaning for metric in shown().values()} <= set(page.texts)

    def test_tables_show_the_means_and_mark_the_best_that_is_no_oracle(self, tmp_path: pathlib.Path) -> None:
        written = small_results()
        _, _, qos, *loads = Page(results.write_report(tmp_path, written, {}).read_text()).tables
        assert [row[0][0] for row in qos[1:]] == ["round robin", "only gamma", "refuse all", "oracle"]
        means = {(row["router"], row["load"]): row["mean"] for row in written["summary"] if row["metric"] == "qos"}
        for row in qos[1:]:
            for load, (text, is_bold) in zip(LOADS, row[1:], strict=False):
                assert text.startswith(f"{means[row[0][0].replace(' ', '_'), load]:.3f}")
                assert is_bold == (row[0][0] == "round robin")
        assert len(loads) == len(LOADS)
        heads = [text.strip() for text, _ in loads[0][0]]
        assert heads == ["router", *(metric.title for metric in shown().values())]
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

    def test_a_figure_that_fails_is_one_warning_and_loses_nothing_else(self, tmp_path: pathlib.Path, capsys) -> None:
        def fails() -> Figure:
            raise ZeroDivisionError("no\ndata")

        figures = {"one": figure(), "broken": broken_figure(), "fails": fails, "two": figure()}
        written = small_results()
        path = results.write_report(tmp_path, written, figures)
        assert json.loads((tmp_path / "results.json").read_text()) == written
        assert len(Page(path.read_text()).images) == 2
        names = {each.name for each in tmp_path.iterdir()}
        pictures = {f"{name}.{kind}" for name in ("one", "two") for kind in ("png", "pdf", "svg")}
        assert names == {"results.json", "summary.csv", "summary.tex", "report.html"} | pictures
        broken, failed = capsys.readouterr().err.splitlines()
        assert broken.startswith("warning: the picture broken is left out: ValueError")
        assert failed == "warning: the picture fails is left out: ZeroDivisionError: no data"

    def test_numbers_are_written_before_anything_is_drawn(self, tmp_path: pathlib.Path) -> None:
        found = []

        def draw() -> Figure:
            found.extend(sorted(each.name for each in tmp_path.iterdir()))
            return figure()

        results.write_report(tmp_path, small_results(), {"one": draw})
        assert found == ["results.json", "summary.csv", "summary.tex"]

    def test_pictures_that_cannot_be_listed_or_written_are_a_warning(self, tmp_path: pathlib.Path, capsys) -> None:
        (tmp_path / "one.png").mkdir()
        results.write_report(tmp_path, small_results(), {"one": figure(), "two": figure()})
        assert (tmp_path / "two.png").exists()

        def no_figures() -> dict[str, Figure]:
            raise ZeroDivisionError("no data")

        results.write_report(tmp_path, small_results(), no_figures)
        one, none = capsys.readouterr().err.splitlines()
        assert one.startswith(f"warning: the picture one is left out: {tmp_path}/one.png")
        assert none == "warning: the pictures are left out: ZeroDivisionError: no data"

    def test_ctrl_c_while_pictures_are_drawn_says_what_is_written(self, tmp_path: pathlib.Path, capsys) -> None:
        def draw() -> Figure:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            results.write_report(tmp_path, written := small_results(), {"one": draw})
        assert json.loads((tmp_path / "results.json").read_text()) == written
        assert capsys.readouterr().err == (
            f"stopped: {tmp_path}/results.json is written, the report and pictures are not\n"
        )

    @pytest.mark.parametrize("name", STRANGE_NAMES.values(), ids=STRANGE_NAMES)
    def test_names_that_are_no_text_or_formula_or_long_lose_nothing(self, tmp_path: pathlib.Path, capsys, name) -> None:
        named = [dataclasses.replace(run, router=dataclasses.replace(run.router, name=name)) for run in runs_at(0.5)]
        found = results.results_of(named, {"preset": name}, f"qos-jax evaluate --out={name}")
        figures = {
            "shares": partial(plots.routing_shares, named, ("$a_{", "b", "c")),
            f"learning_curve_{name}": figure(),
        }
        results.write_report(tmp_path / name, found, figures, title=name)
        assert not capsys.readouterr().err
        assert len(list((tmp_path / name).iterdir())) == 4 + 6 + 3
        assert json.loads((tmp_path / name / "results.json").read_text())["config"]["preset"] == name

    def test_csv_has_a_line_for_each_object_of_the_summary(self, tmp_path: pathlib.Path) -> None:
        written = small_results()
        results.write_report(tmp_path, written, {})
        with (tmp_path / "summary.csv").open() as file:
            lines = list(csv.DictReader(file))
        for line, row in zip(lines, written["summary"], strict=True):
            assert (line["router"], line["metric"], float(line["load"])) == (row["router"], row["metric"], row["load"])
            assert line["mean"] == ("" if row["mean"] is None else str(row["mean"]))

    def test_latex_has_a_line_for_each_router_with_the_best_bold_and_oracles_in_italics(
        self, tmp_path: pathlib.Path
    ) -> None:
        written = small_results()
        results.write_report(tmp_path, written, {})
        text = (tmp_path / "summary.tex").read_text()
        lines = {line.split(" & ")[0]: line for line in text.splitlines() if " & $" in line}
        assert list(lines) == ["round robin", "only gamma", "refuse all", r"\textit{oracle}"]
        rows = {(row["router"], row["load"]): row for row in written["summary"] if row["metric"] == "qos"}
        for load in LOADS:
            row = rows["round_robin", load]
            cell = rf"$\mathbf{{{row['mean']:.3f}}} \pm {(row['high'] - row['low']) / 2:.3f}$"
            assert cell in lines["round robin"]
            assert rf"$\mathit{{{rows['oracle', load]['mean']:.3f}}} " in lines[r"\textit{oracle}"]
        assert [line for line in text.splitlines() if "rule" in line] == [
            "\\toprule", "\\midrule", "\\midrule", "\\bottomrule"
        ]  # fmt: skip
        assert text.count("&") == len(LOADS) * (1 + len(lines)) + 1 + COMMAND.count("&")


class TestPictures:
    def draw(self, *, width: Width = FULL) -> Figure:
        drawn = Figure(figsize=(width.inches, 1))
        drawn.add_subplot().set_title("A title & more")
        drawn.set_label("A caption.")
        return drawn

    def test_a_drawing_is_written_in_three_formats_at_two_widths(self, tmp_path: pathlib.Path) -> None:
        results.write_report(tmp_path, small_results(), {"one": self.draw})
        for ending, width in (("", FULL), ("_column", COLUMN)):
            png = (tmp_path / f"one{ending}.png").read_bytes()
            pixels = int.from_bytes(png[16:20], "big")
            assert pixels == round(width.inches * width.dots_per_inch)
            svg = (tmp_path / f"one{ending}.svg").read_text()
            assert "A title &amp; more" in svg
            pdf = (tmp_path / f"one{ending}.pdf").read_bytes()
            assert b"/TrueType" in pdf or b"/CIDFontType2" in pdf
            assert b"/Type3" not in pdf

    def test_the_same_figure_gives_the_same_files(self, tmp_path: pathlib.Path) -> None:
        for folder in ("a", "b"):
            results.write_report(tmp_path / folder, small_results(), {"one": self.draw})
        for path in (tmp_path / "a").glob("one*"):
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()

    def test_a_page_shows_the_narrow_form_on_a_phone(self, tmp_path: pathlib.Path) -> None:
        text = results.write_report(tmp_path, small_results(), {"one": self.draw}).read_text()
        assert text.count('<div class="wide">') == text.count('<div class="narrow">') == 1

    def test_main_curves_have_values_to_hover(self, tmp_path: pathlib.Path) -> None:
        written = small_results()
        draw = partial(plots.qos_against_load, written["summary"])
        text = results.write_report(tmp_path, written, {"qos_against_load": draw}).read_text()
        for row in written["summary"]:
            if row["metric"] == "qos" and row["router"] == "round_robin":
                half = (row["high"] - row["low"]) / 2
                assert f"<title>round robin, load {row['load']:g}: {row['mean']:.3f} ± {half:.3f}</title>" in text
        assert 'class="tip"' not in (tmp_path / "qos_against_load.pdf").read_text(errors="ignore")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    written = small_results()
    figures = {
        "gains_against_load": partial(plots.gains_against_load, written["gains"]),
        "qos_against_load": partial(plots.qos_against_load, written["summary"]),
        "one": figure(),
    }
    return results.write_report(tmp_path_factory.mktemp("report"), written, figures).read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
class TestBrowser:
    def found(self, report: str, tmp_path: pathlib.Path, width: int, script: str) -> Any:
        """Returns what a script finds in the report, shown in a frame of a width; nothing there may fail."""
        frame = report.replace("&", "&amp;").replace('"', "&quot;")
        page = tmp_path / "frame.html"
        page.write_text(
            f'<iframe style="border: 0" width="{width}" height="800" srcdoc="{frame}"></iframe><pre id="found"></pre>'
            "<script>document.querySelector('iframe').onload = (event) => {"
            f"const page = event.target.contentDocument; const found = (() => {{ {script} }})();"
            "document.getElementById('found').textContent = JSON.stringify(found); }</script>"
        )
        command = [CHROMIUM, *BROWSER_FLAGS, f"--user-data-dir={tmp_path}/profile", "--window-size=1500,900"]
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in done.stderr
        (found,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
        return json.loads(html.unescape(found))

    @pytest.mark.parametrize("width", [360, 1400])
    def test_the_page_fits_and_every_picture_is_in_sight(self, report, tmp_path, width) -> None:
        found = self.found(
            report,
            tmp_path,
            width,
            "return [page.documentElement.scrollWidth, ...[...page.querySelectorAll('figure svg, figure img')]"
            ".filter((each) => each.getBoundingClientRect().width).map((each) => [each.closest('div').className,"
            "each.getBoundingClientRect().left, each.getBoundingClientRect().right])]",
        )
        scroll_width, *pictures = found
        assert scroll_width <= width
        assert len(pictures) == 3
        assert [kind for kind, _, _ in pictures[:2]] == ["narrow" if width == 360 else "wide"] * 2
        assert all(left >= 0 and right <= width for _, left, right in pictures)

    def test_a_click_on_a_head_sorts_the_table(self, report, tmp_path) -> None:
        names = "[...table.tBodies[0].rows].map((row) => row.cells[0].textContent)"
        before, descending, ascending, by_name = self.found(
            report,
            tmp_path,
            1400,
            "const table = page.querySelectorAll('table')[2]; const click = (column) => "
            "table.tHead.rows[0].cells[column].querySelector('button').click();"
            f"const found = [{names}]; for (const column of [1, 1, 0]) {{ click(column); found.push({names}); }}"
            "return found",
        )
        first = {
            row["router"].replace("_", " "): row["mean"]
            for row in small_results()["summary"]
            if row["metric"] == "qos" and row["load"] == LOADS[0]
        }
        assert before == ["round robin", "only gamma", "refuse all", "oracle"]
        assert descending == sorted(first, key=lambda name: -first[name])
        assert ascending == descending[::-1]
        assert by_name == sorted(first)

    def test_a_pointer_over_a_point_shows_its_value(self, report, tmp_path) -> None:
        text, hidden = self.found(
            report,
            tmp_path,
            1400,
            "const mark = page.querySelector('.wide svg .tip'); const tip = page.getElementById('tip');"
            "const hidden = tip.hidden; const over = new page.defaultView.Event('pointerover', { bubbles: true });"
            "mark.dispatchEvent(over); return [tip.textContent, [hidden, tip.hidden]]",
        )
        assert re.fullmatch(r"[\w -]+, load [\d.]+: [-+]\d\.\d{3} \(\w+\) ± \d\.\d{3}", text)
        assert hidden == [True, False]


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
