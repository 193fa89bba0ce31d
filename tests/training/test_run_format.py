"""Runs of earlier formats load for ever: each format has left a small run in tests/data/formats."""

from __future__ import annotations

import copy
import json
import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qos_jax
from qos_jax import Environment, EnvParams, InputError, Observation
from qos_jax.agent import AGENTS, configs
from qos_jax.agent.networks import heads_of
from qos_jax.training.config import TrainingConfig
from qos_jax.training.load import learner_of, load_router
from qos_jax.training.run_config import CONFIG, check_same, read_config
from qos_jax.training.run_folder import RunFolder
from qos_jax.training.run_format import FORMAT, upgraded

FORMATS = pathlib.Path(__file__).parents[1] / "data" / "formats"
RUNS = sorted(FORMATS.glob("run-*"))


def test_every_format_has_left_a_run() -> None:
    assert {path.name for path in RUNS} == {f"run-{number}" for number in range(1, FORMAT + 1)}
    assert all(sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) < 200_000 for run in RUNS)


@partial(jax.jit, static_argnums=0)
def repeated(env: Environment, params: EnvParams, reset_key: int, first_step_key: int, actions: jax.Array) -> Any:
    """Returns the observation at each decision."""

    def turn(now: Any, x: Any) -> Any:
        (obs, state), (t, action) = now, x
        return env.step(jax.random.key(first_step_key + t), state, action, params)[:2], obs

    start = env.reset(jax.random.key(reset_key), params)
    return jax.lax.scan(turn, start, (jnp.arange(len(actions)), actions))[1]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_its_router_decides_as_it_did(path: pathlib.Path) -> None:
    """On the observations that it met then; where two actions are worth the same, rounding may choose the other."""
    then = json.loads((path / "decisions.json").read_text())
    router, learner = load_router(path), learner_of(RunFolder.reopen(path))
    actions = np.array(then["actions"])
    world = qos_jax.make(then["preset"], load=then["load"])
    met = repeated(*world, then["reset_key"], then["first_step_key"], actions)

    @jax.jit
    @jax.vmap
    def decided(t: jax.Array, obs: Observation) -> tuple[jax.Array, jax.Array]:
        q = heads_of(learner.network, router.params, learner.features(obs)).q
        return q, router.act(jax.random.key(t), obs, ())[0]

    q, chosen = map(np.asarray, decided(np.arange(len(actions)), met))
    np.testing.assert_allclose(q[19::20], then["q_every_20"], atol=2e-3)
    best = np.where(met.action_mask, q.mean(1), -np.inf)
    clear = np.diff(np.sort(best))[:, -1] > 2e-3
    np.testing.assert_array_equal(chosen[clear], actions[clear])


def config_of(number: int) -> dict[str, Any]:
    return json.loads((FORMATS / f"run-{number}" / "config.json").read_text())


def edited(config: dict[str, Any], path: str, value: Any = None, *, remove: bool = False) -> dict[str, Any]:
    config = copy.deepcopy(config)
    *tables, name = path.split(".")
    table = config
    for each in tables:
        table = table[each]
    if remove:
        del table[name]
    else:
        table[name] = value
    return config


@pytest.mark.parametrize(
    ("field", "now", "value"),
    [
        ("agent.network.most_rate", "network.rate_clip_per_s", None),
        ("agent.network.with_rates", "network.with_rates", False),
        ("agent.hyper.most_harm", "hyper.max_externality", 10.0),
        ("agent.shards", "shards", 1),
    ],
)
def test_a_field_that_did_not_exist_yet_has_the_value_of_that_time(field: str, now: str, value: Any) -> None:
    agent = upgraded(edited(config_of(1), field, remove=True), "config.json")["training"]["agent"]
    *tables, name = now.split(".")
    for each in tables:
        agent = agent[each]
    assert agent[name] == value


@pytest.mark.parametrize(("stamps", "spread_s"), [((0, 0, 3000), 3.0), ((0, 1234, 3000), None)])
def test_a_run_on_mooncake_keeps_the_spread_of_its_times(tmp_path: pathlib.Path, stamps: Any, spread_s: Any) -> None:
    lines = [json.dumps({"timestamp": t, "input_length": 1, "output_length": 1}) for t in stamps]
    (tmp_path / "trace.jsonl").write_text("\n".join(lines))
    config = edited(config_of(2), "world.trace", str(tmp_path / "trace.jsonl"))
    assert upgraded(config, "config.json")["world"]["trace_spread_s"] == spread_s
    asked = edited(config, "world.trace_spread_s", None)
    assert upgraded(asked, "config.json")["world"]["trace_spread_s"] is None


def test_the_world_of_a_run_before_traces_had_formats_is_read() -> None:
    world = upgraded(config_of(2), "config.json")["world"]
    assert (world["trace_format"], world["trace_sort"], world["trace_spread_s"]) == (None, False, None)


def test_runs_from_before_there_was_a_choice_have_their_last_weights() -> None:
    assert not TrainingConfig.from_dict(upgraded(config_of(3), "config.json")["training"]).keeps_best


@pytest.mark.parametrize("number", [1, 2])
def test_runs_from_before_there_were_engines_go_on_with_synchronous_scheduling(number: int) -> None:
    assert upgraded(config_of(number), "config.json")["world"]["engine"] == "vllm-sync"


def test_a_run_of_sac_from_before_lambda_returns_is_that_of_sac_td0() -> None:
    """The agent is stored by its fields, so its name may mean another agent now."""
    then = configs.to_dict(AGENTS["sac_td0"])
    del then["copies"], then["network"]["value"]
    for field in ("empty_prob", "discount_s", "trace_decay", "opportunity_cost", "joint"):
        del then["hyper"][field]
    config = edited(config_of(3), "training.agent", then)
    assert configs.from_dict(upgraded(config, "config.json")["training"]["agent"]) == AGENTS["sac_td0"]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_run_from_before_preferences_has_none(number: int) -> None:
    agent = upgraded(config_of(number), "config.json")["training"]["agent"]
    assert (agent["network"]["with_preferences"], agent["hyper"]["weights"]["score"]) == (False, 1.0)


def test_a_field_is_translated_and_an_unknown_one_refused() -> None:
    agent = upgraded(config_of(1), "config.json")["training"]["agent"]
    assert (agent["hyper"]["max_externality"], agent["targets"], agent["probes"]) == (0.35, "counterfactual", 1)
    with pytest.raises(InputError, match=r"config.json: .*agent.depth is unknown"):
        folder = RunFolder(FORMATS / "run-1", upgraded(edited(config_of(1), "agent.depth", 3), "config.json"))
        _ = folder.training
    with pytest.raises(InputError, match=r"config.json: format 1: field 'capacity' is missing|capacity is missing"):
        folder = RunFolder(FORMATS / "run-1", upgraded(edited(config_of(1), "agent.capacity", remove=True), "c.json"))
        _ = folder.training


@pytest.mark.parametrize(
    ("number", "field", "value", "message"),
    [
        (1, "spec", "x", "spec is 'x', must be a table of fields"),
        (2, "spec", "x", "spec is 'x', must be a table of fields"),
        (2, "spec", None, "spec is missing, must be a table of fields"),
        (3, "world", None, "world is missing, must be a table of fields"),
        (2, "training.agent.network", 5, "training.agent.network is 5, must be a table of fields"),
        (3, "training.agent.hyper", [], r"training.agent.hyper is \[\], must be a table of fields"),
        (3, "training.agent.network.rate_clip_per_s", 10**400, "rate_clip_per_s is 1000.* must be a number of 64 bits"),
        (3, "training.agent.network.hidden", [8, 10**400], r"hidden\[1\] is 1000.* must be a number of 64 bits"),
    ],
)
def test_a_table_that_is_none_or_missing_is_named(number: int, field: str, value: Any, message: str) -> None:
    config = edited(config_of(number), field, value, remove=value is None)
    with pytest.raises(InputError, match=f"config.json: .*{message}|config.json: {message}"):
        _ = RunFolder(FORMATS / f"run-{number}", upgraded(config, "config.json")).training


def test_a_run_of_an_earlier_format_does_not_go_on() -> None:
    folder = RunFolder.reopen(FORMATS / "run-1")
    with pytest.raises(
        InputError, match="was written in format 1: its router can be loaded, but training cannot go on"
    ):
        check_same(folder.config, read_config(FORMATS / "run-2"), CONFIG)
