"""The command: its help is quick and complete, and its names are those of the registries."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from absl.flags import FlagValues

from qos_jax.agent import AGENTS, configs
from qos_jax.agent.overrides import leaves
from qos_jax.fleet.engines import ENGINES
from qos_jax.predictor.fitting import FineTuning
from qos_jax.programs import choices
from qos_jax.programs.app import run_program
from qos_jax.programs.main import PROGRAMS, flags_reference
from qos_jax.programs.studies import BUDGETS, STUDIES
from qos_jax.routers import PLANNERS, router_names
from qos_jax.sim.constants import OBSERVE
from qos_jax.training.config import KEPT, RANDOMISED
from qos_jax.workload.trace_files import COLUMNS
from qos_jax.worlds.build import make
from qos_jax.worlds.presets import PRESETS

HEAVY = ("jax", "flax", "optax", "orbax", "matplotlib", "tokenizers", "tensorboardX", "jraph", "scipy", "numpy")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)


def test_names_in_the_help_are_those_that_are_known() -> None:
    env, _ = make("paper-3", rate_per_s=1.0)
    singles = {f"expert_{i}" for i in range(3)}
    assert set(choices.PRESETS) == set(PRESETS)
    assert set(choices.ENGINES) == set(ENGINES)
    assert choices.OBSERVE == OBSERVE
    assert set(choices.AGENTS) == set(AGENTS)
    assert set(choices.ROUTERS) == {*router_names(env), *PLANNERS, "prefix_affinity"} - singles
    assert set(choices.RANDOMISED) == set(RANDOMISED)
    assert set(choices.KEPT) == set(KEPT)
    assert tuple(COLUMNS) == choices.TRACE_FORMATS
    assert set(choices.STUDIES) == set(STUDIES)
    assert set(choices.BUDGETS) == set(BUDGETS)
    assert set(choices.AGENT_FIELDS) == {path for path, _ in leaves(configs.to_dict(configs.AgentConfig()))}
    assert (FineTuning.layers, FineTuning.epochs) == (choices.FINE_TUNED_LAYERS, choices.FINE_TUNING_EPOCHS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_shows_the_flags_of_the_program_and_no_other(name: str) -> None:
    done = run("-m", "qos_jax.programs", name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"qos-jax {name}: {PROGRAMS[name].summary}\n")
    for line in done.stdout.splitlines():
        assert len(line) <= 100
    assert "--out" in done.stdout
    for foreign in ("logtostderr", "verbosity", "pdb", "orbax", "xml"):
        assert foreign not in done.stdout


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from qos_jax.programs.main import run\n"
        "try: run('train', ['--help'])\n"
        f"except SystemExit: print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert run("-c", program).stdout.splitlines()[-1] == "heavy: []"


def test_the_library_loads_only_what_is_used() -> None:
    """JAX, flax and optax are loaded with the environment; what draws, stores or tokenises is not."""
    program = (
        "import sys, qos_jax; assert 'jax' not in sys.modules\n"
        "qos_jax.make, qos_jax.make_router, qos_jax.evaluate, qos_jax.recipe, qos_jax.Environment\n"
        f"print([name for name in {HEAVY[3:8]!r} if name in sys.modules])"
    )
    done = run("-c", program)
    assert done.stdout == "[]\n", done.stderr


def test_every_public_name_can_be_loaded() -> None:
    import qos_jax

    for name in qos_jax.__all__:
        assert getattr(qos_jax, name) is not None
    assert set(qos_jax.__all__) <= set(dir(qos_jax))
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        qos_jax.magic  # noqa: B018


def test_an_unknown_program_is_refused_in_one_line() -> None:
    done = run("-m", "qos_jax.programs", "tran")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: program 'tran' is unknown; choose from train, ")
    assert run("-m", "qos_jax.programs").returncode == 0
    assert run("-m", "qos_jax.programs", "--version").stdout.startswith("qos_jax ")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_ends_any_program_in_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(values: FlagValues) -> None:
        raise OSError(number, os.strerror(number), "runs/here")

    with pytest.raises(SystemExit) as stopped:
        run_program(lambda values: None, fails, name="program", summary="", arguments=[])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: runs/here cannot be written: {os.strerror(number)}\n"


def test_launchers_of_the_checkout_are_the_same_programs() -> None:
    done = run("-m", "experiments.evaluate", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("qos-jax evaluate: ")


def test_the_reference_of_flags_has_every_program() -> None:
    text = flags_reference()
    for name in PROGRAMS:
        assert f"## qos-jax {name}\n" in text
