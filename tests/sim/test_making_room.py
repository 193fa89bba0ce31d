"""Full experts get room for the next request, and lose none that is live."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qos_jax.sim import engine
from qos_jax.sim.engine import EngineSpec, ExpertState
from qos_jax.sim.engine_state import total

SPEC = EngineSpec(8)
LANES = 3


def used_slots(rng: np.random.Generator, finished: int) -> ExpertState:
    """Lanes whose slots are used, of which so many at random places have finished; the last lane has two left."""
    state = engine.init_state(SPEC, (LANES,), payload=jnp.int32(0))
    shape = (LANES, SPEC.slots)
    used = np.array([SPEC.slots] * (LANES - 1) + [SPEC.slots - 2])
    is_used = np.arange(SPEC.slots) < used[:, None]
    output = np.where(is_used, rng.integers(1, 9, shape), 0)
    is_finished = is_used & (rng.permuted(np.broadcast_to(np.arange(SPEC.slots), shape), axis=1) < finished)
    generated = np.where(is_finished, output, 0)
    slots = state.slots.replace(
        prompt_tokens=jnp.asarray(np.where(is_used, rng.integers(1, 9, shape), 0), jnp.int32),
        output_tokens=jnp.asarray(output, jnp.int32),
        generated=jnp.asarray(generated, jnp.int32),
        payload=jnp.asarray(np.where(is_used, np.arange(np.prod(shape)).reshape(shape), 0), jnp.int32),
    )
    return state.replace(slots=slots, used=jnp.asarray(used, jnp.int32), waiting=total(slots.waiting))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, SPEC.slots))
def test_live_requests_keep_their_order_and_full_lanes_get_room(seed: int, finished: int) -> None:
    before = used_slots(np.random.default_rng(seed), finished)
    after = jax.jit(engine.compact_if_full, static_argnums=0)(SPEC, before)
    for lane in range(LANES):
        live = [np.asarray(state.slots.live[lane]) for state in (before, after)]
        for field in ("prompt_tokens", "output_tokens", "payload"):
            old, new = (np.asarray(getattr(state.slots, field)[lane]) for state in (before, after))
            np.testing.assert_array_equal(new[live[1]], old[live[0]])
        used = int(after.used[lane])
        assert used < SPEC.slots or live[0].all()
        assert not np.asarray(after.slots.output_tokens[lane, used:]).any()
        assert not np.asarray(after.slots.prompt_tokens[lane, used:]).any()
