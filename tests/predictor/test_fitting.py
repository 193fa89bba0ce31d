"""Training recovers the predictable share of scores and lengths, and does not overfit."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from qos_jax import InputError
from qos_jax.predictor import FineTuning, HeadConfig, Pretrained, fine_tune, fit_frozen, load_pretrained
from qos_jax.predictor.metrics import held_out_columns, scores_of
from tests.helpers.prediction_tables import EXPERTS, made_up_table
from tests.helpers.quick_compilation import quick_compilation
from tests.helpers.tiny_encoder import WORDS, write_tiny_encoder

LINEAR = HeadConfig("regression", ())
BUCKETS = HeadConfig("buckets", (16,))
QUICK = FineTuning(layers=1, epochs=4, learning_rate=1e-2, heads_learning_rate=3e-3)


@pytest.fixture(scope="module", autouse=True)
def compiles_quickly():
    with quick_compilation():
        yield


def measured(r2, config, num_prompts=500, **changes):
    """Returns the metrics on 1000 held-out prompts."""
    table = made_up_table(num_prompts + 1000, r2, **changes)
    train, test = (table.rows(rows) for rows in np.split(np.arange(num_prompts + 1000), [num_prompts]))
    return scores_of(held_out_columns(fit_frozen(train, config), train, test, config.num_buckets))


@pytest.fixture(scope="module")
def in_buckets():
    return measured(0.5, BUCKETS)


@pytest.fixture(scope="module")
def in_regression():
    return measured(0.5, LINEAR)


@pytest.fixture(params=["in_buckets", "in_regression"])
def either(request):
    return request.getfixturevalue(request.param)


class TestFrozen:
    def test_the_share_that_the_prompt_explains_is_found(self, either):
        for quantity in ("score", "log_length"):
            assert 0.4 < either[quantity]["r2"] < 0.54  # the true share is 0.5, of which buckets lose a tenth
            assert either[quantity]["rank_correlation"] > 0.5

    def test_predictions_are_as_far_apart_as_what_they_predict(self, either):
        assert 0.9 < either["score"]["slope"] < 1.15
        assert either["score"]["ece"] < 0.015  # of scores with an SD of 0.1

    def test_probabilities_of_buckets_mean_what_they_say(self, in_buckets):
        assert in_buckets["score"]["bucket_ece"] < 0.02
        assert in_buckets["score"]["accuracy"] > 0.3 > 0.25 > in_buckets["score"]["majority"]

    def test_expected_tokens_are_right_on_average(self, either):
        tokens = either["output_tokens"]
        realised = np.average([entry["realised"] for entry in tokens["reliability"]])
        assert abs(tokens["bias"]) < 0.06 * realised  # the exponential of the expected logarithm would be 15 % too low

    def test_routing_by_predictions_is_better_than_one_expert(self, in_buckets):
        routing = in_buckets["routing"]
        assert routing["random"] < routing["best_single"] < routing["routed"] - 0.005
        assert routing["routed"] < routing["oracle"]

    @pytest.mark.parametrize("config", [BUCKETS, LINEAR])
    def test_nothing_is_made_of_noise(self, config):
        scores = measured(0.0, config, num_prompts=100)
        assert -0.03 < scores["score"]["r2"] < 0.03
        assert -0.03 < scores["log_length"]["r2"] < 0.03

    def test_a_seed_repeats_what_is_learned(self):
        table = made_up_table(with_lengths=False)
        scores = [fit_frozen(table, BUCKETS, seed=seed).predict_embeddings(table.embeddings)[0] for seed in (0, 0, 1)]
        np.testing.assert_array_equal(scores[0], scores[1])
        assert np.abs(scores[0] - scores[2]).max() > 1e-4

    def test_a_table_without_lengths_gives_scores_only(self):
        table = made_up_table(with_lengths=False)
        predictor = fit_frozen(table, BUCKETS)
        assert predictor.predict_embeddings(table.embeddings)[1] is None
        assert set(scores_of(held_out_columns(predictor, table, table, 5))) == {"prompts", "score", "routing"}

    def test_more_prompts_than_a_batch_are_learned_in_batches(self):
        assert measured(0.5, LINEAR, num_prompts=1500, with_lengths=False)["score"]["r2"] > 0.45

    def test_too_few_prompts_are_refused(self):
        with pytest.raises(InputError, match="made up: 9 training prompts, must be at least 10"):
            fit_frozen(made_up_table(9), BUCKETS)

    def test_embeddings_are_needed(self):
        with pytest.raises(InputError, match="made up: has no embeddings"):
            fit_frozen(dataclasses.replace(made_up_table(), embeddings=None), BUCKETS)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Pretrained:
    return load_pretrained(write_tiny_encoder(tmp_path_factory.mktemp("tiny")))


def table_of_a_word(num_prompts=60):
    """Returns a table whose answers are good and long if the prompt has the word "red"."""
    table, rng = made_up_table(num_prompts, 0.0), np.random.default_rng(1)
    is_red = rng.random(num_prompts) < 0.5
    others = [word for word in WORDS if word != "red"]
    texts = []
    for red in is_red:
        words = [*rng.choice(others, rng.integers(2, 6)), *(["red"] if red else [])]
        texts.append(" ".join(rng.permutation(words)))
    score = np.clip(np.where(is_red, 0.8, 0.2)[:, None] + 0.02 * table.score, 0.0, 1.0)
    tokens = np.where(is_red, 200, 20)[:, None] + np.zeros_like(table.output_tokens)
    return dataclasses.replace(table, score=score, output_tokens=tokens, texts=tuple(texts), embeddings=None)


@pytest.fixture(scope="module")
def tuned(encoder):
    epochs = []
    return fine_tune(table_of_a_word(), encoder, BUCKETS, QUICK, progress=epochs.append), epochs


class TestFineTuning:
    def test_what_frozen_embeddings_hide_is_learned(self, tuned):
        _, epochs = tuned
        assert [epoch.number for epoch in epochs] == [0, 1, 2, 3, 4]
        assert epochs[-1].train_loss < epochs[1].train_loss
        assert min(epoch.validation_loss for epoch in epochs[1:]) < 0.9 * epochs[0].validation_loss

    def test_only_the_last_layer_moves(self, tuned, encoder):
        predictor, _ = tuned
        for name, before in encoder.weights["params"].items():
            after = predictor.encoder.weights["params"][name]
            same = [np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True)]
            assert not any(same) if name == "layer_1" else all(same)

    def test_the_predictor_reads_texts(self, tuned):
        predictor, _ = tuned
        assert predictor.experts == EXPERTS
        (red, blue), (long, short) = predictor.predict(["write a red poem", "write a blue poem"])
        assert np.all(red > blue)
        assert np.all(long > short)

    def test_what_is_kept_has_the_lowest_validation_loss(self, encoder):
        table = table_of_a_word()
        too_fast = dataclasses.replace(QUICK, epochs=1, learning_rate=0.9, heads_learning_rate=0.9)
        epochs = []
        predictor = fine_tune(table, encoder, BUCKETS, too_fast, progress=epochs.append)
        assert epochs[1].validation_loss > epochs[0].validation_loss
        np.testing.assert_array_equal(predictor.encoder.embed(table.texts), encoder.embed(table.texts))

    def test_the_validation_loss_does_not_depend_on_batches(self, encoder):
        losses = []
        for batch_size in (5, 16):
            epochs = []
            tuning = dataclasses.replace(QUICK, epochs=1, batch_size=batch_size)
            fine_tune(table_of_a_word(), encoder, BUCKETS, tuning, progress=epochs.append)
            losses.append(epochs[0].validation_loss)
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_more_layers_than_there_are(self, encoder):
        with pytest.raises(InputError, match="layers is 3, must be at most 2"):
            fine_tune(table_of_a_word(), encoder, BUCKETS, dataclasses.replace(QUICK, layers=3))

    def test_texts_are_needed(self, encoder):
        with pytest.raises(InputError, match="made up: has no texts"):
            fine_tune(dataclasses.replace(made_up_table(), texts=None), encoder, BUCKETS, QUICK)

    @pytest.mark.parametrize(
        ("field", "value"), [("layers", 0), ("epochs", 0), ("batch_size", 0), ("learning_rate", 0.0)]
    )
    def test_a_bad_setting_is_refused(self, field, value):
        with pytest.raises(InputError, match=f"{field} is {value}"):
            dataclasses.replace(QUICK, **{field: value})
