"""The state of a world, and the static part that its shapes follow from.

``N`` is the number of experts, ``S`` the number of request slots of one, ``H`` the length of the history, and ``K`` the
number of time constants RATE_WINDOWS_S.
"""

from __future__ import annotations

import dataclasses

from flax import struct
from jax import Array

from qos_jax.sim.engine_state import EngineSpec, ExpertState
from qos_jax.sim.failures import Failures
from qos_jax.sim.sessions import Conversations, SessionSlots
from qos_jax.sim.types import ExpertView, RequestView, ServiceLimits


@dataclasses.dataclass(frozen=True)
class WorldSpec:
    """The static part of a world; everything else is traced."""

    num_experts: int  # N
    engine: EngineSpec
    allow_drop: bool = True  # the router may drop a request
    history: int = 0  # H, snapshots kept for stale metrics; at 0, routers observe fresh metrics
    service_limits: bool = False  # requests have ``limits`` beside that on the latency per token
    observe: str = "engine"  # one of OBSERVE: what an engine knows, or a proxy in front of it (``sim.proxy_view``)
    sessions: int = 0  # K, most conversations at a time; at 0 each request stands alone
    failures: bool = False  # experts fail and return
    shared_cards: bool = False  # some LLMs share a card, on which one is loaded at a time


class SlotPayload(struct.PyTreeNode):
    """The payload of the engine's slots: what the world stores with each request on an expert."""

    score: Array  # [N, S] true quality of this expert's answer
    latency_limit_s: Array  # [N, S] s/token
    predicted_score: Array  # [N, S]
    predicted_tokens: Array  # [N, S] tokens
    limits: ServiceLimits | None = None  # [N, S] each
    session: SessionSlots | None = None  # [N, S] each


class Snapshots(struct.PyTreeNode):
    """The last H snapshots of the experts, a ring."""

    age_s: Array  # [H] s
    newest: Array  # [] int32, index of the newest snapshot
    views: tuple[ExpertView, RequestView]  # leaves [H, ...], without the profile


class LastScrape(struct.PyTreeNode):
    """The counts of the engines when a proxy last read them: with the first arrival after each ``period_s``."""

    period_s: Array  # [] s
    age_s: Array  # [] s, below ``period_s``
    waiting: Array  # [N] int32 requests
    kv_used_blocks: Array  # [N] int32 blocks


class Telemetry(struct.PyTreeNode):
    """What is recorded for the router at each arrival."""

    arrivals: Array  # [K] requests so far, discounted by age with the time constants RATE_WINDOWS_S
    snapshots: Snapshots | None  # None for fresh metrics
    scrape: LastScrape | None = None  # None unless routers observe what a proxy does


class World(struct.PyTreeNode):
    """The experts with the requests on them, and the telemetry."""

    experts: ExpertState  # payload: SlotPayload
    telemetry: Telemetry | None  # None if no router observes this world
    said: Conversations | None = None  # None without sessions
    failures: Failures | None = None  # None where no expert fails
    loaded: Array | None = None  # [N] bool: its LLM is loaded; None where each expert has a card of its own


class Completions(struct.PyTreeNode):
    """Sums over the requests that finished in an interval, and the resources that the experts used in it."""

    finished: Array  # [] int32 requests
    qos: Array  # [] sum of QoS
    score: Array  # [] sum of scores
    latency_per_token_s: Array  # [] sum of latencies per token
    violations: Array  # [] int32 requests beyond a limit
    busy_s: Array  # [N] s
    standby_s: Array  # [N] s
    kv_block_s: Array  # [N] blocks x s
    passes: Array  # [] int32 passes through the engine's loops
    lost: Array | int = 0  # [] int32 requests that a failure ended, and which did not finish
