"""What follows from a fleet file, expert by expert, and how each number was got. Nothing here imports JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qos_jax.fleet.experts import Expert
from qos_jax.fleet.fleet_file import Fleet
from qos_jax.fleet.scaling import Timing

BATCHES = (1, 8, 32)
PROMPTS = (512, 2048)  # tokens
CONTEXT_TOKENS = 512  # cached tokens of each request of a batch


@dataclasses.dataclass(frozen=True)
class Derived:
    """What follows for one expert, and for its replicas."""

    name: str  # of the first replica
    count: int
    llm: str
    device: str
    step_ms: tuple[float | None, ...]  # at ``BATCHES``; None where so many requests are not in an iteration
    prompt_ms: tuple[float, ...]  # at ``PROMPTS``
    kv_blocks: int
    kv_tokens: int
    kv_from: str
    weights_gb: float
    engine: str
    origin: str  # measured, fitted, scaled or guessed
    basis: str
    step_error: float | None  # relative error to expect
    prompt_error: float | None
    link_delay_ms: float
    idle_w: float
    busy_w: float
    card: str | None = None  # which it shares
    load_s: float = 0.0


def derived(fleet: Fleet) -> list[Derived]:
    """Returns a row for each different expert of a fleet, replicas counted.

    The times are those that the simulator takes: tables of all experts, or the coefficients of all.
    """
    timings = [expert.timing() for expert in fleet.experts]
    if any(timing.kernels is None for timing in timings):
        timings = [dataclasses.replace(timing, kernels=None) for timing in timings]
    kinds: list[Expert] = []
    rows: list[Derived] = []
    for expert, timing in zip(fleet.experts, timings, strict=True):
        kind = dataclasses.replace(expert, label=None, url=None)
        if kind in kinds:
            at = kinds.index(kind)
            rows[at] = dataclasses.replace(rows[at], count=rows[at].count + 1)
        else:
            kinds.append(kind)
            rows.append(_row(expert, timing))
    return rows


def _row(expert: Expert, timing: Timing) -> Derived:
    engine = expert.engine.resolved(expert.device_name, expert.device)
    switches = "async" if engine.async_scheduling else "sync", "prefix cache" if engine.prefix_cache else "no cache"
    kv_tokens = expert.kv_blocks * expert.engine.block_size

    def step_ms(batch: int) -> float | None:
        tokens = batch * CONTEXT_TOKENS
        fits = batch <= expert.engine.max_num_seqs and tokens <= kv_tokens
        return 1e3 * timing.step_s(batch, tokens) if fits else None

    return Derived(
        name=expert.name,
        count=1,
        llm=expert.llm_name,
        device=expert.device_name,
        step_ms=tuple(step_ms(batch) for batch in BATCHES),
        prompt_ms=tuple(1e3 * timing.prompt_s(tokens) for tokens in PROMPTS),
        kv_blocks=expert.kv_blocks,
        kv_tokens=kv_tokens,
        kv_from=_kv_from(expert),
        weights_gb=expert.llm.weights_gb,
        engine=f"{expert.engine.kind}, {expert.engine.max_num_seqs} requests and {engine.token_budget} tokens "
        f"in an iteration, {', '.join(switches)}",
        origin=timing.origin,
        basis=timing.basis,
        step_error=timing.step_error,
        prompt_error=timing.prompt_error,
        link_delay_ms=1e3 * expert.link_delay_s,
        idle_w=expert.device.idle_w,
        busy_w=expert.device.busy_w,
        card=expert.card,
        load_s=expert.load_s,
    )


def _kv_from(expert: Expert) -> str:
    if expert.engine.kv_blocks is not None:
        return "given"
    share = expert.engine.memory_share
    return f"{100 * share:g} % of {expert.device.memory_gb:g} GB less {expert.llm.weights_gb:.2f} GB of weights"


def as_text(fleet: Fleet, rows: Sequence[Derived]) -> str:
    """Returns a table for people, and below it where the numbers are from."""
    heads = ["expert", *(f"step@{batch}" for batch in BATCHES), *(f"prompt@{tokens}" for tokens in PROMPTS),
             "KV blocks", "timing is", "step", "prompt"]  # fmt: skip
    cells = [
        [
            row.name + (f" x {row.count}" if row.count > 1 else ""),
            *("-" if value is None else f"{value:.1f}" for value in row.step_ms),
            *(f"{value:.0f}" for value in row.prompt_ms),
            f"{row.kv_blocks:,}",
            row.origin,
            _percent(row.step_error),
            _percent(row.prompt_error),
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [heads, *cells]) for column in range(len(heads))]
    lines = [f"{fleet.name}: {sum(row.count for row in rows)} experts ({fleet.path})", ""]
    for line in [heads, *cells]:
        rest = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *rest]))
    lines += ["", f"step@B: ms of an iteration that decodes B requests of {CONTEXT_TOKENS} cached tokens each; -: they "
              "do not fit", "prompt@P: ms of an iteration that computes one prompt of P tokens",
              "step, prompt: relative error to expect of these times", ""]  # fmt: skip
    for row in rows:
        lines.append(f"{row.name}: {row.origin} from {row.basis}")
        lines.append(f"    KV: {row.kv_blocks:,} blocks, {row.kv_tokens:,} tokens: {row.kv_from}")
        link = f"; link {row.link_delay_ms:g} ms" if row.link_delay_ms else ""
        card = f"; shares {row.card}, loaded in {row.load_s:g} s" if row.card else ""
        lines.append(f"    engine: {row.engine}; power {row.idle_w:g} to {row.busy_w:g} W{link}{card}")
    return "\n".join(lines)


def _percent(error: float | None) -> str:
    return "unknown" if error is None else f"{100 * error:.1f} %"
