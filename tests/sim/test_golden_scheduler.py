"""The engine and its reference against the times that vLLM's own scheduler gives, request by request.

The workloads were scheduled by the Scheduler and AsyncScheduler classes of vLLM 0.32 under a virtual clock, in which an
iteration takes what the five coefficients of each workload say. `make vllm` draws new ones, has the installed vLLM
schedule them (tests/helpers/vllm_scheduler.py) and runs these tests on them.
"""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

import qos_jax
from qos_jax import ExpertProfile, RequestLog, RequestTrace
from tests.helpers.reference import replay_reference
from tests.helpers.workloads import UNLIMITED, World, side_by_side

FIELDS = (
    "step_base_s", "prefill_base_s", "prefill_per_token_s", "per_sequence_s", "per_kv_token_s", "kv_blocks",
    "max_running",
)  # fmt: skip
FILES = {"sync": "async_and_sync", "async": "async_and_sync", "prefix": "own_prefix_cache"}
FILES["async_prefix"] = FILES["prefix"]


@functools.cache
def workloads(data_dir: pathlib.Path, mode: str) -> list[tuple[World, dict[str, Any]]]:
    """Each workload on one expert, and vLLM's answers."""
    rows = map(json.loads, (data_dir / "golden-scheduler" / f"{FILES[mode]}.jsonl").read_text().splitlines())
    switches = {"async_scheduling": np.array(["async" in mode]), "prefix_cache": np.array(["prefix" in mode])}
    return [
        (
            World(
                ExpertProfile(
                    **{name: np.array([row[name]]) for name in FIELDS},
                    token_budget=np.array([row.get("token_budget", 2048)]),
                    max_waiting=np.array([UNLIMITED]),
                    **switches,
                ),
                RequestTrace(
                    np.array(row["arrival_s"]), np.array(row["prompt_tokens"]), np.array(row["output_tokens"])[:, None]
                ),
                np.zeros(len(row["arrival_s"]), np.int32),
            ),
            row[mode],
        )
        for row in rows
    ]


def assert_equal(log: RequestLog, answer: dict[str, Any]) -> None:
    assert not log.dropped.any()
    np.testing.assert_allclose(log.finish_s, answer["finish_s"], rtol=1e-9)
    np.testing.assert_allclose(log.first_token_s, answer["first_token_s"], rtol=1e-9)
    np.testing.assert_array_equal(log.preemptions, answer["preemptions"])


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_the_engine_gives_every_request_the_times_of_vllm(data_dir: pathlib.Path, every: int) -> None:
    pairs = [pair for mode in FILES for pair in workloads(data_dir, mode)[every // 2 :: every]]
    world = side_by_side([world for world, _ in pairs])
    log = qos_jax.replay(world.experts, world.trace, world.assignment)
    for expert, (_, answer) in enumerate(pairs):
        assert_equal(jax.tree.map(lambda x, e=expert: x[world.assignment == e], log), answer)


@pytest.mark.slow
@pytest.mark.parametrize("mode", FILES)
def test_the_reference_gives_every_request_the_times_of_vllm(data_dir: pathlib.Path, mode: str) -> None:
    for world, answer in workloads(data_dir, mode):
        assert_equal(replay_reference(world.experts, world.trace, world.assignment).log, answer)
