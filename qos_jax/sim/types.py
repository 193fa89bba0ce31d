"""The nouns of the simulated world: expert profiles, requests, traces and logs.

Every array field states its shape and unit. ``N`` is the number of experts, ``J`` the number of requests, ``S`` the
number of request slots of one expert. Leading batch axes are always allowed in front.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from flax import struct
from jax import Array

AnyArray = Any  # NumPy's or JAX's

BLOCK_SIZE_TOKENS = 16
TOKEN_BUDGET = 2048
LLAMA_7B_BLOCK_GB = BLOCK_SIZE_TOKENS * 524_288 / 1e9  # 32 layers x 2 x 4096 x fp16, for one KV block


class ExpertProfile(struct.PyTreeNode):
    """What sets the timing, the memory and the energy of each expert: one LLM on its GPU.

    One iteration takes ``max(step_base_s, [P > 0] (prefill_base_s + prefill_per_token_s P)) + per_sequence_s B +
    per_kv_token_s K`` seconds for ``P`` prompt tokens, ``B`` scheduled requests and ``K`` cached tokens of its decoding
    requests.
    """

    step_base_s: AnyArray  # [N] s, reading the weights once: floor of every iteration
    prefill_base_s: AnyArray  # [N] s
    prefill_per_token_s: AnyArray  # [N] s/token
    per_sequence_s: AnyArray  # [N] s/request
    per_kv_token_s: AnyArray  # [N] s/token
    kv_blocks: AnyArray  # [N] blocks of KV memory
    max_running: AnyArray  # [N] requests in one iteration
    max_waiting: AnyArray  # [N] requests in the queue
    network_s: AnyArray = 0.0  # [N] s, added to the latency only
    idle_w: AnyArray = 0.0  # [N] W while no iteration runs
    busy_w: AnyArray = 0.0  # [N] W while an iteration runs
    kv_block_gb: AnyArray = LLAMA_7B_BLOCK_GB  # [N] GB (10^9 bytes) of one KV block


class Request(struct.PyTreeNode):
    """One request: what its user sent, what each expert would answer, and what the router is told beforehand."""

    prompt_tokens: Array  # [] int32 tokens
    output_tokens: Array  # [N] int32 tokens, the truth: hidden from routers
    score: Array  # [N] quality in [0, 1], the truth: hidden from routers
    latency_limit_s: Array  # [] s/token
    predicted_score: Array  # [N]
    predicted_tokens: Array  # [N] tokens


class RequestTrace(struct.PyTreeNode):
    """Requests in order of arrival. The fields that only a router or a QoS metric reads may be left out."""

    arrival_s: AnyArray  # [J] s, not decreasing
    prompt_tokens: AnyArray  # [J] tokens, at least 1
    output_tokens: AnyArray  # [J, N] tokens, at least 1
    score: AnyArray = None  # [J, N] in [0, 1]
    latency_limit_s: AnyArray = None  # [J] s/token
    predicted_score: AnyArray = None  # [J, N]
    predicted_tokens: AnyArray = None  # [J, N] tokens


class RequestLog(struct.PyTreeNode):
    """What happened to each request of a trace; NaN times where it was dropped."""

    finish_s: np.ndarray  # [J] s, when its last token left the GPU (network_s is not in it)
    first_token_s: np.ndarray  # [J] s
    preemptions: np.ndarray  # [J] int32
    dropped: np.ndarray  # [J] bool


class Workload(Protocol):
    """A pytree of traced numbers that draws requests one by one; nothing of the length of a trace is in its state."""

    def init(self, key: Array) -> Any:
        """Returns the state before the first request."""

    def next(self, key: Array, state: Any) -> tuple[Array, Request, Any]:
        """Returns the gap to the next arrival [s], that request, and the state after it."""

    def with_rate(self, rate_per_s: Array | float) -> Workload:
        """Returns the same workload at another mean arrival rate [requests/s]."""


RATE_WINDOWS_S = (2.0, 10.0, 60.0)  # K of them


class ArrivedView(struct.PyTreeNode):
    """What a router knows of the request it must place now, and of how they have come lately."""

    prompt_tokens: Array  # [] int32 tokens
    latency_limit_s: Array  # [] s/token
    predicted_score: Array  # [N]
    predicted_tokens: Array  # [N] tokens
    recent_rate_per_s: Array  # [K] requests/s that arrived, over about the last ``RATE_WINDOWS_S``


class ExpertView(struct.PyTreeNode):
    """What a router knows of each expert."""

    profile: Any  # ExpertProfile, [N] each
    running: Array  # [N] int32 requests
    waiting: Array  # [N] int32 requests
    kv_used_blocks: Array  # [N] int32 blocks held


class RequestView(struct.PyTreeNode):
    """What a router knows of the requests that are on the experts, in arrival order; read only where a mask is set."""

    running: Array  # [N, S] bool
    waiting: Array  # [N, S] bool
    prompt_tokens: Array  # [N, S] int32 tokens
    generated_tokens: Array  # [N, S] int32 tokens emitted so far
    computed_tokens: Array  # [N, S] int32 tokens whose keys and values are cached
    age_s: Array  # [N, S] s since arrival
    latency_limit_s: Array  # [N, S] s/token
    predicted_score: Array  # [N, S]
    predicted_tokens: Array  # [N, S] tokens, at least generated_tokens + 1


class Observation(struct.PyTreeNode):
    """Everything a router may look at: the arrays of the heterogeneous graph of arrived, expert and request nodes."""

    arrived: ArrivedView
    experts: ExpertView
    requests: RequestView
    action_mask: Array  # [N + 1] bool: legal actions; the last one drops the request
    staleness_s: Array | float = 0.0  # [] s, how old what is seen of experts and requests is, at least
