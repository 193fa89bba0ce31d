"""Targets of the critics, one kind per file; ``AgentConfig.targets`` names the kind."""

from __future__ import annotations

from qos_jax.agent.targets.base import Agent, Targets
from qos_jax.agent.targets.counterfactual import Counterfactual
from qos_jax.agent.targets.returns import Returns
from qos_jax.agent.targets.temporal_difference import TemporalDifference
from qos_jax.errors import InputError

__all__ = ["Agent", "Targets", "register_targets", "targets_named"]

_TARGETS: dict[str, Targets] = {
    "counterfactual": Counterfactual(),
    "returns": Returns(),
    "temporal_difference": TemporalDifference(),
}
_BUILT_IN = tuple(_TARGETS)


def register_targets(name: str, targets: Targets) -> None:
    """Registers a kind of target under a name for ``AgentConfig.targets``; a later one replaces an earlier one.

    Raises:
      InputError: the name is built in.
    """
    if name in _BUILT_IN:
        raise InputError(f"targets {name!r} are built in: choose another name")
    _TARGETS[name] = targets


def targets_named(name: str) -> Targets:
    """Returns the targets registered under a name.

    Raises:
      InputError: the name is unknown.
    """
    if not isinstance(name, str) or name not in _TARGETS:
        raise InputError(
            f"targets {name!r} are not known: register them first (qos_jax.register_targets), "
            f"or choose from {', '.join(_TARGETS)}"
        )
    return _TARGETS[name]
