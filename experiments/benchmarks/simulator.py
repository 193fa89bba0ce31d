"""Measures speed, as ratios taken in one run: the simulator against a plain-Python and a compiled scalar loop.

python -m experiments.benchmarks.simulator --suite=sim --out=benchmark.json

--suite=train measures the learner instead: steps and memory, a decision, the encoder's two forms. --suite=peers
measures the same agent in PyTorch beside it, and needs the extra sb3. --suite=roofline says what limits a step and an
update, on this device and on GPUs.

Run from a checkout: the plain-Python loop is the one that the tests hold the engine to.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

# To train, one device has all cores; else each core is a device.
if not {"--suite=train", "--suite=peers", "--suite=roofline"} & {*sys.argv}:
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={os.cpu_count()}")

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.benchmarks import native_loop, roofline, training
from qos_jax.io.files import write_whole
from qos_jax.io.provenance import versions
from qos_jax.programs import common
from qos_jax.sim.batching import map_environments
from qos_jax.sim.capacity import sample_requests
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.types import RequestTrace
from qos_jax.worlds.presets import make
from tests.helpers.reference import Job, ReferenceExpert

FLAGS = flags.FLAGS
_CASES = (  # preset, environments, load, answers so many times as long
    *(("paper-3", num_envs, 0.8, 1) for num_envs in (1, 16, 256, 1024, 4096)),
    ("paper-3", 1024, 1.1, 1),
    ("paper-3", 1024, 0.8, 8),
    ("paper-6", 1024, 0.8, 1),
    ("edge-8", 1024, 0.8, 1),
    ("edge-8", 4096, 0.8, 1),
    ("edge-8", 1024, 1.1, 1),
    ("edge-64", 64, 0.8, 1),
    ("edge-64", 4096, 0.8, 1),
)


def define_flags() -> None:
    """Defines the flags of this program."""
    flags.DEFINE_enum("suite", "sim", ["sim", "train", "peers", "roofline"], "What to measure.")
    flags.DEFINE_integer("requests", 400_000, "Requests of each case, over all environments.", lower_bound=10_000)
    flags.DEFINE_string("out", "benchmark.json", "File for the results.")


def main(argv: list[str]) -> None:
    """Measures each case, prints a line for it and writes all of them."""
    del argv
    rows = []
    for row in _rows():
        rows.append(row)
        numbers = (f"{name} {value:,.4g}" for name, value in row.items() if isinstance(value, float | int))
        print(f"{row['case']:34} {'  '.join(numbers)}", flush=True)
    write_whole(FLAGS.out, json.dumps({"versions": versions(), "rows": rows}, indent=1))


def _rows() -> Iterator[dict[str, Any]]:
    if FLAGS.suite == "sim":
        return _simulator_rows()
    if FLAGS.suite == "train":
        return training.rows()
    if FLAGS.suite == "roofline":
        return roofline.rows()
    from experiments.benchmarks import pytorch  # needs torch, which is no dependency

    return pytorch.rows()


def _simulator_rows() -> Iterator[dict[str, Any]]:
    loops: dict[tuple[str, float, int], tuple[float, float]] = {}
    for preset, num_envs, load, stretch in _CASES:
        env, params = make(preset, load=load)
        params = _with_longer_answers(params, stretch)
        if (preset, load, stretch) not in loops:
            loops[preset, load, stretch] = _python_rate(env, params), _native_rate(params)
        python_rate, native_rate = loops[preset, load, stretch]
        case = f"{preset} x {num_envs} at {load}" + (f", {stretch} x tokens" if stretch > 1 else "")
        row: dict[str, Any] = {"case": case, "num_envs": num_envs, "load": load}
        row |= _simulator_row(env, params, num_envs, max(FLAGS.requests // num_envs, 50))
        row["ratio_python"] = row["requests_per_cpu_s"] / python_rate
        row["ratio_native"] = row["requests_per_cpu_s"] / native_rate
        row |= {"python_requests_per_s": python_rate, "native_requests_per_s": native_rate}
        yield row


def _with_longer_answers(params: EnvParams, stretch: int) -> EnvParams:
    """Returns a world whose answers are so many times as long, and whose requests come so many times as rarely."""
    workload: Any = params.workload
    content = workload.content
    content = content.replace(
        log_length_mean=content.log_length_mean + np.log(stretch), max_output_tokens=content.max_output_tokens * stretch
    )
    slower = workload.with_rate(workload.arrivals.rate_per_s / stretch)
    return params.replace(workload=slower.replace(content=content))


def _simulator_row(env: Environment, params: EnvParams, num_envs: int, steps: int) -> dict[str, Any]:
    devices = min(jax.device_count(), num_envs)
    mesh = jax.make_mesh((devices,), ("env",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    spec = PartitionSpec("env")
    keys = jax.device_put(jax.random.split(jax.random.key(0), num_envs), NamedSharding(mesh, spec))
    many = jax.shard_map(_episodes(env, params, steps), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    start = time.perf_counter()
    program = jax.jit(many).lower(keys).compile()
    compile_s = time.perf_counter() - start
    (_, passes), wall_s, cpu_s = _timed(lambda: jax.block_until_ready(program(keys)))
    state = jax.eval_shape(lambda key: env.reset(key, params)[1], jax.random.key(0))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return {
        "experts": env.spec.num_experts,
        "router": "shortest_queue",
        "requests_per_s": num_envs * steps / wall_s,
        "requests_per_cpu_s": num_envs * steps / cpu_s,
        "trips_per_step": float(np.mean(passes)) / steps,
        "compile_s": compile_s,
        "bytes_per_env": size,
    }


def _episodes(env: Environment, params: EnvParams, steps: int) -> Callable[[Array], tuple[Array, Array]]:
    """Returns what plays one episode for each key [E] with the shortest queue: QoS and loop passes [E]."""

    def play(key: Array) -> tuple[Array, Array]:
        def step(carry: Any, key: Array) -> Any:
            obs, state = carry
            action = jnp.argmin(obs.experts.running + obs.experts.waiting)
            obs, state, reward, _, _, info = env.step(key, state, action, params)
            return (obs, state), (reward, info["completions"].passes)

        key_reset, key_steps = jax.random.split(key)
        _, (reward, passes) = lax.scan(step, env.reset(key_reset, params), jax.random.split(key_steps, steps))
        return jnp.sum(reward), jnp.sum(passes)

    return lambda keys: map_environments(play, keys)


def _trace(params: EnvParams, num_requests: int) -> RequestTrace:
    gaps_s, requests = sample_requests(params.workload, jax.random.key(1), num_requests)
    arrival_s = np.cumsum(np.asarray(gaps_s, np.float64))
    return RequestTrace(arrival_s, np.asarray(requests.prompt_tokens), np.asarray(requests.output_tokens))


def _native_rate(params: EnvParams) -> float:
    """Returns the requests per second of the compiled scalar loop on one core, requests drawn beforehand."""
    trace = _trace(params, 100_000)
    experts = jax.tree.map(np.asarray, params.experts)
    native_loop.simulate(experts, trace)
    _, wall_s, _ = _timed(lambda: native_loop.simulate(experts, trace))
    return 100_000 / wall_s


def _python_rate(env: Environment, params: EnvParams) -> float:
    """Returns the requests per second of the plain-Python loop, iteration by iteration, on one core."""
    num_requests = 3000
    trace = _trace(params, num_requests)
    experts = jax.tree.map(lambda x: np.asarray(x).tolist(), params.experts)
    fleet = [ReferenceExpert(experts, n, 2048, 16) for n in range(env.spec.num_experts)]

    def serve() -> None:
        for j in range(num_requests):
            now_s = float(trace.arrival_s[j])
            for expert in fleet:
                expert.run_until(now_s)
            chosen = min(range(len(fleet)), key=lambda n: len(fleet[n].running) + len(fleet[n].waiting))
            fleet[chosen].offer(Job(int(trace.prompt_tokens[j]), int(trace.output_tokens[j, chosen])), now_s)

    _, wall_s, _ = _timed(serve)
    return num_requests / wall_s


def _timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """Returns the result, wall-clock seconds and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    common.start(define_flags, main)
