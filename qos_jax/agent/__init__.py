"""The agent: networks, soft actor-critic, and what teaches it."""

from qos_jax.agent.configs import AGENTS, AgentConfig
from qos_jax.agent.learner import Learner, TrainState, make_learner
from qos_jax.agent.networks import NetworkConfig
from qos_jax.agent.rewards import RewardWeights
from qos_jax.agent.sac import Hyperparameters

__all__ = [
    "AGENTS",
    "AgentConfig",
    "Hyperparameters",
    "Learner",
    "NetworkConfig",
    "RewardWeights",
    "TrainState",
    "make_learner",
]
