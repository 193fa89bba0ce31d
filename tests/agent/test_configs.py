"""Configurations of agents survive JSON, and errors name the wrong field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qos_jax import InputError
from qos_jax.agent.configs import AGENTS, OLD_NAMES, AgentConfig, from_dict, named, to_dict
from qos_jax.agent.overrides import overridden


@pytest.mark.parametrize("name", AGENTS)
def test_a_configuration_survives_json(name: str) -> None:
    config = named(name)
    rebuilt = from_dict(json.loads(json.dumps(to_dict(config), allow_nan=False)))
    assert rebuilt == config
    assert hash(rebuilt.network) == hash(config.network)


def test_named_agents_differ() -> None:
    assert len({json.dumps(to_dict(config)) for config in AGENTS.values()}) == len(AGENTS)


def test_an_unknown_agent_is_refused() -> None:
    with pytest.raises(InputError, match="agent 'nobody' is unknown; choose from mvr"):
        named("nobody")


@pytest.mark.parametrize(
    "path, value, says",
    [
        ("num_envs", 0, "num_envs is 0"),
        ("num_envs", 8.0, "agent.num_envs is 8.0"),
        ("num_envs", True, "agent.num_envs is True"),
        ("batch_size", -1, "batch_size is -1"),
        ("capacity", 100, "capacity is 100, must be a multiple of the 128 rows"),
        ("targets", "luck", "targets 'luck' are not known"),
        ("network", None, "agent.network is None"),
        ("network.encoder", "gcn", "encoder 'gcn' is not known"),
        ("network.encoder", "flat", "readout is 'pointer'"),
        ("network.readout", "arrived", "residual is True"),
        ("network.readout", "sum", "readout is 'sum'"),
        ("network.with_impact", False, "residual is True"),
        ("network.actor", 1, "agent.network.actor is 1"),
        ("network.slots", 0, "slots is 0"),
        ("network.slots", "all", "agent.network.slots is 'all'"),
        ("network.slots", 3.5, "slots is 3.5"),
        ("network.rate_clip_per_s", 0, "rate_clip_per_s is 0"),
        ("network.rate_clip_per_s", float("inf"), "rate_clip_per_s is inf"),
        ("network.rate_clip_per_s", "all", "agent.network.rate_clip_per_s is 'all'"),
        ("network.hidden", 64, "agent.network.hidden is 64"),
        ("network.hidden", [64, "x"], "hidden is"),
        ("network.hidden", [0], "hidden is"),
        ("network.han.heads", 3, "features is 32, must be a multiple of heads, 3"),
        ("network.han.layers", 0, "layers is 0"),
        ("hyper.gamma", "high", "agent.hyper.gamma is 'high'"),
        ("hyper.alpha", None, "agent.hyper.alpha is None"),
        ("hyper.reset_prob", False, "agent.hyper.reset_prob is False"),
        ("hyper.weights.drop", [1.0], "agent.hyper.weights.drop is"),
        ("hyper.weights.luck", 1.0, "agent.hyper.weights.luck is unknown"),
        ("colour", "red", "agent.colour is unknown"),
    ],
)
def test_a_bad_field_is_named(path: str, value: Any, says: str) -> None:
    values = edited(to_dict(AgentConfig()), path, value)
    with pytest.raises(InputError, match=says.replace(".", r"\.")):
        from_dict(values)


@pytest.mark.parametrize("path", ["updates", "network.han", "hyper.weights.energy"])
def test_a_missing_field_is_named(path: str) -> None:
    *folders, name = path.split(".")
    values = table = to_dict(AgentConfig())
    for folder in folders:
        table = table[folder]
    del table[name]
    with pytest.raises(InputError, match=rf"agent\.{path} is missing"):
        from_dict(values)


def test_integers_are_accepted_as_real_numbers() -> None:
    values = edited(to_dict(AgentConfig()), "hyper.weights.potential", 1)
    assert from_dict(values).hyper.weights.potential == 1.0


def edited(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    first, *rest = path.split(".", 1)
    return values | {first: edited(values[first], rest[0], value) if rest else value}


def test_names_of_earlier_releases_are_accepted() -> None:
    for old, new in OLD_NAMES.items():
        assert named(old) is named(new)
    old = overridden(AGENTS["mvr"], {"most_harm": "0.5", "network.most_rate": "3", "twins": "2", "prefill": "7"})
    new = overridden(AGENTS["mvr"], {"max_externality": "0.5", "rate_clip_per_s": "3", "probes": "2", "warm_up": "7"})
    assert old == new
    assert (new.hyper.max_externality, new.network.rate_clip_per_s, new.probes, new.warm_up) == (0.5, 3.0, 2, 7)
