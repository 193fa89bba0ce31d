"""Writes one page that plays an episode: queues, memory and decisions of two routers on the same requests.

qos-jax replay-page --preset=paper-3 --routers=shortest_queue,runs/mvr --load=0.9 --out=runs/episode.html

The page needs no network and no server. It shows the requests on each expert, their memory, and for each decision what
every placement was estimated to add to the QoS of all requests.
"""

from __future__ import annotations

import pathlib

import jax
import numpy as np
from absl.flags import FlagValues

from qos_jax.errors import InputError
from qos_jax.evaluation.episode import episode
from qos_jax.evaluation.evaluate import sample_scenarios, scenarios
from qos_jax.io.files import writable_folder, write_whole
from qos_jax.programs.router_flags import check_held_out, routers_named
from qos_jax.programs.world_flags import import_plugins, notes_on, world_config
from qos_jax.report.episode_page import episode_page

_MOST_ROUTERS = 3


def main(values: FlagValues) -> None:
    """Routes the same requests with each router, and writes the page."""
    import_plugins(values, values.routers)
    env, params = (world := world_config(values)).build()
    check_held_out(values.routers, values.seed, [values.seed])
    routers = routers_named(values.routers, env, params)
    notes_on(world, env, params)
    if len(routers) > _MOST_ROUTERS:
        raise InputError(f"--routers= names {len(routers)}, must be at most {_MOST_ROUTERS}, which fit side by side")
    out = pathlib.Path(values.out)
    writable_folder(out.parent)
    sampled = sample_scenarios(params, scenarios(params, [values.load], [values.seed]), values.requests)
    episodes = [episode(env, params, router, sampled) for router in routers]
    about = f"{world.name} at load {values.load:g}, seed {values.seed}: {values.requests} requests, the same for all."
    experts = jax.tree.map(np.asarray, params.experts)
    write_whole(out, episode_page(episodes, experts, env.expert_names, env.spec.engine.block_size, about))
    for each in episodes:
        print(f"{each.router.name}: QoS {each.qos.mean():.3f}, {np.mean(each.assignment < 0):.1%} refused")
    print(f"written: {out}")
