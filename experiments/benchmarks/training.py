"""The measurements of ``experiments.benchmarks.simulator --suite=train``: learning, deciding, and the encoder's two forms."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jax import Array

from qos_jax.agent import AGENTS, Learner, make_learner
from qos_jax.agent.replay_buffer import num_bytes
from qos_jax.encoder.graph import GraphFeatures, graph_features
from qos_jax.encoder.han import HAN
from qos_jax.encoder.han_ragged import segment_encode
from qos_jax.encoder.jraph_views import to_graphs
from qos_jax.routers import make_router
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.types import Observation
from qos_jax.worlds.presets import make

_LEARNERS = (
    ("paper-3", "mvr"),
    ("paper-3", "mvr_no_graph"),
    ("paper-3", "sac"),
    ("paper-3", "paper"),
    ("edge-8", "mvr"),
)
_CHUNKS = 30
_DECISIONS = 300
_GRAPHS = 64


def rows(load: float = 0.9) -> Iterator[dict[str, Any]]:
    """Measures one case after the other."""
    for preset, agent in _LEARNERS:
        yield learner_row(preset, agent, load)
    for preset in ("paper-3", "edge-8"):
        yield from _decision_rows(preset, load)
    yield _encoder_row("paper-3", load)


def learner_row(preset: str, agent: str, load: float) -> dict[str, Any]:
    """Times chunks of a learner, after the first."""
    env, params = make(preset, load=load)
    learner = make_learner(env, AGENTS[agent])
    config, hyper = learner.config, learner.config.hyper
    start = time.perf_counter()
    state = jax.jit(learner.warm_up)(jax.jit(learner.init)(jax.random.key(0), params, hyper), params, hyper)
    chunk = jax.jit(learner.train_chunk, donate_argnums=0)
    state, metrics = chunk(state, params, hyper, jnp.int32(0), jnp.float32(0))
    jax.block_until_ready(metrics)
    compile_s = time.perf_counter() - start
    start = time.perf_counter()
    for i in range(1, 1 + _CHUNKS):
        state, metrics = chunk(state, params, hyper, jnp.int32(i), jnp.float32(0))
    jax.block_until_ready(metrics)
    steps_per_s = _CHUNKS * learner.steps_per_chunk / (time.perf_counter() - start)
    return {
        "case": f"train {agent} on {preset}",
        "steps_per_s": steps_per_s,
        "minutes_per_million_steps": (compile_s + 1e6 / steps_per_s) / 60,
        "compile_s": compile_s,
        "samples_per_step": config.updates * config.batch_size / learner.steps_per_chunk,
        "bytes_per_env": num_bytes(state.envs) // config.num_envs,
        "bytes_of_twins_per_env": num_bytes(state.probes) // config.num_envs,
        "replay_bytes": num_bytes(state.replay),
        "weights": sum(leaf.size for leaf in jax.tree.leaves(learner.weights(state))),
    }


def _decision_rows(preset: str, load: float) -> Iterator[dict[str, Any]]:
    """Times one decision at a time, from observation to action, on observations along an episode."""
    env, params = make(preset, load=load)
    learner = make_learner(env, AGENTS["mvr"])
    observations = _observations(env, params, _DECISIONS)
    weights = _weights(learner, env, params)
    yield {"case": f"decide ours on {preset}"} | _decision(learner.router(weights).act, (), observations)
    for name in ("impact_greedy", "rollout"):
        router = make_router(name, env.spec.num_experts, params.workload)
        few = observations if name != "rollout" else observations[:: _DECISIONS // 10]
        yield {"case": f"decide {name} on {preset}"} | _decision(router.act, router.init(), few)


def _decision(act: Callable[..., Any], memory: Any, observations: list[Observation]) -> dict[str, Any]:
    decide = jax.jit(lambda obs: act(jax.random.key(0), obs, memory)[0])
    decide(observations[0]).block_until_ready()
    times_s = []
    for obs in observations:
        start = time.perf_counter()
        decide(obs).block_until_ready()
        times_s.append(time.perf_counter() - start)
    return {"median_ms": 1e3 * statistics.median(times_s), "p99_ms": 1e3 * float(np.quantile(times_s, 0.99))}


def _encoder_row(preset: str, load: float) -> dict[str, Any]:
    """Times the encoder on a batch of graphs, dense and ragged."""
    env, params = make(preset, load=load)
    seen = [graph_features(obs) for obs in _observations(env, params, _GRAPHS)]
    dense: GraphFeatures = jax.tree.map(lambda *x: jnp.stack(x), *seen)
    config = AGENTS["mvr"].network.han
    variables = HAN(config).init(jax.random.key(0), dense)
    ragged = [to_graphs(one) for one in seen]
    graphs = {relation: jraph.batch_np([one[relation] for one in ragged]) for relation in ragged[0]}
    forms: dict[str, Callable[[Any], Array]] = {
        "dense": lambda v: jnp.sum(HAN(config).apply(v, dense).arrived),  # type: ignore[union-attr]
        "segment": lambda v: jnp.sum(segment_encode(v, config, graphs).arrived),
    }
    row: dict[str, Any] = {"case": f"encode {_GRAPHS} graphs of {preset}"}
    for name, form in forms.items():
        row[f"{name}_forward_ms"] = 1e3 * median_s(jax.jit(form), variables)
        row[f"{name}_gradient_ms"] = 1e3 * median_s(jax.jit(jax.grad(form)), variables)
    return row


def median_s(function: Callable[..., Any], *arguments: Any) -> float:
    """Returns the median time of some calls, after a first one."""
    jax.block_until_ready(function(*arguments))
    times_s = []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times_s.append(time.perf_counter() - start)
    return statistics.median(times_s)


def _weights(learner: Learner, env: Environment, params: EnvParams) -> Any:
    obs, _ = env.reset(jax.random.key(0), params)
    return learner.network.init(jax.random.key(0), learner.features(obs))


def _observations(env: Environment, params: EnvParams, count: int) -> list[Observation]:
    """Returns what is seen along an episode of the shortest queue, from the 200th request on."""
    router = make_router("shortest_queue", env.spec.num_experts)

    def step(carry: Any, key: Array) -> tuple[Any, Observation]:
        obs, state = carry
        action, _ = router.act(key, obs, ())
        after, state, *_ = env.step(key, state, action, params)
        return (after, state), obs

    keys = jax.random.split(jax.random.key(1), 200 + count)
    _, seen = jax.jit(lambda: jax.lax.scan(step, env.reset(jax.random.key(0), params), keys))()
    return [jax.tree.map(lambda x, i=i: x[i], seen) for i in range(200, 200 + count)]
