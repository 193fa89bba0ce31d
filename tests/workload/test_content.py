import csv

import jax
import numpy as np
import pytest

from qos_jax.errors import InputError
from qos_jax.workload import constants
from qos_jax.workload.content import generated_content, latency_limits
from qos_jax.workload.tables import read_npz

DRAWS = 100_000


def draw(content, seed=0):
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    return [np.asarray(x, float) for x in jax.jit(jax.vmap(content.sample))(keys)]


def pair_correlation(columns):
    return np.corrcoef(columns.T)[np.triu_indices(columns.shape[1], 1)].mean()


@pytest.fixture(scope="module")
def content():
    return generated_content(list(constants.MIX_INSTRUCT))


@pytest.fixture(scope="module")
def sample(content):
    return draw(content)


def test_prompt_lengths_have_the_measured_quantiles(sample):
    prompt_tokens = sample[0]
    assert np.percentile(prompt_tokens, [50, 90, 99]) == pytest.approx([24, 80, 283], rel=0.05)
    assert prompt_tokens.mean() == pytest.approx(40, rel=0.03)
    assert prompt_tokens.min() >= 1
    assert prompt_tokens.max() == constants.MAX_PROMPT_TOKENS


def test_scores_have_the_published_means_and_the_measured_spread(sample):
    score = sample[2]
    means = [law.score_mean for law in constants.MIX_INSTRUCT.values()]
    assert score.mean(0) == pytest.approx(means, abs=0.003)
    assert score.std(0) == pytest.approx(constants.SCORE_SD, abs=0.003)
    assert score.min() >= 0.0
    assert score.max() <= 1.0
    assert pair_correlation(score) == pytest.approx(constants.SCORE_CORRELATION, abs=0.02)


def test_the_best_of_all_answers_is_not_far_from_the_published_oracle(sample):
    # The published means spread wider than AlpacaEval's; equal spreads on all prompts would miss it by 0.024.
    assert sample[2].max(1).mean() == pytest.approx(constants.ORACLE_SCORE, abs=0.018)


def test_output_lengths_follow_their_laws_up_to_the_cap(content, sample):
    output_tokens = sample[1]
    assert output_tokens.min() >= 1
    assert output_tokens.max() == constants.MAX_OUTPUT_TOKENS
    assert np.all((output_tokens.mean(0) > 100) & (output_tokens.mean(0) < 250))
    assert pair_correlation(np.log(output_tokens)) == pytest.approx(constants.LOG_LENGTH_CORRELATION, abs=0.02)
    assert np.corrcoef(np.log(sample[0]), np.log(output_tokens).mean(1))[0, 1] == pytest.approx(0, abs=0.02)

    uncapped = np.log(draw(content.replace(max_output_tokens=1e6))[1])
    laws = constants.MIX_INSTRUCT.values()
    assert uncapped.mean(0) == pytest.approx([law.log_length_mean for law in laws], abs=0.02)
    assert uncapped.std(0) == pytest.approx([law.log_length_sd for law in laws], rel=0.02)


def test_every_user_has_the_limit_of_one_class_in_its_share(sample):
    assert np.unique(sample[3]) == pytest.approx([0.03])
    content = generated_content(["chatglm-6b"], latency_limits([0.02, 0.03, 0.05], weights=[5, 3, 2]))
    _, output_tokens, score, limit_s = draw(content)[:4]
    values, counts = np.unique(limit_s, return_counts=True)
    assert values == pytest.approx([0.02, 0.03, 0.05])
    assert counts / DRAWS == pytest.approx([0.5, 0.3, 0.2], abs=0.01)
    assert np.corrcoef(limit_s, score[:, 0])[0, 1] == pytest.approx(0, abs=0.02)
    assert np.corrcoef(limit_s, output_tokens[:, 0])[0, 1] == pytest.approx(0, abs=0.02)


def test_experts_keep_the_order_asked_for():
    score = draw(generated_content(["mpt-7b-instruct", "alpaca-native"]))[2]
    assert score.mean(0) == pytest.approx([0.6321, 0.7146], abs=0.003)


@pytest.mark.parametrize("experts", [[], ["gpt-5"]])
def test_unknown_experts_are_refused(experts):
    with pytest.raises(InputError, match="choose from oasst"):
        generated_content(experts)


@pytest.mark.parametrize(
    ("values_s", "weights"),
    [([], None), ([0.0], None), ([0.03, float("nan")], None), ([0.03], [1, 1]), ([0.03], [-1]), ([0.03], [0])],
)
def test_bad_latency_limits_are_refused(values_s, weights):
    with pytest.raises(InputError, match="limit"):
        latency_limits(values_s, weights)


def test_the_calibration_states_the_published_means(data_dir):
    with open(data_dir / "quality" / "mixinstruct_published_expert_stats.csv") as file:
        published = {row["model"]: float(row["bertscore"]) / 100 for row in csv.DictReader(file)}
    means = {name: law.score_mean for name, law in constants.MIX_INSTRUCT.items()}
    assert {name: published[name] for name in means if name != "mpt-7b"} == pytest.approx(
        {name: mean for name, mean in means.items() if name != "mpt-7b"}
    )
    assert np.mean(list(means.values())) == pytest.approx(published["RANDOM"], abs=1e-4)
    assert published["ORACLE_bertscore"] == pytest.approx(constants.ORACLE_SCORE)


def test_the_generator_reproduces_a_measured_table(data_dir):
    table = read_npz(data_dir / "quality" / "alpaca_eval_644x15.npz", "quality_bertscore_minilm", clip_scores=True)
    for name, (mean_tokens, log_mean, log_sd) in constants.MEASURED_LENGTHS.items():
        tokens = table.select([name]).output_tokens
        assert tokens.mean() == pytest.approx(mean_tokens, abs=0.6)
        assert (np.log(tokens).mean(), np.log(tokens).std()) == pytest.approx((log_mean, log_sd), abs=0.006)

    def shares(score):
        return np.array([score.mean(1).var(), score.mean(0).var()]) / score.var()

    content = generated_content(["chatglm-6b"]).replace(score_mean=table.score.mean(0), score_sd=table.score.std(0))
    content = content.replace(log_length_mean=np.full(15, 4.5), log_length_sd=np.ones(15))
    score = draw(content)[2]
    assert shares(table.score) == pytest.approx(constants.SCORE_VARIANCE_SHARES[:2], abs=0.005)
    assert shares(score) == pytest.approx(constants.SCORE_VARIANCE_SHARES[:2], abs=0.03)
    assert pair_correlation(table.score) == pytest.approx(constants.SCORE_CORRELATION, abs=0.005)
    assert score.std(0) == pytest.approx(table.score.std(0), abs=0.01)
    assert score.max(1).mean() == pytest.approx(table.score.max(1).mean(), abs=0.012)
    spread, measured_spread = score.std(1), table.score.std(1)
    quartiles = np.percentile(spread, [25, 75]), np.percentile(measured_spread, [25, 75])
    assert quartiles[0] == pytest.approx(quartiles[1], abs=0.01)
