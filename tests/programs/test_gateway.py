"""The program qos-jax gateway: bad input is told in a line, and it serves until it is told to end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys

import httpx
import pytest

from experiments.servers import free_port
from qos_jax.gateway.fake_engine import FakeEngine, many
from tests.helpers.gateways import in_loop, kill, listen, profile
from tests.helpers.programs import ROOT, assert_refused, program_of

ENGINE = (
    '[[experts]]\nname = "e{0}"\nmodel = "m{0}"\nllm = "mpt-7b"\ndevice = "A40"\nurl = "http://127.0.0.1:{1}/{0}"\n'
)


def fleet_of(count: int, port: int) -> str:
    return "\n".join(["format = 1", *(ENGINE.format(number, port) for number in range(count))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --fleet=FILE"),
        (["--report={path}.d"], "cannot be read"),
        (["--fleet={path}", "--router=best"], "router 'best' is unknown"),
        (
            ["--fleet={path}", "--shadow=random", "--router=random"],
            "--shadow=random: is the router itself",
        ),
        (["--fleet={path}", "--api_keys_file={empty}"], "holds no key"),
        (["--fleet={path}", "--scrape_s=0"], "--scrape_s"),
        (["--fleet={path}", "--predictor={empty}"], "cannot be read"),
        (["--fleet={path}x"], "cannot be read"),
    ],
)
def test_bad_input_is_told_in_one_line(tmp_path, capsys, arguments, message) -> None:
    path, empty = tmp_path / "fleet.toml", tmp_path / "empty"
    path.write_text(fleet_of(1, 1))
    empty.write_text("\n")
    given = [each.format(path=path, empty=empty) for each in arguments]
    assert_refused(program_of("gateway"), capsys, message, *given)


@pytest.mark.slow
@in_loop
async def test_the_program_serves_records_and_ends_on_a_signal(tmp_path) -> None:
    engines = [FakeEngine(f"m{i}", profile(3), i) for i in range(3)]
    server, task = await listen(many(engines))
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(fleet_of(3, server.port))
    port = free_port()
    command = [sys.executable, "-m", "qos_jax.programs", "gateway", f"--fleet={fleet}", "--router=impact_greedy"]
    command += ["--shadow=round_robin", f"--port={port}", f"--out={tmp_path}"]
    variables = os.environ | {"QOS_JAX_GATEWAY_KEYS": "one, two"}
    program = subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        client.headers["authorization"] = "Bearer two"
        while True:
            try:
                assert (await client.get("/healthz")).json()["of"] == 3
                break
            except httpx.ConnectError:
                assert program.poll() is None
                await asyncio.sleep(0.05)
        for _ in range(4):
            answer = await client.post("/v1/completions", json={"model": "auto", "prompt": "hi", "max_tokens": 3})
            assert answer.status_code == 200
    program.send_signal(signal.SIGTERM)
    _, log = program.communicate(timeout=30)
    assert program.returncode == 0, log
    records = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert [each["shadow"] for each in records] == ["e0", "e1", "e2", "e0"]
    assert not re.search("one|two", log)
    await kill(server, task)
