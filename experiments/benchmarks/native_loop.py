"""The simulator's rules as one scalar compiled loop: what a CPU core does with them, for comparison in benchmarks.

It is meant as a fair baseline and not a straw man: numba machine code, queues in flat arrays, and the same closed-form
jump over stretches in which the batch only decodes. An arrival elsewhere interrupts such a stretch at a cost that does
not grow with the batch: the requests' counters are settled when the stretch ends. The shortest-queue router is compiled
in, so that no Python runs between requests. It was written from the rules, apart from the simulator, and is held to the
plain-Python reference of the tests. numba is needed only here: it comes with the extra ``dev``.

On one expert requests start in arrival order and are preempted from the tail. So ``queue`` lists the accepted requests
in that order, waiting are ``queue[head:tail]``, to admit is to step ``head`` forward and to preempt is to step it back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from jax.typing import ArrayLike

from qos_jax.sim.types import BLOCK_SIZE_TOKENS, TOKEN_BUDGET, ExpertProfile, RequestLog, RequestTrace

STEP_BASE_S, PREFILL_BASE_S, PREFILL_PER_TOKEN_S, PER_SEQUENCE_S, PER_KV_TOKEN_S = range(5)
KV_BLOCKS, MAX_RUNNING, MAX_WAITING, HEAD, TAIL, RUNNING, FREE, STEPS_LEFT, STEPS_DONE, KV_TOKENS = range(10)
PROMPT, OUTPUT, GENERATED, COMPUTED, BLOCKS, TAKE, PREEMPTIONS = range(7)
FINISH_S, FIRST_TOKEN_S = range(2)
FOREVER = 1 << 60  # iterations


class World(NamedTuple):
    """Everything the loop reads and writes; the columns of the tables are named above."""

    cost: np.ndarray  # [N, 5] s
    state: np.ndarray  # [N, 10] limits, queue ends, batch size, free blocks, and the stretch of pure decoding under way
    clock_s: np.ndarray  # [N] the next iteration boundary
    queue: np.ndarray  # [N, J] accepted requests in arrival order
    batch: np.ndarray  # [N, max_running] running requests in arrival order
    jobs: np.ndarray  # [J, 7] tokens, blocks, preemptions
    times: np.ndarray  # [J, 2] s
    dropped: np.ndarray  # [J] bool
    new_blocks: np.ndarray  # [block_size] scratch
    token_budget: int
    block_size: int


def simulate(
    experts: ExpertProfile,
    trace: RequestTrace,
    assignment: np.ndarray | None = None,
    *,
    token_budget: int = TOKEN_BUDGET,
    block_size: int = BLOCK_SIZE_TOKENS,
) -> tuple[np.ndarray, RequestLog]:
    """Serves a trace; without an ``assignment`` [J], each request joins the shortest queue (running + waiting).

    Ties go to the lowest index; a request that its expert cannot take is dropped. Input is not checked.

    Returns:
        The expert [J] of each request (-1 where the router dropped it), and what happened to it.
    """
    output = np.asarray(trace.output_tokens).astype(np.int64)
    n_requests, n_experts = output.shape
    cost = _columns(
        experts.step_base_s,
        experts.prefill_base_s,
        experts.prefill_per_token_s,
        experts.per_sequence_s,
        experts.per_kv_token_s,
    )
    limits = _columns(experts.kv_blocks, experts.max_running, experts.max_waiting)
    state = np.zeros((n_experts, 10), np.int64)
    state[:, : limits.shape[1]] = limits
    state[:, FREE] = state[:, KV_BLOCKS]
    world = World(
        cost=cost,
        state=state,
        clock_s=np.full(n_experts, -np.inf),
        queue=np.empty((n_experts, n_requests), np.int64),
        batch=np.empty((n_experts, min(n_requests, state[:, MAX_RUNNING].max())), np.int64),
        jobs=np.zeros((n_requests, 7), np.int64),
        times=np.full((n_requests, 2), np.nan),
        dropped=np.zeros(n_requests, bool),
        new_blocks=np.zeros(block_size, np.int64),
        token_budget=token_budget,
        block_size=block_size,
    )
    world.jobs[:, PROMPT] = np.asarray(trace.prompt_tokens)
    expert = np.full(n_requests, -1) if assignment is None else np.array(assignment, np.int64)
    _run(world, np.asarray(trace.arrival_s, np.float64), output, expert, assignment is None)
    log = RequestLog(
        finish_s=world.times[:, FINISH_S],
        first_token_s=world.times[:, FIRST_TOKEN_S],
        preemptions=world.jobs[:, PREEMPTIONS].astype(np.int32),
        dropped=world.dropped,
    )
    return expert, log


def _columns(*fields: ArrayLike) -> np.ndarray:
    return np.stack([np.asarray(field, np.float64) for field in fields], axis=1)


def _compiled(function: Any) -> Any:
    # Nothing is allocated in the loop, so arrays need no reference counts: to count them took two thirds of the time.
    options: dict[str, Any] = {"cache": True, "_nrt": False}
    return numba.njit(**options)(function)


@_compiled
def _run(w: World, arrival_s: np.ndarray, output: np.ndarray, expert: np.ndarray, shortest_queue: bool) -> None:
    """Serves every request; fills ``expert`` where the router is the shortest queue."""
    n_experts = len(w.clock_s)
    for j in range(len(arrival_s)):
        first, last = (0, n_experts) if shortest_queue else (max(expert[j], 0), expert[j] + 1)
        for n in range(first, last):
            _run_until(w, n, arrival_s[j])
        if shortest_queue:
            expert[j] = _shortest_queue(w)
        w.dropped[j] = expert[j] < 0 or not _offer(w, expert[j], j, arrival_s[j], output[j, expert[j]])
    for n in range(n_experts):
        _run_until(w, n, np.inf)


@_compiled
def _shortest_queue(w: World) -> int:
    """Returns the expert with the fewest requests."""
    best, fewest = 0, np.iinfo(np.int64).max
    for n in range(len(w.clock_s)):
        requests = w.state[n, RUNNING] + w.state[n, TAIL] - w.state[n, HEAD]
        if requests < fewest:
            best, fewest = n, requests
    return best


@_compiled
def _offer(w: World, n: int, j: int, time_s: float, output_tokens: int) -> bool:
    """Queues request ``j`` on expert ``n``; says whether it could."""
    waiting = w.state[n, TAIL] - w.state[n, HEAD]
    blocks = _blocks_for(w, w.jobs[j, PROMPT] + output_tokens)
    if waiting >= w.state[n, MAX_WAITING] or blocks > w.state[n, KV_BLOCKS]:
        return False
    if waiting == 0:
        _settle(w, n)  # it may be admitted next, so the stretch ends here
        if w.state[n, RUNNING] == 0:
            w.clock_s[n] = max(w.clock_s[n], time_s)
    w.jobs[j, OUTPUT] = output_tokens
    w.queue[n, w.state[n, TAIL]] = j
    w.state[n, TAIL] += 1
    return True


@_compiled
def _run_until(w: World, n: int, until_s: float) -> None:
    """Runs every iteration of one expert that starts before ``until_s``."""
    while w.clock_s[n] < until_s and (w.state[n, RUNNING] > 0 or w.state[n, HEAD] < w.state[n, TAIL]):
        if w.state[n, STEPS_LEFT] == 0:
            _find_stretch(w, n)
        if w.state[n, STEPS_LEFT] == 0:
            _iterate(w, n)
            continue
        _decode(w, n, until_s)
        if w.state[n, STEPS_LEFT] == 0:
            _settle(w, n)


@_compiled
def _find_stretch(w: World, n: int) -> None:
    """Counts the iterations in which exactly the running requests decode, nothing is admitted and nothing preempted.

    They end with the next completion or before the next lack of memory.
    """
    running = w.state[n, RUNNING]
    if running == 0 or running > w.token_budget or _may_admit(w, n, w.token_budget - running):
        return
    steps, kv_tokens = FOREVER, 0
    w.new_blocks[:] = 0  # by iteration: the requests whose last block is then full
    for i in range(running):
        j = w.batch[n, i]
        if w.jobs[j, GENERATED] == 0 or _missing(w, j) != 1:
            return
        steps = min(steps, w.jobs[j, OUTPUT] - w.jobs[j, GENERATED])
        kv_tokens += w.jobs[j, COMPUTED]
        w.new_blocks[w.jobs[j, BLOCKS] * w.block_size - w.jobs[j, COMPUTED]] += 1
    fitting = w.state[n, FREE] // running * w.block_size  # each request takes one block in so many iterations
    left = w.state[n, FREE] % running
    for blocks in w.new_blocks:
        left -= blocks
        if left < 0:
            break
        fitting += 1
    w.state[n, STEPS_LEFT], w.state[n, KV_TOKENS] = min(steps, fitting), kv_tokens


@_compiled
def _decode(w: World, n: int, until_s: float) -> None:
    """Jumps over the iterations of the stretch that start before ``until_s``."""
    growth_s = w.cost[n, PER_KV_TOKEN_S] * w.state[n, RUNNING]
    first_s = w.cost[n, STEP_BASE_S] + w.cost[n, PER_SEQUENCE_S] * w.state[n, RUNNING]
    first_s += w.cost[n, PER_KV_TOKEN_S] * w.state[n, KV_TOKENS]
    gap_s = until_s - w.clock_s[n]
    steps = w.state[n, STEPS_LEFT]
    if _stretch_s(steps - 1, first_s, growth_s) >= gap_s:
        slope_s = first_s - growth_s / 2  # growth_s / 2 steps^2 + slope_s steps = gap_s
        root = 2 * gap_s / (slope_s + np.sqrt(slope_s * slope_s + 2 * growth_s * gap_s))
        steps = min(max(int(root), 1), steps - 1)
        while steps > 1 and _stretch_s(steps - 1, first_s, growth_s) >= gap_s:  # the root was rounded
            steps -= 1
        while _stretch_s(steps, first_s, growth_s) < gap_s:
            steps += 1
    w.clock_s[n] += _stretch_s(steps, first_s, growth_s)
    w.state[n, STEPS_LEFT] -= steps
    w.state[n, STEPS_DONE] += steps
    w.state[n, KV_TOKENS] += steps * w.state[n, RUNNING]


@_compiled
def _stretch_s(steps: int, first_s: float, growth_s: float) -> float:
    """Seconds of so many iterations that each take ``growth_s`` longer than the one before."""
    return steps * first_s + growth_s * (steps * (steps - 1) // 2)


@_compiled
def _settle(w: World, n: int) -> None:
    """Ends a stretch: gives its tokens and blocks to the requests, and lets go of those that are complete."""
    steps = w.state[n, STEPS_DONE]
    w.state[n, STEPS_LEFT] = w.state[n, STEPS_DONE] = 0
    if steps == 0:
        return
    kept = 0
    for i in range(w.state[n, RUNNING]):
        j = w.batch[n, i]
        w.jobs[j, GENERATED] += steps
        w.jobs[j, COMPUTED] += steps
        if w.jobs[j, GENERATED] == w.jobs[j, OUTPUT]:
            _finish(w, n, j)
        else:
            _hold(w, n, j, w.jobs[j, COMPUTED])
            w.batch[n, kept] = j
            kept += 1
    w.state[n, RUNNING] = kept


@_compiled
def _iterate(w: World, n: int) -> None:
    """Runs one iteration of any kind."""
    scheduled = _schedule(w, n)
    prefill_tokens = kv_tokens = 0
    for i in range(scheduled):
        j = w.batch[n, i]
        if w.jobs[j, GENERATED] > 0 and _missing(w, j) == 1:
            kv_tokens += w.jobs[j, COMPUTED]
        else:
            prefill_tokens += w.jobs[j, TAKE]
    compute_s = w.cost[n, STEP_BASE_S]
    if prefill_tokens > 0:
        compute_s = max(compute_s, w.cost[n, PREFILL_BASE_S] + w.cost[n, PREFILL_PER_TOKEN_S] * prefill_tokens)
    w.clock_s[n] += compute_s + w.cost[n, PER_SEQUENCE_S] * scheduled + w.cost[n, PER_KV_TOKEN_S] * kv_tokens
    _emit(w, n, scheduled)


@_compiled
def _emit(w: World, n: int, scheduled: int) -> None:
    """Ends an iteration at the clock: counts its tokens, and lets go of the requests that are complete."""
    kept = 0
    for i in range(w.state[n, RUNNING]):
        j = w.batch[n, i]
        w.jobs[j, COMPUTED] += w.jobs[j, TAKE] if i < scheduled else 0
        if _missing(w, j) == 0:
            w.jobs[j, GENERATED] += 1
            if w.jobs[j, GENERATED] == 1:
                w.times[j, FIRST_TOKEN_S] = w.clock_s[n]
        if w.jobs[j, GENERATED] == w.jobs[j, OUTPUT]:
            _finish(w, n, j)
        else:
            w.batch[n, kept] = j
            kept += 1
    w.state[n, RUNNING] = kept


@_compiled
def _schedule(w: World, n: int) -> int:
    """Gives tokens and memory to a prefix of the batch, preempts from its tail, admits; returns the prefix's length."""
    scheduled, budget, preempted = 0, w.token_budget, False
    while scheduled < w.state[n, RUNNING] and budget > 0:
        j = w.batch[n, scheduled]
        take = min(_missing(w, j), budget)
        new_blocks = _blocks_for(w, w.jobs[j, COMPUTED] + take) - w.jobs[j, BLOCKS]
        while new_blocks > w.state[n, FREE] and w.state[n, RUNNING] > scheduled:
            _preempt_last(w, n)
            preempted = True
        if w.state[n, RUNNING] == scheduled:  # it preempted itself
            break
        _take(w, n, j, take)
        budget -= take
        scheduled += 1
    while not preempted and _may_admit(w, n, budget):
        j = w.queue[n, w.state[n, HEAD]]
        take = min(_missing(w, j), budget)
        _take(w, n, j, take)
        budget -= take
        scheduled += 1
        w.batch[n, w.state[n, RUNNING]] = j
        w.state[n, RUNNING] += 1
        w.state[n, HEAD] += 1
    return scheduled


@_compiled
def _may_admit(w: World, n: int, budget_left: int) -> bool:
    """Says whether the head of the queue could start."""
    if w.state[n, HEAD] == w.state[n, TAIL] or w.state[n, RUNNING] >= w.state[n, MAX_RUNNING] or budget_left <= 0:
        return False
    return _blocks_for(w, _missing(w, w.queue[n, w.state[n, HEAD]])) <= w.state[n, FREE]


@_compiled
def _preempt_last(w: World, n: int) -> None:
    """Takes the last admitted request off the GPU: back to its old place in the queue, which is still its own."""
    w.state[n, RUNNING] -= 1
    w.state[n, HEAD] -= 1
    j = w.batch[n, w.state[n, RUNNING]]
    w.queue[n, w.state[n, HEAD]] = j
    w.jobs[j, COMPUTED] = 0
    w.jobs[j, PREEMPTIONS] += 1
    _hold(w, n, j, 0)


@_compiled
def _take(w: World, n: int, j: int, tokens: int) -> None:
    """Schedules a request for so many tokens."""
    w.jobs[j, TAKE] = tokens
    _hold(w, n, j, w.jobs[j, COMPUTED] + tokens)


@_compiled
def _finish(w: World, n: int, j: int) -> None:
    """Ends a request at the clock."""
    w.times[j, FINISH_S] = w.clock_s[n]
    _hold(w, n, j, 0)


@_compiled
def _hold(w: World, n: int, j: int, tokens: int) -> None:
    """Changes the memory of a request to what so many tokens need."""
    blocks = _blocks_for(w, tokens)
    w.state[n, FREE] += w.jobs[j, BLOCKS] - blocks
    w.jobs[j, BLOCKS] = blocks


@_compiled
def _missing(w: World, j: int) -> int:
    """Tokens of a request that exist and are not computed."""
    return w.jobs[j, PROMPT] + w.jobs[j, GENERATED] - w.jobs[j, COMPUTED]


@_compiled
def _blocks_for(w: World, tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return (tokens + w.block_size - 1) // w.block_size
