"""The command ``qos-jax NAME``: finds the program of this name and starts it."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl.flags import FlagValues

from qos_jax.programs import flags
from qos_jax.programs.app import help_text, run_program


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that users run."""

    summary: str
    define: Callable[[FlagValues], None]
    module: str  # whose ``main`` takes the flags; imported only when the program runs
    words: tuple[str, ...] = ()  # flags for which the first arguments without a flag stand
    compiles: bool = True  # uses JAX

    def main(self, values: FlagValues) -> None:
        """Runs the program with these flags."""
        if self.compiles:
            from qos_jax.programs.compilation_cache import use_cache

            use_cache()
        importlib.import_module(self.module).main(values)

    def as_flags(self, arguments: Sequence[str]) -> list[str]:
        """Returns arguments of which all are flags."""
        first = next((at for at, each in enumerate(arguments) if each.startswith("-")), len(arguments))
        named = [f"--{flag}={word}" for flag, word in zip(self.words, arguments[:first], strict=False)]
        return [*named, *arguments[len(named) :]]


PROGRAMS = {
    "train": Program("Train a router.", flags.define_train, "qos_jax.programs.train"),
    "evaluate": Program("Compare routers on the same requests.", flags.define_evaluate, "qos_jax.programs.evaluate"),
    "capacity": Program(
        "Tell how much traffic each router can take within the limits.",
        flags.define_capacity,
        "qos_jax.programs.capacity",
    ),
    "arena": Program("Judge routers by one rule in several worlds.", flags.define_arena, "qos_jax.programs.arena"),
    "replay-page": Program(
        "Write a page that plays an episode of two routers.", flags.define_replay_page, "qos_jax.programs.replay_page"
    ),
    "robustness": Program(
        "Tell which orders of routers survive an error of the model.",
        flags.define_robustness,
        "qos_jax.programs.robustness",
    ),
    "sweep": Program("Train a grid of runs.", flags.define_sweep, "qos_jax.programs.sweep"),
    "predictor": Program(
        "Train a predictor of scores and output lengths.", flags.define_predictor, "qos_jax.programs.train_predictor"
    ),
    "fleet": Program(
        "Show what follows from a fleet file: qos-jax fleet show FILE.",
        flags.define_fleet,
        "qos_jax.programs.fleet",
        words=("action", "file"),
        compiles=False,
    ),
    "fit-profile": Program(
        "Fit an expert's timing to kernel tables.", flags.define_fit_profile, "qos_jax.programs.fit_profile"
    ),
    "fidelity": Program(
        "Compare the simulator with a measured run.", flags.define_fidelity, "qos_jax.programs.fidelity"
    ),
    "gateway": Program("Route requests to real engines.", flags.define_gateway, "qos_jax.programs.gateway"),
    "observe": Program("Fit a fleet file to the log of a gateway.", flags.define_observe, "qos_jax.programs.observe"),
    "reproduce": Program("Make the project's studies again.", flags.define_reproduce, "qos_jax.programs.reproduce"),
}


def run(name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the program of this name and exits; see ``run_program``."""
    program = PROGRAMS[name]
    arguments = program.as_flags(sys.argv[1:] if arguments is None else arguments)
    run_program(program.define, program.main, name=f"qos-jax {name}", summary=program.summary, arguments=arguments)


def main() -> NoReturn:
    """Entry of the console script."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in PROGRAMS:
        del sys.argv[1]  # results name their command by the arguments that follow
        run(name)
    if name in ("--help", "-h", "help"):
        print(usage())
        sys.exit(0)
    if name == "--version":
        print(_version())
        sys.exit(0)
    print(f"error: program {name!r} is unknown; choose from {', '.join(PROGRAMS)}", file=sys.stderr)
    sys.exit(2)


def usage() -> str:
    """Returns the help of the command itself."""
    width = max(map(len, PROGRAMS))
    lines = [f"  {name:{width}}  {program.summary}" for name, program in PROGRAMS.items()]
    head = "qos-jax: simulate LLM serving at the edge, and learn to route its requests"
    return "\n".join([head, "", "usage: qos-jax PROGRAM [--FLAG=VALUE ...]", "", *lines, "",
                      "qos-jax PROGRAM --help shows the flags of a program."])  # fmt: skip


def flags_reference() -> str:
    """Returns the flags of all programs as Markdown, for the documentation."""
    parts = []
    for name, program in PROGRAMS.items():
        values = FlagValues()
        program.define(values)
        parts.append(f"## qos-jax {name}\n\n```text\n{help_text(values, f'qos-jax {name}', program.summary)}\n```")
    return "\n\n".join(parts) + "\n"


def _version() -> str:
    import qos_jax

    return f"qos_jax {qos_jax.__version__}"
