"""Episodes in rooms, as demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from agentdistill.demos import Match
from agentdistill.records import Actor, Task, Trajectory, Turn

TEACHER = Actor("teacher")


def episode(
    task: int | str,
    seen: Sequence[str],
    *,
    goal: str = "",
    plan: str = "",
    sample: int = 0,
    done: Sequence[str] | None = None,
    **changes: Any,
) -> Trajectory:
    """A successful episode that saw ``seen`` and did ``done`` ("do <what it saw>")."""
    did = done or [f"do {text}" for text in seen]
    turns = tuple(
        Turn(index, text, TEACHER, text=action, reasoning=f"so {text}", actions=(action,))
        for index, (text, action) in enumerate(zip(seen, did, strict=True))
    )
    made = Trajectory(
        Task("tests/Rooms-v0", "train", {"task": task}),
        f"g{task}",
        sample,
        turns,
        (),
        "success",
        True,
        1.0,
        goal=goal,
        provenance={"plan": plan} if plan else {},
    )
    return replace(made, **changes)


KITCHEN = episode("k", ["a kitchen with a fridge", "a cold apple", "a sink"], goal="wash an apple")
STUDY = episode("s", ["a study with a desk", "a red pen", "a lamp"], goal="light a pen")


def observations(match: Match) -> list[str]:
    return [step.observation for step in match.steps]


def rooms(number: int) -> list[Trajectory]:
    """As many episodes as their name says, so that a mixture of two builds is seen."""
    return [episode(n, [f"a room {number} {n} {i}" for i in range(3)]) for n in range(number)]
