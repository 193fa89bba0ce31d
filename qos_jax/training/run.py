"""A training run from its configuration: the worlds, the learner, what it is judged by, and the routers in the end."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from qos_jax.agent.configs import AgentConfig
from qos_jax.agent.learner import Learner, make_learner
from qos_jax.agent.sac import Hyperparameters
from qos_jax.io.files import writable_folder
from qos_jax.routers.base import Router
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.training.config import DEFAULT_LOAD, PREFERENCES, VALIDATION_LOADS, TrainingConfig, hyperparameters_of
from qos_jax.training.loop import train
from qos_jax.training.memory import available_bytes, check_fits, needed_bytes
from qos_jax.training.progress import Progress, TrainResult
from qos_jax.training.run_config import make_config
from qos_jax.training.run_folder import RunFolder, locked
from qos_jax.training.validation import Validation
from qos_jax.worlds import randomization
from qos_jax.worlds.config import WorldConfig
from qos_jax.worlds.randomization import Domain, rate_clip_per_s, sample_worlds


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """What a run needs; ``training_run`` makes it."""

    learner: Learner
    params: EnvParams  # of the environments to train in
    validation: Validation
    training: TrainingConfig
    world: WorldConfig | None  # None: an environment of the user's own

    @contextlib.contextmanager
    def open_folder(
        self,
        out: str | os.PathLike[str],
        *,
        resume: bool = False,
        command: str | None = None,
        flags: Sequence[str] | None = None,
    ) -> Iterator[RunFolder]:
        """Makes the folder of this run, or opens the one to go on with, and keeps other programs out of it.

        Raises:
          InputError: the folder holds a run and ``resume`` is False, the run in it is another one, or another program
            trains there.
        """
        config = make_config(self.learner, self.training, self.world, command=command, flags=flags)
        with locked(RunFolder.reopen(out).path if resume else writable_folder(out)):
            if resume:
                folder = RunFolder.reopen(out)
                folder.go_on(config)
            else:
                folder = RunFolder.start(out, config)
            yield folder

    def train(
        self,
        folder: RunFolder | None = None,
        *,
        devices: Sequence[jax.Device] = (),
        checkpoint_every_s: float = 120.0,
        progress_fn: Callable[[Progress], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> TrainResult:
        """Trains to the end, or until asked to stop; see ``qos_jax.training.loop.train``."""
        runs = self.training.runs
        return train(
            self.learner,
            self.params,
            _hyperparameters(self.learner.config, self.training),
            self.validation,
            steps=self.training.steps,
            seeds=self.training.seeds,
            loads=[run["load"] for run in runs] if "load" in runs[0] else None,
            devices=devices,
            evaluate_every=self.training.evaluate_every,
            keep_best=self.training.keeps_best,
            folder=folder,
            checkpoint_every_s=checkpoint_every_s,
            progress_fn=progress_fn or (lambda progress: None),
            should_stop=should_stop or (lambda: False),
        )

    def routers(self, weights: Any, name: str) -> list[Router]:
        """Returns the router of each run, from the weights of a ``TrainResult``."""
        if len(self.training.runs) == 1:
            return [self.learner.router(weights, name)]
        each = [jax.tree.map(lambda x, i=i: x[i], weights) for i in range(len(self.training.runs))]
        return [self.learner.router(one, f"{name}@{seed}") for one, seed in zip(each, self.training.seeds, strict=True)]

    def sizes(self, devices: Sequence[jax.Device] = ()) -> str:
        """Returns a line on the number of weights, and one on the memory needed.

        Raises:
          InputError: the run does not fit into memory.
        """
        state = jax.eval_shape(self.learner.init, jax.random.key(0), self.params, self.learner.config.hyper)
        weights = sum(leaf.size for leaf in jax.tree.leaves(self.learner.weights(state)))
        available = available_bytes(jax.local_devices()[0])
        on_cpu = jax.default_backend() == "cpu"  # whose devices share the machine's memory
        runs = len(self.training.runs)
        fits = check_fits(needed_bytes(state), runs, 1 if on_cpu else max(len(devices), 1), available)
        return f"{weights:,} weights, {self.learner.steps_per_chunk:,} steps in a chunk, {runs} side by side\n{fits}"


def training_run(world: WorldConfig | tuple[Environment, EnvParams], training: TrainingConfig) -> TrainingRun:
    """Builds everything that a run needs.

    Args:
      world: a world, or an environment and its parameters.
      training: what is trained.

    Raises:
      InputError: a file cannot be used, or the configurations do not go together.
    """
    env, base = world.build() if isinstance(world, WorldConfig) else world
    params, validation = _worlds(env, base, training), _validation(base, training)
    varied = [run["load"] for run in training.runs if "load" in run]
    agent = _with_rate_clip(training.agent, env, params, max([*validation.loads, *varied]))
    if PREFERENCES in training.randomise:
        agent = dataclasses.replace(agent, network=dataclasses.replace(agent.network, with_preferences=True))
    if env.spec.sessions:
        agent = dataclasses.replace(agent, network=dataclasses.replace(agent.network, with_sessions=True))
    return TrainingRun(
        make_learner(env, agent), params, validation, training, world if isinstance(world, WorldConfig) else None
    )


def _worlds(env: Environment, params: EnvParams, training: TrainingConfig) -> EnvParams:
    """Returns the parameters of the environments to train in, with an axis [num_envs] where they differ."""
    loads, randomise = training.loads, set(training.randomise) | ({"load"} if len(training.loads) > 1 else set())
    params = params.at_load((loads or (DEFAULT_LOAD,))[0])
    if not randomise:
        return params
    domain = Domain(
        loads=(loads or randomization.LOADS) if "load" in randomise else (),
        arrivals=randomization.ARRIVALS if "arrivals" in randomise else (),
        predictions=randomization.PREDICTIONS if "prediction" in randomise else (),
        staleness_s=(0.0, float(params.staleness_s)) if "staleness" in randomise else (),
        latency_limits_s=randomization.LATENCY_LIMITS_S if "limit" in randomise else (),
        pairs=randomization.PAIRS if "fleet" in randomise else (),
        preferences=randomization.PREFERENCES if PREFERENCES in randomise else (),
    )
    key = jax.random.fold_in(jax.random.key(training.seeds[0]), 1)
    return sample_worlds(env, params, domain, key, training.agent.num_envs)


def _validation(params: EnvParams, training: TrainingConfig) -> Validation:
    loads_differ = "load" in training.randomise or len(training.loads) > 1
    loads = training.loads or (VALIDATION_LOADS if loads_differ else (DEFAULT_LOAD,))
    return Validation(params, loads, training.evaluation_envs, training.evaluation_steps)


def _with_rate_clip(agent: AgentConfig, env: Environment, params: EnvParams, load: float) -> AgentConfig:
    """Returns the agent with ``rate_clip_per_s`` of its worlds at the greatest ``load``, unless it has one."""
    if agent.network.rate_clip_per_s is not None:
        return agent
    network = dataclasses.replace(agent.network, rate_clip_per_s=rate_clip_per_s(env, params, load))
    return dataclasses.replace(agent, network=network)


def _hyperparameters(agent: AgentConfig, training: TrainingConfig) -> Hyperparameters:
    """Returns the numbers of all runs, leaves [runs]."""
    each = [hyperparameters_of(agent, run) for run in training.runs]
    return jax.tree.map(lambda *values: np.array(values, np.float32), *each)
