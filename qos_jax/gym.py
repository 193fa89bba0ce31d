"""The environment as gymnasium has it, for agents from other libraries; needs the extra ``gym``.

Observations are ``flat_view``s, or with ``graph=True`` the arrays of ``encoder.nodes``, a ``Dict`` space, for graph
networks of other libraries. Actions 0 .. N - 1 send the request to that expert, N drops it, and so does an action
that the ``action_mask`` in the info forbids. The reward of a step is the QoS of the requests that finish in it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from qos_jax.encoder.flat import FLAT_LIMIT, flat_view
from qos_jax.encoder.graph import graph_features
from qos_jax.errors import InputError
from qos_jax.sim.env import Environment, EnvParams, EnvState
from qos_jax.sim.types import Observation

try:
    import gymnasium
    from gymnasium.vector import AutoresetMode
    from gymnasium.vector.utils import batch_space
except ImportError as error:
    raise ImportError("qos_jax.gym needs gymnasium 1.1 or later: pip install 'qos_jax[gym]'") from error

Info = dict[str, Any]

_ANSWERS = ("finished", "score", "latency_per_token_s", "violations", "busy_s", "kv_block_s")


class RouterVectorEnv(gymnasium.vector.VectorEnv[Any, ArrayLike, np.ndarray]):
    """``num_envs`` environments in one compiled program, reset in the step that truncates them (``SAME_STEP``).

    All randomness of environment i follows from ``reset(seed=s)`` by ``fold_in(key(s), i)``, for any ``num_envs``. The
    info has ``action_mask`` [E, N + 1], and of a step also ``dropped`` [E], ``gap_s`` [E] and sums over its answers:
    ``world.Completions``; where an episode ended, ``final_info`` has them all and ``final_obs`` is there, as in gymnasium.
    """

    def __init__(self, env: Environment, params: EnvParams, num_envs: int, *, graph: bool = False) -> None:
        """Makes the environments; all have the same ``params``. With ``graph`` observations are nodes.

        Raises:
          InputError: ``num_envs`` is below 1.
        """
        if num_envs < 1:
            raise InputError(f"num_envs is {num_envs}, must be at least 1")
        self.metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}
        self.num_envs = num_envs
        self.single_observation_space = _space(env, params, graph)
        self.single_action_space = gymnasium.spaces.Discrete(env.num_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._env, self._params, self._graph = env, params, graph
        self._keys: Array | None = None
        self._states: EnvState | None = None

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[Any, Info]:
        """Begins new episodes everywhere; without a seed these are others each time. There are no options."""
        super().reset(seed=seed)
        if seed is not None or self._keys is None:
            key = jax.random.key(int(self.np_random.integers(2**31)) if seed is None else seed)
            self._keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(self.num_envs))
        self._keys, self._states, seen = _reset(self._env, self._graph, self._keys, self._params)
        seen = jax.tree.map(np.array, seen)
        return seen.pop("obs"), _masked(seen, np.ones(self.num_envs, bool))

    def step(self, actions: ArrayLike) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, Info]:
        """Takes one action [E] in each environment.

        Raises:
          InputError: an action is not an integer from 0 to N.
          ResetNeeded: before the first ``reset``.
        """
        if self._states is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        actions = np.asarray(actions)
        if actions.dtype.kind not in "iu" or not self.action_space.contains(actions):
            raise InputError(
                f"actions are {actions.tolist()}, "
                f"must be {self.num_envs} integers from 0 to {self._env.num_actions - 1}"
            )
        self._keys, self._states, *out = _step(self._env, self._graph, self._keys, self._states, actions, self._params)
        seen, final, happened, reward, terminated, truncated = jax.tree.map(np.array, out)
        obs, final_obs = seen.pop("obs"), final.pop("obs")
        ended = terminated | truncated
        info = _masked(seen, np.ones_like(ended)) | _masked(happened, ~ended)
        if ended.any():
            rows = np.full(self.num_envs, None, dtype=object)
            for i in np.flatnonzero(ended):
                rows[i] = jax.tree.map(lambda x, i=i: x[i], final_obs)
            info |= {"final_obs": rows, "_final_obs": ended.copy()}
            info |= {"final_info": _masked(final | happened, ended), "_final_info": ended.copy()}
        return obs, reward, terminated, truncated, info


class RouterEnv(gymnasium.Env[np.ndarray, int]):
    """One environment: the first of a ``RouterVectorEnv``, without automatic resets."""

    def __init__(self, env: Environment, params: EnvParams) -> None:
        """Makes the environment."""
        self.metadata = {"render_modes": []}
        self._vector = RouterVectorEnv(env, params, num_envs=1)
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        """Begins a new episode; without a seed another one each time. There are no options."""
        super().reset(seed=seed)
        obs, info = self._vector.reset(seed=seed)
        return obs[0], _first(info)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, Info]:
        """Takes one action, see ``RouterVectorEnv.step``."""
        obs, reward, terminated, truncated, info = self._vector.step(np.array([action]))
        if "final_obs" in info:
            obs, info = info["final_obs"], info["final_info"]
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), _first(info)


def _space(env: Environment, params: EnvParams, graph: bool) -> gymnasium.spaces.Space[Any]:
    def box(x: Any) -> gymnasium.spaces.Space[Any]:
        if x.dtype == jnp.int8:
            return gymnasium.spaces.MultiBinary(x.shape)
        return gymnasium.spaces.Box(-FLAT_LIMIT, FLAT_LIMIT, x.shape, np.float32)

    obs, _ = jax.eval_shape(env.reset, jax.random.key(0), params)
    seen = jax.eval_shape(partial(_seen, graph=graph), obs)["obs"]
    return gymnasium.spaces.Dict({name: box(x) for name, x in seen.items()}) if graph else box(seen)


@partial(jax.jit, static_argnums=(0, 1))
def _reset(env: Environment, graph: bool, keys: Array, params: EnvParams) -> tuple[Array, EnvState, dict[str, Array]]:
    def one(key: Array) -> tuple[Array, EnvState, dict[str, Array]]:
        key, key_reset = jax.random.split(key)
        obs, state = env.reset(key_reset, params)
        return key, state, _seen(obs, graph)

    return jax.vmap(one)(keys)


@partial(jax.jit, static_argnums=(0, 1))
def _step(
    env: Environment, graph: bool, keys: Array, states: EnvState, actions: Array, params: EnvParams
) -> tuple[Any, ...]:
    def one(key: Array, state: EnvState, action: Array) -> tuple[Any, ...]:
        key, key_step = jax.random.split(key)
        obs, state, reward, terminated, truncated, info = env.step(key_step, state, action, params)
        answers = {name: getattr(info["completions"], name) for name in _ANSWERS}
        happened = {"dropped": info["dropped"], "gap_s": info["gap_s"], **answers}
        now, final = _seen(obs, graph), _seen(info["final_observation"], graph)
        return key, state, now, final, happened, reward, terminated, truncated

    return jax.vmap(one)(keys, states, actions)


def _seen(obs: Observation, graph: bool) -> dict[str, Any]:
    if not graph:
        return {"obs": flat_view(obs), "action_mask": obs.action_mask}
    # Masks are 0 and 1, as gymnasium has them.
    parts = {name: x.astype(jnp.int8) if x.dtype == bool else x for name, x in vars(graph_features(obs)).items()}
    return {"obs": parts, "action_mask": obs.action_mask}


def _masked(columns: dict[str, np.ndarray], here: np.ndarray) -> Info:
    """Returns the columns [E, ...] as gymnasium has them: each beside its mask, 0 outside; none if ``here`` [E] is."""
    info: Info = {}
    if here.any():
        for name, values in columns.items():
            info[name], info[f"_{name}"] = values.copy(), here.copy()
            info[name][~here] = 0
    return info


def _first(info: Info) -> Info:
    """Returns the info of the first environment alone, with plain numbers."""
    first = {name: values[0] for name, values in info.items() if not name.startswith("_")}
    return {name: value if value.ndim else value.item() for name, value in first.items()}
