"""What the critics learn from: one kind of target a file, chosen by ``AgentConfig.targets``."""

from __future__ import annotations

from qos_jax.agent.targets.base import Agent, Targets
from qos_jax.agent.targets.counterfactual import Counterfactual
from qos_jax.agent.targets.temporal_difference import TemporalDifference
from qos_jax.errors import InputError

__all__ = ["Agent", "Targets", "register_targets", "targets_named"]

_TARGETS: dict[str, Targets] = {
    "counterfactual": Counterfactual(),
    "temporal_difference": TemporalDifference(),
}


def register_targets(name: str, targets: Targets) -> None:
    """Makes a kind of target known under a name that ``AgentConfig.targets`` may have from then on.

    Raises:
      InputError: the name is taken by another one.
    """
    if _TARGETS.get(name, targets) is not targets:
        raise InputError(f"targets {name!r} are registered already: choose another name")
    _TARGETS[name] = targets


def targets_named(name: str) -> Targets:
    """Returns the targets of this name.

    Raises:
      InputError: there are none.
    """
    if not isinstance(name, str) or name not in _TARGETS:
        raise InputError(f"targets is {name!r}, must be one of {', '.join(_TARGETS)}")
    return _TARGETS[name]
