"""Sokoban as text: push every box onto a target.

Invariants
----------
* The observation is the grid, rows joined by newlines, and nothing else; symbols are RAGEN's.
* A task's payload is ``{"level": text}``, so that the key of a task is the content of its level;
  its split follows from the same text (levels.py).
* Rewards are gym-sokoban's: -0.1 per step, +1 for a box put on a target, -1 for one pushed off,
  +10 when all are on, which ends the episode.
* A move against a wall or a box that cannot be pushed is legal, as in gym-sokoban: ``valid`` is
  true, the state stays, the step costs 0.1, and it is never optimal. Any other text than the four
  actions (upper or lower case, surrounding spaces ignored) has ``valid`` false and costs the same.
* ``optimal`` judges an action by the exact distances of the states before and after it; it is
  missing where the state before was solved, cannot be solved any more, or is too hard to judge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import fields
from functools import cached_property
from math import inf, isnan, nan
from pathlib import Path
from random import Random
from typing import Any, Literal

from agentdistill.envs.base import Card, Moved, TextEnv
from agentdistill.envs.sokoban.engine import (
    ACTIONS,
    STEP_REWARD,
    move,
    on_target,
    reward,
    solved,
    steps,
)
from agentdistill.envs.sokoban.generator import Rooms, from_files, generate
from agentdistill.envs.sokoban.levels import (
    SPLITS,
    Board,
    State,
    boxoban_files,
    draw,
    parse,
    read_boxoban,
    split_of,
)
from agentdistill.envs.sokoban.solver import Table, search, table
from agentdistill.errors import ConfigError
from agentdistill.records import Task

ID = "agentdistill/Sokoban-v0"

INSTRUCTION = """\
You play Sokoban. Push every box onto a target.
Symbols: # wall, _ floor, O target, X box, √ box on target, P you, S you on a target.
Actions: Up, Down, Left, Right. You move one cell. Moving into a box pushes it one cell further, \
if the cell behind it is free. You cannot pull, and you cannot push two boxes at once.
A box in a corner that is no target can never be moved again."""

TOOL = {
    "type": "function",
    "function": {
        "name": "move",
        "description": "Move one cell; moving into a box pushes it if the cell behind it is free.",
        "parameters": {
            "type": "object",
            "properties": {"direction": {"type": "string", "enum": list(ACTIONS)}},
            "required": ["direction"],
            "additionalProperties": False,
        },
    },
}


class SokobanEnv(TextEnv):
    """Sokoban in rooms of any size. See the module docstring for what holds."""

    def __init__(
        self,
        *,
        height: int = 7,
        width: int = 7,
        boxes: int = 1,
        layout: str = "room",
        walls: int = 0,
        min_moves: int = 1,
        max_moves: int | None = None,
        levels: str | Path | None = None,
        judge: Literal["auto"] | bool = "auto",
        expert_ties: str = "first",
        expert_weight: float = 1.0,
        node_limit: int = 50_000,
        max_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Choose the levels.

        Args:
            height: rows of the grid, border walls included.
            width: columns, border walls included.
            boxes: number of boxes.
            layout: ``room`` (rectangle) or ``walk`` (caves, as in gym-sokoban).
            walls: inner wall cells at random places of a ``room``.
            min_moves: least length of an optimal solution.
            max_moves: greatest length of an optimal solution, or None.
            levels: file in Boxoban's format, or a folder of such ``*.txt`` files, in place of the
                generator.
            judge: fill ``optimal`` in every step: "auto" where the room is small enough for a
                table (solver.TABLE_STATES), True always (large rooms: A* at each step), or False.
            expert_ties: which of several best actions the expert takes: "first" in the order Up,
                Down, Left, Right, or "random", seeded by level and step.
            expert_weight: above 1, the expert of *large* rooms plans faster and not optimally.
            node_limit: pushes that one A* search may expand (about 50 microseconds each).
            max_steps: step limit; None is 2 * (height + width) * (boxes + 1), which is 56 for the
                default room and 200 for Boxoban's.
            render_mode: ``ansi`` or None.
        """
        super().__init__(max_steps=max_steps, render_mode=render_mode, actions=ACTIONS)
        self._rooms = Rooms(height, width, boxes, layout, walls, min_moves, max_moves)
        self._files = self._check_files(levels)
        _check("judge", judge, judge in ("auto", True, False), "one of 'auto', True, False")
        known = expert_ties in ("first", "random")
        _check("expert_ties", expert_ties, known, "one of 'first', 'random'")
        _check("expert_weight", expert_weight, expert_weight >= 1, "must be at least 1")
        _check("node_limit", node_limit, node_limit >= 1, "must be at least 1")
        self._judge, self._ties = judge, expert_ties
        self._weight, self._node_limit = expert_weight, node_limit

    def _check_files(self, levels: str | Path | None) -> tuple[Path, ...]:
        """The files behind ``levels``; the arguments of the generator must then be left alone."""
        if levels is None:
            return ()
        for item in fields(Rooms)[:5]:
            value = getattr(self._rooms, item.name)
            remedy = "levels come from files; leave this at its default"
            _check(item.name, value, value == item.default, remedy)
        return boxoban_files(levels)

    # -- facts ---------------------------------------------------------------------------------

    @cached_property
    def card(self) -> Card:
        """The facts; ``data`` is the hash of the level files, if there are any."""
        content = hashlib.sha256()
        for path in self._files:
            content.update(path.read_bytes())
        return Card(
            id=ID,
            version="1",
            data=content.hexdigest()[:16] if self._files else "",
            licence="Apache-2.0",
            splits=SPLITS,
            step_limit=self._max_steps or self._default_limit(),
            metrics=("success", "score", "optimal"),
            source="rewards: gym-sokoban (Schrader 2018); symbols: RAGEN; files: Boxoban (2018)",
        )

    def _default_limit(self) -> int:
        height, width, boxes = self._rooms.height, self._rooms.width, self._rooms.boxes
        if self._files:
            board = parse(read_boxoban(self._files[0])[0]).board
            height, width, boxes = board.height, board.width, board.targets.bit_count()
        return 2 * (height + width) * (boxes + 1)

    @property
    def instruction(self) -> str:
        """The rules."""
        return INSTRUCTION

    @property
    def tools(self) -> list[dict[str, Any]]:
        """One tool, ``move``, whose ``direction`` is an action."""
        return [TOOL]

    def tasks(self, split: str, seed: int = 0) -> Iterator[Task]:
        """Distinct levels of ``split``; ends when no new one is found (generator.py, PATIENCE).

        Raises ConfigError for an unknown split, and where the split has no level at all.
        """
        _check("split", split, split in SPLITS, f"one of {', '.join(SPLITS)}")
        return self._tasks(split, seed)

    def _tasks(self, split: str, seed: int) -> Iterator[Task]:
        if self._files:
            texts = from_files(self._files, self._rooms, split, seed)
        else:
            texts = generate(self._rooms, split, seed)
        index = -1
        for index, text in enumerate(texts):
            yield Task(ID, split, {"level": text}, index=index)
        remedy = "no level found in this split; relax min_moves and max_moves or enlarge the room"
        _check("split", split, index >= 0, remedy)

    # -- an episode ----------------------------------------------------------------------------

    def _begin(self, task: Task) -> str:
        text = task.payload.get("level")
        if not isinstance(text, str):
            raise ConfigError("needs the text of a level", key="task.payload.level", value=text)
        level = parse(text)
        self._enter(level.board)
        self._state = level.start
        self._hash = hashlib.sha256(text.encode()).hexdigest()
        return draw(self._board, self._state)

    def _enter(self, board: Board) -> None:
        self._board = board
        self._ways = dict(zip(ACTIONS, steps(board), strict=True))
        self._spoken = {action.lower(): step for action, step in self._ways.items()}
        self._table: Table | None = table(board)
        self._judging = self._judge is True or (self._judge == "auto" and self._table is not None)
        self._costs: dict[State, float] = {}
        self._plan: dict[State, str] = {}

    def _advance(self, action: str) -> Moved:
        before, board = self._state, self._board
        step = self._spoken.get(action.strip().lower())
        if step is None:
            after, paid = before, STEP_REWARD
        else:
            after = self._state = move(board, before, step)
            paid = reward(board, before, after)
        if self._costs.get(before) == inf:
            self._costs[after] = inf  # what is lost stays lost; spares large rooms a search
        done = solved(board, after)
        return Moved(
            draw(board, after),
            paid,
            terminated=done,
            success=done,
            score=on_target(board, after) / board.targets.bit_count(),
            valid=step is not None,
            optimal=self._verdict(before, after) if self._judging else None,
        )

    def _verdict(self, before: State, after: State) -> bool | None:
        here = self._distance(before)
        if not 0 < here < inf:
            return None
        there = self._distance(after)
        return None if isnan(there) else there == here - 1

    def _save(self) -> State:
        return self._state

    def _load(self, state: State) -> None:
        level = parse(self.task.payload["level"])
        self._hash = hashlib.sha256(level.text.encode()).hexdigest()
        self._enter(level.board)
        self._state = state

    # -- what is best --------------------------------------------------------------------------

    def admissible(self) -> list[str]:
        """The moves that change the state (the others are legal and pointless)."""
        state, board = self._state, self._board
        return [a for a, step in self._ways.items() if move(board, state, step) != state]

    def optimal_actions(self) -> frozenset[str] | None:
        """All moves that shorten the optimal solution, exactly.

        From the table in small rooms, otherwise by A* from this state and from its successors
        (up to five searches). None in a state that is solved, cannot be solved, or is too hard
        for ``node_limit``.
        """
        best = self._best()
        return frozenset(best) if best else None

    def held_out(self, observation: str) -> bool:
        """Whether ``observation`` would be the start of a level outside the training split."""
        return split_of(observation) != SPLITS[0]

    def expert_action(self) -> str | None:
        """The next move of an optimal plan from the current state; None when it cannot be solved.

        Large rooms: the plan is kept until the agent leaves it; with ``expert_weight`` above 1 it
        is not optimal; None also means that ``node_limit`` was too low.
        """
        if self._table is None:
            return self._planned()
        best = self._best()
        if not best or self._ties == "first":
            return best[0] if best else None
        return self._chance().choice(best)

    def _chance(self) -> Random:
        return Random(f"{self._hash} {len(self._actions)}")

    def _best(self) -> list[str]:
        """The optimal moves in the order of ACTIONS; empty where unknown or none."""
        state, here = self._state, self._distance(self._state)
        if not 0 < here < inf:
            return []
        after = {a: move(self._board, state, step) for a, step in self._ways.items()}
        left = {a: self._distance(there) for a, there in after.items() if there != state}
        if any(isnan(distance) for distance in left.values()):
            return []
        return [a for a, distance in left.items() if distance == here - 1]

    def _distance(self, state: State) -> float:
        """Moves to the solution; infinite when there is none, NaN beyond ``node_limit``."""
        if self._table is not None:
            return self._table.distance(state)
        if state not in self._costs:
            found = search(self._board, state, node_limit=self._node_limit)
            if found.actions is None:
                self._costs[state] = inf if found.proven else nan
            else:
                for moves_left, passed, _ in self._trace(state, found.actions):
                    self._costs[passed] = moves_left
        return self._costs[state]

    def _trace(self, state: State, actions: tuple[str, ...]) -> Iterator[tuple[int, State, str]]:
        """Each state on the way to the solution: moves left, state, next move ("" at the end)."""
        for index, action in enumerate(actions):
            yield len(actions) - index, state, action
            state = move(self._board, state, self._ways[action])
        yield 0, state, ""

    def _planned(self) -> str | None:
        """The expert of large rooms."""
        state = self._state
        if state not in self._plan and self._costs.get(state) != inf:
            order = list(range(4))
            if self._ties == "random":
                self._chance().shuffle(order)
            limit, weight = self._node_limit, self._weight
            found = search(self._board, state, weight=weight, node_limit=limit, order=order)
            if found.actions is not None:
                self._plan = {s: action for _, s, action in self._trace(state, found.actions)}
            elif found.proven:
                self._costs[state] = inf
        return self._plan.get(state) or None


def _check(key: str, value: object, holds: bool, remedy: str) -> None:
    if not holds:
        raise ConfigError(remedy, key=key, value=value)
