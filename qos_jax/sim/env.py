"""The environment: one step is one arriving request, by the contract of gymnax 1.0.

``reset(key, params) -> (obs, state)`` and ``step(key, state, action, params) -> (obs, state, reward, terminated,
truncated, info)``, pure and for one environment: ``jax.vmap`` over keys, over params or over both makes many.
Everything in ``params`` is traced, so a sweep over loads, limits, profiles or arrival laws compiles once. An episode
never terminates; it is truncated after ``params.max_steps_in_episode`` requests, the next one begins by itself, and
``info["final_observation"]`` is what to bootstrap from.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.experimental import checkify

from qos_jax.sim.cost import blocks_of
from qos_jax.sim.types import ExpertProfile, Observation, Request, Workload
from qos_jax.sim.world import World, WorldSpec, advance, collect, dispatch, empty_world, observe


class EnvParams(struct.PyTreeNode):
    """Everything about a world that may change without a recompilation."""

    experts: ExpertProfile  # [N] each
    workload: Workload
    max_steps_in_episode: Array | int = 5000  # requests
    staleness_s: Array | float = 0.0  # the router sees metrics at least this old; needs a spec with history
    saturation_per_s: Array | float = float("nan")  # arrival rate at load 1, requests/s; NaN where nobody asked for it

    def at_load(self, load: Array | float) -> EnvParams:
        """Returns the same world at another load, a fraction of the fleet's saturation rate."""
        return self.replace(workload=self.workload.with_rate(load * self.saturation_per_s))


def axis_of_environments(params: EnvParams) -> int | None:
    """Returns the axis of the environments in their parameters; None if they share one set of them."""
    return 0 if jnp.ndim(params.max_steps_in_episode) else None


class EnvState(struct.PyTreeNode):
    """The world, the request that waits for a decision, and where the workload stands."""

    time: Array  # [] int32 requests decided in this episode
    world: World
    request: Request
    workload: Any


class Environment:
    """The decision process of the router. Instances are immutable and hash by their spec."""

    def __init__(self, spec: WorldSpec, *, expert_names: tuple[str, ...] = (), check: bool = False) -> None:
        """Makes the environment.

        Args:
          spec: what fixes its shapes.
          expert_names: names of the experts, for people.
          check: adds invariants to each step, to be run under ``checkify.checkify``.
        """
        self.spec = spec
        self.expert_names = expert_names or tuple(f"expert {i}" for i in range(spec.num_experts))
        self.check = check

    def __hash__(self) -> int:
        """Makes equal environments one static argument of jit."""
        return hash((self.spec, self.check))

    def __eq__(self, other: object) -> bool:
        """Compares what fixes the compiled program."""
        return isinstance(other, Environment) and (self.spec, self.check) == (other.spec, other.check)

    @property
    def name(self) -> str:
        """Name of the environment."""
        return "EdgeServing"

    @property
    def num_actions(self) -> int:
        """Experts, and the drop."""
        return self.spec.num_experts + 1

    def reset(self, key: Array, params: EnvParams) -> tuple[Observation, EnvState]:
        """Returns the first observation, of the first request before idle experts, and the state."""
        key_init, key_next = jax.random.split(key)
        _, request, workload = params.workload.next(key_next, params.workload.init(key_init))
        state = EnvState(jnp.int32(0), empty_world(self.spec, params.experts), request, workload)
        return self.observe(state, params), state

    def step(
        self, key: Array, state: EnvState, action: Array, params: EnvParams
    ) -> tuple[Observation, EnvState, Array, Array, Array, dict[str, Any]]:
        """Sends the waiting request to expert ``action`` [] int32 (N drops it) and runs the world to the next arrival.

        The reward is the QoS of the requests that finish before that arrival. ``info`` holds ``completions`` (sums over
        these requests, see ``world.Completions``), ``dropped``, ``gap_s``, ``final_observation`` and the two flags.
        """
        key_step, key_reset = jax.random.split(key)
        next_obs, next_state, reward, info = self._step(key_step, state, action, params)
        terminated, truncated = jnp.bool_(False), next_state.time >= params.max_steps_in_episode
        obs, state = self._anew(truncated, key_reset, params, (next_obs, next_state))
        info |= {"terminated": terminated, "truncated": truncated, "final_observation": next_obs}
        return obs, state, reward, terminated, truncated, info

    def observe(self, state: EnvState, params: EnvParams) -> Observation:
        """Returns what the router sees in ``state``."""
        return observe(self.spec, params.experts, state.world, state.request, params.staleness_s)

    def _anew(
        self, over: Array, key: Array, params: EnvParams, going_on: tuple[Observation, EnvState]
    ) -> tuple[Observation, EnvState]:
        """Returns a new episode if this one is ``over`` [] bool, else what is ``going_on``.

        Under plain ``vmap`` every environment would draw an episode at every step, which is a quarter of the work. Here
        all of them draw one at the steps where any needs it.
        """
        begin = jax.custom_batching.custom_vmap(
            lambda over, key, params, going_on: lax.cond(over, lambda: self.reset(key, params), lambda: going_on)
        )

        @begin.def_vmap
        def _of_many(size: int, batched: Any, *args: Any) -> tuple[Any, Any]:
            axes = tuple(jax.tree.map(lambda is_batched: 0 if is_batched else None, batched))

            def select(over: Array, key: Array, params: EnvParams, going_on: Any) -> Any:
                return jax.tree.map(partial(jnp.where, over), self.reset(key, params), going_on)

            each_selects = jax.vmap(select, axes, axis_size=size)
            all_go_on = jax.vmap(lambda *args: args[-1], axes, axis_size=size)
            out = lax.cond(jnp.any(args[0]), each_selects, all_go_on, *args)
            return out, jax.tree.map(lambda _: True, out)

        return begin(over, key, params, going_on)

    def _step(
        self, key: Array, state: EnvState, action: Array, params: EnvParams
    ) -> tuple[Observation, EnvState, Array, dict[str, Any]]:
        world, dropped = dispatch(self.spec, params.experts, state.world, state.request, action)
        gap_s, request, workload = params.workload.next(key, state.workload)
        world = advance(self.spec, params.experts, world, gap_s)
        world, completions = collect(params.experts, world)
        if self.check:
            _check_invariants(self.spec, params.experts, world, gap_s)
        state = EnvState(state.time + 1, world, request, workload)
        info = {"completions": completions, "dropped": dropped, "gap_s": gap_s}
        return self.observe(state, params), state, completions.qos, info


def _check_invariants(spec: WorldSpec, profile: ExpertProfile, world: World, gap_s: Array) -> None:
    experts, slots = world.experts, world.experts.slots
    blocks = jnp.sum(jnp.where(slots.running, blocks_of(slots.computed, spec.engine.block_size), 0), -1)
    checkify.check(jnp.isfinite(gap_s) & (gap_s >= 0), "the gap to the next arrival is {x}", x=gap_s)
    checkify.check(jnp.all(jnp.isfinite(experts.clock_s)), "a clock is not finite: {x}", x=experts.clock_s)
    checkify.check(jnp.all(experts.clock_s >= 0), "a clock is behind now: {x}", x=experts.clock_s)
    checkify.check(jnp.all(blocks <= profile.kv_blocks), "more KV blocks are held than there are: {x}", x=blocks)
    checkify.check(
        jnp.all(jnp.sum(slots.running, -1) <= profile.max_running), "more requests run than may: {x}", x=slots.running
    )
    checkify.check(
        jnp.all((slots.computed >= 0) & (slots.generated >= 0)), "a token count is negative: {x}", x=slots.computed
    )
