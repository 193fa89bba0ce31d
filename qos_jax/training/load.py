"""The router of a training run, rebuilt from its folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import flax.errors
import jax
from jax import Array

from qos_jax.agent.learner import Learner, make_learner
from qos_jax.agent.preferences import checked_preferences
from qos_jax.errors import InputError
from qos_jax.io import dataclass_json
from qos_jax.io.text_files import number_or_nan, shown
from qos_jax.routers.base import Memory, Router
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.env import Environment
from qos_jax.sim.types import Observation
from qos_jax.sim.world import WorldSpec, example_observation
from qos_jax.training.run_config import CONFIG
from qos_jax.training.run_folder import RunFolder
from qos_jax.training.shipped import is_shipped, shipped_folder, shipped_label

_MAX_SIZE = 2**24  # of anything in a world's spec


def load_router(
    path: str | os.PathLike[str],
    *,
    seed: int | None = None,
    run: int | None = None,
    name: str | None = None,
    preferences: Mapping[str, Any] | None = None,
    margin: Any = 0.0,
) -> Router:
    """Returns the router in the newest checkpoint of a training run.

    It runs on any device, and for fleets of any size if its network does.

    Args:
      path: folder of the run, or ``pretrained:NAME`` for a router that is part of the package.
      seed: of a run of several seeds, which one; the first by default.
      run: instead of the seed, which of ``training.runs`` in config.json, where a seed was trained more than once.
      name: of the router; that of the folder by default.
      preferences: weights by their name in ``Preferences``, of an agent that was trained with ``preferences`` among
        what is randomised; those that are not given are the agent's.
      margin: QoS from -1 to 1 by which the value of a placement must exceed that of a drop. A router for any fleet that
        is too eager, or too shy, on a certain one is corrected by it.

    Returns:
      The router; its ``params`` are the weights. If it was trained with preferences, its memory is a ``Preferences``.

    Raises:
      InputError: the folder holds no run that this version can read, or none of this seed or number, or a preference
        or the margin is not legal.
    """
    if is_shipped(path):
        path, name = shipped_folder(str(path)), name or shipped_label(str(path))
    folder = RunFolder.reopen(path)
    seeds = folder.training.seeds
    if run is not None and run not in range(len(seeds)):
        raise InputError(f"{folder.path / CONFIG}: run is {run}, must be from 0 to {len(seeds) - 1}")
    if seed is not None and seed not in seeds:
        raise InputError(f"{folder.path / CONFIG}: seed is {seed}, must be one of {', '.join(map(str, seeds))}")
    learner = learner_of(folder)
    dial = None
    if preferences is not None:
        dial = checked_preferences(learner.config, preferences, f"{folder.path / CONFIG}: preferences")
    value, highest = number_or_nan(margin), 0 if learner.config.network.actor else 1
    if not -highest <= value <= highest:
        legal = "a number from -1 to 1" if highest else "0 for an agent with a policy"
        raise InputError(f"{folder.path / CONFIG}: margin is {shown(margin)}, must be {legal}")
    weights = weights_of(folder, learner, run if run is not None else 0 if seed is None else seeds.index(seed))
    router = learner.router(weights, name or folder.path.name, dial, value)
    return _for_its_fleets(router, learner.env.spec.num_experts)


def weights_of(folder: RunFolder, learner: Learner, which: int) -> Any:
    """Returns the newest weights of one of the runs that trained side by side in a folder.

    Raises:
      InputError: there are none yet, or they cannot be read.
    """
    like, runs, latest = _weights_like(learner), len(folder.training.seeds), folder.latest
    if latest is None:
        raise InputError(f"{folder.path}: holds no checkpoint yet")
    if runs == 1:
        return folder.restore_weights(latest, like)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((runs, *x.shape), x.dtype), like)
    return jax.tree.map(lambda x: x[which], folder.restore_weights(latest, like))


def learner_of(folder: RunFolder) -> Learner:
    """Returns the learner of a run, without its weights.

    Raises:
      InputError: config.json does not describe one.
    """
    values = folder.config["spec"]
    try:
        spec = _spec(values)
    except InputError as error:
        raise InputError(f"{folder.path / CONFIG}: spec is {values!r}, which is no world: {error}") from error
    return make_learner(Environment(spec), folder.training.agent)


def _spec(values: dict[str, Any]) -> WorldSpec:
    default = WorldSpec(1, EngineSpec(1))
    spec = dataclass_json.from_dict(default, dataclass_json.to_dict(default) | values, "spec")
    sizes = {"num_experts": spec.num_experts, **dataclasses.asdict(spec.engine)}
    for name, least, size in [("history", 0, spec.history), *((name, 1, size) for name, size in sizes.items())]:
        if not least <= size <= _MAX_SIZE:
            raise InputError(f"{name} is {size}, must be at least {least} and at most {_MAX_SIZE}")
    return spec


def _weights_like(learner: Learner) -> Any:
    """Returns the shapes of the weights, from the shapes of an observation."""
    obs = jax.eval_shape(lambda: example_observation(learner.env.spec))

    def weights(key: Array, obs: Observation) -> Any:
        return learner.network.init(key, learner.features(obs))

    return jax.eval_shape(weights, jax.random.key(0), obs)


def _for_its_fleets(router: Router, trained_on: int) -> Router:
    """Lets a network of fixed size say so when it is given a fleet of another size."""

    def act(key: Array, obs: Observation, memory: Memory) -> tuple[Array, Memory]:
        num_experts = obs.action_mask.shape[-1] - 1
        try:
            return router.act(key, obs, memory)
        except (flax.errors.FlaxError, TypeError, ValueError) as error:
            if num_experts == trained_on:
                raise
            raise InputError(
                f"router {router.name!r} has a network for {trained_on} experts only, but the fleet has {num_experts}"
            ) from error

    return dataclasses.replace(router, act=act)
