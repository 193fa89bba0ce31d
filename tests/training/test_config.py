"""A run as plain values, and the recipes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

import qos_jax
from qos_jax import InputError, WorldConfig
from qos_jax.agent.configs import AGENTS, named
from qos_jax.agent.networks import NetworkConfig
from qos_jax.programs.choices import PRESETS
from qos_jax.programs.train import configs_of, parsed
from qos_jax.training.config import RANDOMISED, TrainingConfig, runs_of
from qos_jax.training.run import training_run
from qos_jax.training.run_config import make_config


def test_a_run_survives_json() -> None:
    agent = AGENTS["sac"]
    runs = runs_of(agent, (3, 4), ["load=0.5,1", "alpha=0.1,0.2"])
    config = TrainingConfig(agent, 1000, runs, ("load", "arrivals"), (0.5, 1.4), 100, save_replay=False)
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_combination_trains_with_every_seed() -> None:
    runs = runs_of(AGENTS["mvr"], (0, 1), ["load=0.5,1", "alpha=0.1"])
    assert runs == tuple({"load": load, "alpha": 0.1, "seed": seed} for load in (0.5, 1.0) for seed in (0, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden=8,16", "--vary=hidden=8,16: choose load, or one of learning_rate"),
        ("alpha=low", "--vary=alpha=low: give FIELD=NUMBER,NUMBER"),
        ("alpha=inf", "--vary=alpha=inf: give FIELD=NUMBER,NUMBER"),
        ("load=0", "--vary=load=0: give loads above 0"),
    ],
)
def test_what_cannot_vary_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        runs_of(AGENTS["mvr"], (0,), [text])
    assert message in str(raised.value)


@pytest.mark.parametrize("seed", [-1, 1000, 0.5])
def test_seeds_of_evaluation_are_refused(seed: float) -> None:
    with pytest.raises(InputError, match="seeds must be below 1000"):
        TrainingConfig(runs=({"seed": seed},))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": "x"}, "steps is 'x', must be a whole number from 1"),
        ({"evaluate_every": 0.5}, "evaluate_every is 0.5, must be a whole number from 1"),
        ({"evaluation_envs": 0}, "evaluation_envs is 0, must be a whole number from 1"),
        ({"keep": "first"}, "keep is 'first', must be one of auto, best, last"),
        ({"loads": 5}, "loads is 5, must be a tuple of numbers above 0"),
        ({"loads": (0.5, "x")}, "loads has 'x', must have finite numbers above 0"),
        ({"loads": (10**400,)}, "loads has 1000.*, must have finite numbers above 0"),
        ({"randomise": "load"}, "randomise is 'load', must be a tuple of names"),
        ({"randomise": ("luck",)}, "--randomise=luck: choose all, or some of load, .*, fleet; and preferences"),
        ({"seeds": 5}, "seeds is 5, must be one or more whole numbers"),
    ],
)
def test_an_argument_of_another_kind_is_refused(fields: dict[str, Any], message: str) -> None:
    recipe = qos_jax.Recipe(AGENTS["mvr"], 8)
    with pytest.raises(InputError, match=message):
        qos_jax.train("paper-3", recipe, **fields)


@pytest.mark.parametrize(
    ("best", "fields"),
    [
        (True, {}),
        (True, {"randomise": ("load", "arrivals")}),
        (False, {"randomise": ("load", "fleet")}),
        (False, {"runs": ({"seed": 0}, {"energy": 1.0, "seed": 0})}),
        (False, {"keep": "last"}),
        (True, {"keep": "best", "randomise": ("load", "fleet")}),
    ],
)
def test_the_best_weights_are_kept_where_evaluations_judge_what_training_strives_for(
    best: bool, fields: dict[str, Any]
) -> None:
    assert TrainingConfig(AGENTS["mvr"], **fields).keeps_best is best


def test_who_reads_preferences_meets_several_in_training() -> None:
    agent = dataclasses.replace(AGENTS["mvr"], network=NetworkConfig(with_preferences=True))
    with pytest.raises(InputError, match=r"with_preferences is True, which needs preferences .*--randomise=load,pref"):
        TrainingConfig(agent, randomise=("load",))
    asked = TrainingConfig(AGENTS["mvr"], randomise=("load", "preferences"))
    run, again = (training_run(WorldConfig(), asked) for _ in range(2))
    assert run.learner.config.network.with_preferences and run.validation.params.preferences is None
    for name, one in vars(run.params.preferences).items():
        np.testing.assert_array_equal(one, getattr(again.params.preferences, name))
    assert TrainingConfig.from_dict(make_config(run.learner, asked)["training"]).agent == run.learner.config


def test_a_network_reads_cached_prefixes_where_it_is_trained_with_sessions() -> None:
    run = training_run(WorldConfig("edge-2026"), TrainingConfig(AGENTS["mvr"]))
    assert run.learner.config.network.with_sessions
    assert not training_run(WorldConfig(), TrainingConfig(AGENTS["mvr"])).learner.config.network.with_sessions


def test_all_that_is_randomised_is_of_the_world() -> None:
    """So a run that began with all goes on with the same."""
    _, training = configs_of(parsed(["--randomise=all"]))
    assert training.randomise == RANDOMISED and "preferences" not in RANDOMISED


class TestRecipes:
    def test_the_program_and_the_library_train_the_same_agent(self) -> None:
        for preset in ("paper-3", "paper-6", "edge-8"):
            world, training = configs_of(parsed([f"--preset={preset}"]))
            tuned = qos_jax.recipe(preset)
            assert world == WorldConfig(preset)
            assert training == TrainingConfig(tuned.agent, tuned.steps, randomise=tuned.randomise)

    def test_externalities_are_clipped_where_gpus_are_equal(self) -> None:
        assert qos_jax.recipe("paper-3").agent.hyper.max_externality == 0.35
        assert qos_jax.recipe("paper-6").agent.hyper.max_externality == 0.35
        assert qos_jax.recipe("edge-8").agent.hyper.max_externality == named("mvr").hyper.max_externality
        mixed = WorldConfig(experts=("alpaca-native@A40", "koala-7B-HF@A100"))
        assert qos_jax.recipe(mixed).agent.hyper.max_externality == named("mvr").hyper.max_externality

    def test_rates_are_clipped_at_the_greatest_load_of_training(self) -> None:
        clips = {preset: qos_jax.recipe(preset).agent.network.rate_clip_per_s for preset in ("paper-3", "edge-8")}
        assert clips == {"paper-3": 10.7, "edge-8": 11.9}

    @pytest.mark.parametrize("preset", PRESETS)
    def test_every_recipe_takes_some_hundred_gradient_steps(self, preset: str) -> None:
        """With 280 of them the router of campus-16 was worse than the estimate that it starts at."""
        tuned = qos_jax.recipe(preset)
        learner = training_run(WorldConfig(preset), TrainingConfig(tuned.agent, tuned.steps)).learner
        assert tuned.steps / learner.steps_per_chunk * tuned.agent.updates > 500

    def test_flags_change_the_recipe(self) -> None:
        _, training = configs_of(parsed(["--load=0.7", "--set=max_externality=1", "--steps=5", "--seeds=2"]))
        assert (training.loads, training.randomise, training.steps) == ((0.7,), ("arrivals",), 5)
        assert training.agent.hyper.max_externality == 1.0
        assert training.seeds == [0, 1]
        _, training = configs_of(parsed(["--randomise=none", "--set=num_envs=64"]))
        assert (training.loads, training.randomise, training.agent.num_envs) == ((), (), 64)

    def test_unknown_names_are_refused(self) -> None:
        with pytest.raises(InputError, match="preset 'paper-9' is unknown"):
            qos_jax.recipe("paper-9")
        with pytest.raises(InputError, match="agent 'psychic' is unknown"):
            qos_jax.recipe("paper-3", "psychic")
