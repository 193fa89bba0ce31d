"""Compares runs of a real vLLM on a CPU with the simulator, at each load and with both forms of the cost.

python -m experiments.vllm_fidelity --runs=runs/vllm-cpu

``experiments/vllm_engine.py`` makes the runs. The cost of an iteration is fitted to the other engine, which served
other requests in turns with the runs, and nothing to the runs. As a shared machine is not always as fast, all times of
a run are scaled by one number: how slow the other engine was in its turns of that run.
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
    """Prints the errors of the fit, and those of the runs."""
    found = compare(pathlib.Path(values.runs))
    for form, kinds in found["profile"].items():
        for kind, error in kinds.items():
            print(f"profile, {form}, {kind}: {error['mape']:.1%} ({error['bias']:+.1%}), {error['iterations']}")
    for name, forms in found["runs"].items():
        for form, errors in forms.items():
            latencies = ", ".join(
                f"{fidelity.LATENCIES[latency]} {row['mean_error']:+.1%} (median {row['median_error']:.1%})"
                for latency, row in errors["latencies"].items()
            )
            print(f"{name}, {form} x {errors['slowness']:.3f}: own iterations {errors['iterations']:+.1%}; {latencies}")
    if values.out is not None:
        result = plain({"versions": versions(), **found})
        write_whole(writable_folder(values.out) / "vllm_fidelity.json", json.dumps(result, indent=1, allow_nan=False))


def compare(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the errors of both forms of the cost: on the profile, and of each run.

    Raises:
      InputError: there is no run, a file cannot be read, or one lacks a field.
    """
    runs = sorted(folder.glob("load-*"))
    if not runs:
        raise InputError(f"{folder}: has no folder load-*, must have one for each run")
    profiles = {run: read_iterations(run / "profile.csv") for run in runs}
    columns = ([getattr(one, field.name) for one in profiles.values()] for field in dataclasses.fields(Iterations))
    profile = Iterations(*map(np.concatenate, columns))
    coefficients: dict[str, Any] = fit_timing(profile)
    forms = {"tables": coefficients | {"kernels": fit_whole(profile)}, "coefficients": coefficients}
    return {
        "profile": {form: relative_errors(timing, profile) for form, timing in forms.items()},
        "runs": {
            run.name: {form: _errors(run, timing, of_run) for form, timing in forms.items()}
            for run, of_run in profiles.items()
        },
    }


def _errors(folder: pathlib.Path, timing: dict[str, Any], profile: Iterations) -> dict[str, Any]:
    """Returns the errors of a run at the speed of its profile.

    Its ``slowness``; the relative error of the whole time of the engine's own ``iterations``; and the ``preemptions``
    and errors of ``latencies`` of a replay.
    """
    slowness = float(profile.time_s.sum() / predicted_s(timing, profile).sum())
    timing = _scaled(timing, slowness)
    run, iterations = read_run(folder), read_iterations(folder / "iterations.csv")
    log = fidelity.replay_run(run, timing)
    return {
        "slowness": slowness,
        "iterations": float(predicted_s(timing, iterations).sum() / iterations.time_s.sum() - 1),
        "preemptions": int(log.preemptions.sum()),
        "latencies": fidelity.latency_errors(run, log),
    }


def _scaled(timing: dict[str, Any], factor: float) -> dict[str, Any]:
    scaled: dict[str, Any] = {name: factor * value for name, value in timing.items() if name != "kernels"}
    if kernels := timing.get("kernels"):
        times_s = ("dense_s", "head_s", "attention_s")
        scaled["kernels"] = kernels.replace(**{name: factor * getattr(kernels, name) for name in times_s})
    return scaled


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
