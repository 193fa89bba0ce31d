"""Fits the catalogue's rates to measurements of boards, and tells how far the law of scaling is from them.

python -m experiments.catalogue --data=$QOS_JAX_DATA/profiles

Read are jetson_tensorrt_edge_llm.csv, from which the rates are fitted, and gemm_l40s_arc-pro-b60_vllm.csv. Printed are
each measured row with its error, rows that are left out with the reason, the errors of the law where an LLM or a device
is left out of the fit, and the shares of the data sheet that ``qos_jax.fleet.scaling`` holds. ``--write`` writes the
rates into the catalogue.
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from absl import flags

from qos_jax.fleet import catalogue, scaling
from qos_jax.fleet.catalogue import DEVICES, Llm, Rates, llm_named
from qos_jax.programs.app import FlagGroup, run_program

BOARDS = {
    "jetson-agx-thor": "Jetson AGX Thor",
    "jetson-agx-orin-64gb": "Jetson AGX Orin 64GB",
    "jetson-orin-nx-16gb": "Jetson Orin NX 16GB",
    "jetson-orin-nano-8gb": "Jetson Orin Nano 8GB",
    "dgx-spark-gb10": "DGX Spark",
}
LLMS = {
    "Qwen3-0.6B": "qwen3-0.6b",
    "Qwen3-1.7B": "qwen3-1.7b",
    "Qwen3-4B-Instruct-2507": "qwen3-4b",
    "Qwen3-8B": "qwen3-8b",
}
FORMATS = {"INT4 AWQ": "int4", "NVFP4": "nvfp4"}
SDK = "0.10"
SOURCE = "NVIDIA/TensorRT-Edge-LLM 0.10 performance-benchmarks.md, Qwen3 0.6 to 8B"
GEMM_SOURCE = "PyPI aiconfigurator-core 0.12.0, GEMM times in vLLM; other rates of the data sheet"
GEMM_DEVICES = {"l40s": "L40S", "arc-pro-b60": "Arc Pro B60"}
_CONTEXT_TOKENS = 2048  # cached tokens of each request in rows of llm_bench
_SHORT_WEIGHT = 0.25  # of the mean prompts of MT-Bench, about 60 tokens, which tell what does not grow with the prompt
_KV_SHARE = 0.84  # where only batch 1 was measured, which does not tell the rate of the cache: as on Thor


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured row: exact shapes of llm_bench, or MT-Bench at batch 1."""

    device: str
    llm: str
    format: str
    batch: int
    prompt_tokens: int  # of all prompts together
    prompt_s: float
    step_s: float
    exact: bool

    @property
    def model(self) -> Llm:
        """The LLM in the row's format."""
        return llm_named(f"{self.llm}:{self.format}")


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    group = FlagGroup(values, "catalogue")
    group.string("data", None, "Folder of the measured tables.", required=True)
    group.boolean("write", False, "Write the rates into the catalogue.")


def read_rows(folder: str | pathlib.Path) -> tuple[list[Row], dict[str, int]]:
    """Returns the rows that the catalogue has LLMs for, and how many rows are left out for which reason."""
    rows, left_out = [], dict[str, int]()
    path = pathlib.Path(folder) / "jetson_tensorrt_edge_llm.csv"
    for cells in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        exact = cells["table"] == "llm_bench"
        if reason := _why_left_out(cells, exact):
            left_out[reason] = left_out.get(reason, 0) + exact
            continue
        batch, tokens = int(cells["batch"]), int(cells["prefill_tokens"])
        times = float(cells["prefill_ms"]) / 1e3, batch / float(cells["decode_tok_s"])
        names = BOARDS[cells["device"]], LLMS[cells["model"]], FORMATS[cells["precision"]]
        rows.append(Row(*names, batch, tokens, *times, exact))
    return rows, {reason: count for reason, count in left_out.items() if count}


def _why_left_out(cells: dict[str, str], exact: bool) -> str:
    if cells["model"] not in LLMS or cells["precision"] not in FORMATS:
        return "hybrid or linear attention, mixture of experts, or 12B in 16 bit with vision: no law for its shape"
    if cells["sdk"] != SDK:
        return "measured again with the older SDK 0.9"
    return "" if cells["mode"] == "Vanilla" and (exact or cells["batch"] == "1") else "speculation, or padded batches"


def fit(rows: Sequence[Row]) -> dict[tuple[str, str], Rates]:
    """Returns the rates of each device and format in the rows; steps of a device are fitted together."""
    fitted = {}
    for device in dict.fromkeys(row.device for row in rows):
        mine = [row for row in rows if row.device == device]
        formats = list(dict.fromkeys(row.format for row in mine))
        steps = _fit_steps([row for row in mine if row.exact], formats, DEVICES[device].bandwidth_gb_per_s)
        for format, rates in steps.items():
            prompts = [row for row in mine if row.format == format and row.batch == 1]
            fitted[device, format] = _fit_prompts(prompts, rates, DEVICES[device].tflops["fp16"])
    return fitted


def _fit_steps(rows: Sequence[Row], formats: Sequence[str], bandwidth: float) -> dict[str, Rates]:
    batches = {row.batch for row in rows}

    def rates(logs: np.ndarray) -> dict[str, Rates]:
        layer_us, kv, *weights = np.exp(logs)
        kv = kv if len(batches) > 1 else _KV_SHARE * bandwidth
        return {
            format: Rates(float(layer_us), float(weight), float(kv), 0.0, 0.0, 1.0, 1.0)
            for format, weight in zip(formats, weights, strict=True)
        }

    def errors(logs: np.ndarray) -> list[float]:
        tried = rates(logs)
        return [step_error(row, tried[row.format]) for row in rows]

    return rates(_least_squares(errors, [[30.0, *[0.8 * bandwidth] * (1 + len(formats))]]))


def _fit_prompts(rows: Sequence[Row], steps: Rates, tflops: float) -> Rates:
    def rates(logs: np.ndarray) -> Rates:
        prompt_layer_us, dense, attention = (float(x) for x in np.exp(logs))
        return dataclasses.replace(
            steps, prompt_layer_us=prompt_layer_us, prompt_tflops=dense, attention_tflops=attention
        )

    def errors(logs: np.ndarray) -> list[float]:
        tried = rates(logs)
        held = 0.02 * (logs[2] - np.log(scaling.SHARES.attention * tflops))  # where two sizes do not tell three rates
        return [(1.0 if row.exact else _SHORT_WEIGHT) * prompt_error(row, tried) for row in rows] + [float(held)]

    starts = [[us, share * tflops, 0.35 * tflops] for us in (30.0, 300.0) for share in (0.2, 0.6, 1.5)]
    return rates(_least_squares(errors, starts))


def _least_squares(errors: Callable[[np.ndarray], list[float]], starts: Sequence[Sequence[float]]) -> np.ndarray:
    """Returns the logarithms at which the sum of squares is least."""
    from scipy.optimize import least_squares

    return np.asarray(min((least_squares(errors, np.log(start)) for start in starts), key=lambda found: found.cost).x)


def step_error(row: Row, rates: Rates) -> float:
    """Returns the relative error of the step."""
    return scaling.step_s(row.model, rates, row.batch, row.batch * _CONTEXT_TOKENS) / row.step_s - 1


def prompt_error(row: Row, rates: Rates) -> float:
    """Returns the relative error of the prompts, which are computed in one iteration."""
    one = row.prompt_tokens // row.batch
    pairs_s = scaling.prompt_s(row.model, rates, row.prompt_tokens)
    others = (row.prompt_tokens**2 - row.batch * one**2) / 2 * scaling.per_pair_s(row.model, rates)
    return (pairs_s - others) / row.prompt_s - 1


def gemm_rates(folder: str | pathlib.Path) -> dict[tuple[str, str], tuple[Rates, float, float]]:
    """Returns the rates of L40S and B60 from their matrix products, and the mean absolute errors of these.

    Weights are read at one token, in matrices of more than 120 MB, which no cache holds; arithmetic is at 4,096 tokens.
    """
    path = pathlib.Path(folder) / "gemm_l40s_arc-pro-b60_vllm.csv"
    found: dict[tuple[str, str], tuple[list[tuple[float, float]], list[tuple[float, float]]]] = {}
    for cells in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        m, n, k = (int(cells[name]) for name in "mnk")
        format = "fp16" if cells["gemm_dtype"] == "bfloat16" else "fp8"
        reads, products = found.setdefault((GEMM_DEVICES[cells["device"]], format), ([], []))
        weights_gb, seconds = n * k * (2 if format == "fp16" else 1) / 1e9, float(cells["latency_ms"]) / 1e3
        if m == 1 and weights_gb > 0.12:
            reads.append((weights_gb, seconds))
        if m == 4096 and n * k >= 4096**2:
            products.append((2 * m * n * k / 1e12, seconds))
    fitted = {}
    for (device, format), (reads, products) in found.items():
        weight_rate, weight_error = _rate(reads)
        prompt_rate, prompt_error = _rate(products)
        sheet = scaling.rates_from_sheet(llm_named(f"qwen3-8b:{format}"), DEVICES[device])
        rates = dataclasses.replace(sheet, weight_gb_per_s=weight_rate, prompt_tflops=prompt_rate)
        fitted[device, format] = rates, weight_error, prompt_error
    return fitted


def _rate(amounts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Returns the amount per second, and the mean absolute relative error of times by it."""
    amount, seconds = np.array(amounts).T
    rate = float(np.exp(np.mean(np.log(amount / seconds))))
    return rate, float(np.abs(amount / rate / seconds - 1).mean())


def shares_of(rates: Mapping[tuple[str, str], Rates]) -> scaling.Shares:
    """Returns the geometric means of what devices reach of their data sheets; times are those of the boards."""
    boards = {key: each for key, each in rates.items() if key[0] in BOARDS.values()}
    bandwidths = {device: DEVICES[device].bandwidth_gb_per_s for device, _ in rates}
    prompts: dict[str, list[float]] = {}
    for (device, format), each in rates.items():
        tflops = DEVICES[device].tflops
        prompts.setdefault(format, []).append(each.prompt_tflops / tflops.get(format, tflops["fp16"]))
    return scaling.Shares(
        weight=_mean(each.weight_gb_per_s / bandwidths[device] for (device, _), each in rates.items()),
        kv=_mean(
            each.kv_gb_per_s / bandwidths[device]
            for (device, _), each in rates.items()
            if device not in GEMM_DEVICES.values()  # of which it is not known
        ),
        prompt={format: _mean(shares) for format, shares in prompts.items()},
        attention=_mean(each.attention_tflops / DEVICES[device].tflops["fp16"] for (device, _), each in boards.items()),
        layer_us=_mean(each.layer_us for each in boards.values()),
        prompt_layer_us=_mean(each.prompt_layer_us for each in boards.values()),
        sequence_us=scaling.SHARES.sequence_us,
    )


def _mean(values: Iterable[float]) -> float:
    return float(np.exp(np.mean(np.log(list(values)))))


def without_each_llm(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Returns the errors of steps and prompts of each LLM by rates that were fitted to the others on the device."""
    steps, prompts = list[float](), list[float]()
    for llm in LLMS.values():
        rates = fit([row for row in rows if row.llm != llm])
        for row in (row for row in rows if row.llm == llm and row.exact):
            steps.append(step_error(row, rates[row.device, row.format]))
            if row.batch == 1:
                prompts.append(prompt_error(row, rates[row.device, row.format]))
    return steps, prompts


def without_each_device(rows: Sequence[Row], rates: Mapping[tuple[str, str], Rates]) -> dict[str, tuple[float, float]]:
    """Returns the mean absolute errors of steps and prompts of each device by its data sheet, without its rates.

    Devices with LLaMA-7B are compared with its timing, at batches of 1 and 8 and a prompt of 2,048 tokens.
    """
    found = {}
    for device in dict.fromkeys(device for device, _ in rates):
        shares = shares_of({key: each for key, each in rates.items() if key[0] != device})
        steps, prompts = list[float](), list[float]()
        for row in (row for row in rows if row.device == device and row.exact):
            guessed = scaling.rates_from_sheet(row.model, DEVICES[device], shares)
            steps.append(step_error(row, guessed))
            prompts += [prompt_error(row, guessed)] if row.batch == 1 else []
        if DEVICES[device].llama_7b is not None:
            llm = llm_named("alpaca-native")
            guessed = scaling.rates_from_sheet(llm, DEVICES[device], shares)
            measured = scaling.timing_of(llm, DEVICES[device])
            for batch in (1, 8):
                kv_tokens = batch * _CONTEXT_TOKENS
                steps.append(scaling.step_s(llm, guessed, batch, kv_tokens) / measured.step_s(batch, kv_tokens) - 1)
            prompts.append(scaling.prompt_s(llm, guessed, _CONTEXT_TOKENS) / measured.prompt_s(_CONTEXT_TOKENS) - 1)
        if steps:
            found[device] = _size(steps), _size(prompts)
    return found


def _size(errors: Sequence[float]) -> float:
    return float(np.abs(errors).mean())


def all_rates(folder: str | pathlib.Path, rows: Sequence[Row]) -> dict[tuple[str, str], Rates]:
    """Returns the rates of all measured devices."""
    llama = {
        (name, "fp16"): scaling.rates_from_llama_7b(llm_named("alpaca-native"), device)
        for name, device in DEVICES.items()
        if device.llama_7b is not None
    }
    return llama | {key: rates for key, (rates, _, _) in gemm_rates(folder).items()} | fit(rows)


def catalogue_rows(folder: str | pathlib.Path, rows: Sequence[Row]) -> list[list[str]]:
    """Returns the rows of fitted_rates.csv."""
    found = []
    for (device, format), rates in fit(rows).items():
        mine = [row for row in rows if (row.device, row.format) == (device, format) and row.exact]
        step = max(abs(step_error(row, rates)) for row in mine)
        prompt = max(abs(prompt_error(row, rates)) for row in mine if row.batch == 1)
        found.append([device, format, *_digits(rates), f"{step:.3f}", f"{prompt:.3f}", SOURCE])
    for (device, format), (rates, step, prompt) in gemm_rates(folder).items():
        found.append([device, format, *_digits(rates), f"{step:.3f}", f"{prompt:.3f}", GEMM_SOURCE])
    return found


def _digits(rates: Rates) -> list[str]:
    return [f"{value:.4g}" for value in dataclasses.astuple(rates)]


def main(values: flags.FlagValues) -> None:
    """Prints the errors, and writes the rates if asked."""
    rows, left_out = read_rows(values.data)
    if values.write:
        _write(catalogue_rows(values.data, rows))
        return
    print("| device | format | LLM | batch | step ms | error | prompt tokens | prompt ms | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in (row for row in rows if row.exact):
        fitted = DEVICES[row.device].fitted[row.format].rates
        errors = f"{100 * step_error(row, fitted):+.1f} %", f"{100 * prompt_error(row, fitted):+.1f} %"
        print(f"| {row.device} | {row.format} | {row.llm} | {row.batch} | {1e3 * row.step_s:.1f} | {errors[0]} "
              f"| {row.prompt_tokens} | {1e3 * row.prompt_s:.1f} | {errors[1]} |")  # fmt: skip
    for reason, count in left_out.items():
        print(f"left out: {count} rows: {reason}")
    steps, prompts = without_each_llm(rows)
    print(f"an LLM left out: mean |error| of steps {_size(steps):.1%}, of prompts {_size(prompts):.1%}; "
          f"largest {max(map(abs, steps)):.1%} and {max(map(abs, prompts)):.1%}")  # fmt: skip
    rates = all_rates(values.data, rows)
    by_device = without_each_device(rows, rates)
    for device, (step, prompt) in by_device.items():
        print(f"{device} left out: mean |error| of steps {step:.1%}, of prompts {prompt:.1%}")
    means = np.mean(list(by_device.values()), axis=0)
    print(f"a device left out, mean: steps {means[0]:.1%}, prompts {means[1]:.1%}")
    for (device, format), (_, step, prompt) in gemm_rates(values.data).items():
        print(f"{device} {format}, matrix products: mean |error| at 1 token {step:.1%}, at 4,096 tokens {prompt:.1%}")
    print(shares_of(rates))


def _write(rows: Sequence[Sequence[str]]) -> None:
    path = pathlib.Path(catalogue.__file__).with_name("data") / "fitted_rates.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        fields = [field.name for field in dataclasses.fields(Rates)]
        writer.writerow(["device", "format", *fields, "step_error", "prompt_error", "source"])
        writer.writerows(rows)
    print(f"written: {path}")


if __name__ == "__main__":
    run_program(define, main, name="python -m experiments.catalogue", summary="fits the catalogue to measurements")
