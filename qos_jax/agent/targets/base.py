"""What every kind of critic target provides, and what it may use of the learner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from flax import linen as nn
from jax import Array

from qos_jax.agent.networks import Heads, Inputs
from qos_jax.agent.sac import Hyperparameters, LearnerState

CriticLoss = Callable[[Heads], Array]  # what the network says of a batch -> loss []


class Agent(Protocol):
    """The part of ``qos_jax.agent.learner.Learner`` that targets use."""

    @property
    def env(self) -> Any:
        """The environment: reset, step and observe."""

    @property
    def config(self) -> Any:
        """The ``AgentConfig``; the sizes are those of one shard."""

    @property
    def network(self) -> nn.Module:
        """From inputs to ``Heads``."""

    @property
    def features(self) -> Callable[[Any], Inputs]:
        """From the observation of one environment to the network's inputs."""

    @property
    def reward(self) -> Callable[..., Array]:
        """The reward of one step, see ``qos_jax.agent.rewards.shaped_reward``."""

    def sample(self, learner: LearnerState, key: Array, inputs: Inputs) -> Array:
        """Draws an action [] int32 from the policy."""

    def step(self, key: Array, states: Any, action: Array, params: Any) -> Any:
        """Steps all environments."""


class Targets(Protocol):
    """One way to teach the critics. Implementations hold no state and are registered with ``register_targets``."""

    def check(self, config: Any) -> None:
        """Raises ``InputError`` where the sizes of an ``AgentConfig`` do not go together."""

    def rows_per_chunk(self, config: Any) -> int:
        """Returns how many rows a chunk adds to the replay buffer."""

    def requests_per_chunk(self, config: Any, num_experts: int) -> int:
        """Returns how many requests each environment routes in a chunk."""

    def empty_row(self, inputs: Inputs) -> Any:
        """Returns one row of the replay buffer, as a pytree with a field ``inputs``."""

    def init(self, agent: Agent, states: Any, inputs: Inputs) -> Any:
        """Returns what is kept beside the environments [num_envs, ...] from chunk to chunk; None for nothing."""

    def collect(
        self, agent: Agent, state: Any, params: Any, hyper: Hyperparameters, key: Array, chunk: Array
    ) -> tuple[Any, Any, dict[str, Array]]:
        """Routes one chunk of requests in every environment.

        Returns:
          The ``TrainState`` after it, the rows [rows_per_chunk, ...] for the replay buffer, and metrics [].
        """

    def batch(self, config: Any, ring: Any, key: Array, oldest: Array, filled: Array) -> Any:
        """Draws ``config.batch_size`` rows with replacement: drawing without is four times as slow.

        Args:
          config: the ``AgentConfig``.
          ring: the replay buffer, leaves [capacity, ...].
          key: of the draw.
          oldest: [] int32, index of the oldest row.
          filled: [] int32, number of rows written so far.
        """

    def critic_loss(
        self, network: nn.Module, hyper: Hyperparameters, state: LearnerState, batch: Any
    ) -> tuple[Inputs, CriticLoss]:
        """Returns the inputs of a batch, leaves [B, ...], and the critics' loss on what the network says of them."""
