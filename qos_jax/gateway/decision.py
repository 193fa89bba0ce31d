"""The decision: the very router of the simulator, compiled for one fleet, on an observation made of the ledger."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qos_jax.gateway import ledger as rows
from qos_jax.impact.estimate import impact
from qos_jax.routers.base import Router
from qos_jax.sim.cost import fits_in_memory
from qos_jax.sim.proxy_view import LedgerView, Scrape, proxy_view
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, RATE_WINDOWS_S, ArrivedView, ExpertProfile, Observation

AVAILABLE, SCRAPE_AGE, WAITING, KV_BLOCKS, OTHERS_RUNNING, OTHERS_WAITING, SCORE, TOKENS, CACHED = range(9)
"""Rows of what is known of the experts, [9, N] float32."""
NUM_EXPERT_ROWS = 9
# In its default order XLA hands some parts of a program to another thread, for which the first one then waits.
_IN_ONE_THREAD: dict[str, str | bool] = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
_PROMPT, _LIMIT, _MAY_DROP, _NUMBER = range(4)  # of the arrived request, before its rates


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the impact estimate says of each placement, for people: routers need not have used it."""

    latency_per_token_s: np.ndarray  # [N] s/token
    in_time: np.ndarray  # [N] probability
    qos: np.ndarray  # [N]
    net: np.ndarray  # [N] change of the QoS of all requests


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a router decided for one request."""

    expert: int | None  # None: drop
    estimate: Estimate


Leaves = tuple[Array, ...]  # of a router's memory


@dataclasses.dataclass(frozen=True)
class DecisionProgram:
    """A router for one fleet, as a function of packed numbers; ``qos_jax.gateway.exported`` keeps it in a file."""

    name: str  # of the router
    slots: int  # S, requests of each expert that it observes
    kv_blocks: np.ndarray  # [N]
    memory: Leaves  # before the first request
    decide: Callable[[Array, Array, Array, Leaves], tuple[Array, Leaves]]
    """Takes the ledger [7, N, S], the experts [9, N], the arrived request [4 + K], float32 each, and the memory.

    Returns the fields of ``Estimate`` [4 N] with the action behind them, and the memory.
    """

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of the first three arguments of ``decide``."""
        num_experts = len(self.kv_blocks)
        return (
            jax.ShapeDtypeStruct((rows.NUM_COLUMNS, num_experts, self.slots), jnp.float32),
            jax.ShapeDtypeStruct((NUM_EXPERT_ROWS, num_experts), jnp.float32),
            jax.ShapeDtypeStruct((_NUMBER + 1 + len(RATE_WINDOWS_S),), jnp.float32),
        )


def program_of(router: Router, profile: ExpertProfile, slots: int, seed: int = 0) -> DecisionProgram:
    """Returns the program of any router of the library, learned or not.

    Args:
      router: the router.
      profile: of the fleet, [N] each.
      slots: S, requests of each expert that it observes.
      seed: of the router's randomness.
    """
    num_experts = np.shape(profile.step_base_s)[0]
    profile = jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), np.shape(x) or (num_experts,)), profile)
    key = jax.random.key(seed)
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, router.init()))

    def decide(requests: Array, experts: Array, arrived: Array, memory: Leaves) -> tuple[Array, Leaves]:
        obs = observation(requests, experts, arrived, profile)
        number = arrived[_NUMBER].astype(jnp.int32)
        action, after = router.act(jax.random.fold_in(key, number), obs, jax.tree.unflatten(structure, memory))
        estimate = impact(obs)
        told = jnp.stack([estimate.latency_per_token_s, estimate.in_time, estimate.qos, estimate.net])
        return jnp.append(told.ravel(), action.astype(told.dtype)), tuple(jax.tree.leaves(after))

    return DecisionProgram(router.name, slots, np.asarray(profile.kv_blocks, float), tuple(leaves), decide)


class Decider:
    """A router with its memory, compiled for a fleet."""

    def __init__(self, program: DecisionProgram) -> None:
        """Compiles the program, so that the first request does not wait for it."""
        self.name, self.slots, self.kv_blocks = program.name, program.slots, program.kv_blocks
        self.num_experts = len(program.kv_blocks)
        self._memory = program.memory
        self._decide = _compiled(jax.jit(program.decide).lower(*program.shapes, program.memory))
        self._number = 0

    def decide(
        self,
        ledger: np.ndarray,
        experts: np.ndarray,
        *,
        prompt_tokens: int,
        limit_s: float,
        may_drop: bool,
        rates_per_s: np.ndarray,
    ) -> Decision:
        """Decides for one request.

        Args:
          ledger: [7, N, S] the ledger's columns, with ages in place of arrivals.
          experts: [9, N], see ``AVAILABLE`` and the others.
          prompt_tokens: of the request.
          limit_s: its latency limit, s/token.
          may_drop: the router may drop it.
          rates_per_s: [K] recent arrival rates.
        """
        self._number = (self._number + 1) % 2**23  # exact in float32
        arrived = np.array([prompt_tokens, limit_s, may_drop, self._number, *rates_per_s], np.float32)
        told, self._memory = self._decide(ledger.astype(np.float32), experts.astype(np.float32), arrived, self._memory)
        told = np.asarray(told)
        action = int(told[-1])
        estimate = Estimate(*told[:-1].reshape(4, self.num_experts))
        return Decision(action if action < self.num_experts else None, estimate)


def _compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    try:
        return lowered.compile(_IN_ONE_THREAD)
    except jax.errors.JaxRuntimeError:  # before jax 0.10 there was no such option
        return lowered.compile()


def decide_in_the_calling_thread() -> None:
    """Has JAX run programs on a CPU in the thread that calls them, if it has not run one yet.

    Another thread, the default, would have to wait for a core where all are busy, and all streams with it.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def observation(requests: Array, experts: Array, arrived: Array, profile: ExpertProfile) -> Observation:
    """Returns the observation that routers read, from packed numbers.

    Args:
      requests: [7, N, S], see ``qos_jax.gateway.ledger``, with ages in place of arrivals.
      experts: [9, N].
      arrived: [4 + K].
      profile: of the experts, [N] each.
    """
    tokens = requests.astype(jnp.int32)
    ledger = LedgerView(
        live=requests[rows.LIVE] > 0,
        prompt_tokens=tokens[rows.PROMPT],
        streamed_tokens=tokens[rows.STREAMED],
        age_s=requests[rows.ARRIVAL],
        latency_limit_s=requests[rows.LIMIT],
        predicted_score=requests[rows.SCORE],
        predicted_tokens=requests[rows.TOKENS],
    )
    counts = experts.astype(jnp.int32)
    scrape = Scrape(
        age_s=experts[SCRAPE_AGE],
        waiting=counts[WAITING],
        kv_used_blocks=counts[KV_BLOCKS],
        others_running=counts[OTHERS_RUNNING],
        others_waiting=counts[OTHERS_WAITING],
    )
    view, requests_view = proxy_view(ledger, scrape)
    prompt_tokens = arrived[_PROMPT].astype(jnp.int32)
    legal = (
        (experts[AVAILABLE] > 0)
        & fits_in_memory(profile, prompt_tokens, 1, BLOCK_SIZE_TOKENS)
        & (view.waiting < profile.max_waiting)
    )
    return Observation(
        arrived=ArrivedView(
            prompt_tokens=prompt_tokens,
            latency_limit_s=arrived[_LIMIT],
            predicted_score=experts[SCORE],
            predicted_tokens=experts[TOKENS],
            recent_rate_per_s=arrived[_NUMBER + 1 :],
            cached_tokens=jnp.minimum(counts[CACHED], prompt_tokens - 1) * jnp.asarray(profile.prefix_cache),
        ),
        experts=view.replace(profile=profile),
        requests=requests_view,
        action_mask=jnp.append(legal, arrived[_MAY_DROP] > 0),
        staleness_s=jnp.float32(0.0),
    )
