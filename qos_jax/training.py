"""Training on the host's side: it runs the learner's phases, judges the policy, and keeps the run's folder.

There are three programs, compiled once and ahead of time: the start (init and prefill), the chunk, and the evaluation,
of the policy or of impact_greedy. Several seeds run side by side in them. While a chunk runs, the metrics of the one
before it are read and reported, so that the device never waits for the host.

What happens is told in records, which ``progress_fn`` gets and metrics.jsonl holds. Each has ``kind``, ``steps`` (of
the environments of one seed) and ``seconds`` (of training, without compilation), and by its kind:

* ``train``: after each chunk, ``metrics``: by name, for each seed;
* ``evaluation``: ``qos``: mean QoS on the held-out requests, for each seed; ``gains``: the mean paired differences to
  impact_greedy, for each seed; ``impact_greedy``: the mean QoS of that router; ``gain``, with ``low`` and ``high``: the
  mean of the differences with its 95 % interval, over the seeds, or over the environments if there is one seed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from qos_jax.agent.learner import Learner, TrainState, axis_of_environments
from qos_jax.agent.sac import Hyperparameters
from qos_jax.checkpoints import RunFolder
from qos_jax.errors import InputError
from qos_jax.parallel import Layout, any_says
from qos_jax.routers.impact import impact_greedy
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.types import Observation
from qos_jax.statistics import summarise

FIRST_HELD_OUT_SEED = 1000  # training uses seeds below

Act = Callable[[Array, Observation], Array]  # key, observation -> action [] int32
Record = dict[str, Any]

_WARM_UP = 0.25  # leading share of the held-out requests that does not count, as the fleet is empty at first


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The requests by which a policy in training is judged: the same at every evaluation, and for impact_greedy."""

    params: EnvParams  # of one environment
    loads: tuple[float, ...] = ()  # environment i has load i modulo their number; that of ``params`` without them
    num_envs: int = 32  # E
    steps: int = 800  # requests of each

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
          InputError: there are too few environments for an interval, or no steps.
        """
        for name, least in (("num_envs", 2), ("steps", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} of the evaluation is {getattr(self, name)}, must be at least {least}")

    def arguments(self) -> tuple[Array, EnvParams]:
        """Returns the seeds [E] and the parameters, of which only the loads have an axis [E]."""
        seeds = FIRST_HELD_OUT_SEED + jnp.arange(self.num_envs)
        if not self.loads:
            return seeds, self.params
        return seeds, self.params.at_load(jnp.resize(jnp.asarray(self.loads), (self.num_envs,)))

    def qos(self, env: Environment, act: Act, seeds: Array, params: EnvParams) -> Array:
        """Returns the mean QoS [E] of the requests behind the warm-up; pure."""
        axes = jax.tree.map(lambda many, one: 0 if jnp.ndim(many) > jnp.ndim(one) else None, params, self.params)

        def one(seed: Array, params: EnvParams) -> Array:
            def decide(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], Array]:
                obs, state = carry
                key_act, key_step = jax.random.split(key)
                obs, state, *_, info = env.step(key_step, state, act(key_act, obs), params)
                return (obs, state), info["answers"].qos

            key_reset, key_steps = jax.random.split(jax.random.key(seed))
            _, earned = lax.scan(decide, env.reset(key_reset, params), jax.random.split(key_steps, self.steps))
            return jnp.mean(earned[int(_WARM_UP * self.steps) :])

        return jax.vmap(one, in_axes=(0, axes))(seeds, params)


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is."""

    steps: int  # of the environments of one seed
    total_steps: int
    steps_per_s: float  # of all seeds, since this program began to train; NaN at the start
    left_s: float  # by that speed; NaN at the start
    record: Record  # what has just happened
    evaluation: Record | None  # the last one


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run has come to."""

    weights: Any  # what ``Learner.router`` takes; leaves [seeds, ...] if there are several seeds
    steps: int  # of the environments of one seed
    finished: bool  # False if it was stopped
    records: list[Record]
    compile_s: float
    train_s: float  # of the whole run, without compilation


def train(
    learner: Learner,
    params: EnvParams,
    hyper: Hyperparameters,
    held_out: HeldOut,
    *,
    steps: int,
    seeds: Sequence[int] = (0,),
    loads: Sequence[float] | None = None,
    devices: Sequence[jax.Device] = (),
    evaluate_every: int | None = None,
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
      held_out: what the policy is judged by.
      steps: of the environments of each seed, rounded up to whole chunks.
      seeds: each trains on its own; several do so side by side in one program. A seed may be there more than once, with
        other numbers or another load.
      loads: of each seed's environments and evaluation; by default they are those of ``params`` and ``held_out``.
      devices: of all processes, to share the seeds and the shards of the agent; see ``qos_jax.parallel``.
      evaluate_every: steps between evaluations, a tenth of all by default; there is also one at the start and the end.
      folder: where checkpoints and metrics.jsonl go; without it nothing is written.
      checkpoint_every_s: seconds between checkpoints; there is also one at the end.
      progress_fn: called with each record.
      should_stop: asked before each chunk; the run then ends with a checkpoint.

    Raises:
      InputError: a loss is not finite, the checkpoint is not of this learner, or the devices cannot share the work.
    """
    differ = axis_of_environments(params) is not None
    layout = Layout(len(seeds), learner.config.shards, tuple(devices), differ)
    chunks = math.ceil(steps / learner.steps_per_chunk)
    chunks_per_evaluation = max(1, round((evaluate_every or steps / 10) / learner.steps_per_chunk))
    phases = _compile(learner, params, _runs(seeds, hyper, loads), held_out, layout)
    run = _Run(learner.steps_per_chunk, chunks, seeds, folder, progress_fn)
    first, state = _resumed(folder, phases.like, learner.steps_per_chunk)
    if state is None:
        state = phases.start()
    reference = phases.qos(phases.weights(state), False)
    if first == 0:
        run.evaluated(0, phases.qos(phases.weights(state), True), reference)
    # A replay that is not saved is empty again, and its rows are counted from there.
    rows_from = 0 if folder is None or folder.config["with_replay"] else first
    chunk, saved_at = run.start(first), time.perf_counter()
    while chunk < chunks:
        due = time.perf_counter() - saved_at >= checkpoint_every_s
        stop, due = any_says(should_stop(), due)
        if due and chunk > first:
            run.save(chunk, state, phases.weights(state))
            saved_at = time.perf_counter()
        if stop:
            break
        state, metrics = phases.chunk(state, chunk - rows_from, chunk / chunks)
        chunk += 1
        run.trained(chunk, metrics)
        if chunk % chunks_per_evaluation == 0 or chunk == chunks:
            run.evaluated(chunk, phases.qos(phases.weights(state), True), reference)
    weights = phases.weights(state)
    run.save(chunk, state, weights)
    return TrainResult(
        weights=weights,
        steps=chunk * learner.steps_per_chunk,
        finished=chunk >= chunks,
        records=run.records,
        compile_s=phases.compile_s,
        train_s=run.seconds(),
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


class _Runs(struct.PyTreeNode):
    """What distinguishes the runs that train side by side; leaves [seeds], or [] of one."""

    seed: Any  # int
    hyper: Hyperparameters
    load: Any  # None: that of the worlds

    def at_load(self, params: EnvParams) -> EnvParams:
        """Returns the parameters of one run."""
        return params if self.load is None else params.at_load(self.load)


def _runs(seeds: Sequence[int], hyper: Hyperparameters, loads: Sequence[float] | None) -> _Runs:
    shape = (len(seeds),) if len(seeds) > 1 else ()
    given = _Runs(np.asarray(seeds), hyper, None if loads is None else np.asarray(loads, np.float32))
    given = given.replace(hyper=jax.tree.map(lambda x: np.broadcast_to(np.float32(x), (len(seeds),)), hyper))
    return jax.tree.map(lambda x: x.reshape(shape), given)


def _compile(learner: Learner, params: EnvParams, runs: _Runs, held_out: HeldOut, layout: Layout) -> _Phases:
    """Compiles all phases ahead of time, side by side."""
    started = time.perf_counter()
    shard, reference = layout.one_shard(learner), impact_greedy()

    def start(run: _Runs, params: EnvParams) -> TrainState:
        params = run.at_load(params)
        return shard.prefill(shard.init(jax.random.key(run.seed), params, run.hyper), params, run.hyper)

    def chunk(
        state: TrainState, run: _Runs, params: EnvParams, chunk: Array, progress: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        return shard.train_chunk(state, run.at_load(params), run.hyper, chunk, progress)

    def qos(weights: Any, learned: Array, run: _Runs, seeds: Array, params: EnvParams) -> Array:
        def act(key: Array, obs: Observation) -> Array:
            return lax.cond(
                learned, lambda: learner.act(weights, key, obs), lambda: reference.act(key, obs, reference.init())[0]
            )

        return held_out.qos(learner.env, act, seeds, run.at_load(params))

    runs = layout.placed("seed", runs)
    world = runs, layout.placed("world", layout.worlds(params))
    test = runs, *layout.placed("all", held_out.arguments())
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
    with concurrent.futures.ThreadPoolExecutor() as pool:
        run_start, run_chunk, run_weights, run_qos = pool.map(lambda program: program.compile(), lowered)
    return _Phases(
        start=lambda: run_start(*world),
        chunk=lambda state, chunk, progress: run_chunk(state, *world, np.int32(chunk), np.float32(progress)),
        weights=run_weights,
        qos=lambda weights, learned: run_qos(weights, np.bool_(learned), *test),
        like=like,
        compile_s=time.perf_counter() - started,
    )


class _Run:
    """Tells what happens, to the caller and to the folder."""

    def __init__(
        self,
        steps_per_chunk: int,
        chunks: int,
        seeds: Sequence[int],
        folder: RunFolder | None,
        progress_fn: Callable[[Progress], None],
    ) -> None:
        self.steps_per_chunk, self.chunks, self.seeds = steps_per_chunk, chunks, seeds
        self.folder, self.progress_fn = folder, progress_fn
        self.records: list[Record] = [] if folder is None else folder.rewind(folder.latest)
        self.running: tuple[int, dict[str, Array]] | None = None  # a chunk that may not be done yet, and its metrics
        self.began = time.perf_counter() - (self.records[-1]["seconds"] if self.records else 0.0)
        self.start(0)

    def start(self, chunk: int) -> int:
        """Measures the speed from here on; returns ``chunk``, how many are done."""
        self.first, self.first_at = chunk, time.perf_counter()
        return chunk

    def seconds(self) -> float:
        """Returns how long the run has trained."""
        return time.perf_counter() - self.began

    def trained(self, chunk: int, metrics: dict[str, Array]) -> None:
        """Takes the metrics of a chunk that has been started, and reports the one before it."""
        self._report()
        self.running = (chunk, metrics)

    def evaluated(self, chunk: int, qos: Array, reference: Array) -> None:
        """Waits for the QoS [E] or [seeds, E] after so many chunks, and reports it beside the reference's."""
        self._report()
        each, other = (np.asarray(x, np.float64).reshape(len(self.seeds), -1) for x in (qos, reference))
        gains = each - other
        gain = summarise(gains.mean(1) if len(gains) > 1 else gains[0])
        values = {"qos": each.mean(1).tolist(), "gains": gains.mean(1).tolist(), "impact_greedy": float(other.mean())}
        values |= {"gain": gain["mean"], "low": gain["low"], "high": gain["high"]}
        self._tell("evaluation", chunk, values)

    def save(self, chunk: int, state: TrainState, weights: Any) -> None:
        """Writes a checkpoint, if all is well."""
        self._report()
        if self.folder is not None:
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(weights))):
                raise self._diverged("a weight is not finite", chunk)
            self.folder.save(chunk * self.steps_per_chunk, state, weights)

    def _report(self) -> None:
        if self.running is None:
            return
        (chunk, metrics), self.running = self.running, None
        values = {name: np.atleast_1d(value).tolist() for name, value in jax.device_get(metrics).items()}
        for name, value in values.items():
            if "loss" in name and not np.isfinite(value).all():
                raise self._diverged(f"{name} is {value}", chunk)
        finite = {name: [x if math.isfinite(x) else None for x in value] for name, value in values.items()}
        self._tell("train", chunk, {"metrics": finite})

    def _tell(self, kind: str, chunk: int, values: Record) -> None:
        steps = chunk * self.steps_per_chunk
        record = {"kind": kind, "steps": steps, "seconds": round(self.seconds(), 3), **values}
        self.records.append(record)
        if self.folder is not None:
            self.folder.append(record)
        done = chunk - self.first
        chunk_s = (time.perf_counter() - self.first_at) / done if done else math.nan
        self.progress_fn(
            Progress(
                steps=steps,
                total_steps=self.chunks * self.steps_per_chunk,
                steps_per_s=len(self.seeds) * self.steps_per_chunk / chunk_s,
                left_s=(self.chunks - chunk) * chunk_s,
                record=record,
                evaluation=next((one for one in reversed(self.records) if one["kind"] == "evaluation"), None),
            )
        )

    def _diverged(self, what: str, chunk: int) -> InputError:
        good = "there is no checkpoint"
        if self.folder is not None and self.folder.latest is not None:
            good = f"the last good checkpoint is {self.folder.checkpoint(self.folder.latest)}"
        return InputError(
            f"training diverged: {what} after {chunk * self.steps_per_chunk} steps; {good}; try a lower learning_rate"
        )
