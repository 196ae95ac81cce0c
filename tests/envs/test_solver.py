"""The solver against plain search, and its parts against brute force."""

from __future__ import annotations

import math
from collections import deque
from itertools import islice, permutations
from pathlib import Path
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agentdistill.envs.sokoban import Board, Level, Rooms, State, generate, parse, search, solve
from agentdistill.envs.sokoban.engine import ACTIONS, move, solved, steps
from agentdistill.envs.sokoban.generator import draw_level
from agentdistill.envs.sokoban.levels import enclosure, read_boxoban
from agentdistill.envs.sokoban.solver import Bounds, Table, assign, table, walk

BOXOBAN = Path(__file__).parents[1] / "data" / "boxoban_sample.txt"


def distances(board: Board, state: State) -> dict[State, int]:
    """Moves from ``state`` to every state that can be reached, by plain search."""
    known, queue = {state: 0}, deque([state])
    while queue:
        here = queue.popleft()
        for step in steps(board):
            there = move(board, here, step)
            if there not in known:
                known[there] = known[here] + 1
                queue.append(there)
    return known


def optimal(board: Board, state: State) -> float:
    """Length of the shortest solution by plain search; infinite without one."""
    reached = distances(board, state)
    return min((n for s, n in reached.items() if solved(board, s)), default=math.inf)


def play(level: Level, actions: list[str] | tuple[str, ...]) -> State:
    state = level.start
    for action in actions:
        state = move(level.board, state, steps(level.board)[ACTIONS.index(action)])
    return state


@st.composite
def generated_levels(draw: st.DrawFn) -> Level:
    """A generated room after some random moves, which may have spoilt it."""
    rooms = Rooms(
        draw(st.integers(5, 6)),
        draw(st.integers(6, 7)),
        draw(st.integers(1, 3)),
        walls=draw(st.integers(0, 4)),
        min_moves=draw(st.integers(1, 12)),
    )
    rng = Random(draw(st.integers(0, 10**6)))
    level = next(filter(None, (draw_level(rooms, None, rng) for _ in range(30))), None)
    assume(level is not None)
    assert level is not None
    return Level(level.board, play(level, draw(st.lists(st.sampled_from(ACTIONS), max_size=8))))


@st.composite
def wild_levels(draw: st.DrawFn) -> Level:
    """Any small room at all: walls, targets and boxes anywhere, solvable or not."""
    height, width = draw(st.integers(4, 6)), draw(st.integers(5, 6))
    ring = enclosure(height, width)
    inner = [cell for cell in range(height * width) if not ring >> cell & 1]
    order = draw(st.permutations(inner))
    boxes = draw(st.integers(1, 3 if len(inner) > 8 else 2))
    wall_count = draw(st.integers(0, len(inner) - 2 * boxes - 1))
    box_cells, player, rest = order[:boxes], order[boxes], order[boxes + 1 :]
    walls = ring | sum(1 << cell for cell in rest[:wall_count])
    free = [cell for cell in inner if not walls >> cell & 1]
    targets = draw(st.permutations(free))[:boxes]
    board = Board(height, width, walls, sum(1 << cell for cell in targets))
    return Level(board, State(player, sum(1 << cell for cell in box_cells)))


small_levels = st.one_of(wild_levels(), generated_levels(), generated_levels())


@given(small_levels)
@settings(max_examples=300)
def test_search_is_optimal_and_knows_what_cannot_be_solved(level: Level) -> None:
    truth = optimal(level.board, level.start)
    found = search(level.board, level.start)
    assert found.proven
    assert found.bound == truth
    assert (found.actions is None) == math.isinf(truth)
    if found.actions is not None:
        assert len(found.actions) == truth
        assert solved(level.board, play(level, found.actions))
    assert Table(level.board).distance(level.start) == truth


@given(small_levels, st.sampled_from([1.5, 3.0]))
@settings(max_examples=60)
def test_weighted_search_solves_within_its_factor(level: Level, weight: float) -> None:
    best = search(level.board, level.start).actions
    found = search(level.board, level.start, weight=weight).actions
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert solved(level.board, play(level, found))
        assert len(best) <= len(found) <= weight * len(best)


@given(small_levels, st.permutations(range(4)))
@settings(max_examples=60)
def test_ties_never_change_the_length(level: Level, order: list[int]) -> None:
    best, other = (search(level.board, level.start, order=o).actions for o in (range(4), order))
    assert (best and len(best)) == (other and len(other))


@given(small_levels)
@settings(max_examples=60)
def test_every_limit_is_kept(level: Level) -> None:
    full = search(level.board, level.start)
    if full.actions is None or not full.actions:
        return
    length = len(full.actions)
    assert search(level.board, level.start, most=length).actions == full.actions
    short = search(level.board, level.start, most=length - 1)
    assert short.actions is None and short.bound <= length
    cut = search(level.board, level.start, node_limit=max(full.nodes - 1, 1))
    assert cut.nodes <= full.nodes and cut.bound <= length


def test_a_table_knows_every_state_of_its_room() -> None:
    level = parse("#######\n#P____#\n#_X_X_#\n#O#__O#\n#######")
    known = Table(level.board)
    reached = distances(level.board, level.start)
    assert len(reached) > 500
    finite = 0
    for state in islice(reached, 0, None, 7):
        truth = optimal(level.board, state)
        assert known.distance(state) == truth
        finite += math.isfinite(truth)
    assert finite > 20


def test_a_table_lists_the_starts_by_length() -> None:
    board = parse("#######\n#P____#\n#_X_X_#\n#O#__O#\n#######").board
    known = Table(board)
    listed = [(n, known.state(code)) for n, layer in enumerate(known.layers) for code in layer]
    assert len({state for _, state in listed}) == len(listed) > 100
    for length, state in listed:
        assert known.distance(state) == length
        assert not state.boxes & board.targets


def test_large_rooms_have_no_table() -> None:
    level = next(generate(Rooms(10, 10, 4), "train", 0))
    assert table(parse(level).board) is None


BOXOBAN_LENGTHS = (30, 29, 34, 27)
"""Found by plain search once (11,452, 30,713, 11,572 and 49,383 states)."""


def test_boxoban_levels_are_solved_optimally() -> None:
    for text, length in zip(read_boxoban(BOXOBAN), BOXOBAN_LENGTHS, strict=True):
        level = parse(text)
        assert level.board.targets.bit_count() == 4
        actions = solve(level.board, level.start)
        assert actions is not None and len(actions) == length
        assert solved(level.board, play(level, actions))
        fast = solve(level.board, level.start, weight=3)
        assert fast is not None and length <= len(fast) <= 3 * length


COST = st.one_of(st.integers(0, 9), st.just(math.inf))


@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(COST, min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
@settings(max_examples=200)
def test_assignment_is_the_cheapest_of_all(costs: list[list[float]]) -> None:
    size = len(costs)
    brute = min(sum(costs[r][c] for r, c in enumerate(p)) for p in permutations(range(size)))
    assert assign(costs) == brute


@pytest.mark.parametrize(
    ("text", "hopeless"),
    [
        ("######\n#XP_O#\n######", True),
        ("#####\n#O__#\n#_XP#\n#___#\n#####", False),
        ("######\n#_XX_#\n#P__O#\n#O___#\n######", True),
        ("######\n#_√√_#\n#P___#\n######", False),
        ("######\n#____#\n#_XX_#\n#_XX_#\n#POOO#\n#O___#\n######", True),
    ],
)
def test_frozen_boxes_are_seen(text: str, hopeless: bool) -> None:
    level = parse(text)
    limits, boxes = Bounds(level.board), level.start.boxes
    cells = [c for c in range(level.board.cells) if boxes >> c & 1]
    assert any(limits.frozen(boxes, cell) for cell in cells) is hopeless
    assert math.isinf(optimal(level.board, level.start)) is hopeless


def test_walks_are_shortest_and_follow_the_order() -> None:
    level = parse("######\n#P___#\n#_#X_#\n#___O#\n######")
    goal = 3 * 6 + 3
    assert walk(level.board, level.start, goal) == [1, 1, 3, 3]
    across = parse("######\n#P___#\n#____#\n#_X_O#\n######")
    assert walk(across.board, across.start, 2 * 6 + 2, order=(3, 1, 0, 2)) == [3, 1]
    assert walk(across.board, across.start, 2 * 6 + 2, order=(1, 3, 0, 2)) == [1, 3]
    assert walk(across.board, across.start, across.start.player) == []
