"""Observations written by hand, for tests of routers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qos_jax.sim.types import BLOCK_SIZE_TOKENS, ArrivedView, ExpertView, Observation, RequestView
from tests.small_env import small_experts

SLOTS = 8
_UNREAD = 999  # what stands in the slots that no router may read


@dataclasses.dataclass(frozen=True)
class Seen:
    """A request that is on an expert; one that has emitted a token runs, unless ``computed_tokens`` is 0."""

    prompt_tokens: int = 20
    predicted_tokens: float = 50.0
    generated_tokens: int = 0
    computed_tokens: int | None = None  # all that a decoding request has, 0 before the first token
    age_s: float = 0.0
    latency_limit_s: float = 0.05
    predicted_score: float = 0.5

    @property
    def computed(self) -> int:
        if self.computed_tokens is not None:
            return self.computed_tokens
        return self.prompt_tokens + self.generated_tokens - 1 if self.generated_tokens else 0


RUNNING = Seen(generated_tokens=5, age_s=0.1)
WAITING = Seen()


def observation(
    requests: Sequence[Sequence[Seen]],
    *,
    prompt_tokens: int = 20,
    predicted_tokens: float | Sequence[float] = 50.0,
    predicted_score: float | Sequence[float] = 0.8,
    latency_limit_s: float = 0.05,
    legal: Sequence[bool] | None = None,
    drop_legal: bool = True,
    **profile: Any,
) -> Observation:
    """Returns what a router sees with these requests on each expert, all of which can take another unless told."""
    num_experts = len(requests)
    columns = {
        field: np.full((num_experts, SLOTS), _UNREAD)
        for field in ("prompt_tokens", "generated_tokens", "computed_tokens")
    } | {
        field: np.full((num_experts, SLOTS), float(_UNREAD), np.float32)
        for field in ("age_s", "latency_limit_s", "predicted_score", "predicted_tokens")
    }
    running, waiting = np.zeros((2, num_experts, SLOTS), bool)
    kv_used_blocks = np.zeros(num_experts, int)
    for n, there in enumerate(requests):
        for slot, seen in enumerate(there):
            for field, column in columns.items():
                column[n, slot] = seen.computed if field == "computed_tokens" else getattr(seen, field)
            running[n, slot], waiting[n, slot] = seen.computed > 0, seen.computed == 0
            kv_used_blocks[n] += -(-seen.computed // BLOCK_SIZE_TOKENS)

    def each_expert(value: float | Sequence[float]) -> Any:
        return jnp.broadcast_to(jnp.asarray(value, jnp.float32), num_experts)

    return Observation(
        arrived=ArrivedView(
            prompt_tokens=jnp.int32(prompt_tokens),
            latency_limit_s=jnp.float32(latency_limit_s),
            predicted_score=each_expert(predicted_score),
            predicted_tokens=each_expert(predicted_tokens),
        ),
        experts=ExpertView(
            profile=small_experts(num_experts, **{field: jnp.asarray(value) for field, value in profile.items()}),
            running=jnp.asarray(running.sum(-1), jnp.int32),
            waiting=jnp.asarray(waiting.sum(-1), jnp.int32),
            kv_used_blocks=jnp.asarray(kv_used_blocks, jnp.int32),
        ),
        requests=RequestView(
            running=jnp.asarray(running),
            waiting=jnp.asarray(waiting),
            **{
                field: jnp.asarray(column, jnp.int32 if column.dtype.kind == "i" else jnp.float32)
                for field, column in columns.items()
            },
        ),
        action_mask=jnp.asarray([*([True] * num_experts if legal is None else legal), drop_legal]),
    )
