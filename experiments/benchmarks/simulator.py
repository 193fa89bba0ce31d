"""The suite ``sim``: environment steps against a plain-Python loop and a compiled scalar loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from experiments.benchmarks import native_loop
from experiments.benchmarks.devices import spread_environments
from experiments.benchmarks.timing import timed
from qos_jax.sim.batching import map_environments
from qos_jax.sim.capacity import sample_requests
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, RequestTrace
from qos_jax.worlds.build import make
from tests.helpers.reference import Job, ReferenceExpert

_CASES = (  # preset, environments, load, factor on the answers' lengths
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
_MIN_STEPS = 50
_NATIVE_REQUESTS, _PYTHON_REQUESTS = 100_000, 3000


def rows(num_requests: int) -> Iterator[dict[str, Any]]:
    """Measures case by case.

    Args:
      num_requests: of each case, over all environments; at least 50 of each environment.
    """
    loops: dict[tuple[str, float, int], tuple[float, float]] = {}
    for preset, num_envs, load, stretch in _CASES:
        env, params = make(preset, load=load)
        params = _with_longer_answers(params, stretch)
        if (preset, load, stretch) not in loops:
            loops[preset, load, stretch] = _python_rate(env, params), _native_rate(params)
        python_rate, native_rate = loops[preset, load, stretch]
        case = f"{preset} x {num_envs} at {load}" + (f", {stretch} x tokens" if stretch > 1 else "")
        row: dict[str, Any] = {"case": case, "num_envs": num_envs, "load": load}
        row |= _simulator_row(env, params, num_envs, max(num_requests // num_envs, _MIN_STEPS))
        row["ratio_python"] = row["requests_per_cpu_s"] / python_rate
        row["ratio_native"] = row["requests_per_cpu_s"] / native_rate
        row |= {"python_requests_per_s": python_rate, "native_requests_per_s": native_rate}
        yield row


def _with_longer_answers(params: EnvParams, stretch: int) -> EnvParams:
    """Returns a world whose answers are ``stretch`` times as long and whose arrival rate is divided by ``stretch``."""
    workload: Any = params.workload
    content = workload.content
    content = content.replace(
        log_length_mean=content.log_length_mean + np.log(stretch), max_output_tokens=content.max_output_tokens * stretch
    )
    slower = workload.with_rate(workload.arrivals.rate_per_s / stretch)
    return params.replace(workload=slower.replace(content=content))


def _simulator_row(env: Environment, params: EnvParams, num_envs: int, steps: int) -> dict[str, Any]:
    keys, spread = spread_environments(num_envs)
    start = time.perf_counter()
    program = jax.jit(spread(episodes(env, params, steps))).lower(keys).compile()
    compile_s = time.perf_counter() - start
    (_, passes), wall_s, cpu_s = timed(lambda: program(keys))
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


def episodes(env: Environment, params: EnvParams, steps: int) -> Callable[[Array], tuple[Array, Array]]:
    """Returns a function of keys [E]: the QoS and the engine passes [E] of one episode each, by the shortest queue."""

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
    """Returns the requests/s of the compiled scalar loop on one core; sampling the requests is not timed."""
    trace = _trace(params, _NATIVE_REQUESTS)
    experts = jax.tree.map(np.asarray, params.experts)
    native_loop.simulate(experts, trace)  # compiles
    _, wall_s, _ = timed(lambda: native_loop.simulate(experts, trace))
    return _NATIVE_REQUESTS / wall_s


def _python_rate(env: Environment, params: EnvParams) -> float:
    """Returns the requests/s of the plain-Python loop, iteration by iteration, on one core."""
    trace = _trace(params, _PYTHON_REQUESTS)
    experts = jax.tree.map(lambda x: np.asarray(x).tolist(), params.experts)
    fleet = [ReferenceExpert(experts, n, None, BLOCK_SIZE_TOKENS) for n in range(env.spec.num_experts)]

    def serve() -> None:
        for j in range(_PYTHON_REQUESTS):
            now_s = float(trace.arrival_s[j])
            for expert in fleet:
                expert.run_until(now_s)
            chosen = min(range(len(fleet)), key=lambda n: len(fleet[n].running) + len(fleet[n].waiting))
            fleet[chosen].offer(Job(int(trace.prompt_tokens[j]), int(trace.output_tokens[j, chosen])), now_s)

    _, wall_s, _ = timed(serve)
    return _PYTHON_REQUESTS / wall_s
