"""No random key is used twice in a whole training run or an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array, lax
from jax.errors import KeyReuseError
from jax.experimental.key_reuse import _core as key_reuse

from qos_jax import make, make_router
from qos_jax.agent import AGENTS, make_learner
from qos_jax.evaluation.evaluate import route_requests
from qos_jax.sim.capacity import sample_requests

CHUNKS = 3
ENV, PARAMS = make("paper-3", load=0.9, arrivals="mmpp:3:10")


@pytest.fixture(autouse=True)
def _transposed_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes JAX's checker forward keys through transpositions, which a mapped scan has and the checker consumes."""
    through = key_reuse.KeyReuseSignature(key_reuse.Forward(0, 0))
    monkeypatch.setitem(key_reuse.key_reuse_signatures, lax.transpose_p, through)


def check(run: Callable[[Array], Any]) -> None:
    key_reuse.check_key_reuse_jaxpr(jax.make_jaxpr(run)(jax.random.key(0)).jaxpr)


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["mvr", "sac"])
def test_training_uses_each_key_once(agent: str) -> None:
    sizes = {"num_envs": 2, "chunk": 3, "probes": 2, "batch_size": 8, "capacity": 12, "warm_up": 3, "updates": 2}
    sizes["copies"] = min(AGENTS[agent].copies, sizes["num_envs"])
    learner = make_learner(ENV, dataclasses.replace(AGENTS[agent], **sizes))
    hyper = jax.tree.map(jnp.float32, learner.config.hyper)

    def train(key: Array) -> Any:
        state = learner.warm_up(learner.init(key, PARAMS, hyper), PARAMS, hyper)
        return lax.scan(
            lambda state, chunk: learner.train_chunk(state, PARAMS, hyper, chunk, chunk / CHUNKS),
            state,
            jnp.arange(CHUNKS),
        )

    check(train)


def test_evaluation_uses_each_key_once() -> None:
    routers = tuple(make_router(name, ENV, PARAMS) for name in ("random", "rollout"))

    def evaluate(key: Array) -> Any:
        key_requests, key_routers = jax.random.split(key)
        gaps_s, requests = sample_requests(PARAMS.workload, key_requests, 5)
        return [route_requests(ENV.spec, routers, 0, PARAMS, gaps_s, requests, key_routers)]

    check(evaluate)


def test_a_key_that_is_used_twice_is_found() -> None:
    def twice(key: Array) -> Array:
        return lax.scan(lambda total, one: (total + jax.random.normal(one), jax.random.uniform(one)), 0.0, key)[1]

    with pytest.raises(KeyReuseError):
        check(lambda key: jax.vmap(twice)(jax.random.split(key, (2, 3))))
