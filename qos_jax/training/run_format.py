"""The format of a run's config.json, and how configurations of earlier formats are read.

A field that did not exist yet gets the value that was in effect then. A renamed field is translated. An unknown field
is an error, as everywhere. Each new format adds a step to ``_UPGRADES`` and a small run to ``tests/data/formats``.

* 1: flags and a loose description of the world; ``agent`` at the top level, under the names of that time.
* 2: ``world`` is a ``WorldConfig`` and ``training`` a ``TrainingConfig``, which holds the agent.
* 3: the token budget is the expert's, and no longer in ``spec``; the world names the engine of its experts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from qos_jax.agent import configs
from qos_jax.errors import InputError
from qos_jax.io.text_files import shown
from qos_jax.training.config import TrainingConfig
from qos_jax.workload.trace_files import read_trace
from qos_jax.worlds.config import WorldConfig
from qos_jax.worlds.presets import FURTHER_LIMITS

FORMAT = 3
FIELDS: dict[str, Any] = {"spec": dict, "world": (dict, type(None)), "training": dict}
"""What every config.json has; ``world`` is null for a run in an environment of the user's own."""

_BEFORE_THE_FIELD: dict[str, dict[str, Any]] = {
    "agent": {"shards": 1},
    "network": {"most_rate": None, "with_rates": False},
    "hyper": {"most_harm": 10.0},
    "spec": {"observe": "engine", "service_limits": False, "sessions": 0, "failures": False, "shared_cards": False},
    "world": {
        "fleet": None,
        "trace_format": None,
        "trace_sort": False,
        "trace_lengths": False,
        "engine": "vllm-sync",
        **{name: None for name in FURTHER_LIMITS},
        "observe": None,
        "scrape_s": None,
        "sessions": None,
        "failures": None,
    },
}
"""Values in effect before a field existed: of the agent in format 1, of spec and world until now."""

_LATER: dict[str, Any] = {
    "copies": 1,
    "network": {"value": False, "later_prompts": False, "with_preferences": False, "with_sessions": False},
    "hyper": {
        "empty_prob": 0.0,
        "discount_s": 1e9,
        "trace_decay": 1.0,
        "opportunity_cost": 1.0,
        "joint": 0.0,
        "weights": {"score": 1.0},
    },
}
"""Values of the agent's fields that early runs of format 3 lack: of targets ``returns``, preferences and sessions."""


def upgraded(config: Any, file: str) -> dict[str, Any]:
    """Returns a configuration in the current format.

    Args:
      config: what a config.json of any format holds.
      file: its path, for messages.

    Raises:
      InputError: the format is unknown, or a field is missing or of another kind.
    """
    version = config.get("format") if isinstance(config, dict) else None
    if not isinstance(version, int) or (version != FORMAT and version not in _UPGRADES):
        known = ", ".join(map(str, [*_UPGRADES, FORMAT]))
        raise InputError(f"{file}: format is {version!r}, must be one of {known}")
    _check_kinds(config, {"spec": dict}, file)
    while config["format"] != FORMAT:
        try:
            config = _UPGRADES[config["format"]](config)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file}: format {config['format']}: field {error} is missing or of another kind"
            ) from error
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
    _check_kinds(config, FIELDS, file)
    world = config["world"]
    return config | {
        "spec": _BEFORE_THE_FIELD["spec"] | config["spec"],
        "training": upgraded_training(config["training"]),
        "world": world if world is None else _BEFORE_THE_FIELD["world"] | _spread_before(world) | world,
    }


def upgraded_training(training: dict[str, Any]) -> dict[str, Any]:
    """Returns what a run of the current format was trained for, with the fields that came later."""
    return {"keep": "last"} | training | {"agent": _with_later_fields(training.get("agent"), _LATER)}


def _check_kinds(config: dict[str, Any], fields: dict[str, Any], file: str) -> None:
    for field, kind in fields.items():
        if field not in config or not isinstance(config[field], kind):
            found = f"is {shown(config[field])}" if field in config else "is missing"
            raise InputError(f"{file}: {field} {found}, must be a table of fields")


def _with_later_fields(table: Any, later: dict[str, Any]) -> Any:
    """Adds the fields that a table and those in it lack; what is no table is left for its reader to refuse."""
    if not isinstance(table, dict):
        return table
    fields = {name: value for name, value in later.items() if not isinstance(value, dict)}
    tables = {name: _with_later_fields(table[name], later[name]) for name in later.keys() - fields if name in table}
    return fields | table | tables


def _spread_before(world: dict[str, Any]) -> dict[str, Any]:
    """Times of Mooncake were spread over steps of 3 s wherever all of them lay on such steps."""
    if "trace_spread_s" in world or not os.path.isfile(str(world.get("trace"))):
        return {"trace_spread_s": None}
    try:
        read_trace(world["trace"], "mooncake", spread_s=3.0)
    except InputError:  # of another format, or finer
        return {"trace_spread_s": None}
    return {"trace_spread_s": 3.0}


def _from_1(config: dict[str, Any]) -> dict[str, Any]:
    world = config.get("world", {})
    known = {name: world[name] for name in ("preset", "arrivals", "staleness_s", "allow_drop") if name in world}
    training = {
        "agent": _agent_from_1(config["agent"]),
        "steps": config.get("steps", 1),
        "runs": config.get("runs", [{"seed": seed} for seed in config["seeds"]]),
        "loads": config.get("loads", []),
        "save_replay": config["with_replay"],
    }
    described = TrainingConfig().to_dict() | training
    kept = {name: config[name] for name in ("spec", "experts", "command", "versions", "git") if name in config}
    known["engine"] = _BEFORE_THE_FIELD["world"]["engine"]
    return kept | {"format": 2, "began_as": 1, "world": WorldConfig(**known).to_dict(), "training": described}


def _agent_from_1(agent: dict[str, Any]) -> dict[str, Any]:
    agent = _BEFORE_THE_FIELD["agent"] | agent
    agent["network"] = _BEFORE_THE_FIELD["network"] | agent["network"]
    agent["hyper"] = _BEFORE_THE_FIELD["hyper"] | agent["hyper"]
    for table in (agent, agent["network"], agent["hyper"]):
        for old, new in configs.OLD_FIELDS.items():
            if old in table:
                table[new] = table.pop(old)
    return agent


def _from_2(config: dict[str, Any]) -> dict[str, Any]:
    spec = dict(config["spec"])
    spec["engine"] = {name: value for name, value in spec["engine"].items() if name != "token_budget"}
    return config | {"format": 3, "spec": spec}


_UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1, 2: _from_2}
