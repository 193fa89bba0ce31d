"""The environment for libraries in Python: gymnasium (extra ``gym``) and Stable-Baselines3 (extra ``sb3``).

``RouterVectorEnv`` and ``RouterEnv`` are environments of gymnasium. ``RouterVecEnv`` is a ``VecEnv`` of
Stable-Baselines3, which is imported only when the class is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from qos_jax.gym.envs import RouterEnv, RouterVectorEnv
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "gymnasium":
        raise
    raise ImportError("qos_jax.gym needs gymnasium 1.1 or later: pip install 'qos_jax[gym]'") from error

if TYPE_CHECKING:
    from qos_jax.gym.sb3 import RouterVecEnv

__all__ = ["RouterEnv", "RouterVecEnv", "RouterVectorEnv"]


def __getattr__(name: str) -> Any:
    """Imports ``RouterVecEnv`` when it is first used."""
    if name != "RouterVecEnv":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qos_jax.gym.sb3 import RouterVecEnv

    return RouterVecEnv
