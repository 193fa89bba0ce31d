"""The parts of the gateway that need no network."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from qos_jax.errors import InputError
from qos_jax.fleet.fleet_file import Limits, load_fleet
from qos_jax.gateway.breaker import Breaker
from qos_jax.gateway.connections import engine_client
from qos_jax.gateway.engines import Engines
from qos_jax.gateway.fleet import Backend, backends_of
from qos_jax.gateway.ledger import LIVE, PROMPT, STREAMED, ArrivalRates, Ledger
from qos_jax.gateway.level import Level, levels_of
from qos_jax.gateway.measures import Measures
from qos_jax.gateway.predict import Expectations
from qos_jax.gateway.scrape import Load, kv_share_of_slots, read_load
from qos_jax.gateway.settings import Settings
from qos_jax.gateway.shadow import shadow_report
from qos_jax.gateway.stream import EventReader
from qos_jax.sim.proxy_view import LedgerView, Scrape, proxy_view
from tests.helpers.gateways import in_loop, kill, listen

FLEET = """
format = 1
[quality]
mean_score = { "alpaca-native" = 0.7 }
mean_output_tokens = { "alpaca-native" = 90 }

[[experts]]
name = "one"
llm = "alpaca-native"
device = "A40"
url = ["http://10.0.0.1:8000/v1", "http://10.0.0.2:8000"]
count = 2

[[experts]]
llm = "mpt-7b"
device = "A40"
url = "https://two.example/"
model = "mpt"
api_key_env = "TWO_KEY"
engine = { kind = "llama.cpp" }
"""


def test_the_ledger_keeps_the_order_of_arrival_when_requests_end_and_places_run_out() -> None:
    ledger = Ledger(1, 3, 0.0)
    entries = [
        ledger.add(0, float(number), prompt_tokens=number, limit_s=1.0, score=0.5, tokens=9.0) for number in range(1, 4)
    ]
    beyond = ledger.add(0, 4.0, prompt_tokens=4, limit_s=1.0, score=0.5, tokens=9.0)
    assert (beyond.slot, ledger.in_flight[0]) == (None, 4)
    ledger.stream(beyond, 1)
    ledger.end(entries[0])
    ledger.stream(entries[2], 7)
    fifth = ledger.add(0, 5.0, prompt_tokens=5, limit_s=1.0, score=0.5, tokens=9.0)
    assert ledger.columns[PROMPT, 0].tolist() == [2, 3, 5]
    assert ledger.columns[STREAMED, 0].tolist() == [0, 7, 0]
    ledger.stream(fifth, 2)
    assert ledger.columns[STREAMED, 0].tolist() == [0, 7, 2]
    for entry in (beyond, *entries[1:], fifth):
        ledger.end(entry)
    assert (ledger.in_flight[0], ledger.columns[LIVE].sum()) == (0, 0)


def test_arrival_rates_are_those_of_the_simulator() -> None:
    rates = ArrivalRates()
    assert rates.arrive(5.0) == pytest.approx([1 / 2, 1 / 10, 1 / 60])
    assert rates.arrive(7.0)[0] == pytest.approx((1 + np.exp(-1.0)) / 2)


def view(waiting: int, age_s: float) -> tuple[list[bool], list[bool], list[int]]:
    """Who runs, who waits and what is computed of four requests: a gap, one with 5 tokens, three without."""
    ledger = LedgerView(
        live=np.array([[False, True, True, True, True]]),
        prompt_tokens=np.full((1, 5), 10),
        streamed_tokens=np.array([[0, 5, 0, 0, 0]]),
        age_s=np.array([[9.0, 4.0, 3.0, 2.0, 1.0]]),
        latency_limit_s=np.full((1, 5), 0.03),
        predicted_score=np.full((1, 5), 0.5),
        predicted_tokens=np.full((1, 5), 3.0),
    )
    scrape = Scrape(np.array([age_s]), np.array([waiting]), np.array([7]))
    experts, requests = proxy_view(ledger, scrape)
    assert int(experts.running[0]) == int(requests.running.sum())
    assert int(experts.waiting[0]) == int(requests.waiting.sum())
    assert int(experts.kv_used_blocks[0]) == 7
    assert requests.predicted_tokens.tolist() == [[3.0, 6.0, 3.0, 3.0, 3.0]]
    return requests.running[0].tolist(), requests.waiting[0].tolist(), requests.computed_tokens[0].tolist()


@pytest.mark.parametrize(
    ("waiting", "age_s", "running"),
    [
        (0, np.inf, [False, True, False, False, False]),  # never read: only tokens tell
        (0, 0.5, [False, True, True, True, True]),  # all were there, and nobody waited
        (2, 0.5, [False, True, True, False, False]),  # the last two to come waited
        (1, 1.5, [False, True, True, False, False]),  # the last one came after
        (4, 0.5, [False, True, False, False, False]),  # one with tokens was preempted, which no proxy knows
    ],
)
def test_a_proxy_knows_who_runs_by_tokens_and_by_the_last_scrape(waiting, age_s, running) -> None:
    shown, waits, computed = view(waiting, age_s)
    assert shown == running
    assert waits == [live and not runs for live, runs in zip([False] + [True] * 4, running, strict=True)]
    assert computed == [0, 14, 0, 0, 0]


GOOD_PAGE = "vllm:num_requests_running 1\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0.5\n"
BAD_PAGES = (
    "<html>{",
    *(GOOD_PAGE.replace("running 1", f"running {value}") for value in ("+Inf", "-Inf", "NaN", "-3", "1e400", "1e12")),
    *(GOOD_PAGE.replace("perc 0.5", f"perc {value}") for value in ("NaN", "-1")),
    GOOD_PAGE + 'vllm:num_requests_running{a="b"x} 1\n',
)


@pytest.mark.parametrize("page", [*BAD_PAGES, None])
@in_loop
async def test_a_bad_page_is_no_reading_and_ends_the_watching_of_no_engine(page, caplog) -> None:
    """None stands for an address that breaks the reading in a way that nobody thought of."""
    asked = []

    async def answer(request: Request) -> Response:
        asked.append(name := request.path_params["name"])
        return PlainTextResponse(page if name == "bad" else GOOD_PAGE)

    server, serving = await listen(Starlette(routes=[Route("/{name}/metrics", answer)]))
    urls = {name: f"http://127.0.0.1:{server.port}/{name}" for name in ("bad", "good")}
    urls |= {} if page else {"bad": None}
    backends = [Backend(name, url, "vllm", "m") for name, url in urls.items()]
    settings, measures = Settings(scrape_s=0.002), Measures(["bad", "good"])
    engines = Engines(backends, Ledger(2, 3, 0.0), np.ones(2), settings, measures)
    async with engine_client() as client:
        watching = asyncio.create_task(engines.watch(client))
        while min(asked.count(name) for name, url in urls.items() if url) < 3:
            assert not watching.done()
            await asyncio.sleep(0.001)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    await kill(server, serving)
    assert [engine.load for engine in engines.all] == [None, Load(1, 0, 0.5)]
    assert [record.message for record in caplog.records] == ["metrics cannot be read"]


def test_metrics_of_engines_are_read_by_their_names() -> None:
    vllm = (
        'vllm:num_requests_running{engine="0",model_name="m"} 3.0\nvllm:num_requests_running{engine="1"} 1.0\n'
        "vllm:num_requests_waiting 2.0\nvllm:gpu_cache_usage_perc 0.25\n"
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0\n'
    )
    assert read_load("vllm", vllm) == Load(4, 2, 0.25, 1600)
    sglang = (
        "sglang:num_running_reqs 1\nsglang:num_queue_reqs 0\nsglang:token_usage 0.5\n"
        'sglang:cache_config_info{page_size="1",num_pages="None"} 1\n'
    )
    assert read_load("sglang", sglang) == Load(1, 0, 0.5, None)
    assert read_load("llama.cpp", "llamacpp:requests_processing 1\nllamacpp:requests_deferred 5\n") == Load(1, 5)
    for page in ("", "vllm:num_requests_running 1\n", *BAD_PAGES):
        with pytest.raises(ValueError):
            read_load("vllm", page)
    busy = {"n_ctx": 200, "is_processing": True}
    assert kv_share_of_slots([busy | {"n_prompt_tokens": 100}, {"n_ctx": 200, "is_processing": False}]) == 0.25
    assert kv_share_of_slots([busy | {"n_past": 100}]) == 0.5
    unknowns = [[], {}, [1], [busy], [{"is_processing": True, "n_past": 1}], [busy | {"n_past": -1}]]
    for unknown in (*unknowns, [busy | {"n_past": 10**400}], [busy | {"n_past": 1, "n_ctx": 10**400}]):
        assert kv_share_of_slots(unknown) is None


def test_events_are_cut_wherever_the_bytes_are() -> None:
    stream = (
        b': hello\n\ndata: {"choices": [{"text": "a"}]}\r\n\r\ndata: {"choices": [{"delta": {"content": ""}}]}\n\n'
        b'data: {"choices": [], "usage": {"completion_tokens": 1}}\n\ndata: {"error": {"message": "x"}}\n\n'
        b"data: [DONE]\n\n"
    )
    for size in (1, 7, len(stream)):
        reader, found = EventReader(), []
        for start in range(0, len(stream), size):
            found += reader.feed(stream[start : start + size])
        assert [each.tokens for each in found] == [0, 1, 0, 0, 0, 0]
        assert [each.only_usage for each in found] == [False, False, False, True, False, False]
        assert [bool(each.error) for each in found] == [False, False, False, False, True, False]
        assert [each.done for each in found] == [False] * 5 + [True]
    with pytest.raises(ValueError, match="longer"):
        EventReader().feed(b"data: " + b"x" * 2**21)


def test_the_breaker_opens_waits_longer_each_time_and_closes() -> None:
    breaker = Breaker(failures_to_open=2, first_wait_s=1.0, max_wait_s=3.0)
    breaker.failed(0.0)
    assert breaker.allows(0.0)
    breaker.failed(0.0)
    assert (breaker.allows(0.9), breaker.allows(1.0)) == (False, True)
    waits_s = []
    for now_s in (10.0, 20.0, 30.0):
        breaker.sent()
        assert not breaker.allows(now_s)  # one at a time
        breaker.failed(now_s)
        waits_s.append(breaker.opened_until_s - now_s)
    assert waits_s == [2.0, 3.0, 3.0]
    breaker.sent()
    breaker.given_up()
    assert breaker.allows(40.0)
    breaker.sent()
    breaker.succeeded()
    assert (breaker.state, breaker.failures) == ("closed", 0)


@in_loop
async def test_expectations_are_learned_from_answers_and_stay_below_the_cap() -> None:
    expectations = Expectations([0.4, 0.6])
    for _ in range(200):
        expectations.learn(0, text_bytes=300, prompt_tokens=100, answer_tokens=50)
    prediction = await expectations.predict("x" * 300, None)
    assert prediction.tokens[0] < 70 < prediction.tokens[1]
    assert 75 < prediction.prompt_tokens < 100
    assert (await expectations.predict("x", 8)).tokens.tolist() == [8.0, 8.0]
    assert prediction.score.tolist() == [0.4, 0.6]


def test_a_fleet_file_names_engines(tmp_path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET)
    one, copy, two = backends_of(load_fleet(path))
    assert (one.name, one.url, one.kind, one.model) == ("one", "http://10.0.0.1:8000", "vllm", "alpaca-native")
    assert (copy.name, copy.url) == ("one-2", "http://10.0.0.2:8000")
    assert (two.name, two.url, two.kind, two.model) == ("mpt-7b @ A40", "https://two.example", "llama.cpp", "mpt")
    assert (one.quality, one.mean_tokens, two.quality, two.mean_tokens) == (0.7, 90.0, 0.5, None)
    assert two.api_key_env == "TWO_KEY"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("https://two.example/", "file:///etc/passwd", "expert 'mpt-7b @ A40': url is 'file:///etc/passwd'"),
        ("https://two.example/", "http://user:key@two.example", "expert 'mpt-7b @ A40': url must hold no user"),
        ('url = "https://two.example/"', "", "expert 'mpt-7b @ A40': url is None"),
        ('"one"', '"a\\r\\nb"', "the name must be"),
    ],
)
def test_a_fleet_file_without_usable_engines_is_told(tmp_path, old, new, told) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET.replace(old, new))
    with pytest.raises(InputError) as error:
        backends_of(load_fleet(path))
    assert told in str(error.value)


def test_the_report_of_the_shadow_compares_both_choices_by_one_estimate(tmp_path) -> None:
    record = {
        "names": ["a", "b"], "router": "r", "status": "ok", "engine": "a", "tried": ["a"], "qos": 0.5, "time": 1.0,
        "prompt_tokens": 9, "output_tokens": 9, "first_token_s": None, "end_s": 2.0, "in_time": True,
        "predicted_score": [None, 0.5], "predicted_tokens": [9, 9],
    }  # fmt: skip
    estimate = {"qos": [0.4, 0.6], "net": [0.3, 0.5]}
    rows = [
        record | {"shadow": "b", "estimate": estimate},
        record | {"shadow": "a", "estimate": estimate, "tried": ["b", "a"]},
        record
        | {"shadow": "drop", "estimate": estimate, "status": "rejected", "engine": None, "tried": [], "qos": 0.0},
        record | {"shadow": None, "estimate": estimate},
    ]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = shadow_report(tmp_path)
    assert (report.requests, report.same) == (3, pytest.approx(1 / 3))
    assert (report.served_qos, report.estimated_qos) == (0.5, 0.4)
    assert (report.served_net, report.shadow_net) == (pytest.approx(0.8 / 3), pytest.approx(0.8 / 3))
    assert report.served_shares == {"a": pytest.approx(1 / 3), "drop": pytest.approx(1 / 3), "b": pytest.approx(1 / 3)}
    assert "same for 33 %" in report.as_text()
    unknown = record | {"shadow": "b", "estimate": {"qos": [None, 0.6], "net": [0.3, None]}}
    (tmp_path / "requests.jsonl").write_text(json.dumps(unknown))
    report = shadow_report(tmp_path)
    assert (report.same, report.estimated_qos, report.served_net, report.shadow_net) == (0.0, 0.0, 0.3, 0.0)
    (tmp_path / "requests.jsonl").write_text(json.dumps(rows[-1]))
    with pytest.raises(InputError, match="holds no decision of a shadow"):
        shadow_report(tmp_path)


def test_all_limits_of_a_level_hold_together() -> None:
    level = Level(latency_per_token_s=0.5, ttft_s=1.0, tpot_s=0.1, e2e_s=3.0)
    assert level.per_token_s(11.0) == pytest.approx(2.0 / 11)
    assert level.per_token_s(41.0) == pytest.approx(3.0 / 41)
    assert Level(tpot_s=0.1).per_token_s(7.0) == pytest.approx(0.1)
    assert level.met(1.0, 2.0, 11)
    assert [level.met(*times) for times in ((1.1, 2.0, 11), (0.5, 2.0, 11), (1.0, 3.1, 41), (0.5, 0.6, 1))] == [
        False
    ] * 4
    one, other = levels_of(Limits((), ttft_s=(1.0, np.inf), tpot_s=(0.1, 0.2), names=("a", "b")))
    assert (one, other) == (Level(ttft_s=1.0, tpot_s=0.1), Level(tpot_s=0.2))
