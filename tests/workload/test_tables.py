import dataclasses
import gzip
import json

import jax
import numpy as np
import pytest

from qos_jax.errors import InputError
from qos_jax.workload.content import latency_limits
from qos_jax.workload.tables import QualityTable, approximate_tokens, joined, read_mix_instruct, read_npz

EXPERTS = ("small", "large")


def make_table(num_prompts=50):
    rng = np.random.default_rng(0)
    return QualityTable(
        source="made up",
        experts=EXPERTS,
        prompt_tokens=rng.integers(1, 90, num_prompts, dtype=np.int32),
        output_tokens=rng.integers(1, 400, (num_prompts, 2), dtype=np.int32),
        score=rng.random((num_prompts, 2)),
        prompts=tuple(f"prompt {i}" for i in range(num_prompts)),
    )


def write_npz(path, **changes):
    table = make_table()
    columns = {
        "experts": np.array(EXPERTS),
        "prompt_tokens": table.prompt_tokens,
        "out_tokens": table.output_tokens,
        "quality": table.score,
    }
    np.savez(path, **{name: column for name, column in (columns | changes).items() if column is not None})
    return path


def mix_instruct_line(number, bertscore=0.7, **changes):
    candidates = [
        {
            "decoding_method": "top_p_sampling",
            "model": model,
            "text": "word " * length,
            "scores": {"logprobs": -0.02, "rougeL": 0.2, "bertscore": bertscore, "bartscore": -3.2},
        }
        for model, length in (("alpaca-native", 40 * (number + 1)), ("chatglm-6b", 0))
    ]
    record = {"id": f"unified_chip2/{number}", "instruction": "", "input": "Who is it?", "output": "It is I."}
    return record | {"candidates": candidates} | changes


def answered(**changes):
    """Returns a line whose second answer has other fields."""
    line = mix_instruct_line(1)
    line["candidates"][1] |= changes
    return line


def write_lines(path, records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def test_draws_are_whole_rows_and_equally_common():
    table = make_table()
    content = table.content(latency_limits([0.02, 0.04]))
    keys = jax.random.split(jax.random.key(0), 50_000)
    prompt_tokens, output_tokens, score, limit_s = (np.asarray(x) for x in jax.jit(jax.vmap(content.sample))(keys)[:4])

    rows = {tuple(row): i for i, row in enumerate(np.float32(table.score))}
    drawn = np.array([rows[tuple(row)] for row in score])
    np.testing.assert_array_equal(prompt_tokens, table.prompt_tokens[drawn])
    np.testing.assert_array_equal(output_tokens, table.output_tokens[drawn])
    assert np.bincount(drawn) == pytest.approx(np.full(50, 1000), abs=150)
    assert score.mean(0) == pytest.approx(table.score.mean(0), abs=0.005)
    assert limit_s.mean() == pytest.approx(0.03, abs=3e-4)


def test_the_content_states_the_moments_of_its_table():
    shared, own = np.random.default_rng(1).normal(size=(2, 4000, 3))
    standard = np.sqrt(0.4) * shared[:, :1] + np.sqrt(0.6) * own
    table = QualityTable(
        "made up", ("a", "b", "c"), np.full(4000, 9), np.ceil(np.exp(5 + standard)), 0.5 + 0.1 * np.tanh(standard)
    )
    content = table.content()
    assert content.log_length_mean == pytest.approx(np.full(3, 5.0), abs=0.05)
    assert content.log_length_sd == pytest.approx(np.full(3, 1.0), abs=0.05)
    assert content.log_length_correlation == pytest.approx(0.4, abs=0.03)
    pairs = np.corrcoef(table.score.T)[np.triu_indices(3, 1)]
    assert content.score_correlation == pytest.approx(pairs.mean(), abs=1e-5)
    assert content.max_output_tokens == pytest.approx(table.output_tokens.max(0))


def test_select_takes_columns_in_the_order_asked_for():
    table = make_table()
    large = table.select(["large"])
    np.testing.assert_array_equal(large.score, table.score[:, 1:])
    np.testing.assert_array_equal(table.select(["large", "small"]).output_tokens, table.output_tokens[:, ::-1])
    with pytest.raises(InputError, match=r"made up: experts \['huge'\] are unknown; choose from small, large"):
        table.select(["huge"])


def test_split_is_a_partition_of_the_prompts_set_by_the_seed():
    table = make_table()
    train, test = table.split(0.2, seed=3)
    assert len(test.prompts) == 10
    assert sorted(train.prompts + test.prompts) == sorted(table.prompts)
    for part in (train, test):
        rows = [table.prompts.index(prompt) for prompt in part.prompts]
        np.testing.assert_array_equal(part.score, table.score[rows])
        np.testing.assert_array_equal(part.prompt_tokens, table.prompt_tokens[rows])
    assert table.split(0.2, seed=3)[1].prompts == test.prompts
    assert table.split(0.2, seed=4)[1].prompts != test.prompts
    with pytest.raises(InputError, match="test_fraction"):
        table.split(0.0, seed=3)


def test_npz_is_read_and_empty_answers_count_one_token(tmp_path):
    lengths = make_table().output_tokens.copy()
    lengths[0, 0] = 0
    table = read_npz(write_npz(tmp_path / "table.npz", out_tokens=lengths), "quality")
    assert table.experts == EXPERTS
    assert table.output_tokens[0, 0] == 1
    np.testing.assert_array_equal(table.score, make_table().score)


def test_names_may_be_bytes(tmp_path):
    names = np.array(["modèle".encode(), b"large"])
    assert read_npz(write_npz(tmp_path / "table.npz", experts=names), "quality").experts == ("modèle", "large")


def test_scores_are_clipped_only_on_request(tmp_path):
    score = make_table().score.copy()
    score[3, 1], score[4, 0] = -0.2, 1.0001
    path = write_npz(tmp_path / "table.npz", quality=score)
    with pytest.raises(InputError, match=r"table.npz: score -0.2 of large for prompt 3 \(2 illegal"):
        read_npz(path, "quality")
    assert read_npz(path, "quality", clip_scores=True).score[[3, 4], [1, 0]] == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_tokens": None}, "no column out_tokens; it has experts, prompt_tokens, quality"),
        ({"quality": None}, "no column quality"),
        ({"quality": np.full((50, 2), np.nan)}, r"score nan of small for prompt 0 \(100 illegal"),
        ({"experts": np.array(["one", "two", "three"])}, "3 experts and 50 prompts, but output tokens have the shape"),
        ({"experts": np.array(["same", "same"])}, "experts are same, same, must be different"),
        ({"prompt_tokens": np.zeros(50, np.int32)}, "prompt_tokens has a length of 0 tokens for prompt 0 .*from 1 to"),
        (
            {"out_tokens": np.where(np.arange(50)[:, None] == 7, [9, -1], 9)},
            "out_tokens has a length of -1 tokens of "
            r"large for prompt 7 \(1 illegal",
        ),
        ({"out_tokens": np.full((50, 2), 1.5)}, "has a length of 1.5 tokens of small for prompt 0 .* a whole number"),
        ({"out_tokens": np.full((50, 2), np.nan)}, "has a length of nan tokens of small for prompt 0"),
        ({"experts": np.array([b"\xff", b"b"])}, "column experts holds .*must be UTF-8"),
        ({"prompt_tokens": np.ones(49, np.int32)}, "2 experts and 49 prompts"),
        ({"experts": np.array(EXPERTS, dtype=object)}, "not a readable .npz file"),
    ],
)
def test_a_bad_npz_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        read_npz(write_npz(tmp_path / "table.npz", **changes), "quality")


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("missing.npz", "text.npz"):
        with pytest.raises(InputError, match=f"{name}: is not a readable .npz file"):
            read_npz(tmp_path / name, "quality")
    with pytest.raises(InputError, match=r"missing.jsonl: cannot be read: No such file"):
        read_mix_instruct(tmp_path / "missing.jsonl")


def test_mix_instruct_is_read(tmp_path):
    line = mix_instruct_line(1, 0.71, instruction="Answer.\u2028", input="")
    line["candidates"].reverse()
    table = read_mix_instruct(write_lines(tmp_path / "mix.jsonl", [mix_instruct_line(0), "", line]))
    assert table.experts == ("alpaca-native", "chatglm-6b")
    assert table.prompts == ("Who is it?", "Answer.\u2028")
    np.testing.assert_array_equal(table.output_tokens, [[50, 1], [100, 1]])
    assert table.score == pytest.approx(np.array([[0.70, 0.70], [0.71, 0.71]]))
    counted = read_mix_instruct(tmp_path / "mix.jsonl", "rougeL", count_tokens=lambda text: len(text.split()))
    np.testing.assert_array_equal(counted.output_tokens[:, 0], [40, 80])
    np.testing.assert_array_equal(counted.prompt_tokens, [3, 1])
    assert counted.score == pytest.approx(np.full((2, 2), 0.2))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": ', "line 2: is not JSON"),
        ({"id": "x", "instruction": "a"}, "line 2: input is missing, must be a text"),
        (mix_instruct_line(1, candidates=[]), "line 2: 0 candidates of 0 models"),
        (
            mix_instruct_line(1, candidates=mix_instruct_line(1)["candidates"][:1]),
            "line 2: the models are alpaca-native, must be those of the first",
        ),
        (mix_instruct_line(1, candidates=mix_instruct_line(1)["candidates"] * 2), "line 2: 4 candidates of 2 models"),
        (
            mix_instruct_line(1, bertscore=float("nan")),
            r"line 2: candidates\[0\]: scores.bertscore of alpaca-native is nan",
        ),
    ],
)
def test_a_bad_line_of_mix_instruct_is_refused(tmp_path, line, message):
    with pytest.raises(InputError, match=f"mix.jsonl.*{message}"):
        read_mix_instruct(write_lines(tmp_path / "mix.jsonl", [mix_instruct_line(0), line]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([1], r"is \[1\], must be a JSON object with instruction, input"),
        (mix_instruct_line(1, candidates=5), "candidates is 5, must be a list"),
        (mix_instruct_line(1, candidates=[5]), r"candidates\[0\] is 5, must be a JSON object with model"),
        (mix_instruct_line(1, input=7), "input is 7, must be a text"),
        (mix_instruct_line(1, input="\ud800"), "input is .*half of a surrogate pair"),
        (answered(text=None), r"candidates\[1\]: text is None, must be a text"),
        (answered(model=["a"]), r"candidates\[1\]: model is \['a'\], must be a text"),
        (answered(scores={"bertscore": 10**400}), r"candidates\[1\]: scores.bertscore of chatglm-6b is 1000"),
        (answered(scores={"bertscore": True}), "scores.bertscore of chatglm-6b is True, must be a number in"),
        (answered(scores={"bertscore": "0.5"}), "scores.bertscore of chatglm-6b is '0.5', must be a number in"),
        (answered(scores={"bertscore": 81.3}), "scores.bertscore of chatglm-6b is 81.3, must be a number in"),
        (answered(scores=[]), "scores.bertscore of chatglm-6b is None, must be a number in"),
    ],
)
def test_a_field_of_another_kind_is_named_with_its_line(tmp_path, line, message):
    with pytest.raises(InputError, match=f"mix.jsonl, line 2: .*{message}|mix.jsonl, line 2: {message}"):
        read_mix_instruct(write_lines(tmp_path / "mix.jsonl", [mix_instruct_line(0), line]))


def test_mix_instruct_may_have_a_byte_order_mark_be_packed_and_lack_an_instruction(tmp_path):
    text = "\ufeff" + json.dumps(mix_instruct_line(0)) + "\r\n" + json.dumps(mix_instruct_line(1, instruction=None))
    (tmp_path / "mix.jsonl").write_bytes(gzip.compress(text.encode()))
    assert read_mix_instruct(tmp_path / "mix.jsonl").prompts == ("Who is it?", "Who is it?")


def test_scores_that_are_no_shares_are_refused(tmp_path):
    path = write_lines(tmp_path / "mix.jsonl", [mix_instruct_line(0)])
    with pytest.raises(InputError, match=r"scores.bartscore of alpaca-native is -3\.2, must be a number in \[0, 1\]"):
        read_mix_instruct(path, "bartscore")
    with pytest.raises(InputError, match=r"scores.bleurt of alpaca-native is None, must be a number"):
        read_mix_instruct(path, "bleurt")
    with pytest.raises(InputError, match="has no prompts"):
        read_mix_instruct(write_lines(tmp_path / "empty.jsonl", []))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_tokens": np.full(50, 2**40)}, "prompt_tokens has a length of 1.09951e.* tokens for prompt 0"),
        ({"output_tokens": np.full((50, 2), 2**31)}, "output_tokens has a length of 2.*e.* tokens of small"),
        ({"output_tokens": np.full((50, 2), np.nan)}, "output_tokens has a length of nan tokens of small"),
        ({"prompt_tokens": np.full(50, 1.5)}, "prompt_tokens has a length of 1.5 tokens"),
        ({"prompt_tokens": ["9"] * 50}, "column prompt_tokens is of type .*, must be numbers"),
        ({"prompt_tokens": 9}, "2 experts and 1 prompts"),
        ({"score": np.full((50, 2), "1")}, "column score is of type .*, must be numbers"),
    ],
)
def test_a_table_in_memory_is_checked_like_a_file(changes, message):
    with pytest.raises(InputError, match=f"made up: .*{message}"):
        dataclasses.replace(make_table(), **changes)


def test_texts_must_match_the_prompts():
    with pytest.raises(InputError, match="49 texts for 50 prompts"):
        dataclasses.replace(make_table(), prompts=make_table().prompts[1:])


def test_the_measured_tables_are_read(data_dir):
    table = read_npz(data_dir / "quality" / "alpaca_eval_644x15.npz", "quality_rougeL")
    assert table.score.shape == (644, 15)
    with pytest.raises(InputError, match="no column out_tokens"):
        read_npz(data_dir / "quality" / "llmrouter_train_6_experts.npz", "scores")


def test_approximate_tokens_are_near_the_true_ones(data_dir):
    table = read_npz(data_dir / "quality" / "alpaca_eval_644x15.npz", "quality_rougeL")
    lines = (data_dir / "quality" / "alpaca_eval_644_prompts.jsonl").read_text().splitlines()
    approximate = np.array([approximate_tokens(json.loads(line)["instruction"]) for line in lines])
    assert approximate.sum() == pytest.approx(table.prompt_tokens.sum(), rel=0.03)
    assert np.median(np.abs(approximate / table.prompt_tokens - 1)) < 0.13


class TestJoined:
    def test_prompts_follow_each_other_and_experts_are_those_in_common(self):
        first, second = make_table(3), dataclasses.replace(make_table(2), experts=("large", "other"), source="second")
        both = joined([first, second])
        assert both.experts == ("large",)
        assert both.prompts == (*first.prompts, *second.prompts)
        np.testing.assert_array_equal(both.score[:, 0], [*first.score[:, 1], *second.score[:, 0]])
        np.testing.assert_array_equal(
            both.output_tokens[:, 0], [*first.output_tokens[:, 1], *second.output_tokens[:, 0]]
        )

    def test_texts_go_where_one_table_has_none(self):
        assert joined([make_table(), dataclasses.replace(make_table(), prompts=None)]).prompts is None

    def test_nothing_in_common_is_refused(self):
        other = dataclasses.replace(make_table(), experts=("a", "b"), source="other.npz")
        with pytest.raises(InputError, match=r"made up \+ other.npz: have no LLM in common, must have one or more"):
            joined([make_table(), other])
