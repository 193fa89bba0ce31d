"""Training in one call."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from qos_jax.agent import recipes
from qos_jax.agent.recipes import Recipe
from qos_jax.errors import InputError
from qos_jax.io.text_files import shown
from qos_jax.routers.base import Router
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.training.config import TrainingConfig, runs_of
from qos_jax.training.progress import Progress
from qos_jax.training.run import training_run
from qos_jax.training.run_config import CONFIG
from qos_jax.worlds.config import WorldConfig


@dataclasses.dataclass(frozen=True)
class Trained:
    """What ``train`` returns."""

    routers: list[Router]  # one for each seed
    metrics: dict[str, Any]  # the evaluation of the routers, ``steps``, ``compile_s`` and ``train_s``
    records: list[dict[str, Any]]  # of the whole run, see ``qos_jax.training.loop``
    finished: bool  # False: it was stopped, and the same call goes on with it

    @property
    def router(self) -> Router:
        """The router of the first seed."""
        return self.routers[0]


def train(
    world: str | WorldConfig | tuple[Environment, EnvParams],
    recipe: Recipe | None = None,
    *,
    steps: int | None = None,
    seeds: Sequence[int] = (0,),
    out: str | os.PathLike[str] | None = None,
    progress_fn: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    **settings: Any,
) -> Trained:
    """Trains a router, as ``qos-jax train`` does with the same recipe.

    Args:
      world: name of a preset, a world, or an environment and its parameters.
      recipe: what is trained; that of the world by default. An environment of one's own needs one.
      steps: requests routed in training, of each seed; the recipe's by default.
      seeds: of the runs, which train side by side; below 1000.
      out: folder of the run. A run that is in it goes on, and is prolonged if ``steps`` is larger than before. Without
        it nothing is written.
      progress_fn: called with each record.
      should_stop: asked before each chunk; the run then ends, with a checkpoint if it has a folder.
      **settings: other fields of ``TrainingConfig``, such as ``loads`` or ``evaluation_envs``.

    Raises:
      InputError: a value is not legal, or the folder holds another run.
    """
    if isinstance(world, str):
        world = WorldConfig(world)
    if not isinstance(world, WorldConfig) and not _is_environment(world):
        raise InputError(f"world is {shown(world)}, must be the name of a preset, a WorldConfig, or (env, params)")
    if recipe is None:
        if not isinstance(world, WorldConfig):
            raise InputError("recipe is None, must be given for an environment of one's own")
        recipe = recipes.recipe(world)
    if not isinstance(recipe, Recipe):
        raise InputError(f"recipe is {shown(recipe)}, must be a Recipe, as qos_jax.recipe returns one")
    fields: dict[str, Any] = {"randomise": recipe.randomise} | settings
    training = TrainingConfig(
        agent=recipe.agent, steps=recipe.steps if steps is None else steps, runs=runs_of(recipe.agent, seeds), **fields
    )
    if isinstance(world, WorldConfig):
        world = world.for_training()
    run = training_run(world, training)
    with contextlib.ExitStack() as stack:
        folder = None
        if out is not None:
            resume = os.path.exists(os.path.join(out, CONFIG))
            folder = stack.enter_context(run.open_folder(out, resume=resume))
        result = run.train(folder, progress_fn=progress_fn, should_stop=should_stop)
    metrics = result.kept | {"steps": result.steps, "compile_s": result.compile_s, "train_s": result.train_s}
    name = "learned" if folder is None else folder.path.name
    return Trained(run.routers(result.weights, name), metrics, result.records, result.finished)


def _is_environment(world: Any) -> bool:
    if not isinstance(world, tuple) or len(world) != 2:
        return False
    return isinstance(world[0], Environment) and isinstance(world[1], EnvParams)
