"""Hand-written and random observations, for tests of routers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from qos_jax import ExpertProfile, Observation
from qos_jax.sim.types import RATE_WINDOWS_S, ArrivedView, ExpertView, RequestView
from tests.helpers.small_env import small_experts

SLOTS = 8
EQUAL = {
    "step_base_s": 0.02,
    "prefill_base_s": 0.01,
    "prefill_per_token_s": 1e-4,
    "per_sequence_s": 1e-3,
    "per_kv_token_s": 1e-6,
}


@dataclasses.dataclass(frozen=True)
class Seen:
    """One request on an expert, as a router observes it."""

    is_running: bool
    prompt_tokens: int = 32
    generated_tokens: int = 0
    computed_tokens: int = 0
    age_s: float = 0.5
    latency_limit_s: float = 0.05
    predicted_score: float = 0.5
    predicted_tokens: float = 50.0


_JUNK = Seen(False, 700, 90, 70, 1e3, 1e-3, 0.9, 900.0)  # in slots without a request, which no router may read


def running(*, prompt_tokens: int = 32, generated_tokens: int = 10, **fields: Any) -> Seen:
    """A running request, which decodes unless ``computed_tokens`` is given."""
    computed_tokens = prompt_tokens + generated_tokens - 1
    return Seen(True, prompt_tokens, generated_tokens, **({"computed_tokens": computed_tokens} | fields))


def waiting(**fields: Any) -> Seen:
    """A waiting request, which has not started unless ``generated_tokens`` is given."""
    return Seen(False, **fields)


def equal_experts(num_experts: int, **fields: Any) -> ExpertProfile:
    """Experts with equal profiles."""
    return small_experts(num_experts, **{name: np.asarray(value) for name, value in (EQUAL | fields).items()})


def observation(
    *fleet: Sequence[Seen],
    profile: ExpertProfile | None = None,
    legal: Sequence[bool] | None = None,
    slots: int = SLOTS,
    **arrived: Any,
) -> Observation:
    """The observation of a fleet with these requests on its experts.

    Args:
      *fleet: the requests on each of the N experts, in order of arrival.
      profile: of the experts; equal experts by default.
      legal: [N + 1] legal actions; all by default.
      slots: S.
      **arrived: fields of the arrived request, one value per expert or one for all.
    """
    num_experts = len(fleet)
    arrived = {"prompt_tokens": 32, "latency_limit_s": 0.05, "predicted_score": 0.5, "predicted_tokens": 40.0} | arrived
    for name in ("predicted_score", "predicted_tokens"):
        arrived[name] = np.broadcast_to(np.asarray(arrived[name], np.float32), num_experts)
    arrived["recent_rate_per_s"] = np.full(len(RATE_WINDOWS_S), arrived.get("recent_rate_per_s", 6.0))
    filled = [[*requests, *[_JUNK] * (slots - len(requests))] for requests in fleet]
    present = np.arange(slots) < np.array([len(requests) for requests in fleet])[:, None]
    columns = {
        field.name: np.array([[getattr(request, field.name) for request in row] for row in filled])
        for field in dataclasses.fields(Seen)
    }
    is_running = columns.pop("is_running") & present
    view = RequestView(running=is_running, waiting=~is_running & present, **columns)
    experts = ExpertView(
        profile=equal_experts(num_experts) if profile is None else profile,
        running=is_running.sum(1),
        waiting=view.waiting.sum(1),
        kv_used_blocks=np.where(is_running, -(-columns["computed_tokens"] // 16), 0).sum(1),
    )
    mask = np.ones(num_experts + 1, bool) if legal is None else np.asarray(legal, bool)
    return jax.tree.map(_narrow, Observation(ArrivedView(**arrived), experts, view, mask))


def reordered(obs: Observation, order: Sequence[int]) -> Observation:
    """The same fleet with expert ``order[i]`` in place i."""
    order, obs = np.asarray(order), jax.tree.map(np.asarray, obs)
    return obs.replace(
        arrived=obs.arrived.replace(
            predicted_score=obs.arrived.predicted_score[order], predicted_tokens=obs.arrived.predicted_tokens[order]
        ),
        experts=jax.tree.map(lambda x: x[order], obs.experts),
        requests=jax.tree.map(lambda x: x[order], obs.requests),
        action_mask=obs.action_mask[np.append(order, -1)],
    )


@st.composite
def fleets(draw: st.DrawFn, num_experts: int = 4, **fields: Any) -> list[list[Seen]]:
    """Up to 4 running and then up to 4 waiting requests on each expert; ``fields`` are fixed for all of them."""
    return [
        draw(st.lists(runners(**fields), max_size=4)) + draw(st.lists(waiters(**fields), max_size=4))
        for _ in range(num_experts)
    ]


def runners(**fields: Any) -> st.SearchStrategy[Seen]:
    return _seen(running, generated_tokens=st.integers(1, 300), **fields)


def waiters(**fields: Any) -> st.SearchStrategy[Seen]:
    return _seen(waiting, generated_tokens=st.sampled_from([0, 0, 7]), **fields)


@st.composite
def observations(draw: st.DrawFn, num_experts: int = 4) -> Observation:
    """Any fleet of unequal experts, from idle to overloaded, any arrived request and any mask."""
    per_expert = {"min_size": num_experts, "max_size": num_experts}
    return observation(
        *draw(fleets(num_experts)),
        profile=small_experts(num_experts, kv_blocks=np.array(draw(st.lists(st.integers(4, 400), **per_expert)))),
        legal=draw(st.lists(st.booleans(), min_size=num_experts + 1, max_size=num_experts + 1)),
        prompt_tokens=draw(st.integers(1, 3000)),
        latency_limit_s=draw(_floats(0.01, 0.2)),
        predicted_score=draw(st.lists(_floats(0.0, 1.0), **per_expert)),
        predicted_tokens=draw(st.lists(_floats(1.0, 1000.0), **per_expert)),
    )


@st.composite
def _seen(draw: st.DrawFn, kind: Any, generated_tokens: st.SearchStrategy[int], **fields: Any) -> Seen:
    emitted = draw(generated_tokens)
    drawn = {
        "prompt_tokens": draw(st.integers(1, 300)),
        "generated_tokens": emitted,
        "age_s": draw(_floats(0.0, 20.0)),
        "latency_limit_s": draw(_floats(0.01, 0.2)),
        "predicted_score": draw(_floats(0.0, 1.0)),
        "predicted_tokens": emitted + draw(_floats(1.0, 300.0)),
    }
    return kind(**(drawn | fields))


def _floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_subnormal=False)


def _narrow(x: Any) -> jax.Array:
    """The array in the simulator's types: float32, int32 and bool."""
    x = np.asarray(x)
    return jnp.asarray(x, {"f": jnp.float32, "i": jnp.int32, "b": jnp.bool_}[x.dtype.kind])
