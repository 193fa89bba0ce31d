"""Shows what follows from a fleet file: step and prompt times, KV memory, and how each number was got.

qos-jax fleet show fleet.toml
"""

from __future__ import annotations

import dataclasses
import json

from absl.flags import FlagValues

from qos_jax.errors import InputError
from qos_jax.fleet.catalogue import DEVICES, FORMATS, LLMS
from qos_jax.fleet.fleet_file import load_fleet
from qos_jax.fleet.summary import as_text, derived
from qos_jax.io.files import write_whole


def main(values: FlagValues) -> None:
    """Prints what was asked for."""
    if values.action == "catalogue":
        print(catalogue_text())
        return
    if values.action is None or values.file is None:
        raise InputError("nothing to do; give qos-jax fleet show FILE, or qos-jax fleet catalogue")
    fleet = load_fleet(values.file)
    rows = derived(fleet)
    print(as_text(fleet, rows))
    if values.out is not None:
        described = {"name": fleet.name, "experts": [dataclasses.asdict(row) for row in rows]}
        write_whole(values.out, json.dumps(described, indent=1, allow_nan=False) + "\n")
        print(f"written: {values.out}")


def catalogue_text() -> str:
    """Returns the names that a fleet file may use, as Markdown tables."""
    lines = ["| device | memory GB | GB/s | TFLOP/s in 16 bit | W | timing |", "|---|---|---|---|---|---|"]
    for name, device in DEVICES.items():
        measured = ["fp16 of LLaMA-7B"] if device.llama_7b else []
        measured += [
            f"{format} fitted (step {100 * fitted.step_error:.1f} %, prompt {100 * fitted.prompt_error:.1f} %)"
            for format, fitted in device.fitted.items()
        ]
        lines.append(
            f"| {name} | {device.memory_gb:g} | {device.bandwidth_gb_per_s:g} | {device.tflops['fp16']:g} "
            f"| {device.idle_w:g} to {device.busy_w:g} | {', '.join(measured) or 'data sheet'} |"
        )
    formats = ("int4", "fp8", "fp16")
    lines += [
        "",
        f"| LLM | {' | '.join(f'GB in {format}' for format in formats)} | KV kB/token |",
        "|---|---|---|---|---|",
    ]
    for name, llm in LLMS.items():
        sizes = (llm.weights_gb if format == "fp16" else llm.quantised(format).weights_gb for format in formats)
        sizes_gb = " | ".join(f"{size:.2f}" for size in sizes)
        lines.append(f"| {name} | {sizes_gb} | {llm.kv_bytes_per_token / 1e3:.1f} |")
    return "\n".join([*lines, "", f"formats: {', '.join(FORMATS)}, as in qwen3-8b:int4"])
