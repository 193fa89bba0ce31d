"""The environment of the router, by the contract of gymnax 1.0: one step is one arriving request.

``reset(key, params) -> (obs, state)`` and ``step(key, state, action, params) -> (obs, state, reward, terminated,
truncated, info)`` are pure functions of one environment. ``jax.vmap`` over keys, over params or over both makes many.
Everything in ``params`` is traced, so a sweep over loads, limits, profiles or arrival laws compiles once. An episode
never terminates. It is truncated after ``params.max_steps_in_episode`` requests, and the next episode starts in the
same step; ``info["final_observation"]`` is the observation to bootstrap from.
"""

from __future__ import annotations

import copy
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.experimental import checkify

from qos_jax.errors import InputError
from qos_jax.sim.cost import blocks_of
from qos_jax.sim.engine_state import slot_numbers
from qos_jax.sim.failures import FailureLaw
from qos_jax.sim.spaces import Discrete, space_class, space_of
from qos_jax.sim.types import ExpertProfile, Observation, Preferences, Request, Workload
from qos_jax.sim.validation import of_one_type
from qos_jax.sim.world import Completions, World, WorldSpec, advance, collect, dispatch, empty_world, observe


class EnvParams(struct.PyTreeNode):
    """Everything about a world that may change without a recompilation."""

    experts: ExpertProfile  # [N] each
    workload: Workload
    max_steps_in_episode: Array | int = 5000  # requests
    staleness_s: Array | float = 0.0  # s, least age of the metrics that the router observes; needs a spec with history
    saturation_per_s: Array | float = float("nan")  # arrival rate at load 1, requests/s; NaN if not computed
    believed_experts: ExpertProfile | None = None  # what routers are told of the experts, if not what they are
    scrape_s: Array | float = 0.0  # s between two readings of engines' metrics; needs a spec that observes as a proxy
    failure_law: FailureLaw | None = None  # of the experts; needs a spec with failures
    preferences: Preferences | None = None  # which routers observe; the world and its reward do not depend on them

    @property
    def observed_experts(self) -> ExpertProfile:
        """The profile that routers observe, [N] each."""
        return self.experts if self.believed_experts is None else self.believed_experts

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
    """The decision process of the router.

    Instances are immutable and hashable, so that they can be static arguments of ``jax.jit``.
    """

    def __init__(
        self,
        spec: WorldSpec,
        *,
        expert_names: tuple[str, ...] = (),
        check: bool = False,
        default_params: EnvParams | None = None,
    ) -> None:
        """Makes the environment.

        Args:
          spec: static shapes and rules of the world.
          expert_names: names of the experts for tables and pictures, [N]; "expert 0", ... without them.
          check: adds invariants to each step. Such a step must run under ``checkify.checkify``.
          default_params: parameters of ``reset`` and ``step`` when they are called without any.

        Raises:
          InputError: in a process that was forked after JAX had been used, see ``check_process``.
        """
        check_process()
        self.spec = spec
        self.expert_names = expert_names or tuple(f"expert {i}" for i in range(spec.num_experts))
        self.check = check
        self._default_params = default_params

    def __hash__(self) -> int:
        """Hashes the shapes and rules."""
        return hash((self.spec, self.check))

    def __eq__(self, other: object) -> bool:
        """Compares everything that a compiled program depends on.

        This includes the identity of the default parameters: a trace without explicit parameters contains them.
        """
        return self is other or (
            type(self) is type(other)
            and isinstance(other, Environment)
            and (self.spec, self.check) == (other.spec, other.check)
            and self._default_params is other._default_params
        )

    @property
    def name(self) -> str:
        """Name of the environment."""
        return "EdgeServing"

    @property
    def num_actions(self) -> int:
        """Number of actions: one for each expert, and the drop."""
        return self.spec.num_experts + 1

    @property
    def default_params(self) -> EnvParams:
        """Parameters that ``reset`` and ``step`` take when they are called without any.

        Raises:
          InputError: the environment has none; those of ``qos_jax.make`` have the parameters returned beside them.
        """
        if self._default_params is None:
            raise InputError(
                "the environment has no default parameters: pass params, or use with_default_params(params)"
            )
        return self._default_params

    def with_default_params(self, params: EnvParams | None) -> Environment:
        """Returns the same environment with other default parameters, or with none."""
        env = copy.copy(self)
        env._default_params = params
        return env

    def action_space(self, params: EnvParams | None = None) -> Any:
        """Returns the space of actions: ``Discrete(num_actions)``, of gymnax if it has been imported."""
        del params
        return space_class(Discrete)(self.num_actions)

    def observation_space(self, params: EnvParams | None = None) -> Any:
        """Returns the space of observations: a ``Dict`` with the fields of ``Observation``.

        The bounds are those of the types. ``qos_jax.encoder.flat_env.FlatEnvironment`` has a bounded ``Box`` instead.
        """
        params = self._params_or_default(params)
        return space_of(jax.eval_shape(self.reset, jax.eval_shape(jax.random.key, 0), params)[0])

    def reset(self, key: Array, params: EnvParams | None = None) -> tuple[Observation, EnvState]:
        """Returns the first observation, of the first request and idle experts, and the state.

        Args:
          key: randomness of the first request and of the workload's state.
          params: parameters of the world; ``default_params`` without them.
        """
        params = self._params_or_default(params)
        key_init, key_next = jax.random.split(key)
        _, request, workload = params.workload.next(key_next, params.workload.init(key_init))
        return self._begin(key, request, workload, params)

    def step(
        self, key: Array, state: EnvState, action: Array | int, params: EnvParams | None = None
    ) -> tuple[Observation, EnvState, Array, Array, Array, dict[str, Any]]:
        """Sends the waiting request to an expert and advances the world to the next arrival.

        Args:
          key: randomness of the next request, and of the next episode where this one ends.
          state: the state before the decision.
          action: [] int32, index of the expert; N drops the request.
          params: parameters of the world; ``default_params`` without them.

        Returns:
          The next observation, the next state, the reward [] (QoS of the requests that finish before the next arrival),
          ``terminated`` [] bool, ``truncated`` [] bool, and ``info``. ``info`` has ``completions`` (sums over these
          requests, see ``world.Completions``), ``dropped`` [] bool, ``gap_s`` [] s to the next arrival,
          ``final_observation`` (the next observation of this episode, also where it ends) and the two flags.
        """
        params, action = self._params_or_default(params), jnp.asarray(action)
        time = state.time + 1
        terminated, truncated = jnp.bool_(False), time >= params.max_steps_in_episode
        (gap_s, request, workload), first = _next_and_first(key, state.workload, truncated, params)
        world, completions, dropped = self._serve(state, action, gap_s, params)
        next_state = EnvState(time, world, request, workload)
        next_obs = self.observe(next_state, params)
        obs, state = self._anew(key, truncated, first, params, (next_obs, next_state))
        info = {
            "completions": completions, "dropped": dropped, "gap_s": gap_s, "terminated": terminated,
            "truncated": truncated, "final_observation": next_obs,
        }  # fmt: skip
        return obs, state, completions.qos, terminated, truncated, info

    def observe(self, state: EnvState, params: EnvParams) -> Observation:
        """Returns the router's observation of a state."""
        params = self._params_or_default(params)
        obs = observe(self.spec, params.observed_experts, state.world, state.request, params.staleness_s)
        return obs.replace(preferences=params.preferences)

    def _params_or_default(self, params: EnvParams | None) -> EnvParams:
        params = self.default_params if params is None else params
        believed = None if params.believed_experts is None else of_one_type(params.believed_experts)
        return params.replace(experts=of_one_type(params.experts), believed_experts=believed)

    def _serve(
        self, state: EnvState, action: Array, gap_s: Array, params: EnvParams
    ) -> tuple[World, Completions, Array]:
        """Sends the waiting request to an expert, and lets all experts work until the next arrival.

        Returns:
          The world at that arrival, what was finished before it, and whether the request was dropped [] bool.
        """
        world, dropped = dispatch(self.spec, params.experts, state.world, state.request, action)
        world = advance(self.spec, params.experts, world, gap_s)
        world, completions = collect(params.experts, world)
        if self.check:
            _check_invariants(self.spec, params.experts, world, gap_s)
        return world, completions, dropped

    def _begin(self, key: Array, request: Request, workload: Any, params: EnvParams) -> tuple[Observation, EnvState]:
        world = empty_world(self.spec, params.experts, params.scrape_s, params.failure_law, key)
        state = EnvState(jnp.int32(0), world, request, workload)
        return self.observe(state, params), state

    def _anew(
        self,
        key: Array,
        over: Array,
        first: tuple[Request, Any],
        params: EnvParams,
        going_on: tuple[Observation, EnvState],
    ) -> tuple[Observation, EnvState]:
        """Returns the start of a new episode if this one is ``over`` [] bool, else ``going_on``."""

        def select() -> tuple[Observation, EnvState]:
            return jax.tree.map(partial(jnp.where, over), self._begin(key, *first, params), going_on)

        return lax.cond(_in_any(over), select, lambda: going_on)


def _next_and_first(
    key: Array, workload_state: Any, over: Array, params: EnvParams
) -> tuple[tuple[Array, Request, Any], tuple[Request, Any]]:
    """Samples the next request of an episode, and if it is ``over`` [] bool, the first one of the next episode.

    Both are sampled in one loop, so that the workload is compiled once.

    Returns:
      The gap to the next request [s], that request and the workload's state after it; and the first request of the next
      episode with the state after that. The latter two are arbitrary if the episode goes on.
    """
    key_step, key_reset = jax.random.split(key)

    # Each key is used in one round of the loop, which JAX cannot see: clones are exempt from its check of key reuse.
    def of_this_episode() -> tuple[Array, Any]:
        return jax.random.clone(key_step), workload_state

    def of_next_episode() -> tuple[Array, Any]:
        key_init, key_next = jax.random.split(jax.random.clone(key_reset))
        return key_next, params.workload.init(key_init)

    def sample(episode: Array, found: tuple[Any, Any]) -> tuple[Any, Any]:
        key, state = lax.cond(episode == 0, of_this_episode, of_next_episode)
        sampled = params.workload.next(key, state)
        return jax.tree.map(partial(jnp.where, episode == 0), sampled, found[0]), sampled

    *shapes, _ = jax.eval_shape(params.workload.next, key_step, workload_state)
    nothing = (*jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), workload_state)
    following, (_, *first) = lax.fori_loop(0, 1 + _in_any(over).astype(int), sample, (nothing, nothing))
    return following, tuple(first)


@jax.custom_batching.custom_vmap
def _in_any(flag: Array) -> Array:
    """Returns whether a flag [] bool is set in any of the environments that ``vmap`` runs side by side.

    What happens at the end of episodes only is then left out, and not computed for all environments at every step.
    """
    return flag


@_in_any.def_vmap
def _in_any_of_many(size: int, batched: list[bool], flags: Array) -> tuple[Array, bool]:
    del size, batched
    return _in_any(jnp.any(flags)), False


def _check_invariants(spec: WorldSpec, profile: ExpertProfile, world: World, gap_s: Array) -> None:
    experts, slots = world.experts, world.experts.slots
    blocks = jnp.sum(jnp.where(slots.running, blocks_of(slots.computed, spec.engine.block_size), 0), -1)
    checkify.check(jnp.isfinite(gap_s) & (gap_s >= 0), "the gap to the next arrival is {x}", x=gap_s)
    counts, held = jnp.stack([experts.running, experts.waiting]), jnp.stack([slots.running, slots.waiting])
    checkify.check(jnp.all(counts == jnp.sum(held, -1)), "running and waiting requests are counted as {x}", x=counts)
    behind = slot_numbers(slots.live) >= experts.used[..., None]
    fields = jax.tree.leaves(slots.replace(arrival_s=()))
    filled = jnp.array([jnp.any(behind & (field != 0)) for field in fields])
    checkify.check(~jnp.any(filled), "slots behind the last one that is used are not empty: {x}", x=experts.used)
    checkify.check(jnp.all(jnp.isfinite(experts.clock_s)), "a clock is not finite: {x}", x=experts.clock_s)
    checkify.check(jnp.all(experts.clock_s >= 0), "a clock is behind now: {x}", x=experts.clock_s)
    checkify.check(
        jnp.all((experts.standby_left_s >= 0) & (experts.standby_left_s <= profile.standby_s)),
        "the standby left is {x}",
        x=experts.standby_left_s,
    )
    checkify.check(jnp.all(blocks <= profile.kv_blocks), "more KV blocks are held than there are: {x}", x=blocks)
    checkify.check(
        jnp.all(jnp.sum(slots.running, -1) <= profile.max_running), "more requests run than may: {x}", x=slots.running
    )
    checkify.check(
        jnp.all((slots.computed >= 0) & (slots.generated >= 0)), "a token count is negative: {x}", x=slots.computed
    )


_pid_of_first_use: int | None = None


def check_process() -> None:
    """Refuses a process that was forked after its parent had used JAX, where any call into JAX may wait for ever.

    Raises:
      InputError: the first environment was made in another process than this one.
    """
    global _pid_of_first_use
    if _pid_of_first_use is None:
        _pid_of_first_use = os.getpid()
    elif _pid_of_first_use != os.getpid():
        raise InputError(
            "JAX does not work in a forked process if the parent process has used it: start processes with "
            'context="spawn", as in gymnasium.vector.AsyncVectorEnv(..., context="spawn"), or use '
            "qos_jax.gym.RouterVectorEnv, which runs all environments in one process"
        )
