"""A reference implementation of the simulator's rules: plain Python, one iteration at a time, independent of the code.

Every implementation must agree with this one, so it is simple: no closed forms, no arrays of slots, float64 times.
Where the rules leave a choice, it follows vLLM's V1 scheduler: memory is allocated by chunk (a request scheduled for
``take`` tokens then holds ``ceil((computed + take) / block_size)`` blocks), but a request is admitted only while the
blocks of everything it must compute are free (``scheduler_reserve_full_isl``).
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np

from qos_jax.sim.types import (
    BLOCK_SIZE_TOKENS,
    ExpertProfile,
    IterationTables,
    RequestLog,
    RequestTrace,
    SharedCards,
)

DROPPED_BY_ROUTER = -1


@dataclasses.dataclass(eq=False)
class Job:
    """One request on its expert."""

    prompt_tokens: int
    output_tokens: int
    shared_tokens: int = 0  # of the prompt, that the prefix cache has of other requests when it is admitted
    generated: int = 0  # tokens emitted
    in_flight: int = 0  # tokens that scheduled iterations will emit
    computed: int = 0  # tokens whose keys and values are cached, or will be after the scheduled iterations
    held: int = 0  # KV blocks
    blocks: list[int] = dataclasses.field(default_factory=list)  # which ones, in order; with a prefix cache only
    first_token_s: float = math.nan
    finish_s: float = math.nan
    preemptions: int = 0
    dropped: bool = False

    @property
    def known(self) -> int:
        """Tokens of the prompt and emitted tokens: all must be computed before the next one is emitted."""
        return self.prompt_tokens + self.generated + self.in_flight


class Batch(NamedTuple):
    """What one iteration computes, as it was scheduled."""

    jobs: list[tuple[Job, bool]]  # requests, and whether each emits a token
    prefill_tokens: int
    decoded_kv_tokens: int  # cached tokens that its decoding requests read
    prompts: list[tuple[int, int]]  # for each request that does not decode, tokens cached before and tokens computed


class Iteration(NamedTuple):
    """One iteration that ran."""

    start_s: float
    duration_s: float
    prefill_tokens: int
    scheduled: int  # requests
    decoded_kv_tokens: int  # cached tokens that its decoding requests read
    blocks_held: int  # while it ran, by all running requests


class ReferenceTables:
    """The measured tables of one expert."""

    def __init__(self, tables: IterationTables, n: int) -> None:
        """Takes row ``n`` of the tables."""
        row = {
            field.name: np.asarray(getattr(tables, field.name), np.float64)[n].tolist()
            for field in dataclasses.fields(tables)
        }
        self.dense = list(zip(row["dense_tokens"], row["dense_s"], strict=True))
        self.head = list(zip(row["head_requests"], row["head_s"], strict=True))
        self.attention = row["attention_s"]
        self.host_s, self.host_per_sequence_s = row["host_s"], row["host_per_sequence_s"]

    def duration(self, batch: Batch) -> float:
        """Seconds of one iteration."""
        requests, decodes = len(batch.jobs), len(batch.jobs) - len(batch.prompts)
        host_s = self.host_s + self.host_per_sequence_s * requests
        kernels_s = on_line(self.dense, batch.prefill_tokens + decodes) + on_line(self.head, requests)
        return kernels_s + self.attention_s(batch, decodes) + host_s

    def attention_s(self, batch: Batch, decodes: int) -> float:
        """Seconds in attention kernels, which take prompts and decoding requests together where there are both."""
        decode, per_decode, per_kv, prompt, mixed, mixed_cached, mixed_per_decode, mixed_per_kv = self.attention[:8]
        early, late, per_pair, per_prefix = self.attention[8:]
        if not batch.prompts:
            return decode + per_decode * decodes + per_kv * batch.decoded_kv_tokens
        prefix = sum(cached for cached, _ in batch.prompts)
        pairs = sum(take * (cached + take / 2) for cached, take in batch.prompts)
        tokens = batch.prefill_tokens
        prompt_s = early * min(tokens, 128) + late * max(tokens - 128, 0) + per_pair * pairs + per_prefix * prefix
        if not decodes:
            return prompt + prompt_s
        together_s = mixed_cached if prefix else mixed
        return together_s + mixed_per_decode * decodes + mixed_per_kv * batch.decoded_kv_tokens + prompt_s


def on_line(points: list[tuple[float, float]], x: float) -> float:
    """The piecewise linear function through the points: constant before the first, its last slope after the last."""
    if x <= points[0][0]:
        return points[0][1]
    pieces = list(itertools.pairwise(points))
    (x0, y0), (x1, y1) = next((piece for piece in pieces if x <= piece[1][0]), pieces[-1])
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


class PrefixCache:
    """Free KV blocks as a queue, and which full block of which request each block still holds."""

    def __init__(self, blocks: int, block_size: int) -> None:
        """All ``blocks`` are free, and the first one is taken first."""
        self.queue, self.block_size = collections.deque(range(blocks)), block_size
        self.content: dict[int, tuple[Job, int]] = {}
        self.place: dict[tuple[Job, int], int] = {}

    def note_full_blocks(self, job: Job, tokens: int) -> None:
        """Notes which full blocks hold the first ``tokens`` of a request; a token must be known for that."""
        for index in range(tokens // self.block_size):
            if (job, index) not in self.place:
                self.content[job.blocks[index]] = job, index
                self.place[job, index] = job.blocks[index]

    def take(self, job: Job, blocks: int) -> None:
        """Takes blocks from the head until the request has ``blocks``; what they held is forgotten."""
        while len(job.blocks) < blocks:
            block = self.queue.popleft()
            if block in self.content:
                del self.place[self.content.pop(block)]
            job.blocks.append(block)

    def put_back(self, job: Job) -> None:
        """Puts the full blocks of a request to the end, its last one first, and the others to the head."""
        self.queue.extendleft(block for block in job.blocks if block not in self.content)
        self.queue.extend(block for block in reversed(job.blocks) if block in self.content)
        job.blocks = []

    def find(self, job: Job) -> int:
        """Takes back a preempted request's full blocks, from the first, as far as nobody has taken them."""
        while (block := self.place.get((job, len(job.blocks)))) is not None:
            self.queue.remove(block)
            job.blocks.append(block)
        return len(job.blocks)


class ReferenceExpert:
    """One expert: a clock at the next iteration boundary, running requests in admission order, a waiting queue."""

    def __init__(self, experts: ExpertProfile, n: int, token_budget: int | None, block_size: int) -> None:
        """Takes expert ``n`` of the profile."""
        self.step_base_s, self.prefill_base_s, self.prefill_per_token_s, self.per_sequence_s, self.per_kv_token_s = (
            float(np.asarray(field, np.float64)[n])
            for field in (
                experts.step_base_s,
                experts.prefill_base_s,
                experts.prefill_per_token_s,
                experts.per_sequence_s,
                experts.per_kv_token_s,
            )
        )
        self.kv_blocks, self.max_running, self.max_waiting = (
            int(np.asarray(field)[n]) for field in (experts.kv_blocks, experts.max_running, experts.max_waiting)
        )
        self.async_scheduling, prefix_cache, budget, self.standby_s = (
            np.broadcast_to(field, np.shape(experts.kv_blocks))[n].item()
            for field in (experts.async_scheduling, experts.prefix_cache, experts.token_budget, experts.standby_s)
        )
        self.token_budget, self.block_size = token_budget or budget, block_size
        self.tables = None if experts.kernels is None else ReferenceTables(experts.kernels, n)
        self.clock_s = -math.inf
        self.free_blocks = self.kv_blocks
        self.cache = PrefixCache(self.kv_blocks, block_size) if prefix_cache else None
        self.running: list[Job] = []
        self.waiting: collections.deque[Job] = collections.deque()
        self.scheduled: Batch | None = None  # with asynchronous scheduling: the iteration that starts next
        self.iterations: list[Iteration] = []

    @property
    def busy_s(self) -> float:
        """Seconds in which an iteration ran."""
        return math.fsum(iteration.duration_s for iteration in self.iterations)

    def standby_until(self, time_s: float) -> float:
        """Seconds of standby up to ``time_s``."""
        start_s, duration_s = np.array([each[:2] for each in self.iterations]).reshape(-1, 2).T
        return standby_between(start_s, start_s + duration_s, self.standby_s, time_s)

    def run_until(self, time_s: float) -> None:
        """Runs every iteration that starts before ``time_s``."""
        while (self.running or self.waiting) and self.clock_s < time_s:
            self.iterate()

    def offer(self, job: Job, time_s: float) -> None:
        """Queues a request that arrives at ``time_s``, or drops it."""
        never_fits = self.blocks_for(job.prompt_tokens + job.output_tokens) > self.kv_blocks
        if never_fits or len(self.waiting) >= self.max_waiting:
            job.dropped = True
            return
        if not self.running and not self.waiting:
            self.clock_s = max(self.clock_s, time_s)
        self.waiting.append(job)

    def iterate(self) -> None:
        """Runs one iteration, which asynchronous scheduling has chosen when the one before it started."""
        batch = self.scheduled or self.schedule()
        self.scheduled = None
        if self.async_scheduling:
            following = self.schedule()
            self.scheduled = following if following.jobs else None
        duration_s = self.duration(batch)
        blocks_held = self.kv_blocks - self.free_blocks
        self.iterations.append(
            Iteration(
                self.clock_s, duration_s, batch.prefill_tokens, len(batch.jobs), batch.decoded_kv_tokens, blocks_held
            )
        )
        self.clock_s += duration_s
        for job, emits in batch.jobs:
            if emits:
                self.emit(job)
        self.running = [job for job in self.running if job.generated < job.output_tokens]
        self.waiting = collections.deque(job for job in self.waiting if job.generated < job.output_tokens)

    def schedule(self) -> Batch:
        """Chooses the requests of an iteration and their tokens; allocates, preempts and admits."""
        chosen: list[tuple[Job, int]] = []
        budget = self.token_budget
        preempted = False

        position = 0
        while position < len(self.running) and budget > 0:
            job = self.running[position]
            if job.generated + job.in_flight == job.output_tokens:  # its last token is under way
                position += 1
                continue
            take = min(job.known - job.computed, budget)
            target = self.blocks_for(job.computed + take)
            while position < len(self.running) and target - job.held > self.free_blocks:
                self.preempt_last()
                preempted = True
            if position == len(self.running):  # it preempted itself
                break
            self.allocate(job, target)
            budget -= take
            chosen.append((job, take))
            position += 1

        while not preempted and self.waiting and budget > 0 and len(self.running) < self.max_running:
            job = self.waiting[0]
            if self.blocks_for(job.known) > self.free_blocks:
                break
            self.find_own_blocks(job)
            take = min(job.known - job.computed, budget)
            self.allocate(job, self.blocks_for(job.computed + take))
            budget -= take
            self.running.append(self.waiting.popleft())
            chosen.append((job, take))
        return self.started(chosen)

    def started(self, chosen: list[tuple[Job, int]]) -> Batch:
        """Counts the chosen tokens as computed."""
        prefill_tokens = decoded_kv_tokens = 0
        jobs, prompts = [], []
        for job, take in chosen:
            if job.generated + job.in_flight >= 1 and job.known - job.computed == 1:
                decoded_kv_tokens += job.computed
            else:
                prefill_tokens += take
                prompts.append((job.computed, take))
            job.computed += take
            if self.cache:
                self.cache.note_full_blocks(job, min(job.computed, job.prompt_tokens + job.generated))
            emits = job.computed == job.known
            jobs.append((job, emits))
            job.in_flight += emits
        return Batch(jobs, prefill_tokens, decoded_kv_tokens, prompts)

    def preempt_last(self) -> None:
        """Preempts the last admitted request; it keeps its tokens but must compute them again."""
        job = self.running.pop()
        self.free(job)
        job.computed = 0
        job.preemptions += 1
        self.waiting.appendleft(job)

    def allocate(self, job: Job, blocks: int) -> None:
        """Gives a request free blocks until it holds ``blocks``."""
        self.free_blocks -= blocks - job.held
        job.held = blocks
        if self.cache:
            self.cache.take(job, blocks)

    def free(self, job: Job) -> None:
        """Frees the blocks of a request."""
        self.free_blocks += job.held
        job.held = 0
        if self.cache:
            self.cache.put_back(job)

    def find_own_blocks(self, job: Job) -> None:
        """Takes back the blocks that the prefix cache still has of a preempted request."""
        if self.cache:
            job.held = self.cache.find(job)
            self.free_blocks -= job.held
            job.computed = job.held * self.block_size
            if not job.preemptions:  # blocks of others are copied, not shared
                job.computed = job.shared_tokens // self.block_size * self.block_size

    def emit(self, job: Job) -> None:
        """Emits one token at the clock."""
        job.generated += 1
        job.in_flight -= 1
        if self.cache and job.blocks:
            self.cache.note_full_blocks(job, job.computed - job.in_flight)
        if job.generated == 1:
            job.first_token_s = self.clock_s
        if job.generated == job.output_tokens:
            job.finish_s = self.clock_s
            self.free(job)

    def duration(self, batch: Batch) -> float:
        """Seconds of one iteration."""
        if self.tables is not None:
            return self.tables.duration(batch)
        prefill_s = self.prefill_base_s + self.prefill_per_token_s * batch.prefill_tokens
        return (
            max(self.step_base_s, prefill_s if batch.prefill_tokens > 0 else 0.0)
            + self.per_sequence_s * len(batch.jobs)
            + self.per_kv_token_s * batch.decoded_kv_tokens
        )

    def blocks_for(self, tokens: int) -> int:
        """Number of blocks that hold ``tokens``."""
        return -(-tokens // self.block_size)


class ReferenceCards:
    """Which LLM is loaded on each card that several share."""

    def __init__(self, cards: SharedCards, fleet: list[ReferenceExpert]) -> None:
        """The first LLM of each card is loaded."""
        self.card = np.asarray(cards.number).tolist()
        self.load_s = np.asarray(cards.load_s, np.float64).tolist()
        self.fleet = fleet
        self.loaded = {card: self.card.index(card) for card in self.card}

    def takes(self, n: int, job: Job, time_s: float) -> bool:
        """Whether expert ``n`` takes the request, for which its LLM is loaded if need be: not if it is leaving."""
        expert, loaded = self.fleet[n], self.loaded[self.card[n]]
        fits = expert.blocks_for(job.prompt_tokens + job.output_tokens) <= expert.kv_blocks
        if n != loaded and fits:
            if expert.running or expert.waiting:
                return False
            ended = copy.deepcopy(self.fleet[loaded])
            ended.run_until(math.inf)
            expert.clock_s = max(ended.clock_s, time_s) + self.load_s[n]
            self.loaded[self.card[n]] = n
        return True


def standby_between(start_s: np.ndarray, end_s: np.ndarray, standby_s: float, until_s: float) -> float:
    """Seconds of standby up to ``until_s``, of an expert that works from each start to its end, in order of start."""
    pauses_s = np.append(start_s[1:], until_s) - np.maximum.accumulate(end_s)
    return np.clip(pauses_s, 0.0, standby_s).sum()


@dataclasses.dataclass
class ReferenceRun:
    """What happened to each request, and on each expert."""

    finish_s: np.ndarray  # [J] s, NaN where dropped
    first_token_s: np.ndarray  # [J] s, NaN where dropped
    preemptions: np.ndarray  # [J]
    dropped: np.ndarray  # [J] bool
    experts: list[ReferenceExpert]  # [N], each with its iterations and busy seconds

    @property
    def log(self) -> RequestLog:
        """The log that every implementation returns."""
        return RequestLog(
            finish_s=self.finish_s,
            first_token_s=self.first_token_s,
            preemptions=self.preemptions,
            dropped=self.dropped,
        )


def replay_reference(
    experts: ExpertProfile,
    trace: RequestTrace,
    assignment: np.ndarray,
    *,
    token_budget: int | None = None,
    block_size: int = BLOCK_SIZE_TOKENS,
) -> ReferenceRun:
    """Serves every request on its expert in ``assignment`` [J]; -1 is a drop by the router."""
    fleet = [ReferenceExpert(experts, n, token_budget, block_size) for n in range(len(np.asarray(experts.kv_blocks)))]
    cards = None if experts.cards is None else ReferenceCards(experts.cards, fleet)
    jobs: list[Job] = []
    for j, n in enumerate(np.asarray(assignment).tolist()):
        job = Job(int(np.asarray(trace.prompt_tokens)[j]), int(np.asarray(trace.output_tokens)[j, n]))
        if trace.shared_tokens is not None:
            job.shared_tokens = int(trace.shared_tokens[j])
        jobs.append(job)
        if n == DROPPED_BY_ROUTER:
            job.dropped = True
            continue
        arrival_s = float(np.asarray(trace.arrival_s)[j])
        fleet[n].run_until(arrival_s)
        if cards is None or cards.takes(n, job, arrival_s):
            fleet[n].offer(job, arrival_s)
        else:
            job.dropped = True
    for expert in fleet:
        expert.run_until(math.inf)
    return ReferenceRun(
        finish_s=np.array([job.finish_s for job in jobs]),
        first_token_s=np.array([job.first_token_s for job in jobs]),
        preemptions=np.array([job.preemptions for job in jobs], np.int32),
        dropped=np.array([job.dropped for job in jobs], bool),
        experts=fleet,
    )
