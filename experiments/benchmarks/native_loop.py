"""The simulator's rules as one compiled scalar loop: the speed of one CPU core, for comparison in benchmarks.

The baseline is a fair one: numba machine code, queues in flat arrays, and the same closed-form jump over stretches in
which the batch only decodes. An arrival interrupts such a stretch on another expert at a cost independent of the batch:
the counters of the requests are settled when the stretch ends. The shortest-queue router is compiled in, so no Python
runs between requests. The loop was written from the rules, not from the simulator's code, and tests compare it with the
plain-Python reference. It alone needs numba, which comes with the extra ``dev``.

The requests of an expert start in arrival order and are preempted from the tail. So ``queue`` lists the accepted
requests in that order, ``queue[head:tail]`` are the waiting ones, admission increments ``head`` and preemption
decrements it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from jax.typing import ArrayLike

from qos_jax.sim.types import BLOCK_SIZE_TOKENS, ExpertProfile, RequestLog, RequestTrace

STEP_BASE_S, PREFILL_BASE_S, PREFILL_PER_TOKEN_S, PER_SEQUENCE_S, PER_KV_TOKEN_S = range(5)
KV_BLOCKS, MAX_RUNNING, MAX_WAITING, HEAD, TAIL, RUNNING, FREE, STEPS_LEFT, STEPS_DONE, KV_TOKENS = range(10)
PROMPT, OUTPUT, GENERATED, COMPUTED, BLOCKS, TAKE, PREEMPTIONS = range(7)
FINISH_S, FIRST_TOKEN_S = range(2)
FOREVER = 1 << 60  # iterations


class LoopState(NamedTuple):
    """Everything that the loop reads and writes; the constants above name the columns."""

    cost: np.ndarray  # [N, 5] s
    state: np.ndarray  # [N, 10] limits, queue ends, batch size, free blocks, and the current stretch of pure decoding
    clock_s: np.ndarray  # [N] the next iteration boundary
    queue: np.ndarray  # [N, J] accepted requests in arrival order
    batch: np.ndarray  # [N, max_running] running requests in arrival order
    jobs: np.ndarray  # [J, 7] tokens, blocks, preemptions
    times: np.ndarray  # [J, 2] s
    dropped: np.ndarray  # [J] bool
    new_blocks: np.ndarray  # [block_size] scratch
    token_budget: np.ndarray  # [N] tokens
    block_size: int


def simulate(
    experts: ExpertProfile,
    trace: RequestTrace,
    assignment: np.ndarray | None = None,
    *,
    block_size: int = BLOCK_SIZE_TOKENS,
) -> tuple[np.ndarray, RequestLog]:
    """Serves a trace; a request that its expert cannot take is dropped. Input is not checked.

    Scheduling is synchronous and nothing is found in a prefix cache, whatever the profile says.

    Args:
      experts: profile of the N experts.
      trace: J requests.
      assignment: [J] expert of each request, -1 for a drop. Without it each request joins the shortest queue (running +
        waiting); ties go to the lowest index.
      block_size: tokens of a KV block.

    Returns:
      The expert [J] of each request, -1 for a drop, and the log of the requests.
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
    w = LoopState(
        cost=cost,
        state=state,
        clock_s=np.full(n_experts, -np.inf),
        queue=np.empty((n_experts, n_requests), np.int64),
        batch=np.empty((n_experts, min(n_requests, state[:, MAX_RUNNING].max())), np.int64),
        jobs=np.zeros((n_requests, 7), np.int64),
        times=np.full((n_requests, 2), np.nan),
        dropped=np.zeros(n_requests, bool),
        new_blocks=np.zeros(block_size, np.int64),
        token_budget=np.broadcast_to(experts.token_budget, n_experts).astype(np.int64),
        block_size=block_size,
    )
    w.jobs[:, PROMPT] = np.asarray(trace.prompt_tokens)
    expert = np.full(n_requests, -1) if assignment is None else np.array(assignment, np.int64)
    _run(w, np.asarray(trace.arrival_s, np.float64), output, expert, assignment is None)
    log = RequestLog(
        finish_s=w.times[:, FINISH_S],
        first_token_s=w.times[:, FIRST_TOKEN_S],
        preemptions=w.jobs[:, PREEMPTIONS].astype(np.int32),
        dropped=w.dropped,
    )
    return expert, log


def _columns(*fields: ArrayLike) -> np.ndarray:
    return np.stack([np.asarray(field, np.float64) for field in fields], axis=1)


def _compiled(function: Any) -> Any:
    # The loop allocates nothing, so arrays need no reference counts, which took two thirds of the time.
    options: dict[str, Any] = {"cache": True, "_nrt": False}
    return numba.njit(**options)(function)


@_compiled
def _run(w: LoopState, arrival_s: np.ndarray, output: np.ndarray, expert: np.ndarray, shortest_queue: bool) -> None:
    """Serves every request and, with the shortest-queue router, fills ``expert``."""
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
def _shortest_queue(w: LoopState) -> int:
    """Returns the expert with the fewest requests."""
    best, fewest = 0, np.iinfo(np.int64).max
    for n in range(len(w.clock_s)):
        requests = w.state[n, RUNNING] + w.state[n, TAIL] - w.state[n, HEAD]
        if requests < fewest:
            best, fewest = n, requests
    return best


@_compiled
def _offer(w: LoopState, n: int, j: int, time_s: float, output_tokens: int) -> bool:
    """Queues request ``j`` on expert ``n``; False if the expert cannot take it."""
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
def _run_until(w: LoopState, n: int, until_s: float) -> None:
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
def _find_stretch(w: LoopState, n: int) -> None:
    """Counts the next iterations in which the running requests decode and none is admitted or preempted.

    The stretch ends with the next completion, or before memory runs out.
    """
    running = w.state[n, RUNNING]
    if running == 0 or running > w.token_budget[n] or _may_admit(w, n, w.token_budget[n] - running):
        return
    steps, kv_tokens = FOREVER, 0
    w.new_blocks[:] = 0  # [iteration] number of requests whose last block is full then
    for i in range(running):
        j = w.batch[n, i]
        if w.jobs[j, GENERATED] == 0 or _missing(w, j) != 1:
            return
        steps = min(steps, w.jobs[j, OUTPUT] - w.jobs[j, GENERATED])
        kv_tokens += w.jobs[j, COMPUTED]
        w.new_blocks[w.jobs[j, BLOCKS] * w.block_size - w.jobs[j, COMPUTED]] += 1
    fitting = w.state[n, FREE] // running * w.block_size  # a request takes one block every block_size iterations
    left = w.state[n, FREE] % running
    for blocks in w.new_blocks:
        left -= blocks
        if left < 0:
            break
        fitting += 1
    w.state[n, STEPS_LEFT], w.state[n, KV_TOKENS] = min(steps, fitting), kv_tokens


@_compiled
def _decode(w: LoopState, n: int, until_s: float) -> None:
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
        while steps > 1 and _stretch_s(steps - 1, first_s, growth_s) >= gap_s:  # corrects rounding of the root
            steps -= 1
        while _stretch_s(steps, first_s, growth_s) < gap_s:
            steps += 1
    w.clock_s[n] += _stretch_s(steps, first_s, growth_s)
    w.state[n, STEPS_LEFT] -= steps
    w.state[n, STEPS_DONE] += steps
    w.state[n, KV_TOKENS] += steps * w.state[n, RUNNING]


@_compiled
def _stretch_s(steps: int, first_s: float, growth_s: float) -> float:
    """Returns the seconds of ``steps`` iterations, each ``growth_s`` longer than the one before."""
    return steps * first_s + growth_s * (steps * (steps - 1) // 2)


@_compiled
def _settle(w: LoopState, n: int) -> None:
    """Ends a stretch: its tokens and blocks go to the requests, and complete requests leave."""
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
def _iterate(w: LoopState, n: int) -> None:
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
def _emit(w: LoopState, n: int, scheduled: int) -> None:
    """Ends an iteration at the clock: counts its tokens; complete requests leave."""
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
def _schedule(w: LoopState, n: int) -> int:
    """Gives tokens and memory to a prefix of the batch, preempts from its tail, admits; returns the prefix's length."""
    scheduled, budget, preempted = 0, w.token_budget[n], False
    while scheduled < w.state[n, RUNNING] and budget > 0:
        j = w.batch[n, scheduled]
        take = min(_missing(w, j), budget)
        new_blocks = _blocks_for(w, w.jobs[j, COMPUTED] + take) - w.jobs[j, BLOCKS]
        while new_blocks > w.state[n, FREE] and w.state[n, RUNNING] > scheduled:
            _preempt_last(w, n)
            preempted = True
        if w.state[n, RUNNING] == scheduled:  # request j has preempted itself
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
def _may_admit(w: LoopState, n: int, budget_left: int) -> bool:
    """Returns whether the head of the queue could start."""
    if w.state[n, HEAD] == w.state[n, TAIL] or w.state[n, RUNNING] >= w.state[n, MAX_RUNNING] or budget_left <= 0:
        return False
    return _blocks_for(w, _missing(w, w.queue[n, w.state[n, HEAD]])) <= w.state[n, FREE]


@_compiled
def _preempt_last(w: LoopState, n: int) -> None:
    """Moves the last admitted request from the GPU back to its old place in the queue, which is still free."""
    w.state[n, RUNNING] -= 1
    w.state[n, HEAD] -= 1
    j = w.batch[n, w.state[n, RUNNING]]
    w.queue[n, w.state[n, HEAD]] = j
    w.jobs[j, COMPUTED] = 0
    w.jobs[j, PREEMPTIONS] += 1
    _hold(w, n, j, 0)


@_compiled
def _take(w: LoopState, n: int, j: int, tokens: int) -> None:
    """Schedules ``tokens`` of a request in this iteration."""
    w.jobs[j, TAKE] = tokens
    _hold(w, n, j, w.jobs[j, COMPUTED] + tokens)


@_compiled
def _finish(w: LoopState, n: int, j: int) -> None:
    """Ends a request at the clock."""
    w.times[j, FINISH_S] = w.clock_s[n]
    _hold(w, n, j, 0)


@_compiled
def _hold(w: LoopState, n: int, j: int, tokens: int) -> None:
    """Resizes the memory of a request to the blocks of ``tokens``."""
    blocks = _blocks_for(w, tokens)
    w.state[n, FREE] += w.jobs[j, BLOCKS] - blocks
    w.jobs[j, BLOCKS] = blocks


@_compiled
def _missing(w: LoopState, j: int) -> int:
    """Returns the tokens of a request that exist but are not computed."""
    return w.jobs[j, PROMPT] + w.jobs[j, GENERATED] - w.jobs[j, COMPUTED]


@_compiled
def _blocks_for(w: LoopState, tokens: int) -> int:
    """Returns the blocks that hold ``tokens``."""
    return (tokens + w.block_size - 1) // w.block_size
