"""Compares the float32 environment with a float64 replay over a simulated week.

python -m experiments.benchmarks.endurance --preset=paper-3 --load=0.8 --hours=168 --num_envs=10 --out=endurance.json

The shortest-queue router steps each environment without a reset. Then the compiled float64 loop of
``experiments.benchmarks.native_loop``, which was written independently of the engine, serves the same requests by the
same decisions. A float32 simulator that lost time or requests would drift away from it. The counts of both are compared
over the whole run and in each tenth of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array, lax
from tqdm import tqdm

from experiments.benchmarks import native_loop
from experiments.benchmarks.devices import spread_environments, use_one_device_per_core
from qos_jax.errors import InputError
from qos_jax.evaluation.metrics import latency_per_token_s, qos_of
from qos_jax.evaluation.statistics import summarise
from qos_jax.io.files import write_whole
from qos_jax.io.provenance import versions
from qos_jax.programs.app import FlagGroup, run_program
from qos_jax.programs.compilation_cache import use_cache
from qos_jax.sim.batching import map_environments
from qos_jax.sim.env import Environment, EnvParams
from qos_jax.sim.replay import ReplayResult
from qos_jax.sim.types import ExpertProfile, RequestTrace
from qos_jax.worlds.build import make
from qos_jax.worlds.presets import PRESETS

_STRETCH = 10_000  # requests of each environment in one call; few enough for sums in float32
_PARTS = 10
_COUNTS = ("finished", "qos", "latency_per_token_s", "violations")


class Served(NamedTuple):
    """The requests of one environment, in order; leaves [..., requests]."""

    gap_s: Any  # to the next one
    prompt_tokens: Any
    output_tokens: Any  # on the expert that served it
    score: Any  # on this expert
    latency_limit_s: Any
    expert: Any


def define(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    group = FlagGroup(values, "endurance")
    group.string("preset", "paper-3", f"World: {', '.join(PRESETS)}.")
    group.number("load", 0.8, "Arrival rate as a fraction of the saturation rate.", 0.01)
    group.number("hours", 168.0, "Simulated time of each environment.", 0.01)
    group.integer("num_envs", 10, "Environments, a multiple of the CPU cores.", 2)
    group.string("out", "endurance.json", "File for the results.")


def main(values: flags.FlagValues) -> None:
    """Runs both, prints how far they are apart and writes the result."""
    use_one_device_per_core()
    if values.num_envs % jax.device_count():
        raise InputError(f"--num_envs={values.num_envs} must be a multiple of the {jax.device_count()} devices")
    env, params = make(values.preset, load=values.load)
    params = params.replace(max_steps_in_episode=np.iinfo(np.int32).max)
    stretches = round(values.hours * 3600 * values.load * float(params.saturation_per_s) / _STRETCH)
    if stretches < _PARTS:
        raise InputError(f"--hours={values.hours} are {stretches * _STRETCH:,} requests, must be {_PARTS * _STRETCH:,}")
    served, float32 = _float32(env, params, values.num_envs, stretches)
    experts = jax.tree.map(np.asarray, params.experts)
    float64 = np.stack([_float64(experts, one) for one in tqdm(served, "float64", values.num_envs)])
    result = {
        "preset": values.preset, "load": values.load, "num_envs": values.num_envs,
        "requests": stretches * _STRETCH * values.num_envs,
        "rows": list(_compared(float32, float64)),
    }  # fmt: skip
    write_whole(values.out, json.dumps({"versions": versions()} | result, indent=1))
    print(f"{result['requests']:,} requests in {values.num_envs} environments of {values.hours:g} h")
    for row in result["rows"]:
        texts = (
            f"{name} {row[name]:.6g} +- {row[name + '_half']:.2g}" for name in ("float32", "float64", "difference")
        )
        print(f"{row['metric']:20} {row['part']:10} {'   '.join(texts)}")


def _float32(env: Environment, params: EnvParams, num_envs: int, stretches: int) -> tuple[Iterator[Served], np.ndarray]:
    """Steps the environments.

    Returns:
      The requests that each of the E environments served, and the counts [E, stretches, counts].
    """
    keys, spread = spread_environments(num_envs)
    simulate = jax.jit(spread(lambda each: map_environments(lambda one: _simulate(env, params, *one), each)))
    state = jax.jit(spread(jax.vmap(lambda key: env.reset(key, params))))(keys)
    served, counts = [], []
    for stretch in tqdm(range(stretches), "float32"):
        state, requests, counted = simulate((jax.vmap(lambda key, i=stretch: jax.random.fold_in(key, i))(keys), state))
        served.append(jax.tree.map(np.asarray, requests))
        counts.append(np.asarray(counted, np.float64))
    each = (jax.tree.map(lambda *parts, i=i: np.concatenate([p[i] for p in parts]), *served) for i in range(num_envs))
    return each, np.stack(counts, 1)


def _simulate(env: Environment, params: EnvParams, key: Array, carry: Any) -> tuple[Any, Served, Array]:
    """Simulates one stretch; also returns the requests served, and sums [counts] over the requests finished."""

    def step(carry: Any, key: Array) -> Any:
        obs, state = carry
        request, expert = state.request, jnp.argmin(obs.experts.running + obs.experts.waiting)
        obs, state, _, _, _, info = env.step(key, state, expert, params)
        served = Served(
            gap_s=info["gap_s"],
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens[expert],
            score=request.score[expert],
            latency_limit_s=request.latency_limit_s,
            expert=expert,
        )
        return (obs, state), (served, jnp.stack([jnp.float32(getattr(info["completions"], name)) for name in _COUNTS]))

    carry, (served, counts) = lax.scan(step, carry, jax.random.split(key, _STRETCH))
    return carry, served, jnp.sum(counts, 0)


def _float64(experts: ExpertProfile, served: Served) -> np.ndarray:
    """Serves the same requests again; returns the counts [stretches, counts], each stretch ending at the same time."""
    passed_s = np.cumsum(served.gap_s, dtype=np.float64)
    arrival_s = np.concatenate([[0.0], passed_s[:-1]])
    shape = len(served.expert), len(experts.step_base_s)
    tokens, score = (np.broadcast_to(each[:, None], shape) for each in (served.output_tokens, served.score))
    trace = RequestTrace(arrival_s, served.prompt_tokens, tokens, score, served.latency_limit_s)
    _, log = native_loop.simulate(experts, trace, served.expert)
    unknown = np.full(shape[1], np.nan)
    run = experts, trace, served.expert, ReplayResult(log, busy_s=unknown, standby_s=unknown, kv_block_s=unknown)
    latency_s = latency_per_token_s(*run)
    ends_s = passed_s[_STRETCH - 1 :: _STRETCH]
    stretch = np.searchsorted(ends_s, log.finish_s)
    counted = ~log.dropped & (stretch < len(ends_s))
    each = np.ones(shape[0]), qos_of(*run), latency_s, ~(latency_s <= served.latency_limit_s)
    return np.stack([np.bincount(stretch[counted], one[counted], minlength=len(ends_s)) for one in each], 1)


def _compared(float32: np.ndarray, float64: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yields means and 95 % intervals over environments, of the whole run and of its parts.

    Args:
      float32: counts [E, stretches, counts] of the environment.
      float64: the same of the replay.
    """
    parts = np.array_split(np.arange(float32.shape[1]), _PARTS)
    names = ["whole", *(f"{i + 1} of {_PARTS}" for i in range(_PARTS))]
    for name, part in zip(names, [np.arange(float32.shape[1]), *parts], strict=True):
        sums = [counts[:, part].sum(1) for counts in (float32, float64)]  # [E, counts]
        requests = len(part) * _STRETCH
        ratios = {
            "finished": [each[:, 0] / requests for each in sums],
            "qos": [each[:, 1] / requests for each in sums],
            "latency_per_token_s": [each[:, 2] / each[:, 0] for each in sums],
            "violation_rate": [each[:, 3] / each[:, 0] for each in sums],
        }
        for metric, (one, other) in ratios.items():
            row: dict[str, Any] = {"metric": metric, "part": name}
            for label, values in (("float32", one), ("float64", other), ("difference", one - other)):
                summary = summarise(values)
                row |= {label: summary["mean"], f"{label}_half": summary["high"] - summary["mean"]}
            yield row


if __name__ == "__main__":
    use_cache()
    run_program(
        define, main, name="python -m experiments.benchmarks.endurance",
        summary="compares the float32 environment with a float64 replay over a simulated week",
    )  # fmt: skip
