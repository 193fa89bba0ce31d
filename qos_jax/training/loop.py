"""The training loop on the host: it runs the learner's phases, evaluates the policy, and keeps the run folder.

Three programs are compiled once, ahead of time: the start (init and warm_up), the chunk, and the evaluation of the
policy or of impact_greedy. Several seeds run side by side in them. While a chunk runs, the metrics of the previous one
are read and reported, so that the device never waits for the host.

``progress_fn`` gets records, and metrics.jsonl holds them. Each has ``kind``, ``steps`` (requests routed, of each seed)
and ``seconds`` (of training, without compilation), and by its kind:

* ``train``, after each chunk: ``metrics``: by name, a value for each seed;
* ``evaluation``: ``qos``: mean QoS on the requests of the validation, for each seed; ``gains``: mean paired difference
  to impact_greedy, for each seed; ``impact_greedy``: mean QoS of that router; ``gain``, with ``low`` and ``high``: mean
  of the differences with its 95 % interval, over the seeds, or over the environments if there is one seed;
  ``kept_after``: after how many steps each seed's router has its weights, if training ends there.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import struct
from jax import Array, lax

from qos_jax.agent.learner import Learner, TrainState
from qos_jax.agent.sac import Hyperparameters
from qos_jax.routers.impact_greedy import impact_greedy
from qos_jax.sim.env import EnvParams, axis_of_environments
from qos_jax.sim.types import Observation
from qos_jax.training.parallel import DeviceLayout, any_process
from qos_jax.training.progress import Progress, Recorder, TrainResult
from qos_jax.training.run_folder import RunFolder
from qos_jax.training.selection import Selection, kept_evaluation
from qos_jax.training.validation import Validation

_LEVEL = "xla_backend_optimization_level"


def train(
    learner: Learner,
    params: EnvParams,
    hyper: Hyperparameters,
    validation: Validation,
    *,
    steps: int,
    seeds: Sequence[int] = (0,),
    loads: Sequence[float] | None = None,
    devices: Sequence[jax.Device] = (),
    evaluate_every: int | None = None,
    keep_best: bool = False,
    folder: RunFolder | None = None,
    checkpoint_every_s: float = 120.0,
    progress_fn: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Trains until so many steps are done, from the newest checkpoint of the folder if it has one.

    Args:
      learner: what learns.
      params: of its environments, see ``Learner.init``.
      hyper: numbers of the algorithm; leaves of several seeds may have an axis [seeds].
      validation: the requests of its evaluations.
      steps: of the environments of each seed, rounded up to whole chunks.
      seeds: of runs that train side by side in one program. A seed may occur more than once, with other numbers or
        another load.
      loads: of each run's environments and evaluation; by default those of ``params`` and ``validation``.
      devices: of all processes, to share the seeds and the shards of the agent; see ``qos_jax.training.parallel``.
      evaluate_every: steps between evaluations, a tenth of all by default; there is also one at the start and the end.
      keep_best: the weights of the result are those of each seed's best evaluation where it is better than the last.
      folder: for checkpoints and metrics.jsonl; without it nothing is written.
      checkpoint_every_s: seconds between checkpoints; there is also one at the end.
      progress_fn: called with each record.
      should_stop: called before each chunk; where it returns True, the run ends with a checkpoint.

    Raises:
      InputError: a loss is not finite, the checkpoint is not of this learner, or the devices cannot share the work.
    """
    differ = axis_of_environments(params) is not None
    layout = DeviceLayout(len(seeds), learner.config.shards, tuple(devices), differ)
    chunks = math.ceil(steps / learner.steps_per_chunk)
    chunks_per_evaluation = max(1, round((evaluate_every or steps / 10) / learner.steps_per_chunk))
    phases = _compile(learner, params, _run_arguments(seeds, hyper, loads), validation, layout)
    recorder = Recorder(learner.steps_per_chunk, chunks, seeds, folder, progress_fn)
    first, state = _resumed(folder, phases.like, learner.steps_per_chunk)
    if state is None:
        state = phases.start()
    weights = phases.weights(state)
    reference = phases.qos(weights, False)
    selection = Selection(keep_best, weights, len(seeds), validation.num_envs, partial(layout.placed, "all"))
    if first == 0:
        recorder.evaluated(0, weights, phases.qos(weights, True), reference, selection)
    elif keep_best and folder is not None:
        selection.best = folder.restore_best(first * learner.steps_per_chunk, selection.best)
    # A replay buffer that is not saved is empty after a resume, and its rows are counted from there.
    rows_from = 0 if folder is None or folder.training.save_replay else first
    chunk, saved_at = recorder.start(first), time.perf_counter()
    while chunk < chunks:
        due = time.perf_counter() - saved_at >= checkpoint_every_s
        stop, due = any_process(should_stop(), due)
        if due and chunk > first:
            weights = phases.weights(state)
            recorder.save(chunk, state, weights, selection)
            saved_at = time.perf_counter()
        if stop:
            break
        state, metrics = phases.chunk(state, chunk - rows_from, chunk / chunks)
        chunk += 1
        recorder.trained(chunk, metrics)
        if chunk % chunks_per_evaluation == 0 or chunk == chunks:
            weights = phases.weights(state)
            recorder.evaluated(chunk, weights, phases.qos(weights, True), reference, selection)
    weights = phases.weights(state)
    recorder.save(chunk, state, weights, selection)
    return TrainResult(
        weights=selection.of(weights),
        steps=chunk * learner.steps_per_chunk,
        finished=chunk >= chunks,
        records=recorder.records,
        kept=kept_evaluation(recorder.records),
        compile_s=phases.compile_s,
        train_s=recorder.seconds(),
    )


def _resumed(folder: RunFolder | None, like: TrainState, steps_per_chunk: int) -> tuple[int, TrainState | None]:
    """Returns how many chunks the newest checkpoint has, and its state; 0 and None where there is none."""
    if folder is None or folder.latest is None:
        return 0, None
    return folder.latest // steps_per_chunk, folder.restore_state(folder.latest, like)


@dataclasses.dataclass(frozen=True)
class _Phases:
    """The compiled programs, for all seeds at once, with the world and the hyperparameters put in."""

    start: Callable[[], TrainState]
    chunk: Callable[[TrainState, int, float], tuple[TrainState, dict[str, Array]]]  # takes the state's memory
    weights: Callable[[TrainState], Any]
    qos: Callable[[Any, bool], Array]  # [E] or [seeds, E]; of a policy by its weights, or of impact_greedy
    like: TrainState  # its shapes
    compile_s: float


class _RunArguments(struct.PyTreeNode):
    """What distinguishes the runs that train side by side; leaves [seeds], or [] of one."""

    seed: Any  # int
    hyper: Hyperparameters
    load: Any  # None: that of the worlds

    def at_load(self, params: EnvParams) -> EnvParams:
        """Returns the parameters of one run."""
        return params if self.load is None else params.at_load(self.load)


def _run_arguments(seeds: Sequence[int], hyper: Hyperparameters, loads: Sequence[float] | None) -> _RunArguments:
    shape = (len(seeds),) if len(seeds) > 1 else ()
    given = _RunArguments(np.asarray(seeds), hyper, None if loads is None else np.asarray(loads, np.float32))
    given = given.replace(hyper=jax.tree.map(lambda x: np.broadcast_to(np.float32(x), (len(seeds),)), hyper))
    return jax.tree.map(lambda x: x.reshape(shape), given)


def _compile(
    learner: Learner, params: EnvParams, runs: _RunArguments, validation: Validation, layout: DeviceLayout
) -> _Phases:
    """Compiles all phases ahead of time, side by side."""
    started = time.perf_counter()
    shard, reference = layout.one_shard(learner), impact_greedy()

    def start(run: _RunArguments, params: EnvParams) -> TrainState:
        params = run.at_load(params)
        return shard.warm_up(shard.init(jax.random.key(run.seed), params, run.hyper), params, run.hyper)

    def chunk(
        state: TrainState, run: _RunArguments, params: EnvParams, chunk: Array, progress: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        return shard.train_chunk(state, run.at_load(params), run.hyper, chunk, progress)

    def qos(weights: Any, learned: Array, run: _RunArguments, seeds: Array, params: EnvParams) -> Array:
        def act(key: Array, obs: Observation) -> Array:
            return lax.cond(
                learned, lambda: learner.act(weights, key, obs), lambda: reference.act(key, obs, reference.init())[0]
            )

        return validation.qos(learner.env, act, seeds, run.at_load(params))

    runs = layout.placed("seed", runs)
    world = runs, layout.placed("world", layout.worlds(params))
    test = runs, *layout.placed("all", validation.arguments())
    start = layout.spread(start, ("seed", "world"), ("state",))
    chunk = layout.spread(chunk, ("state", "seed", "world", "all", "all"), ("state", "seed"))
    qos = layout.spread(qos, ("seed", "all", "seed", "all", "all"), ("seed",))
    like = layout.described("state", jax.eval_shape(start, *world))
    weights = layout.described("all", learner.weights(like))
    where, everywhere = layout.shardings("state"), layout.shardings("all")
    lowered = [
        jax.jit(start, out_shardings=where).lower(*world),
        jax.jit(chunk, donate_argnums=0, out_shardings=(where, everywhere)).lower(
            like, *world, np.int32(0), np.float32(0)
        ),
        jax.jit(learner.weights, out_shardings=everywhere).lower(like),
        jax.jit(qos, out_shardings=everywhere).lower(weights, np.bool_(True), *test),
    ]
    options = _compiler_options()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        run_start, run_chunk, run_weights, run_qos = pool.map(lambda program: program.compile(options), lowered)
    return _Phases(
        start=lambda: run_start(*world),
        chunk=lambda state, chunk, progress: run_chunk(state, *world, np.int32(chunk), np.float32(progress)),
        weights=run_weights,
        qos=lambda weights, learned: run_qos(weights, np.bool_(learned), *test),
        like=like,
        compile_s=time.perf_counter() - started,
    )


def _compiler_options() -> dict[str, Any]:
    """Returns options under which programs compile faster on a CPU and run as fast, unless the user has chosen."""
    chosen = jax.config.read("jax_disable_most_optimizations") or _LEVEL in os.environ.get("XLA_FLAGS", "")
    return {} if chosen or jax.default_backend() != "cpu" else {_LEVEL: 1}
