"""Pretrained encoders: reading and writing folders, tokens, embeddings, and errors on bad folders and texts."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qos_jax import InputError
from qos_jax.predictor.encoder import TextEncoder
from qos_jax.predictor.pretrained import Pretrained, load_pretrained, save_pretrained
from tests.helpers.numpy_encoder import numpy_embedding
from tests.helpers.quick_compilation import quick_compilation
from tests.helpers.tiny_encoder import CONFIGS, MAX_TOKENS, VOCABULARY, WORDS, tiny_tensors, write_tiny_encoder

LAYOUTS = ["bert", "distilbert"]


@pytest.fixture(scope="module", autouse=True)
def compiles_quickly():
    with quick_compilation():
        yield


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return write_tiny_encoder(tmp_path / "tiny")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Pretrained:
    return load_pretrained(write_tiny_encoder(tmp_path_factory.mktemp("tiny")))


def some_texts(num_texts: int) -> list[str]:
    """Returns texts of 1 to 60 words, so that some are truncated."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 61))) for _ in range(num_texts)]


def words_of(pretrained: Pretrained, text: str) -> list[str]:
    tokens = pretrained.tokenize([text])
    return [pretrained.tokenizer.id_to_token(int(i)) for i in tokens.ids[0][tokens.mask[0]]]


def edit_json(path: pathlib.Path, **changes) -> None:
    """Changes keys of a JSON file; a value of None removes a key."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def edit_tensors(folder: pathlib.Path, **changes) -> None:
    """Changes tensors, whose names have __ for a dot; a value of None removes a tensor."""
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name.replace("__", "."): change for name, change in changes.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


def assert_same_weights(one: Pretrained, other: Pretrained) -> None:
    jax.tree.map(np.testing.assert_array_equal, one.weights, other.weights)


class TestLoading:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_weights_are_of_the_encoder(self, tmp_path, layout):
        pretrained = load_pretrained(write_tiny_encoder(tmp_path, layout))
        ids, mask = pretrained.tokenize(["how old is the river"])
        wanted = jax.eval_shape(TextEncoder(pretrained.config).init, jax.random.key(0), ids, mask)
        described = [jax.tree.map(lambda x: (x.shape, x.dtype), weights) for weights in (pretrained.weights, wanted)]
        assert described[0] == described[1]

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_prefix_changes_nothing(self, tmp_path, layout):
        plain = load_pretrained(write_tiny_encoder(tmp_path / "plain", layout))
        prefixed = load_pretrained(write_tiny_encoder(tmp_path / "prefixed", layout, prefix=f"{layout}."))
        assert_same_weights(prefixed, plain)

    def test_old_names_of_normalisation_are_read(self, folder, tiny):
        tensors = load_file(folder / "model.safetensors")
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for today, before in old.items():
            tensors = {name.replace(today, before): tensor for name, tensor in tensors.items()}
        assert any("gamma" in name for name in tensors)
        save_file(tensors, folder / "model.safetensors")
        assert_same_weights(load_pretrained(folder), tiny)

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_half_precision_becomes_float32(self, folder, tiny, dtype):
        tensors = load_file(folder / "model.safetensors")
        halves = {name: tensor.astype(dtype) for name, tensor in tensors.items() if "position_ids" not in name}
        save_file(halves, folder / "model.safetensors")

        def check(half, full):
            assert half.dtype == jnp.float32
            np.testing.assert_array_equal(half, np.asarray(full).astype(dtype).astype(np.float32))

        jax.tree.map(check, load_pretrained(folder).weights, tiny.weights)

    def test_vocabulary_alone_makes_the_same_tokens(self, folder, tiny):
        (folder / "tokenizer.json").unlink()
        alone = load_pretrained(folder)
        for text in ("Explain, how fast rivers run?", "café [SEP] 東京 unheard-of", "CODE\tis\ncold"):
            assert words_of(alone, text) == words_of(tiny, text)

    def test_vocabulary_may_be_cased(self, folder):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}', encoding="utf-8")
        assert words_of(load_pretrained(folder), "é Red red") == ["[CLS]", "é", "[UNK]", "red", "[SEP]"]

    def test_without_sentence_config_texts_may_fill_all_positions(self, folder):
        (folder / "sentence_bert_config.json").unlink()
        assert load_pretrained(folder).max_tokens == CONFIGS["bert"]["max_position_embeddings"]


class TestSaving:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_what_is_saved_is_loaded_again(self, tmp_path, layout):
        before = load_pretrained(write_tiny_encoder(tmp_path / "before", layout))
        tuned = dataclasses.replace(before, weights=jax.tree.map(lambda x: x + 0.125, before.weights), max_tokens=30)
        save_pretrained(tuned, tmp_path / "after")
        after = load_pretrained(tmp_path / "after")
        assert (after.config, after.max_tokens) == (tuned.config, 30)
        assert_same_weights(after, tuned)
        texts = some_texts(5)
        np.testing.assert_array_equal(after.embed(texts), tuned.embed(texts))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_saved_folder_is_as_hugging_face_writes_it(self, tmp_path, layout):
        original = write_tiny_encoder(tmp_path / "original", layout, prefix=f"{layout}.")
        save_pretrained(load_pretrained(original), tmp_path / "saved")
        tensors = load_file(tmp_path / "saved" / "model.safetensors")
        expected = tiny_tensors(layout, seed=0)
        unused = {name for name in expected if "pooler" in name or "position_ids" in name}
        assert tensors.keys() == expected.keys() - unused
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
        settings = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
        kept = CONFIGS[layout].keys() - {"sinusoidal_pos_embds"}
        assert {key: settings[key] for key in kept} == {key: CONFIGS[layout][key] for key in kept}


class TestTokens:
    def test_words_are_split_and_marked(self, tiny):
        assert words_of(tiny, "Cats sing?") == ["[CLS]", "cat", "##s", "sing", "?", "[SEP]"]

    def test_long_text_is_cut_off_and_still_marked_at_its_end(self, tiny):
        words = words_of(tiny, "red " * 100)
        assert words == ["[CLS]", *["red"] * (MAX_TOKENS - 2), "[SEP]"]

    def test_text_of_100_000_characters_is_as_its_begin(self, tiny):
        begin = " ".join(some_texts(3))
        assert words_of(tiny, begin + " fox" * 25_000) == words_of(tiny, begin)

    def test_texts_are_padded_to_few_lengths(self, tiny):
        lengths = {tiny.tokenize(["red " * num_words]).ids.shape[1] for num_words in range(1, 60)}
        assert lengths == {16, 32, MAX_TOKENS}

    def test_mask_covers_the_tokens(self, tiny):
        tokens = tiny.tokenize(["red fox", "red " * 20])
        assert tokens.mask.sum(1).tolist() == [4, 22]
        assert not tokens.ids[~tokens.mask].any()

    def test_no_texts_are_no_rows(self, tiny):
        assert tiny.tokenize([]).ids.shape[0] == 0
        assert tiny.embed([]).shape == (0, tiny.config.hidden_size)


class TestEmbedding:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_is_that_of_the_published_network(self, tmp_path, layout):
        pretrained = load_pretrained(write_tiny_encoder(tmp_path, layout, seed=3))
        texts = some_texts(20)
        encoded = [pretrained.tokenizer.encode(text).ids for text in texts]
        short = [ids if len(ids) <= MAX_TOKENS else [*ids[: MAX_TOKENS - 1], ids[-1]] for ids in encoded]
        expected = [numpy_embedding(tiny_tensors(layout, 3), CONFIGS[layout], ids) for ids in short]
        np.testing.assert_allclose(pretrained.embed(texts, batch_size=8), expected, atol=1e-5)

    def test_does_not_depend_on_the_texts_beside_it(self, tiny):
        texts = some_texts(23)
        together = tiny.embed(texts)
        assert together.shape == (23, tiny.config.hidden_size)
        assert together.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-6)
        np.testing.assert_allclose(tiny.embed(texts, batch_size=8), together, atol=1e-5)
        np.testing.assert_allclose(tiny.embed(texts[::-1], batch_size=8)[::-1], together, atol=1e-5)
        np.testing.assert_allclose(tiny.embed(texts[:1]), together[:1], atol=1e-5)

    def test_few_shapes_are_compiled(self, folder, caplog):
        edit_json(folder / "config.json", layer_norm_eps=1e-7)  # not compiled by another test
        pretrained = load_pretrained(folder)
        with jax.log_compiles():
            for num_texts in range(1, 10):
                pretrained.embed(["red fox"] * num_texts, batch_size=4)
        compiled = [record for record in caplog.messages if record.startswith("Compiling jit(_embed)")]
        assert len(compiled) == 3  # 1, 2 or 4 rows


class TestBadFolders:
    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_missing_file_says_how_to_get_it(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(InputError, match=rf"{name} is missing: download {name} .*all-MiniLM-L6-v2.* into .*tiny"):
            load_pretrained(folder)

    def test_either_tokenizer_will_do_but_one_must_be_there(self, folder):
        (folder / "tokenizer.json").unlink()
        load_pretrained(folder)
        (folder / "vocab.txt").unlink()
        with pytest.raises(InputError, match=r"vocab.txt is missing: download"):
            load_pretrained(folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": "gpt2"}, "model_type is 'gpt2', must be 'bert' or 'distilbert'"),
            ({"model_type": None}, "model_type is None, must be 'bert' or 'distilbert'"),
            ({"model_type": ["bert"]}, r"model_type is \['bert'\], must be"),
            ({"hidden_act": "relu"}, "hidden_act is 'relu', only 'gelu' is supported"),
            ({"position_embedding_type": "relative_key"}, "'relative_key', only 'absolute' is supported"),
            ({"is_decoder": True}, "is_decoder is True, only False is supported"),
            ({"hidden_size": None}, "hidden_size is None, must be of type int"),
            ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two', must be of type int"),
            ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small', must be of type float"),
            ({"num_attention_heads": 5}, "hidden_size is 16, must be a multiple of num_heads, 5"),
            ({"vocab_size": 20}, r"word_embeddings.weight is float32\[74, 16\], must be floating point \[20, 16\]"),
        ],
    )
    def test_config_that_does_not_fit(self, folder, changes, message):
        edit_json(folder / "config.json", **changes)
        with pytest.raises(InputError, match=message) as raised:
            load_pretrained(folder)
        assert str(folder) in str(raised.value)

    def test_distilbert_with_another_activation(self, tmp_path):
        write_tiny_encoder(tmp_path, "distilbert")
        edit_json(tmp_path / "config.json", activation="relu")
        with pytest.raises(InputError, match="activation is 'relu', only 'gelu' is supported"):
            load_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"encoder__layer__1__output__dense__bias": None}, "tensor encoder.layer.1.output.dense.bias is missing"),
            (
                {"encoder__layer__0__intermediate__dense__weight": np.zeros((16, 24), np.float32)},
                r"intermediate.dense.weight is float32\[16, 24\], must be floating point \[24, 16\]",
            ),
            ({"embeddings__LayerNorm__bias": np.zeros(16, np.int8)}, r"LayerNorm.bias is int8\[16\], must be floating"),
            (
                {"embeddings__LayerNorm__bias": np.full(16, np.nan, np.float32)},
                "embeddings.LayerNorm.bias has weights that are not finite",
            ),
        ],
    )
    def test_tensors_that_do_not_fit(self, folder, changes, message):
        edit_tensors(folder, **changes)
        with pytest.raises(InputError, match=message):
            load_pretrained(folder)

    @pytest.mark.parametrize("kept_bytes", [0, 100, -50])
    def test_truncated_weights(self, folder, kept_bytes):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:kept_bytes])
        with pytest.raises(InputError, match=r"model.safetensors: is not a readable file of safetensors"):
            load_pretrained(folder)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("config.json", b"{", r"config.json: is not JSON"),
            ("config.json", b"[1]", r"config.json: is '\[1\]', must be a JSON object"),
            ("sentence_bert_config.json", b"{}", "max_seq_length is None, must be a whole number"),
            ("sentence_bert_config.json", b'{"max_seq_length": 65}', "max_tokens is 65, must be from 3 to .* 64"),
            ("tokenizer.json", b'{"version": "1.0"}', r"tokenizer.json: is no tokenizer"),
            ("tokenizer.json", b"\xff\xfe", r"tokenizer.json: is not a readable text file"),
        ],
    )
    def test_damaged_text_files(self, folder, name, content, message):
        (folder / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            load_pretrained(folder)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"[UNK]\n[CLS]\n[SEP]\ncaf\xe9\n", r"vocab.txt: is not a readable text file"),
            (b"[UNK]\n[SEP]\nfox\n", r"vocab.txt: has no line \[CLS\]"),
            ("\n".join([*VOCABULARY, "more"]).encode(), "has a token of id 74, must be below vocab_size, 74"),
        ],
    )
    def test_bad_vocabulary(self, folder, content, message):
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").write_bytes(content)
        with pytest.raises(InputError, match=message):
            load_pretrained(folder)

    def test_bad_tokenizer_config(self, folder):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").write_text('{"do_lower_case": "no"}', encoding="utf-8")
        with pytest.raises(InputError, match=r"tokenizer_config.json: has illegal options"):
            load_pretrained(folder)

    def test_folder_that_cannot_be_written(self, tiny, tmp_path):
        (tmp_path / "file").write_text("in the way", encoding="utf-8")
        with pytest.raises(InputError, match="cannot be written"):
            save_pretrained(tiny, tmp_path / "file" / "folder")


class TestBadTexts:
    @pytest.mark.parametrize("text", ["", " \n\t", "\u200b\x00"])
    def test_empty_text(self, tiny, text):
        with pytest.raises(InputError, match=r"text 1 is .*, must have a word in it"):
            tiny.embed(["fox", text])

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            (["fox", None], "text 1 is None, must be a string"),
            (["half of a pair: \ud83d"], "text 0 is no Unicode text"),
            ("fox", "texts is the text 'fox', must be a list of texts"),
        ],
    )
    def test_no_text(self, tiny, texts, message):
        with pytest.raises(InputError, match=message):
            tiny.tokenize(texts)

    def test_batch_of_nothing(self, tiny):
        with pytest.raises(InputError, match="batch_size is 0, must be at least 1"):
            tiny.embed(["fox"], batch_size=0)
