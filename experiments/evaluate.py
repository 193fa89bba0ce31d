"""Compares routers: every router on the same requests, at several loads and seeds.

python -m experiments.evaluate --preset=paper-3 --routers=all --load=0.3,0.6,0.9,1.1 --seeds=5 --out=runs/paper-3
"""

from __future__ import annotations

import shlex
import sys

from absl import flags
from tqdm import tqdm

from experiments import common
from qos_jax.errors import InputError
from qos_jax.evaluation import Scenario, evaluate
from qos_jax.report import results_of, terminal_table

FLAGS = flags.FLAGS
_DEFAULT_LOADS = (0.3, 0.6, 0.8, 0.9, 1.0, 1.1, 1.3)


def define_flags() -> None:
    """Defines the flags of this program."""
    common.define_world_flags()
    flags.DEFINE_list("routers", ["all"], "Routers to compare: names, or all.")
    flags.DEFINE_list("load", None, "Arrival rates as fractions of the fleet's saturation rate; 0.3 to 1.3 by default.")
    flags.DEFINE_list("rate", None, "Arrival rates in requests/s, instead.")
    flags.DEFINE_integer("requests", 3000, "Requests of each load and seed.", lower_bound=10)
    flags.DEFINE_float("warmup", 0.1, "Leading share of them that the metrics do not count.", 0.0, 0.9)
    flags.DEFINE_integer("seeds", 5, "How many seeds.", lower_bound=1)
    flags.DEFINE_integer("first_seed", 1000, "The first of them; training uses seeds below 1000.", lower_bound=0)
    flags.DEFINE_string("out", "runs/evaluate", "Folder for results.json, report.html and pictures.")


def main(argv: list[str]) -> None:
    """Evaluates, prints a table and writes the report."""
    del argv
    rates = common.numbers("rate", FLAGS.rate)
    loads = common.numbers("load", FLAGS.load)
    if rates and loads:
        raise InputError("--load and --rate are both given: give one")
    env, params, config = common.world_from_flags(rate_per_s=rates[0] if rates else None)
    routers = _routers(env.spec.num_experts)
    saturation_per_s = float(params.saturation_per_s)
    rates = rates or [load * saturation_per_s for load in loads or _DEFAULT_LOADS]
    seeds = range(FLAGS.first_seed, FLAGS.first_seed + FLAGS.seeds)
    scenarios = [Scenario(rate / saturation_per_s, rate, seed) for rate in rates for seed in seeds]
    warmup = int(FLAGS.warmup * FLAGS.requests)
    with tqdm(total=len(routers), unit="router", dynamic_ncols=True) as bar:
        bar.set_description(f"{len(scenarios)} scenarios x {FLAGS.requests} requests")
        runs = evaluate(
            env, params, routers, scenarios, FLAGS.requests, warmup=warmup, progress=lambda _: bar.update()
        )  # fmt: skip
    config |= {"saturation_per_s": saturation_per_s, "rates_per_s": rates, "seeds": list(seeds)}
    config |= {"requests": FLAGS.requests, "warmup": warmup}
    results = results_of(runs, config, shlex.join(["python", "-m", "experiments.evaluate", *sys.argv[1:]]))
    print(terminal_table(results))
