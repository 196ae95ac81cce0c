"""Shortest solutions of Sokoban levels: tables for small rooms, A* for large ones.

Invariants
----------
* Length is counted in moves (steps of the environment), not in pushes.
* With ``weight=1`` a solution is optimal: the bound never exceeds the true length, and only states
  that cannot be solved are pruned (checked against plain search in tests/envs/test_solver.py).
* Everything is deterministic: the same level and arguments give the same solution.

A* walks over *pushes*: a node is the state after a push, an edge is the shortest walk to the next
push. Sets of cells are integers, so that a walk grows by whole wave fronts.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count

from agentdistill.envs.sokoban.engine import ACTIONS, steps
from agentdistill.envs.sokoban.levels import Board, State, bits

TABLE_STATES = 50_000
"""Rooms with at most so many states get an exact table."""

NODE_LIMIT = 200_000
"""Pushes that A* may expand before it gives up."""

_UNREACHED = 0xFFFF


def shift(cells: int, step: int) -> int:
    """Every member of the set moved by ``step``."""
    return cells << step if step > 0 else cells >> -step


# -- one room, all distances -------------------------------------------------------------------


def state_count(board: Board) -> int:
    """Upper bound of the number of states: choices for the boxes times cells for the player."""
    free, boxes = board.floor.bit_count(), board.targets.bit_count()
    return math.comb(free, boxes) * (free - boxes)


class Table:
    """Optimal distance of every solvable state of one board, by search backwards from the goals.

    Attributes:
        layers: per distance, the states *without a box on a target* as ``configuration * cells +
            player``, where ``configurations`` lists the sets of boxes; the generator's supply.
    """

    def __init__(self, board: Board) -> None:
        """Search; a few microseconds per state."""
        self._board = board
        self._rows: dict[int, array[int]] = {}
        self._numbers: dict[int, int] = {}
        self.configurations: list[int] = []
        self.layers: list[array[int]] = []
        frontier = [(cell, board.targets) for cell in bits(board.floor & ~board.targets)]
        while frontier:
            frontier = self._settle(frontier)

    def _settle(self, frontier: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Give the next distance to those of ``frontier`` that have none; return predecessors."""
        board, rows = self._board, self._rows
        distance, cells = len(self.layers), board.cells
        layer, found = array("I"), []
        numbers, moves = self._numbers, steps(board)
        for player, boxes in frontier:
            row = rows.get(boxes)
            if row is None:
                row = rows[boxes] = array("H", [_UNREACHED]) * cells
                numbers[boxes] = len(self.configurations)
                self.configurations.append(boxes)
            if row[player] != _UNREACHED:
                continue
            row[player] = distance
            if not boxes & board.targets:
                layer.append(numbers[boxes] * cells + player)
            blocked = board.walls | boxes
            for step in moves:
                if blocked >> player - step & 1:
                    continue
                found.append((player - step, boxes))
                if boxes >> player + step & 1:
                    pulled = boxes ^ (1 << player | 1 << player + step)
                    found.append((player - step, pulled))
        self.layers.append(layer)
        return found

    def distance(self, state: State) -> float:
        """Moves to the solution; infinite when there is none."""
        row = self._rows.get(state.boxes)
        value = row[state.player] if row is not None else _UNREACHED
        return math.inf if value == _UNREACHED else value

    def state(self, code: int) -> State:
        """The state that an entry of :attr:`layers` stands for."""
        configuration, player = divmod(code, self._board.cells)
        return State(player, self.configurations[configuration])


@lru_cache(maxsize=256)
def _table(board: Board) -> Table:
    return Table(board)


def table(board: Board) -> Table | None:
    """The table of ``board``, made once (the last 256 are kept); None for a large room."""
    return _table(board) if state_count(board) <= TABLE_STATES else None


# -- bounds and deadlocks ----------------------------------------------------------------------


def assign(costs: Sequence[Sequence[float]]) -> float:
    """Least total cost of giving each row its own column of a square matrix; may be infinite.

    Rows join one at a time along shortest augmenting paths (Hungarian method, O(n³)).
    """
    size = len(costs)
    row_price, column_price = [0.0] * size, [0.0] * (size + 1)
    owner = [-1] * (size + 1)
    for row in range(size):
        owner[size] = row
        path = [size] * size
        slack, visited = [math.inf] * size, [False] * (size + 1)
        column = size
        while owner[column] != -1:
            visited[column] = True
            here = owner[column]
            for other in range(size):
                if visited[other]:
                    continue
                reduced = costs[here][other] - row_price[here] - column_price[other]
                if reduced < slack[other]:
                    slack[other], path[other] = reduced, column
            step, column = min((slack[c], c) for c in range(size) if not visited[c])
            if math.isinf(step):
                return math.inf
            for other in range(size + 1):
                if visited[other]:
                    row_price[owner[other]] += step
                    column_price[other] -= step
                elif other < size:
                    slack[other] -= step
        while column != size:
            owner[column], column = owner[path[column]], path[column]
    return sum(costs[owner[column]][column] for column in range(size))


class Bounds:
    """What can be said about box positions of one board without searching.

    Attributes:
        dead: floor cells that a box can never leave for a target.
    """

    def __init__(self, board: Board) -> None:
        """Measure push distances from every target."""
        self._board = board
        self._distances = [self._pushes(target) for target in bits(board.targets)]
        alive = sum(1 << c for c in range(board.cells) if any(c in d for d in self._distances))
        self.dead = board.floor & ~alive
        self._bound: dict[int, float] = {}

    def _pushes(self, target: int) -> dict[int, int]:
        """Pushes that bring a lone box from a cell to ``target``, by cell."""
        distances, queue = {target: 0}, [target]
        for cell in queue:
            for step in steps(self._board):
                before = cell - step
                if before in distances or self._board.walls >> before & 1:
                    continue
                if not self._board.walls >> before - step & 1:
                    distances[before] = distances[cell] + 1
                    queue.append(before)
        return distances

    def pushes(self, boxes: int) -> float:
        """Lower bound of the pushes that are needed: the cheapest assignment to targets."""
        bound = self._bound.get(boxes)
        if bound is None:
            cells = list(bits(boxes))
            costs = [[d.get(cell, math.inf) for cell in cells] for d in self._distances]
            bound = self._bound[boxes] = assign(costs)
        return bound

    def frozen(self, boxes: int, cell: int) -> bool:
        """Whether the box at ``cell`` can never move again and a box that holds it is misplaced."""
        return bool(self._stuck(boxes, cell, self._board.walls) & ~self._board.targets)

    def _stuck(self, boxes: int, cell: int, walls: int) -> int:
        """The box at ``cell`` and those that hold it, if it cannot move; else the empty set."""
        group, boxes, walls = 1 << cell, boxes & ~(1 << cell), walls | 1 << cell
        for step in (1, self._board.width):
            beside = 1 << cell - step | 1 << cell + step
            if walls & beside or self.dead & beside == beside:
                continue
            for neighbour in bits(boxes & beside):
                held = self._stuck(boxes, neighbour, walls)
                if held:
                    group |= held
                    break
            else:
                return 0
        return group


@lru_cache(maxsize=32)
def bounds(board: Board) -> Bounds:
    """The bounds of ``board``, made once (the last 32 are kept)."""
    return Bounds(board)


# -- walking -----------------------------------------------------------------------------------


def waves(board: Board, state: State) -> Iterator[int]:
    """Cells the player can walk to without pushing, in order of distance: 0, 1, 2 and so on."""
    free, width = board.floor & ~state.boxes, board.width
    wave = 1 << state.player
    while wave:
        yield wave
        free &= ~wave
        wave = (wave << 1 | wave >> 1 | wave << width | wave >> width) & free


def walk(board: Board, state: State, goal: int, order: Sequence[int] = (0, 1, 2, 3)) -> list[int]:
    """A shortest walk to cell ``goal`` as indices of directions; ``order`` breaks ties."""
    fronts: list[int] = []
    for wave in waves(board, State(goal, state.boxes)):
        fronts.append(wave)
        if wave >> state.player & 1:
            break
    path, cell = [], state.player
    for front in reversed(fronts[:-1]):
        direction = next(i for i in order if front >> cell + steps(board)[i] & 1)
        path.append(direction)
        cell += steps(board)[direction]
    return path


# -- A* ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Solution:
    """What a search found.

    Attributes:
        actions: the moves, or None.
        bound: lower bound of the optimal length; infinite when there is provably no solution. It
            says something only for ``weight=1``.
        nodes: pushes expanded.
    """

    actions: tuple[str, ...] | None
    bound: float
    nodes: int

    @property
    def proven(self) -> bool:
        """Whether the search came to an end: a solution, or the proof that there is none."""
        return self.actions is not None or math.isinf(self.bound)


@dataclass(slots=True)
class _Search:
    """The open list and what is known of each state."""

    board: Board
    weight: float
    cost: dict[State, int] = field(default_factory=dict)
    parent: dict[State, tuple[State, int]] = field(default_factory=dict)
    queue: list[tuple[float, float, int, int, State]] = field(default_factory=list)
    ticket: Iterator[int] = field(default_factory=count)

    def offer(self, state: State, cost: int, bound: float) -> None:
        self.cost[state] = cost
        estimate = cost + self.weight * bound
        heapq.heappush(self.queue, (estimate, bound, next(self.ticket), cost, state))

    def expand(self, state: State, cost: int, limits: Bounds, order: Sequence[int]) -> None:
        board, boxes, ways = self.board, state.boxes, steps(self.board)
        open_cells = board.floor & ~(boxes | limits.dead)
        stands = [(i, shift(boxes, -ways[i]) & shift(open_cells, -2 * ways[i])) for i in order]
        for walked, wave in enumerate(waves(board, state)):
            for direction, stand in stands:
                for cell in bits(wave & stand):
                    self._push(state, cell + ways[direction], direction, cost + walked + 1, limits)

    def _push(self, state: State, box: int, direction: int, cost: int, limits: Bounds) -> None:
        to = box + steps(self.board)[direction]
        child = State(box, state.boxes ^ (1 << box | 1 << to))
        known = self.cost.get(child)
        if known is not None and known <= cost:
            return
        bound = limits.pushes(child.boxes)
        if math.isinf(bound) or (known is None and limits.frozen(child.boxes, to)):
            return
        self.parent[child] = state, direction
        self.offer(child, cost, bound)

    def path(self, state: State, order: Sequence[int]) -> tuple[str, ...]:
        backwards: list[int] = []
        while state in self.parent:
            before, direction = self.parent[state]
            stand = state.player - steps(self.board)[direction]
            backwards += [direction, *reversed(walk(self.board, before, stand, order))]
            state = before
        return tuple(ACTIONS[direction] for direction in reversed(backwards))


def search(
    board: Board,
    state: State,
    *,
    weight: float = 1.0,
    node_limit: int = NODE_LIMIT,
    most: int | None = None,
    order: Sequence[int] = (0, 1, 2, 3),
) -> Solution:
    """Solve ``state`` by A*.

    Args:
        board: the room.
        state: where to start.
        weight: 1 is optimal; above it, longer solutions (at most ``weight`` times) sooner.
        node_limit: pushes to expand before giving up.
        most: give up when every solution is longer than this; None for no such limit.
        order: directions (indices of ``ACTIONS``) in the order that breaks ties.
    """
    limits, found = bounds(board), _Search(board, weight)
    if not any(limits.frozen(state.boxes, cell) for cell in bits(state.boxes)):
        found.offer(state, 0, limits.pushes(state.boxes))
    nodes = 0
    while found.queue:
        bound, *_, cost, state = heapq.heappop(found.queue)
        if cost > found.cost[state]:
            continue
        if math.isinf(bound):
            break
        if most is not None and bound > most:
            return Solution(None, bound, nodes)
        if state.boxes == board.targets:
            return Solution(found.path(state, order), bound, nodes)
        if nodes == node_limit:
            return Solution(None, bound, nodes)
        nodes += 1
        found.expand(state, cost, limits, order)
    return Solution(None, math.inf, nodes)


def solve(
    board: Board, state: State, *, weight: float = 1.0, node_limit: int = NODE_LIMIT
) -> list[str] | None:
    """A solution of ``state`` as actions (optimal for ``weight=1``), or None.

    None means unsolvable or beyond ``node_limit``; :func:`search` tells them apart.
    """
    actions = search(board, state, weight=weight, node_limit=node_limit).actions
    return None if actions is None else list(actions)
