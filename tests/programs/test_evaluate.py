"""The evaluation program from end to end: what it writes, and how it refuses what it cannot use."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qos_jax.evaluation.metrics import METRICS
from qos_jax.programs.evaluate import _learning_curves as learning_curves
from qos_jax.programs.router_flags import _run_of as run_of
from qos_jax.programs.router_flags import run_folders
from qos_jax.programs.world_flags import notes_on
from qos_jax.training.config import TrainingConfig, runs_of
from qos_jax.training.run_config import make_config
from qos_jax.training.run_folder import RunFolder
from qos_jax.worlds.config import WorldConfig
from tests.helpers.instant_env import small_learner
from tests.helpers.programs import Program, assert_refused, program_of

ROOT = pathlib.Path(__file__).parents[2]
PICTURES = {"gains_against_load", "qos_against_load", "latency_cdf", "routing_shares", "expert_timelines", "iterations"}
ENDINGS = [f"{width}.{kind}" for width in ("", "_column") for kind in ("png", "pdf", "svg")]
FILES = {"results.json", "summary.csv", "summary.tex", "report.html"}
FILES |= {f"{name}{ending}" for name in PICTURES for ending in ENDINGS}
TABLE_EXPERTS = "--experts=alpaca-7b@A40,chatglm2-6b@A40"
PLAIN = ("--preset=paper-3", "--routers=round_robin,shortest_queue", "--load=0.5", "--requests=200", "--seeds=2")
OF_OTHER_WORLDS = {"lost_rate", "cached_share"}  # metrics of worlds with failures and sessions


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    """Runs qos_jax.programs.evaluate in this process and returns its exit status."""
    yield program_of("evaluate")


@pytest.fixture(scope="module")
def results(program: Program, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one run has written, with its folder."""
    folder = tmp_path_factory.mktemp("evaluate") / "new" / "out"
    assert program(*PLAIN, f"--out={folder}") == 0
    return json.loads((folder / "results.json").read_text()) | {"folder": folder}


def test_the_folder_is_complete(results: dict[str, Any]) -> None:
    folder: pathlib.Path = results["folder"]
    assert {path.name for path in folder.iterdir()} == FILES
    for name in PICTURES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert page.count("<figure>") == len(PICTURES)
    assert "Routers on paper-3" in page


def test_the_run_can_be_repeated_from_what_is_written(results: dict[str, Any]) -> None:
    config = results["config"]
    assert config["preset"] == "paper-3"
    assert (config["seeds"], config["requests"], config["warmup"]) == ([1000, 1001], 200, 20)
    assert config["rates_per_s"] == pytest.approx([0.5 * config["saturation_per_s"]])
    assert results["command"].startswith("qos-jax evaluate --preset=paper-3 --routers=round_robin,")
    assert "--out" not in results["command"]
    assert {"python", "jax", "numpy", "qos_jax", "device"} <= set(results["versions"])


def test_every_row_names_every_metric(results: dict[str, Any]) -> None:
    rows = results["rows"]
    labels = ("router", "kind", "load", "rate_per_s", "seed")
    assert [(row["router"], row["seed"]) for row in rows] == [
        (router, seed) for router in ("round_robin", "shortest_queue") for seed in (1000, 1001)
    ]
    for row in rows:
        assert set(row) == {*labels, *METRICS} - OF_OTHER_WORLDS
        assert (row["kind"], row["load"], row["requests"]) == ("heuristic", 0.5, 180)
        assert 0.6 < row["qos"] <= row["score"] < 0.8
        assert row["drop_rate"] == 0.0
        assert row["violation_rate"] < 0.05
        assert 0.02 < row["latency_per_token_s"] < row["latency_per_token_p99_s"] < 0.03
    assert rows[0]["qos"] != rows[1]["qos"]


def test_the_summary_is_the_mean_of_the_rows(results: dict[str, Any]) -> None:
    assert len(results["summary"]) == 2 * len(METRICS.keys() - OF_OTHER_WORLDS)
    for entry in results["summary"]:
        assert set(entry) == {"router", "kind", "load", "rate_per_s", "metric", "mean", "low", "high"}
        values = [row[entry["metric"]] for row in results["rows"] if row["router"] == entry["router"]]
        assert entry["mean"] == pytest.approx(np.mean(values))
        assert entry["low"] <= entry["mean"] <= entry["high"]


class TestAFolderWithResults:
    def test_is_kept_from_another_evaluation(
        self, program: Program, results: dict[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder, before = results["folder"], (results["folder"] / "results.json").read_bytes()
        for other in ("--seeds=3", "--routers=round_robin", "--latency_limit=31ms"):
            message = f"{folder}/results.json is of another evaluation: give another --out, or --overwrite"
            assert_refused(program, capsys, message, *PLAIN, other, f"--out={folder}")
        assert (folder / "results.json").read_bytes() == before

    def test_knows_other_files_of_the_same_name(self, results: dict[str, Any], tmp_path: pathlib.Path) -> None:
        """Their contents count: two traces may have one name in two folders."""
        assert json.loads((results["folder"] / "results.json").read_text())["config"]["inputs"] == {}
        azure_trace(tmp_path / "t.csv")
        world = WorldConfig(trace=str(tmp_path / "t.csv"))
        before = world.inputs()
        burstgpt_trace(tmp_path / "t.csv", failed=0)
        assert set(before) == set(world.inputs()) == {"trace"}
        assert before != world.inputs()

    @pytest.mark.slow
    def test_is_written_anew_by_the_same_evaluation_or_if_asked(
        self, program: Program, results: dict[str, Any], tmp_path: pathlib.Path
    ) -> None:
        assert program(*PLAIN, f"--out={results['folder']}") == 0
        assert json.loads((results["folder"] / "results.json").read_text())["rows"] == results["rows"]
        (tmp_path / "results.json").write_text("{}")
        assert program(*PLAIN, f"--out={tmp_path}", "--overwrite") == 0
        assert json.loads((tmp_path / "results.json").read_text())["rows"] == results["rows"]


class TestATrainingRun:
    @pytest.fixture
    def run(self, tmp_path: pathlib.Path) -> RunFolder:
        """Of seeds 3 and 4, without a checkpoint."""
        learner = small_learner()
        training = TrainingConfig(learner.config, 64, runs_of(learner.config, (3, 4)))
        return RunFolder.start(tmp_path / "mvr", make_config(learner, training))

    @pytest.mark.parametrize(("first", "shared"), [(0, "3, 4"), (4, "4")])
    def test_is_not_evaluated_on_seeds_it_was_trained_with(
        self, program: Program, run: RunFolder, capsys: pytest.CaptureFixture[str], first: int, shared: str
    ) -> None:
        message = f"--first_seed={first}: {run.path} was trained with seed {shared}: give --first_seed=1000 or above"
        assert_refused(program, capsys, message, f"--routers={run.path}", f"--first_seed={first}", f"--out={run.path}")

    def test_may_be_evaluated_on_others(
        self, program: Program, run: RunFolder, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert_refused(program, capsys, "holds no checkpoint yet", f"--routers={run.path}", "--first_seed=5")

    @pytest.mark.parametrize(
        ("text", "seed", "preferences", "margin"),
        [
            ("", None, None, 0),
            ("@3", 3, None, 0),
            (":energy=2", None, {"energy": 2.0}, 0),
            (":margin=-.1", None, None, -0.1),
            ("@3:energy=2e-1:margin=much:drop=.5", 3, {"energy": 0.2, "drop": 0.5}, "much"),
            (":energy=much:drop=nan:speed=", None, {"energy": "much", "drop": "nan", "speed": ""}, 0),
        ],
    )
    def test_is_named_with_its_seed_and_settings(
        self, run: RunFolder, text: str, seed: int | None, preferences: Any, margin: Any
    ) -> None:
        assert run_of(f"{run.path}{text}") == (run.path, seed, preferences, margin)
        assert run_folders([str(run.path), f"{run.path}:energy=1", f"{run.path}{text}"]) == [run.path]

    def test_without_preferences_takes_none(
        self, program: Program, run: RunFolder, capsys: pytest.CaptureFixture[str]
    ) -> None:
        message = "preferences is {'energy': 2.0}, must not be given for an agent without preferences"
        assert_refused(program, capsys, message, f"--routers={run.path}:energy=2", "--first_seed=5")

    @pytest.mark.parametrize("damage", ["{", "[1]", '{"steps": "many"}', "\0"])
    def test_with_damaged_records_lacks_its_learning_curve_only(
        self, run: RunFolder, capsys: pytest.CaptureFixture[str], damage: str
    ) -> None:
        run.append({"steps": 32, "kind": "train"})
        assert list(learning_curves([str(run.path)])) == ["learning_curve_mvr"]
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write(f"{damage}\n")
        assert learning_curves([str(run.path)]) == {}
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"warning: the learning curve of mvr is left out: {run.path}/metrics.jsonl, line 2: ")


def two_by_two(num_requests: int = 300) -> np.ndarray:
    """Arrivals [s] with gaps of 10 ms and of 990 ms."""
    return np.arange(num_requests) // 2 + 0.01 * (np.arange(num_requests) % 2)


def azure_trace(path: pathlib.Path) -> pathlib.Path:
    lines = [f"2023-11-16 18:{int(s // 60):02}:{s % 60:09.6f},{100 + s:.0f},50" for s in two_by_two()]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    return path


def burstgpt_trace(path: pathlib.Path, failed: int) -> pathlib.Path:
    """Writes requests that are answered, and before each of the first so many one that is not."""
    rows = [
        f"{s:.2f},GPT-4,9,{tokens},9,API log"
        for i, s in enumerate(two_by_two())
        for tokens in ((0, 5) if i < failed else (5,))
    ]
    path.write_text("\n".join(["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type", *rows]))
    return path


def quality_table(path: pathlib.Path, **columns: Any) -> pathlib.Path:
    """Writes prompts of 30 tokens; the second of three experts scores .25 in 20 tokens, the third .75 in 40."""
    num_prompts = 50
    columns = {
        "experts": np.array(["vicuna-7b", "alpaca-7b", "chatglm2-6b"]),
        "prompt_tokens": np.full(num_prompts, 30),
        "out_tokens": np.tile([10, 20, 40], (num_prompts, 1)),
        "quality_bertscore_minilm": np.tile([0.0, 0.25, 0.75], (num_prompts, 1)),
    } | columns
    np.savez(path, **columns)
    return path


@pytest.mark.slow
def test_a_recorded_trace_and_a_table_take_the_place_of_the_laws(program: Program, tmp_path: pathlib.Path) -> None:
    trace, table = burstgpt_trace(tmp_path / "trace.csv", failed=9), quality_table(tmp_path / "table.npz")
    status = program(
        TABLE_EXPERTS, f"--trace={trace}", f"--quality_table={table}", "--latency_limit=0.06", "--rate=2,2",
        "--routers=expert_0,expert_1,expert_0", "--requests=40", "--seeds=1", "--warmup=0", f"--out={tmp_path / 'out'}",
    )  # fmt: skip
    assert status == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    config = results["config"]
    assert (config["trace"], config["quality_table"]) == ("trace.csv", "table.npz")
    assert config["trace_failed_requests"] == 9
    assert config["experts"] == ["alpaca-7b@A40", "chatglm2-6b@A40"]
    assert [(row["router"], row["qos"]) for row in results["rows"]] == [("expert_0", 0.25), ("expert_1", 0.75)]
    # Two answers side by side take .5 s in every 1 s; Poisson arrivals would keep the expert busy for .6 s.
    assert 2 * results["rows"][0]["busy_fraction"] == pytest.approx(0.5, abs=0.03)
    # Batches of at most 32 answers of 20 tokens at 24 ms an iteration, and of 40 tokens at 22 ms.
    assert 30 < config["saturation_per_s"] < 32 / (20 * 0.024) + 32 / (40 * 0.0217)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_failed_requests_of_a_trace_are_told(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    def noted(trace: pathlib.Path) -> dict[str, int]:
        world = WorldConfig(trace=str(trace))
        return notes_on(world, *world.build())

    trace = burstgpt_trace(tmp_path / "t.csv", failed=10)
    assert noted(trace) == {"trace_failed_requests": 10}
    assert capsys.readouterr().err == f"note: {trace}: 10 of 310 rows are failed requests and left out\n"
    assert noted(azure_trace(trace)) == {}
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_results_are_written_before_they_are_printed(tmp_path: pathlib.Path) -> None:
    """A reader of what is printed may have gone."""
    command = [sys.executable, "-m", "qos_jax.programs", "evaluate", *PLAIN, f"--out={tmp_path / 'out'}"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


BAD_ARGUMENTS = {
    "router": ("--routers=round_robin,psychic", "'psychic'"),
    "no router": ("--routers=", "--routers= names none"),
    "expert": ("--routers=expert_7", "'expert_7'"),
    "preset": ("--preset=paper-9", "'paper-9'"),
    "load": ("--load=0.5,-1", "--load=0.5,-1"),
    "load in words": ("--load=high", "--load=high"),
    "load without end": ("--load=1e308", "rate_per_s is inf"),
    "rate that never ends": ("--rate=1e-50", "rate_per_s is 1e-50"),
    "seeds of others": ("--first_seed=4294967296", "seed is 4294967296"),
    "load and rate": ("--load=0.5 --rate=3", "--load and --rate"),
    "arrivals": ("--arrivals=weekly", "'weekly'"),
    "arrivals and trace": ("--arrivals=poisson --trace={here}/azure.csv", "/azure.csv are both given"),
    "no trace": ("--trace={here}/absent.csv", "/absent.csv: cannot be read"),
    "table for a trace": ("--trace={here}/table.npz", "/table.npz, line 1: is not UTF-8"),
    "no table": ("--quality_table={here}/absent.npz", "/absent.npz"),
    "scores": (f"{TABLE_EXPERTS} --quality_table={{here}}/nan.npz", "score nan of vicuna-7b"),
    "table of other LLMs": ("--quality_table={here}/table.npz", "'alpaca-native'"),
    "LLM without GPU": ("--experts=alpaca-7b", "--experts=alpaca-7b"),
    "LLM too large": ("--experts=vicuna-13b-1.1@A30", "vicuna-13b-1.1 with 26 GB of weights does not fit A30"),
    "prediction": ("--prediction=psychic", "'psychic'"),
    "limit": ("--latency_limit=0", "--latency_limit=0"),
    "unit of a limit": ("--latency_limit=30ms,1min", "--latency_limit=30ms,1min: give numbers above 0, in s or ms"),
    "staleness": ("--staleness=-1", "staleness_s is -1.0"),
    "file where the folder should be": ("--out={here}/azure.csv", "/azure.csv"),
    "file where a folder above should be": ("--out={here}/azure.csv/out", "/azure.csv/out"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_input_ends_with_one_line_and_leaves_nothing(
    program: Program, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    azure_trace(tmp_path / "azure.csv")
    quality_table(tmp_path / "table.npz")
    quality_table(tmp_path / "nan.npz", quality_bertscore_minilm=np.full((50, 3), np.nan))
    before = sorted(tmp_path.rglob("*"))
    arguments, message = BAD_ARGUMENTS[name]
    assert_refused(program, capsys, message, f"--out={tmp_path}/out", *arguments.format(here=tmp_path).split())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_refused_before_the_work(
    program: Program, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    for folder in (tmp_path / "out", tmp_path / "out" / "new"):
        assert program(f"--out={folder}") == 2
        assert capsys.readouterr().err == f"error: {folder} cannot be written: Permission denied\n"


def test_the_exit_status_is_that_of_the_process(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "qos_jax.programs", "evaluate", "--routers=psychic", f"--out={tmp_path}/out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: router 'psychic' is unknown")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
