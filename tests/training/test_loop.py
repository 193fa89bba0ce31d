"""The host's side of training: what it reports, and that stopping, resuming and vmapping change nothing."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from qos_jax import InputError, make
from qos_jax.training.config import TrainingConfig, runs_of
from qos_jax.training.loop import train
from qos_jax.training.progress import Progress, TrainResult
from qos_jax.training.run_config import make_config
from qos_jax.training.run_folder import RunFolder
from qos_jax.training.selection import Selection, kept_evaluation
from qos_jax.training.validation import FIRST_HELD_OUT_SEED, Validation
from tests.helpers.instant_env import assert_equal, small_learner
from tests.helpers.quick_compilation import quick_compilation
from tests.helpers.small_env import small_params

CHUNKS, STEPS_PER_CHUNK = 6, 32
LEARNER = small_learner()
HYPER = LEARNER.config.hyper.replace(learning_rate=0.01)
PARAMS = small_params()


def run(folder: RunFolder | None = None, **arguments: Any) -> TrainResult:
    """Trains for six chunks, with an evaluation after every second one."""
    arguments = {
        "hyper": HYPER,
        "validation": Validation(PARAMS, num_envs=4, steps=40),
        "steps": CHUNKS * STEPS_PER_CHUNK - 1,
        "evaluate_every": 2 * STEPS_PER_CHUNK,
        "checkpoint_every_s": math.inf,
    } | arguments
    return train(LEARNER, PARAMS, folder=folder, **arguments)


def new_folder(path: pathlib.Path, seeds: Sequence[int] = (0,), **fields: Any) -> RunFolder:
    training = TrainingConfig(LEARNER.config, CHUNKS * STEPS_PER_CHUNK, runs_of(LEARNER.config, seeds), **fields)
    return RunFolder.start(path, make_config(LEARNER, training))


def stop_after(chunks: int) -> Any:
    """Returns a function that asks to stop when it has been asked so many times."""
    answers = iter([False] * chunks)
    return lambda: next(answers, True)


def untimed(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    with quick_compilation():
        yield


SEEN: list[Progress] = []  # what the run of ``whole`` told of itself


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, RunFolder]:
    """A run from its beginning to its end."""
    folder = new_folder(tmp_path_factory.mktemp("whole"))
    return run(folder, progress_fn=SEEN.append), folder


def state_of(folder: RunFolder) -> Any:
    like = jax.eval_shape(LEARNER.init, jax.random.key(0), PARAMS, HYPER)
    assert folder.latest is not None
    return folder.restore_state(folder.latest, like)


def test_every_chunk_is_reported_and_some_are_evaluated(whole: tuple[TrainResult, RunFolder]) -> None:
    result, folder = whole
    trained = [record["steps"] for record in result.records if record["kind"] == "train"]
    evaluated = [record["steps"] for record in result.records if record["kind"] == "evaluation"]
    assert trained == [STEPS_PER_CHUNK * chunk for chunk in range(1, CHUNKS + 1)]
    assert evaluated == [0, 64, 128, 192]
    assert (result.finished, result.steps) == (True, 192)
    assert folder.records() == result.records
    seconds = [record["seconds"] for record in result.records]
    assert seconds == sorted(seconds)
    assert 0 < seconds[-1] <= result.train_s


def test_progress_says_how_far_it_is(whole: tuple[TrainResult, RunFolder]) -> None:
    assert [progress.record for progress in SEEN] == whole[0].records
    assert {progress.total_steps for progress in SEEN} == {192}
    assert math.isnan(SEEN[0].left_s)
    assert SEEN[-1].left_s == 0.0
    assert all(progress.left_s > 0 and progress.steps_per_s > 0 for progress in SEEN[1:-2])
    assert [progress.evaluation["steps"] for progress in SEEN if progress.evaluation] == [
        0, 0, 0, 64, 64, 64, 128, 128, 128, 192,
    ]  # fmt: skip


def test_the_gain_is_the_paired_difference_to_impact_greedy(whole: tuple[TrainResult, RunFolder]) -> None:
    evaluations = [record for record in whole[0].records if record["kind"] == "evaluation"]
    assert len({record["impact_greedy"] for record in evaluations}) == 1
    for record in evaluations:
        assert record["gain"] == pytest.approx(record["qos"][0] - record["impact_greedy"])
        assert record["low"] <= record["gain"] <= record["high"]


def test_the_policy_that_is_judged_is_the_one_that_is_returned(whole: tuple[TrainResult, RunFolder]) -> None:
    last = whole[0].records[-1]
    assert last["kind"] == "evaluation"
    assert qos_of(whole[0].weights) == pytest.approx(last["qos"][0], rel=1e-6)


def test_loads_of_a_validation_go_round_and_no_evaluation_has_its_seeds() -> None:
    _, params = make("paper-3")
    seeds, many = Validation(params, (0.5, 1.0), num_envs=5).arguments()
    np.testing.assert_allclose(many.workload.arrivals.rate_per_s, 22.9 * np.array([0.5, 1.0, 0.5, 1.0, 0.5]), rtol=1e-6)
    assert many.workload.arrivals.gap_quantiles.shape == params.workload.arrivals.gap_quantiles.shape
    assert seeds.max() < FIRST_HELD_OUT_SEED and len(set(seeds.tolist())) == 5


@pytest.mark.parametrize(("field", "value"), [("num_envs", 1), ("steps", 0)])
def test_an_evaluation_has_a_size(field: str, value: int) -> None:
    with pytest.raises(InputError, match=f"{field} of the evaluation is {value}"):
        Validation(PARAMS, **{field: value})


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: pathlib.Path, whole: tuple[TrainResult, RunFolder]) -> None:
    """One that was killed before its first checkpoint starts again."""
    folder = new_folder(tmp_path)
    folder.append({"kind": "train", "steps": 32, "seconds": 9.0, "metrics": {}})
    stopped = run(folder, should_stop=stop_after(3))
    assert untimed(stopped.records) == untimed(whole[0].records)[: len(stopped.records)]
    assert (stopped.finished, stopped.steps, folder.latest) == (False, 96, 96)
    # As if it had been killed later: lines beyond the checkpoint, the last of them not whole.
    folder.append({"kind": "train", "steps": 128, "seconds": 9.0, "metrics": {}})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "ste')
    resumed = run(RunFolder.reopen(tmp_path))
    assert resumed.finished
    assert_equal(resumed.weights, whole[0].weights)
    assert_equal(state_of(folder), state_of(whole[1]))
    assert untimed(resumed.records) == untimed(whole[0].records)
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == resumed.records
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def qos_of(weights: Any) -> float:
    validation = Validation(PARAMS, num_envs=4, steps=40)
    qos = jax.jit(lambda *x: validation.qos(LEARNER.env, lambda key, obs: LEARNER.act(weights, key, obs), *x))
    return float(qos(*validation.arguments()).mean())


def test_the_weights_that_are_kept_are_those_of_a_stopped_run_as_well(tmp_path: pathlib.Path) -> None:
    """At this learning rate values go wrong, so that evaluations rise and fall."""
    wild = {"hyper": HYPER.replace(learning_rate=0.3), "evaluate_every": STEPS_PER_CHUNK, "keep_best": True}
    whole = run(**wild)
    rows = {record["steps"]: record for record in whole.records if record["kind"] == "evaluation"}
    (after,) = whole.kept["kept_after"]
    assert qos_of(whole.weights) == pytest.approx(rows[after]["qos"][0], rel=1e-6)
    assert whole.kept["qos"] == rows[after]["qos"]
    for chunks in (1, 5):
        folder = new_folder(tmp_path / str(chunks))
        stopped = run(folder, should_stop=stop_after(chunks), **wild)
        assert stopped.kept["kept_after"] == rows[chunks * STEPS_PER_CHUNK]["kept_after"]
        assert qos_of(stopped.weights) == pytest.approx(stopped.kept["qos"][0], rel=1e-6)
        resumed = run(folder, **wild)
        assert_equal(resumed.weights, whole.weights)
        assert untimed(resumed.records) == untimed(whole.records)


def test_each_seed_keeps_its_best_weights_where_they_are_better_beyond_doubt() -> None:
    """The second seed is as good in the end as ever, but for luck."""
    weights = [{"layer": np.full((2, 3), float(i))} for i in range(3)]
    selection = Selection(True, weights[0], 2, 4)
    seeds = np.array([[0.5, 0.51, 0.49, 0.5], [0.5, 0.51, 0.49, 0.5]])
    assert selection.evaluated(0, weights[0], seeds) == [0, 0]
    assert selection.evaluated(10, weights[1], seeds + 0.1) == [10, 10]
    fall = np.array([[0.0, 0.01, 0.0, -0.01], [0.07, 0.1, 0.1, 0.12]])
    assert selection.evaluated(20, weights[2], seeds + fall) == [10, 20]
    np.testing.assert_array_equal(selection.of(weights[2])["layer"], [[1.0] * 3, [2.0] * 3])
    newest = Selection(False, weights[0], 2, 4)
    assert newest.evaluated(20, weights[2], seeds) == [20, 20] and newest.of(weights[2]) is weights[2]


def test_the_gain_of_kept_weights_is_over_their_seeds() -> None:
    rows = [
        {"kind": "evaluation", "steps": 10 * i, "qos": qos, "gains": [x - 0.5 for x in qos], "kept_after": [10, 0]}
        for i, qos in enumerate(([0.5, 0.6], [0.7, 0.4], [0.6, 0.5]))
    ]
    kept = kept_evaluation([*rows, {"kind": "train"}])
    assert (kept["steps"], kept["kept_after"], kept["qos"]) == (20, [10, 0], [0.7, 0.6])
    assert kept["gain"] == pytest.approx(0.15) and kept["low"] < kept["gain"] < kept["high"]
    early = [{name: value for name, value in row.items() if name != "kept_after"} for row in rows]
    assert (kept_evaluation(early)["kept_after"], kept_evaluation(early)["qos"]) == ([20, 20], [0.6, 0.5])


def test_a_finished_run_is_left_as_it_is(whole: tuple[TrainResult, RunFolder]) -> None:
    again = run(RunFolder.reopen(whole[1].path))
    assert again.finished
    assert again.records == whole[0].records
    assert_equal(again.weights, whole[0].weights)


@pytest.mark.slow
def test_without_its_replay_a_run_goes_on_with_an_empty_one(tmp_path: pathlib.Path) -> None:
    folder = new_folder(tmp_path, save_replay=False)
    run(folder, should_stop=stop_after(3))
    state = state_of(folder)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.replay))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(state.learner.optimizer))
    assert run(folder).finished


@pytest.mark.slow
def test_seeds_side_by_side_are_the_seeds_alone(tmp_path: pathlib.Path, whole: tuple[TrainResult, RunFolder]) -> None:
    together = run(new_folder(tmp_path, (0, 7)), seeds=(0, 7))
    last = together.records[-1]
    assert len(last["qos"]) == 2
    assert last["gain"] == pytest.approx(np.mean(last["qos"]) - last["impact_greedy"])
    assert last["impact_greedy"] == pytest.approx(whole[0].records[-1]["impact_greedy"])
    for many, one in zip(jax.tree.leaves(together.weights), jax.tree.leaves(whole[0].weights), strict=True):
        np.testing.assert_allclose(many[0], one, rtol=1e-3, atol=1e-5)
    assert any(not np.array_equal(leaf[0], leaf[1]) for leaf in jax.tree.leaves(together.weights))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: pathlib.Path) -> None:
    hyper = HYPER.replace(learning_rate=math.nan)
    with pytest.raises(InputError, match=r"diverged: .*_loss is \[nan\] after 32 steps; there is no checkpoint"):
        run(hyper=hyper)
    folder = new_folder(tmp_path)
    run(folder, should_stop=stop_after(2))
    with pytest.raises(InputError, match=rf"after 96 steps; the last good checkpoint is {folder.path}/checkpoints/64"):
        run(folder, hyper=hyper)
    assert folder.latest == 64


def test_it_learns_which_expert_answers_best() -> None:
    """Scores are predicted and answers come at once, so that the best expert is plain to see."""
    result = run(hyper=HYPER.replace(learning_rate=0.02), steps=6400, evaluate_every=6400)
    first, last = (result.records[i]["qos"][0] for i in (0, -1))
    assert last > first + 0.1
