"""Serves a fleet of engines behind one router.

qos-jax gateway --fleet=fleet.toml --router=runs/mvr --out=runs/gateway
qos-jax gateway --demo
qos-jax gateway --report=runs/gateway
qos-jax gateway --fleet=fleet.toml --router=runs/mvr --export=router.npz

Clients speak to it as to OpenAI: http://127.0.0.1:8080/v1. The demo has fake engines and clients, and a page on the
same address. The report is of a run with --shadow. An exported router is a file for --router on a machine that has
neither the training run nor the plug-ins that made it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

import jax
import numpy as np
from absl.flags import FlagValues

from qos_jax.errors import InputError
from qos_jax.fleet.fleet_file import Fleet, Limits, load_fleet
from qos_jax.gateway.decision import Decider, DecisionProgram, decide_in_the_calling_thread, program_of
from qos_jax.gateway.exported import SUFFIX, load_program, save_program
from qos_jax.gateway.level import levels_of
from qos_jax.gateway.records import log_to_stderr
from qos_jax.gateway.settings import Settings
from qos_jax.io.files import writable_folder
from qos_jax.io.provenance import command_of, made_by
from qos_jax.io.text_files import read_text
from qos_jax.predictor.predictor import Predictor, load_predictor
from qos_jax.programs.router_flags import routers_named
from qos_jax.programs.world_flags import import_plugins
from qos_jax.sim.capacity import sample_requests
from qos_jax.worlds.build import make

KEYS_VARIABLE = "QOS_JAX_GATEWAY_KEYS"
_DEMO_WORLD, _DEMO_LOAD = "paper-3", 0.9
_DEMO_ROUTERS = ("impact_greedy", "shortest_queue", "round_robin")


def main(values: FlagValues) -> None:
    """Serves until it is told to end, or reports on what was recorded."""
    try:
        from qos_jax.gateway.serve import fast_loop
        from qos_jax.gateway.shadow import shadow_report
    except ImportError as error:
        raise InputError(f"qos-jax gateway needs {error.name}: pip install 'qos_jax[gateway]'") from error
    if values.report is not None:
        print(shadow_report(values.report).as_text())
        return
    if values.demo == (values.fleet is not None):
        raise InputError("give --fleet=FILE to serve the engines of a file, or --demo to serve fake ones")
    if values.export is not None:
        _export(values)
        return
    decide_in_the_calling_thread()
    with asyncio.Runner(loop_factory=fast_loop()) as runner:
        runner.run(_demo(values) if values.demo else _serve(values))


async def _serve(values: FlagValues) -> None:
    from qos_jax.gateway.app import make_app
    from qos_jax.gateway.core import Gateway
    from qos_jax.gateway.fleet import backends_of
    from qos_jax.gateway.serve import listener, serve_until_signal

    fleet = load_fleet(values.fleet)
    backends, settings = backends_of(fleet), _settings(values, fleet.limits)
    programs = _programs(values, fleet)
    predictor = _predictor(values, len(backends))
    folder = None if values.out is None else writable_folder(values.out)
    gateway = Gateway(
        backends,
        _compiled(programs),
        settings,
        shadow=programs[1].name if values.shadow else None,
        predictor=predictor,
        folder=folder,
    )
    server = listener(make_app(gateway), values.host, values.port, settings, values.drain_s)
    _announce(values, f"{len(backends)} engines")
    await serve_until_signal(server, gateway.drain)


async def _demo(values: FlagValues) -> None:
    from qos_jax.gateway.demo import demo
    from qos_jax.gateway.serve import serve_until_signal

    env, params = make(_DEMO_WORLD, load=_DEMO_LOAD)
    names = [values.router, *_DEMO_ROUTERS, *([values.shadow] if values.shadow else [])]
    import_plugins(values, names)
    routers = routers_named(list(dict.fromkeys(names)), env, params)
    deciders = _compiled([program_of(router, params.experts, env.spec.engine.slots) for router in routers])
    score = sample_requests(params.workload, jax.random.key(0), 1000)[1].score
    rate_per_s = _DEMO_LOAD * float(params.saturation_per_s)
    fakes = demo(
        env.expert_names, params.experts, np.mean(score, 0).tolist(), deciders, _settings(values, Limits()),
        host=values.host, port=values.port, rate_per_s=rate_per_s,
    )  # fmt: skip
    async with fakes as (gateway, server):
        _announce(values, f"fake engines of {_DEMO_WORLD}; open http://{values.host}:{values.port}/")
        await serve_until_signal(server, gateway.drain)


def _export(values: FlagValues) -> None:
    """Writes the router as a file for this fleet."""
    if values.fleet is None or values.shadow is not None or not values.export.endswith(SUFFIX):
        raise InputError(f"--export={values.export}: must end with {SUFFIX}, and needs --fleet=FILE and no --shadow")
    (program,) = _programs(values, load_fleet(values.fleet))
    save_program(values.export, program, made_by(command_of("gateway")))
    print(f"wrote {values.export}: {program.name} for {len(program.kv_blocks)} experts")


def _compiled(programs: Sequence[DecisionProgram]) -> list[Decider]:
    print("compiling for this fleet", file=sys.stderr, flush=True)
    return [Decider(program) for program in programs]


def _announce(values: FlagValues, what: str) -> None:
    log_to_stderr()
    print(f"serving {what} at http://{values.host}:{values.port}/v1", file=sys.stderr, flush=True)


def _settings(values: FlagValues, limits: Limits) -> Settings:
    levels = levels_of(limits)
    return Settings(
        level=levels[0],
        classes=dict(zip(limits.names, levels, strict=False)),
        best_effort=values.on_drop == "best_effort",
        sticky_sessions=values.sessions == "stay",
        scrape_s=values.scrape_s,
        first_token_s=values.first_token_s,
        token_s=values.token_s,
        max_body_bytes=values.max_body_kb * 1024,
        log_texts=values.log_texts,
        api_keys=_keys(values.api_keys_file),
    )


def _keys(path: str | None) -> frozenset[str]:
    """Returns the keys of clients: of a file with one a line, or of the environment with commas between them."""
    texts = os.environ.get(KEYS_VARIABLE, "").split(",") if path is None else read_text(path).split("\n")
    keys = frozenset(text.strip() for text in texts if text.strip())
    if path is not None and not keys:
        raise InputError(f"{path}: holds no key, must hold one a line")
    return keys


def _programs(values: FlagValues, fleet: Fleet) -> list[DecisionProgram]:
    """Returns the program of the router, and that of the shadow if there is one."""
    names = list(dict.fromkeys([values.router, *([values.shadow] if values.shadow else [])]))
    import_plugins(values, names)
    if values.shadow == values.router:
        raise InputError(f"--shadow={values.shadow}: is the router itself; name another one")
    env, params = make(fleet, rate_per_s=1.0)  # a rate, as the load would have the saturation simulated
    routers = [name for name in names if not name.endswith(SUFFIX)]
    made = iter(routers_named(routers, env, params) if routers else [])
    programs = [
        load_program(name, env.spec.num_experts)
        if name.endswith(SUFFIX)
        else program_of(next(made), params.experts, env.spec.engine.slots)
        for name in names
    ]
    if len({program.slots for program in programs}) > 1 or len({program.name for program in programs}) < len(programs):
        raise InputError(f"--router={values.router}, --shadow={values.shadow}: must have different names, and observe "
                         "as many requests; export both for this fleet")  # fmt: skip
    return programs


def _predictor(values: FlagValues, num_experts: int) -> Predictor | None:
    if values.predictor is None:
        return None
    predictor = load_predictor(values.predictor)
    if len(predictor.experts) != num_experts or predictor.encoder is None:
        raise InputError(
            f"--predictor={values.predictor}: predicts for {len(predictor.experts)} experts"
            f"{'' if predictor.encoder else ' from embeddings'}, must predict for {num_experts} from texts"
        )
    return predictor
