"""Seeded Sokoban levels, solvable by construction.

Invariants
----------
* A level is made backwards, from the solved room, so that it can be solved. No box starts on a
  target (as in gym-sokoban); the player may.
* The same :class:`Rooms` and seed give the same levels in every process.
* ``min_moves`` and ``max_moves`` bound the length of an *optimal* solution, always.
* In rooms with a table (solver.py) the length is drawn uniformly: over ``min_moves … max_moves``
  when both ends are given, otherwise over the lengths that the drawn room offers; then a state
  uniformly among those of that length. Larger rooms take the state with most pushes
  that a short random search backwards meets, where the drawn length only limits that search.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import comb, inf
from pathlib import Path
from random import Random

from agentdistill.envs.sokoban.engine import steps
from agentdistill.envs.sokoban.levels import (
    Board,
    Level,
    State,
    bits,
    enclosure,
    parse,
    read_boxoban,
    split_of,
)
from agentdistill.envs.sokoban.solver import (
    TABLE_STATES,
    Table,
    bounds,
    search,
    shift,
    table,
    waves,
)
from agentdistill.errors import ConfigError

PATIENCE = 2_000
"""Draws in a row without a level that is new, after which a supply counts as used up."""

PATIENCE_LARGE = 150
"""The same for rooms without a table, where a draw takes a thousand times as long."""

LAYOUTS = ("room", "walk")

_TURN = 0.35
_WALK_PER_SIDE = 1.7
_BRUSHES = (
    ((0, -1), (0, 0), (0, 1)),
    ((-1, 0), (0, 0), (1, 0)),
    ((0, -1), (0, 0), (1, 0)),
    ((0, -1), (0, 0), (1, -1), (1, 0)),
    ((0, 0), (0, 1), (1, 0)),
)
"""What the random walk clears around its position: gym-sokoban's five masks as (row, column)."""

_EXPANSIONS = 300
_CONTENDERS = 4
_DETOUR = 1.5
"""How much longer than wanted the way found backwards may be: it is not the shortest one."""

_PROOF_NODES = 2_000
_PROOF_NODES_FILES = 20_000


@dataclass(frozen=True, slots=True)
class Rooms:
    """Which levels to make.

    Attributes:
        height: rows of the grid, border walls included.
        width: columns, border walls included.
        boxes: number of boxes and of targets.
        layout: ``room`` (a rectangle) or ``walk`` (caves, as in gym-sokoban).
        walls: inner wall cells at random places of a ``room``; the floor stays connected.
        min_moves: least length of an optimal solution.
        max_moves: greatest length of an optimal solution, or None.
    """

    height: int = 7
    width: int = 7
    boxes: int = 1
    layout: str = "room"
    walls: int = 0
    min_moves: int = 1
    max_moves: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no level can satisfy."""
        for key in ("height", "width", "boxes", "walls", "min_moves", "max_moves"):
            value = getattr(self, key)
            whole = isinstance(value, int) or (key == "max_moves" and value is None)
            _require(whole, key, value, "must be a whole number")
        for key in ("height", "width"):
            _require(getattr(self, key) >= 3, key, getattr(self, key), "must be at least 3")
        _require(self.boxes >= 1, "boxes", self.boxes, "must be at least 1")
        known = f"unknown layout; one of {', '.join(LAYOUTS)}"
        _require(self.layout in LAYOUTS, "layout", self.layout, known)
        _require(self.walls >= 0, "walls", self.walls, "must not be negative")
        remedy = "only layout='room' has inner walls to choose; leave it at 0"
        _require(self.layout == "room" or not self.walls, "walls", self.walls, remedy)
        _require(self.min_moves >= 1, "min_moves", self.min_moves, "must be at least 1")
        remedy = f"must be at least min_moves ({self.min_moves}), or None"
        _require(self._ordered, "max_moves", self.max_moves, remedy)
        inside = (self.height - 2) * (self.width - 2)
        remedy = f"the room has {inside} inner cells; boxes, targets and player need {self._need}"
        _require(inside >= self._need, "boxes", self.boxes, f"{remedy}: enlarge height or width")
        _require(inside - self.walls >= self._need, "walls", self.walls, f"{remedy}: fewer walls")

    @property
    def _ordered(self) -> bool:
        return self.max_moves is None or self.max_moves >= self.min_moves

    @property
    def _need(self) -> int:
        return 2 * self.boxes + 1


def _require(holds: bool, key: str, value: object, remedy: str) -> None:
    if not holds:
        raise ConfigError(remedy, key=key, value=value)


# -- where the walls are -----------------------------------------------------------------------


def _rectangle(rooms: Rooms, rng: Random) -> int | None:
    """The walls of a rectangle with random inner walls; None when they cut the floor in two."""
    walls = enclosure(rooms.height, rooms.width)
    inner = list(bits((1 << rooms.height * rooms.width) - 1 ^ walls))
    for cell in rng.sample(inner, rooms.walls):
        walls |= 1 << cell
    board = Board(rooms.height, rooms.width, walls, 0)
    first = next(bits(board.floor))
    reached = 0
    for wave in waves(board, State(first, 0)):
        reached |= wave
    return walls if reached == board.floor else None


def _cave(rooms: Rooms, rng: Random) -> int | None:
    """The walls around a random walk with a wide brush (Schrader's gym-sokoban, 2018)."""
    ways = ((-1, 0), (1, 0), (0, -1), (0, 1))
    row, column = rng.randrange(1, rooms.height - 1), rng.randrange(1, rooms.width - 1)
    way, floor = rng.choice(ways), 0
    for _ in range(int(_WALK_PER_SIDE * (rooms.height + rooms.width))):
        if rng.random() < _TURN:
            way = rng.choice(ways)
        row = min(max(row + way[0], 1), rooms.height - 2)
        column = min(max(column + way[1], 1), rooms.width - 2)
        for down, right in rng.choice(_BRUSHES):
            floor |= 1 << (row + down) * rooms.width + column + right
    return (1 << rooms.height * rooms.width) - 1 ^ floor | enclosure(rooms.height, rooms.width)


_WALLS: dict[str, Callable[[Rooms, Random], int | None]] = {"room": _rectangle, "walk": _cave}


# -- where the boxes and the player start ------------------------------------------------------


def _from_table(known: Table, rooms: Rooms, wanted: int | None, rng: Random) -> State | None:
    """A state of optimal length ``wanted``, or of any length from ``min_moves`` on."""
    if wanted is None:
        lengths = [n for n, layer in enumerate(known.layers) if layer and n >= rooms.min_moves]
        wanted = rng.choice(lengths) if lengths else len(known.layers)
    layer = known.layers[wanted] if wanted < len(known.layers) else None
    return known.state(rng.choice(layer)) if layer else None


def _pulls(board: Board, state: State) -> Iterator[tuple[State, int]]:
    """States that one pull leads to, and how many moves away the way forward is."""
    free = board.floor & ~state.boxes
    stands = [(step, shift(state.boxes, step) & shift(free, -step) & free) for step in steps(board)]
    for walked, wave in enumerate(waves(board, state)):
        for step, stand in stands:
            for cell in bits(wave & stand):
                boxes = state.boxes ^ (1 << cell - step | 1 << cell)
                yield State(cell + step, boxes), walked + 1


def _backwards(board: Board, limit: int | None, rng: Random) -> State | None:
    """A far state without a box on a target, by random search backwards from the goal.

    Args:
        board: the room.
        limit: greatest length of the way back to the goal, or None.
        rng: chooses which state to expand next, preferring far ones.
    """
    goal = State(rng.choice(list(bits(board.floor & ~board.targets))), board.targets)
    far, cost, pool = bounds(board).pushes, {goal: 0}, [goal]
    for _ in range(_EXPANSIONS):
        if not pool:
            break
        picks = [rng.randrange(len(pool)) for _ in range(_CONTENDERS)]
        chosen = max(picks, key=lambda i: far(pool[i].boxes))
        pool[chosen], pool[-1] = pool[-1], pool[chosen]
        state = pool.pop()
        for child, moves in _pulls(board, state):
            total = cost[state] + moves
            if child not in cost and (limit is None or total <= limit):
                cost[child] = total
                pool.append(child)
    starts = [state for state in cost if not state.boxes & board.targets]
    if not starts:
        return None
    best = max(starts, key=lambda state: far(state.boxes))
    spare = None if limit is None else limit - cost[best]
    places = [
        c for n, w in enumerate(waves(board, best)) if spare is None or n <= spare for c in bits(w)
    ]
    return State(rng.choice(places), best.boxes)


def _fits(board: Board, state: State, rooms: Rooms, node_limit: int) -> bool:
    """Whether the optimal solution provably has a length that ``rooms`` allows."""
    most = rooms.max_moves
    pushes = bounds(board).pushes(state.boxes)
    if most is None and rooms.min_moves <= pushes < inf:
        return True
    found = search(board, state, node_limit=node_limit, most=most)
    if most is None:
        return rooms.min_moves <= found.bound < inf
    return found.actions is not None and rooms.min_moves <= len(found.actions) <= most


# -- levels ------------------------------------------------------------------------------------


def draw_level(rooms: Rooms, wanted: int | None, rng: Random) -> Level | None:
    """One draw: a level, or None where the drawn room has none that fits.

    Args:
        rooms: what to make.
        wanted: optimal length (in large rooms a hint only); None for any from ``min_moves`` on.
        rng: the only source of chance.
    """
    walls = _WALLS[rooms.layout](rooms, rng)
    if walls is None:
        return None
    bare = Board(rooms.height, rooms.width, walls, 0)
    floor = list(bits(bare.floor))
    if len(floor) <= 2 * rooms.boxes:
        return None
    targets = sum(1 << cell for cell in rng.sample(floor, rooms.boxes))
    board = Board(rooms.height, rooms.width, walls, targets)
    known = table(board)
    if known is not None:
        start = _from_table(known, rooms, wanted, rng)
    else:
        limit = None if wanted is None else int(_DETOUR * wanted)
        start = _backwards(board, limit, rng)
        if start and not _fits(board, start, rooms, _PROOF_NODES):
            start = None
    return Level(board, start) if start else None


def _draws(rooms: Rooms, rng: Random) -> Iterator[str | None]:
    """Texts of levels without end; None for a draw that failed, after which its length is kept."""
    while True:
        most = rooms.max_moves
        wanted = None if most is None else rng.randint(rooms.min_moves, most)
        for _ in range(50):
            level = draw_level(rooms, wanted, rng)
            yield level.text if level else None
            if level:
                break


def distinct(draws: Iterator[str | None], split: str, patience: int) -> Iterator[str]:
    """The different levels of ``split`` among ``draws``.

    Ends with ``draws``, or after ``patience`` draws in a row that failed or repeated a level of
    any split. (A new level of another split shows that the supply still flows.)
    """
    seen: set[str] = set()
    vain = 0
    for text in draws:
        if text is None or text in seen:
            vain += 1
            if vain >= patience:
                return
            continue
        vain = 0
        seen.add(text)
        if split_of(text) == split:
            yield text


def generate(rooms: Rooms, split: str, seed: int) -> Iterator[str]:
    """Different levels of ``split`` as texts, lazily, in an order that ``seed`` fixes.

    Ends when :data:`PATIENCE` (large rooms: :data:`PATIENCE_LARGE`) draws in a row brought nothing
    new: small rooms have finitely many levels, and some bounds have none at all.
    """
    inside = (rooms.height - 2) * (rooms.width - 2) - rooms.walls
    large = comb(inside, rooms.boxes) * (inside - rooms.boxes) > TABLE_STATES
    draws = _draws(rooms, Random(f"sokoban {seed}"))
    return distinct(draws, split, PATIENCE_LARGE if large else PATIENCE)


def _shuffled(files: Sequence[Path], rng: Random) -> Iterator[str]:
    for path in rng.sample(files, len(files)):
        texts = read_boxoban(path)
        yield from rng.sample(texts, len(texts))


def from_files(files: Sequence[Path], rooms: Rooms, split: str, seed: int) -> Iterator[str]:
    """Different levels of ``split`` in ``files``, lazily, in an order that ``seed`` fixes.

    Of ``rooms`` only ``min_moves`` and ``max_moves`` count. Levels whose length A* cannot settle
    within 20,000 pushes are left out; with ``min_moves`` 1 and no ``max_moves`` nothing is solved.
    """
    for text in distinct(_shuffled(files, Random(f"sokoban {seed}")), split, sys.maxsize):
        level = parse(text)
        if _fits(level.board, level.start, rooms, _PROOF_NODES_FILES):
            yield text
