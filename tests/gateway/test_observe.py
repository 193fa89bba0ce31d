"""From a gateway's log to a fleet file: the log of a simulated fleet, whose timing is known."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from qos_jax import InputError, RequestTrace, load_fleet, make
from qos_jax.gateway.observed import FLEET, SUMMARY, TRACE, observe
from qos_jax.gateway.records import REQUESTS
from qos_jax.gateway.request_log import read_requests
from qos_jax.sim.replay import replay
from qos_jax.workload.trace_files import read_trace
from tests.helpers.programs import assert_refused, program_of
from tests.helpers.workloads import profile

NUMBER = 450
TRUE = {  # of the two replicas of "small", of "large" and of "rare"
    "step_base_s": np.array([0.012, 0.012, 0.03, 0.03]),
    "prefill_base_s": np.array([0.016, 0.016, 0.05, 0.05]),
    "prefill_per_token_s": np.array([2e-4, 2e-4, 4e-4, 4e-4]),
    "per_sequence_s": np.array([2e-3, 2e-3, 1e-3, 1e-3]),
    "per_kv_token_s": np.array([2e-6, 2e-6, 1e-6, 1e-6]),
}
LINK_S = 0.004
NAMES = ["small", "small-2", "large", "rare"]
OBSERVE = program_of("observe")
FLEET_FILE = """
format = 1  # of the file

[limits]
ttft_ms = 1500
tpot_ms = 60

[[experts]]
name = "small"
count = 2
llm = "qwen3-0.6b:int4"
device = "Jetson AGX Orin 64GB"  # on the roof
url = ["http://127.0.0.1:8001", "http://127.0.0.1:8002"]
engine = { kind = "llama.cpp", max_num_seqs = 4, kv_blocks = 512 }

[[experts]]
name = "large"
llm = { config = "models/config.json", bits = 4.5 }
device = { name = "Jetson AGX Orin 64GB", busy_w = 50 }
url = "http://127.0.0.1:8003"
engine = { kind = "llama.cpp", max_num_seqs = 4, kv_blocks = 512 }

[[experts]]
name = "rare"
llm = "qwen3-0.6b:int4"
device = "Jetson AGX Orin 64GB"
url = "http://127.0.0.1:8004"
"""
CONFIG = {
    "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 6144, "vocab_size": 151936, "tie_word_embeddings": True, "model_type": "qwen3",
}  # fmt: skip


def records() -> list[dict[str, Any]]:
    """The lines of a log; every tenth request was dropped, and every fifth was not streamed."""
    lot = np.random.default_rng(3)
    arrival_s = np.cumsum(lot.exponential(1 / 4.5, NUMBER))
    prompt_tokens = np.clip(lot.lognormal(4.5, 0.8, NUMBER).astype(int), 5, 1500)
    output_tokens = np.clip(lot.lognormal(4.0, 0.7, NUMBER).astype(int), 1, 600)
    engine = lot.choice([0, 1, 2, 3, -1], NUMBER, p=[0.4, 0.35, 0.14, 0.01, 0.1])
    experts = profile(**TRUE, kv_blocks=512, max_running=4, max_waiting=NUMBER)
    trace = RequestTrace(
        arrival_s=arrival_s, prompt_tokens=prompt_tokens, output_tokens=np.repeat(output_tokens[:, None], 4, 1)
    )
    log = replay(experts, trace, engine)
    noise = lot.lognormal(0.0, 0.05, (2, NUMBER))
    first_s, end_s = (
        (time_s - arrival_s + LINK_S) * each
        for time_s, each in zip((log.first_token_s, log.finish_s), noise, strict=True)
    )
    first_s = np.minimum(first_s, end_s)
    return [
        {
            "id": str(j), "time": 1.7e9 + arrival_s[j], "names": NAMES, "router": "round_robin",
            "status": "dropped" if engine[j] < 0 else "ok", "engine": None if engine[j] < 0 else NAMES[engine[j]],
            "tried": [] if engine[j] < 0 else [NAMES[engine[j]]],
            "prompt_tokens": int(prompt_tokens[j]), "output_tokens": 0 if engine[j] < 0 else int(output_tokens[j]),
            "first_token_s": None if j % 5 == 0 or engine[j] < 0 else first_s[j],
            "end_s": 0.0 if engine[j] < 0 else end_s[j], "qos": 0.0, "in_time": False,
            "predicted_score": [0.4, 0.4, 0.7, 0.4], "predicted_tokens": [70.0] * 4,
        }
        for j in range(NUMBER)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """With the fleet file, the log, and what was observed in ``out``."""
    folder = tmp_path_factory.mktemp("observe")
    (folder / "models").mkdir()
    (folder / "models" / "config.json").write_text(json.dumps(CONFIG))
    (folder / "fleet.toml").write_text(FLEET_FILE)
    (folder / REQUESTS).write_text("".join(json.dumps(line) + "\n" for line in records()))
    assert OBSERVE(f"--log={folder}", f"--fleet={folder / 'fleet.toml'}", f"--out={folder / 'out'}") == 0
    return folder


@pytest.mark.slow
def test_the_timing_of_the_engines_is_found(folder: pathlib.Path) -> None:
    """By what it says of iterations: single coefficients may stand for each other."""
    experts = make(load_fleet(folder / "out" / FLEET), rate_per_s=1.0)[1].experts
    for requests, kv_tokens, tokens in ((1, 200, 0), (4, 800, 0), (1, 0, 300), (1, 0, 1000)):
        expected, found = (
            np.maximum(of["step_base_s"], (tokens > 0) * (of["prefill_base_s"] + of["prefill_per_token_s"] * tokens))
            + of["per_sequence_s"] * requests
            + of["per_kv_token_s"] * kv_tokens
            for of in (TRUE, {name: np.asarray(getattr(experts, name)) for name in TRUE})
        )
        np.testing.assert_allclose(found[:3], expected[:3], rtol=0.12)


@pytest.mark.slow
def test_a_replay_has_the_times_of_later_requests(folder: pathlib.Path) -> None:
    engines = json.loads((folder / "out" / SUMMARY).read_text())["engines"]
    assert list(engines) == ["small", "large"]
    for engine in engines.values():
        held_out = engine["errors"]["held_out"]
        assert abs(held_out["e2e_s"]["mean_error"]) < 0.05
        assert abs(held_out["tpot_s"]["mean_error"]) < 0.05
        assert abs(held_out["ttft_s"]["mean_error"]) < 0.15
        assert abs(engine["errors"]["log"]["e2e_s"]["mean_error"]) < 0.01  # a mean, beside which noise is small


@pytest.mark.slow
def test_the_requests_are_those_of_the_log(folder: pathlib.Path) -> None:
    lines = [line for line in records() if line["engine"] is not None]
    trace = read_trace(folder / "out" / TRACE)
    assert trace.prompt_tokens.tolist() == [line["prompt_tokens"] for line in lines]
    assert trace.output_tokens.tolist() == [line["output_tokens"] for line in lines]
    np.testing.assert_allclose(np.diff(trace.arrival_s), np.diff([line["time"] for line in lines]), atol=2e-6)
    requests = json.loads((folder / "out" / SUMMARY).read_text())["requests"]
    assert requests["arrivals"] == "poisson"
    assert requests["rate_per_s"] == pytest.approx(4.5, rel=0.15)
    assert requests["log_length_r2"] == 0.0  # the same prediction for all


@pytest.mark.slow
def test_the_file_keeps_what_the_log_does_not_tell(folder: pathlib.Path) -> None:
    text = (folder / "out" / FLEET).read_text()
    assert "# of the file" in text
    old, new = load_fleet(folder / "fleet.toml"), load_fleet(folder / "out" / FLEET)
    assert [expert.url for expert in new.experts] == [expert.url for expert in old.experts]
    assert new.limits == old.limits
    assert [expert.kv_blocks for expert in new.experts[:3]] == [512] * 3
    assert new.experts[2].device.busy_w == 50
    assert new.experts[2].llm.weights_gb == old.experts[2].llm.weights_gb  # its config.json is found again
    assert new.quality.mean_score == {old.experts[0].answers: 0.4, old.experts[2].answers: 0.7}
    assert all(expert.timing().origin == "fitted" for expert in new.experts[:3])


@pytest.mark.slow
def test_an_engine_with_few_answers_keeps_its_timing(folder: pathlib.Path) -> None:
    summary = json.loads((folder / "out" / SUMMARY).read_text())
    assert summary["notes"] == ["rare gave 6 answers and keeps its timing; a fit needs 30"]
    expert = load_fleet(folder / "out" / FLEET).experts[3]
    assert expert.timing() == load_fleet(folder / "fleet.toml").experts[3].timing()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "other"}, "line 1: engine is 'other', must be null or one of small, small-2, large, rare"),
        ({"prompt_tokens": 2.5}, "line 1: prompt_tokens is 2.5, must be a whole number"),
        ({"end_s": -1}, "line 1: end_s is -1, must be a number of at least 0"),
        ({"time": None}, "line 1: time is None, must be a number"),
        ({"predicted_tokens": [1]}, "line 1: predicted_tokens is [1], must be a list of 4"),
        ({"names": "small"}, "line 1: names is 'small', must be a list"),
        ({"output_tokens": 1e400}, "line 1"),
        ({"end_s": 10**400}, "line 1: end_s is 1000"),
        ({"predicted_score": [10**400] * 4}, "line 1: predicted_score is [1000"),
        ({"router": None}, "line 1: router is None, must be a text"),
        ({"status": 5}, "line 1: status is 5, must be a text"),
        ({"in_time": "x"}, "line 1: in_time is 'x', must be true or false"),
        ({"engine": ["small"]}, "line 1: engine is ['small'], must be null or one of small"),
        ({"tried": None}, "line 1: tried is None, must be a list, each one of small"),
        ({"tried": ["small", {}]}, "line 1: tried is ['small', {}], must be a list"),
        ({"shadow": 5}, "line 1: shadow is 5, must be null or one of small, small-2, large, rare, drop"),
        ({"shadow": "x"}, "line 1: shadow is 'x', must be null or one of"),
        ({"estimate": []}, "line 1: estimate is [], must be null or an object"),
        ({"estimate": {"qos": [0.5] * 4}}, "line 1: estimate.net is missing, must be a list of 4 numbers or null"),
        ({"estimate": {"qos": ["x"] * 4}}, "line 1: estimate.qos is ['x'"),
        ({"names": ["a", "b"], "engine": "a", "predicted_score": [0, 0], "predicted_tokens": [1, 1]}, "names is"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_record_is_named(change: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    lines = records()[:3]
    lines[0] |= change
    (tmp_path / REQUESTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError) as error:
        read_requests(tmp_path)
    assert message in str(error.value)


@pytest.mark.slow
def test_the_engines_must_be_those_of_the_fleet(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    text = FLEET_FILE.replace('name = "large"', 'name = "huge"').replace("models/", f"{folder}/models/")
    (tmp_path / "fleet.toml").write_text(text)
    with pytest.raises(InputError, match=r"has the engines small, small-2, large, rare, must have those of .*: .*huge"):
        observe(read_requests(folder), load_fleet(tmp_path / "fleet.toml"))


@pytest.mark.slow
def test_bad_input_ends_the_program_with_one_line(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = f"--fleet={folder / 'fleet.toml'}"
    assert_refused(OBSERVE, capsys, "requests.jsonl", f"--log={tmp_path}", fleet, f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()
