"""The config.json of a training run: what fixes the run, and which versions had a part in it.

It holds the world, what is trained in it, and with which versions; the network is rebuilt from it. ``resumed`` has the
versions of each later part of the run, and the steps at which that began. See ``run_format`` for earlier formats.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from qos_jax.agent.learner import Learner
from qos_jax.errors import InputError
from qos_jax.io.files import parse_json, path_of
from qos_jax.io.provenance import git_hash, versions
from qos_jax.training.config import TrainingConfig
from qos_jax.training.run_format import FORMAT, upgraded
from qos_jax.worlds.config import WorldConfig

CONFIG = "config.json"

_OF_A_PART = ("versions", "git")  # fields that may differ between the parts of a run
_RANDOM = ("jax_default_prng_impl", "jax_threefry_partitionable")  # settings that numbers drawn depend on


def make_config(
    learner: Learner,
    training: TrainingConfig,
    world: WorldConfig | None = None,
    *,
    command: str | None = None,
    flags: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Returns what config.json holds, as plain values.

    Args:
      learner: its environment and its configuration, which takes the place of ``training.agent``.
      training: what is trained.
      world: where; None for an environment of the user's own, which then has to be given again to resume.
      command: that began the run.
      flags: of that command that fix the run; None where it was begun from Python.
    """
    resolved = dataclasses.replace(training, agent=learner.config)
    config = {
        "format": FORMAT,
        "spec": dataclasses.asdict(learner.env.spec),
        "experts": learner.env.expert_names,
        "world": None if world is None else world.to_dict(),
        "training": resolved.to_dict(),
        "command": command,
        "flags": None if flags is None else list(flags),
        "versions": versions(),
        "git": git_hash(),
        "random": {name: getattr(jax.config, name) for name in _RANDOM},
    }
    return dict(json.loads(json.dumps(config)))


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the config.json of a run, of any format; see ``run_format``.

    Raises:
      InputError: it is not there, or not usable.
    """
    file = path_of(path) / CONFIG
    try:
        config = parse_json(file.read_text(encoding="utf-8", errors="replace"), str(file))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}; give the folder of a training run") from error
    return upgraded(config, str(file))


def check_same(saved: Mapping[str, Any], asked: Mapping[str, Any], file: str) -> None:
    """Compares what fixes a run with the configuration that it shall go on with; only ``steps`` may be larger.

    Args:
      saved: the configuration of the run.
      asked: what ``make_config`` returns now.
      file: of the run, for messages.

    Raises:
      InputError: they differ, or the run was written in an earlier format.
    """
    if saved.get("began_as"):
        raise InputError(
            f"{file}: was written in format {saved['began_as']}: its router can be loaded, but training cannot go on"
        )
    for field in ("spec", "world", "random"):
        if field in saved and field in asked:  # earlier versions did not write all
            _check_equal(f"{file}: {field}", saved[field], asked[field])
    before, after = (dict(each["training"]) for each in (saved, asked))
    if after.pop("steps") < before["steps"]:
        raise InputError(
            f"{file}: training.steps is {before['steps']}, but fewer are asked for: a run can only be prolonged"
        )
    del before["steps"]
    _check_equal(f"{file}: training", before, after)


def with_part(saved: Mapping[str, Any], asked: Mapping[str, Any], begins: int, file: str) -> tuple[dict[str, Any], str]:
    """Returns the configuration of a run that goes on, and what has changed in versions since its last part.

    Args:
      saved: the configuration of the run.
      asked: what ``make_config`` returns now, with as many steps or more; see ``check_same``.
      begins: steps after which it goes on.
      file: of the run, for messages.

    Raises:
      InputError: the versions in ``saved`` are not what was written.
    """
    part = {name: asked[name] for name in _OF_A_PART}
    try:
        earlier = [each for each in saved.get("resumed", []) if each["steps"] < begins]
        changes = _changes((earlier or [saved])[-1], part)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file}: versions or resumed are not what was written: {error}") from error
    steps = asked["training"]["steps"]
    resumed = {"resumed": [*earlier, {"steps": begins, **part}]} if begins < steps else {}
    flags = {} if asked["flags"] is None else {"flags": asked["flags"]}
    return {**saved, **flags, **resumed, "training": {**saved["training"], "steps": steps}}, changes


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns what differs between two parts of a run, as far as both say it."""
    old, new = ({**each.get("versions", {}), "git": each.get("git")} for each in (before, now))
    return ", ".join(
        f"{name} {new[name]} (was {old[name]})"
        for name in new
        if None not in (old.get(name), new[name]) and old[name] != new[name]
    )


def _check_equal(name: str, saved: Any, asked: Any) -> None:
    if isinstance(saved, dict) and isinstance(asked, dict) and saved.keys() == asked.keys():
        for field in saved:
            _check_equal(f"{name}.{field}", saved[field], asked[field])
    elif saved != asked:
        raise InputError(f"{name} is {saved!r}, but {asked!r} is asked for: a run goes on as it began")
