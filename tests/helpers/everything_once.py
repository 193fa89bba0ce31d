"""Steps an environment, trains a router and evaluates it, each as small as can be; prints the QoS of every router."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

import qos_jax
from qos_jax import Environment, EnvParams
from qos_jax.agent import AGENTS
from qos_jax.agent.configs import AgentConfig
from qos_jax.agent.recipes import Recipe

ROUTERS = ("shortest_queue", "power_of_two", "impact_greedy")


def tiny_world(**fields: Any) -> tuple[Environment, EnvParams]:
    """A world of two experts with places for four requests each."""
    experts = (("alpaca-native", "A40"), ("chatglm-6b", "A40"))
    env, params = qos_jax.make("paper-3", experts=experts, max_running=2, max_waiting=2, rate_per_s=5.0, **fields)
    return env, params.replace(saturation_per_s=8.0)  # about right; measuring it would compile the engine once more


def tiny_agent(name: str) -> AgentConfig:
    """An agent that trains on a few requests."""
    sizes = {"num_envs": 2, "chunk": 2, "updates": 1, "batch_size": 4, "capacity": 8, "warm_up": 2, "probes": 1}
    if AGENTS[name].copies > 1:
        sizes["copies"] = 2
    return dataclasses.replace(AGENTS[name], **sizes)


def main() -> None:
    env, params = tiny_world()
    _, state = env.reset(jax.random.key(0), params)
    _, state, reward, *_ = jax.jit(env.step)(jax.random.key(1), state, 0, params)
    assert int(state.time) == 1
    assert float(reward) >= 0
    sizes = {"evaluation_envs": 2, "evaluation_steps": 2}
    trained = qos_jax.train((env, params), Recipe(tiny_agent("mvr"), steps=8, randomise=()), **sizes)
    assert trained.finished
    routers = [*(qos_jax.make_router(name, env, params) for name in ROUTERS), trained.router]
    runs = qos_jax.evaluate(env, params, routers, qos_jax.scenarios(params, [0.9], [0]), 20)
    qos = {run.router.name: run.metrics["qos"] for run in runs}
    assert len(qos) == len(routers)
    assert np.all(np.isfinite(list(qos.values())))
    assert max(qos.values()) > 0
    print(qos)


if __name__ == "__main__":
    main()
