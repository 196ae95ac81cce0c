"""A stream as somebody else reads it: token splices, and where the compared tokens then stand.

Invariants: the compared ids are identical by construction (a splice cannot change one, and drops
one only where it was told that it may); positions come from the splices, not from counting masks; a
view that does not fit is dropped and counted, never truncated. The student's default view is the
stream itself (:func:`plain`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from agentdistill.records import Author, IntArray, Stream, Trajectory

PLAIN = "plain"
"""Name of the view that is the stream itself."""


@dataclass(frozen=True, slots=True)
class Splice:
    """At token ``at`` of the stream: drop ``drop`` tokens, then insert ``insert``."""

    at: int
    drop: int = 0
    insert: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """Token ids [M] and the positions [R] in them of the stream's rows, in order.

    A row that the view forgot has position 0, where nothing can be predicted.
    """

    ids: IntArray
    positions: IntArray


ViewBuilder = Callable[[Trajectory, int], View | None]
"""(trajectory, number of the stream) → view; None when it cannot be built (masked, counted)."""


def rows_of(stream: Stream) -> IntArray:
    """Positions [R] of the tokens in question: written by the actor, a teacher, or forced."""
    return np.flatnonzero(
        (stream.author != Author.CONTEXT) & (stream.author != Author.REPLAY)
    ).astype(np.int32)


def splice(stream: Stream, splices: Sequence[Splice], *, forget: bool = False) -> View:
    """``stream`` with ``splices`` applied (positions refer to the stream as it is).

    Args:
        stream: to be read otherwise.
        splices: in any order; at the same place, what is inserted comes before what is dropped.
        forget: tokens in question may be dropped, such as a first attempt before a second one;
            those rows are not in this view.

    Raises:
        ValueError: splices overlap or leave the stream, or would drop a token in question
            without ``forget``.
    """
    rows = rows_of(stream)
    kept = np.ones(len(rows), bool)
    pieces: list[IntArray] = []
    shift = np.zeros(len(stream) + 1, np.int64)
    done = 0
    for part in sorted(splices, key=lambda s: (s.at, s.drop)):
        end = part.at + part.drop
        if part.at < done or end < part.at or end > len(stream):
            raise ValueError(f"splice {part.at}:{end} overlaps another or leaves the stream")
        kept[(rows >= part.at) & (rows < end)] = False
        if not forget and not kept.all():
            raise ValueError(f"splice {part.at}:{end} would drop tokens in question")
        pieces += [stream.ids[done : part.at], np.asarray(part.insert, np.int32)]
        shift[end:] += len(part.insert) - part.drop
        done = end
    pieces.append(stream.ids[done:])
    return View(np.concatenate(pieces), np.where(kept, rows + shift[rows], 0).astype(np.int32))


def plain(trajectory: Trajectory, stream: int) -> View:
    """The stream itself."""
    whole = trajectory.streams[stream]
    return View(whole.ids, rows_of(whole))


def within(builder: ViewBuilder, limit: int) -> ViewBuilder:
    """``builder``, but None for views of more than ``limit`` tokens."""

    def build(trajectory: Trajectory, stream: int) -> View | None:
        view = builder(trajectory, stream)
        return view if view is not None and len(view.ids) <= limit else None

    return build
