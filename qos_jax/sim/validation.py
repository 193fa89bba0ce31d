"""Validation of values, shapes, expert profiles, traces and assignments, and conversion to canonical arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qos_jax.errors import InputError
from qos_jax.io.text_files import number_or_nan, shown
from qos_jax.sim.types import ATTENTION_TERMS, ExpertProfile, IterationTables, RequestTrace, SharedCards

MAX_COUNT = 2**30 - 1  # the sum of two counts fits in int32
MAX_TOKENS = 2**29  # of a prompt or an answer: both together are at most what a KV memory holds
MAX_SEED = 2**32 - 1  # of jax.random.key
MAX_SIZE = 2**24  # tokens of a budget or a block; prefix sums over the slots count exactly to here
_COUNTS = ("kv_blocks", "max_running", "max_waiting", "token_budget")
_SWITCHES = ("async_scheduling", "prefix_cache")
_TIMES = (
    "step_base_s",
    "prefill_base_s",
    "prefill_per_token_s",
    "per_sequence_s",
    "per_kv_token_s",
    "network_s",
    "standby_s",
)
_MAX_TIME_S = 1e6  # of a field of a profile; the engine takes 1e30 s, the longest of runs of such iterations, for never
_MAX_ARRIVAL_S = 1e15


def checked_whole(name: str, value: Any, lowest: int, highest: int = MAX_COUNT) -> int:
    """Returns a whole number as an int.

    Raises:
      InputError: the value is no whole number, or out of range.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not lowest <= value <= highest:
        raise InputError(f"{name} is {shown(value)}, must be a whole number from {lowest} to {highest}")
    return int(value)


def check_shapes(arrays: Mapping[str, tuple[Any, str]], **lengths: int) -> None:
    """Checks shapes before NumPy or JAX would broadcast arrays that do not belong together.

    Inside ``jax.jit`` the check runs once, while the function is traced.

    Args:
      arrays: array and its axes, a letter each, by name: ``{"trace.score": (score, "JN")}``.
      **lengths: length of each axis.

    Raises:
      InputError: an array has another shape.
    """
    import chex  # imported here, as importing qos_jax must not load it

    dimensions = chex.Dimensions(**lengths)
    for name, (array, axes) in arrays.items():
        try:
            chex.assert_shape(array, dimensions[axes])
        except AssertionError as error:
            legal = f"[{', '.join(axes)}] = {list(dimensions[axes])}"
            raise InputError(f"{name} has shape {np.shape(array)}, must be {legal}") from error


def checked_number(name: str, value: Any, *, or_zero: bool = False, highest: float = math.inf) -> float:
    """Returns a finite number above 0, or from 0 on, and up to ``highest``.

    Raises:
      InputError: the value is none.
    """
    number = number_or_nan(value.item() if isinstance(value, np.number) else value)
    if not 0 <= number <= highest or (number == 0 and not or_zero):
        legal = f"a finite number {'of at least' if or_zero else 'above'} 0"
        legal += f" and at most {highest:g}" if highest < math.inf else ""
        raise InputError(f"{name} is {shown(value)}, must be {legal}")
    return number


def check_type(name: str, value: Any, types: Any, legal: str) -> None:
    """Checks that a value has one of some types; ``legal`` tells them in words.

    Raises:
      InputError: it has not.
    """
    if not isinstance(value, types):
        raise InputError(f"{name} is {shown(value)}, must be {legal}")


def checked_experts(experts: ExpertProfile, dtype: Any = np.float64) -> ExpertProfile:
    """Returns the profile with every field as a NumPy array [N], of tables [N, K]: times as ``dtype``, counts as int32.

    Counts beyond ``MAX_COUNT`` become ``MAX_COUNT``, which limits nothing.

    Raises:
      InputError: a field has a wrong shape, is NaN, infinite or negative, a time is above 1e6 s, the knots of a table
        do not increase, or an iteration of an expert takes no time.
    """
    names = [field.name for field in dataclasses.fields(experts) if field.name not in ("kernels", "cards")]
    fields = {name: np.asarray(getattr(experts, name)) for name in names}
    num_experts = max((x.shape[0] for x in fields.values() if x.ndim == 1), default=1)
    checked = {}
    for name, values in fields.items():
        if values.shape not in ((), (num_experts,)):
            raise InputError(f"experts.{name} has shape {values.shape}, must be [{num_experts}], one value per expert")
        if name in _SWITCHES:
            if values.dtype != np.bool_:
                raise InputError(f"experts.{name} is {values.tolist()}, must be true or false")
            checked[name] = np.broadcast_to(values, (num_experts,))
            continue
        values = np.broadcast_to(values, (num_experts,)).astype(np.float64)
        lowest = 1 if name in _COUNTS and name != "max_waiting" else 0
        highest = _MAX_TIME_S if name in _TIMES else MAX_SIZE if name == "token_budget" else np.inf
        legal = f" and <= {highest:g}" if highest < np.inf else ""
        bad = ~np.isfinite(values) | (values < lowest) | (values > highest)
        if bad.any():
            raise InputError(
                f"experts.{name} is {values[bad][0]} for expert {bad.argmax()}, must be finite and >= {lowest}{legal}"
            )
        if name in _COUNTS:
            if (values != np.floor(values)).any():
                raise InputError(f"experts.{name} is {values.tolist()}, must be whole numbers")
            checked[name] = np.minimum(values, MAX_COUNT).astype(np.int32)
        else:
            checked[name] = values.astype(dtype)
    timeless = (checked["step_base_s"] + checked["per_sequence_s"] + checked["per_kv_token_s"]) <= 0
    if timeless.any():
        raise InputError(
            f"experts.step_base_s, per_sequence_s and per_kv_token_s are all 0 for expert {timeless.argmax()}, "
            "one must be above 0, as an iteration takes time"
        )
    kernels, cards = experts.kernels, experts.cards
    return ExpertProfile(
        **checked,
        kernels=None if kernels is None else checked_tables(kernels, num_experts, dtype),
        cards=None if cards is None else _checked_cards(cards, num_experts, dtype),
    )


def of_one_type(experts: ExpertProfile) -> ExpertProfile:
    """Returns the profile with whole numbers in int32 and all others in one floating type, that of a world's times.

    A user's profile may hold others, as NumPy's own types or under ``jax_enable_x64``, but a loop of JAX keeps the
    types that it begins with. Fields may be traced and are not checked. Those of these types stay as they are, and so
    do Python's numbers.
    """
    fields = {field.name: getattr(experts, field.name) for field in dataclasses.fields(experts)}
    floats = {name: value for name, value in fields.items() if name not in (*_COUNTS, *_SWITCHES, "cards")}
    cards = experts.cards
    if cards is not None:
        floats["load_s"] = cards.load_s
    dtype = jnp.result_type(*jax.tree.leaves(floats), 0.0)
    changed = jax.tree.map(lambda x: x if getattr(x, "dtype", dtype) == dtype else jnp.asarray(x, dtype), floats)
    changed |= {name: _as_int32(fields[name]) for name in _COUNTS}
    if cards is not None:
        changed["cards"] = SharedCards(_as_int32(cards.number), changed.pop("load_s"))
    same = all(old is new for old, new in zip(*map(jax.tree.leaves, (fields, fields | changed)), strict=True))
    return experts if same else experts.replace(**changed)


def _as_int32(count: Any) -> Any:
    if (
        not jnp.issubdtype(getattr(count, "dtype", jnp.int32), jnp.integer)
        or getattr(count, "dtype", None) == jnp.int32
    ):
        return count
    if isinstance(count, int):
        return min(count, MAX_COUNT)
    at_most = np if isinstance(count, np.ndarray | np.generic) else jnp  # JAX would cut off the high bits first
    return at_most.minimum(count, MAX_COUNT).astype(jnp.int32)


def checked_tables(
    tables: IterationTables, num_experts: int, dtype: Any = np.float64, name: str = "experts.kernels"
) -> IterationTables:
    """Returns the tables with every field as a NumPy array [N, K] or [N] of ``dtype``; ``name`` is for messages.

    Raises:
      InputError: a field has a wrong shape or a value that is NaN, negative or above 1e6, there are fewer than two
        knots or they do not increase, the times at the last two knots fall, or an iteration takes no time.
    """
    lengths = {"dense": np.shape(tables.dense_tokens)[-1:], "head": np.shape(tables.head_requests)[-1:]}
    lengths |= {"attention": (len(ATTENTION_TERMS),), "host": ()}
    checked = {}
    for field in (field.name for field in dataclasses.fields(tables)):
        values = np.asarray(getattr(tables, field), np.float64)
        shape = (num_experts, *lengths[field.split("_")[0]])
        if values.shape != shape:
            raise InputError(f"{name}.{field} has shape {values.shape}, must be {list(shape)}")
        bad = ~((values >= 0) & (values <= _MAX_TIME_S))
        if bad.any():
            raise InputError(f"{name}.{field} is {values[bad][0]} for expert {_row(bad)}, must be from 0 to 1e6")
        checked[field] = values
    for knots, times in (("dense_tokens", "dense_s"), ("head_requests", "head_s")):
        stuck = np.diff(checked[knots]) <= 0
        if stuck.size == 0 or stuck.any():
            raise InputError(f"{name}.{knots} is {checked[knots].tolist()}, must be two or more increasing numbers")
        falls = checked[times][:, -1] < checked[times][:, -2]
        if falls.any():
            raise InputError(f"{name}.{times} falls at its end for expert {_row(falls)}, must not: that slope goes on")
    timeless = checked["dense_s"].min(-1) + checked["head_s"].min(-1) + checked["host_s"] <= 0
    if timeless.any():
        raise InputError(
            f"{name}.dense_s, head_s and host_s are 0 for expert {_row(timeless)}, but an iteration takes time"
        )
    return IterationTables(**{field: values.astype(dtype) for field, values in checked.items()})


def _checked_cards(cards: SharedCards, num_experts: int, dtype: Any) -> SharedCards:
    number, load_s = np.asarray(cards.number), np.asarray(cards.load_s, np.float64)
    for name, values in (("number", number), ("load_s", load_s)):
        if values.shape != (num_experts,):
            raise InputError(f"experts.cards.{name} has shape {values.shape}, must be [{num_experts}]")
    if not np.issubdtype(number.dtype, np.integer) or (np.abs(number.astype(np.int64)) > MAX_COUNT).any():
        raise InputError(f"experts.cards.number is {number.tolist()}, must be whole numbers within +-{MAX_COUNT}")
    bad = ~((load_s >= 0) & (load_s <= _MAX_TIME_S))
    if bad.any():
        raise InputError(f"experts.cards.load_s is {load_s[bad][0]} for expert {_row(bad)}, must be from 0 to 1e6")
    return SharedCards(number.astype(np.int32), load_s.astype(dtype))


def _row(bad: np.ndarray) -> int:
    """Returns the first row of ``bad`` [N, ...] with an entry that is set."""
    return int(np.argmax(bad.reshape(len(bad), -1).any(-1)))


def checked_trace(trace: RequestTrace, num_experts: int) -> RequestTrace:
    """Returns the trace with NumPy arrays: arrivals as float64, tokens as int32.

    Raises:
      InputError: a field has a wrong shape, a time is not finite or beyond 1e15 s, arrivals decrease, or a number of
        tokens is not within 1 .. ``MAX_TOKENS``, or ``shared_tokens`` are not fewer than those of the prompt.
    """
    arrival_s = np.asarray(trace.arrival_s, np.float64)
    if arrival_s.ndim != 1:
        raise InputError(f"trace.arrival_s has shape {arrival_s.shape}, must be [J], one time per request")
    bad = ~(np.abs(arrival_s) <= _MAX_ARRIVAL_S)
    if bad.any():
        index = int(bad.argmax())
        legal = f"finite and within -{_MAX_ARRIVAL_S:g} .. {_MAX_ARRIVAL_S:g}"
        raise InputError(f"trace.arrival_s[{index}] is {arrival_s[index]}, must be {legal}")
    decreasing = np.diff(arrival_s) < 0
    if decreasing.any():
        index = int(decreasing.argmax()) + 1
        raise InputError(
            f"trace.arrival_s[{index}] is {arrival_s[index]}, must be at least that of the request before it, "
            f"{arrival_s[index - 1]}: sort the trace by arrival"
        )
    num_requests = arrival_s.shape[0]
    prompt_tokens = _checked_tokens("prompt_tokens", trace.prompt_tokens, (num_requests,))
    output_tokens = _checked_tokens("output_tokens", trace.output_tokens, (num_requests, num_experts))
    shared_tokens = _checked_shared(trace.shared_tokens, prompt_tokens)
    return trace.replace(
        arrival_s=arrival_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens, shared_tokens=shared_tokens
    )


def checked_assignment(assignment: ArrayLike, num_requests: int, num_experts: int) -> np.ndarray:
    """Returns the assignment as int32 [J]; -1 drops a request.

    Raises:
      InputError: the shape or type is wrong, or an entry is no expert.
    """
    values = np.asarray(assignment)
    if values.shape != (num_requests,):
        raise InputError(f"assignment has shape {values.shape}, must be [{num_requests}], one expert per request")
    if not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"assignment has type {values.dtype}, must have a type of integers")
    bad = (values < -1) | (values >= num_experts)
    if bad.any():
        index = int(bad.argmax())
        legal = f"an expert 0 .. {num_experts - 1}, or -1 for a dropped request"
        raise InputError(f"assignment[{index}] is {values[index]}, must be {legal}")
    return values.astype(np.int32)


def _checked_shared(shared_tokens: ArrayLike | None, prompt_tokens: np.ndarray) -> np.ndarray:
    if shared_tokens is None:
        return np.zeros_like(prompt_tokens)
    values = np.asarray(shared_tokens)
    if values.shape != prompt_tokens.shape:
        raise InputError(f"trace.shared_tokens has shape {values.shape}, must be {list(prompt_tokens.shape)}")
    bad = ~((values >= 0) & (values < prompt_tokens) & (values == np.floor(values)))
    if bad.any():
        index = int(bad.argmax())
        legal = f"a whole number from 0, below the {prompt_tokens[index]} tokens of the prompt"
        raise InputError(f"trace.shared_tokens[{index}] is {values[index]}, must be {legal}")
    return values.astype(np.int32)


def _checked_tokens(name: str, tokens: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(tokens)
    if values.shape != shape:
        raise InputError(f"trace.{name} has shape {values.shape}, must be {list(shape)}")
    bad = ~((values >= 1) & (values <= MAX_TOKENS) & (values == np.floor(values)))
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        legal = f"a whole number of tokens, at least 1 and at most {MAX_TOKENS}"
        raise InputError(f"trace.{name}{list(index)} is {values[index]}, must be {legal}")
    return values.astype(np.int32)
