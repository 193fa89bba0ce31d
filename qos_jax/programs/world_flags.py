"""From flags to a world."""

from __future__ import annotations

import importlib
import math
import os
import string
import sys
from collections.abc import Mapping, Sequence

from absl.flags import FlagValues

from qos_jax.errors import InputError
from qos_jax.io.imports import in_one_line
from qos_jax.sim.cost import iteration_bounds_s
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.worlds.config import WorldConfig

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
    trace_part = values.trace_part or ("first" if training else "all")
    table_part = values.table_part or ("train" if training else "test")
    limits_s = numbers("latency_limit", values.latency_limit, _IN_A_SECOND)
    return WorldConfig(
        preset=values.preset,
        experts=tuple(values.experts) if values.experts else None,
        engine=values.engine,
        arrivals=values.arrivals,
        trace=values.trace,
        trace_part=trace_part if values.trace is not None else "all",
        trace_format=values.trace_format,
        trace_sort=values.trace_sort,
        trace_spread_s=values.trace_spread,
        quality_table=values.quality_table,
        score_column=values.score_column,
        table_part=table_part if values.quality_table is not None else "all",
        test_fraction=values.test_fraction,
        prompts=values.prompts,
        predictor=values.predictor,
        prediction=values.prediction,
        latency_limit_s=tuple(limits_s) or None,
        staleness_s=values.staleness,
        allow_drop=values.allow_drop,
    )


def note_failed_requests(world: WorldConfig) -> dict[str, int]:
    """Says on stderr how many rows of the trace are failed requests, if any, and returns that for results.json."""
    if world.trace is None or not (failed := world.whole_trace.num_skipped):
        return {}
    rows = failed + len(world.whole_trace)
    print(f"note: {world.trace}: {failed} of {rows} rows are failed requests and left out", file=sys.stderr)
    return {"trace_failed_requests": failed}


def note_limits(world: WorldConfig, env: Environment, params: EnvParams) -> None:
    """Says on stderr where a latency limit is so long that hardly a request is late, or so short that all are."""
    bounds = iteration_bounds_s(params.experts, env.spec.engine.block_size)
    shortest_s, longest_s = float(bounds[0].min()), float(bounds[1].max())
    for limit_s in world.latency_limits_s:
        head = f"note: the latency limit of {limit_s:g} s/token ({1e3 * limit_s:g} ms)"
        if limit_s < shortest_s:
            print(f"{head} is below the shortest iteration of all experts, {shortest_s:.3g} s: "
                  "no request can be in time", file=sys.stderr)  # fmt: skip
        elif limit_s > longest_s:
            print(f"{head} is above the longest iteration of all experts, {longest_s:.3g} s: "
                  "a request can only be late by waiting in a queue", file=sys.stderr)  # fmt: skip


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
