"""Flat columns over the tokens in question of a batch of trajectories; no padding.

Shape suffixes used throughout the numeric modules: N rows of the table (tokens in question),
V vocabulary, H hidden size, K top-k, B trajectories, S streams.

Invariants
----------
* A row is one token that an actor, a teacher or a forced opening wrote; it appears once, however
  often later prompts repeat it. Its place (trajectory, group, stream, turn, step, position) and its
  token id are facts.
* ``step`` numbers the maximal runs of such tokens within a trajectory: what SOD calls a step.
* Columns that scorers add are named ``what/scorer`` for the plain view and ``what/scorer@view``
  otherwise: ``logp/sampler``, ``logp/old``, ``logp/teacher``, ``hidden/teacher``. Full logits are
  never stored.
* A view that could not be built, or that forgot a row, leaves it out of ``valid(view)``; views that
  could not be built are counted, not cut.
* A view shows the very tokens of its rows; one that does not is refused.
* Reductions go by index column, never by tensor row and never by a Python loop over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agentdistill.records import Author, FloatArray, Trajectory
from agentdistill.views import PLAIN, View, ViewBuilder, plain, rows_of

Indices = npt.NDArray[Any]


def column(what: str, scorer: str, view: str = PLAIN) -> str:
    """Name of the column ``what`` of ``scorer`` over ``view``."""
    return f"{what}/{scorer}" if view == PLAIN else f"{what}/{scorer}@{view}"


@dataclass(slots=True, eq=False)
class Table:
    """See the module docstring.

    Attributes:
        trajectories: what the rows come from [B].
        streams: (number of the trajectory, number of its stream) of each stream [S].
        offsets: first row of each stream, and the number of rows at the end [S + 1].
        index: integer columns [N]: trajectory, group, stream, turn, step, position, token,
            author, kind.
        columns: everything that was computed or scored, [N] or [N, …].
        views: per name, one view or None per stream [S].
        in_view: per view, whether it has each row [N], bool.
    """

    trajectories: list[Trajectory]
    streams: list[tuple[int, int]]
    offsets: Tensor
    index: dict[str, Tensor]
    columns: dict[str, Tensor] = field(default_factory=dict)
    views: dict[str, list[View | None]] = field(default_factory=dict)
    in_view: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.offsets[-1])

    def __getitem__(self, name: str) -> Tensor:
        """The column ``name``, computed or index."""
        return self.columns[name] if name in self.columns else self.index[name]

    def __setitem__(self, name: str, values: Tensor) -> None:
        """Add a column; it is detached, and its first dimension must be N."""
        if values.shape[0] != len(self):
            raise ValueError(f"column {name}: {values.shape[0]} rows, the table has {len(self)}")
        self.columns[name] = values.detach()

    @property
    def acted(self) -> Tensor:
        """Rows that the actor wrote [N], bool: the default selection."""
        return self.index["author"] == Author.ACTOR

    @property
    def groups(self) -> Tensor:
        """Number of each trajectory's group [B], in the order in which they first come."""
        return torch.tensor(_numbers([t.group for t in self.trajectories]))

    def spread(self, values_B: Tensor) -> Tensor:
        """One value per trajectory → the same value on all its rows [N]."""
        return values_B[self.index["trajectory"]]

    def add_view(self, name: str, build: ViewBuilder) -> int:
        """Build view ``name`` of every stream; return how many could not be built.

        Raises:
            ValueError: a view shows other tokens than the rows.
        """
        views = [build(self.trajectories[t], s) for t, s in self.streams]
        valid = np.zeros(len(self), bool)
        token = self.index["token"].numpy()
        for number, view in enumerate(views):
            if view is None:
                continue
            rows = self.rows(number)
            has = view.positions > 0
            wanted = token[rows]
            if len(has) != len(wanted) or (view.ids[view.positions] != wanted)[has].any():
                raise ValueError(
                    f"view {name} shows other tokens than stream {number} of the table"
                )
            valid[rows] = has
        self.views[name], self.in_view[name] = views, torch.from_numpy(valid)
        return sum(view is None for view in views)

    def valid(self, view: str = PLAIN) -> Tensor:
        """Rows that the view has [N], bool."""
        return self.in_view[view]

    def units(self, over: str) -> Tensor:
        """Ids [N] that two rows share exactly if they are in one unit of the index set ``over``.

        Turns and steps are numbered within their trajectory, so their numbers alone would put the
        first turns of all trajectories into one unit.
        """
        number = self.index[over]
        if over not in ("turn", "step") or not len(self):
            return number
        return self.index["trajectory"] * (int(number.max()) + 1) + number

    def rows(self, stream: int) -> slice:
        """The rows of stream number ``stream``."""
        return slice(int(self.offsets[stream]), int(self.offsets[stream + 1]))

    def micro_batches(self, view: str, tokens: int) -> list[list[int]]:
        """Streams with that view, in order, cut so that each part has at most ``tokens`` ids.

        A stream longer than ``tokens`` is a part of its own. How the table is cut changes memory
        only: every row's weight is fixed for the whole table beforehand.
        """
        parts: list[list[int]] = []
        filled = tokens + 1
        for number, found in enumerate(self.views[view]):
            if found is None or not len(found.positions):
                continue
            if filled + len(found.ids) > tokens:
                parts.append([])
                filled = 0
            parts[-1].append(number)
            filled += len(found.ids)
        return parts


def _turns(trajectory: Trajectory, stream: int, rows: Indices) -> Indices:
    """Turn index of each row position of one stream: of the first response that ends after it.

    By ends and not by starts, so that a forced opening before a response belongs to its turn.
    """
    spans = [(t.span, t.index) for t in trajectory.turns if t.span and t.span.stream == stream]
    ends = np.asarray([span.end for span, _ in spans])
    turns: Indices = np.asarray([index for _, index in spans])
    which = np.searchsorted(ends, rows, side="right")
    if which[-1] >= len(turns):
        raise ValueError(f"trajectory {trajectory.id}: stream {stream} has rows outside its turns")
    found: Indices = turns[which]
    return found


def _steps(trajectory: Indices, stream: Indices, position: Indices) -> Indices:
    """Number, within its trajectory, of the maximal run of consecutive rows each row lies in."""
    if not len(position):
        return position
    new = np.ones(len(position), bool)
    new[1:] = (stream[1:] != stream[:-1]) | (position[1:] != position[:-1] + 1)
    runs = np.cumsum(new) - 1
    begins = np.r_[True, trajectory[1:] != trajectory[:-1]]
    steps: Indices = runs - runs[begins][np.cumsum(begins) - 1]
    return steps


def build(
    trajectories: Sequence[Trajectory], views: Mapping[str, ViewBuilder] | None = None
) -> Table:
    """The table of ``trajectories`` with the plain view and ``views``.

    Trajectories without streams have no rows; make their streams first
    (:func:`agentdistill.render.materialise`).
    """
    parts: dict[str, list[Indices]] = {name: [] for name in _INDEX}
    logps: list[FloatArray] = []
    streams: list[tuple[int, int]] = []
    offsets = [0]
    groups = _numbers([trajectory.group for trajectory in trajectories])
    for number, (trajectory, group) in enumerate(zip(trajectories, groups, strict=True)):
        for which, stream in enumerate(trajectory.streams):
            rows = rows_of(stream)
            size = len(rows)
            columns = {
                "trajectory": np.full(size, number),
                "group": np.full(size, group),
                "stream": np.full(size, len(streams)),
                "turn": _turns(trajectory, which, rows) if size else rows,
                "position": rows,
                "token": stream.ids[rows],
                "author": stream.author[rows],
                "kind": stream.kind[rows],
            }
            for name, values in columns.items():
                parts[name].append(values)
            logps.append(stream.logp[rows])
            streams.append((number, which))
            offsets.append(offsets[-1] + size)
    flat = {n: np.concatenate(p).astype(np.int64) for n, p in parts.items() if p}
    flat = flat or {name: np.zeros(0, np.int64) for name in _INDEX}
    flat["step"] = _steps(flat["trajectory"], flat["stream"], flat["position"])
    table = Table(
        list(trajectories),
        streams,
        torch.tensor(offsets),
        {name: torch.from_numpy(values) for name, values in flat.items()},
    )
    sampler = np.concatenate(logps) if logps else np.zeros(0, np.float32)
    table["logp/sampler"] = torch.from_numpy(sampler)
    for name, builder in {PLAIN: plain, **(views or {})}.items():
        table.add_view(name, builder)
    return table


def _numbers(names: Sequence[str]) -> list[int]:
    """Each name as a number, in the order in which they first come."""
    known = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [known[name] for name in names]


_INDEX = ("trajectory", "group", "stream", "turn", "position", "token", "author", "kind")


def gather(
    table: Table, view: str, streams: Sequence[int], needed: Tensor
) -> tuple[list[Any], list[Any], Tensor]:
    """Ids, positions and row numbers of the needed rows of ``streams`` in ``view``."""
    ids: list[Any] = []
    positions: list[Any] = []
    rows: list[Tensor] = []
    for number in streams:
        found = table.views[view][number]
        span = table.rows(number)
        keep = needed[span].nonzero().squeeze(1)
        if found is None or not len(keep):
            continue
        where = found.positions[keep.numpy()]
        ids.append(found.ids)
        positions.append(where)
        rows.append(keep + span.start)
    return ids, positions, torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
