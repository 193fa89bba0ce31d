"""From ``--routers`` to routers."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from qos_jax.errors import InputError
from qos_jax.io.text_files import parse_number
from qos_jax.programs import choices
from qos_jax.routers import Router, make_router, router_names
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.training.load import load_router
from qos_jax.training.run_config import CONFIG
from qos_jax.training.run_folder import RunFolder
from qos_jax.training.shipped import is_shipped, shipped_folder, shipped_label
from qos_jax.training.validation import FIRST_HELD_OUT_SEED

_SETTINGS = re.compile(r":(?=\w+=)")  # before each setting of FOLDER:energy=2:margin=0.05
_MARGIN = "margin"  # the setting that is no preference


class _Run(NamedTuple):
    """What names a training run."""

    folder: pathlib.Path
    seed: int | None
    preferences: dict[str, Any] | None  # None: the agent's
    margin: Any  # QoS, see ``load_router``


def routers_named(texts: Sequence[str], env: Environment, params: EnvParams) -> list[Router]:
    """Returns the routers that the flag names, each once.

    Args:
      texts: values of the flag.
      env: the world that they are made for.
      params: its parameters.

    Raises:
      InputError: a router is unknown, there is none, or two have one name.
    """
    groups = {"all": router_names(env), "main": choices.MAIN_ROUTERS, "arena": choices.ARENA_ROUTERS}
    names = list(dict.fromkeys(name for text in texts for name in groups.get(text, [text])))
    if not names:
        raise InputError(f"--routers= names none; choose all, main, arena, or from {', '.join(groups['all'])}")
    runs = {name: run for name in names if (run := _run_of(name))}
    labels = {name: _label(name, run) for name, run in runs.items()}
    routers = []
    for name in names:
        if name not in runs:
            routers.append(make_router(name, env, params))
            continue
        run, label = runs[name], labels[name]
        clashes = label in names or list(labels.values()).count(label) > 1
        settings = {"preferences": run.preferences, "margin": run.margin}
        routers.append(load_router(run.folder, seed=run.seed, name=name if clashes else label, **settings))
    known = [router.name for router in routers]
    if twice := next((name for name in known if known.count(name) > 1), None):
        raise InputError(f"--routers: two routers are named {twice!r}: their results would be mixed; rename one")
    return routers


def run_folders(texts: Sequence[str]) -> list[pathlib.Path]:
    """Returns the folders of training runs that the flag names."""
    return list(dict.fromkeys(run.folder for name in texts if (run := _run_of(name))))


def check_held_out(texts: Sequence[str], first_seed: int, seeds: Sequence[int]) -> None:
    """Checks that no training run is evaluated on the seeds that it was trained with.

    Args:
      texts: values of the flag.
      first_seed: value of ``--first_seed``, for the message.
      seeds: of the evaluation.

    Raises:
      InputError: one is.
    """
    for folder in run_folders(texts):
        shared = sorted(set(seeds).intersection(RunFolder.reopen(folder).training.seeds))
        if shared:
            raise InputError(
                f"--first_seed={first_seed}: {folder} was trained with seed {', '.join(map(str, shared))}: "
                f"give --first_seed={FIRST_HELD_OUT_SEED} or above, which no run is trained with"
            )


def _label(name: str, run: _Run) -> str:
    """Returns the name of a run's router in results, with the settings that were given."""
    name, *settings = _SETTINGS.split(name)
    return ":".join([shipped_label(name) if is_shipped(name) else run.folder.name, *settings])


def _run_of(name: str) -> _Run | None:
    """Returns what FOLDER or FOLDER@SEED names, with :NAME=NUMBER behind; None where it names no training run."""
    name, *settings = _SETTINGS.split(name)
    numbers = dict(_setting(text) for text in settings)
    margin = numbers.pop(_MARGIN, 0.0)
    preferences = numbers or None
    if is_shipped(name):
        return _Run(shipped_folder(name), None, preferences, margin)
    before, at, after = name.rpartition("@")
    folder, seed = (before, int(after)) if at and after.isdecimal() else (name, None)
    is_run = os.sep in folder or (pathlib.Path(folder) / CONFIG).exists()
    return _Run(pathlib.Path(folder), seed, preferences, margin) if is_run else None


def _setting(text: str) -> tuple[str, Any]:
    """Returns the name and the number of NAME=NUMBER; a text, which no setting may be, where it is none."""
    name, _, value = text.partition("=")
    try:
        return name, parse_number(value)
    except ValueError:
        return name, value
