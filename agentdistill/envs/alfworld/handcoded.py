"""alfworld's handcoded expert, as its own wrapper plays it; lives in the worker process.

Invariants: it sees every step, whoever acted; its random choices are seeded by the game, so that a
replay gives the same actions. Upstream's heuristics sometimes get lost: then there is no action.
"""

from __future__ import annotations

import random
from typing import Any

from alfworld.agents.expert import HandCodedTWAgent

from agentdistill.envs.alfworld.goals import parameters

PATIENCE = 200
"""Steps after which it gives up, as upstream."""


class Handcoded:
    """The handcoded expert; ``action`` is what it would do now, or None."""

    def __init__(self) -> None:
        """It knows no game yet."""
        self.action: str | None = None

    def begin(self, problem: str, state: Any) -> None:
        """Meet a game: its PDDL problem and its first state."""
        random.seed(problem)
        task = parameters(problem)
        self._agent = HandCodedTWAgent(max_steps=PATIENCE)
        self._agent.task_params = task
        policy = self._agent.get_task_policy(task)
        self._agent.policy = policy(task, max_steps=PATIENCE)
        self._agent.observe(state.feedback)
        self.action = "look"

    def see(self, state: Any, command: str) -> None:
        """Learn what ``command`` led to."""
        if self.action is None:
            return
        try:
            choice = self._agent.act(state, 0, state["won"], command)
        except (NameError, LookupError):  # its own errors are NameErrors; the rest are its bugs
            self.action = None
            return
        self.action = choice if choice in state["admissible_commands"] else "look"
