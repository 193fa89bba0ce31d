"""The suite ``roofline``: the limits that this device and two GPUs set to an engine pass and a gradient step.

XLA counts the floating-point operations and the bytes of a compiled program. A device needs at least the longer of
operations / peak rate and bytes / memory bandwidth, and a GPU at least one launch time per kernel. The peaks of this
device are measured first; those of the GPUs are the published ones. Each row holds the measured rate, its share of this
device's bound, and the bound on each GPU.

XLA counts the body of a loop once. So the simulator is measured as one engine pass over all environments; a step takes
several (``trips_per_step`` of ``--suite=sim``). The bytes are the operands of every kernel. On a CPU most of them are
in a cache, as environments are simulated in blocks that fit into it, so the bandwidth of the cache counts; for a GPU it
is the bandwidth of its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.benchmarks.timing import median_s
from qos_jax.agent import AGENTS, make_learner, replay_buffer, sac
from qos_jax.agent.targets import targets_named
from qos_jax.agent.targets.counterfactual import CounterfactualTarget
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.worlds.build import make

_PRESETS = ("paper-3", "edge-8")
_LOAD = 0.9
_NUM_ENVS = 1024
_CROWDED_PER_S = 1e5  # arrivals so dense that nearly no time passes between two
_GPUS = {"RTX 4090": (82.6e12, 1.008e12), "H100 SXM": (66.9e12, 3.35e12)}  # published float32 FLOP/s and bytes/s
_LAUNCH_S = 2e-6  # of a kernel within one program
_MATRIX = 2048  # rows and columns of the matrices whose product gives the peak rate
_MEMORY_BYTES, _CACHE_BYTES = 256 << 20, 1 << 20  # sizes of an array in memory and of one in a core's cache

_Case = tuple[str, int, Callable[..., Any], tuple[Any, ...]]  # name, units in one call, program, arguments


def rows() -> Iterator[dict[str, Any]]:
    """Measures this device, then each program on it, at load 0.9."""
    peak_flops, peak_bytes = _peak_flops_per_s(), _bytes_per_s(_CACHE_BYTES)
    yield {
        "case": "this device", "flops_per_s": peak_flops, "bytes_per_s": peak_bytes,
        "bytes_per_s_of_memory": _bytes_per_s(_MEMORY_BYTES),
    }  # fmt: skip
    for preset in _PRESETS:
        env, params = make(preset, load=_LOAD)
        for case in (_pass_of(env, params), _update_of(env, params, "mvr")):
            yield _row(preset, case, peak_flops, peak_bytes)


def _row(preset: str, case: _Case, peak_flops: float, peak_bytes: float) -> dict[str, Any]:
    name, units, program, arguments = case
    compiled = jax.jit(program).lower(*arguments).compile()
    cost: Any = compiled.cost_analysis()
    flops, moved_bytes = cost["flops"], cost["bytes accessed"]
    kernels = _kernels(compiled.as_text() or "")
    bound_s = max(flops / peak_flops, moved_bytes / peak_bytes)
    taken_s = median_s(compiled, *arguments)
    row = {
        "case": f"{name} on {preset}", "flops": flops / units, "bytes": moved_bytes / units, "kernels": kernels,
        "per_s": units / taken_s, "share_of_roofline": bound_s / taken_s,
    }  # fmt: skip
    for gpu, (flops_per_s, bytes_per_s) in _GPUS.items():
        bound_s = max(flops / flops_per_s, moved_bytes / bytes_per_s, kernels * _LAUNCH_S)
        row[f"at_best_per_s_on_{gpu}"] = units / bound_s
    return row


def _pass_of(env: Environment, params: EnvParams) -> _Case:
    """One step of all environments in which the loops of the engine run once: nearly no time passes."""
    keys = jax.random.split(jax.random.key(0), _NUM_ENVS)
    crowded = params.replace(workload=params.workload.with_rate(_CROWDED_PER_S))
    obs, states = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))(keys, crowded)
    step = jax.vmap(env.step, in_axes=(0, 0, 0, None))
    actions = jnp.argmin(obs.experts.running + obs.experts.waiting, -1)
    return "one pass for an environment", _NUM_ENVS, step, (keys, states, actions, crowded)


def _update_of(env: Environment, params: EnvParams, agent: str) -> _Case:
    """One gradient step; a unit is a sample."""
    learner = make_learner(env, AGENTS[agent])
    hyper = jax.tree.map(jnp.float32, learner.config.hyper)
    state = jax.jit(learner.init)(jax.random.key(0), params, hyper)
    count = learner.config.batch_size
    inputs = jax.vmap(learner.features)(jax.tree.map(lambda x: jnp.resize(x, (count, *x.shape[1:])), state.envs[0]))
    targets = targets_named("counterfactual")
    rows = CounterfactualTarget(
        replay_buffer.to_half_precision(inputs), jnp.ones(count, bool), jnp.zeros(inputs.legal.shape)
    )

    def update(learned: Any, rows: CounterfactualTarget) -> Any:
        batch = rows.replace(inputs=replay_buffer.to_single_precision(rows.inputs))
        loss = targets.critic_loss(learner.network, hyper, learned, batch)
        return sac.update(learner.network, hyper, learned, *loss, jnp.float32(0))[0]

    return "one update for a sample", count, update, (state.learner, rows)


def _kernels(program: str) -> int:
    """Returns about how many kernels a compiled program launches, the body of a loop counted once."""
    return sum(program.count(f" {kind}(") for kind in ("fusion", "dot", "convolution", "reduce", "sort", "custom-call"))


def _peak_flops_per_s() -> float:
    matrix, product = jnp.ones((_MATRIX, _MATRIX)), jax.jit(jnp.matmul)
    return 2 * _MATRIX**3 / median_s(product, matrix, matrix)


def _bytes_per_s(size: int) -> float:
    """Returns the bytes/s read and written while an array of ``size`` bytes is scaled again and again."""
    times = max(1, (1 << 30) // size)
    scaled = jax.jit(lambda x: lax.fori_loop(0, times, lambda _, x: 0.999 * x, x))
    return 2 * size * times / median_s(scaled, jnp.ones(size // 4))
