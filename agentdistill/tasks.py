"""Which tasks an iteration plays: an endless, seeded, resumable stream.

Invariants: the n-th task depends on the seed alone; within one pass tasks are distinct; a finite
split starts over with another order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import count, islice

from agentdistill.envs.base import TextEnv
from agentdistill.errors import ConfigError
from agentdistill.policy import derive_seed
from agentdistill.records import Task


class TaskStream:
    """Tasks without end; its state is how many were taken."""

    def __init__(self, passes: Callable[[int], Iterator[Task]]) -> None:
        """``passes(n)`` gives the n-th pass over the tasks."""
        self._passes = passes
        self._tasks = self._endless()
        self.taken = 0

    @classmethod
    def of_split(cls, env: TextEnv, split: str, seed: int) -> TaskStream:
        """All tasks of a split (or of the role ``tune`` or ``report``), pass after pass."""
        own = env.card.split(split)
        return cls(lambda n: env.tasks(own, seed=derive_seed(seed, own, n) % 2**31))

    @classmethod
    def of_list(cls, tasks: Sequence[Task], seed: int) -> TaskStream:
        """Given tasks, shuffled anew in every pass."""

        def shuffled(n: int) -> Iterator[Task]:
            order = list(tasks)
            random.Random(derive_seed(seed, "pass", n)).shuffle(order)
            return iter(order)

        return cls(shuffled)

    def _endless(self) -> Iterator[Task]:
        for number in count():
            empty = True
            for task in self._passes(number):
                empty = False
                yield task
            if empty:
                raise ConfigError("there are no tasks to draw from; check split and options")

    def take(self, number: int) -> list[Task]:
        """The next ``number`` tasks."""
        self.taken += number
        return list(islice(self._tasks, number))

    def state_dict(self) -> dict[str, int]:
        """How many were taken."""
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to where ``state`` was (by drawing again: levels are cheaper than bugs)."""
        self._tasks, self.taken = self._endless(), 0
        self.take(state["taken"])


def recorded(episodes: int, size: int, n: int, seed: int) -> list[int]:
    """Which of so many recorded ``episodes`` are in batch ``n``: pass after pass, each shuffled."""
    places = (divmod(place, episodes) for place in range(n * size, (n + 1) * size))
    return [_order(seed, number, episodes)[index] for number, index in places]


@lru_cache(maxsize=4)
def _order(seed: int, number: int, size: int) -> tuple[int, ...]:
    """The order of pass ``number`` over ``size`` episodes."""
    order = list(range(size))
    random.Random(derive_seed(seed, "pass", number)).shuffle(order)
    return tuple(order)


def draw(env: TextEnv, split: str, number: int, seed: int, *, fewer: bool = False) -> list[Task]:
    """``number`` distinct tasks of ``split``: the same for everybody with the same seed.

    Args:
        env: the environment.
        split: a part of its tasks, or a role such as ``report``.
        number: how many.
        seed: of their choice and order.
        fewer: whether all tasks of a smaller split will do.

    Raises:
        ConfigError: the split has fewer, or none at all.
    """
    distinct: dict[str, Task] = {}
    for task in env.tasks(env.card.split(split), seed=seed):
        distinct.setdefault(task.key, task)
        if len(distinct) == number:
            return list(distinct.values())
    if fewer and distinct:
        return list(distinct.values())
    raise ConfigError(
        f"split {split} of this environment has only {len(distinct)} distinct tasks",
        key="evaluate.tasks",
        value=number,
    )
