"""An episode of two routers on the same requests as one page that plays it, without network and without a server."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from qos_jax.evaluation.episode import Episode
from qos_jax.evaluation.metrics import select_assigned
from qos_jax.io.provenance import plain
from qos_jax.report.style import display_name
from qos_jax.sim.types import ExpertProfile

_TEMPLATE = pathlib.Path(__file__).with_name("episode_page.html")
_BEGIN = 0.3  # of the time, where the page opens: queues are there by then


def episode_page(
    episodes: Sequence[Episode], experts: ExpertProfile, expert_names: Sequence[str], block_size: int, about: str
) -> str:
    """Returns the page.

    Args:
      episodes: of one or more routers on the same requests.
      experts: profile of the N experts.
      expert_names: [N].
      block_size: tokens per KV block.
      about: one sentence on the world.
    """
    trace = episodes[0].trace
    ends_s = [float(np.nanmax(each.replayed.log.finish_s, initial=trace.arrival_s[-1])) for each in episodes]
    kv_tokens = np.broadcast_to(experts.kv_blocks, len(expert_names)) * block_size
    data = {
        "about": about,
        "start_s": _BEGIN * float(trace.arrival_s[-1]),
        "end_s": max(ends_s),
        "experts": [
            {"name": f"{n}: {name}", "kv_tokens": int(tokens)}
            for n, (name, tokens) in enumerate(zip(expert_names, kv_tokens, strict=True))
        ],
        "arrival": trace.arrival_s.round(3).tolist(),
        "prompt": trace.prompt_tokens.tolist(),
        "sides": [_side(each, experts) for each in episodes],
    }
    text = json.dumps(plain(data), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return _TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/null", text)


def _side(episode: Episode, experts: ExpertProfile) -> dict[str, Any]:
    """Returns what the page needs of one router: times in s since the begin, null where there is none."""
    trace, log = episode.trace, episode.replayed.log
    tokens = select_assigned(trace.output_tokens, episode.assignment)
    due_s = trace.arrival_s + trace.latency_limit_s * tokens
    if trace.limits is not None:
        due_s = np.minimum(due_s, trace.arrival_s + trace.limits.e2e_s)
    network_s = np.broadcast_to(experts.network_s, np.shape(experts.step_base_s))[episode.assignment]
    return {
        "router": display_name(episode.router.name),
        "expert": episode.assignment.tolist(),
        "net": episode.net.astype(float).round(3).tolist(),
        "first": log.first_token_s.round(3).tolist(),
        "finish": log.finish_s.round(3).tolist(),
        "due": np.where(np.isfinite(due_s), due_s - network_s, 1e12).round(3).tolist(),
        "tokens": tokens.tolist(),
        "in_time": episode.in_time.tolist(),
        "qos": episode.qos.round(4).tolist(),
    }
