"""Graph features of real worlds: presets after some requests."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qos_jax import Observation, make, make_router
from qos_jax.encoder.graph import GraphFeatures, graph_features
from qos_jax.encoder.han import HAN, HANConfig
from qos_jax.sim.env import Environment, EnvParams

MAX_RUNNING, MAX_WAITING = 8, 4

# Test programs run for milliseconds, so they are compiled without optimisation.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
nodes_of_batch = quick_jit(jax.vmap(graph_features))


@functools.cache
def observations_of(preset: str, rate_per_s: float, only: int = -1) -> Observation:
    """Four environments after 40, 60, 80 and 100 requests, by shortest queue, or all sent to expert ``only``."""
    env, params = make(preset, rate_per_s=rate_per_s, max_running=MAX_RUNNING, max_waiting=MAX_WAITING)
    history = _history(env, jax.random.split(jax.random.key(0), 4), params, jnp.int32(only))
    return jax.tree.map(lambda x: x[jnp.arange(4), jnp.array([39, 59, 79, 99])], history)


@functools.partial(quick_jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0, None, None))
def _history(env: Environment, key: Array, params: EnvParams, only: Array) -> Observation:
    decide = make_router("shortest_queue", env)

    def step(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], Observation]:
        obs, state = carry
        shortest, _ = decide.act(key, obs, ())
        obs, state, *_ = env.step(key, state, jnp.where(only < 0, shortest, only), params)
        return (obs, state), obs

    return lax.scan(step, env.reset(key, params), jax.random.split(key, 100))[1]


@functools.cache
def some_nodes(preset: str, rate_per_s: float, only: int = -1) -> GraphFeatures:
    """The graph features of such environments, [4, ...]."""
    return nodes_of_batch(observations_of(preset, rate_per_s, only))


def busy_nodes() -> GraphFeatures:
    """Four environments of three experts with running and waiting requests and empty slots."""
    return some_nodes("paper-3", 30.0)


@functools.cache
def variables_of(config: HANConfig) -> Any:
    """Random parameters of the encoder, all different from 0, unlike initial biases."""
    shapes = jax.eval_shape(HAN(config).init, jax.random.key(0), busy_nodes())
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes)


def one_of(batch: Any, i: int = 0) -> Any:
    return jax.tree.map(lambda x: x[i], batch)
