"""Shared prefixes: a cache by hand, vLLM's own counters in a real run, and the shares of a public trace."""

from __future__ import annotations

import csv
import json
import pathlib

import numpy as np
import pytest

from qos_jax import InputError
from qos_jax.workload.prefix_sharing import BlockIds, prefix_hits, read_block_ids


def requests(*prompts: list[int], tokens: int | None = None) -> BlockIds:
    lengths = np.array([4 * len(blocks) + 1 if tokens is None else tokens for blocks in prompts])
    return BlockIds(lengths, list(prompts), [[] for _ in prompts])


def test_a_cache_by_hand() -> None:
    asked = requests([1, 2, 3], [1, 2, 9], [1, 2, 3], [7], [1, 2, 3])
    assert prefix_hits(asked, 4).tolist() == [0, 8, 12, 0, 12]
    assert prefix_hits(asked, 4, capacity_blocks=3).tolist() == [
        0,
        8,
        8,
        0,
        0,
    ]  # 9 took the place of 3, and 7 that of 1
    assert prefix_hits(asked, 4, capacity_blocks=0).tolist() == [0] * 5
    assert prefix_hits(asked, 4, assignment=[0, 1, 0, 1, -1]).tolist() == [0, 0, 12, 0, 0]


def test_the_last_token_is_always_computed() -> None:
    assert prefix_hits(requests([1, 2], [1, 2], tokens=8), 4).tolist() == [0, 4]


def test_answers_are_found_by_the_turn_after_them() -> None:
    turns = BlockIds(np.array([9, 17]), [[1, 2], [1, 2, 3, 4]], [[3], []])
    assert prefix_hits(turns, 4).tolist() == [0, 12]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"input_length": 5}, "line 1: hash_ids is None, must be a list"),
        ({"input_length": 5, "hash_ids": ["a"]}, "hash_ids is .*, must be a list of whole numbers"),
        ({"hash_ids": [1]}, "must have input_length"),
        ([], "hash_ids is None"),
    ],
)
def test_bad_lines_are_named(line: object, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(line))
    with pytest.raises(InputError, match=message):
        read_block_ids(tmp_path / "t.jsonl")


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="block_tokens is 0"):
        prefix_hits(requests([1]), 0)
    with pytest.raises(InputError, match="assignment has 2 entries, must be one for each of 1"):
        prefix_hits(requests([1]), 4, assignment=[0, 1])


@pytest.mark.parametrize(
    ("file", "engines", "engine", "queried_tokens", "hit_tokens"),
    [
        ("kv_metrics.csv", 1, 0, 82_645, 21_264),
        ("kv_metrics_2inst_1.csv", 2, 0, 39_877, 4_240),
        ("kv_metrics_2inst_2.csv", 2, 1, 42_768, 5_840),
    ],
)
def test_they_are_vllms_own_counters_at_every_second(
    data_dir: pathlib.Path, file: str, engines: int, engine: int, queried_tokens: int, hit_tokens: int
) -> None:
    """Of one engine, and of two to which requests go in turn."""
    folder = data_dir / "golden-prefix-cache"
    asked = read_block_ids(folder / "requests.jsonl")
    hits = prefix_hits(asked, 16, assignment=np.arange(len(asked.prompt_tokens)) % engines)[engine::engines]
    queried = np.cumsum(asked.prompt_tokens[engine::engines])
    so_far = {0: 0} | dict(zip(queried.tolist(), np.cumsum(hits).tolist(), strict=True))
    with (folder / file).open() as lines:
        counted = [
            (int(float(row["prefix_cache_queries_tokens"])), int(float(row["prefix_cache_hits_tokens"])))
            for row in csv.DictReader(lines)
        ]
    assert len(counted) > 100
    assert counted == [(tokens, so_far.get(tokens)) for tokens, _ in counted]
    assert counted[-1] == (queried_tokens, hit_tokens)


@pytest.mark.parametrize(
    ("most_tokens", "blocks", "share"),
    [(None, None, 0.340), (None, 2588, 0.039), (None, 100_000, 0.066), (4096, None, 0.400), (4096, 2588, 0.270),
     (4096, 20_000, 0.366)],
)  # fmt: skip
def test_the_shares_of_mooncake(
    data_dir: pathlib.Path, most_tokens: int | None, blocks: int | None, share: float
) -> None:
    """Of blocks of 512 tokens, in caches of so many blocks of 16."""
    asked = read_block_ids(data_dir / "traces" / "mooncake_conversation_first_half.jsonl")
    kept = np.flatnonzero(asked.prompt_tokens <= (most_tokens or np.inf))
    asked = BlockIds(asked.prompt_tokens[kept], *([part[j] for j in kept] for part in asked[1:]))
    capacity = None if blocks is None else blocks * 16 // 512
    found = prefix_hits(asked, 512, capacity_blocks=capacity).sum() / 512
    assert found / sum(map(len, asked.prompt_blocks)) == pytest.approx(share, abs=0.005)
