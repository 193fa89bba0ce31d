import dataclasses
import json

import numpy as np
import pytest

from qos_jax.errors import InputError
from qos_jax.fleet.catalogue import DEVICES, LLMS, MEASURED
from qos_jax.fleet.profiles import expert_profile
from qos_jax.workload import constants

GPUS = [name for name, device in DEVICES.items() if device.llama_7b]  # all hold an LLM of 7 billion parameters


def test_vllm_takes_larger_iterations_on_large_gpus() -> None:
    pairs = [("chatglm-6b", gpu) for gpu in ("RTX 4090", "A100", "H100")]
    assert expert_profile(pairs, engine="vllm").token_budget.tolist() == [2048, 2048, 8192]
    assert expert_profile(pairs, engine="vllm-sync").token_budget.tolist() == [2048] * 3


def test_kv_blocks_are_those_that_vllm_reported():
    profile = expert_profile([("llama-3.1-8b", "RTX 4090")])
    np.testing.assert_array_equal(profile.kv_blocks, [2588])
    assert profile.kv_block_gb == pytest.approx([16 * 131_072 / 1e9])


# Derived from the kernel measurements, pair by pair.
@pytest.mark.parametrize(
    ("llm", "gpu", "step_base_ms", "kv_ms_per_1000_tokens", "prefill_ms_per_token"),
    [
        ("alpaca-native", "RTX 4090", 14.8, 0.64, 0.083),
        ("koala-7B-HF", "A40", 24.0, 0.94, 0.126),
        ("llama-7b-hf-baize-lora-bf16", "A100", 9.3, 0.32, 0.065),
        ("mpt-7b", "RTX 4090", 14.5, 0.64, 0.081),
        ("mpt-7b-instruct", "A100", 9.0, 0.32, 0.064),
        ("chatglm-6b", "A40", 20.5, 0.82, 0.107),
        ("stablelm-tuned-alpha-7b", "A100", 10.6, 0.24, 0.075),
        ("vicuna-13b-1.1", "A40", 46.7, 1.47, 0.245),
        ("dolly-v2-12b", "A100", 16.2, 0.45, 0.115),
        ("oasst-sft-4-pythia-12b-epoch-3.5", "A40", 42.2, 1.32, 0.221),
        ("moss-moon-003-sft", "A100", 22.4, 0.51, 0.158),
    ],
)
def test_timing_scales_with_the_llm(llm, gpu, step_base_ms, kv_ms_per_1000_tokens, prefill_ms_per_token):
    profile = expert_profile([(llm, gpu)])
    assert profile.step_base_s == pytest.approx([step_base_ms / 1e3], rel=0.012)
    assert profile.per_kv_token_s == pytest.approx([kv_ms_per_1000_tokens / 1e6], rel=0.012)
    assert profile.prefill_per_token_s == pytest.approx([prefill_ms_per_token / 1e3], rel=0.012)


def test_short_prompts_cost_no_more_than_the_step_and_long_ones_do():
    names = [("alpaca-native", gpu) for gpu in GPUS]
    profile = expert_profile(names)
    assert np.all(profile.prefill_base_s + 16 * profile.prefill_per_token_s < profile.step_base_s)
    assert np.all(profile.prefill_base_s + 512 * profile.prefill_per_token_s > profile.step_base_s)


def test_each_expert_has_its_own_row():
    profile = expert_profile([("alpaca-native", "A40"), ("chatglm-6b", "H100")], max_running=8, max_waiting=5)
    alone = expert_profile([("chatglm-6b", "H100")], max_running=8, max_waiting=5)
    for name in (
        "step_base_s",
        "prefill_base_s",
        "kv_blocks",
        "per_sequence_s",
        "idle_w",
        "busy_w",
        "standby_s",
        "kv_block_gb",
    ):
        assert getattr(profile, name).shape == (2,)
        assert getattr(profile, name)[1] == getattr(alone, name)[0]
    np.testing.assert_array_equal(profile.max_running, [8, 8])
    np.testing.assert_array_equal(profile.max_waiting, [5, 5])
    assert np.all(profile.idle_w < profile.busy_w)


def test_gpus_stand_by_where_that_was_measured_between_idle_and_busy_power():
    profile = expert_profile([("alpaca-native", gpu) for gpu in GPUS])
    known = profile.standby_s > 0
    assert [gpu for gpu, is_known in zip(GPUS, known, strict=True) if is_known] == ["A6000"]
    assert np.all((profile.idle_w < profile.standby_w) & (profile.standby_w < profile.busy_w), where=known)


def test_measured_pairs_have_tables_if_all_are_measured():
    alone = expert_profile([("llama-3.1-8b", "RTX 4090")])
    twice = expert_profile([("llama-3.1-8b", "RTX 4090")] * 2)
    mixed = expert_profile([("alpaca-native", "A40"), ("llama-3.1-8b", "RTX 4090")])
    for field in dataclasses.fields(alone.kernels):
        row = getattr(alone.kernels, field.name)
        np.testing.assert_array_equal(getattr(twice.kernels, field.name), np.concatenate([row, row]))
    assert mixed.kernels is None
    assert mixed.step_base_s[1] == alone.step_base_s[0] == pytest.approx(16.875e-3, rel=1e-3)


def test_tables_of_unequal_length_stand_side_by_side(tmp_path, monkeypatch):
    measured = json.loads(MEASURED["llama-3.1-8b", "RTX 4090"].read_text())
    measured["kernels"] |= {"dense_tokens": [1, 100, 2048], "dense_s": [0.01, 0.02, 0.2]}
    path = tmp_path / "short.json"
    path.write_text(json.dumps(measured))
    monkeypatch.setitem(MEASURED, ("alpaca-native", "A40"), path)
    kernels = expert_profile([("alpaca-native", "A40"), ("llama-3.1-8b", "RTX 4090")]).kernels
    tokens, seconds = kernels.dense_tokens[0], kernels.dense_s[0]
    assert len(tokens) == len(kernels.dense_tokens[1]) > 3
    expected_s = 0.02 + (tokens[1:] - 100) * 0.18 / 1948
    np.testing.assert_allclose(seconds[1:], expected_s)
    assert (np.diff(tokens) > 0).all()


def test_every_decoder_of_mix_instruct_has_a_profile():
    assert set(constants.MIX_INSTRUCT) - set(LLMS) == {"flan-t5-xxl"}


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "no experts"),
        ([("gpt-5", "A40")], "LLM 'gpt-5' is unknown; choose from alpaca-native, koala"),
        ([("alpaca-native", "TPU")], "GPU 'TPU' is unknown; choose from RTX 4090, RTX 3090"),
        ([("vicuna-13b-1.1", "RTX 4090")], "26 GB of weights does not fit RTX 4090, which has 21.5 GB"),
    ],
)
def test_bad_pairs_are_refused(pairs, message):
    with pytest.raises(InputError, match=message):
        expert_profile(pairs)


@pytest.mark.parametrize("limits", [{"max_running": 0}, {"max_waiting": -1}])
def test_limits_below_one_are_refused(limits):
    with pytest.raises(InputError, match=f"{next(iter(limits))} is .*, must be at least 1"):
        expert_profile([("alpaca-native", "A40")], **limits)
