"""The folder of a run: what is read back is what was written, and what cannot be used is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qos_jax import InputError, load_router
from qos_jax.agent import Learner
from qos_jax.agent.networks import NetworkConfig, heads_of
from qos_jax.encoder.han import HANConfig
from qos_jax.sim.types import Observation, Preferences
from qos_jax.training.config import TrainingConfig, runs_of
from qos_jax.training.run import TrainingRun
from qos_jax.training.run_config import CONFIG, check_same, make_config, read_config
from qos_jax.training.run_folder import RunFolder, locked
from qos_jax.training.validation import Validation
from tests.helpers.instant_env import assert_equal, small_learner
from tests.helpers.observations import observation
from tests.helpers.quick_compilation import quick_compilation
from tests.helpers.small_env import small_params

ROOT = pathlib.Path(__file__).parents[2]
POINTER = NetworkConfig(encoder="pooled", hidden=(8,), han=HANConfig(8, 2, 1))


initial = jax.jit(Learner.init, static_argnums=0)


@cache
def state_of(learner: Learner, seed: int = 0) -> Any:
    params = small_params(learner.env.spec.num_experts)
    return initial(learner, jax.random.key(seed), params, learner.config.hyper)


def training_of(learner: Learner, seeds: tuple[int, ...] = (0,), **fields: Any) -> TrainingConfig:
    return TrainingConfig(learner.config, 64, runs_of(learner.config, seeds), **fields)


def saved(path: pathlib.Path, learner: Learner, seeds: tuple[int, ...] = (0,)) -> RunFolder:
    """A run with a checkpoint after 64 steps, of states that were not trained."""
    folder = RunFolder.start(path, make_config(learner, training_of(learner, seeds)))
    states = [state_of(learner, seed) for seed in seeds]
    state = states[0] if len(seeds) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *states)
    folder.save(64, state, learner.weights(state))
    return folder


def idle(num_experts: int) -> Observation:
    return observation(*[[]] * num_experts)


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return saved(tmp_path_factory.mktemp("flat") / "tiny", small_learner())


@pytest.fixture
def copy(flat: RunFolder, tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder of a run that a test may spoil."""
    return pathlib.Path(shutil.copytree(flat.path, tmp_path / "copy"))


class TestRunFolder:
    def test_a_state_comes_back_bit_for_bit(self, flat: RunFolder) -> None:
        state = state_of(small_learner())
        assert_equal(flat.restore_state(64, jax.eval_shape(lambda: state)), state)

    def test_a_state_that_lacks_what_came_later_does_not_go_on(self, copy: pathlib.Path) -> None:
        folder, state = RunFolder.reopen(copy), {"a": jnp.zeros(2)}
        folder.save(96, state, state)
        with pytest.raises(InputError, match=r"b is absent, must be float32\[3\].*can be loaded, but training cannot"):
            folder.restore_state(96, {**state, "b": jnp.zeros(3)})

    def test_only_the_newest_two_checkpoints_are_kept(self, copy: pathlib.Path) -> None:
        folder, state = RunFolder.reopen(copy), {"a": jnp.zeros(2)}
        for steps in (128, 1024):
            folder.save(steps, state, state)
        assert sorted(os.listdir(copy / "checkpoints")) == ["1024", "128"]
        assert folder.latest == 1024

    def test_one_that_was_not_written_to_its_end_does_not_count(self, copy: pathlib.Path) -> None:
        folder, state = RunFolder.reopen(copy), {"a": jnp.zeros(2)}
        shutil.copytree(copy / "checkpoints" / "64" / "weights", copy / "checkpoints" / ".96" / "weights")
        assert folder.latest == 64
        folder.save(96, state, state)
        assert_equal(folder.restore_weights(96, state), state)

    def test_files_of_others_do_not_count(self, copy: pathlib.Path) -> None:
        folder, state = RunFolder.reopen(copy), {"a": jnp.zeros(2)}
        for place in [copy / "checkpoints", *(copy / "checkpoints" / "64").rglob("*")]:
            for name in (".DS_Store", "Thumbs.db", ".nfs0000000000a1", "desktop.ini") if place.is_dir() else ():
                (place / name).write_text("of a desktop")
        load_router(copy)
        before = state_of(small_learner())
        assert_equal(folder.restore_state(64, jax.eval_shape(lambda: before)), before)
        for steps in (128, 192):
            folder.save(steps, state, state)
        assert folder.latest == 192 and not folder.checkpoints.path(64).exists()

    @pytest.mark.parametrize("name", ["a b?c#d%20e", "{x} $y 'z' \"q\"", "new\nline", "ünï", "@*]|<>;&"])
    def test_the_folder_may_have_any_name(self, flat: RunFolder, tmp_path: pathlib.Path, name: str) -> None:
        folder, state = RunFolder.start(tmp_path / name, flat.config), {"a": jnp.arange(2)}
        folder.save(32, state, state)
        assert_equal(RunFolder.reopen(folder.path).restore_weights(32, state), state)

    @pytest.mark.parametrize("name", ["back\\slash", "run[1]", os.fsdecode(b"run-\xff")])
    def test_but_for_those_that_orbax_cannot_use(self, flat: RunFolder, tmp_path: pathlib.Path, name: str) -> None:
        with pytest.raises(
            InputError, match=r"Orbax cannot keep checkpoints below a path (with '(\\|\[)|that is not UTF-8)"
        ):
            RunFolder.start(tmp_path / name / "run", flat.config)
        assert not list(tmp_path.iterdir())
        shutil.copytree(flat.path, tmp_path / name)
        with pytest.raises(InputError, match="take another folder"):
            load_router(tmp_path / name)

    def test_an_old_checkpoint_may_be_a_link(self, copy: pathlib.Path, tmp_path: pathlib.Path) -> None:
        folder, state = RunFolder.reopen(copy), {"a": jnp.zeros(2)}
        elsewhere = folder.checkpoints.path(64).rename(tmp_path / "elsewhere")
        folder.checkpoints.path(64).symlink_to(elsewhere)
        load_router(copy)
        for steps in (128, 192):
            folder.save(steps, state, state)
        assert sorted(os.listdir(copy / "checkpoints")) == ["128", "192"]
        assert (elsewhere / "checksums.json").exists()

    def test_what_killed_programs_left_goes_when_the_run_goes_on(self, copy: pathlib.Path) -> None:
        learner = small_learner()
        (copy / "checkpoints" / ".192" / "weights").mkdir(parents=True)
        for name in (".config.json.123", ".metrics.jsonl.5", ".learning_curve.png.77", ".mine.7", ".config.json.old"):
            (copy / name).write_text("{")
        RunFolder.reopen(copy).go_on(make_config(learner, training_of(learner)))
        assert {path.name for path in copy.glob(".*")} == {".mine.7", ".config.json.old"}
        assert os.listdir(copy / "checkpoints") == ["64"]

    def test_each_part_of_a_run_has_its_versions(self, copy: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
        learner = small_learner()
        now = make_config(learner, dataclasses.replace(training_of(learner), steps=128))
        RunFolder.reopen(copy).go_on(now)
        assert capsys.readouterr().err == ""
        older = {**now, "versions": {**now["versions"], "jax": "0.9.9"}, "git": "f" * 40}
        for config in (older, now, now):
            RunFolder.reopen(copy).go_on(config)
        (note,) = capsys.readouterr().err.splitlines()
        jax_now, git_now = now["versions"]["jax"], now["git"]
        assert f"goes on after 64 steps with jax 0.9.9 (was {jax_now}), git {'f' * 40} (was {git_now})" in note
        RunFolder.reopen(copy).save(96, {"a": jnp.zeros(2)}, {"a": jnp.zeros(2)})
        RunFolder.reopen(copy).go_on(older)
        assert f"goes on after 96 steps with jax 0.9.9 (was {jax_now})" in capsys.readouterr().err
        parts = [(part["steps"], part["versions"]["jax"], part["git"]) for part in read_config(copy)["resumed"]]
        assert parts == [(64, jax_now, git_now), (96, "0.9.9", "f" * 40)]

    def test_other_random_numbers_are_refused(self, copy: pathlib.Path) -> None:
        learner, folder = small_learner(), RunFolder.reopen(copy)
        asked = make_config(learner, training_of(learner))
        assert asked["random"] == {"jax_default_prng_impl": "threefry2x32", "jax_threefry_partitionable": True}
        for name, other in (("jax_default_prng_impl", "rbg"), ("jax_threefry_partitionable", False)):
            with pytest.raises(InputError, match=rf"random.{name} is .*, but {other!r} is asked for"):
                check_same(folder.config, {**asked, "random": {**asked["random"], name: other}}, CONFIG)
        del folder.config["random"]  # as in runs of version 0.1
        check_same(folder.config, asked, CONFIG)

    @pytest.mark.parametrize("resumed", [5, [3], [{"steps": "a", "versions": {}}], [{"steps": 1, "versions": 3}]])
    def test_parts_that_were_edited_are_refused(self, copy: pathlib.Path, resumed: Any) -> None:
        changed(resumed=resumed)(copy)
        learner = small_learner()
        with pytest.raises(InputError, match=r"config.json: versions or resumed are not what was written"):
            RunFolder.reopen(copy).go_on(make_config(learner, training_of(learner)))

    def test_a_full_disk_leaves_the_checkpoints_that_are_there(self, copy: pathlib.Path) -> None:
        folder, state = RunFolder.reopen(copy), {"a": jnp.arange(300_000.0)}
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(InputError, match=r"cannot be written .*; the last one is .*/checkpoints/64$"):
                folder.save(128, state, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert folder.latest == 64
        before = state_of(small_learner())
        assert_equal(folder.restore_state(64, jax.eval_shape(lambda: before)), before)
        folder.save(128, state, state)
        assert folder.latest == 128

    def test_a_folder_that_nobody_may_write_to_is_named(self) -> None:
        with pytest.raises(InputError, match=r"/proc/run cannot be written"):
            RunFolder.start("/proc/run", {})

    def test_a_full_disk_is_named_by_whatever_is_written(self, copy: pathlib.Path) -> None:
        learner, folder = small_learner(), RunFolder.reopen(copy)
        before = (copy / "config.json").read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        try:
            with pytest.raises(InputError, match=r"metrics.jsonl: cannot be written: File too large"):
                folder.append({"steps": 1, "value": "x" * 20})
            with pytest.raises(InputError, match=r"config.json cannot be written: File too large"):
                folder.go_on(make_config(learner, training_of(learner)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (copy / "config.json").read_bytes() == before
        assert not list(copy.glob(".config*"))

    def test_two_programs_do_not_train_in_one_folder(self, copy: pathlib.Path) -> None:
        with locked(copy), pytest.raises(InputError, match="another program trains in this folder"), locked(copy):
            pass
        with locked(copy):
            pass

    def test_whoever_comes_second_changes_nothing(
        self, flat: RunFolder, copy: pathlib.Path, tmp_path: pathlib.Path
    ) -> None:
        learner = small_learner()
        longer = dataclasses.replace(training_of(learner), steps=128)
        run = TrainingRun(learner, small_params(), Validation(small_params(), (0.9,), 2, 4), longer, None)
        for path, resume in ((tmp_path / "new", False), (copy, True)):
            path.mkdir(exist_ok=True)
            with locked(path):
                before = {file: file.read_bytes() for file in path.iterdir() if file.is_file()}
                with pytest.raises(InputError, match="another program trains"), run.open_folder(path, resume=resume):
                    pass
            assert {file: file.read_bytes() for file in path.iterdir() if file.is_file()} == before
        with run.open_folder(copy, resume=True), pytest.raises(InputError, match="another program"), locked(copy):
            pass

    def test_another_run_is_not_overwritten(self, flat: RunFolder) -> None:
        before = (flat.path / "config.json").read_bytes()
        with pytest.raises(InputError, match=f"{flat.path} holds a run already"):
            RunFolder.start(flat.path, {})
        assert (flat.path / "config.json").read_bytes() == before

    def test_a_run_goes_on_as_it_began(self, flat: RunFolder) -> None:
        learner = small_learner()
        check_same(flat.config, make_config(learner, training_of(learner), command="another"), CONFIG)
        hotter = small_learner(hyper=learner.config.hyper.replace(alpha=0.5))
        with pytest.raises(InputError, match=r"training.agent.hyper.alpha is 0.03, but 0.5 is asked for"):
            check_same(flat.config, make_config(hotter, training_of(hotter)), CONFIG)
        with pytest.raises(InputError, match=r"training.runs is .*, but .* is asked for"):
            check_same(flat.config, make_config(learner, training_of(learner, (0, 1))), CONFIG)

    def test_a_run_can_be_prolonged_and_not_shortened(self, copy: pathlib.Path) -> None:
        learner, folder = small_learner(), RunFolder.reopen(copy)
        assert folder.finished
        longer = dataclasses.replace(training_of(learner), steps=128)
        folder.go_on(make_config(learner, longer))
        assert RunFolder.reopen(copy).training == dataclasses.replace(longer, agent=learner.config)
        assert not RunFolder.reopen(copy).finished
        with pytest.raises(InputError, match=r"training.steps is 128, but fewer are asked for"):
            check_same(RunFolder.reopen(copy).config, make_config(learner, training_of(learner)), CONFIG)

    def test_what_is_known_of_the_run_is_written_down(self, flat: RunFolder) -> None:
        config = read_config(flat.path)
        assert config["experts"] == ["expert 0", "expert 1", "expert 2"]
        assert {"jax", "flax", "orbax-checkpoint", "python"} <= set(config["versions"])
        assert config["git"] is None or len(config["git"].removesuffix("-dirty")) == 40

    def test_a_last_line_that_is_not_whole_is_left_out(self, copy: pathlib.Path) -> None:
        folder = RunFolder.reopen(copy)
        records = [{"steps": steps, "value": 1 / 3} for steps in (32, 64, 64, 96)]
        for record in records:
            folder.append(record)
        with (copy / "metrics.jsonl").open("a") as file:
            file.write('{"steps": 1')
        assert folder.records() == records
        assert folder.rewind(64) == records[:3]
        assert folder.records() == records[:3]
        assert folder.rewind(None) == folder.records() == []

    @pytest.mark.parametrize("line", ['{"steps": 1', "[]", '{"steps": "1"}', ""])
    def test_a_broken_line_is_named(self, copy: pathlib.Path, line: str) -> None:
        (copy / "metrics.jsonl").write_text(f'{{"steps": 1}}\n{line}\n')
        with pytest.raises(InputError, match=r"metrics.jsonl, line 2: .* is not a JSON object with steps"):
            RunFolder.reopen(copy).records()


class TestLoadRouter:
    def test_it_decides_as_the_learner_does(self, flat: RunFolder) -> None:
        learner, router = small_learner(), load_router(flat.path)
        weights = learner.weights(state_of(learner))
        assert (router.name, router.kind, router.information) == ("tiny", "learned", "predictions")
        assert_equal(router.params, weights)
        reset, params = jax.jit(jax.vmap(learner.env.reset, in_axes=(0, None))), small_params()
        seen, _ = reset(jax.random.split(jax.random.key(0), 5), params)

        @jax.jit
        @jax.vmap
        def actions(obs: Observation) -> tuple[jax.Array, jax.Array]:
            key = jax.random.key(0)
            return router.act(key, obs, router.init())[0], learner.act(weights, key, obs)

        np.testing.assert_array_equal(*actions(seen))

    def test_one_seed_of_several_is_picked(self, tmp_path: pathlib.Path) -> None:
        learner = small_learner()
        saved(tmp_path, learner, (3, 5))
        for seed in (3, 5):
            assert_equal(load_router(tmp_path, seed=seed).params, learner.weights(state_of(learner, seed)))
        assert_equal(load_router(tmp_path).params, load_router(tmp_path, seed=3).params)
        with pytest.raises(InputError, match=r"config.json: seed is 0, must be one of 3, 5"):
            load_router(tmp_path, seed=0)

    def test_a_network_that_shares_its_weights_serves_any_fleet(self, tmp_path: pathlib.Path) -> None:
        saved(tmp_path, small_learner(network=POINTER))
        router = load_router(tmp_path)
        for num_experts in (1, 3, 5):
            action, _ = jax.jit(router.act)(jax.random.key(0), idle(num_experts), ())
            assert 0 <= int(action) <= num_experts

    def test_a_margin_moves_the_level_of_place_against_drop(self, tmp_path: pathlib.Path) -> None:
        learner = small_learner(network=POINTER)
        folder = saved(tmp_path / "run", learner)
        obs, weights = idle(3), learner.weights(state_of(learner))
        values = jnp.mean(heads_of(learner.network, weights, learner.features(obs)).q, -2)
        worth = float(jnp.max(values[:-1]) - values[-1])
        assert 0 < worth < 0.99
        for margin, drops in ((-1, False), (worth - 0.01, False), (worth + 0.01, True)):
            router = load_router(folder.path, margin=margin)
            assert (int(router.act(jax.random.key(0), obs, ())[0]) == 3) == drops
        for margin in (1.1, float("nan"), "0.1", True):
            with pytest.raises(InputError, match=r"run/config.json: margin is .*, must be a number from -1 to 1"):
                load_router(folder.path, margin=margin)
        actor = saved(tmp_path / "actor", small_learner(network=dataclasses.replace(POINTER, actor=True)))
        with pytest.raises(InputError, match=r"actor/config.json: margin is 0.1, must be 0 for an agent with a policy"):
            load_router(actor.path, margin=0.1)

    def test_it_takes_other_preferences(self, tmp_path: pathlib.Path) -> None:
        learner = small_learner(network=dataclasses.replace(POINTER, with_preferences=True))
        training = training_of(learner, randomise=("preferences",))
        folder = RunFolder.start(tmp_path / "dial", make_config(learner, training))
        state = state_of(learner)
        folder.save(64, state, learner.weights(state))
        assert load_router(folder.path).init() == Preferences()
        router = load_router(folder.path, preferences={"energy": 2, "drop": 0.5})
        assert_equal(router.params, learner.weights(state))
        assert router.init() == Preferences(energy=2.0, drop=0.5)
        obs = idle(3)
        told = obs.replace(preferences=router.init())
        actions = [
            router.act(jax.random.key(0), obs, router.init())[0],
            learner.act(router.params, jax.random.key(0), told),
        ]
        np.testing.assert_array_equal(*actions)
        with pytest.raises(
            InputError, match=r"dial/config.json: preferences.energy is -1, must be a number from 0 to 10"
        ):
            load_router(folder.path, preferences={"energy": -1})

    def test_without_preferences_it_takes_none(self, flat: RunFolder) -> None:
        with pytest.raises(
            InputError, match=r"config.json: preferences is {'energy': 2}, must not be given for an agent"
        ):
            load_router(flat.path, preferences={"energy": 2})

    def test_a_network_of_fixed_size_says_so(self, flat: RunFolder) -> None:
        with pytest.raises(InputError, match=r"router 'x' has a network for 3 experts only, but the fleet has 5"):
            load_router(flat.path, name="x").act(jax.random.key(0), idle(5), ())

    def test_it_needs_no_replay_and_no_state(self, copy: pathlib.Path) -> None:
        shutil.rmtree(copy / "checkpoints" / "64" / "state")
        load_router(copy)

    @pytest.mark.slow
    def test_it_may_have_been_made_on_a_device_that_is_not_here(self, tmp_path: pathlib.Path) -> None:
        program = (
            "import jax, pathlib, sys\n"
            "from tests.training.test_run_folder import saved, small_learner\n"
            "with jax.default_device(jax.devices()[3]):\n"
            "    folder = saved(pathlib.Path(sys.argv[1]), small_learner())\n"
        )
        flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, env=os.environ | flags, check=True)
        learner = small_learner()
        weights = learner.weights(state_of(learner))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), load_router(tmp_path).params, weights)


def changed(**fields: Any) -> Callable[[pathlib.Path], None]:
    """Sets fields of config.json; a name may have dots."""

    def spoil(folder: pathlib.Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for path, value in fields.items():
            table = config
            *tables, name = path.split("__")
            for each in tables:
                table = table[each]
            if value is None:
                del table[name]
            else:
                table[name] = value
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    """The file that holds most of the weights."""
    files = [file for file in (folder / "checkpoints" / "64" / "weights").rglob("*") if file.parent.name == "d"]
    return max(files, key=lambda file: file.stat().st_size)


def truncated(folder: pathlib.Path) -> None:
    file = largest_file(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(folder: pathlib.Path) -> None:
    content = bytearray(largest_file(folder).read_bytes())
    content[len(content) // 2] ^= 4
    largest_file(folder).write_bytes(content)


SPOILED: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "no folder": (shutil.rmtree, "config.json: cannot be read: No such file"),
    "no config": (lambda folder: os.remove(folder / "config.json"), "give the folder of a training run"),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: is not JSON"),
    "not an object": (
        lambda folder: (folder / "config.json").write_text("[1]"),
        "config.json: format is None, must be one of",
    ),
    "another version": (changed(format=99), "config.json: format is 99, must be one of 1, 2"),
    "no training": (changed(training=None), "config.json: training is missing, must be a table"),
    "field missing": (changed(training__agent__capacity=None), "config.json: training.agent.capacity is missing"),
    "field unknown": (changed(training__agent__depth=3), "config.json: training.agent.depth is unknown"),
    "field of another kind": (changed(training__agent__num_envs="many"), "training.agent.num_envs is 'many'"),
    "no world": (changed(spec__slots=3), "config.json: spec is"),
    "no seeds": (changed(training__runs=[]), "config.json: runs is empty"),
    "a seed that is none": (changed(training__runs=[{"seed": "first"}]), "config.json: seed is 'first'"),
    "other network": (changed(training__agent__network__hidden=[16]), "/checkpoints/64/weights: params/"),
    "other fleet": (changed(spec__num_experts=4), "/checkpoints/64/weights: params/"),
    "other seeds": (changed(training__runs=[{"seed": 0}, {"seed": 1}]), "/checkpoints/64/weights: params/"),
    "no checkpoint": (lambda folder: shutil.rmtree(folder / "checkpoints"), "holds no checkpoint yet"),
    "no weights": (lambda folder: shutil.rmtree(folder / "checkpoints" / "64" / "weights"), "is not what was written"),
    "no checksums": (lambda folder: os.remove(folder / "checkpoints/64/checksums.json"), "sums.json: cannot be read"),
    "checksums of nothing": (
        lambda folder: (folder / "checkpoints/64/checksums.json").write_text('{"state": {}, "weights": {}}'),
        "checksums.json: weights is empty",
    ),
    "truncated weights": (truncated, "is not what was written"),
    "a bit that flipped": (flipped, "is not what was written"),
    "foreign folder": (
        lambda folder: [os.remove(file) for file in (folder / "checkpoints/64/weights").rglob("*") if file.is_file()],
        "is not what was written",
    ),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore leaves reads behind
@pytest.mark.parametrize("name", SPOILED)
def test_what_cannot_be_used_is_refused_in_one_line(copy: pathlib.Path, name: str) -> None:
    spoil, message = SPOILED[name]
    spoil(copy)
    with pytest.raises(InputError) as raised:
        load_router(copy)
    assert message in str(raised.value)
    assert str(copy) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "delete" not in str(raised.value)
