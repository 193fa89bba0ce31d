"""Presets run at their stated saturation rates, variations need no compilation, and illegal values are refused."""

from __future__ import annotations

import functools
import hashlib
import math
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qos_jax import (
    PRESETS,
    Environment,
    EnvParams,
    InputError,
    QualityTable,
    RequestTrace,
    evaluate,
    make,
    make_router,
    replay,
    sample_requests,
    saturation_rate,
    scenarios,
)
from qos_jax.workload.arrivals import gamma
from qos_jax.workload.prediction import PredictionModel, TablePredictions

SATURATION_SEEDS = 5
TRACED: list[Environment] = []  # an entry whenever `first_step` is traced


@partial(jax.jit, static_argnums=0)
def first_step(env: Environment, params: EnvParams, key: jax.Array) -> tuple[Any, Any]:
    """Resets and sends the first request to expert 0; returns the outputs of both calls."""
    TRACED.append(env)
    reset_key, step_key = jax.random.split(key)
    before = env.reset(reset_key, params)
    return before, env.step(step_key, before[1], jnp.int32(0), params)


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", ["paper-3", *slow(*(name for name in PRESETS if name != "paper-3"))])
def test_the_first_request_is_served(name: str) -> None:
    env, params = make(name)
    (obs, before), (next_obs, _, reward, _, _, info) = first_step(env, params, jax.random.key(0))
    assert obs.action_mask.all()
    assert not (obs.requests.running | obs.requests.waiting).any()
    assert not info["dropped"]
    live = next_obs.experts.running + next_obs.experts.waiting
    assert live.tolist() == [1 - int(info["completions"].finished), *[0] * (env.spec.num_experts - 1)]
    assert 0 <= reward <= before.request.score[0]
    assert float(next_obs.requests.age_s[0, 0]) == pytest.approx(float(info["gap_s"]))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((obs, next_obs)))


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_keeps_the_shapes(name: str) -> None:
    env, params = make(name)
    (obs, before), (next_obs, after, *_) = jax.eval_shape(partial(first_step, env), params, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes((obs, before), (next_obs, after))
    assert obs.action_mask.shape == (len(PRESETS[name].experts) + 1,)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper-3", "golden-rtx4090", "paper-6", "edge-8", "jetson-4", "edge-2026"])
def test_the_saturation_rate_is_the_one_written_down(name: str) -> None:
    env, params = make(name, rate_per_s=1.0)
    measured_per_s = np.mean([saturation_rate(env, params, seed=seed) for seed in range(SATURATION_SEEDS)])
    assert measured_per_s == pytest.approx(PRESETS[name].saturation_per_s, rel=0.01)


def test_eight_times_the_fleet_has_eight_times_the_saturation_rate() -> None:
    one, eight = PRESETS["edge-8"], PRESETS["edge-64"]
    assert eight.experts == 8 * one.experts
    assert eight.saturation_per_s == pytest.approx(8 * one.saturation_per_s, rel=0.01)


def test_every_idle_expert_of_edge_8_meets_the_limit_with_room_to_spare() -> None:
    env, params = make("edge-8")
    keys = jax.random.split(jax.random.key(0), 4000)
    prompt_tokens, output_tokens, *_ = jax.jit(jax.vmap(params.workload.content.sample))(keys)
    num_experts = env.spec.num_experts
    trace = RequestTrace(
        arrival_s=1000.0 * np.arange(num_experts),
        prompt_tokens=np.full(num_experts, round(float(prompt_tokens.mean()))),
        output_tokens=np.tile(np.round(output_tokens.mean(0)), (num_experts, 1)),
    )
    log = replay(params.experts, trace, np.arange(num_experts))
    latency_per_token_s = (log.finish_s - trace.arrival_s) / np.diag(trace.output_tokens)
    assert (latency_per_token_s <= 0.8 * PRESETS["edge-8"].latency_limit_s).all()


@pytest.mark.parametrize(("load", "rate_per_s"), [(0.5, None), (1.1, None), (None, 7.0), (None, None)])
def test_requests_arrive_at_the_rate_that_is_asked_for(load: float | None, rate_per_s: float | None) -> None:
    _, params = make("paper-3", load=load, rate_per_s=rate_per_s)
    gaps_s, _ = sample_requests(params.workload, jax.random.key(1), 12_000)
    expected_per_s = rate_per_s or (load or 0.8) * PRESETS["paper-3"].saturation_per_s
    assert 1 / float(gaps_s.mean()) == pytest.approx(expected_per_s, rel=0.03)


@functools.cache
def variations() -> dict[str, tuple[Environment, EnvParams]]:
    """Worlds of equal shapes, first the preset without changes."""
    overrides: dict[str, dict[str, Any]] = {
        "none": {},
        "load": {"load": 1.2},
        "rate": {"rate_per_s": 3.0},
        "limit": {"latency_limit_s": 0.05},
        "experts": {"experts": (("koala-7B-HF", "A100"), ("mpt-7b", "A40"), ("chatglm-6b", "A30")), "rate_per_s": 9.0},
        "engine": {"engine": "vllm", "rate_per_s": 9.0},
        "queues": {"max_running": 16, "max_waiting": 48, "rate_per_s": 9.0},
        "poisson": {"arrivals": "poisson"},
        "gamma": {"arrivals": "gamma:3"},
        "a process": {"arrivals": gamma(1.0, 2.0)},
        "mmpp": {"arrivals": "mmpp"},
        "sinusoidal": {"arrivals": "sinusoidal:0.8:60"},
        "perfect": {"prediction": "perfect"},
        "nothing": {"prediction": "none"},
        "a model": {"prediction": PredictionModel(0.3, 0.4)},
        "requests": {"requests": 17},
    }
    return {name: make("paper-3", **fields) for name, fields in overrides.items()}


@pytest.mark.slow
def test_variations_do_not_recompile() -> None:
    for env, params in variations().values():
        first_step(env, params, jax.random.key(0))
    assert TRACED.count(variations()["none"][0]) == 1
    env, params = make("paper-3", max_waiting=33, rate_per_s=9.0)  # another number of slots is another shape
    jax.eval_shape(partial(first_step, env), params, jax.random.key(0))
    assert TRACED[-1] == env


@pytest.mark.slow
def test_variations_have_the_requested_values() -> None:
    key = jax.random.key(0)
    firsts = {name: first_step(env, params, key) for name, (env, params) in variations().items()}
    requests = {name: before[1].request for name, (before, _) in firsts.items()}
    gap_s = {name: float(after[-1]["gap_s"]) for name, (_, after) in firsts.items()}
    saturation_per_s = PRESETS["paper-3"].saturation_per_s

    assert gap_s["none"] / gap_s["load"] == pytest.approx(1.2 / 0.8, rel=1e-5)
    assert gap_s["rate"] / gap_s["none"] == pytest.approx(0.8 * saturation_per_s / 3.0, rel=1e-5)
    assert gap_s["poisson"] == gap_s["none"]
    others = [gap_s[name] for name in ("none", "gamma", "a process", "mmpp", "sinusoidal")]
    assert len(set(others)) == len(others)

    assert float(requests["limit"].latency_limit_s) == pytest.approx(0.05)
    perfect, nothing = requests["perfect"], requests["nothing"]
    np.testing.assert_array_equal(perfect.predicted_score, perfect.score)
    np.testing.assert_array_equal(perfect.predicted_tokens, perfect.output_tokens)
    np.testing.assert_array_equal(perfect.output_tokens, nothing.output_tokens)
    np.testing.assert_allclose(nothing.predicted_score, [0.7146, 0.7038, 0.6321], rtol=1e-4)  # the experts' means
    assert firsts["queues"][0][0].experts.profile.max_running.tolist() == [16] * 3
    assert variations()["experts"][0].expert_names == ("koala-7B-HF @ A100", "mpt-7b @ A40", "chatglm-6b @ A30")


def test_only_the_papers_presets_schedule_synchronously() -> None:
    synchronous = {name for name in PRESETS if not make(name, rate_per_s=1.0)[1].experts.async_scheduling.all()}
    assert synchronous == {"paper-3", "paper-6"}
    for engine, on in (("vllm", True), ("vllm-sync", False)):
        experts = make("paper-3", engine=engine, rate_per_s=1.0)[1].experts
        assert experts.async_scheduling.tolist() == experts.prefix_cache.tolist() == [on] * 3


BIG = (("vicuna-13b-1.1", "RTX 4090"),)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slots": 3}, "field 'slots' is unknown.*max_running"),
        ({"saturation_per_s": 3.0}, "field 'saturation_per_s' is unknown"),
        ({"load": 0.5, "rate_per_s": 1.0}, "load 0.5 and rate_per_s 1.0 are both given"),
        ({"rate_per_s": -1.0}, "rate_per_s is -1.0"),
        ({"rate_per_s": 0.0}, "rate_per_s is 0.0"),
        ({"rate_per_s": math.nan}, "rate_per_s is nan"),
        ({"rate_per_s": 1e9}, "rate_per_s .* 1000000000.0"),
        ({"load": 0.0}, "load is 0.0"),
        ({"load": math.inf}, "load is inf"),
        ({"engine": "tgi"}, "engine 'tgi' is unknown; choose from vllm, vllm-sync"),
        ({"arrivals": "weekly"}, "arrivals 'weekly'.*poisson"),
        ({"arrivals": "gamma:0"}, "cv .*0.0"),
        ({"prediction": "psychic"}, "prediction 'psychic' is unknown.*realistic"),
        ({"experts": BIG}, "vicuna-13b-1.1 with 26 GB of weights does not fit RTX 4090"),
        ({"experts": (("gpt", "A40"),)}, "LLM 'gpt' is unknown"),
        (
            {"experts": (("llama-3.1-8b", "A40"),)},
            "'llama-3.1-8b' has no answers in the built-in generator; choose from",
        ),
        ({"experts": (("mpt-7b", "abacus"),)}, "GPU 'abacus' is unknown"),
        ({"experts": ()}, r"experts is \(\), must be one or more pairs"),
        ({"experts": None}, "experts is None, must be one or more pairs"),
        ({"experts": "alpaca-native@A40"}, "experts is 'alpaca-native@A40', must be one or more pairs"),
        ({"experts": ("alpaca-native@A40",)}, r"experts\[0\] is 'alpaca-native@A40', must be a pair \(LLM, GPU\)"),
        ({"experts": (("mpt-7b", "A40"), ("mpt-7b",))}, r"experts\[1\] is \('mpt-7b',\), must be a pair"),
        ({"experts": ((7, "A40"),)}, r"experts\[0\] is \(7, 'A40'\), must be a pair"),
        ({"max_running": 0}, "max_running is 0"),
        ({"max_running": 2.5}, "max_running is .*2.5.* whole"),
        ({"max_running": math.nan}, "max_running is nan"),
        ({"max_waiting": 0}, "max_waiting is 0"),
        ({"requests": 0}, "requests is 0"),
        ({"staleness_s": -1.0}, "staleness_s is -1.0"),
        ({"latency_limit_s": 0.0}, "latency_limit_s is .*0.0"),
        ({"latency_limit_s": (0.03, math.nan)}, "latency_limit_s is .*nan"),
        ({"latency_limit_s": "x"}, "latency_limit_s is 'x', must be a number or a sequence of numbers"),
        ({"latency_limit_s": (0.03, None)}, r"latency_limit_s is \(0.03, None\), must be a number or a sequence"),
        ({"latency_limit_s": ((0.03,), (0.03, 0.04))}, "latency_limit_s is .*, must be a number or a sequence"),
        ({"latency_limit_weights": (1.0, 2.0)}, "weights .* 1 latency limits"),
        ({"latency_limit_weights": "even"}, "latency_limit_weights is 'even', must be a number or a sequence"),
        ({"arrivals": 5}, "arrivals is 5, must be an arrival process or the name of one"),
        ({"prediction": 0.5}, "prediction is 0.5, must be a prediction model or the name of one"),
        ({"quality_table": "table.npz"}, "quality_table is 'table.npz', must be a QualityTable"),
        ({"allow_drop": "no"}, "allow_drop is 'no', must be True or False"),
        ({"check": "no"}, "check is 'no', must be True or False"),
        ({"load": "high"}, "load is 'high', must be a finite number above 0"),
        ({"rate_per_s": True}, "rate_per_s is True, must be a finite number above 0"),
        ({"max_waiting": True}, "max_waiting is True, must be a whole number"),
        ({"content": "essays"}, "content 'essays' is unknown"),
        ({"max_prompt_tokens": "x"}, "max_prompt_tokens is 'x', must be a whole number from 1 to 1048576"),
        ({"max_output_tokens": 2**31}, "max_output_tokens is 2147483648, must be a whole number from 1 to 1048576"),
        ({"prompt_tokens_median": -1, "prompt_tokens_p90": 5}, "prompt_tokens_median is -1, must be a finite number"),
        ({"prompt_tokens_median": "a", "prompt_tokens_p90": 5}, "prompt_tokens_median is 'a', must be a finite number"),
        ({"prompt_tokens_median": 9, "prompt_tokens_p90": 5}, "prompt_tokens_p90 is 5, must be above the median, 9"),
        ({"prompt_tokens_median": 9}, "prompt_tokens_p90 is missing, must be given with the other"),
        ({"quality": 5}, "quality is 5, must be a Quality"),
        ({"lengths": 5}, "lengths is 5, must be RecordedLengths"),
        ({"engine": [5]}, r"engine \[5\] is unknown; choose from"),
        ({"rate_per_s": 10**400}, "rate_per_s is 1000.*, must be a finite number above 0"),
        ({"load": 10**5000}, "load is a value that is too long .*, must be a finite number above 0"),
        ({"max_running": 5 * 10**8}, "max_running is 500000000, must be a whole number from 1 to 4096"),
        ({"history": 10**9, "staleness_s": 1.0}, "history is 1000000000, must be a whole number from 0 to 4096"),
        ({"staleness_s": 1e300}, r"staleness_s is 1e\+300, must be a finite number of at least 0 and at most 1e\+06"),
        ({"observe": "proxy", "scrape_s": 1e300}, r"scrape_s is 1e\+300, must be .* at most 1e\+06"),
    ],
)
def test_illegal_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make("paper-3", **fields)


def quality_table(*llms: str) -> QualityTable:
    """Three prompts; each LLM has other lengths and scores."""
    rows, columns = np.indices((3, len(llms)))
    return QualityTable("made up", llms, np.array([10, 20, 30]), 5 + 7 * rows + 30 * columns, 0.1 + 0.2 * columns)


@pytest.mark.parametrize("table", [None, quality_table("mpt-7b", "llama-3.1-8b", "flan-t5-xxl", "no-such-llm")])
def test_every_llm_that_a_message_offers_works(table: QualityTable | None) -> None:
    with pytest.raises(InputError, match="LLM 'vicuna-7b' has no answers in") as error:
        make("paper-3", experts=(("vicuna-7b", "A100"),), quality_table=table, rate_per_s=1.0)
    offered = str(error.value).split("choose from ")[1].split(";")[0].split(", ")
    assert len(offered) == (11 if table is None else 2)
    fleet = tuple((llm, "A100") for llm in offered)
    assert make("paper-3", experts=fleet, quality_table=table, rate_per_s=1.0)[0].spec.num_experts == len(fleet)


def test_an_unknown_llm_gets_offers_that_work() -> None:
    with pytest.raises(InputError, match="LLM 'gpt' is unknown") as error:
        make("paper-3", experts=(("gpt", "A40"),), rate_per_s=1.0)
    offered = str(error.value).split("has answers of ")[1].split(";")[0].split(", ")
    assert make("paper-3", experts=tuple((llm, "A100") for llm in offered), rate_per_s=1.0)[0].spec.num_experts == 11


def test_replicas_of_one_llm_share_its_answers_and_predictions() -> None:
    fleet = (("mpt-7b", "A40"), ("alpaca-native", "A40"), ("mpt-7b", "A100"))
    table = quality_table("alpaca-native", "koala-7B-HF", "mpt-7b")
    own = np.arange(9.0).reshape(3, 3)[:, [1, 0, 1]]  # a column for each expert
    for prediction in (None, TablePredictions(jnp.asarray(own / 10), jnp.asarray(own))):
        _, params = make("paper-3", experts=fleet, quality_table=table, rate_per_s=1.0, prediction=prediction)
        requests = jax.tree.map(np.asarray, sample_requests(params.workload, jax.random.key(0), 50)[1])
        for name in ("score", "output_tokens", "predicted_score", "predicted_tokens"):
            values = getattr(requests, name)
            np.testing.assert_array_equal(values[:, 0], values[:, 2])
            assert (values[:, 0] != values[:, 1]).any(), name
        np.testing.assert_array_equal(requests.output_tokens[:, 0] - requests.output_tokens[:, 1], 60)
    np.testing.assert_array_equal(requests.predicted_tokens, own[requests.prompt_tokens // 10 - 1])


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=f"'paper-9' is unknown.*{', '.join(PRESETS)}"):
        make("paper-9")
    with pytest.raises(InputError, match=r"\['paper-3'\] is unknown"):
        make(["paper-3"])


PROFILE_FIELDS = (
    "step_base_s", "prefill_base_s", "prefill_per_token_s", "per_sequence_s", "per_kv_token_s", "kv_blocks",
    "max_running", "max_waiting", "network_s", "idle_w", "busy_w", "kv_block_gb", "token_budget", "async_scheduling",
    "prefix_cache", "standby_w", "standby_s",
)  # fmt: skip
DIGESTS = {  # of the presets when they were written in Python
    "paper-3": "046118eaf9bd5893",
    "paper-6": "f295e9c982e09e87",
    "edge-8": "a26f871451182942",
    "edge-64": "bd0fe93ff25c6d87",
    "golden-rtx4090": "f130c766ed946b85",
}


def digest(name: str) -> str:
    """Of a preset's experts, limits and saturation rate, bit for bit."""
    env, params = make(name)
    leaves = [getattr(params.experts, field) for field in PROFILE_FIELDS]
    leaves += jax.tree.leaves((params.experts.kernels, params.workload.content.limits, params.saturation_per_s))
    found = hashlib.sha256(repr((env.expert_names, env.spec.engine.slots)).encode())
    for leaf in map(np.asarray, leaves):
        found.update(f"{leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
    return found.hexdigest()[:16]


def test_presets_are_bit_for_bit_what_they_were_before_they_were_files() -> None:
    assert {name: digest(name) for name in DIGESTS} == DIGESTS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jetson-4", "edge-2026"])
def test_memory_binds_where_the_preset_says_so(name: str) -> None:
    env, params = make(name)
    routers = [make_router(name, env, params) for name in ("shortest_queue", "vllm_dp_2026")]
    for run in evaluate(env, params, routers, scenarios(params, [0.9], [1000, 1001]), 1200, warmup=150):
        assert run.metrics["kv_utilisation"] > 0.6
        assert run.metrics["preemptions"] > 10


def test_lengths_of_generated_requests_are_those_of_the_file() -> None:
    _, params = make("jetson-4")
    found = jax.jit(jax.vmap(params.workload.content.sample))(jax.random.split(jax.random.key(0), 4000))
    assert np.median(found.prompt_tokens) == pytest.approx(400, rel=0.05)
    assert np.percentile(found.prompt_tokens, 90) == pytest.approx(1500, rel=0.07)
    assert found.prompt_tokens.max() == 4096
    assert found.output_tokens.max() == 1024
