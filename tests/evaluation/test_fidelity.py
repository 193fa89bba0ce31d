"""Fidelity: known errors are recovered, and the replay of a real run agrees with it."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np
import pytest

from qos_jax import ExpertProfile, InputError, RequestTrace
from qos_jax.evaluation import fidelity
from qos_jax.evaluation.measured_run import MeasuredRun, read_run
from qos_jax.fleet import profile_fitting
from qos_jax.fleet.kernel_tables import read_tables
from qos_jax.fleet.table_fitting import fit_tables
from qos_jax.report import fidelity_plots
from qos_jax.sim import lanes
from tests.fleet.test_profile_fitting import LAYERS, llmservingsim_tables
from tests.helpers.programs import program_of
from tests.helpers.reference import ReferenceRun, replay_reference

TIMING = dict(zip(profile_fitting.TIMING_UNITS, (0.02, 0.01, 1e-4, 5e-4, 1e-6), strict=True))
BEGAN_S, CLOCK_S, TICK_S, BLOCK_TOKENS = 1.7e9, 500.0, 0.25, 16


class Made(NamedTuple):
    """A run whose engine is the reference simulator in plain Python."""

    folder: pathlib.Path
    arrival_s: np.ndarray
    reference: ReferenceRun


def make_run(
    folder: pathlib.Path, arrival_s: Any, prompt_tokens: Any, output_tokens: Any, kv_blocks: int = 1000
) -> Made:
    limits = {"kv_blocks": kv_blocks, "max_running": 64, "max_waiting": 1000}
    experts = ExpertProfile(**{name: np.array([value]) for name, value in (TIMING | limits).items()})
    trace = RequestTrace(arrival_s, prompt_tokens, np.asarray(output_tokens)[:, None])
    reference = replay_reference(experts, trace, np.zeros(len(arrival_s), int))
    boundaries_s = np.array([iteration.start_s for iteration in reference.experts[0].iterations])
    taken_s = [boundaries_s[boundaries_s >= time_s][0] for time_s in arrival_s]
    rows = zip(
        arrival_s, prompt_tokens, output_tokens, taken_s, reference.first_token_s, reference.finish_s, strict=True
    )
    with open(folder / "requests.jsonl", "w", encoding="utf-8") as file:
        for arrival, prompt, output, taken, first, last in reversed(list(rows)):  # files need not be sorted
            times = {"queued_ts": taken, "first_token_ts": first, "last_token_ts": last}
            row = {"input_toks": int(prompt), "output_toks": int(output), "arrival_time": BEGAN_S + arrival}
            file.write(json.dumps(row | {name: CLOCK_S + time for name, time in times.items()}) + "\n")
    meta = {
        "model": "a model",
        "vllm_version": "0",
        "hardware": {"device_name": "a GPU"},
        "started_at": datetime.datetime.fromtimestamp(BEGAN_S - 0.125, datetime.UTC).isoformat(),
        "engine_kwargs": {"max_num_seqs": 64, "max_num_batched_tokens": 2048},
        "kv_cache": {"num_gpu_blocks": kv_blocks + 1, "block_size": BLOCK_TOKENS},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    write_ticks(folder / "timeseries.csv", Made(folder, np.asarray(arrival_s), reference), kv_blocks)
    return Made(folder, np.asarray(arrival_s), reference)


def write_ticks(path: pathlib.Path, made: Made, kv_blocks: int) -> None:
    """Writes the state of the engine's last iteration at each tick; every scheduled request emits one token."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["t", "prompt_throughput", "gen_throughput", "running", "waiting", "kv_cache_pct"])
        for tick in range(1, 2 + int(np.nanmax(made.reference.finish_s) / TICK_S)):
            now_s = tick * TICK_S - 0.125
            past = [iteration for iteration in made.reference.experts[0].iterations if iteration.start_s <= now_s]
            new = [iteration for iteration in past if iteration.start_s > now_s - TICK_S]
            running = share = live = 0
            if past and now_s <= past[-1].start_s + past[-1].duration_s:
                start_s, running, share = past[-1].start_s, past[-1].scheduled, past[-1].blocks_held / kv_blocks
                live = np.sum(made.arrival_s <= start_s) - np.sum(made.reference.finish_s <= start_s)
            prompts = sum(iteration.prefill_tokens for iteration in new) / TICK_S
            tokens = sum(iteration.scheduled for iteration in new) / TICK_S
            writer.writerow([tick * TICK_S, prompts, tokens, running, live - running if live else 0, 100 * share])


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Forty requests that are admitted on arrival."""
    rng = np.random.default_rng(0)
    arrival_s = np.append(0.0, np.cumsum(rng.exponential(0.1, 39)))
    return make_run(tmp_path_factory.mktemp("calm"), arrival_s, rng.integers(5, 90, 40), rng.integers(1, 60, 40))


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Forty requests with KV memory for less than half of them."""
    rng = np.random.default_rng(1)
    arrival_s = np.append(0.0, np.cumsum(rng.exponential(0.02, 39)))
    lengths = rng.integers(5, 90, 40), rng.integers(40, 80, 40)
    return make_run(tmp_path_factory.mktemp("crowded"), arrival_s, *lengths, kv_blocks=60)


@pytest.mark.parametrize("name", ["calm", "crowded"])
def test_the_replay_of_a_run_by_the_same_rules_agrees_with_it(name: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(name)
    run = read_run(made.folder)
    simulated = fidelity.simulate(run, TIMING)
    assert run.name == "a model on a GPU, vLLM 0"
    np.testing.assert_allclose(run.arrival_s, made.arrival_s, atol=1e-6)
    for row in fidelity.latency_errors(run, simulated.log).values():
        assert abs(row["mean_error"]) < 1e-5
        assert row["p95_error"] < 1e-4
        assert row["correlation"] > 1 - 1e-6
    for row in fidelity.load_errors(run, simulated).values():
        # Rounding may move a tick into the next iteration.
        assert row["measured"] == pytest.approx(row["simulated"], rel=0.02)
    recomputed = fidelity.recomputation(run, simulated, TIMING)
    assert recomputed["preemptions"] == made.reference.preemptions.sum()
    prefill_tokens = sum(iteration.prefill_tokens for iteration in made.reference.experts[0].iterations)
    assert recomputed["tokens"] == prefill_tokens - run.prompt_tokens.sum()
    assert (recomputed["preemptions"] > 0) == (name == "crowded")
    assert simulated.waiting.max() > 10 or name == "calm"


def test_timing_that_is_a_tenth_too_slow_shows_as_such(tmp_path: pathlib.Path) -> None:
    """Requests do not overlap, so all of their times are sums of iterations."""
    run = read_run(make_run(tmp_path, 5.0 * np.arange(6), np.full(6, 40), np.arange(20, 26)).folder)
    slow = {name: 1.1 * value for name, value in TIMING.items()}
    for name, row in fidelity.latency_errors(run, fidelity.replay_run(run, slow)).items():
        assert row["mean_error"] == pytest.approx(0.1, abs=1e-5), name
        assert row["median_error"] == pytest.approx(0.1, abs=1e-5), name
    of_slow, of_true = (1 + fidelity.decode_errors(run, timing)["memory free"]["error"] for timing in (slow, TIMING))
    assert of_slow == pytest.approx(1.1 * of_true)


def test_the_cost_model_is_right_at_the_batches_of_an_engine_that_follows_it(calm: Made, crowded: Made) -> None:
    free = fidelity.decode_errors(read_run(calm.folder), TIMING)["memory free"]
    assert free["ticks"] >= 3
    assert abs(free["error"]) < 0.1  # batches between ticks are interpolated
    full = fidelity.decode_errors(read_run(crowded.folder), TIMING)["memory full"]
    assert full["ticks"] == 0 or abs(full["error"]) < 0.15


def test_errors_without_a_part_of_the_model(calm: Made, crowded: Made) -> None:
    run = read_run(calm.folder)
    errors = fidelity.parts_left_out(run, TIMING)
    assert all(abs(error) < 1e-5 for error in errors["nothing"].values())
    assert all(abs(error) < 1e-5 for error in errors["limit of the KV memory"].values())  # memory suffices
    for part in ("reads of the KV cache", "time per request"):
        assert errors[part]["tpot_s"] < -0.001
    assert fidelity.parts_left_out(read_run(crowded.folder), TIMING)["limit of the KV memory"]["ttft_s"] < -0.3


def batches(*rows: tuple[str, int, int, int], factor: float = 1.0) -> profile_fitting.Iterations:
    kinds, *counts = zip(*rows, strict=True)
    ones, zeros = np.ones(len(rows)), np.zeros(len(rows))
    found = profile_fitting.Iterations(np.array(kinds), *map(np.array, counts), ones, zeros, zeros, zeros)
    return dataclasses.replace(found, time_s=factor * profile_fitting.predicted_s(TIMING, found))


def test_errors_of_the_cost_model_are_those_of_the_nearest_kernels() -> None:
    right, double = batches(("decode", 0, 4, 100)), batches(("decode", 0, 60, 9000), ("mixed", 200, 5, 100), factor=2.0)
    kernels = profile_fitting.Iterations(
        *(np.concatenate([getattr(part, name) for part in (right, double)]) for name in right.__dataclass_fields__)
    )
    run = batches(("decode", 0, 5, 90), ("decode", 0, 50, 8000), ("mixed", 150, 4, 90), ("chunked", 900, 1, 0))
    rows = {row["kind"]: row for row in fidelity.parts_of_time(run, kernels, TIMING)}
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1.0)
    assert rows["mixed"]["form_error"] == pytest.approx(-0.5, abs=1e-4)
    assert rows["decode"]["form_error"] == pytest.approx(-0.5 * run.time_s[1] / run.time_s[:2].sum(), abs=1e-4)
    assert rows["decode"]["of_the_run"] == pytest.approx(rows["decode"]["share"] * rows["decode"]["form_error"])
    assert np.isnan(rows["chunked"]["form_error"])  # not measured
    assert "prefill" not in rows


def test_figures_show_both(crowded: Made) -> None:
    run = read_run(crowded.folder)
    simulated = fidelity.simulate(run, TIMING)
    scatter = fidelity_plots.latency_scatter(run, simulated.log)
    assert [axes.get_title(loc="left") for axes in scatter.axes] == ["TTFT, s", "TPOT, ms", "end to end, s"]
    x, y = scatter.axes[0].collections[0].get_offsets().T
    np.testing.assert_allclose(x, run.first_token_s - run.arrival_s)
    np.testing.assert_allclose(y, simulated.log.first_token_s - run.arrival_s)
    timeline = fidelity_plots.load_timeline(run, simulated)
    measured_line, simulated_line = timeline.axes[2].get_lines()
    np.testing.assert_allclose(measured_line.get_ydata(), 100 * run.kv_share)
    np.testing.assert_allclose(simulated_line.get_ydata(), 100 * simulated.kv_share)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("meta.json", "{", "meta.json: is not JSON"),
        ("meta.json", "{}", "meta.json: "),
        ("requests.jsonl", "", "requests.jsonl: holds no request"),
        (
            "requests.jsonl",
            '\n{"input_toks": NaN}',
            "requests.jsonl, line 2: input_toks is nan, must be a whole number",
        ),
        ("requests.jsonl", "[1]", r"requests.jsonl, line 1: is \[1\], must be a JSON object with input_toks"),
        (
            "requests.jsonl",
            '{"input_toks": 1}',
            "requests.jsonl, line 1: output_toks is missing, must be a whole number",
        ),
        (
            "timeseries.csv",
            "t,running\n1,2",
            r"timeseries.csv: lacks the column\(s\) kv_cache_pct|timeseries.csv: lacks the column\(s\) waiting",
        ),
        (
            "timeseries.csv",
            "t,prompt_throughput,gen_throughput,running,waiting,kv_cache_pct\n1,2,3,many,0,0",
            "timeseries.csv, line 2: running is 'many', must be a finite number",
        ),
    ],
)
def test_damaged_files_are_named(calm: Made, tmp_path: pathlib.Path, file: str, text: str, message: str) -> None:
    for path in calm.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=message):
        read_run(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(InputError, match=rf"{file}: cannot be read: No such file"):
        read_run(tmp_path)


def test_files_with_a_byte_order_mark_are_read(calm: Made, tmp_path: pathlib.Path) -> None:
    for path in calm.folder.iterdir():
        (tmp_path / path.name).write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    marked, run = read_run(tmp_path), read_run(calm.folder)
    np.testing.assert_array_equal(marked.arrival_s, run.arrival_s)
    np.testing.assert_array_equal(marked.running, run.running)


def test_a_request_that_the_memory_cannot_hold(tmp_path: pathlib.Path) -> None:
    made = make_run(tmp_path, [0.0, 1.0], [10, 300], [4, 4])
    meta = json.loads((made.folder / "meta.json").read_text())
    meta["kv_cache"]["num_gpu_blocks"] = 10
    (made.folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="request 2 does not fit 9 KV blocks"):
        fidelity.replay_run(read_run(made.folder), TIMING)


def test_the_replay_of_the_real_run_agrees_to_2_percent(
    data_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "_MIN_LIVE", 256)  # as many as it needs, so that it does not compile for fewer first
    run = read_run(data_dir / "golden-rtx4090")
    files = (
        data_dir / "profiles" / f"rtx4090_llama3.1-8b_{name}.csv" for name in ("dense", "attention", "per_sequence")
    )
    tables = read_tables(*files)
    kernels = profile_fitting.assemble(tables, 32, run.kv_blocks * run.block_size)
    assert (run.kv_blocks, run.async_scheduling, run.prefix_cache) == (2587, True, True)
    timing = profile_fitting.fit_timing(kernels) | {"kernels": fit_tables(tables, kernels, 32)}
    errors = fidelity.latency_errors(run, fidelity.replay_run(run, timing))
    assert {name: row["mean_error"] for name, row in errors.items() if abs(row["mean_error"]) > 0.02} == {}
    assert errors["e2e_s"]["median_error"] < 0.015
    assert errors["e2e_s"]["correlation"] > 0.998
    assert abs(fidelity.decode_errors(run, timing)["memory free"]["error"]) < 0.02


def qwen_run(data_dir: pathlib.Path) -> MeasuredRun:
    run = read_run(data_dir / "golden-rtxpro6000x2-qwen3-32b", kv_blocks=27_000)
    return dataclasses.replace(run, prefix_cache=True)


@pytest.fixture(scope="module")
def qwen_timing(data_dir: pathlib.Path) -> dict[str, Any]:
    files = (
        data_dir / "profiles" / f"rtxpro6000_qwen3-32b_tp2_{name}.csv"
        for name in ("dense", "attention", "per_sequence")
    )
    link = profile_fitting.Link(gb_per_s=16.0, latency_us=20.0, hidden_size=5120, vocab_size=151_936)
    tables = profile_fitting.with_exchange(read_tables(*files), link)
    kernels = profile_fitting.assemble(tables, 64, 27_000 * BLOCK_TOKENS)
    return profile_fitting.fit_timing(kernels) | {"kernels": fit_tables(tables, kernels, 64)}


@pytest.mark.slow
def test_the_replay_of_two_gpus_agrees_to_5_percent(
    data_dir: pathlib.Path, qwen_timing: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "_MIN_LIVE", 256)
    run = dataclasses.replace(qwen_run(data_dir), async_scheduling=True)
    assert np.isnan(run.kv_share).all()
    shared = fidelity.with_shared_prefixes(run, run.kv_blocks)
    errors = {name: fidelity.latency_errors(each, fidelity.replay_run(each, qwen_timing)) for name, each in
              {"found": shared, "not found": run}.items()}  # fmt: skip
    print({name: [round(100 * row["mean_error"], 2) for row in rows.values()] for name, rows in errors.items()})
    assert all(-0.05 < row["mean_error"] < -0.04 for row in errors["found"].values())
    assert all(-0.025 < row["mean_error"] < -0.01 for row in errors["not found"].values())
    in_decode = fidelity.decode_errors(run, qwen_timing)
    assert in_decode["memory free"]["error"] == pytest.approx(-0.050, abs=0.005)
    assert in_decode["batch full"]["error"] == pytest.approx(-0.046, abs=0.005)


def test_the_link_as_it_is_assumed_is_too_slow_for_one_request_and_too_fast_for_128(
    data_dir: pathlib.Path, qwen_timing: dict[str, Any]
) -> None:
    run = qwen_run(data_dir)
    measured = np.diff(run.tick_s) * run.output_tokens_per_s[1:]
    errors = measured / fidelity._decoded_tokens(run, qwen_timing) - 1
    only_decoded = run.prompt_tokens_per_s[1:] == 0
    by_running = {}
    for low, high in ((1, 1), (3, 32), (33, 64), (65, 127), (128, 128)):
        within = (run.running >= low) & (run.running <= high)
        by_running[low, high] = errors[only_decoded & within[1:] & within[:-1]].mean()
    print({running: round(100 * float(error), 1) for running, error in by_running.items()})
    assert 0.05 < by_running[1, 1] < 0.12
    assert -0.06 < by_running[128, 128] < -0.04


@pytest.mark.slow
def test_first_tokens_in_the_same_iteration_show_that_the_engine_found_shared_prefixes(
    data_dir: pathlib.Path, qwen_timing: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While all prompts wait, iterations are full, and which of them end together depends on what was computed only."""
    monkeypatch.setattr(lanes, "_MIN_LIVE", 64)
    run = qwen_run(data_dir)
    admitted = 125  # by then the batch is full

    def begins_iteration(log: Any) -> np.ndarray:
        return np.diff(log.first_token_s[:admitted]) > 0.005

    equal = {}
    found = fidelity.with_shared_prefixes(run, None)
    also = dataclasses.replace(found, async_scheduling=True)
    for name, each in {"found": found, "found, asynchronous": also, "not found": run}.items():
        names = ("arrival_s", "prompt_tokens", "output_tokens", "shared_tokens")
        first = {field: getattr(each, field) for field in names}
        first = {field: None if values is None else values[:130] for field, values in first.items()}
        log = fidelity.replay_run(dataclasses.replace(each, **first), qwen_timing)
        equal[name] = (begins_iteration(log) == begins_iteration(run)).astype(float)
    print({name: (values.sum(), values[20:].sum()) for name, values in equal.items()})
    assert equal["found"].mean() > 0.97
    assert equal["found"][20:].all()
    assert equal["not found"].mean() < 0.75


def test_prompts_that_share_blocks(calm: Made, tmp_path: pathlib.Path) -> None:
    """All begin with the same block; the last token is always computed."""
    for path in calm.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rows = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    rows = [row | {"request_id": f"r{j}"} for j, row in enumerate(rows)]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = read_run(tmp_path)
    assert run.prompt_blocks is None
    with pytest.raises(InputError, match=r"has no prefix_blocks\.jsonl"):
        fidelity.with_shared_prefixes(run, None)
    blocks = [
        {"request_id": row["request_id"], "hash_ids": [0, *range(100 * j + 1, 100 * j + row["input_toks"] // 16)]}
        for j, row in enumerate(rows)
    ]
    (tmp_path / "prefix_blocks.jsonl").write_text("\n".join(map(json.dumps, blocks)))
    run = read_run(tmp_path)
    with pytest.raises(InputError, match="its engine has no prefix cache"):
        fidelity.with_shared_prefixes(run, None)
    run = dataclasses.replace(run, prefix_cache=True)
    shared = fidelity.with_shared_prefixes(run, None)
    assert shared.shared_tokens is not None
    expected = np.where(run.prompt_tokens > 16, 16, 0)
    expected[0] = 0
    assert shared.shared_tokens.tolist() == expected.tolist()
    small = fidelity.with_shared_prefixes(run, 1).shared_tokens
    assert small is not None
    assert small.sum() < expected.sum()
    slow = TIMING | {"prefill_per_token_s": 0.01}
    ttft_s = [fidelity.latency_errors(each, fidelity.replay_run(each, slow))["ttft_s"] for each in (shared, run)]
    assert ttft_s[0]["simulated"] < ttft_s[1]["simulated"]
    assert fidelity.recomputation(shared, fidelity.simulate(shared, slow), slow)["tokens"] == 0
    assert fidelity.parts_left_out(shared, slow)["prefixes that requests share"]["ttft_s"] > 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"request_id": "a", "hash_ids": ["x"]}', r"line 1: hash_ids is \['x'\], must be a list of whole numbers"),
        ('{"hash_ids": []}', "line 1: request_id is None, must be a text"),
        ('{"request_id": "a", "hash_ids": []}', "has no line with request_id None, must have one for each request"),
    ],
)
def test_damaged_block_ids_are_named(calm: Made, tmp_path: pathlib.Path, line: str, message: str) -> None:
    for path in calm.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "prefix_blocks.jsonl").write_text(line)
    with pytest.raises(InputError, match=f"prefix_blocks.jsonl(, |: ){message}"):
        read_run(tmp_path)


def test_a_memory_that_was_not_recorded_is_that_of_the_requests(calm: Made, tmp_path: pathlib.Path) -> None:
    for path in calm.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with open(calm.folder / "timeseries.csv", newline="", encoding="utf-8") as file:
        rows = [[*row[:-1], "kv_cache_pct" if row[0] == "t" else "0.0"] for row in csv.reader(file)]
    with open(tmp_path / "timeseries.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    run = read_run(tmp_path)
    assert np.isnan(run.kv_share).all()
    free = fidelity.decode_errors(run, TIMING)["memory free"]
    assert free["ticks"] >= 3
    assert abs(free["error"]) < 0.1
    assert np.isnan(fidelity.load_errors(run, fidelity.simulate(run, TIMING))["kv_share"]["measured"])


@pytest.fixture(scope="module")
def program() -> Any:
    return program_of("fidelity")


def test_the_program_writes_everything(crowded: Made, program: Any, tmp_path: pathlib.Path, capsys: Any) -> None:
    files = zip(llmservingsim_tables(tmp_path, TIMING), ("dense", "attention", "per_sequence"), strict=True)
    for file, name in files:
        pathlib.Path(file).rename(tmp_path / f"made_{name}.csv")
    flags = [
        f"--profiles={tmp_path / 'made'}",
        f"--num_layers={LAYERS}",
        "--form=coefficients",
        f"--out={tmp_path / 'out'}",
    ]
    assert program(f"--run={crowded.folder}", *flags) == 0
    assert "mean +0.00 %" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert abs(found["latencies"]["e2e_s"]["mean_error"]) < 1e-3
    requests = found["each_request"]
    latency_s = crowded.reference.finish_s - crowded.arrival_s
    np.testing.assert_allclose(requests["simulated"]["e2e_s"], latency_s, rtol=1e-3)
    assert requests["simulated_preemptions"] == crowded.reference.preemptions.tolist()
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<figure") == 2
    assert "nan" not in re.sub(r"<(svg|style|script).*?</\1>", "", page, flags=re.DOTALL)
    for name in ("latencies", "timeline"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert program(f"--run={tmp_path}", *flags) == 2
    assert "meta.json: cannot be read" in capsys.readouterr().err
    for flag, message in (
        ("--hidden_size=8", "--hidden_size is 8, must be left out without --link_gb_per_s"),
        ("--link_gb_per_s=16", "--hidden_size is missing"),
        ("--shared_prefixes=lru", "has no prefix_blocks.jsonl"),
    ):
        assert program(f"--run={crowded.folder}", *flags, flag) == 2
        assert message in capsys.readouterr().err
