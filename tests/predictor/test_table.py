"""Predictions of a trained predictor for the prompts that a world samples."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from qos_jax import InputError, QualityTable
from qos_jax.predictor import HeadConfig, Predictor, fit_frozen, load_pretrained
from qos_jax.predictor.table import table_predictions
from qos_jax.sim.capacity import sample_requests
from qos_jax.workload.arrivals import poisson
from qos_jax.workload.request_workload import RequestWorkload
from tests.helpers.prediction_tables import EXPERTS, made_up_table, write_npz, write_prompts
from tests.helpers.programs import program_of
from tests.helpers.tiny_encoder import write_tiny_encoder

PROMPTS = 40


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> Predictor:
    encoder = load_pretrained(write_tiny_encoder(tmp_path_factory.mktemp("encoder")))
    table = made_up_table(PROMPTS)
    table = dataclasses.replace(table, embeddings=encoder.embed(table.texts))
    return fit_frozen(table, HeadConfig(hidden=()), encoder=encoder)


@pytest.fixture(scope="module")
def table() -> QualityTable:
    """A table whose prompts have 1, 2, ... tokens, so that the length identifies the prompt."""
    made = made_up_table(PROMPTS)
    return QualityTable("made up", EXPERTS, np.arange(1, PROMPTS + 1), made.output_tokens, made.score, made.texts)


def test_every_request_has_the_prediction_for_its_own_prompt(predictor, table):
    experts = ("large", "small")
    predictions = table_predictions(predictor, table, experts)
    workload = RequestWorkload(poisson(1.0), table.select(experts).content(), predictions)
    _, requests = sample_requests(workload, jax.random.key(0), 200)
    rows = np.asarray(requests.prompt_tokens) - 1
    assert len(set(rows)) > PROMPTS / 2
    scores, tokens = predictor.predict(table.prompts)
    np.testing.assert_allclose(requests.predicted_score, scores[rows][:, [2, 0]], rtol=1e-6)
    np.testing.assert_allclose(requests.predicted_tokens, tokens[rows][:, [2, 0]], rtol=1e-6)
    assert np.std(requests.predicted_score, axis=0).min() > 0


def test_what_does_not_fit_is_refused(predictor, table):
    with pytest.raises(InputError, match="no texts"):
        table_predictions(predictor, dataclasses.replace(table, prompts=None), EXPERTS)
    with pytest.raises(InputError, match=r"'huge'.*small, medium, large"):
        table_predictions(predictor, table, ["small", "huge"])
    with pytest.raises(InputError, match="output lengths"):
        table_predictions(dataclasses.replace(predictor, length=None), table, EXPERTS)


@pytest.fixture(scope="module")
def run():
    return program_of("evaluate")


def test_a_program_says_what_a_predictor_needs(run, capsys, tmp_path):
    assert run("--predictor=there", f"--out={tmp_path}") == 2
    assert "--quality_table" in capsys.readouterr().err
    data = write_npz(tmp_path / "table.npz", made_up_table(PROMPTS), prompt_tokens=np.full(PROMPTS, 9))
    world = (f"--quality_table={data}", "--score_column=quality", "--experts=small@A40,large@A40", f"--out={tmp_path}")
    assert run("--predictor=there", "--prediction=none", *world) == 2
    assert "give one" in capsys.readouterr().err
    assert run(f"--predictor={tmp_path}", *world) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_program_routes_by_a_predictor(run, predictor, capsys, tmp_path):
    made = dataclasses.replace(made_up_table(PROMPTS), experts=("alpaca-7b", "vicuna-7b", "chatglm2-6b"))
    dataclasses.replace(predictor, experts=made.experts).save(tmp_path / "predictor")
    data = write_npz(tmp_path / "table.npz", made, prompt_tokens=np.full(PROMPTS, 9))
    asked = (
        f"--predictor={tmp_path / 'predictor'}", f"--quality_table={data}", "--score_column=quality", "--seeds=1",
        "--experts=chatglm2-6b@A40,alpaca-7b@A40", "--routers=bert_router", "--rate=1", "--requests=20",
        f"--out={tmp_path / 'out'}",
    )  # fmt: skip
    assert run(*asked) == 2
    assert "give --prompts" in capsys.readouterr().err
    assert run(*asked, f"--prompts={write_prompts(tmp_path / 'prompts.jsonl', made.texts)}") == 0
    config = json.loads((tmp_path / "out" / "results.json").read_text())["config"]
    assert config["predictor"] == str(tmp_path / "predictor")
