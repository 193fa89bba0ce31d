import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qos_jax.errors import InputError
from qos_jax.workload.arrivals import poisson
from qos_jax.workload.content import generated_content
from qos_jax.workload.prediction import parse_prediction
from qos_jax.workload.request_workload import RequestWorkload
from qos_jax.workload.session_law import check_sessions, parse_sessions


@pytest.fixture(scope="module")
def workload():
    content = generated_content(["alpaca-native", "chatglm-6b"])
    return RequestWorkload(poisson(3.0), content, parse_prediction("realistic"))


def stream(workload, num_requests, seed=0):
    def step(state, key):
        gap_s, request, state = workload.next(key, state)
        return state, (gap_s, request)

    key = jax.random.key(seed)
    return jax.lax.scan(step, workload.init(key), jax.random.split(key, num_requests))[1]


def test_the_stream_has_the_rate_and_the_contents_of_its_parts(workload):
    gap_s, request = jax.jit(stream, static_argnums=1)(workload, 20_000)
    assert gap_s.mean() == pytest.approx(1 / 3, rel=0.03)
    assert request.score.mean(0) == pytest.approx(np.asarray(workload.content.score_mean), abs=0.005)
    assert request.score.shape == request.predicted_tokens.shape == (20_000, 2)
    truth, predicted = np.asarray(request.score[:, 0]), np.asarray(request.predicted_score[:, 0])
    assert np.corrcoef(truth, predicted)[0, 1] ** 2 == pytest.approx(0.1, abs=0.02)


def test_a_sweep_of_the_rate_traces_the_stream_once_and_keeps_the_contents(workload):
    traces = []

    @jax.jit
    def run(workload):
        traces.append(1)
        return stream(workload, 2000)

    slow_gap_s, slow = run(workload.with_rate(jnp.float32(1.0)))
    fast_gap_s, fast = run(workload.with_rate(jnp.float32(10.0)))
    assert len(traces) == 1
    assert fast_gap_s == pytest.approx(np.asarray(slow_gap_s) / 10, rel=1e-4)
    np.testing.assert_array_equal(slow.output_tokens, fast.output_tokens)


class TestSessions:
    def test_turns_begin_and_choose_as_the_law_says_and_leave_the_rest_of_the_stream_alone(self, workload):
        turns = dataclasses.replace(workload, sessions=parse_sessions("8:4:1000"))
        gap_s, request = jax.jit(stream, static_argnums=1)(turns, 20_000)
        assert request.turn.begins.mean() == pytest.approx(0.25, abs=0.01)
        np.testing.assert_allclose(np.bincount(request.turn.place) / 20_000, np.full(8, 1 / 8), atol=0.01)
        assert (request.turn.max_prompt_tokens == 1000).all()
        alone_gap_s, alone = jax.jit(stream, static_argnums=1)(workload, 20_000)
        np.testing.assert_array_equal(gap_s, alone_gap_s)
        np.testing.assert_array_equal(request.prompt_tokens, alone.prompt_tokens)

    @pytest.mark.parametrize(
        "text", ["", "8", "8:4", "0:4:100", "8:0.5:100", "8:4:0", "8:4:x", "9999:4:100", "8:nan:9", "1_0:4:9"]
    )
    def test_a_law_that_is_none_is_refused(self, text):
        with pytest.raises(InputError, match="must be OPEN:TURNS:TOKENS: conversations open at a time"):
            check_sessions(text)
