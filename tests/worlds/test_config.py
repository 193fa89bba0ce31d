"""A world as plain values: it survives JSON, and what does not go together is named."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import pickle
from typing import Any

import jax
import numpy as np
import pytest

from qos_jax import InputError, WorldConfig, evaluate, make_router, recipe, sample_requests, scenarios
from qos_jax.training.run import TrainingConfig, training_run
from qos_jax.worlds import presets
from qos_jax.worlds.randomization import Domain, sample_worlds

WORLDS = (
    WorldConfig(),
    WorldConfig("edge-8", arrivals="gamma:2", prediction="perfect", latency_limit_s=(0.03, 0.05), staleness_s=0.5),
    WorldConfig(experts=("alpaca-native@A40", "koala-7B-HF@A100"), trace="trace.csv", allow_drop=False),
    WorldConfig(arrivals="servegen:clients.npz:7"),
    WorldConfig(trace="t.jsonl", trace_format="mooncake", trace_sort=True, trace_spread_s=3.0),
)


@pytest.mark.parametrize("world", WORLDS)
def test_a_world_survives_json(world: WorldConfig) -> None:
    assert WorldConfig.from_dict(json.loads(json.dumps(world.to_dict()))) == world
    assert pickle.loads(pickle.dumps(world)) == world


def test_it_builds_what_make_builds() -> None:
    env, params = WorldConfig(experts=("alpaca-native@A40", "koala-7B-HF@A40"), latency_limit_s=(0.04,)).build()
    assert env.expert_names == ("alpaca-native @ A40", "koala-7B-HF @ A40")
    assert float(params.workload.content.limits.values_s[0]) == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "paper-9"}, "preset 'paper-9' is unknown"),
        ({"trace_part": "third"}, "trace_part is 'third', must be one of all, first, second"),
        ({"engine": "tgi"}, "engine is 'tgi', must be one of vllm, vllm-sync"),
        ({"trace": "t.csv", "trace_format": "parquet"}, "trace_format is 'parquet', must be one of azure, burstgpt"),
        ({"trace": "t.csv", "trace_spread_s": -1.0}, "trace_spread_s is -1.0, must be above 0 and finite, in s"),
        ({"trace_lengths": True}, "trace_lengths is True, must be False without a trace"),
        ({"trace": "t.csv", "trace_sort": 1}, "trace_sort is 1, must be True or False"),
        ({"table_part": "half"}, "table_part is 'half', must be one of all, train, test"),
        ({"experts": ("alpaca-native",)}, "--experts=alpaca-native: give LLM@GPU"),
        ({"latency_limit_s": (0.0,)}, "latency_limit_s is 0.0, must be above 0"),
        ({"ttft_limit_s": (math.inf,)}, "ttft_limit_s is inf, must be above 0 and finite, in s"),
        ({"arrivals": "poisson", "trace": "t.csv"}, "--arrivals=poisson and --trace=t.csv are both given"),
        ({"predictor": "runs/p"}, "--predictor=runs/p: predicts for real prompts only"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        WorldConfig(**fields)
    assert message in str(raised.value)


@pytest.mark.parametrize("field", dataclasses.fields(WorldConfig), ids=lambda field: field.name)
def test_a_value_of_another_type_is_refused_by_the_name_of_its_field(field: dataclasses.Field) -> None:
    wrong = [None] if field.default is not None else []
    for value in [*wrong, {}, object(), ("paper-3", 1), b"x", "x" if "str" not in field.type else 1.5]:
        with pytest.raises(InputError) as raised:
            WorldConfig(**{field.name: value})
        assert str(raised.value).startswith(f"{field.name} is {value!r}, must")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": "alpaca-native@A40"}, "experts is 'alpaca-native@A40', must be a tuple, each a string or None"),
        ({"latency_limit_s": "x"}, "latency_limit_s is 'x', must be a tuple, each a number or None"),
        ({"latency_limit_s": 0.03}, "latency_limit_s is 0.03, must be a tuple, each a number or None"),
        ({"arrivals": 5}, "arrivals is 5, must be a string or None"),
        ({"allow_drop": "no"}, "allow_drop is 'no', must be True or False or None"),
        ({"staleness_s": True}, "staleness_s is True, must be a number or None"),
    ],
)
def test_a_wrong_type_is_told_in_words(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        WorldConfig(**fields)
    assert str(raised.value) == message


def test_fields_of_a_file_are_checked() -> None:
    values = WorldConfig().to_dict()
    with pytest.raises(InputError, match=r"world\.colour is unknown"):
        WorldConfig.from_dict(values | {"colour": "red"})
    with pytest.raises(InputError, match="experts is 'alpaca-native@A40', must be a tuple"):
        WorldConfig.from_dict(values | {"experts": "alpaca-native@A40"})
    del values["trace"]
    with pytest.raises(InputError, match=r"world\.trace is missing"):
        WorldConfig.from_dict(values)
    with pytest.raises(InputError, match="world is 3, must be a table"):
        WorldConfig.from_dict(3)


def test_a_trace_is_read_as_it_says(tmp_path: pathlib.Path) -> None:
    lines = [json.dumps({"timestamp": t, "input_length": 1, "output_length": 1}) for t in (3000, 0, 0, 0)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    world = WorldConfig(trace=str(tmp_path / "t.jsonl"), trace_format="mooncake", trace_sort=True, trace_spread_s=3.0)
    assert (world.whole_trace.arrival_s // 3.0).tolist() == [0, 0, 0, 1]
    assert world.whole_trace.gaps_s.min() > 0
    with pytest.raises(InputError, match="--trace_sort"):
        dataclasses.replace(world, trace_sort=False).build()


def test_a_trace_may_bring_its_lengths(tmp_path: pathlib.Path) -> None:
    """Every request has the gap and the lengths of one row, in order, whatever expert would answer."""
    rng = np.random.default_rng(0)
    arrival_s, lengths = np.cumsum(rng.exponential(0.1, 40)), rng.integers(1, 200, (40, 2))
    rows = [f"{time},{prompt},{output}" for time, (prompt, output) in zip(arrival_s, lengths.tolist(), strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]))
    world = WorldConfig(trace=str(tmp_path / "t.csv"), trace_lengths=True)
    _, params = dataclasses.replace(world, experts=("alpaca-native@A40", "koala-7B-HF@A40")).build()
    gaps_s, requests = sample_requests(params.workload, jax.random.key(3), 100)
    gap = np.diff(arrival_s) / np.diff(arrival_s).mean()
    row = 1 + np.argmin(np.abs(np.asarray(gaps_s)[:, None] * float(params.workload.arrivals.rate_per_s) - gap), 1)
    assert np.all(np.diff(row) % 39 == 1)
    np.testing.assert_array_equal(requests.prompt_tokens, lengths[row, 0])
    np.testing.assert_array_equal(requests.output_tokens, np.repeat(lengths[row, 1:], 2, 1))
    correlation = np.corrcoef(np.log(requests.predicted_tokens[:, 0]), np.log(lengths[row, 1]))[0, 1]
    assert 0.2 < correlation < 0.9  # predictions are about these lengths, and not exact
    (tmp_path / "t.csv").write_text("\n".join(["arrival_s", *map(str, arrival_s)]))
    with pytest.raises(InputError, match="has arrivals only, must have the lengths"):
        world.build()


def clients_file(folder: pathlib.Path, first_per_s: float = 2.0) -> pathlib.Path:
    """A file of two clients over two hours."""
    rates = np.ones((2, 12))
    rates[0, :6] = first_per_s
    np.savez(folder / "clients.npz", rate_per_s=rates, cv=np.full((2, 12), 1.5), family=np.array([[1] * 12, [2] * 12]))
    return folder / "clients.npz"


@pytest.mark.slow
def test_sessions_are_lifted_where_a_trace_has_whole_prompts(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("arrival_s,prompt_tokens,output_tokens\n0,9,9\n1,9,9\n2,9,9\n3,9,9\n")
    turns = WorldConfig("edge-2026")
    assert turns.has_preset_fleet and turns.build()[0].spec.sessions == 128
    for lifted in (
        WorldConfig("edge-2026", sessions="none"),
        WorldConfig("edge-2026", trace=str(log), trace_lengths=True),
    ):
        env, params = lifted.build()
        assert env.spec.sessions == 0 and params.workload.sessions is None
        assert not lifted.has_preset_fleet
    assert WorldConfig("edge-2026", sessions="8:2:900").build()[1].workload.sessions.max_prompt_tokens == 900
    with pytest.raises(InputError, match="--sessions=8:2:900 and --trace_lengths are both given"):
        WorldConfig("edge-2026", sessions="8:2:900", trace=str(log), trace_lengths=True)
    with pytest.raises(InputError, match="sessions '8:2' must be OPEN:TURNS:TOKENS"):
        WorldConfig(sessions="8:2")


def test_clients_are_a_law_with_a_file(tmp_path: pathlib.Path) -> None:
    path = clients_file(tmp_path)
    world = WorldConfig(arrivals=f"servegen:{path}:1")
    env, params = world.build()
    assert params.workload.arrivals.power.shape == (6, 2)
    gaps_s, _ = sample_requests(params.workload, jax.random.key(0), 30)
    assert 0.0 < float(np.mean(gaps_s)) < 1.0
    assert world.described() == {"preset": "paper-3", "arrivals": "servegen:clients.npz:1"}
    before = world.inputs()
    assert set(before) == {"arrivals_file"}
    clients_file(tmp_path, 3.0)
    assert world.inputs() != before
    assert recipe(world).randomise == ("load",) and recipe(WorldConfig()).randomise == ("load", "arrivals")
    assert world.for_training() == world
    domain = Domain(loads=(0.5, 1.4))
    sampled = sample_worlds(env, params, domain, jax.random.key(0), 3)
    assert len(np.unique(sampled.workload.arrivals.rate_per_s)) == 3
    with pytest.raises(InputError, match="of a type of their own"):
        sample_worlds(env, params, dataclasses.replace(domain, arrivals=("poisson",)), jax.random.key(0), 3)


@pytest.mark.slow
def test_clients_are_evaluated_and_trained_on(tmp_path: pathlib.Path) -> None:
    world = WorldConfig(arrivals=f"servegen:{clients_file(tmp_path)}")
    env, params = world.build()
    (run,) = evaluate(
        env, params, [make_router("shortest_queue", env, params)], scenarios(params, (0.5,), (1000,)), 60, warmup=0
    )
    assert 0.0 < run.metrics["qos"] <= 1.0
    agent = dataclasses.replace(recipe(world).agent, num_envs=2)
    training = TrainingConfig(agent, steps=1, randomise=("load",))
    built = training_run(world, training)
    assert np.shape(built.params.workload.arrivals.power) == (2, 12, 2)


def test_clients_of_a_fleet_file_lie_beside_it(tmp_path: pathlib.Path) -> None:
    path = clients_file(tmp_path)
    shipped = pathlib.Path(presets.__file__).with_name("fleets") / "paper-3.toml"
    law = '[workload]\narrivals = "servegen:clients.npz"\n'
    (tmp_path / "fleet.toml").write_text(shipped.read_text().replace("[workload]\n", law))
    world = WorldConfig(fleet=str(tmp_path / "fleet.toml"))
    assert world.arrivals_file == str(path) and set(world.inputs()) == {"fleet", "arrivals_file"}


def test_training_has_a_part_of_a_trace_and_of_a_table() -> None:
    measured = WorldConfig(trace="t.csv", quality_table="q.npz")
    training = measured.for_training()
    assert (training.trace_part, training.table_part) == ("first", "train")
    assert WorldConfig().for_training() == WorldConfig()
    asked = dataclasses.replace(measured, trace_part="second")
    assert asked.for_training().trace_part == "second"
