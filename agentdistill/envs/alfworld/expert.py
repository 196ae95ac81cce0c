"""Somebody who knows a way to win and follows it.

Invariants: the next action depends on the steps taken only, not on when it is asked for; looking,
examining and actions that the game refuses do not lead away from the way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

IDLE = ("look", "inventory", "examine", "help")
"""Verbs of actions that leave everything as it is."""


class Follower:
    """Follows a way as long as the agent does; asks for another when it is left."""

    def __init__(self, way: Iterable[str], plan: Callable[[], list[str]]) -> None:
        """Begin at the start of ``way``; ``plan`` finds a way from wherever the agent is then."""
        self._way = deque(way)
        self._plan = plan
        self._lost = False  # there is no way from here

    def saw(self, action: str, valid: bool) -> None:
        """Learn of a step."""
        due = bool(self._way) and self._way[0] == action
        if due and valid:
            self._way.popleft()
        elif due or (valid and action.split(" ", 1)[0] not in IDLE):
            self._way.clear()  # a way whose next action is refused is no way
        self._lost = self._lost and not valid

    def action(self) -> str | None:
        """What to do now; None where nothing leads to the goal."""
        if not self._way and not self._lost:
            self._way.extend(self._plan())
            self._lost = not self._way
        return self._way[0] if self._way else None
