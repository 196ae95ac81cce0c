"""A corridor: the smallest environment in which everything that can happen does happen."""

from __future__ import annotations

import random
from collections.abc import Iterator

from agentdistill.envs.base import Card, Moved, TextEnv
from agentdistill.records import Task

MOVES = {"left": -1, "right": 1}


class Corridor(TextEnv):
    """Walk to the goal; ``break_at`` makes the environment fail at a step, ``slow`` sleeps."""

    def __init__(self, length: int = 6, break_at: int | None = None, isolation: str = "inline"):
        super().__init__(actions=tuple(MOVES))
        self.length, self._break_at, self._isolation = length, break_at, isolation
        self._at = self._goal = self._steps = 0

    @property
    def card(self) -> Card:
        return Card(
            "tests/Corridor-v0",
            "1",
            "",
            "Apache-2.0",
            ("train", "tune", "report"),
            12,
            self._isolation,
            ("success", "score", "optimal"),
        )

    @property
    def instruction(self) -> str:
        return "Walk to the goal with left and right."

    def tasks(self, split: str, seed: int = 0) -> Iterator[Task]:
        pairs = [(a, g) for a in range(self.length) for g in range(self.length) if a != g]
        part = {"train": 0, "tune": 1, "report": 2}[split]
        mine = [pair for i, pair in enumerate(pairs) if (0 if i % 4 < 2 else i % 4 - 1) == part]
        random.Random(seed).shuffle(mine)
        for at, goal in mine:
            yield Task(self.card.id, split, {"at": at, "goal": goal})

    def _begin(self, task: Task) -> str:
        self._at, self._goal, self._steps = task.payload["at"], task.payload["goal"], 0
        return self._show()

    def _show(self) -> str:
        cells = ["."] * self.length
        cells[self._goal] = "G"
        cells[self._at] = "P"
        return "".join(cells) + "\n" + ("go" if self._steps else "start")

    def _advance(self, action: str) -> Moved:
        self._steps += 1
        if self._steps == self._break_at:
            raise RuntimeError("the floor gave way")
        valid = action in MOVES
        best = self.expert_action() == action
        if valid:
            self._at = min(max(self._at + MOVES[action], 0), self.length - 1)
        won = self._at == self._goal
        return Moved(self._show(), 1.0 if won else -0.1, won, won, float(won), valid, best)

    def admissible(self) -> list[str]:
        return list(MOVES)

    def expert_action(self) -> str:
        return "right" if self._goal > self._at else "left"

    def optimal_actions(self) -> frozenset[str]:
        return frozenset({self.expert_action()})

    def held_out(self, observation: str) -> bool:
        return False

    def _save(self):
        return (self._at, self._goal, self._steps)

    def _load(self, state) -> None:
        self._at, self._goal, self._steps = state


def micro(output, **changes):
    """A whole recipe on the corridor that runs in seconds, as a mapping for ``load``."""
    base = {
        "name": "micro",
        "output": str(output),
        "env": {"id": "tests.toy:Corridor"},
        "prompt": "bare",
        "sampling": {"max_tokens": 2},
        "models": {
            "teacher": {"hidden": 32, "heads": 2, "layers": 1, "tokenizer": {"vocabulary": 400}},
            "student": {"hidden": 16, "heads": 1, "layers": 1, "tokenizer": {"vocabulary": 400}},
        },
        "stages": [
            {"name": "demos", "do": "collect", "episodes": 30, "batch": 15},
            {
                "name": "taught",
                "model": "teacher",
                "method": "sft",
                "data": "demos",
                "iterations": 20,
                "tasks": 8,
                "lr": 1e-2,
            },
            {
                "name": "distilled",
                "model": "student",
                "teacher": "taught",
                "method": "opd",
                "iterations": 6,
                "tasks": 4,
                "checkpoint_every": 2,
            },
        ],
        "evaluate": {"policies": ["expert", "random", "taught", "distilled"], "tasks": 5},
    }
    return {**base, **changes}
