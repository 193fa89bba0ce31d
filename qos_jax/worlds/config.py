"""A world as plain values: what a file can hold, and what ``build`` turns into an environment and its parameters."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from typing import Any

from qos_jax.errors import InputError
from qos_jax.fleet.profiles import ENGINES
from qos_jax.io import dataclass_json
from qos_jax.predictor.data import read_prediction_table
from qos_jax.predictor.predictor import load_predictor
from qos_jax.predictor.table import table_predictions
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.workload.prediction import TablePredictions
from qos_jax.workload.tables import QualityTable, read_mix_instruct, read_npz
from qos_jax.workload.traces import COLUMNS, ArrivalTrace, read_trace, with_gaps
from qos_jax.worlds import presets

TRACE_PARTS = ("all", "first", "second")
TABLE_PARTS = ("all", "train", "test")
_SPLIT_SEED = 0  # of a table's parts, the same in all programs


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """A preset, and what differs from it; None keeps the preset's own value."""

    preset: str = "paper-3"
    experts: tuple[str, ...] | None = None  # LLM@GPU of each expert
    engine: str | None = None  # of all experts, a name in ``ENGINES``
    arrivals: str | None = None  # a law, see ``parse_arrivals``
    trace: str | None = None  # file of recorded arrivals, instead of a law
    trace_part: str = "all"  # of TRACE_PARTS, by time
    trace_format: str | None = None  # see ``read_trace``, as for the next two
    trace_sort: bool = False
    trace_spread_s: float | None = None  # s
    quality_table: str | None = None  # file of real prompts and answers, instead of the built-in generator
    score_column: str | None = None  # of the table; the default depends on its format
    table_part: str = "all"  # of TABLE_PARTS
    test_fraction: float = 0.5  # share of the table's prompts in its part ``test``
    prompts: str | None = None  # file of the texts of an .npz table, for ``predictor``
    predictor: str | None = None  # folder of a trained predictor, instead of ``prediction``
    prediction: str | None = None  # see ``parse_prediction``
    latency_limit_s: tuple[float, ...] | None = None  # s/token, one class of users or several
    staleness_s: float | None = None  # s
    allow_drop: bool | None = None

    def __post_init__(self) -> None:
        """Checks the fields, and that they go together.

        Raises:
          InputError: a field has a wrong type or is out of range, or two of them exclude each other.
        """
        dataclass_json.check_types(self)
        presets.preset_named(self.preset)
        for name, legal in (("trace_part", TRACE_PARTS), ("table_part", TABLE_PARTS)):
            if getattr(self, name) not in legal:
                raise InputError(f"{name} is {getattr(self, name)!r}, must be one of {', '.join(legal)}")
        if self.engine not in (None, *ENGINES):
            raise InputError(f"engine is {self.engine!r}, must be one of {', '.join(ENGINES)}")
        for pair in self.experts or ():
            llm_and_gpu(pair)
        for limit_s in self.latency_limit_s or ():
            if not 0 < limit_s < math.inf:
                raise InputError(f"latency_limit_s is {limit_s!r}, must be above 0 and finite, in s/token")
        for one, other in (("arrivals", "trace"), ("prediction", "predictor")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise InputError(
                    f"--{one}={getattr(self, one)} and --{other}={getattr(self, other)} are both given: give one"
                )
        self._check_trace()
        if self.predictor is not None and self.quality_table is None:
            raise InputError(f"--predictor={self.predictor}: predicts for real prompts only; give --quality_table, too")

    def _check_trace(self) -> None:
        if self.trace_format not in (None, *COLUMNS):
            raise InputError(f"trace_format is {self.trace_format!r}, must be one of {', '.join(COLUMNS)}")
        if self.trace_spread_s is not None and not 0 < self.trace_spread_s < math.inf:
            raise InputError(f"trace_spread_s is {self.trace_spread_s!r}, must be above 0 and finite, in s")

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """LLM and GPU of each expert."""
        if self.experts is None:
            return presets.preset_named(self.preset).experts
        return tuple(llm_and_gpu(text) for text in self.experts)

    @property
    def latency_limits_s(self) -> tuple[float, ...]:
        """Latency limit of each class of users, s/token."""
        limits_s = self.latency_limit_s or presets.preset_named(self.preset).latency_limit_s
        return limits_s if isinstance(limits_s, tuple) else (limits_s,)

    @property
    def has_preset_fleet(self) -> bool:
        """Experts and answers are the preset's, and so is the saturation rate, which is written down there."""
        same_engine = self.engine in (None, presets.preset_named(self.preset).engine)
        return self.experts is None and self.quality_table is None and same_engine

    def build(self) -> tuple[Environment, EnvParams]:
        """Returns the environment, and its parameters at the preset's default load.

        Raises:
          InputError: a file cannot be used, or a name is unknown.
        """
        overrides: dict[str, Any] = {}
        for name in ("engine", "arrivals", "prediction", "latency_limit_s", "staleness_s", "allow_drop"):
            if getattr(self, name) is not None:
                overrides[name] = getattr(self, name)
        if self.experts is not None:
            overrides["experts"] = self.pairs
        if self.trace is not None:
            overrides["arrivals"] = with_gaps(self._part_of_trace(self.whole_trace))
        if self.quality_table is not None:
            table = self._part_of_table(self.read_table())
            overrides["quality_table"] = table
            if self.predictor is not None:
                overrides["prediction"] = self._predictions(table)
        return presets.make(self.preset, **overrides)

    @functools.cached_property
    def whole_trace(self) -> ArrivalTrace:
        """The trace, not only the part of it that is used.

        Raises:
          InputError: there is none, or its file cannot be used.
        """
        if self.trace is None:
            raise InputError("--trace is not given: the world has a law of arrivals")
        return read_trace(self.trace, self.trace_format, sort=self.trace_sort, spread_s=self.trace_spread_s)

    def held_out(self) -> WorldConfig:
        """Returns the same world with the second half of its trace and the test part of its table."""
        return dataclasses.replace(
            self,
            trace_part="all" if self.trace is None else "second",
            table_part="all" if self.quality_table is None else "test",
        )

    def for_training(self) -> WorldConfig:
        """Returns the same world with the first half of its trace and the training part of its table, if it has all."""
        return dataclasses.replace(
            self,
            trace_part="first" if self.trace is not None and self.trace_part == "all" else self.trace_part,
            table_part="train" if self.quality_table is not None and self.table_part == "all" else self.table_part,
        )

    def read_table(self) -> QualityTable:
        """Reads the quality table by the ending of its name, with the texts of its prompts if they are given."""
        path = str(self.quality_table)
        if not path.endswith(".npz"):
            return read_mix_instruct(path, self.score_column or "bertscore")
        table = read_npz(path, self.score_column or "quality_bertscore_minilm", clip_scores=True)
        if self.prompts is None:
            return table
        return dataclasses.replace(table, prompts=read_prediction_table(path, self.score_column, self.prompts).texts)

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold; ``from_dict`` rebuilds it."""
        return dataclass_json.to_dict(self)

    def described(self) -> dict[str, Any]:
        """Returns what differs from the preset, for people: files by their names, without their folders."""
        default = WorldConfig(self.preset).to_dict()
        kept = {name: value for name, value in self.to_dict().items() if value != default[name]}
        files = ("trace", "quality_table", "prompts")
        names = {name: os.path.basename(value) if name in files else value for name, value in kept.items()}
        return {"preset": self.preset} | names

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
        return table_predictions(load_predictor(str(self.predictor)), table, [llm for llm, _ in self.pairs])


def llm_and_gpu(text: str) -> tuple[str, str]:
    """Returns the two parts of ``LLM@GPU``.

    Raises:
      InputError: the text has no ``@``.
    """
    llm, at, gpu = text.partition("@")
    if not at:
        raise InputError(f"--experts={text}: give LLM@GPU, as in alpaca-native@A40")
    return llm, gpu
