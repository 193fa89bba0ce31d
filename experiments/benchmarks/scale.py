"""The suite ``scale``: requests/s of simulation and of training against the number of environments on one device.

All programs are compiled first, side by side, and then timed one after the other.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.simulator import episodes
from experiments.benchmarks.timing import timed
from qos_jax.agent import AGENTS, make_learner
from qos_jax.worlds.build import make

_SIMULATIONS = {  # environments, by preset
    "paper-3": (256, 1024, 4096, 16_384),
    "edge-8": (256, 1024, 4096, 16_384),
    "edge-64": (1024, 4096),
}
_LEARNERS = {"paper-3": (128, 1024, 4096)}  # likewise, in training
_LOAD = 0.8
_STEPS = 200  # requests of each environment
_CHUNKS = 5

Measured = Callable[[], dict[str, Any]]


def rows() -> Iterator[dict[str, Any]]:
    """Measures requests/s by number of environments: of the shortest queue on every preset, then of training."""
    cases = [partial(_simulation, preset, count) for preset, counts in _SIMULATIONS.items() for count in counts]
    cases += [partial(_training, preset, count) for preset, counts in _LEARNERS.items() for count in counts]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = list(pool.map(lambda case: case(), cases))
    for measure in compiled:
        yield measure()


def _simulation(preset: str, num_envs: int) -> Measured:
    """Returns what measures steps of environments, compiled."""
    env, params = make(preset, load=_LOAD)
    keys = jax.random.split(jax.random.key(0), num_envs)
    program = jax.jit(episodes(env, params, _STEPS)).lower(keys).compile()

    def measure() -> dict[str, Any]:
        jax.block_until_ready(program(keys))  # the first call loads it
        (_, passes), wall_s, _ = timed(lambda: program(keys))
        return {
            "case": f"simulate {preset} x {num_envs}",
            "num_envs": num_envs,
            "requests_per_s": num_envs * _STEPS / wall_s,
            "ms_per_step": 1e3 * wall_s / _STEPS,
            "passes_per_step": float(jnp.mean(passes)) / _STEPS,
        }

    return measure


def _training(preset: str, num_envs: int) -> Measured:
    """Returns what measures chunks of training by ``mvr``, compiled; the batch grows with the environments."""
    env, params = make(preset, load=_LOAD)
    base = AGENTS["mvr"]
    factor = num_envs // base.num_envs
    config = dataclasses.replace(
        base, num_envs=num_envs, batch_size=base.batch_size * factor, capacity=base.capacity * factor
    )
    learner, hyper = make_learner(env, config), config.hyper

    def start() -> Any:
        return learner.warm_up(learner.init(jax.random.key(0), params, hyper), params, hyper)

    first = jax.jit(start).lower().compile()
    chunk = jax.jit(learner.train_chunk, donate_argnums=0)
    like = jax.eval_shape(start)
    program = chunk.lower(like, params, hyper, jnp.int32(0), jnp.float32(0)).compile()

    def measure() -> dict[str, Any]:
        def chunks(state: Any, begin: int, end: int) -> Any:
            for i in range(begin, end):
                state, metrics = program(state, params, hyper, jnp.int32(i), jnp.float32(0))
            return jax.block_until_ready((state, metrics))

        state, _ = chunks(first(), 0, 1)
        _, wall_s, _ = timed(lambda: chunks(state, 1, 1 + _CHUNKS))
        requests = _CHUNKS * learner.steps_per_chunk
        return {
            "case": f"train mvr on {preset} x {num_envs}",
            "num_envs": num_envs,
            "requests_per_s": requests / wall_s,
            "s_per_chunk": wall_s / _CHUNKS,
            "updates_per_s": _CHUNKS * config.updates / wall_s,
        }

    return measure
