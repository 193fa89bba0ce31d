"""Trains a router: ``qos-jax train --preset=paper-3 --out=runs/paper-3``.

Without further flags the agent is trained by the recipe of the world (``qos_jax.recipe``). Seeds, and with --vary
numbers of the algorithm and loads, train side by side in one program.

With --resume a run that was stopped or killed goes on from its last checkpoint; its other flags are those that it began
with, and --steps may be larger than before. Training and evaluation use different seeds (below 1000, from 1000), and by
default different halves of a trace and different parts of a table of prompts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import queue
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from absl.flags import FlagValues

from qos_jax.agent import configs
from qos_jax.agent.overrides import overridden
from qos_jax.agent.recipes import recipe
from qos_jax.errors import InputError
from qos_jax.io.imports import import_named
from qos_jax.programs import app
from qos_jax.programs.flags import define_train
from qos_jax.programs.progress_bar import ProgressBar
from qos_jax.programs.world_flags import import_plugins, notes_on, numbers, world_config
from qos_jax.training.config import RANDOMISED, TrainingConfig, runs_of
from qos_jax.training.parallel import leads
from qos_jax.training.progress import Progress, TrainResult
from qos_jax.training.run import TrainingRun, training_run
from qos_jax.training.run_config import CONFIG
from qos_jax.training.run_folder import RunFolder
from qos_jax.worlds.config import WorldConfig

_OF_THE_MACHINE = {"devices", "distributed", "coordinator_address", "num_processes", "process_id"}
_MAY_CHANGE = {"out", "resume", "steps", "flagfile"} | _OF_THE_MACHINE  # when a run is resumed


def main(values: FlagValues) -> None:
    """Trains, and writes checkpoints, metrics and the learning curve."""
    devices = _devices(values)
    import_plugins(values, [values.agent])
    resume = values.resume == "yes" or (values.resume == "auto" and (pathlib.Path(values.out) / CONFIG).exists())
    flags = _flags_of_the_run(values)
    if resume:
        values, flags = _with_earlier_flags(values, RunFolder.reopen(values.out))
    world, training = configs_of(values)
    run = training_run(world, training)
    sizes = run.sizes(devices)
    command = shlex.join(["qos-jax", "train", *app.given(values)])
    with run.open_folder(values.out, resume=resume, command=command, flags=flags) as folder:
        if leads():
            notes_on(world, run.learner.env, run.validation.params)
            print(f"{values.agent} on {world.name}: {sizes}", flush=True)
        with _stop_asked() as should_stop, _reporter(folder, run) as report:
            result = run.train(
                folder,
                devices=devices,
                checkpoint_every_s=60 * values.checkpoint_minutes,
                progress_fn=report,
                should_stop=should_stop,
            )
        if leads():
            _write_summary(values.agent, result, folder)
    if not result.finished:
        print("stopped: go on with --resume")
        sys.exit(128 + signal.SIGTERM)


def configs_of(values: FlagValues) -> tuple[WorldConfig, TrainingConfig]:
    """Returns the world and the run that the flags of ``flags.define_train`` describe.

    Raises:
      InputError: a value is not legal.
    """
    world = world_config(values, training=True)
    agent = import_named(values.agent)() if ":" in values.agent else values.agent
    tuned = recipe(world, agent)
    loads = tuple(numbers("load", values.load))
    randomise = _randomised(values, tuned.randomise)
    vary_load = next((text for text in values.vary if text.startswith("load=")), None)
    if vary_load is not None and (loads or "load" in _randomised(values, ())):
        raise InputError(f"--vary={vary_load}: the load is given or drawn already, by --load or --randomise")
    if loads or vary_load is not None:
        randomise = tuple(name for name in randomise if name != "load") + (("load",) if len(loads) > 1 else ())
    settings = _settings(values)
    agent = tuned.agent
    if loads or vary_load is not None or "fleet" in randomise:  # the clip follows from other worlds then
        agent = dataclasses.replace(agent, network=dataclasses.replace(agent.network, rate_clip_per_s=None))
    agent = overridden(agent, settings)
    return world, TrainingConfig(
        agent=agent,
        steps=values.steps or tuned.steps,
        runs=runs_of(agent, range(values.seed, values.seed + values.seeds), values.vary),
        randomise=randomise,
        loads=loads,
        evaluate_every=values.evaluate_every,
        evaluation_envs=values.evaluation_envs,
        evaluation_steps=values.evaluation_steps,
        keep=values.keep,
        save_replay=values.save_replay,
    )


def parsed(arguments: Sequence[str]) -> FlagValues:
    """Returns the flags of this program that arguments set.

    Raises:
      InputError: a flag is unknown, or its value is not legal.
    """
    values = FlagValues()
    define_train(values)
    app.parse(values, arguments)
    return values


def command_of(flags: Sequence[str], out: str | os.PathLike[str]) -> str:
    """Returns the command that trains with some flags."""
    return shlex.join(["qos-jax", "train", *flags, f"--out={out}"])


def _randomised(values: FlagValues, default: tuple[str, ...]) -> tuple[str, ...]:
    if values.randomise is None:
        return default
    if values.randomise == ["all"]:
        return RANDOMISED
    return () if values.randomise in (["none"], []) else tuple(values.randomise)


def _settings(values: FlagValues) -> dict[str, str]:
    settings = {}
    for text in values.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set={text}: give FIELD=VALUE, with commas between several")
        settings[name.strip()] = value.strip()
    for name in ("num_envs", "learning_rate"):
        if values[name].value is not None:
            settings[name] = str(values[name].value)
    _tell_of_old_names([values.agent, *settings])
    return settings


def _tell_of_old_names(names: Sequence[str]) -> None:
    now = configs.OLD_NAMES | configs.OLD_FIELDS
    renamed = {name: now[name] for name in (each.rpartition(".")[2] for each in names) if name in now}
    if renamed:
        told = ", ".join(f"{old} is now {new}" for old, new in renamed.items())
        print(f"note: names have changed: {told}; the old ones are still accepted", file=sys.stderr)


def _flags_of_the_run(values: FlagValues) -> list[str]:
    return [values[name].serialize() for name in values if values[name].present and name not in _MAY_CHANGE]


def _with_earlier_flags(values: FlagValues, folder: RunFolder) -> tuple[FlagValues, list[str]]:
    """Returns the flags that a run has had, where they are not given again, and those of them to go on with later.

    Raises:
      InputError: the run was not begun by this program.
    """
    began = folder.config.get("flags")
    if began is None:
        raise InputError(f"{folder.path / CONFIG}: has no flags, so the run was begun from Python: go on with it there")
    present = {name for name in values if values[name].present}
    earlier = [text for text in began if present.isdisjoint(_set_by(text))]
    if "steps" not in present:
        earlier.append(f"--steps={folder.training.steps}")
    merged = parsed([*earlier, *app.given(values)])
    return merged, _flags_of_the_run(merged)


def _set_by(flag: str) -> set[str]:
    """Returns the name of the flag that a text such as ``--noallow_drop`` sets."""
    values = parsed([flag])
    return {name for name in values if values[name].present}


def _devices(values: FlagValues) -> list[jax.Device]:
    """Returns the devices that share the work; none for the one that JAX takes by itself.

    Raises:
      InputError: there are not so many, or the processes do not find each other.
    """
    if values.deterministic:  # read when JAX first looks for devices
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    if values.distributed:
        try:
            jax.distributed.initialize(values.coordinator_address, values.num_processes, values.process_id)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"--distributed: {str(error).splitlines()[0]}") from error
    available = jax.devices()
    if values.devices is None:
        return available if values.distributed else []
    if values.devices > len(available) or (values.distributed and values.devices != len(available)):
        raise InputError(
            f"--devices={values.devices}: there are {len(available)} devices of kind {available[0].platform}"
        )
    return available[: values.devices]


def _write_summary(agent: str, result: TrainResult, folder: RunFolder) -> None:
    """Prints what came out, and draws the learning curve."""
    kept = result.kept
    interval = f"[{kept['low']:+.4f}, {kept['high']:+.4f}]"
    print(f"compilation: {result.compile_s:.1f} s")
    print(
        f"{agent}: QoS {np.mean(kept['qos']):.4f}, impact_greedy {kept['impact_greedy']:.4f}, "
        f"difference {kept['gain']:+.4f} {interval}, after {result.steps:,} steps in {result.train_s / 60:.1f} min"
    )
    if result.finished and set(kept["kept_after"]) != {result.steps}:
        each = ", ".join(f"{steps:,}" for steps in kept["kept_after"])
        print(f"earlier weights were better and are kept: after {each} steps")
    print(f"written: {folder.path}", flush=True)
    try:
        from qos_jax.report import pictures, plots

        pictures.write_figure(folder.path, "learning_curve", partial(plots.learning_curve, result.records))
    except Exception as error:  # a picture is worth less than the run, and so is a disk that is full by now
        print(f"warning: the learning curve could not be written: {error}", file=sys.stderr)


@contextlib.contextmanager
def _reporter(folder: RunFolder, run: TrainingRun) -> Iterator[Callable[[Progress], None]]:
    """Gives what shows progress as a bar and writes it down for TensorBoard, in the process that leads."""
    if not leads():
        yield lambda progress: None
        return
    names = ["_".join(f"{name}_{value:g}" for name, value in each.items()) for each in run.training.runs]
    board = _Board(folder)
    with ProgressBar(run.training.steps, "step", "compiles") as bar:

        def report(progress: Progress) -> None:
            speed = "" if np.isnan(progress.steps_per_s) else f"{progress.steps_per_s:,.0f} steps/s"
            note = ""
            if progress.evaluation is not None:
                qos, other = np.mean(progress.evaluation["qos"]), progress.evaluation["impact_greedy"]
                note = f"QoS {qos:.4f} (impact_greedy {other:.4f})"
            bar.update(
                progress.steps, total=progress.total_steps, note=", ".join(part for part in (speed, note) if part)
            )
            board.write(_scalars(progress.record, names), progress.steps)

        try:
            yield report
        finally:
            board.close()


class _Board:
    """TensorBoard's file, which a thread writes: training goes on where that fails, or never comes to an end."""

    _MOST_WAITING, _PATIENCE_S = 1000, 5.0

    def __init__(self, folder: RunFolder) -> None:
        self.left_out, self.leaving = False, threading.Lock()
        self.waiting: queue.Queue[tuple[list[tuple[str, float]], int] | None] = queue.Queue(self._MOST_WAITING)
        begins = (folder.latest or 0) + 1
        self.thread = threading.Thread(target=self._run, args=(folder.path / "tensorboard", begins), daemon=True)
        self.thread.start()

    def write(self, scalars: Iterable[tuple[str, float]], steps: int) -> None:
        """Has numbers written by name."""
        self._put((list(scalars), steps))

    def close(self) -> None:
        """Ends the file."""
        self._put(None)
        if not self.left_out:
            self.thread.join(self._PATIENCE_S)
            if self.thread.is_alive():
                self._leave_out("its file cannot be ended")

    def _put(self, item: tuple[list[tuple[str, float]], int] | None) -> None:
        if not self.left_out:
            try:
                self.waiting.put_nowait(item)
            except queue.Full:
                self._leave_out("its file is not written fast enough")

    def _run(self, folder: pathlib.Path, begins: int) -> None:
        try:
            self._write_all(folder, begins)
        except Exception as error:  # whatever the writer raises, training is worth more
            self._leave_out(str(error))

    def _write_all(self, folder: pathlib.Path, begins: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # its SummaryWriter can block for ever
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        folder.mkdir(exist_ok=True)
        writer = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)  # hides what is there of steps from here on
        writer.write_event(Event(wall_time=time.time(), step=begins, session_log=start))
        while (item := self.waiting.get()) is not None:
            for name, value in item[0]:
                writer.write_event(Event(wall_time=time.time(), step=item[1], summary=scalar(name, value)))
            if self.waiting.empty():
                writer.flush()
        writer.close()

    def _leave_out(self, why: str) -> None:
        with self.leaving:  # whoever finds it left out finds the warning printed, and there is one
            if not self.left_out:
                print(f"warning: TensorBoard is left out: {why}", file=sys.stderr)
                self.left_out = True


def _scalars(record: Mapping[str, Any], runs: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Yields the numbers of a record by name; lists of several runs one by one."""
    kind = record["kind"]
    values = record["metrics"] if kind == "train" else {name: record[name] for name in ("qos", "gain", "impact_greedy")}
    for name, value in values.items():
        each = value if isinstance(value, list) else [value]
        tags = [f"{kind}/{name}"] if len(each) == 1 else [f"{kind}/{name}/{run}" for run in runs]
        yield from ((tag, number) for tag, number in zip(tags, each, strict=True) if number is not None)


@contextlib.contextmanager
def _stop_asked() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether SIGTERM or Ctrl-C came.

    The second one ends the program at once, and so does the first before the function is called: programs compile then,
    and cannot be stopped.
    """
    came: list[int] = []
    trains = False

    def come(number: int, frame: object) -> None:
        if not trains:
            os.write(2, b"stopped before the first chunk, so nothing is lost: go on with --resume\n")
            os._exit(128 + number)
        came.append(number)
        signal.signal(number, signal.SIG_DFL)

    def should_stop() -> bool:
        nonlocal trains
        trains = True
        return bool(came)

    before = {number: signal.signal(number, come) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield should_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
