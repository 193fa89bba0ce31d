"""Environments in batches: the results are those of one by one, and one program is compiled for all of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qos_jax.sim.batching import map_environments


@pytest.mark.parametrize("count", [1, 15, 16, 17, 33, 40])
def test_each_environment_has_its_result_and_one_program_serves_all(count: int) -> None:
    programs = []

    def play(environment: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        key, load = environment
        programs.append(load.shape)
        return {"drawn": load * jax.random.uniform(key, (3,)), "passes": jnp.int32(load)}

    keys, loads = jax.random.split(jax.random.key(0), count), jnp.arange(count, dtype=jnp.float32)
    found = jax.jit(lambda *environments: map_environments(play, environments))(keys, loads)
    assert programs == [()]
    alone = [play(environment) for environment in zip(keys, loads, strict=True)]
    for name, values in found.items():
        np.testing.assert_allclose(values, np.stack([each[name] for each in alone]), rtol=1e-6)
