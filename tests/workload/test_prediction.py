import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from qos_jax.errors import InputError
from qos_jax.workload.content import generated_content
from qos_jax.workload.prediction import PredictionModel, parse_prediction
from qos_jax.workload.tables import QualityTable, read_npz

DRAWS = 100_000


@jax.jit
def draw(content, model, keys):
    def one(key):
        content_key, prediction_key = jax.random.split(key)
        sampled = content.sample(content_key)
        return sampled.score, sampled.output_tokens, *model.predict(prediction_key, content, sampled)

    return jax.vmap(one)(keys)


def predictions(content, text):
    keys = jax.random.split(jax.random.key(7), DRAWS)
    return [np.asarray(x, float) for x in draw(content, parse_prediction(text), keys)]


def r2_and_slope(truth, prediction):
    """R^2 and slope of the regression of each column of true values on its prediction."""
    covariance = ((truth - truth.mean(0)) * (prediction - prediction.mean(0))).mean(0)
    return covariance**2 / truth.var(0) / prediction.var(0), covariance / prediction.var(0)


@pytest.fixture(scope="module")
def content():
    return generated_content(["alpaca-native", "chatglm-6b", "mpt-7b-instruct"])


@pytest.fixture(scope="module")
def table_content():
    rng = np.random.default_rng(5)
    shared = rng.normal(size=(2000, 1))
    score = 1 / (1 + np.exp(-1 - 0.5 * shared - 0.5 * rng.normal(size=(2000, 2))))
    output_tokens = np.ceil(np.exp(4 + shared / 2 + rng.normal(size=(2000, 2)) / 2)).astype(np.int32)
    return QualityTable("made up", ("a", "b"), np.full(2000, 30), output_tokens, score).content()


@pytest.mark.parametrize(
    ("text", "score_r2", "log_length_r2"),
    [("realistic", 0.10, 0.24), ("r2:0.3:0.5", 0.3, 0.5), ("r2:0.8:0.1", 0.8, 0.1)],
)
@pytest.mark.parametrize("kind", ["content", "table_content"])
def test_predictions_are_calibrated_and_explain_what_was_asked(request, kind, text, score_r2, log_length_r2):
    content = request.getfixturevalue(kind)
    score, output_tokens, predicted_score, predicted_tokens = predictions(content, text)
    r2, slope = r2_and_slope(score, predicted_score)
    assert r2 == pytest.approx(score_r2, abs=0.012)
    assert slope == pytest.approx(1.0, abs=0.08)  # 0.95 for buckets of scores, which have heavy tails
    assert predicted_score.mean(0) == pytest.approx(score.mean(0), abs=0.003)
    assert (predicted_score.min(), predicted_score.max()) == pytest.approx((0.5, 0.5), abs=0.5)

    r2, slope = r2_and_slope(np.log(output_tokens), np.log(predicted_tokens))
    # Every sixth answer of chatglm-6b is cut off at the cap, and the length beyond it cannot be predicted.
    assert r2 == pytest.approx(log_length_r2, abs=0.06)
    assert slope == pytest.approx(1.0, abs=0.18)
    _, slope = r2_and_slope(output_tokens, predicted_tokens)
    assert slope == pytest.approx(1.0, abs=0.15)
    assert predicted_tokens.mean(0) == pytest.approx(output_tokens.mean(0), rel=0.04)


def test_realistic_predictions_are_one_of_five_buckets(content):
    _, _, predicted_score, predicted_tokens = predictions(content, "realistic")
    for column in (*predicted_score.T, *predicted_tokens.T):
        values, counts = np.unique(column, return_counts=True)
        assert len(values) == 5
        assert counts / DRAWS == pytest.approx(0.2, abs=0.03)


def test_the_predictions_for_other_experts_add_nothing(content):
    score, _, predicted_score, _ = predictions(content, "r2:0.3:0.5")
    design = np.column_stack([np.ones(DRAWS), predicted_score])
    weights = np.linalg.lstsq(design, score[:, 1], rcond=None)[0]
    assert weights == pytest.approx([0, 0, 1, 0], abs=0.06)


def deviation(columns):
    standard = (columns - columns.mean(0)) / columns.std(0)
    return (standard - standard.mean(1, keepdims=True)).ravel()


@pytest.mark.parametrize("within", [0.0, 0.05, 0.4])
def test_what_sets_the_experts_apart_is_predicted_to_the_share_that_was_asked(content, within):
    model = PredictionModel(0.2, 0.2, score_within_r2=within, log_length_within_r2=within)
    keys = jax.random.split(jax.random.key(3), DRAWS)
    score, _, predicted_score, _ = (np.asarray(x, float) for x in draw(content, model, keys))
    assert r2_and_slope(score, predicted_score)[0] == pytest.approx(0.2, abs=0.02)
    correlation = 0.0 if within == 0 else np.corrcoef(deviation(score), deviation(predicted_score))[0, 1]
    assert correlation**2 == pytest.approx(within, abs=0.02)


def ridge_predictions(embeddings, truth, penalty):
    """Predictions for each prompt by 5-fold ridge regression."""
    fold = np.random.default_rng(0).permutation(np.arange(len(truth)) % 5)
    predicted = np.zeros_like(truth)
    for k in range(5):
        x, y = embeddings[fold != k], truth[fold != k]
        centred = x - x.mean(0)
        weights = np.linalg.solve(centred.T @ centred + penalty * np.eye(x.shape[1]), centred.T @ (y - y.mean(0)))
        predicted[fold == k] = (embeddings[fold == k] - x.mean(0)) @ weights + y.mean(0)
    return predicted


def rank_correlation(truth, prediction):
    """Spearman's correlation over the experts, mean over the prompts."""
    pairs = zip(truth, prediction, strict=True)
    return np.nanmean([scipy.stats.spearmanr(*pair).statistic for pair in pairs])


def confusion(truth, prediction):
    """Share [5, 5] of the true values in each fifth of an expert's values that are predicted in each fifth."""

    def fifths(columns):
        # Predictions may be buckets; noise breaks the ties within one.
        mixed = columns + 1e-6 * np.random.default_rng(0).normal(size=columns.shape)
        return np.argsort(np.argsort(mixed, 0), 0) * 5 // len(mixed)

    counts = np.zeros((5, 5))
    np.add.at(counts, (fifths(truth).ravel(), fifths(prediction).ravel()), 1)
    return counts / counts.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def measured_table(data_dir):
    return read_npz(data_dir / "quality" / "alpaca_eval_644x15.npz", "quality_bertscore_minilm", clip_scores=True)


@pytest.fixture(scope="module")
def realistic(measured_table):
    """Score, tokens and their realistic predictions for prompts of the table, [4000, N] each."""
    keys = jax.random.split(jax.random.key(7), 4000)
    sample = draw(measured_table.content(), parse_prediction("realistic"), keys)
    return [np.asarray(x, float) for x in sample]


@pytest.mark.parametrize(("column", "penalty", "rank_tolerance"), [("score", 4.0, 0.06), ("log_length", 2.0, 0.03)])
def test_realistic_predictions_are_as_good_as_measured_ones(
    data_dir, measured_table, realistic, column, penalty, rank_tolerance
):
    with np.load(data_dir / "quality" / "alpaca_eval_644x15.npz") as file:
        embeddings = file["prompt_emb_minilm"].astype(float)
    measured = measured_table.score if column == "score" else np.log(measured_table.output_tokens)
    real = ridge_predictions(embeddings, measured, penalty)
    score, tokens, predicted_score, predicted_tokens = realistic
    truth, simulated = (score, predicted_score) if column == "score" else (np.log(tokens), np.log(predicted_tokens))
    unexplained = ((measured - real) ** 2).sum(0) / ((measured - measured.mean(0)) ** 2).sum(0)
    assert r2_and_slope(truth, simulated)[0].mean() == pytest.approx(1 - unexplained.mean(), abs=0.025)
    assert rank_correlation(truth, simulated) == pytest.approx(rank_correlation(measured, real), abs=rank_tolerance)
    np.testing.assert_allclose(confusion(truth, simulated), confusion(measured, real), atol=0.06)


def test_perfect_predictions_are_the_truth(content):
    score, output_tokens, predicted_score, predicted_tokens = predictions(content, "perfect")
    np.testing.assert_array_equal(predicted_score, score)
    np.testing.assert_array_equal(predicted_tokens, output_tokens)


def test_no_prediction_is_the_mean_of_each_expert(content):
    score, output_tokens, predicted_score, predicted_tokens = predictions(content, "none")
    assert predicted_score.std(0) == pytest.approx(0.0, abs=1e-6)
    assert predicted_score[0] == pytest.approx(score.mean(0), abs=0.003)
    assert predicted_tokens.std(0) == pytest.approx(0.0, abs=1e-3)
    assert predicted_tokens[0] == pytest.approx(output_tokens.mean(0), rel=0.02)


def test_a_sweep_over_r2_is_one_vmapped_program(content):
    r2 = jnp.array([0.0, 0.25, 1.0])
    models = PredictionModel(r2, r2, jnp.zeros(3, bool), r2, jnp.full(3, jnp.nan))
    keys = jax.random.split(jax.random.key(7), 20_000)
    score, _, predicted_score, _ = jax.vmap(draw, in_axes=(None, 0, None))(content, models, keys)
    for i in (1, 2):
        r2_found, _ = r2_and_slope(np.asarray(score[i], float), np.asarray(predicted_score[i], float))
        assert r2_found == pytest.approx(float(r2[i]), abs=0.02)
    assert np.ptp(predicted_score[0], axis=0) == pytest.approx(0.0, abs=1e-6)


def test_an_expert_that_always_answers_alike_is_predicted():
    table = QualityTable("made up", ("a",), np.full(4, 9), np.full((4, 1), 120), np.full((4, 1), 0.7))
    _, _, predicted_score, predicted_tokens = predictions(table.content(), "realistic")
    assert predicted_score == pytest.approx(0.7, abs=1e-6)
    assert predicted_tokens == pytest.approx(120, rel=1e-4)


@pytest.mark.parametrize("text", ["", "exact", "r2", "r2:0.3", "r2:0.3:1.1", "r2:-0.1:0.5", "r2:nan:0.5", "q:0.3:0.5"])
def test_unknown_predictions_are_refused(text):
    with pytest.raises(InputError, match="choose realistic, perfect, none or r2:SCORE:LENGTH"):
        parse_prediction(text)
