"""A world as plain values: what a file can hold, and what ``build`` turns into an environment and its parameters."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from typing import Any

from qos_jax.errors import InputError
from qos_jax.fleet.engines import ENGINES
from qos_jax.fleet.experts import Expert
from qos_jax.fleet.fleet_file import Fleet, load_fleet
from qos_jax.io import dataclass_json
from qos_jax.io.provenance import fingerprint
from qos_jax.predictor.data import read_prediction_table
from qos_jax.predictor.predictor import load_predictor
from qos_jax.predictor.table import table_predictions
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.workload.arrivals import file_of_law
from qos_jax.workload.prediction import TablePredictions
from qos_jax.workload.session_law import check_sessions
from qos_jax.workload.tables import QualityTable, read_tables
from qos_jax.workload.trace_files import COLUMNS, read_trace
from qos_jax.workload.traces import ArrivalTrace, recorded_lengths, with_gaps
from qos_jax.worlds import presets
from qos_jax.worlds.build import make
from qos_jax.worlds.failure_law import check_failures

TRACE_PARTS = ("all", "first", "second")
TABLE_PARTS = ("all", "train", "test")
NONE = "none"  # of a law that the preset has
_SPLIT_SEED = 0  # of a table's parts, the same in all programs


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """A preset or a fleet file, and what differs from it; None keeps its own value."""

    preset: str = "paper-3"
    fleet: str | None = None  # fleet file, instead of the preset
    experts: tuple[str, ...] | None = None  # LLM@GPU of each expert
    engine: str | None = None  # of all experts, a name in ``ENGINES``
    arrivals: str | None = None  # a law, see ``parse_arrivals``
    trace: str | None = None  # file of recorded arrivals, instead of a law
    trace_part: str = "all"  # of TRACE_PARTS, by time
    trace_format: str | None = None  # see ``read_trace``, as for the next two
    trace_sort: bool = False
    trace_spread_s: float | None = None  # s
    trace_lengths: bool = False  # the trace's prompts and answers, too, whatever the expert
    quality_table: str | None = None  # file of real prompts and answers, instead of the built-in generator
    score_column: str | None = None  # of the table; the default depends on its format
    table_part: str = "all"  # of TABLE_PARTS
    test_fraction: float = 0.5  # share of the table's prompts in its part ``test``
    prompts: str | None = None  # file of the texts of an .npz table, for ``predictor``
    predictor: str | None = None  # folder of a trained predictor, instead of ``prediction``
    prediction: str | None = None  # see ``parse_prediction``
    latency_limit_s: tuple[float, ...] | None = None  # s/token, one class of users or several; () is no limit
    ttft_limit_s: tuple[float, ...] | None = None  # s from arrival to first token
    tpot_limit_s: tuple[float, ...] | None = None  # s per token after the first
    e2e_limit_s: tuple[float, ...] | None = None  # s from arrival to last token
    staleness_s: float | None = None  # s
    allow_drop: bool | None = None
    observe: str | None = None  # engine or proxy
    scrape_s: float | None = None  # s
    failures: str | None = None  # UP:DOWN, see ``parse_failures``; ``none`` lifts the preset's
    sessions: str | None = None  # see ``parse_sessions``; ``none`` lifts the preset's

    def __post_init__(self) -> None:
        """Checks the fields, and that they go together.

        Raises:
          InputError: a field has a wrong type or is out of range, or two of them exclude each other.
        """
        dataclass_json.check_types(self)
        if self.fleet is None:
            presets.preset_named(self.preset)
        for name, legal in (("trace_part", TRACE_PARTS), ("table_part", TABLE_PARTS)):
            if getattr(self, name) not in legal:
                raise InputError(f"{name} is {getattr(self, name)!r}, must be one of {', '.join(legal)}")
        if self.engine not in (None, *ENGINES):
            raise InputError(f"engine is {self.engine!r}, must be one of {', '.join(ENGINES)}")
        for pair in self.experts or ():
            llm_and_gpu(pair)
        for name in ("latency_limit_s", *presets.FURTHER_LIMITS):
            for limit_s in getattr(self, name) or ():
                if not 0 < limit_s < math.inf:
                    unit = "s/token" if name in ("latency_limit_s", "tpot_limit_s") else "s"
                    raise InputError(f"{name} is {limit_s!r}, must be above 0 and finite, in {unit}")
        for one, other in (("arrivals", "trace"), ("prediction", "predictor")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise InputError(
                    f"--{one}={getattr(self, one)} and --{other}={getattr(self, other)} are both given: give one"
                )
        if self.sessions not in (None, NONE):
            check_sessions(self.sessions)
        if self.failures not in (None, NONE):
            check_failures(self.failures)
        self._check_trace()
        if self.predictor is not None and self.fleet is None and self.quality_table is None:
            raise InputError(f"--predictor={self.predictor}: predicts for real prompts only; give --quality_table, too")

    def _check_trace(self) -> None:
        if self.trace_lengths and self.trace is None:
            raise InputError("trace_lengths is True, must be False without a trace")
        if self.trace_lengths and self.sessions not in (None, NONE):
            raise InputError(f"--sessions={self.sessions} and --trace_lengths are both given: give one")
        if self.trace_lengths and self.predictor is not None:
            raise InputError(f"--predictor={self.predictor} predicts for the table's prompts, not with --trace_lengths")
        if self.trace_format not in (None, *COLUMNS):
            raise InputError(f"trace_format is {self.trace_format!r}, must be one of {', '.join(COLUMNS)}")
        if self.trace_spread_s is not None and not 0 < self.trace_spread_s < math.inf:
            raise InputError(f"trace_spread_s is {self.trace_spread_s!r}, must be above 0 and finite, in s")

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """LLM and GPU of each expert."""
        if self.experts is None:
            return self.base.pairs
        return tuple(llm_and_gpu(text) for text in self.experts)

    @property
    def fleet_experts(self) -> tuple[Expert, ...]:
        """The experts, with the engine of the preset or the file where they are given by their names."""
        if self.experts is None:
            return self.base.experts
        return presets.varied(self.base, {"experts": self.pairs}).experts

    @property
    def latency_limits_s(self) -> tuple[float, ...]:
        """Latency limit of each class of users, s/token."""
        return self.limits_s("latency_limit_s")

    def limits_s(self, field: str) -> tuple[float, ...]:
        """Returns the limit of a kind of each class of users; () where there is none."""
        limits_s = getattr(self.base if getattr(self, field) is None else self, field)
        return limits_s if isinstance(limits_s, tuple) else (limits_s,)

    @property
    def has_preset_fleet(self) -> bool:
        """Experts and answers are the preset's, and so is the saturation rate, which is written down there."""
        same_engine = self.engine in (None, self.base.engine)
        sessions = None if self.sessions == NONE else self.sessions or self.base.sessions
        same_lengths = not self.trace_lengths and sessions == self.base.sessions
        unchanged = self.experts is None and not self.tables and same_engine and same_lengths
        return unchanged and self.base.saturation_per_s is not None

    def build(self) -> tuple[Environment, EnvParams]:
        """Returns the environment, and its parameters at the preset's default load.

        Raises:
          InputError: a file cannot be used, or a name is unknown.
        """
        overrides: dict[str, Any] = {}
        limits = ("latency_limit_s", *presets.FURTHER_LIMITS)
        views = "staleness_s", "allow_drop", "observe", "scrape_s"
        for name in ("engine", "arrivals", "prediction", "sessions", "failures", *limits, *views):
            if getattr(self, name) is not None:
                overrides[name] = getattr(self, name)
        if self.sessions == NONE or self.trace_lengths:  # a trace's prompts hold their contexts already
            overrides["sessions"] = None
        if self.failures == NONE:
            overrides["failures"] = None
        if self.experts is not None:
            overrides["experts"] = self.pairs
        if self.trace is not None:
            trace = self._part_of_trace(self.whole_trace)
            overrides["arrivals"] = with_gaps(trace)
            if self.trace_lengths:
                overrides["lengths"] = recorded_lengths(trace)
        if self.tables:
            table = self._part_of_table(self.read_table())
            overrides["quality_table"] = table
            if self.predictor is not None:
                overrides["prediction"] = self._predictions(table)
        elif self.predictor is not None:
            raise InputError(f"--predictor={self.predictor}: predicts for real prompts only; {self.fleet} has no table")
        return make(self.preset if self._fleet is None else self._fleet, **overrides)

    @property
    def name(self) -> str:
        """Of the preset, or of the fleet in the file."""
        return self.preset if self._fleet is None else self._fleet.name

    @functools.cached_property
    def _fleet(self) -> Fleet | None:
        return None if self.fleet is None else load_fleet(self.fleet)

    @functools.cached_property
    def base(self) -> presets.Preset:
        """The preset, or the world of the fleet file.

        Raises:
          InputError: the file cannot be used.
        """
        return presets.preset_named(self.preset) if self._fleet is None else presets.preset_of(self._fleet)

    @property
    def tables(self) -> tuple[str, ...]:
        """Files of the quality table: its own, or those of the fleet file, whose prompts are mixed."""
        return self.base.quality.tables if self.quality_table is None else (self.quality_table,)

    @property
    def arrivals_file(self) -> str | None:
        """File of the law of arrivals, such as ServeGen's clients; None where it has none, or a trace replaces it."""
        return None if self.trace is not None else file_of_law(self.arrivals or self.base.arrivals)

    @functools.cached_property
    def whole_trace(self) -> ArrivalTrace:
        """The trace, not only the part of it that is used.

        Raises:
          InputError: there is none, or its file cannot be used.
        """
        if self.trace is None:
            raise InputError("--trace is not given: the world has a law of arrivals")
        return read_trace(self.trace, self.trace_format, sort=self.trace_sort, spread_s=self.trace_spread_s)

    def for_training(self) -> WorldConfig:
        """Returns the same world with the first half of its trace and the training part of its table, if it has all."""
        return dataclasses.replace(
            self,
            trace_part="first" if self.trace is not None and self.trace_part == "all" else self.trace_part,
            table_part="train" if self.tables and self.table_part == "all" else self.table_part,
        )

    def read_table(self) -> QualityTable:
        """Reads the quality table, with the texts of its prompts if they are given.

        Raises:
          InputError: a file cannot be used, or ``prompts`` are given for several tables.
        """
        paths, column = self.tables, self.score_column
        if self.quality_table is None and column is None:
            column = self.base.quality.score_column
        table = read_tables(paths, column)
        if self.prompts is None or not paths[0].endswith(".npz"):
            return table
        if len(paths) > 1:
            raise InputError(f"--prompts={self.prompts}: has the texts of one table, but {self.fleet} has {len(paths)}")
        return dataclasses.replace(table, prompts=read_prediction_table(paths[0], column, self.prompts).texts)

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold; ``from_dict`` rebuilds it."""
        return dataclass_json.to_dict(self)

    def described(self) -> dict[str, Any]:
        """Returns what differs from the preset, for people: files by their names, without their folders."""
        default = WorldConfig(self.preset).to_dict()
        kept = {name: value for name, value in self.to_dict().items() if value != default[name]}
        files = ("fleet", "trace", "quality_table", "prompts")
        names = {name: os.path.basename(value) if name in files else value for name, value in kept.items()}
        if self.arrivals is not None and (file := file_of_law(self.arrivals)) is not None:
            names["arrivals"] = self.arrivals.replace(file, os.path.basename(file))
        return ({} if self.fleet else {"preset": self.preset}) | names

    def inputs(self) -> dict[str, str]:
        """Returns a fingerprint of every file that the world is made of, by the name of its field."""
        names = ("fleet", "arrivals_file", "trace", "prompts", "predictor")
        files = {name: path for name in names if (path := getattr(self, name)) is not None}
        files |= {f"table {number}" if number else "table": path for number, path in enumerate(self.tables)}
        return {name: fingerprint(path) for name, path in files.items()}

    @classmethod
    def from_dict(cls, values: Any) -> WorldConfig:
        """Rebuilds what ``to_dict`` returned.

        Raises:
          InputError: a field is unknown, missing or of another kind.
        """
        if not isinstance(values, dict):
            raise InputError(f"world is {values!r}, must be a table of fields")
        known = {field.name for field in dataclasses.fields(cls)}
        for name in sorted(known.symmetric_difference(values)):
            raise InputError(f"world.{name} is {'unknown' if name in values else 'missing'}")
        lists: dict[str, Any] = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**(values | lists))

    def _part_of_trace(self, trace: ArrivalTrace) -> ArrivalTrace:
        return trace if self.trace_part == "all" else trace.halves()[0 if self.trace_part == "first" else 1]

    def _part_of_table(self, table: QualityTable) -> QualityTable:
        if self.table_part == "all":
            return table
        return table.split(self.test_fraction, seed=_SPLIT_SEED)[0 if self.table_part == "train" else 1]

    def _predictions(self, table: QualityTable) -> TablePredictions:
        return table_predictions(
            load_predictor(str(self.predictor)), table, [expert.answers for expert in self.fleet_experts]
        )


def llm_and_gpu(text: str) -> tuple[str, str]:
    """Returns the two parts of ``LLM@GPU``.

    Raises:
      InputError: the text has no ``@``.
    """
    llm, at, gpu = text.partition("@")
    if not at:
        raise InputError(f"--experts={text}: give LLM@GPU, as in alpaca-native@A40")
    return llm, gpu
