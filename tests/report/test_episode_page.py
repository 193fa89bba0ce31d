"""The page that plays an episode: what it holds, and what it shows in a browser at any time."""

from __future__ import annotations

import html
import json
import math
import pathlib
import re
import subprocess
from typing import Any

import jax
import numpy as np
import pytest

from qos_jax import RequestLog, RequestTrace, evaluate, make, make_router, scenarios
from qos_jax.evaluation.episode import Episode, episode
from qos_jax.evaluation.evaluate import sample_scenarios
from qos_jax.report.episode_page import episode_page
from qos_jax.sim.replay import ReplayResult
from tests.helpers.browser import BROWSER_FLAGS, CHROMIUM
from tests.helpers.programs import assert_refused, program_of
from tests.helpers.small_env import small_env, small_experts

TRACE = RequestTrace(
    arrival_s=np.array([0.0, 1.0, 2.0, 3.0]),
    prompt_tokens=np.array([32, 320, 32, 32]),
    output_tokens=np.full((4, 2), 10),
    score=np.full((4, 2), 0.8),
    latency_limit_s=np.array([0.5, 0.1, 0.5, 0.5]),
)
EXPERTS = jax.tree.map(np.asarray, small_experts(2, network_s=0.0))


def some_episode(name: str, assignment: list[int]) -> Episode:
    """Request 0 is in time, 1 is late, 2 still waits at 4 s, and the router or a full expert refused 3."""
    log = RequestLog(
        finish_s=np.array([2.0, 3.5, 8.0, math.nan]),
        first_token_s=np.array([0.5, 1.5, 5.0, math.nan]),
        preemptions=np.zeros(4, int),
        dropped=np.array([False, False, False, True]),
    )
    net = np.arange(8.0).reshape(4, 2) / 10
    in_time = np.array([True, False, True, False])
    return Episode(
        make_router(name, small_env(2)), TRACE, np.array(assignment), net, ReplayResult(log, *[np.zeros(2)] * 3),
        in_time, 0.8 * in_time,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page() -> str:
    sides = [some_episode("shortest_queue", [0, 0, 1, 1]), some_episode("impact_greedy", [0, 1, 1, -1])]
    return episode_page(sides, EXPERTS, ["one </script> <b>", "two"], 16, "a test")


def data_of(page: str) -> dict[str, Any]:
    return json.loads(re.findall(r"const DATA = (.*);\n", page)[0])


def test_it_holds_every_request_and_no_address(page: str) -> None:
    data = data_of(page)
    assert [side["expert"] for side in data["sides"]] == [[0, 0, 1, 1], [0, 1, 1, -1]]
    assert data["sides"][0]["finish"] == [2.0, 3.5, 8.0, None]
    assert data["sides"][0]["due"] == [5.0, 2.0, 7.0, 8.0]
    assert data["experts"][0]["kv_tokens"] == 640
    assert "http" not in page
    assert page.count("</script>") == 1  # a name cannot end the script


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [500, 1300])
def test_it_shows_what_is_the_case_at_a_time(page: str, tmp_path: pathlib.Path, width: int) -> None:
    script = (
        "<pre id='found'></pre><script>show(4.0); const side = document.querySelectorAll('#sides section');"
        "const text = (each) => [...each.querySelectorAll('b')].map((b) => b.textContent);"
        "const cells = (each) => [...each.querySelectorAll('tbody tr')].map((row) => row.lastChild.textContent);"
        "document.getElementById('found').textContent = JSON.stringify({width: document.documentElement.scrollWidth,"
        "numbers: [...side].map(text), outcomes: [...side].map(cells),"
        "waits: document.querySelectorAll('i.waits').length, taken: document.querySelectorAll('td.taken').length,"
        "names: [...document.querySelectorAll('.name span:first-child')].map((each) => each.textContent)});</script>"
    )
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", script + "</body>"), encoding="utf-8")
    command = [
        CHROMIUM,
        *BROWSER_FLAGS,
        "--virtual-time-budget=3000",
        f"--user-data-dir={tmp_path}/profile",
        f"--window-size={width},900",
    ]
    done = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    found = json.loads(html.unescape(re.findall(r"<pre id=.found.>(.*?)</pre>", done.stdout, re.DOTALL)[0]))
    assert found["width"] <= width
    assert found["numbers"] == [["0.267", "1", "1"]] * 2
    others = ["waits", "late", "in time, 0.80"]
    assert found["outcomes"] == [["turned away", *others], ["refused", *others]]
    assert (found["waits"], found["taken"]) == (2, 7)
    assert found["names"][0] == "0: one </script> <b>"


@pytest.mark.slow
def test_decisions_are_those_of_an_evaluation() -> None:
    env, params = make("paper-3")
    router = make_router("impact_greedy", env, params)
    asked = scenarios(params, [1.0], [1000])
    watched = episode(env, params, router, sample_scenarios(params, asked, 150))
    (run,) = evaluate(env, params, [router], asked, 150)
    np.testing.assert_array_equal(watched.assignment, run.assignment)
    assert watched.qos.mean() == pytest.approx(run.metrics["qos"])
    placed = watched.assignment >= 0
    assert np.all(watched.net[placed, watched.assignment[placed]] >= watched.net[placed].max(1) - 1e-6)


def test_bad_input_is_one_line(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    four = "--routers=round_robin,random,least_kv,shortest_queue"
    assert_refused(program_of("replay-page"), capsys, "must be at most 3", four, f"--out={tmp_path}/page.html")
