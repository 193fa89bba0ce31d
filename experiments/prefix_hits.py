"""Prints how much of the prompts of a trace a prefix cache would hold, by its size and by how requests are spread.

python -m experiments.prefix_hits --trace=$QOS_JAX_DATA/traces/mooncake_conversation_first_half.jsonl \
    --block_tokens=512 --kv_tokens=41408,320000 --max_prompt_tokens=4096 --experts=1,4
"""

from __future__ import annotations

import numpy as np
from absl import flags

from qos_jax.programs.app import FlagGroup, run_program
from qos_jax.programs.world_flags import numbers
from qos_jax.workload.prefix_sharing import BlockIds, prefix_hits, read_block_ids


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    group = FlagGroup(values, "prefix_hits")
    group.string("trace", None, "JSON lines with hash_ids and input_length, as Mooncake's.", required=True)
    group.integer("block_tokens", 512, "Tokens of a block.", 1)
    group.texts("kv_tokens", [], "Sizes of an expert's cache, tokens; one without end is always there.")
    group.texts("experts", ["1"], "Numbers of experts, to which requests go in turn.")
    group.integer("max_prompt_tokens", None, "Leave out requests with longer prompts.", 1)


def main(values: flags.FlagValues) -> None:
    """Prints the share of the prompts' tokens in full blocks that is found, for each size and number of experts."""
    requests = read_block_ids(values.trace)
    if values.max_prompt_tokens is not None:
        kept = np.flatnonzero(requests.prompt_tokens <= values.max_prompt_tokens)
        requests = BlockIds(requests.prompt_tokens[kept], *([part[j] for j in kept] for part in requests[1:]))
    total = int(requests.prompt_tokens.sum())
    print(f"{len(requests.prompt_tokens)} requests, {total} prompt tokens")
    for experts in map(int, numbers("experts", values.experts)):
        turns = np.arange(len(requests.prompt_tokens)) % experts
        for size in [None, *map(int, numbers("kv_tokens", values.kv_tokens))]:
            capacity = None if size is None else size // values.block_tokens
            found = int(prefix_hits(requests, values.block_tokens, capacity_blocks=capacity, assignment=turns).sum())
            print(
                f"experts {experts}, cache {'without end' if size is None else f'{size} tokens'}: {found / total:.3f}"
            )


if __name__ == "__main__":
    run_program(define, main, name="python -m experiments.prefix_hits", summary="prints what a prefix cache would hold")
