"""Data types of the simulator: expert profiles, requests, traces, logs and observations.

Every array field states its shape and unit. ``N`` is the number of experts, ``J`` the number of requests, and ``S`` the
number of request slots of one expert. Batched instances have further axes in front.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from flax import struct
from jax import Array

from qos_jax.sim.constants import ATTENTION_TERMS as ATTENTION_TERMS
from qos_jax.sim.constants import BLOCK_SIZE_TOKENS as BLOCK_SIZE_TOKENS
from qos_jax.sim.constants import EARLY_PROMPT_TOKENS as EARLY_PROMPT_TOKENS
from qos_jax.sim.constants import TOKEN_BUDGET as TOKEN_BUDGET

AnyArray = Any  # NumPy's or JAX's

LLAMA_7B_BLOCK_GB = BLOCK_SIZE_TOKENS * 524_288 / 1e9  # of one KV block: 32 layers x 2 x 4096 x 2 bytes per token


class IterationTables(struct.PyTreeNode):
    """Measured durations of an iteration's kernels, and of the host: the durations add up (``qos_jax.sim.cost``).

    Between two knots a table is linear; below the first it is constant, and beyond the last its last slope goes on.
    """

    dense_tokens: AnyArray  # [N, K1] knots: tokens in the iteration, prompt tokens and one of each decoding request
    dense_s: AnyArray  # [N, K1] s of all matrix kernels
    head_requests: AnyArray  # [N, K2] knots: requests in the iteration
    head_s: AnyArray  # [N, K2] s of the output head
    attention_s: AnyArray  # [N, 12] s of the attention of all layers, coefficients of ``ATTENTION_TERMS``
    host_s: AnyArray  # [N] s of the host that no kernel hides
    host_per_sequence_s: AnyArray  # [N] s/request, of the host


class SharedCards(struct.PyTreeNode):
    """Which experts share a card, on which the LLM of one of them is loaded at a time (``qos_jax.sim.shared_cards``).

    At first the LLM of the first expert of each card is loaded.
    """

    number: AnyArray  # [N] int32, of the card of each expert
    load_s: AnyArray  # [N] s to load its LLM in place of another one


class ExpertProfile(struct.PyTreeNode):
    """Timing, memory and power of N experts; an expert is one LLM on one GPU.

    One iteration takes ``max(step_base_s, [P > 0] (prefill_base_s + prefill_per_token_s P)) + per_sequence_s B +
    per_kv_token_s K`` seconds for ``P`` prompt tokens, ``B`` scheduled requests and ``K`` cached tokens of its decoding
    requests. With ``kernels`` it takes what these tables say; the coefficients are then their summary, for routers.
    """

    step_base_s: AnyArray  # [N] s to read the weights once: lower bound of an iteration
    prefill_base_s: AnyArray  # [N] s
    prefill_per_token_s: AnyArray  # [N] s/token
    per_sequence_s: AnyArray  # [N] s/request
    per_kv_token_s: AnyArray  # [N] s/token
    kv_blocks: AnyArray  # [N] KV blocks in memory; those of 2^30 tokens at most count
    max_running: AnyArray  # [N] requests in one iteration
    max_waiting: AnyArray  # [N] requests in the queue
    network_s: AnyArray = 0.0  # [N] s of network delay, added to the latency only
    idle_w: AnyArray = 0.0  # [N] W at other times
    busy_w: AnyArray = 0.0  # [N] W while an iteration runs
    kv_block_gb: AnyArray = LLAMA_7B_BLOCK_GB  # [N] GB (10^9 bytes) of one KV block
    token_budget: AnyArray = TOKEN_BUDGET  # [N] tokens in one iteration
    async_scheduling: AnyArray = False  # [N] bool: an iteration is scheduled when the one before it starts
    prefix_cache: AnyArray = False  # [N] bool: a preempted request finds those of its blocks that nobody took since
    standby_w: AnyArray = 0.0  # [N] W for standby_s after an iteration, if none follows
    standby_s: AnyArray = 0.0  # [N] s
    kernels: IterationTables | None = None  # tables of all experts, or of none: then the five coefficients hold
    cards: SharedCards | None = None  # None where each expert has a card of its own


class ServiceLimits(struct.PyTreeNode):
    """Limits on the times of an answer beside that on its latency per token; infinite where there is none.

    All times are the user's: with the network delay. An answer is in time if it meets every limit.
    """

    ttft_s: AnyArray  # [...] s from the arrival to the first token
    tpot_s: AnyArray  # [...] s per token after the first
    e2e_s: AnyArray  # [...] s from the arrival to the last token


class Turn(struct.PyTreeNode):
    """Which part a request has in a conversation, where requests belong to sessions (``qos_jax.sim.sessions``)."""

    place: AnyArray  # [...] int32, which of the open conversations it goes on with
    begins: AnyArray  # [...] bool: it begins a new one in that place
    max_prompt_tokens: AnyArray  # [...] int32 tokens; a conversation that would exceed them is begun anew


class Request(struct.PyTreeNode):
    """One request: its prompt, the answer that each expert would give, and the predictions that a router observes."""

    prompt_tokens: Array  # [] int32 tokens
    output_tokens: Array  # [N] int32 tokens, ground truth: hidden from routers
    score: Array  # [N] quality in [0, 1], ground truth: hidden from routers
    latency_limit_s: Array  # [] s/token
    predicted_score: Array  # [N]
    predicted_tokens: Array  # [N] tokens
    limits: ServiceLimits | None = None  # [] each; None in worlds that only limit the latency per token
    turn: Turn | None = None  # [] each; the prompt is then the text of the user, without the context


class RequestTrace(struct.PyTreeNode):
    """J requests in order of arrival. Fields with the default None are needed by routers and QoS metrics only."""

    arrival_s: AnyArray  # [J] s, not decreasing
    prompt_tokens: AnyArray  # [J] tokens, at least 1
    output_tokens: AnyArray  # [J, N] tokens, at least 1
    score: AnyArray = None  # [J, N] in [0, 1]
    latency_limit_s: AnyArray = None  # [J] s/token
    predicted_score: AnyArray = None  # [J, N]
    predicted_tokens: AnyArray = None  # [J, N] tokens
    limits: ServiceLimits | None = None  # [J] each
    shared_tokens: AnyArray = None  # [J] tokens of the prompt that the prefix cache has of other requests, for replays
    turn: Turn | None = None  # [J] each

    @property
    def requests(self) -> Request:
        """The requests without their times of arrival, [J] each."""
        return Request(**{name: getattr(self, name) for name in Request.__dataclass_fields__})


class RequestLog(struct.PyTreeNode):
    """What happened to each request of a trace; the times of dropped requests are NaN."""

    finish_s: np.ndarray  # [J] s, when the last token left the GPU, without network_s
    first_token_s: np.ndarray  # [J] s
    preemptions: np.ndarray  # [J] int32
    dropped: np.ndarray  # [J] bool, also of requests that were lost
    lost: np.ndarray | None = None  # [J] bool: the expert failed before the answer ended; None where none fails


class Workload(Protocol):
    """A source of requests: a pytree of traced numbers that generates requests one by one, in constant memory."""

    def init(self, key: Array) -> Any:
        """Returns the state before the first request."""

    def next(self, key: Array, state: Any) -> tuple[Array, Request, Any]:
        """Returns the gap to the next arrival [s], that request, and the state after it."""

    def with_rate(self, rate_per_s: Array | float) -> Workload:
        """Returns the same workload at another mean arrival rate [requests/s]."""


RATE_WINDOWS_S = (2.0, 10.0, 60.0)  # time constants [s] of the K observed arrival rates


class ArrivedView(struct.PyTreeNode):
    """What a router observes of the request to place, and the recent arrival rates."""

    prompt_tokens: Array  # [] int32 tokens
    latency_limit_s: Array  # [] s/token
    predicted_score: Array  # [N]
    predicted_tokens: Array  # [N] tokens
    recent_rate_per_s: Array  # [K] requests/s, averaged over about the last ``RATE_WINDOWS_S``
    limits: ServiceLimits | None = None  # [] each
    cached_tokens: Array | None = None  # [N] tokens of the prompt in the prefix cache; with sessions only


class ExpertView(struct.PyTreeNode):
    """What a router observes of each expert."""

    profile: Any  # ExpertProfile, [N] each
    running: Array  # [N] int32 requests
    waiting: Array  # [N] int32 requests
    kv_used_blocks: Array  # [N] int32 blocks held
    load_left_s: Array | None = None  # [N] s of loading before it can run the request; where LLMs share a card only


class RequestView(struct.PyTreeNode):
    """What a router observes of the requests on each expert, in arrival order.

    Values are meaningful only in slots where ``running`` or ``waiting`` is set.
    """

    running: Array  # [N, S] bool
    waiting: Array  # [N, S] bool
    prompt_tokens: Array  # [N, S] int32 tokens
    generated_tokens: Array  # [N, S] int32 tokens emitted so far
    computed_tokens: Array  # [N, S] int32 tokens whose keys and values are cached
    age_s: Array  # [N, S] s since arrival
    latency_limit_s: Array  # [N, S] s/token
    predicted_score: Array  # [N, S]
    predicted_tokens: Array  # [N, S] tokens, at least generated_tokens + 1
    limits: ServiceLimits | None = None  # [N, S] each
    first_token_s: Array | None = None  # [N, S] s from the arrival to the first token, once generated; with limits only


class Preferences(struct.PyTreeNode):
    """What an operator weighs against each other, in QoS. The defaults weigh nothing but the QoS of answers.

    What beyond the limits is late is no preference: the limits of each request are observed.
    """

    score: Array | float = 1.0  # [] per score of an answer in time
    violation: Array | float = 0.0  # [] per answer beyond its limits
    drop: Array | float = 0.0  # [] per dropped request
    energy: Array | float = 0.0  # [] per kJ of iterations and standby, in excess of idle power


class Observation(struct.PyTreeNode):
    """Everything that a router observes: arrays of a heterogeneous graph with arrived, expert and request nodes."""

    arrived: ArrivedView
    experts: ExpertView
    requests: RequestView
    action_mask: Array  # [N + 1] bool: legal actions; the last action drops the request
    staleness_s: Array | float = 0.0  # [] s, minimum age of what is observed of experts and requests
    preferences: Preferences | None = None  # [] each; None: the router keeps to its own
