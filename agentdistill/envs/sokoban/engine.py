"""Sokoban's rules as pure functions of a board, a state and a direction.

Invariants: nothing here has state or randomness; a move that cannot be made returns the state it
was given. States and rewards equal those of gym-sokoban (actions ``push up`` … ``push right``,
which also walk), see tests/envs/test_sokoban_parity.py.
"""

from __future__ import annotations

from typing import Final

from agentdistill.envs.sokoban.levels import Board, State

ACTIONS: Final = ("Up", "Down", "Left", "Right")

STEP_REWARD: Final = -0.1
BOX_REWARD: Final = 1.0
"""For a push onto a target; a push off a target costs as much."""
SOLVED_REWARD: Final = 10.0


def steps(board: Board) -> tuple[int, int, int, int]:
    """How the player's cell changes by each of :data:`ACTIONS`."""
    return -board.width, board.width, -1, 1


def move(board: Board, state: State, step: int) -> State:
    """The state after walking or pushing by ``step`` (one of :func:`steps`).

    Returns ``state`` itself when a wall is in the way, or a box that cannot be pushed.
    """
    to = state.player + step
    if board.walls >> to & 1:
        return state
    if not state.boxes >> to & 1:
        return State(to, state.boxes)
    beyond = to + step
    if (board.walls | state.boxes) >> beyond & 1:
        return state
    return State(to, state.boxes ^ (1 << to | 1 << beyond))


def solved(board: Board, state: State) -> bool:
    """Whether every box is on a target."""
    return state.boxes == board.targets


def on_target(board: Board, state: State) -> int:
    """How many boxes are on targets."""
    return (state.boxes & board.targets).bit_count()


def reward(board: Board, before: State, after: State) -> float:
    """What the step from ``before`` to ``after`` pays.

    The terms are added in gym-sokoban's order, so that sums are equal to the last bit.
    """
    total = STEP_REWARD
    gained = on_target(board, after) - on_target(board, before)
    if gained:
        total += BOX_REWARD if gained > 0 else -BOX_REWARD
    return total + SOLVED_REWARD if solved(board, after) else total
