"""Measures whether the float32 environment stays true in the long run: a week of it beside a float64 replay.

python -m experiments.benchmarks.endurance --preset=paper-3 --load=0.8 --hours=168 --num_envs=10 --out=endurance.json

Each environment is stepped without a reset by the shortest queue. The same requests and decisions are served again by
the compiled float64 loop of ``experiments.benchmarks.native_loop``, which was written apart from the engine. A float32 simulator
that lost time or requests would drift away; so what both count is compared over the whole run and in each tenth of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={os.cpu_count()}")

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from experiments.benchmarks import native_loop
from qos_jax.errors import InputError
from qos_jax.evaluation.statistics import summarise
from qos_jax.io.files import write_whole
from qos_jax.io.provenance import versions
from qos_jax.programs import common
from qos_jax.sim.batching import map_environments
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.types import ExpertProfile, RequestTrace
from qos_jax.worlds.presets import make

FLAGS = flags.FLAGS
_STRETCH = 10_000  # requests of each environment in one call; short enough for sums in float32
_PARTS = 10
_COUNTS = ("finished", "qos", "latency_per_token_s", "violations")


class Served(NamedTuple):
    """The requests of one environment, in order; leaves [..., requests]."""

    gap_s: Any  # to the next one
    prompt_tokens: Any
    output_tokens: Any  # of the expert that it was sent to, and so
    score: Any
    latency_limit_s: Any
    expert: Any


def define_flags() -> None:
    """Defines the flags of this program."""
    flags.DEFINE_string("preset", "paper-3", "World.")
    flags.DEFINE_float("load", 0.8, "Load, a fraction of the saturation rate.", lower_bound=0.01)
    flags.DEFINE_float("hours", 168.0, "Simulated time of each environment.", lower_bound=0.01)
    flags.DEFINE_integer("num_envs", 10, "Environments, a multiple of the devices.", lower_bound=2)
    flags.DEFINE_string("out", "endurance.json", "File for the results.")


def main(argv: list[str]) -> None:
    """Runs both, prints how far they are apart and writes it."""
    del argv
    if FLAGS.num_envs % jax.device_count():
        raise InputError(f"--num_envs={FLAGS.num_envs} must be a multiple of the {jax.device_count()} devices")
    env, params = make(FLAGS.preset, load=FLAGS.load)
    params = params.replace(max_steps_in_episode=np.iinfo(np.int32).max)
    stretches = round(FLAGS.hours * 3600 * FLAGS.load * float(params.saturation_per_s) / _STRETCH)
    if stretches < _PARTS:
        raise InputError(f"--hours={FLAGS.hours} are {stretches * _STRETCH:,} requests, must be {_PARTS * _STRETCH:,}")
    stretches_served, counted = _float32(env, params, FLAGS.num_envs, stretches)
    experts, replayed = jax.tree.map(np.asarray, params.experts), []
    for i in tqdm(range(FLAGS.num_envs), "float64"):
        served = jax.tree.map(lambda *parts, i=i: np.concatenate([part[i] for part in parts]), *stretches_served)
        replayed.append(_float64(experts, served))
    result = {
        "preset": FLAGS.preset, "load": FLAGS.load, "num_envs": FLAGS.num_envs,
        "requests": stretches * _STRETCH * FLAGS.num_envs,
        "rows": list(_compared(counted, np.stack(replayed))),
    }  # fmt: skip
    write_whole(FLAGS.out, json.dumps({"versions": versions()} | result, indent=1))
    print(f"{result['requests']:,} requests in {FLAGS.num_envs} environments of {FLAGS.hours:g} h")
    for row in result["rows"]:
        texts = (
            f"{name} {row[name]:.6g} +- {row[name + '_half']:.2g}" for name in ("float32", "float64", "difference")
        )
        print(f"{row['metric']:20} {row['part']:10} {'   '.join(texts)}")


def _float32(env: Environment, params: EnvParams, num_envs: int, stretches: int) -> tuple[list[Served], np.ndarray]:
    """Steps the environments; returns what they served in each stretch, and the counts [E, stretches, counts]."""
    mesh = jax.make_mesh((jax.device_count(),), ("env",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("env")
    sharded = partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    walk = jax.jit(sharded(lambda each: map_environments(lambda one: _walk(env, params, *one), each)))
    begin = jax.jit(sharded(jax.vmap(lambda key: env.reset(key, params))))
    keys = jax.device_put(jax.random.split(jax.random.key(0), num_envs), NamedSharding(mesh, spec))
    state, stretches_served, counts = begin(keys), [], []
    for stretch in tqdm(range(stretches), "float32"):
        state, served, counted = walk((jax.vmap(lambda key, i=stretch: jax.random.fold_in(key, i))(keys), state))
        stretches_served.append(jax.tree.map(np.asarray, served))
        counts.append(np.asarray(counted, np.float64))
    return stretches_served, np.stack(counts, 1)


def _walk(env: Environment, params: EnvParams, key: Array, carry: Any) -> tuple[Any, Served, Array]:
    """Goes on for one stretch: what was served, and the sums [counts] over what finished."""

    def step(carry: Any, key: Array) -> Any:
        obs, state = carry
        request, expert = state.request, jnp.argmin(obs.experts.running + obs.experts.waiting)
        obs, state, _, _, _, info = env.step(key, state, expert, params)
        served = Served(
            gap_s=info["gap_s"],
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens[expert],
            score=request.score[expert],
            latency_limit_s=request.latency_limit_s,
            expert=expert,
        )
        return (obs, state), (served, jnp.stack([jnp.float32(getattr(info["completions"], name)) for name in _COUNTS]))

    carry, (served, counts) = lax.scan(step, carry, jax.random.split(key, _STRETCH))
    return carry, served, jnp.sum(counts, 0)


def _float64(experts: ExpertProfile, served: Served) -> np.ndarray:
    """Serves the same requests again; returns the counts [stretches, counts], each stretch ending at the same time."""
    passed_s = np.cumsum(served.gap_s, dtype=np.float64)
    arrival_s = np.concatenate([[0.0], passed_s[:-1]])
    num_experts, expert = len(experts.step_base_s), served.expert
    tokens = np.broadcast_to(served.output_tokens[:, None], (len(expert), num_experts))
    _, log = native_loop.simulate(experts, RequestTrace(arrival_s, served.prompt_tokens, tokens), expert)
    network_s = np.broadcast_to(experts.network_s, num_experts)[expert]
    latency_s = (log.finish_s - arrival_s + network_s) / served.output_tokens
    in_time = latency_s <= served.latency_limit_s
    ends_s = passed_s[_STRETCH - 1 :: _STRETCH]
    stretch = np.searchsorted(ends_s, log.finish_s)
    there = ~log.dropped & (stretch < len(ends_s))
    each = (np.ones(len(expert)), np.where(in_time, served.score, 0.0), latency_s, ~in_time)
    return np.stack([np.bincount(stretch[there], one[there], minlength=len(ends_s)) for one in each], 1)


def _compared(float32: np.ndarray, float64: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yields means and 95 % intervals over environments, of the whole run and of its parts [E, stretches, counts]."""
    parts = np.array_split(np.arange(float32.shape[1]), _PARTS)
    names = ["whole", *(f"{i + 1} of {_PARTS}" for i in range(_PARTS))]
    for name, part in zip(names, [np.arange(float32.shape[1]), *parts], strict=True):
        sums = [counts[:, part].sum(1) for counts in (float32, float64)]  # [E, counts]
        requests = len(part) * _STRETCH
        ratios = {
            "finished": [each[:, 0] / requests for each in sums],
            "qos": [each[:, 1] / requests for each in sums],
            "latency_per_token_s": [each[:, 2] / each[:, 0] for each in sums],
            "violation_rate": [each[:, 3] / each[:, 0] for each in sums],
        }
        for metric, (one, other) in ratios.items():
            row: dict[str, Any] = {"metric": metric, "part": name}
            for label, values in (("float32", one), ("float64", other), ("difference", one - other)):
                told = summarise(values)
                row |= {label: told["mean"], f"{label}_half": told["high"] - told["mean"]}
            yield row


if __name__ == "__main__":
    common.start(define_flags, main)
