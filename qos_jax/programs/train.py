"""Trains a router.

qos-jax train --preset=paper-3 --agent=mvr --load=0.9 --steps=1000000 --seed=0 --out=runs/mvr

Seeds, and with --vary numbers of the algorithm and loads, train side by side in one program.

With --resume a run that was stopped or killed goes on from its last checkpoint; its other flags are those that it began
with. What is trained on is apart from what evaluation uses: seeds below 1000, and by default the first half of a trace
and the training part of a table of prompts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from tensorboardX import SummaryWriter
from tqdm import tqdm

from qos_jax.agent import AGENTS, AgentConfig, Learner, configs, make_learner
from qos_jax.agent.overrides import leaves, overridden
from qos_jax.agent.sac import Hyperparameters
from qos_jax.errors import InputError
from qos_jax.io.files import write_whole
from qos_jax.programs import common
from qos_jax.report import plots
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.training.held_out import FIRST_HELD_OUT_SEED, HeldOut
from qos_jax.training.loop import train
from qos_jax.training.memory import available_bytes, check_fits, needed_bytes
from qos_jax.training.parallel import leads
from qos_jax.training.progress import Progress, TrainResult
from qos_jax.training.run_folder import RunFolder, make_config
from qos_jax.worlds import randomization
from qos_jax.worlds.randomization import Domain, sample_worlds

FLAGS = flags.FLAGS
_DEFAULT_LOAD = 0.9
_HELD_OUT_LOADS = (0.6, 0.9, 1.1, 1.3)  # where loads are drawn
_DRAWN = ("load", "arrivals", "prediction", "staleness", "limit", "fleet")
_PLACES = {"devices", "distributed", "coordinator_address", "num_processes", "process_id"}
_MAY_CHANGE = {"out", "resume", "checkpoint_minutes", "flagfile"} | _PLACES  # when a run is resumed
_BAR = "{desc}{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps{postfix}"


def define_flags() -> None:
    """Defines the flags of this program."""
    common.define_world_flags()
    FLAGS.set_default("trace_part", "first")
    FLAGS.set_default("table_part", "train")
    flags.DEFINE_string("agent", "mvr", f"Who learns: {', '.join(AGENTS)}.")
    flags.DEFINE_list("set", [], "Other values for fields of the agent: learning_rate=3e-4,han.layers=3,hidden=64x64.")
    flags.DEFINE_multi_string(
        "vary",
        [],
        "FIELD=VALUE,VALUE: other values for a number of the algorithm, or for the load. Every combination trains with "
        "every seed, side by side.",
    )
    flags.DEFINE_integer("num_envs", None, "Environments side by side of each seed; the agent's by default.")
    flags.DEFINE_float("learning_rate", None, "The agent's by default.")
    flags.DEFINE_list("load", None, "Load to train at, or the least and the greatest, to be drawn; 0.9 by default.")
    flags.DEFINE_list("randomise", [], f"What to draw for each environment: all, or some of {', '.join(_DRAWN)}.")
    flags.DEFINE_integer("steps", 1_000_000, "Steps of the environments of each seed.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "The seed, or the first of several.", 0, FIRST_HELD_OUT_SEED - 1)
    flags.DEFINE_integer("seeds", 1, "How many seeds to train side by side.", 1, FIRST_HELD_OUT_SEED)
    flags.DEFINE_integer("evaluate_every", None, "Steps between evaluations; a tenth of all by default.", 1)
    flags.DEFINE_integer("evaluation_envs", 32, "Environments of an evaluation.", 2)
    flags.DEFINE_integer("evaluation_steps", 800, "Requests of each of them.", 1)
    flags.DEFINE_float("checkpoint_minutes", 2.0, "Minutes between checkpoints.", 0.0)
    flags.DEFINE_bool("save_replay", True, "Checkpoints hold the replay; without it a run does not resume bit for bit.")
    flags.DEFINE_bool("deterministic", False, "Repeats bit for bit on a GPU, too, at some cost; a CPU always does.")
    flags.DEFINE_integer("devices", None, "Devices that share seeds and shards (--set=shards=N); one by default.", 1)
    flags.DEFINE_bool("distributed", False, "Several processes run this command, and all their devices share the work.")
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of the first process; found out under Slurm and MPI.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are; found out likewise.", 1)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on; found out likewise.", 0)
    flags.DEFINE_string("out", "runs/train", "Folder of the run.")
    flags.DEFINE_bool("resume", False, "Go on with the run in that folder.")


def main(argv: list[str]) -> None:
    """Trains, and writes checkpoints, metrics and the learning curve."""
    del argv
    devices = _devices()
    earlier = RunFolder.reopen(FLAGS.out) if FLAGS.resume else None
    if earlier is not None:
        _take_flags(earlier)
    seeds = range(FLAGS.seed, FLAGS.seed + FLAGS.seeds)
    if seeds[-1] >= FIRST_HELD_OUT_SEED:
        raise InputError(f"--seed={FLAGS.seed} --seeds={FLAGS.seeds}: seeds must be below {FIRST_HELD_OUT_SEED}")
    env, params, world = common.world_from_flags()
    agent = overridden(configs.named(FLAGS.agent), _settings())
    params, held_out = _worlds(env, agent, params)
    runs = _runs(agent, seeds)
    loads = [*held_out.loads, *(run["load"] for run in runs if "load" in run)]
    learner = make_learner(env, _with_most_rate(agent, env, params, max(loads)))
    command = shlex.join(["qos-jax", "train", *sys.argv[1:]])
    config = make_config(
        learner, learner.config.hyper, [run["seed"] for run in runs], with_replay=FLAGS.save_replay,
        runs=runs, world=world, loads=held_out.loads, steps=FLAGS.steps, flags=_flags_given(), command=command,
    )  # fmt: skip
    if earlier is not None:
        earlier.check_same(config)
    sizes = _sizes(learner, params, len(runs), devices)
    folder = earlier or RunFolder.start(FLAGS.out, config)
    if leads():
        print(sizes, flush=True)
    with (
        folder.locked(),
        _stop_asked() as should_stop,
        _Reporter(folder, runs) if leads() else contextlib.nullcontext() as reporter,
    ):
        result = train(
            learner, params, _hyperparameters(learner.config, runs), held_out,
            steps=FLAGS.steps, seeds=[run["seed"] for run in runs],
            loads=[run["load"] for run in runs] if "load" in runs[0] else None,
            devices=devices, evaluate_every=FLAGS.evaluate_every, folder=folder,
            checkpoint_every_s=60 * FLAGS.checkpoint_minutes, should_stop=should_stop,
            progress_fn=reporter.report if reporter else lambda progress: None,
        )  # fmt: skip
    if leads():
        _write_summary(result, folder)
    if not result.finished:
        print("stopped: go on with --resume")
        sys.exit(128 + signal.SIGTERM)


def _devices() -> list[jax.Device]:
    """Returns the devices that share the work; none for the one that JAX takes by itself.

    Raises:
      InputError: there are not so many, or the processes do not find each other.
    """
    if FLAGS.deterministic:  # read when JAX first looks for devices
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    if FLAGS.distributed:
        try:
            jax.distributed.initialize(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"--distributed: {str(error).splitlines()[0]}") from error
    there = jax.devices()
    if FLAGS.devices is None:
        return there if FLAGS.distributed else []
    if FLAGS.devices > len(there) or (FLAGS.distributed and FLAGS.devices != len(there)):
        raise InputError(f"--devices={FLAGS.devices}: there are {len(there)} devices of kind {there[0].platform}")
    return there[: FLAGS.devices]


def _settings() -> dict[str, str]:
    settings = {}
    for text in FLAGS.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set={text}: give FIELD=VALUE, with commas between several")
        settings[name.strip()] = value.strip()
    for name in ("num_envs", "learning_rate"):
        if FLAGS[name].value is not None:
            settings[name] = str(FLAGS[name].value)
    return settings


def _runs(config: AgentConfig, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Returns what each of the runs side by side has of its own: ``seed``, and values by the names of --vary.

    Raises:
      InputError: what is to vary is no number of the algorithm, and not the load, or the load is drawn.
    """
    varied: dict[str, Sequence[float]] = {}
    for text in FLAGS.vary:
        name, _, values = text.partition("=")
        if name == "load":
            varied[name] = common.numbers("vary=load", values.split(","))
            if FLAGS.load is not None or {"load", "all"}.intersection(FLAGS.randomise):
                raise InputError(f"--vary={text}: the load is given or drawn already, by --load or --randomise")
        else:
            can_vary = [path for path, _ in leaves(configs.to_dict(config)["hyper"])]
            if not any(f".{path}".endswith(f".{name}") for path in can_vary):
                raise InputError(f"--vary={text}: choose load, or one of {', '.join(can_vary)}")
            varied[name] = _varied(text, values)
            overridden(config, {name: repr(varied[name][0])})
    return [
        dict(zip(varied, values, strict=True)) | {"seed": seed}
        for values in itertools.product(*varied.values())
        for seed in seeds
    ]


def _varied(text: str, values: str) -> list[float]:
    with contextlib.suppress(ValueError):
        numbers = [float(value) for value in values.split(",")]
        if np.isfinite(numbers).all():
            return numbers
    raise InputError(f"--vary={text}: give FIELD=NUMBER,NUMBER")


def _hyperparameters(config: AgentConfig, runs: Sequence[Mapping[str, Any]]) -> Hyperparameters:
    """Returns the numbers of all runs, leaves [runs]."""
    each = [
        overridden(config, {name: repr(value) for name, value in run.items() if name not in ("seed", "load")}).hyper
        for run in runs
    ]
    return jax.tree.map(lambda *values: np.array(values, np.float32), *each)


def _worlds(env: Environment, agent: AgentConfig, params: EnvParams) -> tuple[EnvParams, HeldOut]:
    """Returns the parameters of the environments to train in, and what the policy is judged by."""
    loads = tuple(common.numbers("load", FLAGS.load))
    drawn = set(_DRAWN if FLAGS.randomise == ["all"] else FLAGS.randomise)
    if unknown := drawn.difference(_DRAWN):
        raise InputError(f"--randomise={min(unknown)}: choose all, or some of {', '.join(_DRAWN)}")
    if len(loads) > 1:
        drawn.add("load")
    held_out = HeldOut(
        _held_out_params(params),
        loads or (_HELD_OUT_LOADS if "load" in drawn else (_DEFAULT_LOAD,)),
        FLAGS.evaluation_envs,
        FLAGS.evaluation_steps,
    )
    params = params.at_load(*(loads[:1] or (_DEFAULT_LOAD,)))
    if not drawn:
        return params, held_out
    drawn_from = Domain(
        loads=(loads or randomization.LOADS) if "load" in drawn else (),
        arrivals=randomization.ARRIVALS if "arrivals" in drawn else (),
        predictions=randomization.PREDICTIONS if "prediction" in drawn else (),
        staleness_s=(0.0, float(params.staleness_s)) if "staleness" in drawn else (),
        latency_limits_s=randomization.LATENCY_LIMITS_S if "limit" in drawn else (),
        pairs=randomization.PAIRS if "fleet" in drawn else (),
    )
    key = jax.random.fold_in(jax.random.key(FLAGS.seed), 1)
    return sample_worlds(env, params, drawn_from, key, agent.num_envs), held_out


def _with_most_rate(agent: AgentConfig, env: Environment, params: EnvParams, load: float) -> AgentConfig:
    """Returns the agent with ``rate_clip_per_s``, unless it has one, of its worlds at the greatest ``load`` asked for."""
    if agent.network.rate_clip_per_s is not None:
        return agent
    network = dataclasses.replace(agent.network, rate_clip_per_s=randomization.rate_clip_per_s(env, params, load))
    return dataclasses.replace(agent, network=network)


def _held_out_params(params: EnvParams) -> EnvParams:
    """Returns the same world with the other half of the trace and the other prompts."""
    if FLAGS.trace is None and FLAGS.quality_table is None:
        return params
    before = {name: FLAGS[name].value for name in ("trace_part", "table_part")}
    FLAGS["trace_part"].value, FLAGS["table_part"].value = "second", "test"
    try:
        return common.world_from_flags()[1]
    finally:
        for name, value in before.items():
            FLAGS[name].value = value


def _flags_given() -> dict[str, str]:
    """Returns the flags of the command line and of flag files that belong to the run, as they are typed."""
    return {name: FLAGS[name].serialize() for name in FLAGS if FLAGS[name].present and name not in _MAY_CHANGE}


def _take_flags(folder: RunFolder) -> None:
    """Sets the flags that a run began with.

    Raises:
      InputError: another value is given for one of them.
    """
    began = folder.config.get("flags", {})
    for name, typed in _flags_given().items():
        if typed != began.get(name) and (name in began or FLAGS[name].value != FLAGS[name].default):
            raise InputError(f"{typed}: the run in {folder.path} began with {began.get(name) or 'the default'}")
    FLAGS([sys.argv[0], *(typed for name, typed in began.items() if not FLAGS[name].present)])


def _sizes(learner: Learner, params: EnvParams, num_runs: int, devices: Sequence[jax.Device]) -> str:
    """Says how large the runs are.

    Raises:
      InputError: they do not fit into memory.
    """
    state = jax.eval_shape(learner.init, jax.random.key(0), params, learner.config.hyper)
    weights = sum(leaf.size for leaf in jax.tree.leaves(learner.weights(state)))
    here = available_bytes(jax.local_devices()[0])
    on_cpu = jax.default_backend() == "cpu"  # whose devices share the machine's memory
    fits = check_fits(needed_bytes(state), num_runs, 1 if on_cpu else max(len(devices), 1), here)
    return (
        f"{FLAGS.agent} on {FLAGS.preset}: {weights:,} weights, {learner.steps_per_chunk:,} steps in a chunk, "
        f"{num_runs} side by side\n{fits}"
    )


def _write_summary(result: TrainResult, folder: RunFolder) -> None:
    """Writes the learning curve, and prints what came out."""
    picture = io.BytesIO()
    plots.learning_curve(result.records).savefig(picture, format="png")
    write_whole(folder.path / "learning_curve.png", picture.getvalue())
    last = next(record for record in reversed(result.records) if record["kind"] == "evaluation")
    interval = f"[{last['low']:+.4f}, {last['high']:+.4f}]"
    print(f"compilation: {result.compile_s:.1f} s")
    print(
        f"{FLAGS.agent}: held-out QoS {np.mean(last['qos']):.4f}, impact_greedy {last['impact_greedy']:.4f}, "
        f"difference {last['gain']:+.4f} {interval}, after {result.steps:,} steps in {result.train_s / 60:.1f} min"
    )
    print(f"written: {folder.path}")


class _Reporter:
    """Shows progress as a bar, and writes it down for TensorBoard."""

    def __init__(self, folder: RunFolder, runs: Sequence[Mapping[str, Any]]) -> None:
        self.names = ["_".join(f"{name}_{value:g}" for name, value in run.items()) for run in runs]
        self.board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=(folder.latest or 0) + 1)
        self.bar = tqdm(total=FLAGS.steps, bar_format=_BAR, desc="compiles: ", unit_scale=True, dynamic_ncols=True)

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        self.board.close()

    def report(self, progress: Progress) -> None:
        """Takes what has just happened."""
        self.bar.total, self.bar.n = progress.total_steps, progress.steps
        self.bar.desc = ""
        parts = [] if np.isnan(progress.left_s) else [f"{progress.steps_per_s:,.0f} steps/s"]
        if progress.evaluation is not None:
            qos, other = np.mean(progress.evaluation["qos"]), progress.evaluation["impact_greedy"]
            parts.append(f"QoS {qos:.4f} (impact_greedy {other:.4f})")
        if not np.isnan(progress.left_s):
            parts.append(f"{tqdm.format_interval(progress.left_s)} left")
        self.bar.set_postfix_str(", ".join(parts))
        for name, value in _scalars(progress.record, self.names):
            self.board.add_scalar(name, value, progress.steps)


def _scalars(record: Mapping[str, Any], runs: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Returns the numbers of a record by name; lists of several runs one by one."""
    kind = record["kind"]
    values = record["metrics"] if kind == "train" else {name: record[name] for name in ("qos", "gain", "impact_greedy")}
    for name, value in values.items():
        each = value if isinstance(value, list) else [value]
        tags = [f"{kind}/{name}"] if len(each) == 1 else [f"{kind}/{name}/{run}" for run in runs]
        yield from ((tag, number) for tag, number in zip(tags, each, strict=True) if number is not None)


@contextlib.contextmanager
def _stop_asked() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether SIGTERM or Ctrl-C came; the second one ends the program at once."""
    came: list[int] = []

    def come(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, come) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    common.start(define_flags, main)
