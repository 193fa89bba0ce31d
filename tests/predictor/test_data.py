"""Training tables of predictors: reading, validation and splits."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from qos_jax import InputError, QualityTable
from qos_jax.predictor import read_prediction_table
from tests.helpers.prediction_tables import EXPERTS, made_up_table, write_mix_instruct, write_npz, write_prompts


@pytest.fixture
def table():
    return made_up_table(20)


class TestParts:
    @pytest.mark.parametrize("seed", [0, 3])
    def test_the_split_is_that_of_quality_tables(self, table, seed):
        world = QualityTable(
            table.source, table.experts, np.ones(20, np.int32), table.output_tokens, table.score, table.texts
        )
        for rows, part in zip(table.split_rows(0.3, seed), world.split(0.3, seed), strict=True):
            assert table.rows(rows).texts == part.prompts
            np.testing.assert_array_equal(table.score[rows], part.score)

    def test_each_prompt_is_tested_in_one_fold_and_learned_in_all_others(self, table):
        folds = table.folds(3, seed=0)
        for train, test in folds:
            assert sorted([*train, *test]) == list(range(20))
            assert len(test) in (6, 7)
        assert sorted(np.concatenate([test for _, test in folds])) == list(range(20))

    def test_folds_are_random_by_their_seed(self, table):
        tests = [table.folds(4, seed)[0][1].tolist() for seed in (0, 0, 1)]
        assert tests[0] == tests[1] != tests[2]

    def test_rows_keep_everything_of_a_prompt_together(self, table):
        part = table.rows(np.array([7, 2]))
        assert part.texts == (table.texts[7], table.texts[2])
        for name in ("score", "output_tokens", "embeddings"):
            np.testing.assert_array_equal(getattr(part, name), getattr(table, name)[[7, 2]])

    @pytest.mark.parametrize("fraction", [0.0, 1.0, 0.01])
    def test_a_part_without_prompts_is_refused(self, table, fraction):
        with pytest.raises(InputError, match=f"test_fraction {fraction:g} of 20 prompts"):
            table.split_rows(fraction, seed=0)

    @pytest.mark.parametrize("count", [1, 21])
    def test_so_many_folds_are_refused(self, table, count):
        with pytest.raises(InputError, match=f"{count} folds of 20 prompts"):
            table.folds(count, seed=0)


class TestFiles:
    def test_an_npz_with_prompts_is_read_whole(self, table, tmp_path):
        path = write_npz(tmp_path / "table.npz", table)
        read = read_prediction_table(path, "quality", write_prompts(tmp_path / "prompts.jsonl", table.texts))
        assert (read.source, read.experts, read.texts) == (str(path), EXPERTS, table.texts)
        np.testing.assert_array_equal(read.score, table.score)
        np.testing.assert_array_equal(read.output_tokens, table.output_tokens)
        np.testing.assert_array_equal(read.embeddings, table.embeddings)

    def test_prompts_without_ids_are_in_the_order_of_the_table(self, table, tmp_path):
        prompts = write_prompts(tmp_path / "prompts.jsonl", table.texts, ids=False)
        assert read_prediction_table(write_npz(tmp_path / "t.npz", table), "quality", prompts).texts == table.texts

    def test_an_input_belongs_to_its_instruction(self, table, tmp_path):
        one = table.rows(np.array([0]))
        (tmp_path / "prompts.jsonl").write_text(json.dumps({"instruction": "Translate.", "input": "Guten Tag"}))
        read = read_prediction_table(write_npz(tmp_path / "t.npz", one), "quality", tmp_path / "prompts.jsonl")
        assert read.texts == ("Translate.\nGuten Tag",)

    def test_an_npz_needs_no_lengths_and_no_texts(self, table, tmp_path):
        read = read_prediction_table(write_npz(tmp_path / "table.npz", table, out_tokens=None), "quality")
        assert read.output_tokens is None
        assert read.texts is None

    def test_scores_are_clipped_and_empty_answers_are_one_token(self, table, tmp_path):
        score, tokens = table.score.copy(), table.output_tokens.copy()
        score[0, 0], score[1, 1], tokens[2, 2] = -0.01, 1.00001, 0
        path = write_npz(tmp_path / "table.npz", table, quality=score, out_tokens=tokens)
        read = read_prediction_table(path, "quality")
        assert (read.score[0, 0], read.score[1, 1], read.output_tokens[2, 2]) == (0.0, 1.0, 1)

    def test_mix_instruct_has_texts_and_no_embeddings(self, table, tmp_path):
        read = read_prediction_table(write_mix_instruct(tmp_path / "train.jsonl", table))
        assert (read.experts, read.texts, read.embeddings) == (EXPERTS, table.texts, None)
        np.testing.assert_array_equal(read.output_tokens, table.output_tokens)  # "word" counts as a token


class TestBadTables:
    @pytest.mark.parametrize(
        ("field", "change", "message"),
        [
            ("score", lambda x: np.where(np.arange(20)[:, None] == 1, np.nan, x), "score nan of small for prompt 1"),
            ("score", lambda x: x + 1.0, "must lie in"),
            ("score", lambda x: x[:, :2], r"scores have the shape \(20, 2\), must be .* 3 experts"),
            ("output_tokens", lambda x: x[:, :2], r"output tokens have the shape \(20, 2\)"),
            ("output_tokens", lambda x: x * 0, "a length is 0 tokens"),
            ("experts", lambda x: ("small", "small", "large"), "must be different names"),
            ("texts", lambda x: x[:-1], "19 texts for 20 prompts"),
            ("texts", lambda x: ("Hi", " \n", *x[2:]), r"prompt 1 is ' \\n', must not be empty"),
            ("embeddings", lambda x: x[:-1], r"embeddings have the shape \(19, 8\)"),
            ("embeddings", lambda x: np.where(np.arange(20)[:, None] == 5, np.inf, x), "embedding of prompt 5 has an"),
        ],
    )  # fmt: skip
    def test_fields_that_do_not_go_together(self, table, field, change, message):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(table, **{field: change(getattr(table, field))})

    def test_nothing_to_predict_from(self, table):
        with pytest.raises(InputError, match="neither texts nor embeddings"):
            dataclasses.replace(table, texts=None, embeddings=None)

    def test_an_nan_in_a_file_is_not_clipped_away(self, table, tmp_path):
        path = write_npz(tmp_path / "table.npz", table, quality=np.full_like(table.score, np.nan))
        with pytest.raises(InputError, match="60 illegal scores"):
            read_prediction_table(path, "quality")

    def test_a_column_that_is_not_there(self, table, tmp_path):
        with pytest.raises(InputError, match="no column rouge; it has experts, quality"):
            read_prediction_table(write_npz(tmp_path / "table.npz", table), "rouge")

    @pytest.mark.parametrize("name", ["table.npz", "table.jsonl"])
    @pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
    def test_a_file_that_is_missing_or_damaged(self, tmp_path, name, content):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}(: is not a readable|: cannot be read|.* is not UTF-8)"):
            read_prediction_table(tmp_path / name)

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ('{"prompt_id": 100, "instruction": "Hi"}', r"no line has the prompt_id 101 \(19 missing"),
            ('{"instruction": "Hi"}', "1 texts for 20 prompts"),
            ("\n{", "line 2: is not JSON"),
            ('{"text": "Hi"}', "line 1: instruction is missing, must be a text"),
            ("[1]", r"line 1: is \[1\], must be a JSON object with instruction"),
            ('{"instruction": 5}', "line 1: instruction is 5, must be a text"),
            ('{"prompt_id": 1, "instruction": "Hi"}\n' * 2, "the prompt_id 1 is in several lines"),
            (b"\xff", "line 1: is not UTF-8 text"),
            (None, "cannot be read: No such file"),
        ],
    )
    def test_prompts_that_are_not_those_of_the_table(self, table, tmp_path, lines, message):
        prompts = tmp_path / "prompts.jsonl"
        if lines is not None:
            prompts.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
        with pytest.raises(InputError, match=message):
            read_prediction_table(write_npz(tmp_path / "table.npz", table), "quality", prompts)

    def test_prompts_beside_a_table_of_texts(self, table, tmp_path):
        path = write_mix_instruct(tmp_path / "train.jsonl", table)
        with pytest.raises(InputError, match="has texts of its own"):
            read_prediction_table(path, prompts=tmp_path / "prompts.jsonl")
