"""Compares runs of a real vLLM on a CPU with the simulator, at each load and with both forms of the cost.

python -m experiments.vllm_fidelity --runs=runs/vllm-cpu

``experiments/vllm_engine.py`` makes the runs. The cost of an iteration is fitted to the profile that it took of other
requests, and nothing to the runs. One more line of each run has the tables at the speed of that run, one number: near
saturation a small error of all iterations is a large one of the queue, and a shared machine is not as fast in one run
as in the profile.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from absl import flags

from qos_jax.errors import InputError
from qos_jax.evaluation import fidelity
from qos_jax.evaluation.measured_run import read_run
from qos_jax.fleet.profile_fitting import Iterations, fit_timing, predicted_s, relative_errors
from qos_jax.fleet.table_fitting import fit_whole
from qos_jax.io.files import writable_folder, write_whole
from qos_jax.io.provenance import plain, versions
from qos_jax.io.text_files import CsvTable, finite_number, read_text
from qos_jax.programs.app import FlagGroup, run_program


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    group = FlagGroup(values, "vllm_fidelity")
    group.string("runs", None, "Folder that experiments/vllm_engine.py wrote.", required=True)
    group.string("out", None, "Folder for vllm_fidelity.json; none: only printed.")


def main(values: flags.FlagValues) -> None:
    """Prints the errors of the fit, and those of each run."""
    folder = pathlib.Path(values.runs)
    found = compare(folder)
    for form, kinds in found["profile"].items():
        for kind, error in kinds.items():
            print(f"profile, {form}, {kind}: {error['mape']:.1%} ({error['bias']:+.1%}), {error['iterations']}")
    for name, run in found["runs"].items():
        for form, errors in run.items():
            latencies = ", ".join(
                f"{fidelity.LATENCIES[latency]} {row['mean_error']:+.1%} (median {row['median_error']:.1%})"
                for latency, row in errors["latencies"].items()
            )
            print(f"{name}, {form}: own iterations {errors['iterations']:+.1%}; {latencies}")
    if values.out is not None:
        result = plain({"versions": versions(), **found})
        write_whole(writable_folder(values.out) / "vllm_fidelity.json", json.dumps(result, indent=1, allow_nan=False))


def compare(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the errors of both forms: on the profile, and on each run.

    Raises:
      InputError: there is no run, a file cannot be read, or one lacks a field.
    """
    profile = read_iterations(folder / "profile.csv")
    coefficients: dict[str, Any] = fit_timing(profile)
    forms = {"tables": coefficients | {"kernels": fit_whole(profile)}, "coefficients": coefficients}
    runs = sorted(folder.glob("load-*"))
    if not runs:
        raise InputError(f"{folder}: has no folder load-*, must have one for each run")
    return {
        "profile": {form: relative_errors(timing, profile) for form, timing in forms.items()},
        "runs": {run.name: _errors_of(run, forms) for run in runs},
    }


def _errors_of(folder: pathlib.Path, forms: dict[str, Any]) -> dict[str, Any]:
    errors = {form: _errors(folder, timing) for form, timing in forms.items()}
    kernels, speed = forms["tables"]["kernels"], 1 / (1 + errors["tables"]["iterations"])
    times_s = ("dense_s", "head_s", "attention_s")
    at_its_speed = kernels.replace(**{name: speed * getattr(kernels, name) for name in times_s})
    return errors | {"tables at its speed": _errors(folder, forms["tables"] | {"kernels": at_its_speed})}


def _errors(folder: pathlib.Path, timing: dict[str, Any]) -> dict[str, Any]:
    """Returns the error of the whole time of the engine's own iterations, and those of the latencies."""
    run, iterations = read_run(folder), read_iterations(folder / "iterations.csv")
    log = fidelity.replay_run(run, timing)
    return {
        "iterations": float(predicted_s(timing, iterations).sum() / iterations.time_s.sum() - 1),
        "preemptions": int(log.preemptions.sum()),
        "latencies": fidelity.latency_errors(run, log),
    }


def read_iterations(path: pathlib.Path) -> Iterations:
    """Reads what the iterations of an engine computed, and how long they took.

    Args:
      path: of the file; with .gz after its name it is read as well.

    Raises:
      InputError: the file cannot be read, lacks a column or rows, or has an illegal number; names the line.
    """
    if not path.exists():
        path = path.with_name(f"{path.name}.gz")
    names = [field.name for field in dataclasses.fields(Iterations) if field.name != "kind"]
    rows = [
        [finite_number(cell, name, where) for name, cell in zip(names, cells, strict=True)]
        for where, cells in CsvTable(read_text(path), path).rows(names)
    ]
    if not rows:
        raise InputError(f"{path}: holds no row, must hold at least one")
    column = dict(zip(names, np.array(rows).T, strict=True))
    prompt, decodes = column["prompt_tokens"], column["decodes"]
    kind = np.select(
        [column["prefix_tokens"] > 0, prompt == 0, decodes == 0], ["chunked", "decode", "prefill"], "mixed"
    )
    return Iterations(kind=kind, **column)


if __name__ == "__main__":
    run_program(define, main, name="python -m experiments.vllm_fidelity", summary="compares runs of vLLM on a CPU")
