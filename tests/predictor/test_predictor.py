"""A predictor's predictions, and its folder on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qos_jax import InputError
from qos_jax.predictor import HeadConfig, Predictor, fit_frozen, load_predictor, load_pretrained
from tests.helpers.prediction_tables import EXPERTS, made_up_table
from tests.helpers.quick_compilation import quick_compilation
from tests.helpers.tiny_encoder import write_tiny_encoder

TEXTS = ["write a poem", "sum one and two", "a " * 50_000]


@pytest.fixture(scope="module", autouse=True)
def compiles_quickly():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def on_embeddings() -> Predictor:
    return fit_frozen(made_up_table(20, 0.9, with_lengths=False), HeadConfig("regression", ()))


@pytest.fixture(scope="module")
def on_texts(tmp_path_factory) -> Predictor:
    encoder = load_pretrained(write_tiny_encoder(tmp_path_factory.mktemp("tiny")))
    table = made_up_table(20)
    table = dataclasses.replace(table, embeddings=encoder.embed(table.texts))
    return fit_frozen(table, HeadConfig("buckets", (4,)), encoder=encoder)


@pytest.fixture(scope="module")
def saved(on_texts, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("saved") / "predictor"
    on_texts.save(folder, command="a test")
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> pathlib.Path:
    """A folder that a test may damage."""
    return pathlib.Path(shutil.copytree(saved, tmp_path / "predictor"))


def weights_of(folder: pathlib.Path) -> pathlib.Path:
    """The folder that config.json names."""
    return folder / json.loads((folder / "config.json").read_text())["weights"]


class TestPredictions:
    def test_shapes_and_ranges(self, on_texts):
        score, output_tokens = on_texts.predict(TEXTS)
        assert score.shape == output_tokens.shape == (3, len(EXPERTS))
        assert np.all((score >= 0.0) & (score <= 1.0))
        assert np.all(output_tokens >= 1.0)

    def test_texts_are_embedded_first(self, on_texts):
        embeddings = on_texts.encoder.embed(TEXTS)
        of_embeddings = on_texts.predict_embeddings(embeddings)
        for from_texts, from_embeddings in zip(on_texts.predict(TEXTS), of_embeddings, strict=True):
            np.testing.assert_array_equal(from_texts, from_embeddings)

    def test_a_score_never_leaves_its_range(self, on_embeddings):
        score, output_tokens = on_embeddings.predict_embeddings(1e4 * made_up_table().embeddings)
        assert output_tokens is None
        assert (score.min(), score.max()) == (0.0, 1.0)

    def test_without_encoder_texts_are_refused(self, on_embeddings):
        with pytest.raises(InputError, match="has no encoder: call predict_embeddings"):
            on_embeddings.predict(TEXTS)

    def test_an_empty_prompt_is_refused(self, on_texts):
        with pytest.raises(InputError, match="text 1 is ''"):
            on_texts.predict(["a", ""])

    @pytest.mark.parametrize("shape", [(8,), (2, 7), (2, 3, 8)])
    def test_embeddings_of_another_encoder_are_refused(self, on_embeddings, shape):
        with pytest.raises(InputError, match=r"must have \[prompts, 8\]"):
            on_embeddings.predict_embeddings(np.zeros(shape))

    def test_embeddings_that_are_not_finite_are_refused(self, on_embeddings):
        with pytest.raises(InputError, match="not finite"):
            on_embeddings.predict_embeddings(np.full((2, 8), np.nan))


class TestFolder:
    def test_what_is_read_predicts_the_same_bit_for_bit(self, on_texts, saved):
        again = load_predictor(saved)
        assert again.experts == EXPERTS
        for before, after in zip(on_texts.predict(TEXTS), again.predict(TEXTS), strict=True):
            np.testing.assert_array_equal(before, after)

    def test_a_predictor_on_embeddings_needs_no_encoder(self, on_embeddings, tmp_path):
        on_embeddings.save(tmp_path / "new" / "predictor")
        files = [path for path in (tmp_path / "new" / "predictor").rglob("*") if path.is_file()]
        assert {path.name for path in files} == {"config.json", "heads.safetensors"}
        embeddings = made_up_table().embeddings
        score, output_tokens = load_predictor(tmp_path / "new" / "predictor").predict_embeddings(embeddings)
        np.testing.assert_array_equal(score, on_embeddings.predict_embeddings(embeddings)[0])
        assert output_tokens is None

    def test_the_folder_says_how_it_was_made(self, saved):
        assert json.loads((saved / "config.json").read_text())["command"] == "a test"

    def test_the_encoder_can_be_used_for_itself(self, on_texts, saved):
        np.testing.assert_array_equal(
            load_pretrained(weights_of(saved) / "encoder").embed(TEXTS), on_texts.encoder.embed(TEXTS)
        )

    def test_the_folder_of_a_run_will_do(self, saved):
        assert load_predictor(saved.parent).experts == EXPERTS

    def test_an_old_predictor_is_replaced_without_a_trace(self, on_embeddings, folder):
        on_embeddings.save(folder)
        assert load_predictor(folder).encoder is None
        assert [path.name for path in folder.parent.iterdir()] == ["predictor"]
        assert {path.name for path in folder.iterdir()} == {"config.json", weights_of(folder).name}

    def test_the_old_predictor_stays_when_the_new_one_cannot_be_written(self, on_embeddings, folder):
        with pytest.raises(TypeError):
            on_embeddings.save(folder, command=object())
        assert load_predictor(folder).encoder is not None
        assert [path.name for path in folder.parent.iterdir()] == ["predictor"]

    @pytest.mark.parametrize("step", range(3))
    def test_whatever_ends_the_program_leaves_a_predictor(self, on_embeddings, on_texts, folder, monkeypatch, step):
        """The program ends at each renaming of a save; afterwards another save works."""

        class EndError(BaseException):
            pass

        real, left = os.replace, [step]

        def replace(*paths):
            if left[0] == 0:
                raise EndError
            left[0] -= 1
            real(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(EndError):
                on_embeddings.save(folder)
        assert load_predictor(folder).encoder is not None
        on_embeddings.save(folder)
        assert {path.name for path in folder.iterdir()} == {"config.json", weights_of(folder).name}
        assert load_predictor(folder).encoder is None

    def test_one_that_was_begun_only_is_replaced(self, on_embeddings, tmp_path):
        (tmp_path / ".new-12").mkdir()
        (tmp_path / "weights-0123456789abcdef").mkdir()
        on_embeddings.save(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", weights_of(tmp_path).name}

    def test_one_of_format_1_is_read_and_replaced(self, on_texts, on_embeddings, folder):
        weights = weights_of(folder)
        for path in weights.iterdir():
            path.rename(folder / path.name)
        weights.rmdir()
        config = json.loads((folder / "config.json").read_text())
        del config["weights"]
        (folder / "config.json").write_text(json.dumps(config | {"format": 1}))
        np.testing.assert_array_equal(load_predictor(folder).predict(TEXTS)[0], on_texts.predict(TEXTS)[0])
        on_embeddings.save(folder)
        assert {path.name for path in folder.iterdir()} == {"config.json", weights_of(folder).name}

    def test_anything_else_is_not_overwritten(self, on_embeddings, tmp_path):
        (tmp_path / "diary.txt").write_text("Dear diary")
        for path in (tmp_path, tmp_path / "diary.txt"):
            with pytest.raises(InputError, match="is no predictor and would be overwritten"):
                on_embeddings.save(path)
        assert (tmp_path / "diary.txt").read_text() == "Dear diary"


class TestDamage:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format": 0}, "format is 0, must be 1 or 2"),
            ({"experts": "small"}, "experts is 'small', must be of type list"),
            ({"experts": ["small", "small", "large"]}, "must be different names"),
            ({"weights": "../elsewhere"}, "weights is '../elsewhere', must be weights-HASH"),
            ({"members": 0}, "members is 0"),
            ({"members": True}, "members is True"),
            ({"head": {"form": "ranking"}}, "form is 'ranking'"),
            ({"head": {"width": 3}}, "unexpected keyword argument 'width'"),
            ({"head": {"form": "buckets", "hidden": 4}}, "head is {'form': 'buckets', 'hidden': 4}"),
            ({"head": {"form": "buckets", "hidden": [4, 4]}}, r"the tensor .*Dense_1.* is missing"),
            ({"experts": ["small", "large"]}, r"length/scale/edges is float32\[3, 4\], must be float32\[2, 4\]"),
            ({"embedding_size": 15}, r"center is float32\[16\], must be float32\[15\]"),
        ],
    )
    def test_a_configuration_that_was_edited(self, folder, changes, message):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(InputError, match=message):
            load_predictor(folder)

    @pytest.mark.parametrize(
        ("content", "message"), [(None, "cannot be read"), (b"{", "is not JSON"), (b"[]", "format is None")]
    )
    def test_a_configuration_that_cannot_be_read(self, folder, content, message):
        (folder / "config.json").unlink()
        if content is not None:
            (folder / "config.json").write_bytes(content)
        with pytest.raises(InputError, match=f"config.json: {message}"):
            load_predictor(folder)

    @pytest.mark.parametrize(
        ("name", "tensor", "message"),
        [
            ("spread", None, "the tensor spread is missing"),
            ("spread", np.array(np.nan, np.float32), "without NaN"),
            ("center", np.zeros(16, np.float64), r"center is float64\[16\], must be float32\[16\]"),
        ],
    )
    def test_a_tensor_that_is_missing_or_wrong(self, folder, name, tensor, message):
        tensors = load_file(weights_of(folder) / "heads.safetensors") | {name: tensor}
        tensors = {key: value for key, value in tensors.items() if value is not None}
        save_file(tensors, weights_of(folder) / "heads.safetensors")
        with pytest.raises(InputError, match=message):
            load_predictor(folder)

    @pytest.mark.parametrize("kept", [0, 1, 100, None])
    def test_a_file_that_is_cut_off_or_missing(self, folder, kept):
        path = weights_of(folder) / "heads.safetensors"
        content = path.read_bytes()
        path.unlink()
        if kept is not None:
            path.write_bytes(content[:kept])
        with pytest.raises(InputError, match="not a readable file of safetensors"):
            load_predictor(folder)

    def test_an_encoder_that_is_missing_or_another(self, folder):
        shutil.rmtree(weights_of(folder) / "encoder")
        with pytest.raises(InputError, match=r"config\.json is missing"):
            load_predictor(folder)

    def test_a_folder_that_is_none(self, tmp_path):
        with pytest.raises(InputError, match="give the folder of a predictor"):
            load_predictor(tmp_path / "nowhere")
