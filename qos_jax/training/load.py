"""The router that a training run has come to, rebuilt from its folder without any code of the user's."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import flax.errors
import jax
from jax import Array

from qos_jax.agent import configs
from qos_jax.agent.learner import Learner, make_learner
from qos_jax.errors import InputError
from qos_jax.routers.base import Memory, Router
from qos_jax.sim.engine import EngineSpec
from qos_jax.sim.env import Environment
from qos_jax.sim.types import Observation
from qos_jax.sim.world import WorldSpec
from qos_jax.training.run_folder import CONFIG, RunFolder
from qos_jax.worlds import presets


def load_router(
    path: str | os.PathLike[str], *, seed: int | None = None, run: int | None = None, name: str | None = None
) -> Router:
    """Returns the router in the newest checkpoint of a training run.

    It runs on any device, and for fleets of any size if its network does.

    Args:
      path: folder of the run.
      seed: of a run of several seeds, which one; the first by default.
      run: instead of the seed, which of ``config["runs"]``, where a seed was trained more than once with other numbers.
      name: of the router; that of the folder by default.

    Returns:
      The router; its ``params`` are the weights.

    Raises:
      InputError: the folder holds no run that this version can read, or none of this seed or number.
    """
    folder = RunFolder.reopen(path)
    seeds = folder.config["seeds"]
    if run is not None and run not in range(len(seeds)):
        raise InputError(f"{folder.path / CONFIG}: run is {run}, must be from 0 to {len(seeds) - 1}")
    if seed is not None and seed not in seeds:
        raise InputError(f"{folder.path / CONFIG}: seed is {seed}, must be one of {', '.join(map(str, seeds))}")
    if folder.latest is None:
        raise InputError(f"{folder.path}: holds no checkpoint yet")
    learner = _learner(folder)
    like = _weights_like(learner)
    if len(seeds) > 1:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(seeds), *x.shape), x.dtype), like)
    weights = folder.restore_weights(folder.latest, like)
    if len(seeds) > 1:
        which = run if run is not None else 0 if seed is None else seeds.index(seed)
        weights = jax.tree.map(lambda x: x[which], weights)
    return _for_its_fleets(learner.router(weights, name or folder.path.name), learner.env.spec.num_experts)


def _learner(folder: RunFolder) -> Learner:
    file, spec = folder.path / CONFIG, folder.config["spec"]
    try:
        env = Environment(WorldSpec(**spec | {"engine": EngineSpec(**spec["engine"])}))
    except (TypeError, KeyError) as error:
        raise InputError(f"{file}: spec is {spec!r}, which is no world: {error}") from error
    try:
        return make_learner(env, configs.from_dict(folder.config["agent"]))
    except InputError as error:
        raise InputError(f"{file}: agent: {error}") from error


def _weights_like(learner: Learner) -> Any:
    """Returns the shapes of the weights; they depend on the number of experts at most, so any such world will do."""
    _, params = presets.make("paper-3", experts=presets.PAPER_3[:1] * learner.env.spec.num_experts, rate_per_s=1.0)

    def weights(key: Array) -> Any:
        return learner.weights(learner.init(key, params, learner.config.hyper))

    return jax.eval_shape(weights, jax.random.key(0))


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
