"""From ``--routers`` to routers."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from qos_jax.errors import InputError
from qos_jax.programs import choices
from qos_jax.routers import Router, make_router, router_names
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.training.held_out import FIRST_HELD_OUT_SEED
from qos_jax.training.load import load_router
from qos_jax.training.run_folder import CONFIG, RunFolder
from qos_jax.training.shipped import is_shipped, shipped_folder, shipped_label


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
    labels = {name: shipped_label(name) if is_shipped(name) else folder.name for name, (folder, _) in runs.items()}
    routers = []
    for name in names:
        if name not in runs:
            routers.append(make_router(name, env, params))
            continue
        (folder, seed), label = runs[name], labels[name]
        clashes = label in names or list(labels.values()).count(label) > 1
        routers.append(load_router(folder, seed=seed, name=name if clashes else label))
    known = [router.name for router in routers]
    if twice := next((name for name in known if known.count(name) > 1), None):
        raise InputError(f"--routers: two routers are named {twice!r}: their results would be mixed; rename one")
    return routers


def run_folders(texts: Sequence[str]) -> list[pathlib.Path]:
    """Returns the folders of training runs that the flag names."""
    return [run[0] for name in texts if (run := _run_of(name))]


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


def _run_of(name: str) -> tuple[pathlib.Path, int | None] | None:
    """Returns the folder and the seed that FOLDER or FOLDER@SEED names, None where it names no training run."""
    if is_shipped(name):
        return shipped_folder(name), None
    before, at, after = name.rpartition("@")
    folder, seed = (before, int(after)) if at and after.isdecimal() else (name, None)
    is_run = os.sep in folder or (pathlib.Path(folder) / CONFIG).exists()
    return (pathlib.Path(folder), seed) if is_run else None
