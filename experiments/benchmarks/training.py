"""The suite ``train``: speed and memory of training, the time of one decision, and the dense and the ragged encoder."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jax import Array

from experiments.benchmarks.timing import median_s, timed
from qos_jax.agent import AGENTS, make_learner
from qos_jax.agent.replay_buffer import num_bytes
from qos_jax.encoder.graph import GraphFeatures, graph_features
from qos_jax.encoder.han import HAN
from qos_jax.encoder.han_ragged import segment_encode
from qos_jax.encoder.jraph_views import to_graphs
from qos_jax.routers import Router, make_router
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.types import Observation
from qos_jax.worlds.build import make

_LEARNERS = (
    ("paper-3", "mvr"),
    ("paper-3", "mvr_no_graph"),
    ("paper-3", "sac"),
    ("edge-8", "sac"),
    ("paper-3", "sac_td0"),
    ("paper-3", "paper"),
    ("edge-8", "mvr"),
)
_LOAD = 0.9
_CHUNKS = 30
_DECISIONS = 300
_PLANNER_DECISIONS = 10  # a planner simulates at every decision
_GRAPHS = 64
_BUSY_AFTER = 200  # requests until the fleet is as busy as its load makes it


def rows() -> Iterator[dict[str, Any]]:
    """Measures case by case, all at load 0.9."""
    for preset, agent in _LEARNERS:
        yield learner_row(preset, agent)
    for preset in ("paper-3", "edge-8"):
        yield from _decision_rows(preset)
    yield _encoder_row("paper-3")


def learner_row(preset: str, agent: str) -> dict[str, Any]:
    """Times training chunks of a named agent, after a first chunk that compiles."""
    env, params = make(preset, load=_LOAD)
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
        "bytes_of_probes_per_env": num_bytes(state.beside) // config.num_envs,
        "replay_bytes": num_bytes(state.replay),
        "weights": sum(leaf.size for leaf in jax.tree.leaves(learner.weights(state))),
    }


def _decision_rows(preset: str) -> Iterator[dict[str, Any]]:
    """Times single decisions, from observation to action, on observations along an episode."""
    env, params = make(preset, load=_LOAD)
    observations = _observations(env, params, _DECISIONS)
    learner = make_learner(env, AGENTS["mvr"])
    weights = learner.network.init(jax.random.key(0), learner.features(observations[0]))
    yield {"case": f"decide mvr on {preset}"} | _decision(learner.router(weights), observations)
    for name, every in (("impact_greedy", 1), ("rollout", _DECISIONS // _PLANNER_DECISIONS)):
        router = make_router(name, env, params)
        yield {"case": f"decide {name} on {preset}"} | _decision(router, observations[::every])


def _decision(router: Router, observations: list[Observation]) -> dict[str, Any]:
    decide = jax.jit(lambda obs: router.act(jax.random.key(0), obs, router.init())[0])
    decide(observations[0])  # compiles
    times_s = [timed(partial(decide, obs))[1] for obs in observations]
    return {"median_ms": 1e3 * statistics.median(times_s), "p99_ms": 1e3 * float(np.quantile(times_s, 0.99))}


def _encoder_row(preset: str) -> dict[str, Any]:
    """Times the encoder on a batch of graphs, dense and ragged."""
    env, params = make(preset, load=_LOAD)
    features = [graph_features(obs) for obs in _observations(env, params, _GRAPHS)]
    dense: GraphFeatures = jax.tree.map(lambda *x: jnp.stack(x), *features)
    config = AGENTS["mvr"].network.han
    variables = HAN(config).init(jax.random.key(0), dense)
    ragged = [to_graphs(one) for one in features]
    graphs = {relation: jraph.batch_np([one[relation] for one in ragged]) for relation in ragged[0]}
    encoders: dict[str, Callable[[Any], Array]] = {
        "dense": lambda v: jnp.sum(HAN(config).apply(v, dense).arrived),  # type: ignore[union-attr]
        "ragged": lambda v: jnp.sum(segment_encode(v, config, graphs).arrived),
    }
    row: dict[str, Any] = {"case": f"encode {_GRAPHS} graphs of {preset}"}
    for name, encode in encoders.items():
        row[f"{name}_forward_ms"] = 1e3 * median_s(jax.jit(encode), variables)
        row[f"{name}_gradient_ms"] = 1e3 * median_s(jax.jit(jax.grad(encode)), variables)
    return row


def _observations(env: Environment, params: EnvParams, count: int) -> list[Observation]:
    """Returns observations along an episode routed by the shortest queue, from the 200th request on."""
    router = make_router("shortest_queue", env, params)

    def step(carry: Any, key: Array) -> tuple[Any, Observation]:
        obs, state = carry
        action, _ = router.act(key, obs, ())
        next_obs, state, *_ = env.step(key, state, action, params)
        return (next_obs, state), obs

    keys = jax.random.split(jax.random.key(1), _BUSY_AFTER + count)
    _, observed = jax.jit(lambda: jax.lax.scan(step, env.reset(jax.random.key(0), params), keys))()
    return [jax.tree.map(lambda x, i=i: x[i], observed) for i in range(_BUSY_AFTER, _BUSY_AFTER + count)]
