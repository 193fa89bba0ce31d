"""From flags to a world."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import shlex
import string
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl.flags import FlagValues

from qos_jax.errors import InputError
from qos_jax.io.imports import in_one_line
from qos_jax.programs.app import parse
from qos_jax.programs.flags import define_world
from qos_jax.sim.cost import iteration_bounds_s
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.worlds.config import WorldConfig

LIMIT_FLAGS = ("latency_limit", "ttft_limit", "tpot_limit", "e2e_limit")
_USUAL_S = {"ttft": 60.0, "e2e": 3600.0}  # limits above are hardly meant in seconds
_IN_A_SECOND = {"": 1.0, "s": 1.0, "ms": 1e3}


def world_config(values: FlagValues, *, training: bool = False) -> WorldConfig:
    """Returns the world that the flags of ``flags.define_world`` describe.

    Args:
      values: the flags.
      training: uses by default the first half of a trace and the training part of a table, else all of the trace and
        the test part.

    Raises:
      InputError: a value is not legal.
    """
    if values.fleet is not None and values["preset"].present:
        raise InputError(f"--preset={values.preset} and --fleet={values.fleet} are both given: give one")
    trace_part = values.trace_part or ("first" if training else "all")
    table_part = values.table_part or ("train" if training else "test")
    limits_s: dict[str, Any] = {f"{flag}_s": _limits_s(flag, getattr(values, flag)) for flag in LIMIT_FLAGS}
    world = WorldConfig(
        preset=values.preset,
        fleet=values.fleet,
        experts=tuple(values.experts) if values.experts else None,
        engine=values.engine,
        arrivals=values.arrivals,
        trace=values.trace,
        trace_part=trace_part if values.trace is not None else "all",
        trace_format=values.trace_format,
        trace_sort=values.trace_sort,
        trace_spread_s=values.trace_spread,
        trace_lengths=values.trace_lengths,
        quality_table=values.quality_table,
        score_column=values.score_column,
        test_fraction=values.test_fraction,
        prompts=values.prompts,
        predictor=values.predictor,
        prediction=values.prediction,
        **limits_s,
        staleness_s=values.staleness,
        allow_drop=values.allow_drop,
        observe=values.observe,
        scrape_s=values.scrape,
        sessions=values.sessions,
        failures=values.failures,
    )
    return world if not world.tables else dataclasses.replace(world, table_part=table_part)


def world_of_text(flag: str, text: str, same: Sequence[str] = ()) -> WorldConfig:
    """Returns the world that a text of flags describes.

    Args:
      flag: that holds the text, for messages.
      text: flags of a world, as on a command line.
      same: other flags, over which those of the text go.

    Raises:
      InputError: the text cannot be read, or names another flag than one of a world.
    """
    known = FlagValues()
    define_world(known)
    try:
        parse(known, [*same, *shlex.split(text)])
    except (InputError, ValueError) as error:
        raise InputError(f"{flag}: {error}") from error
    return world_config(known)


def _limits_s(flag: str, texts: Sequence[str] | None) -> tuple[float, ...] | None:
    """Returns the limits of the classes of users, () for none and None where the flag is not given."""
    if flag == "latency_limit" and texts == ["none"]:
        return ()
    return tuple(numbers(flag, texts, _IN_A_SECOND)) or None


def notes_on(world: WorldConfig, env: Environment, params: EnvParams) -> dict[str, int]:
    """Says on stderr which limits decide nothing, and which requests of the trace failed or have no time of their own.

    Returns:
      How many failed, as ``trace_failed_requests``, for results; nothing where all were answered.
    """
    _note_limits(world, env, params)
    if world.trace is not None and (delayed := world.whole_trace.num_delayed):
        print(f"note: {world.trace}: {delayed} turns have a delay in place of a time, and arrive that long after the "
              "turn before them", file=sys.stderr)  # fmt: skip
    if world.trace is None or not (failed := world.whole_trace.num_skipped):
        return {}
    rows = failed + len(world.whole_trace)
    print(f"note: {world.trace}: {failed} of {rows} rows are failed requests and left out", file=sys.stderr)
    return {"trace_failed_requests": failed}


def _note_limits(world: WorldConfig, env: Environment, params: EnvParams) -> None:
    bounds = iteration_bounds_s(params.experts, env.spec.engine.block_size)
    shortest_s, longest_s = float(bounds[0].min()), float(bounds[1].max())
    per_token = {"latency": world.latency_limits_s, "tpot": world.limits_s("tpot_limit_s")}
    for name, limits_s in per_token.items():
        for limit_s in filter(math.isfinite, limits_s):
            head = f"note: the {name} limit of {limit_s:g} s/token ({1e3 * limit_s:g} ms)"
            if limit_s < shortest_s:
                print(f"{head} is below the shortest iteration of all experts, {shortest_s:.3g} s: "
                      "no request can be in time", file=sys.stderr)  # fmt: skip
            elif limit_s > longest_s:
                print(f"{head} is above the longest iteration of all experts, {longest_s:.3g} s: "
                      "a request can only be late by waiting in a queue", file=sys.stderr)  # fmt: skip
    for name, usual_s in _USUAL_S.items():
        for limit_s in world.limits_s(f"{name}_limit_s"):
            if usual_s < limit_s < math.inf:
                print(f"note: the {name} limit is {limit_s:g} s, over {usual_s / 60:g} min; for milliseconds write "
                      f"{limit_s:g}ms", file=sys.stderr)  # fmt: skip


def import_plugins(values: FlagValues, references: Sequence[str] = ()) -> None:
    """Imports the modules of --plugins, and lets modules of the current folder be found.

    Args:
      values: the flags.
      references: what other flags name; one of the form ``package.module:factory`` may be in the current folder, too.

    Raises:
      InputError: a module cannot be imported.
    """
    if (values.plugins or any(":" in text for text in references)) and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for module in values.plugins or ():
        try:
            importlib.import_module(module)
        except Exception as error:  # of the user's own code
            raise InputError(f"--plugins={module} cannot be imported: {in_one_line(error)}") from error


def numbers(flag: str, texts: Sequence[str] | None, units: Mapping[str, float] | None = None) -> list[float]:
    """Returns the numbers of a list flag.

    Args:
      flag: its name, for the message.
      texts: its values.
      units: what may follow a number, with how many of it make one of the unit of the result.

    Raises:
      InputError: one of them is not above 0 and finite, or has another unit.
    """
    units = units or {"": 1.0}
    try:
        values = [_in_unit(text.strip(), units) for text in texts or ()]
    except (ValueError, KeyError):
        values = [math.nan]
    if not all(0 < value < math.inf for value in values):
        also = f", in {' or '.join(filter(None, units))}" if len(units) > 1 else ""
        raise InputError(f"--{flag}={','.join(texts or ())}: give numbers above 0{also}, with commas between them")
    return values


def _in_unit(text: str, units: Mapping[str, float]) -> float:
    number = text.rstrip(string.ascii_lowercase)
    return float(number) / units[text[len(number) :]]
