"""Recipes: what is trained in which world, so that programs, studies, notebooks and README train the same agents."""

from __future__ import annotations

import dataclasses
from typing import Any

from qos_jax.agent import configs
from qos_jax.agent.configs import AgentConfig
from qos_jax.errors import InputError
from qos_jax.io.text_files import shown
from qos_jax.worlds.config import WorldConfig
from qos_jax.worlds.randomization import rate_clip_per_s

EQUAL_GPUS_MAX_EXTERNALITY = 0.35  # reward units; see docs/decisions
"""On equal GPUs the cost of a placement to later requests is overestimated: a reactive router would drop one of them.
On unequal ones it is real, since one request too many on a slow expert delays many others."""

_LARGE_FLEET = 12  # experts
_SIZES_OF_LARGE_FLEETS: dict[str, Any] = {"num_envs": 32, "updates": 20, "capacity": 32 * 32}  # rows of 32 chunks
"""A chunk has seven requests per expert in each environment, so that in large fleets few chunks, and thus few gradient
steps, would come of as many requests. Older rows are of a router that crowded other experts; see docs/decisions."""

_STEPS = {"paper-3": 200_000, "paper-6": 1_000_000, "campus-16": 200_000}
_DEFAULT_STEPS = 400_000
_WITH_VALUES = ("returns", "temporal_difference")  # targets that bootstrap: values must travel the discount's horizon,
_STEPS_OF_VALUES = {"paper-3": 1_000_000}  # which is more requests in larger fleets
_DEFAULT_STEPS_OF_VALUES = 2_000_000


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An agent, and how it is trained."""

    agent: AgentConfig
    steps: int  # requests routed in training, of each seed
    randomise: tuple[str, ...] = ("load", "arrivals")  # what differs between environments, see ``training.config``


def recipe(world: str | WorldConfig = "paper-3", agent: str | AgentConfig = "mvr") -> Recipe:
    """Returns the tuned recipe of a world.

    ``rate_clip_per_s`` of its network is None where the fleet is not the preset's; training then derives it likewise.

    Args:
      world: name of a preset, or a world.
      agent: one of ``AGENTS``, or a configuration of one's own.

    Raises:
      InputError: the world or the agent is unknown.
    """
    if isinstance(world, str):
        world = WorldConfig(world)
    if not isinstance(world, WorldConfig):
        raise InputError(f"world is {shown(world)}, must be the name of a preset or a WorldConfig")
    if not isinstance(agent, AgentConfig | str):
        raise InputError(f"agent is {shown(agent)}, must be the name of an agent or an AgentConfig")
    config = agent if isinstance(agent, AgentConfig) else configs.named(agent)
    if len({gpu for _, gpu in world.pairs}) == 1:
        config = dataclasses.replace(config, hyper=config.hyper.replace(max_externality=EQUAL_GPUS_MAX_EXTERNALITY))
    if isinstance(agent, str) and config.targets == "counterfactual" and len(world.pairs) >= _LARGE_FLEET:
        config = dataclasses.replace(config, **_SIZES_OF_LARGE_FLEETS)
    if world.has_preset_fleet:  # of another fleet the saturation rate is simulated, once, by training
        clip_per_s = rate_clip_per_s(*WorldConfig(world.preset, world.fleet).build())
        config = dataclasses.replace(config, network=dataclasses.replace(config.network, rate_clip_per_s=clip_per_s))
    known, default = _STEPS, _DEFAULT_STEPS
    if config.targets in _WITH_VALUES:
        known, default = _STEPS_OF_VALUES, _DEFAULT_STEPS_OF_VALUES
    return Recipe(
        agent=config,
        steps=default if world.fleet is not None else known.get(world.preset, default),
        randomise=("load", "arrivals") if world.trace is world.arrivals_file is None else ("load",),
    )
