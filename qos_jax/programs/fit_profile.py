"""Fits an expert's timing to measured kernel tables and writes profile.json.

qos-jax fit-profile --dense=dense.csv --attention=attention.csv --per_sequence=head.csv \
    --num_layers=32 --max_kv_tokens=41408 --out=profile.json
"""

from __future__ import annotations

import hashlib
import pathlib
import platform
import shlex
import sys
from importlib.metadata import version
from typing import Any

import numpy as np
from absl.flags import FlagValues

from qos_jax.errors import InputError
from qos_jax.fleet import profile_fitting
from qos_jax.fleet.kernel_tables import read_tables
from qos_jax.fleet.profile_fitting import Link
from qos_jax.fleet.table_fitting import fit_tables


def main(values: FlagValues) -> None:
    """Fits, writes the profile and prints it with its errors."""
    measured = read_tables(values.dense, values.attention, values.per_sequence)
    if link := link_of(values):
        measured = profile_fitting.with_exchange(measured, link)
    iterations = profile_fitting.assemble(measured, values.num_layers, values.max_kv_tokens)
    timing, affine = profile_fitting.fit_timing(iterations), profile_fitting.fit_affine(iterations)
    host_s, host_per_sequence_s = values.host_us / 1e6, values.host_per_sequence_us / 1e6
    tables = fit_tables(measured, iterations, values.num_layers)
    forms: dict[str, dict[str, Any]] = {"tables": timing | {"kernels": tables}, "hinge": timing, "affine": affine}
    errors = {form: profile_fitting.relative_errors(fitted, iterations) for form, fitted in forms.items()}
    sources = {"dense": values.dense, "attention": values.attention, "per_sequence": values.per_sequence}
    tables = tables.replace(host_s=np.array([host_s]), host_per_sequence_s=np.array([host_per_sequence_s]))
    timing["step_base_s"] += host_s
    timing["per_sequence_s"] += host_per_sequence_s
    profile = {
        "version": profile_fitting.PROFILE_VERSION,
        "name": values.name or pathlib.Path(values.out).stem,
        "llm": values.llm,
        "gpu": values.gpu,
        "timing": timing,
        "units": profile_fitting.TIMING_UNITS,
        "kernels": profile_fitting.tables_as_json(tables),
        "errors": errors,
        "affine_timing": affine,
        "notes": measured.notes,
        "sources": {key: _source(path) for key, path in sources.items() if path is not None},
        "command": shlex.join(["qos-jax", "fit-profile", *sys.argv[1:]]),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("jax", "numpy", "scipy")},
    }
    profile_fitting.save_profile(values.out, profile)
    for name, unit in profile_fitting.TIMING_UNITS.items():
        print(f"{name:20} {timing[name]:.6g} {unit}")
    for note in measured.notes:
        print(f"note: {note}")
    print(f"{'':16} {'iterations':>10} {'mean |e|':>9} {'bias':>7} {'max |e|':>8}")
    for form, kinds in errors.items():
        for kind, e in kinds.items():
            print(f"{form:7} {kind:8} {e['iterations']:10} {e['mape']:9.2%} {e['bias']:7.1%} {e['max']:8.1%}")


def link_of(values: FlagValues) -> Link | None:
    """Returns the link between two GPUs by the flags, None for one GPU.

    Raises:
      InputError: a flag of the link is out of range, missing, or there without the link.
    """
    if values.link_gb_per_s is None:
        for name, unset in (("link_us", 0.0), ("hidden_size", None), ("vocab_size", None)):
            if values[name].value != unset:
                raise InputError(f"--{name} is {values[name].value}, must be left out without --link_gb_per_s")
        return None
    if values.hidden_size is None:
        raise InputError("--hidden_size is missing, must be the hidden size of the model with --link_gb_per_s")
    return Link(values.link_gb_per_s, values.link_us, values.hidden_size, values.vocab_size)


def _source(path: str) -> dict[str, str]:
    file = pathlib.Path(path)
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
