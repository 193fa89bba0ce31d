"""Compares tokens per second of measured runs whose settings are not known with the simulator: total and shape.

python -m experiments.throughput --run=$QOS_JAX_DATA/golden-throughput

The timing is not measured on these GPUs with this LLM but scaled from another LLM (``qos_jax.fleet.scaling``), and the
engine has its defaults. As the offset of the clocks is not known, only spans are compared, and the tokens given so far
with both curves aligned where half of them are.
"""

from __future__ import annotations

import collections
import pathlib

import numpy as np
from absl import flags

from qos_jax.errors import InputError
from qos_jax.fleet.profiles import expert_profile
from qos_jax.io.text_files import CsvTable, finite_number, json_lines, read_text, shown
from qos_jax.programs.app import FlagGroup, run_program
from qos_jax.sim.replay import replay
from qos_jax.sim.types import BLOCK_SIZE_TOKENS, RequestLog, RequestTrace
from qos_jax.workload.prefix_sharing import prefix_hits, read_block_ids

_SETUPS = {"one_instance_prefix_cache": 1, "two_instances": 2}
_SPANS = ((0.05, 0.95), (0.25, 0.75))


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    group = FlagGroup(values, "throughput")
    group.string("run", None, "Folder with throughput.csv and requests.jsonl.", required=True)
    group.string("llm", "llama-3.1-8b", "LLM of the runs, a name in the catalogue.")
    group.texts("max_running", ["128", "256"], "Requests that an engine runs at most; each is simulated.")


def main(values: flags.FlagValues) -> None:
    """Prints both totals, both spans and the largest difference of the curves, for each run and each limit."""
    folder = pathlib.Path(values.run)
    measured = measured_runs(folder / "throughput.csv")
    print("gpu, setup, max running: tokens, s for 5 to 95 %, s for 25 to 75 %, peak over 5 s [tokens/s]; difference")
    for (gpu, setup), tokens in measured.items():
        print(f"{gpu}, {setup}, measured: {_summary(tokens)}")
        for limit in map(int, values.max_running):
            trace, log = simulated_run(folder / "requests.jsonl", values.llm, gpu, _SETUPS[setup], limit)
            simulated = tokens_per_s(trace.output_tokens[:, 0], log)
            print(f"{gpu}, {setup}, {limit}: {_summary(simulated)}; {curve_difference(tokens, simulated):.1%}")


def tokens_per_s(output_tokens: np.ndarray, log: RequestLog) -> np.ndarray:
    """Returns the tokens of each second [T]; those of an answer [J] come at equal gaps from the first to the last."""
    times_s = [
        np.linspace(first_s, last_s, count)
        for first_s, last_s, count in zip(log.first_token_s, log.finish_s, output_tokens, strict=True)
    ]
    return np.bincount(np.floor(np.concatenate(times_s)).astype(int)).astype(float)


def span_s(tokens: np.ndarray, low: float, high: float) -> float:
    """Returns how long [s] it takes from one share of all tokens to another, by the tokens of each second [T]."""
    share = np.append(0.0, np.cumsum(tokens)) / tokens.sum()
    return float(np.diff(np.interp((low, high), share, np.arange(len(share))))[0])


def curve_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the largest difference of the shares of tokens given so far, if both curves meet at a half."""
    grid_s = np.arange(-200.0, 200.0, 0.5)
    shares = []
    for tokens in (first, second):
        share = np.append(0.0, np.cumsum(tokens)) / tokens.sum()
        half_s = np.interp(0.5, share, np.arange(len(share)))
        shares.append(np.interp(grid_s + half_s, np.arange(len(share)), share))
    return float(np.abs(shares[0] - shares[1]).max())


def _summary(tokens: np.ndarray) -> str:
    spans = ", ".join(f"{span_s(tokens, *span):.1f}" for span in _SPANS)
    peak = np.convolve(tokens, np.ones(5) / 5, "valid").max()
    return f"{tokens.sum():.0f}, {spans}, {peak:.0f}"


def measured_runs(path: pathlib.Path) -> dict[tuple[str, str], np.ndarray]:
    """Returns the tokens of each second [T] of each run, by GPU and setup.

    Raises:
      InputError: the file cannot be read, lacks a column, or has an illegal number or setup; names the line.
    """
    runs = collections.defaultdict(list)
    for where, (gpu, setup, tokens) in CsvTable(read_text(path), path).rows(("gpu", "setup", "tokens_per_s")):
        if setup not in _SETUPS:
            raise InputError(f"{where}: setup is {shown(setup)}, must be one of {', '.join(_SETUPS)}")
        runs[gpu, setup].append(finite_number(tokens, "tokens_per_s", where))
    return {run: np.array(tokens) for run, tokens in runs.items()}


def simulated_run(path: pathlib.Path, llm: str, gpu: str, engines: int, limit: int) -> tuple[RequestTrace, RequestLog]:
    """Returns the requests of a file and what the simulator makes of them, on engines that get them in turn.

    Args:
      path: JSON lines with ``arrival_s``, ``input_toks``, ``output_toks`` and ``hash_ids``.
      llm: of all engines.
      gpu: of all engines.
      engines: each with a prefix cache without end.
      limit: requests that an engine runs at most.

    Raises:
      InputError: the file cannot be read, a line lacks a field, or the catalogue has no such LLM or GPU.
    """
    requests = read_block_ids(path)
    arrival_s, output_tokens = (
        np.array([finite_number(row.get(name), name, where) for where, row in json_lines(read_text(path), path)])
        for name in ("arrival_s", "output_toks")
    )
    in_turn = np.arange(len(arrival_s)) % engines
    trace = RequestTrace(
        arrival_s,
        requests.prompt_tokens,
        np.repeat(output_tokens[:, None], engines, axis=1).astype(int),
        shared_tokens=prefix_hits(requests, BLOCK_SIZE_TOKENS, assignment=in_turn),
    )
    experts = expert_profile([(llm, gpu)] * engines, limit, 10**6, "vllm")
    return trace, replay(experts, trace, in_turn)


if __name__ == "__main__":
    run_program(define, main, name="python -m experiments.throughput", summary="compares tokens per second of runs")
