"""What every check of an environment is given, and how a check ends.

Invariants: a check returns what it saw, or raises :class:`FailedError` (a promise is broken) or
:class:`SkippedError` (the environment does not offer what the check is about). A check plays at
least one episode and begins no further one when its budget of seconds is spent, so that slow
environments are checked less, and never without end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from math import inf
from random import Random
from typing import Any

from agentdistill.envs.base import TextEnv
from agentdistill.envs.footprint import Process
from agentdistill.records import StepResult, Task

MAX_STEPS, MIN_STEPS = 40, 5
"""Steps per episode of the checks that compare episodes: the less, the slower the environment."""

SHARE = 1 / 8
"""Of the budget that one such episode may take."""


class FailedError(Exception):
    """A promise was not kept."""


class SkippedError(Exception):
    """The environment does not offer what a check is about."""


def need(holds: bool, message: str) -> None:
    """FailedError with ``message`` unless ``holds``."""
    if not holds:
        raise FailedError(message)


def any_action(env: TextEnv, rng: Random) -> str:
    """An admissible action where they are listed, else one of the examples."""
    choices: list[str] = env.admissible() or list(getattr(env.action_space, "examples", ("",)))
    return rng.choice(choices)


def walk(
    env: TextEnv, task: Task, seed: int, steps: int = MAX_STEPS
) -> Iterator[tuple[str, StepResult]]:
    """A random episode of at most ``steps`` steps; the same for the same ``seed``."""
    rng = Random(f"{seed} {task.key}")
    env.reset(options={"task": task})
    for _ in range(steps):
        action = any_action(env, rng)
        result = env.act(action)
        yield action, result
        if result.terminated or result.truncated:
            return


def trace(env: TextEnv, task: Task, seed: int, steps: int = MAX_STEPS) -> list[Any]:
    """All that is seen in a random episode, as JSON: key, first observation, steps."""
    taken = [[action, asdict(result)] for action, result in walk(env, task, seed, steps)]
    return [task.key, env.reset(options={"task": task})[0], taken]


@dataclass
class Probe:
    """What every check is given.

    Attributes:
        env: the environment; checks leave it in any state.
        target: its id or ``module:Class``, None for an instance.
        kwargs: arguments of its constructor.
        episodes: tasks per check, at most.
        seed: of tasks and random play.
        seconds: how long to measure the speed.
        budget: seconds after which a check begins no further episode.
        expert_rate: known success rate of the expert, None where nobody knows it.
        before: the processes below this one when the environment was not made yet.
        played: episodes of the current check.
        closed: whether a check has closed the environment.
    """

    env: TextEnv
    target: str | None
    kwargs: Mapping[str, Any]
    episodes: int
    seed: int
    seconds: float = 0.5
    budget: float = inf
    expert_rate: float | None = None
    before: frozenset[Process] = frozenset()
    played: int = 0
    closed: bool = False
    _began: float = field(default_factory=time.monotonic)

    @cached_property
    def tasks(self) -> list[Task]:
        """The first tasks of the first split."""
        env = self.env
        found = list(islice(env.tasks(env.card.splits[0], seed=self.seed), self.episodes))
        need(bool(found), f"split {env.card.splits[0]} has no task")
        return found

    def begin(self) -> None:
        """A check begins: no episode was played, no second spent."""
        self.played, self._began = 0, time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the check began."""
        return time.monotonic() - self._began

    def late(self, share: float = 1.0) -> bool:
        """Whether ``share`` of the budget is spent."""
        return self.spent >= share * self.budget

    def each(self, share: float = 1.0) -> Iterator[Task]:
        """The tasks, one at least, until ``share`` of the budget is spent; counts them."""
        for number, task in enumerate(self.tasks):
            if number and self.late(share):
                return
            self.played += 1
            yield task

    @property
    def many(self) -> str:
        """How many tasks were played, in words."""
        known = len(self.tasks)
        if self.played < known:
            return f"{self.played} of {known} tasks (no time for more)"
        return f"{known} tasks" if known > 1 else "1 task"

    @cached_property
    def steps(self) -> int:
        """Steps of an episode that is compared with another."""
        began = time.monotonic()
        self.start(self.tasks[0])
        reset = time.monotonic() - began
        taken = sum(1 for _ in walk(self.env, self.tasks[0], self.seed, MIN_STEPS))
        per_step = max(time.monotonic() - began - 2 * reset, 1e-6) / max(taken, 1)
        fit = (SHARE * self.budget - reset) / per_step
        return int(max(MIN_STEPS, min(MAX_STEPS, fit)))

    def start(self, task: Task) -> str:
        """Reset to ``task``; the first observation."""
        return self.env.reset(options={"task": task})[0]

    def walk(self, task: Task, steps: int | None = None) -> Iterator[tuple[str, StepResult]]:
        """A random episode of at most ``steps`` steps; None takes :attr:`steps`."""
        return walk(self.env, task, self.seed, self.steps if steps is None else steps)

    def close(self) -> None:
        """Close the environment, once."""
        if not self.closed:
            self.closed = True
            self.env.close()
