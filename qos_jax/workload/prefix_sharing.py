"""Prefixes that requests share: how much of each prompt a prefix cache holds already, by the ids of its blocks.

A block id stands for the tokens of the block and of all blocks before it, so equal ids are equal prefixes. A cache
evicts the block that was used longest ago. vLLM never takes a prompt's last token from the cache.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qos_jax.errors import InputError
from qos_jax.io.text_files import json_lines, parse_count, read_text, shown


class BlockIds(NamedTuple):
    """The blocks of J requests in order of arrival."""

    prompt_tokens: np.ndarray  # [J] int64 tokens
    prompt_blocks: list[list[int]]  # ids of the blocks of each prompt, the last one perhaps not full
    later_blocks: list[list[int]]  # ids of the blocks behind it, which hold the answer


def read_block_ids(path: str | os.PathLike[str]) -> BlockIds:
    """Reads JSON lines with ``hash_ids`` and ``input_length`` or ``input_toks``, as Mooncake's traces have them.

    Of ``hash_ids``, the first ``prompt_blocks`` belong to the prompt; all do where that is not given.

    Raises:
      InputError: the file cannot be read, or a line lacks a field or has one of another kind.
    """
    tokens, prompts, later = [], [], []
    for where, record in json_lines(read_text(path), path):
        found = record if isinstance(record, dict) else {}
        length = found.get("input_length", found.get("input_toks"))
        ids = parse_block_ids(found.get("hash_ids"), where)
        try:
            tokens.append(parse_count(length))
            count = parse_count(found.get("prompt_blocks", len(ids)))
        except ValueError as error:
            raise InputError(
                f"{where}: must have input_length and, if there, prompt_blocks as whole numbers"
            ) from error
        prompts.append(ids[:count])
        later.append(ids[count:])
    if not tokens:
        raise InputError(f"{path}: holds no request")
    return BlockIds(np.array(tokens, np.int64), prompts, later)


def parse_block_ids(ids: Any, where: str) -> list[int]:
    """Returns the ``hash_ids`` of a line.

    Raises:
      InputError: they are no list of whole numbers; names the line, ``where``.
    """
    if not isinstance(ids, list) or not all(isinstance(each, int) for each in ids):
        raise InputError(f"{where}: hash_ids is {shown(ids)}, must be a list of whole numbers")
    return ids


def prefix_hits(
    requests: BlockIds,
    block_tokens: int,
    *,
    capacity_blocks: int | None = None,
    assignment: Sequence[int] | np.ndarray | None = None,
) -> np.ndarray:
    """Returns the tokens [J] of each prompt that the cache of its expert holds when it arrives.

    Args:
      requests: in order of arrival.
      block_tokens: tokens of a block.
      capacity_blocks: blocks in the cache of an expert; None is a cache without end.
      assignment: [J] expert of each request, -1 for none; all on one expert without it.

    Raises:
      InputError: a number is out of range, or the assignment is not one for each request.
    """
    if block_tokens < 1 or (capacity_blocks is not None and capacity_blocks < 0):
        raise InputError(
            f"block_tokens is {block_tokens} and capacity_blocks {capacity_blocks}, must be at least 1 and 0"
        )
    experts = [0] * len(requests.prompt_tokens) if assignment is None else [int(each) for each in assignment]
    if len(experts) != len(requests.prompt_tokens):
        raise InputError(
            f"assignment has {len(experts)} entries, must be one for each of {len(requests.prompt_tokens)}"
        )
    caches: dict[int, collections.OrderedDict[int, None]] = collections.defaultdict(collections.OrderedDict)
    hits = np.zeros(len(experts), np.int64)
    for j, expert in enumerate(experts):
        if expert < 0:
            continue
        cache, usable = caches[expert], max(int(requests.prompt_tokens[j]) - 1, 0) // block_tokens
        for block in requests.prompt_blocks[j][:usable]:
            if block not in cache:
                break
            hits[j] += block_tokens
        for block in (*requests.prompt_blocks[j], *requests.later_blocks[j]):
            cache[block] = None
            cache.move_to_end(block)
        while capacity_blocks is not None and len(cache) > capacity_blocks:
            cache.popitem(last=False)
    return hits
