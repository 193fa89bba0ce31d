"""Tells how much traffic each router can take: the largest rate at which a share of the requests meets the limits.

qos-jax capacity --preset=paper-3 --routers=main,runs/mvr --ttft_limit=500ms --out=runs/capacity

Each --what_if changes some flags of the world, as in --what_if="--ttft_limit=300ms" or
--what_if="--experts=alpaca-native@A100,mpt-7b-instruct@A40", and adds a table for the changed world.

Written are the page capacity.md and capacity.json, which holds ``config``, ``command``, ``date`` and ``versions`` as
results.json does, and ``worlds``, the one of the flags first: each its ``label``, ``saturation_per_s`` and
``routers``, a row for each with

* ``rate_per_s``: ``mean``, ``low`` and ``high`` of the capacity [requests/s], and ``rates_per_s`` of each seed;
* ``good_per_s``: answers in time per second at this rate; ``energy_kj_per_1000_good`` and ``cost_per_1000_good``, the
  latter null without prices;
* ``metrics``: means at this rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from absl.flags import FlagValues

from qos_jax.evaluation.capacity import Capacity, capacities
from qos_jax.io.files import writable_folder, write_whole
from qos_jax.io.provenance import command_of, made_by, plain, write_result
from qos_jax.programs.flags import define_world
from qos_jax.programs.progress_bar import ProgressBar
from qos_jax.programs.router_flags import check_held_out, routers_named
from qos_jax.programs.world_flags import import_plugins, notes_on, world_config, world_of_text
from qos_jax.report.capacity_page import capacity_markdown


def main(values: FlagValues) -> None:
    """Searches the capacity of the routers in every world, and writes the numbers and the page."""
    import_plugins(values, values.routers)
    worlds = {"as given": world_config(values)} | {
        text: world_of_text(f"--what_if={text}", text, _given_world(values)) for text in values.what_if
    }
    seeds = list(range(values.first_seed, values.first_seed + values.seeds))
    check_held_out(values.routers, values.first_seed, seeds)
    built = {label: world.build() for label, world in worlds.items()}
    routers = {label: routers_named(values.routers, *each) for label, each in built.items()}
    notes = {label: notes_on(world, *built[label]) for label, world in worlds.items()}
    folder = writable_folder(values.out)
    warmup, done, found = int(values.warmup * values.requests), [], []
    searches = sum(map(len, routers.values()))
    with ProgressBar(searches, "search", f"{len(seeds)} seeds x {values.requests} requests; compiles") as bar:

        def progress(router: Any) -> None:
            done.append(router)
            bar.update(len(done), doing=router.name)

        for label, (env, params) in built.items():
            reached = capacities(
                env, params, routers[label], seeds, values.requests,
                share=values.share, warmup=warmup, progress=progress,
            )  # fmt: skip
            rows = [_row(each, values.price_per_kwh, values.price_per_hour) for each in reached]
            found.append({"label": label, "saturation_per_s": float(params.saturation_per_s), "routers": rows})
    config = worlds["as given"].described() | notes["as given"] | _asked(values, seeds, warmup)
    result = plain({"worlds": found, "config": config} | made_by(command_of("capacity")))
    write_result(folder / "capacity.json", result)
    write_whole(folder / "capacity.md", page := capacity_markdown(result, worlds["as given"].name))
    print(page)
    print(f"written: {folder / 'capacity.md'}")


def _given_world(values: FlagValues) -> list[str]:
    """Returns those flags of the world that were given."""
    world = FlagValues()
    define_world(world)
    return [values[name].serialize() for name in world if values[name].present]


def _row(capacity: Capacity, price_per_kwh: float, price_per_hour: float) -> Mapping[str, Any]:
    has_price = price_per_kwh > 0 or price_per_hour > 0
    return {
        "router": capacity.router.name,
        "kind": capacity.router.kind,
        "rate_per_s": capacity.interval,
        "rates_per_s": capacity.rates_per_s.tolist(),
        "good_per_s": capacity.good_per_s,
        "energy_kj_per_1000_good": capacity.energy_kj_per_1000_good,
        "cost_per_1000_good": capacity.cost_per_1000_good(price_per_kwh, price_per_hour) if has_price else None,
        "metrics": capacity.metrics,
    }


def _asked(values: FlagValues, seeds: Sequence[int], warmup: int) -> dict[str, Any]:
    return {
        "share": values.share,
        "seeds": list(seeds),
        "requests": values.requests,
        "warmup": warmup,
        "price_per_kwh": values.price_per_kwh,
        "price_per_hour": values.price_per_hour,
    }
