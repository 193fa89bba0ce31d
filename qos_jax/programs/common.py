"""What the programs share: the flags that describe a world, and one clear line for an error."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags, logging

from qos_jax.errors import InputError
from qos_jax.predictor.data import read_prediction_table
from qos_jax.predictor.predictor import load_predictor
from qos_jax.predictor.table import table_predictions
from qos_jax.programs.compilation_cache import use_cache
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.workload.prediction import TablePredictions
from qos_jax.workload.tables import QualityTable, read_mix_instruct, read_npz
from qos_jax.workload.traces import ArrivalTrace, read_trace, with_gaps
from qos_jax.worlds import presets

FLAGS = flags.FLAGS


def define_world_flags() -> None:
    """Defines the flags from which ``world_from_flags`` builds an environment."""
    flags.DEFINE_string("preset", "paper-3", f"World: {', '.join(presets.PRESETS)}.")
    flags.DEFINE_list("experts", None, "Other experts than the preset's: LLM@GPU,LLM@GPU,...")
    flags.DEFINE_string(
        "arrivals",
        None,
        "poisson, gamma:CV, mmpp:BURST:SECONDS or sinusoidal:AMPLITUDE:PERIOD_S; the preset's by default.",
    )
    flags.DEFINE_string("trace", None, "File of recorded arrivals (Azure, BurstGPT, Mooncake or plain csv), instead.")
    flags.DEFINE_enum("trace_part", "all", ["all", "first", "second"], "Half of the trace to take, by time.")
    flags.DEFINE_string("quality_table", None, "Table of real prompts and answers: .npz, or mix-instruct JSON lines.")
    flags.DEFINE_string(
        "score_column", None, "Scores to take: quality_bertscore_minilm of .npz, bertscore of JSON lines."
    )
    flags.DEFINE_float("test_fraction", 0.5, "Share of the table's prompts that are kept for testing.")
    flags.DEFINE_enum("table_part", "test", ["all", "train", "test"], "Part of the table to draw from.")
    flags.DEFINE_string("prompts", None, "JSON lines with the texts of an .npz table, for --predictor.")
    flags.DEFINE_string("predictor", None, "Folder of a trained predictor, which tells routers of the table's prompts.")
    flags.DEFINE_string("prediction", None, "realistic, perfect, none or r2:SCORE:LENGTH; the preset's by default.")
    flags.DEFINE_list("latency_limit", None, "Limit in s/token, or those of several equally common classes of users.")
    flags.DEFINE_float("staleness", None, "Routers see metrics at least this many seconds late.")
    flags.DEFINE_bool("allow_drop", None, "Routers may refuse a request.")


def world_from_flags(**overrides: Any) -> tuple[Environment, EnvParams, dict[str, Any]]:
    """Builds the world that the flags describe.

    Returns:
      The environment, its parameters at the preset's default load, and what was asked for, to be written down.
    """
    asked: dict[str, Any] = {"preset": FLAGS.preset}
    if FLAGS.experts:
        overrides["experts"] = tuple(_expert_pair(text) for text in FLAGS.experts)
    if FLAGS.latency_limit:
        overrides["latency_limit_s"] = tuple(numbers("latency_limit", FLAGS.latency_limit))
    for flag, field in (("staleness", "staleness_s"), ("allow_drop", "allow_drop"), ("prediction", "prediction")):
        if FLAGS[flag].value is not None:
            overrides[field] = FLAGS[flag].value
    if FLAGS.arrivals is not None:
        overrides["arrivals"] = FLAGS.arrivals
    asked |= {name: value for name, value in overrides.items() if not callable(value)}
    if FLAGS.trace is not None:
        if FLAGS.arrivals is not None:
            raise InputError(f"--arrivals={FLAGS.arrivals} and --trace={FLAGS.trace} are both given: give one")
        overrides["arrivals"] = with_gaps(_trace_part(read_trace(FLAGS.trace)))
        asked |= {"trace": os.path.basename(FLAGS.trace), "trace_part": FLAGS.trace_part}
    if FLAGS.quality_table is not None:
        table = _table_part(read_table(FLAGS.quality_table))
        overrides["quality_table"] = table
        asked |= {"quality_table": os.path.basename(FLAGS.quality_table), "table_part": FLAGS.table_part}
        if FLAGS.predictor is not None:
            overrides["prediction"] = _predictions(table, overrides.get("experts"))
            asked |= {"prediction": f"predictor {FLAGS.predictor}"}
    elif FLAGS.predictor is not None:
        raise InputError(f"--predictor={FLAGS.predictor}: predicts for real prompts only; give --quality_table, too")
    env, params = presets.make(FLAGS.preset, **overrides)
    return env, params, asked


def read_table(path: str) -> QualityTable:
    """Reads a quality table by the ending of its name, with the texts of its prompts if they are given."""
    if path.endswith(".npz"):
        table = read_npz(path, FLAGS.score_column or "quality_bertscore_minilm", clip_scores=True)
        if FLAGS.prompts is None:
            return table
        return dataclasses.replace(table, prompts=read_prediction_table(path, FLAGS.score_column, FLAGS.prompts).texts)
    return read_mix_instruct(path, FLAGS.score_column or "bertscore")


def _predictions(table: QualityTable, experts: Sequence[tuple[str, str]] | None) -> TablePredictions:
    """Returns what the predictor of the flags says of a table's prompts."""
    if FLAGS.prediction is not None:
        raise InputError(f"--predictor={FLAGS.predictor} and --prediction={FLAGS.prediction} are both given: give one")
    if experts is None and FLAGS.preset in presets.PRESETS:
        experts = presets.PRESETS[FLAGS.preset].experts
    return table_predictions(load_predictor(FLAGS.predictor), table, [llm for llm, _ in experts or ()])


def start(define_flags: Callable[[], None], main: Callable[[list[str]], None]) -> None:
    """Starts a program: what it compiles is kept for the next time."""
    use_cache()
    define_flags()
    run(main)


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a program; bad input ends it with one line and exit status 2."""

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}; all arguments are flags")
        try:
            main(argv)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    logging.set_verbosity(logging.WARNING)  # JAX says there is no TPU
    app.run(guarded)


def _expert_pair(text: str) -> tuple[str, str]:
    llm, at, gpu = text.partition("@")
    if not at:
        raise InputError(f"--experts={text}: give LLM@GPU, as in alpaca-native@A40")
    return llm, gpu


def numbers(flag: str, texts: Sequence[str] | None) -> list[float]:
    """Returns the numbers of a list flag, each above 0."""
    try:
        values = [float(text) for text in texts or ()]
    except ValueError:
        values = [math.nan]
    if not all(0 < value < math.inf for value in values):
        raise InputError(f"--{flag}={','.join(texts or ())}: give numbers above 0, with commas between them")
    return values


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as CSV, with a column for each name that any of them has."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _trace_part(trace: ArrivalTrace) -> ArrivalTrace:
    if FLAGS.trace_part == "all":
        return trace
    return trace.halves()[0 if FLAGS.trace_part == "first" else 1]


def _table_part(table: QualityTable) -> QualityTable:
    if FLAGS.table_part == "all":
        return table
    return table.split(FLAGS.test_fraction, seed=0)[0 if FLAGS.table_part == "train" else 1]
