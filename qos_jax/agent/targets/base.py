"""Protocols: what every kind of critic target provides, and the part of the learner that it uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from flax import linen as nn
from jax import Array

from qos_jax.agent.networks import Heads, Inputs
from qos_jax.agent.sac import Hyperparameters, LearnerState

CriticLoss = Callable[[Heads], Array]  # output of the network for a batch -> loss []


class Agent(Protocol):
    """The part of ``qos_jax.agent.learner.Learner`` that targets use."""

    @property
    def env(self) -> Any:
        """The environment: reset, step and observe."""

    @property
    def config(self) -> Any:
        """The ``AgentConfig``, with the sizes of one shard."""

    @property
    def network(self) -> nn.Module:
        """Maps inputs to ``Heads``."""

    @property
    def features(self) -> Callable[[Any], Inputs]:
        """Maps the observation of one environment to the network's inputs."""

    @property
    def reward(self) -> Callable[..., Array]:
        """The reward of one step, like ``qos_jax.agent.rewards.shaped_reward``."""

    def sample(self, learner: LearnerState, key: Array, inputs: Inputs) -> Array:
        """Samples an action [] int32 from the policy."""

    def step(self, key: Array, states: Any, action: Array, params: Any) -> Any:
        """Steps all environments."""


class Targets(Protocol):
    """One kind of critic target. Implementations are stateless and registered with ``register_targets``."""

    def check(self, config: Any) -> None:
        """Raises ``InputError`` if the sizes of an ``AgentConfig`` are incompatible."""

    def rows_per_chunk(self, config: Any) -> int:
        """Returns the number of rows that a chunk adds to the replay buffer."""

    def requests_per_chunk(self, config: Any, num_experts: int) -> int:
        """Returns the number of requests that each environment routes in a chunk."""

    def empty_row(self, inputs: Inputs) -> Any:
        """Returns one row of the replay buffer, a pytree with a field ``inputs``."""

    def init(self, agent: Agent, states: Any, inputs: Inputs) -> Any:
        """Returns the state that is kept beside the environments [num_envs, ...] between chunks; None without any."""

    def collect(
        self, agent: Agent, state: Any, params: Any, hyper: Hyperparameters, key: Array, chunk: Array
    ) -> tuple[Any, Any, dict[str, Array]]:
        """Routes one chunk of requests in every environment.

        Args:
          agent: the learner.
          state: its ``TrainState``.
          params: of the environments, shared or with an axis [num_envs].
          hyper: numbers of the algorithm.
          key: random key.
          chunk: [] int32, number of previous chunks.

        Returns:
          The ``TrainState`` after the chunk, the rows [rows_per_chunk, ...] for the replay buffer, and metrics [].
        """

    def batch(self, config: Any, ring: Any, key: Array, oldest: Array, filled: Array) -> Any:
        """Samples ``config.batch_size`` rows with replacement; without replacement takes four times as long.

        Args:
          config: the ``AgentConfig``.
          ring: the replay buffer, leaves [capacity, ...].
          key: random key.
          oldest: [] int32, index of the oldest row.
          filled: [] int32, number of rows that hold data.
        """

    def critic_loss(
        self, network: nn.Module, hyper: Hyperparameters, state: LearnerState, batch: Any
    ) -> tuple[Inputs, CriticLoss]:
        """Returns the inputs of a batch, leaves [B, ...], and the critics' loss of the network's output for them."""
