"""The moves by which the hindsight planner improves the assignment of a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qos_jax.evaluation.hindsight_window import ROUNDING, Window

_PAIRS = 256  # exchanges tried where no single move improves the window


class _Move(NamedTuple):
    gain: float
    changes: tuple[tuple[int, int], ...]  # (request, expert or -1)


class _Gains(NamedTuple):
    """Gains of single moves of the M movable requests; those of an expert are valid until its list changes."""

    value: np.ndarray  # [N] of each expert's list
    leave: np.ndarray  # [M] gain of the request's expert without the request; 0 for dropped requests
    join: np.ndarray  # [M, N + 1] gain of each expert with the request; -inf for its current expert; last: the drop


def improved(window: Window, assignment: np.ndarray) -> np.ndarray:
    """Returns an assignment [W] that none of the tried moves improves."""
    shape = (window.movable, window.num_experts + 1)
    gains = _Gains(np.zeros(window.num_experts), np.zeros(shape[0]), np.zeros(shape))
    changed = np.ones(window.num_experts, bool)
    while True:
        gains = _single_gains(window, assignment, gains, changed)
        moves = _single_moves(gains) or _exchanges(window, assignment, gains)
        chosen = _chosen(window, assignment, moves)
        if not chosen:
            return assignment
        candidates = [_moved(assignment, chosen[: max(len(chosen) // parts, 1)]) for parts in (1, 2, len(chosen))]
        best = candidates[int(np.argmax(window.totals(candidates)))] if len(chosen) > 1 else candidates[0]
        differs = assignment != best
        changed = np.isin(np.arange(window.num_experts), [assignment[differs], best[differs]])
        assignment = best


def _single_gains(window: Window, assignment: np.ndarray, known: _Gains, changed: np.ndarray) -> _Gains:
    """Returns the gains of single moves; only those of experts that have ``changed`` [N] are computed anew."""
    experts, current = np.arange(window.num_experts), assignment[: window.movable]
    assigned = assignment == experts[:, None]
    bases = np.flatnonzero(changed)
    leavers = np.flatnonzero((current >= 0) & changed[current])
    joiners, joined = np.nonzero((current[:, None] != experts) & changed)
    lane = np.concatenate([bases, current[leavers], joined])
    lists = assigned[lane]
    lists[np.arange(len(bases), len(bases) + len(leavers)), leavers] = False
    lists[np.arange(len(bases) + len(leavers), len(lane)), joiners] = True
    values = window.values(lane, lists)

    value, leave, join = known.value.copy(), np.where(current < 0, 0.0, known.leave), known.join.copy()
    value[bases] = values[: len(bases)]
    values -= value[lane]
    leave[leavers] = values[len(bases) : len(bases) + len(leavers)]
    join[joiners, joined] = values[len(bases) + len(leavers) :]
    join[:, -1] = 0.0
    join[np.arange(window.movable), current] = -np.inf
    return _Gains(value, leave, join)


def _single_moves(gains: _Gains) -> list[_Move]:
    """Returns the improving moves of one request."""
    gain = gains.leave[:, None] + gains.join
    drop = len(gains.value)
    return [
        _Move(float(gain[request, expert]), ((int(request), int(expert) if expert < drop else -1),))
        for request, expert in np.argwhere(gain > ROUNDING)
    ]


def _exchanges(window: Window, assignment: np.ndarray, gains: _Gains) -> list[_Move]:
    """Returns the improving moves among the most promising ones in which one request replaces another."""
    current, arrival_s = assignment[: window.movable], window.arrival_s[: window.movable]
    near = np.abs(arrival_s[:, None] - arrival_s) < window.near_s
    new, old = np.nonzero((current[:, None] != current) & (current >= 0) & near)
    expert, before = current[old], current[new]
    # The loss of the other requests by the new one may be compensated by the absence of the old one: half is assumed.
    crowding = window.score[new, expert] - gains.join[new, expert]
    promise = gains.leave[new] + gains.join[new, expert] + gains.leave[old] + gains.join[old].max(1) + crowding / 2
    best = np.argsort(-promise)[:_PAIRS]
    new, old, expert, before = new[best], old[best], expert[best], before[best]
    lists = assignment == expert[:, None]
    lists[np.arange(len(new)), new], lists[np.arange(len(old)), old] = True, False
    replaced = window.values(expert, lists) - gains.value[expert]

    # The old request goes to a third expert, is dropped, or goes to the new one's expert if that was tried as well.
    elsewhere = gains.join[old]
    elsewhere[before >= 0, before[before >= 0]] = -np.inf
    third = elsewhere.argmax(1)
    gain = replaced + gains.leave[new] + elsewhere.max(1)
    third = np.where(third < window.num_experts, third, -1)
    both_ways = np.full((window.movable,) * 2, -np.inf)
    both_ways[new, old] = replaced
    swap = replaced + both_ways[old, new]
    return [
        _Move(float(g), ((int(j), int(n)), (int(k), int(m))))
        for gains_of, place in ((gain, third), (swap, before))
        for g, j, n, k, m in zip(gains_of, new, expert, old, place, strict=True)
        if g > ROUNDING
    ]


def _chosen(window: Window, assignment: np.ndarray, moves: Sequence[_Move]) -> list[_Move]:
    """Returns the best move, and the next best moves that concern other experts or other times."""
    chosen: list[_Move] = []
    occupied: list[tuple[int, float]] = []  # experts and times that the chosen moves concern
    moved: set[int] = set()
    for move in sorted(moves, key=lambda move: -move.gain):
        concerned = [
            (expert, window.arrival_s[request])
            for request, after in move.changes
            for expert in (assignment[request], after)
            if expert >= 0
        ]
        clashes = any(a == b and abs(s - t) < window.apart_s for a, s in concerned for b, t in occupied)
        requests = {request for request, _ in move.changes}
        if not clashes and moved.isdisjoint(requests):
            chosen.append(move)
            occupied += concerned
            moved |= requests
    return chosen


def _moved(assignment: np.ndarray, moves: Sequence[_Move]) -> np.ndarray:
    """Returns the assignment after some moves."""
    assignment = assignment.copy()
    for request, expert in (change for move in moves for change in move.changes):
        assignment[request] = expert
    return assignment
