"""Measures speed and memory, one suite at a time; ratios compare programs measured in the same run.

python -m experiments.benchmark --suite=sim --out=benchmark.json

* ``sim``: the simulator against a plain-Python loop and a compiled scalar loop.
* ``scale``: simulation and training with 256 to 16,384 environments on one device; made for GPUs.
* ``train``: steps and memory of training, the time of one decision, and the dense and the ragged encoder.
* ``pytorch``: the agent ``sac_td0`` against a PyTorch implementation; needs the extra ``sb3``.
* ``gateway``: what the gateway adds to the way to an engine at 300 requests/s, and its memory.
* ``decision``: the time of a decision of the gateway.
* ``roofline``: the limits that this device and two GPUs set to an engine pass and a gradient step.

Run it from a checkout: the plain-Python loop is the reference implementation of the tests.
"""

from __future__ import annotations

import importlib
import json

from absl import flags

from experiments.benchmarks.devices import use_one_device_per_core
from qos_jax.io.files import write_whole
from qos_jax.io.provenance import versions
from qos_jax.programs.app import FlagGroup, run_program

_MODULES = {
    "sim": "simulator",
    "scale": "scale",
    "train": "training",
    "pytorch": "pytorch",
    "roofline": "roofline",
    "peers": "pytorch",
    "gateway": "gateway",
    "decision": "gateway",
}


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    group = FlagGroup(values, "benchmark")
    group.choice("suite", "sim", list(_MODULES), "What to measure; peers is another name of pytorch.")
    group.integer("requests", 400_000, "Requests of each case of sim, over all environments, and of gateway.", 1_000)
    group.string("out", "benchmark.json", "File for the results.")


def main(values: flags.FlagValues) -> None:
    """Measures case by case, prints a line for each and writes all of them."""
    arguments = []
    if values.suite == "sim":  # the other suites give all cores to one device
        use_one_device_per_core()
        arguments.append(values.requests)
    suite = importlib.import_module(f"experiments.benchmarks.{_MODULES[values.suite]}")
    if values.suite == "gateway":
        arguments.append(values.requests)
    rows = []
    for row in (suite.decisions if values.suite == "decision" else suite.rows)(*arguments):
        rows.append(row)
        numbers = (f"{name} {value:,.4g}" for name, value in row.items() if isinstance(value, float | int))
        print(f"{row['case']:34} {'  '.join(numbers)}", flush=True)
    write_whole(values.out, json.dumps({"versions": versions(), "rows": rows}, indent=1))


if __name__ == "__main__":
    run_program(define, main, name="python -m experiments.benchmark", summary="measures speed and memory")
