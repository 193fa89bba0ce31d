"""Public functions refuse arguments of another kind by name, before they do anything."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import qos_jax
from tests.helpers.small_env import small_env, small_params

SCENARIO = qos_jax.Scenario(0.5, 1.0, 1000)
ENV, PARAMS = small_env(), small_params()
ROUND_ROBIN = qos_jax.make_router("round_robin", ENV, PARAMS)
CALLS: dict[str, Callable[[Any], Any]] = {
    "load_router": qos_jax.load_router,
    "load_fleet": qos_jax.load_fleet,
    "load_predictor": qos_jax.load_predictor,
    "read_trace": qos_jax.read_trace,
    "read_mix_instruct": qos_jax.read_mix_instruct,
    "read_npz": lambda value: qos_jax.read_npz(value, "score"),
    "recipe": qos_jax.recipe,
    "agent of recipe": lambda value: qos_jax.recipe("paper-3", value),
    "world of train": lambda value: qos_jax.train(value, qos_jax.recipe(), steps=1),
    "recipe of train": lambda value: qos_jax.train("paper-3", 0 if value is None else value, steps=1),
    "steps of train": lambda value: qos_jax.train("paper-3", steps=0 if value is None else value),
    "router of evaluate": lambda value: qos_jax.evaluate(ENV, PARAMS, [value], [SCENARIO], 5),
    "scenario of evaluate": lambda value: qos_jax.evaluate(ENV, PARAMS, [ROUND_ROBIN], [value], 5),
    "requests of evaluate": lambda value: qos_jax.evaluate(ENV, PARAMS, [ROUND_ROBIN], [SCENARIO], value),
    "name of make_router": lambda value: qos_jax.make_router(value, ENV, PARAMS),
    "name of make": qos_jax.make,
}


OTHERS = {
    "None": None,
    "negative": -5,
    "nan": math.nan,
    "bytes": b"x",
    "list": [],
    "dict": {},
    "array": np.array([1, 2]),
    "object": object(),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("call", CALLS)
def test_a_value_of_another_kind_is_refused(call: str, other: str) -> None:
    with pytest.raises(qos_jax.InputError, match=r" is .*"):
        CALLS[call](OTHERS[other])
