"""A training run as plain values; together with a ``WorldConfig`` it fixes what is trained."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from qos_jax.agent import configs
from qos_jax.agent.configs import AgentConfig
from qos_jax.agent.overrides import leaves, overridden
from qos_jax.agent.sac import Hyperparameters
from qos_jax.errors import InputError
from qos_jax.io import dataclass_json
from qos_jax.io.text_files import number_or_nan, shown
from qos_jax.sim.validation import checked_whole
from qos_jax.training.validation import FIRST_HELD_OUT_SEED

RANDOMISED = ("load", "arrivals", "prediction", "staleness", "limit", "fleet")
"""What may differ between the worlds of a run."""

PREFERENCES = "preferences"
"""May be among what is randomised, too: the weights of the reward then differ, and the network reads them."""

DEFAULT_LOAD = 0.9
VALIDATION_LOADS = (0.6, 0.9, 1.1, 1.3)  # where loads are randomised

KEPT = ("auto", "best", "last")
"""Which weights the router gets: the last ones, or those of its best evaluation where they were better."""

_MAX_STEPS = 2**62
_VALIDATED = {"load", "arrivals"}  # of RANDOMISED: validation has several loads, and Poisson arrivals for all

Run = Mapping[str, float]  # ``seed``, and the values of varied numbers by name


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """What is trained, and for how long."""

    agent: AgentConfig = AgentConfig()
    steps: int = 1  # requests routed in training, of each run
    runs: tuple[Run, ...] = ({"seed": 0},)  # side by side in one program
    randomise: tuple[str, ...] = ()  # of RANDOMISED and PREFERENCES
    loads: tuple[float, ...] = ()  # one, or the ends of a range; empty: DEFAULT_LOAD, or the standard range
    evaluate_every: int | None = None  # steps; None: a tenth of all
    evaluation_envs: int = 32
    evaluation_steps: int = 800  # requests of each of them
    keep: str = "auto"
    """One of ``KEPT``; ``auto``: the best where evaluations judge what training strives for, which is QoS without
    costs in worlds that differ in load and arrivals only."""
    save_replay: bool = True  # else a resumed run does not go on bit for bit

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
          InputError: a field is out of range.
        """
        for name in ("steps", "evaluation_envs", "evaluation_steps"):
            checked_whole(name, getattr(self, name), 1, _MAX_STEPS)
        if self.evaluate_every is not None:
            checked_whole("evaluate_every", self.evaluate_every, 1, _MAX_STEPS)
        for name, kind in (("randomise", "names"), ("loads", "numbers above 0"), ("runs", "tables with a seed")):
            if not isinstance(getattr(self, name), list | tuple):
                raise InputError(f"{name} is {shown(getattr(self, name))}, must be a tuple of {kind}")
        if self.keep not in KEPT:
            raise InputError(f"keep is {shown(self.keep)}, must be one of {', '.join(KEPT)}")
        for load in self.loads:
            if not number_or_nan(load) > 0:
                raise InputError(f"loads has {shown(load)}, must have finite numbers above 0")
        for name in self.randomise:
            if name not in (*RANDOMISED, PREFERENCES):
                raise InputError(
                    f"--randomise={name}: choose all, or some of {', '.join(RANDOMISED)}; and {PREFERENCES}"
                )
        if self.agent.network.with_preferences and PREFERENCES not in self.randomise:
            raise InputError(
                f"network.with_preferences is True, which needs {PREFERENCES} among what is randomised: "
                f"--randomise={','.join([*self.randomise, PREFERENCES])}"
            )
        if not self.runs:
            raise InputError("runs is empty: give at least one seed")
        for run in self.runs:
            seed = run.get("seed") if isinstance(run, Mapping) else None
            if not isinstance(seed, int) or not 0 <= seed < FIRST_HELD_OUT_SEED:
                raise InputError(
                    f"seed is {seed!r}: seeds must be below {FIRST_HELD_OUT_SEED} and not below 0, "
                    "since evaluation uses the others"
                )

    @property
    def seeds(self) -> list[int]:
        """The seed of each run."""
        return [int(run["seed"]) for run in self.runs]

    @property
    def keeps_best(self) -> bool:
        """Whether weights better than the last ones are kept; see ``keep``."""
        if self.keep != "auto":
            return self.keep == "best"
        rewards = [hyperparameters_of(self.agent, run).weights for run in self.runs]
        costs = any(each.violation or each.drop or each.kv_memory or each.energy for each in rewards)
        return set(self.randomise) <= _VALIDATED and not costs

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold; ``from_dict`` rebuilds it."""
        return dataclass_json.to_dict(self)

    @classmethod
    def from_dict(cls, values: Any) -> TrainingConfig:
        """Rebuilds what ``to_dict`` returned.

        Raises:
          InputError: a field is unknown, missing or of another kind.
        """
        return dataclass_json.from_dict(cls(), values, "training")


def hyperparameters_of(agent: AgentConfig, run: Run) -> Hyperparameters:
    """Returns the numbers of one of the runs that train side by side."""
    return overridden(agent, {name: repr(value) for name, value in run.items() if name not in ("seed", "load")}).hyper


def runs_of(agent: AgentConfig, seeds: Sequence[int], vary: Sequence[str] = ()) -> tuple[Run, ...]:
    """Returns the runs of every combination of varied numbers with every seed.

    Args:
      agent: whose numbers may vary.
      seeds: of the runs.
      vary: texts ``FIELD=VALUE,VALUE``; FIELD is a number of the algorithm, or ``load``.

    Raises:
      InputError: a field cannot vary, or a value is no number.
    """
    if not isinstance(seeds, Sequence) or isinstance(seeds, str):
        raise InputError(f"seeds is {shown(seeds)}, must be one or more whole numbers")
    varied: dict[str, list[float]] = {}
    for text in vary:
        name, _, values = text.partition("=")
        name = configs.OLD_FIELDS.get(name, name)
        can_vary = [path for path, _ in leaves(configs.to_dict(agent)["hyper"])]
        if name != "load" and not any(f".{path}".endswith(f".{name}") for path in can_vary):
            raise InputError(f"--vary={text}: choose load, or one of {', '.join(can_vary)}")
        try:
            varied[name] = [float(value) for value in values.split(",")]
        except ValueError:
            raise InputError(f"--vary={text}: give FIELD=NUMBER,NUMBER") from None
        if not all(abs(value) < float("inf") for value in varied[name]):
            raise InputError(f"--vary={text}: give FIELD=NUMBER,NUMBER")
        if name != "load":
            overridden(agent, {name: repr(varied[name][0])})
        elif min(varied[name]) <= 0:
            raise InputError(f"--vary={text}: give loads above 0")
    combinations = itertools.product(*varied.values())
    return tuple(dict(zip(varied, values, strict=True)) | {"seed": seed} for values in combinations for seed in seeds)
