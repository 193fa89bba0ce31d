"""The environments of gymnasium.

Observations are ``flat_view``s in a ``Box``. With ``graph=True`` they are the arrays of ``graph_features`` in a
``Dict``, for graph networks of other libraries. Actions 0 to N - 1 send the request to that expert. Action N drops it;
so does an action that the ``action_mask`` of the info forbids. The reward of a step is the QoS of the requests that
finish in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from jax import Array
from jax.typing import ArrayLike

from qos_jax.encoder.flat import FLAT_LIMIT, flat_size, flat_view
from qos_jax.encoder.graph import graph_features
from qos_jax.errors import InputError
from qos_jax.sim.env import Environment, EnvParams, EnvState, check_process
from qos_jax.sim.types import Observation
from qos_jax.sim.validation import MAX_SIZE, checked_whole

Info = dict[str, Any]

_COMPLETIONS = ("finished", "score", "latency_per_token_s", "violations", "busy_s", "standby_s", "kv_block_s")
_SEEDS = 2**32  # JAX keeps this many bits of a seed; a larger one would repeat a smaller one


class RouterVectorEnv(gymnasium.vector.VectorEnv[Any, ArrayLike, np.ndarray]):
    """``num_envs`` environments in one compiled program.

    The randomness of environment i follows from ``reset(seed=s)`` by ``fold_in(key(s), i)``, for any ``num_envs``. The
    info has ``action_mask`` [E, N + 1], and of a step also ``dropped`` [E], ``gap_s`` [E] and sums over the requests
    that finished in it: fields of ``world.Completions``.

    ``autoreset_mode`` is one of gymnasium's:

    - ``SAME_STEP``: the step that ends an episode returns the first observation of the next one. The info has the last
      observation in ``final_obs``, and everything else about that step in ``final_info``.
    - ``NEXT_STEP``: the step that ends an episode returns its last observation. The next step ignores the action, has
      reward 0 and returns the first observation of the next episode. Episodes are the same as in ``SAME_STEP``.
    - ``DISABLED``: the step that ends an episode returns its last observation, and a ``reset`` must follow. With
      ``options={"reset_mask": truncated}`` it resets only these environments.
    """

    def __init__(
        self,
        env: Environment,
        params: EnvParams,
        num_envs: int,
        *,
        graph: bool = False,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
    ) -> None:
        """Makes the environments.

        Args:
          env: the environment.
          params: the parameters of every environment.
          num_envs: number of environments E.
          graph: observations are graph features instead of flat views.
          autoreset_mode: how the next episode starts: a mode of gymnasium, or its value such as "NextStep".

        Raises:
          InputError: ``num_envs`` is no whole number from 1 to 2**24, or the mode is unknown.
        """
        num_envs = checked_whole("num_envs", num_envs, 1, MAX_SIZE)
        self._mode = _mode_named(autoreset_mode)
        self.metadata = {"render_modes": [], "autoreset_mode": self._mode}
        self.num_envs = num_envs
        self.single_observation_space = _space(env, params, graph)
        self.single_action_space = gymnasium.spaces.Discrete(env.num_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        # Without default parameters, so that all environments of the same shapes share their compiled programs.
        self._env, self._params, self._graph = env.with_default_params(None), params, graph
        self._keys: Array | None = None
        self._states: EnvState | None = None
        self._views: Any = None  # the observations last returned, and their masks
        self._first_views: Any = None  # those of the next episodes where one has ended
        self._ended = np.zeros(num_envs, bool)  # where an episode has ended and the next one has not been returned

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[Any, Info]:
        """Starts new episodes; without a seed, other ones each time.

        Args:
          seed: decides all randomness until the next reset with a seed; from 0 to 2^32 - 1.
          options: ``reset_mask`` [E] bool resets only these environments. The others keep their episodes, and return
            their last observations again.

        Returns:
          Observations [E, ...], and the info of the environments that were reset.

        Raises:
          InputError: a seed or an option is not legal.
          ResetNeeded: the first reset leaves environments out.
        """
        check_process()
        seed, mask = _checked_seed(seed), self._reset_mask(options)
        if self._states is None and not mask.all():
            raise gymnasium.error.ResetNeeded("call reset() without a reset_mask first")
        super().reset(seed=seed)
        keys = self._keys
        if seed is not None or keys is None:
            key = jax.random.key(int(self.np_random.integers(2**31)) if seed is None else seed)
            keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(self.num_envs))
        keys, states, views = _reset(self._env, self._graph, keys, self._params)
        views = jax.tree.map(np.array, views)
        if not mask.all():
            keys, states = jax.tree.map(partial(_rows, jnp, mask), (keys, states), (self._keys, self._states))
            views = jax.tree.map(partial(_rows, np, mask), views, self._views)
        self._keys, self._states, self._views = keys, states, views
        self._ended = self._ended & ~mask
        return _copied(views["obs"]), _masked({"action_mask": views["action_mask"]}, mask)

    def step(self, actions: ArrayLike) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, Info]:
        """Takes one action [E] in each environment.

        Returns:
          Observations [E, ...], rewards [E], terminated [E] (always False), truncated [E], and the info.

        Raises:
          InputError: an action is not an integer from 0 to N.
          ResetNeeded: before the first ``reset``, or after the end of an episode if automatic resets are disabled.
        """
        check_process()
        if self._states is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        if self._mode is AutoresetMode.DISABLED and self._ended.any():
            raise gymnasium.error.ResetNeeded("an episode has ended: call reset() before step()")
        actions = self._checked_actions(actions)
        starting = self._ended  # their next episodes start in this step
        skip = starting if self._mode is AutoresetMode.NEXT_STEP else None
        self._keys, self._states, *out = _step(
            self._env, self._graph, self._keys, self._states, actions, skip, self._params
        )
        first_views, last_views, happened, reward, terminated, truncated = jax.tree.map(np.array, out)
        ended = (terminated | truncated) & ~starting
        info: Info = {}
        if self._mode is AutoresetMode.SAME_STEP:
            self._views, stepped = first_views, ~ended
            if ended.any():
                info = _final_info(last_views, happened, ended)
        else:
            self._views, stepped = last_views, ~starting
            if starting.any():
                self._views = jax.tree.map(partial(_rows, np, starting), self._first_views, last_views)
            self._first_views, self._ended = first_views, ended
            reward, terminated, truncated = (
                _rows(np, starting, np.zeros_like(x), x) for x in (reward, terminated, truncated)
            )
        info |= _masked({"action_mask": self._views["action_mask"]}, np.ones_like(ended)) | _masked(happened, stepped)
        return _copied(self._views["obs"]), reward, terminated, truncated, info

    def _checked_actions(self, actions: ArrayLike) -> np.ndarray:
        actions = np.asarray(actions)
        if actions.dtype.kind not in "iu" or not self.action_space.contains(actions):
            raise InputError(
                f"actions are {actions.tolist()}, "
                f"must be {self.num_envs} integers from 0 to {self._env.num_actions - 1}"
            )
        return actions

    def _reset_mask(self, options: Info | None) -> np.ndarray:
        """Returns the environments [E] to reset."""
        if not isinstance(options, Mapping | None):
            raise InputError(f"options is {options!r}, must be a table such as {{'reset_mask': mask}}, or None")
        options = dict(options or {})
        mask = options.pop("reset_mask", None)
        if options:
            raise InputError(f"reset option {next(iter(options))!r} is unknown: the only one is 'reset_mask'")
        if mask is None:
            return np.ones(self.num_envs, bool)
        legal = isinstance(mask, np.ndarray) and mask.dtype == bool and mask.shape == (self.num_envs,)
        if not (legal and mask.any()):
            raise InputError(f"reset_mask is {mask!r}, must be an array of {self.num_envs} booleans, one of them true")
        return mask.copy()


class RouterEnv(gymnasium.Env[np.ndarray, int]):
    """One environment: the first of a ``RouterVectorEnv``, without automatic resets."""

    def __init__(self, env: Environment, params: EnvParams) -> None:
        """Makes the environment."""
        self.metadata = {"render_modes": []}
        self._vector = RouterVectorEnv(env, params, num_envs=1, autoreset_mode=AutoresetMode.DISABLED)
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        """Starts a new episode; without a seed, another one each time. There are no options.

        Raises:
          InputError: the seed is not from 0 to 2^32 - 1, or there is an option.
        """
        if options:
            raise InputError(f"reset option {next(iter(options))!r} is unknown: there are none")
        seed = _checked_seed(seed)
        super().reset(seed=seed)
        obs, info = self._vector.reset(seed=seed)
        return obs[0], _first(info)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, Info]:
        """Takes one action, see ``RouterVectorEnv.step``."""
        obs, reward, terminated, truncated, info = self._vector.step(np.array([action]))
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), _first(info)


def _mode_named(mode: AutoresetMode | str) -> AutoresetMode:
    try:
        return AutoresetMode(mode)
    except ValueError as error:
        legal = ", ".join(each.value for each in AutoresetMode)
        raise InputError(f"autoreset_mode is {mode!r}, must be one of {legal}") from error


def _checked_seed(seed: Any) -> int | None:
    if seed is None:
        return None
    if not isinstance(seed, int | np.integer) or not 0 <= seed < _SEEDS:
        raise InputError(f"seed is {seed!r}, must be a whole number from 0 to {_SEEDS - 1}")
    return int(seed)


def _space(env: Environment, params: EnvParams, graph: bool) -> gymnasium.spaces.Space[Any]:
    def box(shape: tuple[int, ...]) -> gymnasium.spaces.Space[Any]:
        return gymnasium.spaces.Box(-FLAT_LIMIT, FLAT_LIMIT, shape, np.float32)

    if not graph:  # without JAX, so that a forked process comes as far as the check that refuses it
        return box((flat_size(env.spec.num_experts),))
    obs, _ = jax.eval_shape(env.reset, jax.random.key(0), params)
    parts = jax.eval_shape(partial(_view, graph=True), obs)["obs"]
    return gymnasium.spaces.Dict(
        {
            name: gymnasium.spaces.MultiBinary(x.shape) if x.dtype == jnp.int8 else box(x.shape)
            for name, x in parts.items()
        }
    )


@partial(jax.jit, static_argnums=(0, 1))
def _reset(env: Environment, graph: bool, keys: Array, params: EnvParams) -> tuple[Array, EnvState, dict[str, Array]]:
    def one(key: Array) -> tuple[Array, EnvState, dict[str, Array]]:
        key, key_reset = jax.random.split(key)
        obs, state = env.reset(key_reset, params)
        return key, state, _view(obs, graph)

    return jax.vmap(one)(keys)


@partial(jax.jit, static_argnums=(0, 1))
def _step(
    env: Environment,
    graph: bool,
    keys: Array,
    states: EnvState,
    actions: Array,
    skip: Array | None,
    params: EnvParams,
) -> tuple[Any, ...]:
    """Steps all environments; keys and states stay as they are where ``skip`` [E] is set."""

    def one(key: Array, state: EnvState, action: Array) -> tuple[Any, ...]:
        key, key_step = jax.random.split(key)
        obs, state, reward, terminated, truncated, info = env.step(key_step, state, action, params)
        sums = {name: getattr(info["completions"], name) for name in _COMPLETIONS}
        happened = {"dropped": info["dropped"], "gap_s": info["gap_s"], **sums}
        first, last = _view(obs, graph), _view(info["final_observation"], graph)
        return key, state, first, last, happened, reward, terminated, truncated

    keys_after, states_after, *out = jax.vmap(one)(keys, states, actions)
    if skip is not None:
        keys_after, states_after = jax.tree.map(partial(_rows, jnp, skip), (keys, states), (keys_after, states_after))
    return keys_after, states_after, *out


def _view(obs: Observation, graph: bool) -> dict[str, Any]:
    """Returns ``obs``, what the agent observes, and ``action_mask``."""
    if not graph:
        return {"obs": flat_view(obs), "action_mask": obs.action_mask}
    # Masks are 0 and 1, as in gymnasium's MultiBinary.
    features = graph_features(obs, with_sessions=obs.arrived.cached_tokens is not None)
    parts = {name: x.astype(jnp.int8) if x.dtype == bool else x for name, x in vars(features).items()}
    return {"obs": parts, "action_mask": obs.action_mask}


def _rows(numpy: Any, mask: Any, chosen: Any, others: Any) -> Any:
    """Returns the rows of ``chosen`` [E, ...] where ``mask`` [E] is set, else those of ``others``."""
    return numpy.where(mask.reshape(-1, *[1] * (chosen.ndim - 1)), chosen, others)


def _copied(obs: Any) -> Any:
    """Returns observations that the caller may write to."""
    return jax.tree.map(np.copy, obs)


def _final_info(last_views: dict[str, Any], happened: dict[str, np.ndarray], ended: np.ndarray) -> Info:
    """Returns the part of the info [E] about the last steps of episodes, in the form of gymnasium."""
    rows = np.full(len(ended), None, dtype=object)
    for i in np.flatnonzero(ended):
        rows[i] = jax.tree.map(lambda x, i=i: x[i], last_views["obs"])
    final = {"action_mask": last_views["action_mask"]} | happened
    return {
        "final_obs": rows,
        "_final_obs": ended.copy(),
        "final_info": _masked(final, ended),
        "_final_info": ended.copy(),
    }


def _masked(columns: dict[str, np.ndarray], mask: np.ndarray) -> Info:
    """Returns columns [E, ...] in the form of gymnasium: 0 outside of ``mask`` [E], which stands beside each of them.

    The info is empty if the mask is.
    """
    info: Info = {}
    if mask.any():
        for name, values in columns.items():
            info[name], info[f"_{name}"] = values.copy(), mask.copy()
            info[name][~mask] = 0
    return info


def _first(info: Info) -> Info:
    """Returns the info of the first environment alone, with plain numbers."""
    first = {name: values[0] for name, values in info.items() if not name.startswith("_")}
    return {name: value if value.ndim else value.item() for name, value in first.items()}
