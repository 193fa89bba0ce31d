"""Agents by name: marginal-value regression (``mvr``) and its ablations, the paper's agent, and soft actor-critics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qos_jax.agent.networks import NetworkConfig
from qos_jax.agent.rewards import RewardWeights
from qos_jax.agent.sac import Hyperparameters
from qos_jax.agent.targets import targets_named
from qos_jax.encoder.han import HANConfig
from qos_jax.errors import InputError
from qos_jax.io import dataclass_json


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """What fixes the compiled program of an agent, so a change recompiles; only ``hyper`` is traced."""

    network: NetworkConfig = NetworkConfig()
    targets: str = "counterfactual"
    num_envs: int = 128
    chunk: int = 7
    """Requests of each environment per chunk; with counterfactual targets requests per expert."""
    copies: int = 1  # of each environment in a chunk, which receive the same requests; with returns
    probes: int = 4  # probes at a time: each runs for ``probes * chunk`` requests per expert
    updates: int = 10  # gradient steps per chunk
    batch_size: int = 512
    capacity: int = 65_536  # rows of the replay buffer
    warm_up: int = 200  # requests of each environment routed at random before training
    shards: int = 1  # parts of environments, replay buffer and batch that devices may share; see ``training.parallel``
    hyper: Hyperparameters = Hyperparameters()

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
          InputError: the targets are unknown, or a size is out of range.
        """
        targets = targets_named(self.targets)
        for name in ("num_envs", "chunk", "copies", "probes", "updates", "batch_size", "capacity", "warm_up", "shards"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, must be at least 1")
        targets.check(self)
        if self.capacity % self.rows_per_chunk:
            raise InputError(
                f"capacity is {self.capacity}, must be a multiple of the {self.rows_per_chunk} rows of a chunk"
            )

        for name in ("num_envs", "batch_size", "capacity"):
            if getattr(self, name) % self.shards:
                raise InputError(f"{name} is {getattr(self, name)}, must be a multiple of the {self.shards} shards")

    @property
    def rows_per_chunk(self) -> int:
        """Rows that a chunk adds to the replay buffer."""
        return targets_named(self.targets).rows_per_chunk(self)


def _return_learner(**numbers: Any) -> AgentConfig:
    network = replace(_MVR, encoder="pooled", slots=1, value=True)  # which reads no requests, so one is kept in a row
    hyper = Hyperparameters(
        gamma=1.0,
        polyak=0.98,
        alpha=0.015,
        reset_prob=0.05,
        empty_prob=0.1,
        discount_s=10.0,
        joint=0.5,
        weights=RewardWeights(potential=1.0),
    )
    return AgentConfig(
        network,
        "returns",
        num_envs=64,
        chunk=128,
        copies=4,
        updates=32,
        batch_size=512,
        capacity=64 * 128 * 4,
        hyper=hyper.replace(**numbers),
    )


def _value_learner(network: NetworkConfig, hyper: Hyperparameters) -> AgentConfig:
    return AgentConfig(
        network, "temporal_difference", chunk=16, updates=32, batch_size=256, capacity=128 * 16 * 48, hyper=hyper
    )


_MVR = NetworkConfig(slots=32)  # as many as run at a time; they were three quarters of the time to train
_PAPER = NetworkConfig(
    readout="arrived",
    actor=True,
    with_impact=False,
    with_rates=False,
    residual=False,
    slots=20,
    hidden=(64, 64),
    han=HANConfig(64, 8),
)
_FLAT = NetworkConfig("flat", "arrived", actor=True, with_impact=False, residual=False, hidden=(64, 64))
_SAC_HYPER = Hyperparameters(
    learning_rate=1e-3, final_learning_rate=1e-4, alpha=0.1, alpha_rate=1e-3, weights=RewardWeights(potential=1.0)
)
_PAPER_HYPER = Hyperparameters(
    learning_rate=3e-4,
    final_learning_rate=3e-4,
    polyak=0.98,  # with 0.995 values reach half of what they should be in a million requests
    alpha=0.03,
    alpha_rate=1e-3,
    min_q_weight=1.0,
    critic_entropy=1.0,
    weights=RewardWeights(predicted_loss=1.0),
)

OLD_NAMES = {
    "ours": "mvr",
    **{f"ours_{part}": f"mvr_{part}" for part in ("no_impact", "no_rates", "no_residual", "1_layer", "3_layers")},
    "ours_no_han": "mvr_no_graph",
}
"""Names of agents in earlier releases, accepted in flags and configurations."""

OLD_FIELDS = {
    "most_harm": "max_externality",
    "most_rate": "rate_clip_per_s",
    "least_weight": "min_q_weight",
    "teacher": "targets",
    "twins": "probes",
    "prefill": "warm_up",
    "restart": "reset_prob",
}
"""Names of fields in earlier releases, likewise."""

AGENTS: dict[str, AgentConfig] = {
    "mvr": AgentConfig(_MVR),
    "mvr_no_graph": AgentConfig(replace(_MVR, encoder="pooled")),
    "mvr_no_impact": AgentConfig(replace(_MVR, with_impact=False, residual=False)),
    "mvr_no_rates": AgentConfig(replace(_MVR, with_rates=False)),
    "mvr_no_residual": AgentConfig(replace(_MVR, residual=False)),
    "mvr_1_layer": AgentConfig(replace(_MVR, han=HANConfig(layers=1))),
    "mvr_3_layers": AgentConfig(replace(_MVR, han=HANConfig(layers=3))),
    "sac": _return_learner(),
    "sac_joint": _return_learner(joint=1.0),
    "sac_td0": _value_learner(replace(_MVR, actor=True), _SAC_HYPER),
    "sac_paper_reward": _return_learner(weights=RewardWeights(predicted_loss=1.0)),
    "paper": _value_learner(_PAPER, _PAPER_HYPER),
    "baseline_rl": _value_learner(_FLAT, _PAPER_HYPER.replace(weights=RewardWeights())),
}


def named(name: str) -> AgentConfig:
    """Returns the agent of this name, which may be one of ``OLD_NAMES``.

    Raises:
      InputError: there is none.
    """
    name = OLD_NAMES.get(name, name)
    if name not in AGENTS:
        raise InputError(f"agent {name!r} is unknown; choose from {', '.join(AGENTS)}")
    return AGENTS[name]


def to_dict(config: AgentConfig) -> dict[str, Any]:
    """Returns the configuration as plain values that JSON can hold."""
    return dataclass_json.to_dict(config)


def from_dict(values: Mapping[str, Any]) -> AgentConfig:
    """Rebuilds the configuration that ``to_dict`` wrote.

    Raises:
      InputError: a field is unknown, missing or of the wrong kind.
    """
    return dataclass_json.from_dict(AgentConfig(), values, "agent")
