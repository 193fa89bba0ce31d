"""The measurements of ``experiments.benchmarks.simulator --suite=roofline``: what limits a step and an update, here and elsewhere.

For each program XLA says how many operations and bytes one pass through it takes. A device needs at least the longer of
operations / peak rate and bytes / memory bandwidth, and on a GPU at least a launch for each kernel. What a device could
reach at best is printed beside what is measured on this one, whose own peaks are measured first.

XLA counts the body of a loop once, so the simulator is measured as one pass of the engine on all environments, and a
step takes several (``trips_per_step``, from ``--suite=sim``). The bytes are those of the operands of every kernel. On a
CPU most of them are in a cache, as environments are followed in blocks that fit there, so the bound is of the cache; a
GPU is taken at its memory's bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.benchmarks.training import median_s
from qos_jax.agent import AGENTS, make_learner, replay_buffer, sac
from qos_jax.agent.targets import targets_named
from qos_jax.agent.targets.counterfactual import CounterfactualTarget
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.worlds.presets import make

_ENVS = {"paper-3": 1024, "edge-8": 1024}
_GPUS = {"RTX 4090": (82.6e12, 1.008e12), "H100 SXM": (66.9e12, 3.35e12)}  # float32 FLOP/s, bytes/s, by their makers
_LAUNCH_S = 2e-6  # of a kernel within one program
_MATRIX = 2048
_MEMORY_BYTES, _CACHE_BYTES = 256 << 20, 1 << 20  # of arrays that are in memory, and in a core's cache

_Case = tuple[str, int, Callable[..., Any], tuple[Any, ...]]  # its name, units in one call, a program and its arguments


def rows(load: float = 0.9) -> Iterator[dict[str, Any]]:
    """Measures this device, then each program on it."""
    peak_flops, peak_bytes = _peak_flops_per_s(), _bytes_per_s(_CACHE_BYTES)
    yield {
        "case": "this device", "flops_per_s": peak_flops, "bytes_per_s": peak_bytes,
        "bytes_per_s_of_memory": _bytes_per_s(_MEMORY_BYTES),
    }  # fmt: skip
    for preset, num_envs in _ENVS.items():
        env, params = make(preset, load=load)
        for case, units, program, arguments in (
            _pass_of(env, params, num_envs),
            _update_of(env, params, "mvr"),
        ):
            compiled = jax.jit(program).lower(*arguments).compile()
            cost: Any = compiled.cost_analysis()
            kernels = _kernels(compiled.as_text() or "")
            bound_s = max(cost["flops"] / peak_flops, cost["bytes accessed"] / peak_bytes)
            taken_s = median_s(compiled, *arguments)
            row = {"case": f"{case} on {preset}", "flops": cost["flops"] / units}
            row |= {"bytes": cost["bytes accessed"] / units, "kernels": kernels}
            row |= {"per_s": units / taken_s, "share_of_roofline": bound_s / taken_s}
            for gpu, (flops_per_s, bytes_per_s) in _GPUS.items():
                best_s = max(cost["flops"] / flops_per_s, cost["bytes accessed"] / bytes_per_s, kernels * _LAUNCH_S)
                row[f"at_best_per_s_on_{gpu}"] = units / best_s
            yield row


def _pass_of(env: Environment, params: EnvParams, num_envs: int) -> _Case:
    """One step of all environments with every loop of the engine counted, or run, once: nearly no time goes by."""
    keys = jax.random.split(jax.random.key(0), num_envs)
    crowded = params.replace(workload=params.workload.with_rate(1e5))
    obs, states = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))(keys, crowded)
    step = jax.vmap(env.step, in_axes=(0, 0, 0, None))
    actions = jnp.argmin(obs.experts.running + obs.experts.waiting, -1)
    return "one pass for an environment", num_envs, step, (keys, states, actions, crowded)


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
    """Returns about how many kernels a compiled program launches: its fusions, products and reductions, loops once."""
    return sum(program.count(f" {kind}(") for kind in ("fusion", "dot", "convolution", "reduce", "sort", "custom-call"))


def _peak_flops_per_s() -> float:
    matrix, product = jnp.ones((_MATRIX, _MATRIX)), jax.jit(jnp.matmul)
    return 2 * _MATRIX**3 / median_s(product, matrix, matrix)


def _bytes_per_s(size: int) -> float:
    """Returns what is read and written per second where an array of so many bytes is scaled again and again."""
    times = max(1, (1 << 30) // size)
    scaled = jax.jit(lambda x: lax.fori_loop(0, times, lambda _, x: 0.999 * x, x))
    return 2 * size * times / median_s(scaled, jnp.ones(size // 4))
