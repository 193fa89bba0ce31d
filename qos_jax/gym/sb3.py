"""The ``VecEnv`` of Stable-Baselines3; needs the extra ``sb3``."""

from __future__ import annotations

from typing import Any

import numpy as np

from qos_jax.errors import InputError
from qos_jax.gym.envs import Info, RouterVectorEnv
from qos_jax.sim.env import Environment, EnvParams

try:
    from stable_baselines3.common.vec_env import VecEnv
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("stable_baselines3", "torch"):
        raise
    raise ImportError("qos_jax.gym.RouterVecEnv needs Stable-Baselines3: pip install 'qos_jax[sb3]'") from error


class RouterVecEnv(VecEnv):
    """A ``RouterVectorEnv`` for agents of Stable-Baselines3: ``PPO("MlpPolicy", RouterVecEnv(env, params, 8))``.

    The info of an environment has the sums and times of ``RouterVectorEnv``'s info. Where an episode ends it also has
    ``terminal_observation`` and ``TimeLimit.truncated``. ``env_method("action_masks")`` returns the legal actions
    [N + 1] of each environment, which ``MaskablePPO`` of sb3-contrib uses.
    """

    render_mode: str | None = None

    def __init__(self, env: Environment, params: EnvParams, num_envs: int) -> None:
        """Makes the environments; all have the same ``params``.

        Raises:
          InputError: ``num_envs`` is below 1.
        """
        self._envs = RouterVectorEnv(env, params, num_envs)
        self._actions: Any = None
        self._action_mask = np.zeros((num_envs, env.num_actions), bool)
        super().__init__(num_envs, self._envs.single_observation_space, self._envs.single_action_space)

    def reset(self) -> np.ndarray:
        """Starts new episodes; after ``seed(s)`` those of ``RouterVectorEnv.reset(seed=s)``.

        Returns:
          Observations [E, F].

        Raises:
          InputError: the seed is not from 0 to 2^32 - 1, or there are options.
        """
        if any(self._options):
            raise InputError(f"reset options are {self._options}: there are none")
        obs, info = self._envs.reset(seed=self._seeds[0])
        self._action_mask = info["action_mask"]
        self.reset_infos = [_row(info, i) for i in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return obs

    def step_async(self, actions: np.ndarray) -> None:
        """Keeps the actions [E] for ``step_wait``."""
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Info]]:
        """Takes the actions.

        Returns:
          Observations [E, F], the first ones of the next episodes where episodes end; rewards [E]; where episodes end
          [E]; and an info for each environment.
        """
        obs, rewards, _, truncated, info = self._envs.step(self._actions)
        self._action_mask = info["action_mask"]
        infos = [_row(info["final_info"] if ended else info, i) for i, ended in enumerate(truncated)]
        for i in np.flatnonzero(truncated):
            infos[i] |= {"terminal_observation": info["final_obs"][i], "TimeLimit.truncated": True}
        return obs, rewards, truncated, infos

    def close(self) -> None:
        """Closes the environments."""
        self._envs.close()

    def action_masks(self) -> np.ndarray:
        """Returns the legal actions [E, N + 1] bool of the observations last returned."""
        return self._action_mask

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Returns an attribute of this object for each of the environments, which have none of their own."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refuses to set an attribute, as all environments are one program with the same parameters."""
        raise InputError(f"attribute {attr_name!r} cannot be set: make another RouterVecEnv with other params")

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Calls a method that returns a row for each environment, such as ``action_masks``; returns these rows."""
        rows = getattr(self, method_name)(*method_args, **method_kwargs)
        return [rows[i] for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Returns False for each environment."""
        return [False for _ in self._get_indices(indices)]


def _row(info: Info, i: int) -> Info:
    """Returns the sums and times of environment ``i`` in its last step."""
    fields = {name: x[i] for name, x in info.items() if not name.startswith(("_", "final_", "action_mask"))}
    return {name: value if np.ndim(value) else value.item() for name, value in fields.items()}
