"""Fleet files: what they may say, and one line that names file, field, value and what is legal where they may not."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from qos_jax import InputError, QualityTable, load_fleet, make
from qos_jax.fleet.catalogue import DEVICES, MEASURED
from qos_jax.fleet.fleet_file import Fleet
from qos_jax.worlds.config import WorldConfig
from qos_jax.worlds.presets import preset_of

HEAD = 'format = 1\n[[experts]]\nllm = "qwen3-8b:int4"\ndevice = "Jetson AGX Orin 64GB"\n'
ON_CARD = HEAD + "card = 'a'\nload_s = 3\n"


def fleet_of(folder: pathlib.Path, text: str) -> Fleet:
    (folder / "fleet.toml").write_text(text)
    return load_fleet(folder / "fleet.toml")


EVERYTHING = """
format = 1
name = "all fields"

[engine]
max_num_seqs = 16

[limits]
classes = [{ name = "chat", latency_ms_per_token = 40, ttft_ms = 500, share = 3 }, { latency_ms_per_token = 90 }]

[quality]
mean_score = { "qwen3-8b" = 0.7, mine = 0.6, "llama-3.1-8b" = 0.65 }
mean_output_tokens = { mine = 120 }

[workload]
arrivals = "gamma:2"
prediction = "none"
requests = 100
saturation_per_s = 4.5

[[experts]]
name = "board"
llm = "qwen3-8b:int4"
device = "Jetson AGX Orin 64GB"
count = 2
link_delay_s = 0.004
url = ["http://one:8000", "http://two:8000"]
engine = { kind = "vllm-sync", token_budget = 1024, memory_share = 0.8, prefix_cache = true }

[[experts]]
llm = { name = "mine", config = "config.json", bits = 8 }
device = { name = "my card", memory_gb = 15.8, bandwidth_gb_per_s = 432, fp16_tflops = 90, busy_w = 200 }
engine = { kv_blocks = 500, async_scheduling = false }

[[experts]]
device = { name = "Jetson Orin Nano 8GB", busy_w = 25 }
answers = "mine"

[experts.llm]
name = "sizes"
weights_gb = 3.1
matrix_params_billion = 1.4
kv_bytes_per_token = 28672
layers = 28
attention_size = 1536

[[experts]]
llm = "llama-3.1-8b"
device = { name = "card", profile = "profile.json", memory_gb = 25.25 }
"""
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}


@pytest.fixture
def everything(tmp_path: pathlib.Path) -> Fleet:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "profile.json").write_text(next(iter(MEASURED.values())).read_text())
    return fleet_of(tmp_path, EVERYTHING)


def test_every_field_is_read(everything: Fleet) -> None:
    one, two, card, nano, measured = everything.experts
    assert [each.name for each in everything.experts] == [
        "board", "board-2", "mine:fp8 @ my card", "sizes @ Jetson Orin Nano 8GB", "llama-3.1-8b @ card",
    ]  # fmt: skip
    assert (one.url, two.url) == ("http://one:8000", "http://two:8000")
    assert (one.engine.kind, one.engine.max_num_seqs, one.engine.token_budget) == ("vllm-sync", 16, 1024)
    assert (card.kv_blocks, card.answers, card.llm.format, card.llm.bits) == (500, "mine", "fp8", 8.0)
    assert card.llm.kv_bytes_per_token == one.llm.kv_bytes_per_token == 36 * 2 * 8 * 128 * 2
    assert (nano.device.busy_w, nano.device.memory_gb) == (25.0, DEVICES["Jetson Orin Nano 8GB"].memory_gb)
    assert [each.timing().origin for each in everything.experts] == [
        "fitted", "fitted", "guessed", "scaled", "measured",
    ]  # fmt: skip
    assert measured.timing().kernels is not None
    assert everything.limits.latency_s_per_token == (0.04, 0.09)
    assert (everything.limits.ttft_s, everything.limits.e2e_s) == ((0.5, math.inf), ())
    assert everything.limits.shares == (3.0, 1.0)


def test_a_world_has_what_its_file_says(everything: Fleet) -> None:
    env, params = make(everything, load=1.0)
    experts = params.experts
    assert env.expert_names[:2] == ("board", "board-2")
    assert experts.max_running.tolist() == [16] * 5
    assert experts.async_scheduling.tolist() == [False, False, False, True, True]
    assert experts.prefix_cache.tolist() == [True] * 5
    assert experts.token_budget.tolist() == [1024, 1024, 2048, 2048, 2048]
    np.testing.assert_allclose(experts.network_s, [0.004, 0.004, 0, 0, 0])
    assert experts.kernels is not None  # all have tables: by the law, or measured
    assert float(params.saturation_per_s) == 4.5
    assert float(params.workload.arrivals.rate_per_s) == 4.5
    assert int(params.max_steps_in_episode) == 100
    requests = jax.vmap(params.workload.content.sample)(jax.random.split(jax.random.key(0), 2000))
    assert requests.score.shape == (2000, 3)  # of LLMs: replicas and namesakes share their answers
    np.testing.assert_allclose(requests.score.mean(0), [0.7, 0.6, 0.65], atol=0.01)
    assert requests.output_tokens[:, 1].mean() < 0.8 * requests.output_tokens[:, 0].mean()
    np.testing.assert_allclose(np.unique(requests.latency_limit_s), [0.04, 0.09], rtol=1e-6)


def test_replicas_and_a_quality_table_go_together(tmp_path: pathlib.Path) -> None:
    table = QualityTable(
        "t", ("a", "b"), np.array([9, 8]), np.array([[5, 6], [7, 8]]), np.array([[0.1, 0.2], [0.3, 1]])
    )
    np.savez(
        tmp_path / "t.npz", experts=table.experts, prompt_tokens=table.prompt_tokens,
        out_tokens=table.output_tokens, graded=table.score,
    )  # fmt: skip
    text = HEAD + 'count = 3\nanswers = "b"\n[[experts]]\nllm = "qwen3-4b:int4"\ndevice = "RTX 4060"\nanswers = "a"\n'
    fleet_of(tmp_path, text + '[quality]\ntable = "t.npz"\nscore_column = "graded"\n')
    env, params = make(load_fleet(tmp_path / "fleet.toml"), rate_per_s=1.0)
    assert env.spec.num_experts == 4
    assert np.asarray(params.workload.answers_of).tolist() == [0, 0, 0, 1]
    np.testing.assert_allclose(params.workload.content.score[:, 0], [0.2, 1.0])
    world = WorldConfig(fleet=str(tmp_path / "fleet.toml"), table_part="test")
    assert len(world.read_table().prompt_tokens) == 2
    assert world.for_training().table_part == "test"


def test_tasks_of_several_kinds_are_one_stream(tmp_path: pathlib.Path) -> None:
    for name, experts, lengths in (
        ("math", ["a", "b"], [[4096, 3]]),
        ("code", ["c", "b", "a"], [[7, 2, 5], [9, 1, 8]]),
    ):
        rows = len(lengths)
        np.savez(
            tmp_path / f"{name}.npz", experts=experts, prompt_tokens=np.full(rows, 10), out_tokens=lengths,
            graded=np.ones((rows, len(experts))),
        )  # fmt: skip
    text = HEAD + 'answers = "a"\n[quality]\ntable = ["math.npz", "code.npz"]\nscore_column = "graded"\n'
    fleet_of(tmp_path, text)
    world = WorldConfig(fleet=str(tmp_path / "fleet.toml"))
    assert sorted(world.inputs()) == ["fleet", "table", "table 1"]
    _, params = world.build()
    assert np.asarray(params.workload.content.output_tokens[:, 0]).tolist() == [4096, 5, 8]
    assert params.workload.content.max_output_tokens.tolist() == [4096.0]
    with pytest.raises(InputError, match=r"--prompts=texts.jsonl: has the texts of one table, but .* has 2"):
        WorldConfig(fleet=str(tmp_path / "fleet.toml"), prompts="texts.jsonl").read_table()


def test_a_fleet_may_have_64_experts_and_no_more(tmp_path: pathlib.Path) -> None:
    assert len(fleet_of(tmp_path, HEAD + "count = 64\n").experts) == 64
    with pytest.raises(InputError, match="experts are 65 with all replicas, must be at most 64"):
        fleet_of(tmp_path, HEAD + 'count = 64\n[[experts]]\nllm = "qwen3-8b"\ndevice = "A100"\n')


def test_the_shipped_fleets_are_read_by_the_same_reader() -> None:
    folder = pathlib.Path(__file__).parents[2] / "qos_jax" / "worlds" / "fleets"
    for path in folder.glob("*.toml"):
        fleet = load_fleet(path)
        assert fleet.name == path.stem
        assert preset_of(fleet).saturation_per_s is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format = ", "is not TOML: Invalid value"),
        ("", "format is missing"),
        ("format = 2", "format is 2, must be 1"),
        ("format = 1", r"experts is missing, must be one or more tables \[\[experts\]\]"),
        ("format = 1\nexperts = 3", "experts is 3, must be one or more tables"),
        ("format = 1\nexperts = [3]", r"experts\[0\] is 3, must be a table of fields"),
        ("colour = 1\n" + HEAD, "colour is unknown; choose from format, name, "),
        ("engine = 4\n" + HEAD, "engine is 4, must be a table of fields"),
        ("engine.kind = 'tgi'\n" + HEAD, "engine.kind is 'tgi', must be one of vllm, vllm-sync, sglang, llama.cpp"),
        (HEAD + "[experts.engine]\nkind = 7", r"experts\[0\].engine.kind is 7, must be one of vllm"),
        (HEAD + "[experts.engine]\nspeed = 7", r"experts\[0\].engine.speed is unknown; choose from kind, max_num_seqs"),
        (
            HEAD + "[experts.engine]\nmax_num_seqs = 0",
            "engine.max_num_seqs is 0, must be a whole number from 1",
        ),
        (HEAD + "[experts.engine]\nmax_num_seqs = true", "engine.max_num_seqs is True, must be a whole number"),
        (
            HEAD + "[experts.engine]\nmemory_share = 1.5",
            "memory_share is 1.5, must be a finite number above 0",
        ),
        (HEAD + "[experts.engine]\nmemory_share = 0.1", "with 6.1.* GB of weights does not fit Jetson AGX Orin 64GB"),
        (HEAD + "[experts.engine]\nprefix_cache = 'yes'", "prefix_cache is 'yes', must be true or false"),
        (HEAD + "count = 0", r"experts\[0\].count is 0, must be a whole number from 1 to 64"),
        (HEAD + "link_delay_s = -1", "link_delay_s is -1, must be a finite number of at least 0"),
        (HEAD + "link_delay_s = nan", "link_delay_s is nan, must be a finite number"),
        (HEAD + f"link_delay_s = 1{'0' * 400}", "link_delay_s is 1000.*, must be a finite number"),
        (HEAD + f"link_delay_s = 1{'0' * 5000}", "fleet.toml: is not TOML: Exceeds the limit"),
        (HEAD + "link_delay_s = '1'", "link_delay_s is '1', must be a finite number"),
        (HEAD + "name = ''", r"experts\[0\].name is '', must be a text that is not empty"),
        (HEAD + "url = ['a', 'b']", r"url is \['a', 'b'\], must be one text, or a list of 1"),
        (HEAD + "card = 'a'", r"experts\[0\].load_s is missing"),
        (HEAD + "load_s = 3", r"load_s is 3.0, must be left out: the expert has no card"),
        (HEAD + "card = 'a'\nload_s = -1", "load_s is -1, must be a finite number of at least 0 and at most 10000"),
        (HEAD + "card = 'a'\nload_s = 3\ncount = 2", "count is 2, must be 1: an expert with a card is not several"),
        (
            ON_CARD + ON_CARD[11:].replace("AGX Orin 64GB", "AGX Thor"),
            r"experts\[1\].card is 'a', must be another card, as that of qwen3-8b.* is a Jetson AGX Orin 64GB",
        ),
        (HEAD + "delay = 3", r"experts\[0\].delay is unknown"),
        (HEAD + "name = 'a'\n" + HEAD[11:] + "name = 'a'", r"experts\[1\].name is 'a', must be another one than"),
        (HEAD.replace("qwen3-8b:int4", "gpt"), r"experts\[0\].llm: LLM 'gpt' is unknown; choose from alpaca-native"),
        (HEAD.replace("int4", "int3"), "format 'int3' is unknown; choose from fp16, fp8, int4, nvfp4"),
        (HEAD.replace("Jetson AGX Orin 64GB", "abacus"), "device is 'abacus', must be a table, or one of RTX 4090"),
        ("format = 1\n[[experts]]\ndevice = 'A40'", r"experts\[0\].llm is missing"),
        ("format = 1\n[[experts]]\nllm = 'mpt-7b'", r"experts\[0\].device is missing"),
        ("format = 1\n[[experts]]\nllm = 5\ndevice = 'A40'", r"experts\[0\].llm is 5, must be a table of fields"),
        ("format = 1\n[[experts]]\nllm = {bits = 4}\ndevice = 'A40'", "llm.name is missing"),
        (
            "format = 1\n[[experts]]\nllm = {name = 'x', weights_gb = 3}\ndevice = 'A40'",
            "llm.matrix_params_billion",
        ),
        ("format = 1\n[[experts]]\nllm = {name = 'mpt-7b', bits = 99}\ndevice = 'A40'", "llm.bits is 99, must be"),
        ("format = 1\n[[experts]]\nllm = {config = 'no.json'}\ndevice = 'A40'", "no.json: cannot be read"),
        ("format = 1\n[[experts]]\nllm = 'mpt-7b'\ndevice = {name = 'x'}", "device.memory_gb is missing"),
        (
            "format = 1\n[[experts]]\nllm = 'mpt-7b'\ndevice = {name = 'x', memory_gb = 40}",
            "bandwidth_gb_per_s is m",
        ),
        ("format = 1\n[[experts]]\nllm = 'mpt-7b'\ndevice = {name = 'A40', fp16_tflops = 9}", "in the catalogue"),
        ("format = 1\n[[experts]]\nllm = 'mpt-7b'\ndevice = {profile = 'p.json', memory_gb = 40}", "p.json: cannot be"),
        (
            "limits.latency_ms_per_token = 0\n" + HEAD,
            "limits.latency_ms_per_token is 0, must be a finite",
        ),
        ("limits.latency = 0\n" + HEAD, "limits.latency is unknown; choose from classes, latency_ms_per_token"),
        ("limits.classes = [{share = 2}]\n" + HEAD, r"limits.classes\[0\] has no limit, must have one of latency_ms"),
        (
            "quality.mean_score.x = 1\n" + HEAD,
            "quality.mean_score.x is 1.0, must be a number",
        ),
        ("quality.mean_output_tokens.x = 9\n" + HEAD, "mean_output_tokens.x has no quality.mean_score.x"),
        ("quality = {table = 't', mean_score = {x = 0.5}}\n" + HEAD, "quality.table is 't', must be left out where"),
        ("quality = {table = []}\n" + HEAD, r"quality.table is \[\], must be a text that is not empty, or a list of"),
        ("quality = {table = ['t', 't']}\n" + HEAD, "quality.table is .*, must be a text that is not empty, or a list"),
        ("workload.content = 'quality'\n" + HEAD, "workload.content is 'quality', must be quality where"),
        ("workload.content = 'essays'\n" + HEAD, "workload.content is 'essays', must be one of mix-instruct"),
        ("workload.prompt_tokens_median = 9\n" + HEAD, "workload.prompt_tokens_p90 is missing, must be given with"),
        (
            "workload = {prompt_tokens_median = 9, prompt_tokens_p90 = 9}\n" + HEAD,
            "p90 is 9.0, must be above",
        ),
        ("workload.requests = 2.5\n" + HEAD, "workload.requests is 2.5, must be a whole number"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(text: str, message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=message) as raised:
        fleet_of(tmp_path, text)
    assert str(raised.value).startswith(str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None, must be a whole number"),
        ({"vocab_size": "x"}, "vocab_size is 'x', must be a whole number"),
        ({"num_experts": 128}, "num_experts is 128: mixtures of experts"),
    ],
)
def test_a_config_that_does_not_tell_the_shape_is_refused(
    change: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(InputError, match=message):
        fleet_of(tmp_path, "format = 1\n[[experts]]\nllm = {config = 'config.json'}\ndevice = 'A40'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"errors": 5}, "errors is 5.0, must be an object"),
        ({"errors": {"tables": [1]}}, r"errors.tables is \[1.0\], must be an object"),
        ({"errors": {"tables": {"decode": "x"}}}, "errors.tables.decode is 'x', must be an object"),
        ({"errors": {"tables": {"prefill": {"mape": "x"}}}}, "errors.tables.prefill.mape is 'x', must be a finite"),
        ({"errors": {"tables": {"prefill": {"mape": -1}}}}, "errors.tables.prefill.mape is -1.0, must be a finite"),
        ({"origin": ["fitted"]}, r"origin is \['fitted'\], must be measured or fitted"),
        ({"basis": 5}, "basis is 5.0, must be a text"),
    ],
)
def test_what_a_profile_says_of_its_origin_and_errors_is_checked(
    change: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    profile = json.loads(next(iter(MEASURED.values())).read_text())
    text = "format = 1\n[[experts]]\nllm = 'mpt-7b'\ndevice = {profile = 'p.json', memory_gb = 40}"
    (tmp_path / "p.json").write_text(json.dumps(profile | {"errors": {"tables": None}}))
    timing = fleet_of(tmp_path, text).experts[0].timing()
    assert (timing.origin, timing.step_error, timing.prompt_error) == ("measured", None, None)
    (tmp_path / "p.json").write_text(json.dumps(profile | change))
    with pytest.raises(InputError, match=f"p.json: {message}"):
        fleet_of(tmp_path, text).experts[0].timing()


def test_answers_that_are_not_there_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="LLM 'qwen3-8b' has no answers in the built-in generator; choose from"):
        make(fleet_of(tmp_path, HEAD))
    with pytest.raises(InputError, match=r"'qwen3-8b' has no answers in quality\.mean_score"):
        make(fleet_of(tmp_path, "quality.mean_score.x = 0.5\n" + HEAD))
    for field, message in (("arrivals", "arrivals 'x'"), ("prediction", "prediction 'x' is unknown")):
        with pytest.raises(InputError, match=f"fleet.toml: workload.{field}: {message}"):
            make(fleet_of(tmp_path, f"workload.{field} = 'x'\n" + HEAD))
    with pytest.raises(InputError, match="block_size is 32, must be 16, the only one that is simulated"):
        make(fleet_of(tmp_path, "quality.mean_score.qwen3-8b = 0.5\nengine.block_size = 32\n" + HEAD))
