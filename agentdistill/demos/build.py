"""From episodes to the arrays of a collection.

Invariants: the same episodes give the same arrays, in whatever order they come; the shorter episode
comes first, then the one with the lesser id.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from agentdistill.demos.index import Arrays, Dense, Embedder, Lexical, Texts, code
from agentdistill.demos.window import Step
from agentdistill.records import Trajectory, Verdict, digest

KEYS = ("goal", "plan", "observation")
"""What is compared; the first two belong to an episode, the last to a step."""

TABLES = ("reasoning", "actions", "id", "task")
"""What else there is as text, of an episode or of a step."""


def planned(trajectory: Trajectory) -> str:
    """The plan that whoever acted wrote down beforehand: ``provenance["plan"]``."""
    return str(trajectory.provenance.get("plan", ""))


def task_key(trajectory: Trajectory) -> str:
    """Key of its task; an imported log may know it (``task_id``) without the task itself."""
    return str(trajectory.provenance.get("task_id") or trajectory.task.key)


@dataclass(slots=True)
class Skipped:
    """Episodes that were left out, by reason."""

    failed: int = 0
    faulty: int = 0
    excluded: int = 0
    empty: int = 0
    repeated: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One episode, as it is kept; for none of ``tasks`` it is ever found."""

    id: str
    task: str
    tasks: frozenset[str]
    goal: str
    plan: str
    steps: tuple[Step, ...]

    @property
    def content(self) -> str:
        """Hash of what is shown of it."""
        steps = [[s.index, s.observation, s.actions, s.reasoning] for s in self.steps]
        return digest([self.goal, self.plan, steps])


@dataclass(slots=True)
class _Numbers:
    """Distinct texts in order of their first use."""

    of: dict[str, int] = field(default_factory=dict)

    def __call__(self, text: str) -> int:
        return self.of.setdefault(text, len(self.of))


def entries(
    trajectories: Iterable[Trajectory],
    exclude: Container[str],
    plan: Callable[[Trajectory], str],
    skipped: Skipped,
) -> list[Entry]:
    """What is kept, in order; counts the rest in ``skipped``."""
    found: dict[str, list[Entry]] = {}
    for trajectory in trajectories:
        steps, key = _steps(trajectory), task_key(trajectory)
        if not trajectory.success:
            skipped.failed += 1
        elif trajectory.faults:
            skipped.faulty += 1
        elif not steps:
            skipped.empty += 1
        else:
            tasks = frozenset((key, trajectory.task.key))
            text = plan(trajectory)
            entry = Entry(trajectory.id, key, tasks, trajectory.goal, text, steps)
            found.setdefault(entry.content, []).append(entry)
    kept = []
    for content, same in found.items():
        entry = min(same, key=lambda one: (one.id, one.task))
        tasks = frozenset().union(*(one.tasks for one in same))
        if any(key in exclude for key in tasks):
            skipped.excluded += len(same)
        else:
            skipped.repeated += len(same) - 1
            kept.append((len(entry.steps), entry.id, content, replace(entry, tasks=tasks)))
    return [entry for *_, entry in sorted(kept, key=lambda one: one[:3])]


def _steps(trajectory: Trajectory) -> tuple[Step, ...]:
    """The turns in which something was executed that the environment accepted."""
    found = []
    for turn in trajectory.turns:
        done = turn.actions[: len(turn.results)] if turn.results else turn.actions
        if turn.verdict is Verdict.OK and any(done):
            found.append(
                Step(turn.index, turn.observation, tuple(filter(None, done)), turn.reasoning)
            )
    return tuple(found)


def pack(kept: list[Entry], embedder: Embedder | None) -> tuple[Arrays, list[str]]:
    """The arrays of a file, and the keys that have any text."""
    numbers = {name: _Numbers() for name in (*KEYS, *TABLES)}
    columns: dict[str, list[int]] = {name: [] for name in numbers}
    for entry in kept:
        for name in ("goal", "plan", "id", "task"):
            columns[name].append(numbers[name](getattr(entry, name)))
        for step in entry.steps:
            done = json.dumps(step.actions, ensure_ascii=False)
            columns["observation"].append(numbers["observation"](step.observation))
            columns["reasoning"].append(numbers["reasoning"](step.reasoning))
            columns["actions"].append(numbers["actions"](done))
    lengths = [len(entry.steps) for entry in kept]
    guards = sorted((int(code(key)), n) for n, entry in enumerate(kept) for key in entry.tasks)
    arrays: Arrays = {
        "starts": np.cumsum([0, *lengths], dtype=np.int64),
        "episode": np.repeat(np.arange(len(kept), dtype=np.int32), lengths),
        "turn": np.array([step.index for entry in kept for step in entry.steps], np.int32),
        "guards": np.array([key for key, _ in guards], np.uint64),
        "guarded": np.array([number for _, number in guards], np.int32),
    }
    keys = [key for key in KEYS if any(text.strip() for text in numbers[key].of)]
    for name, known in numbers.items():
        texts = list(known.of)
        parts = {"of": np.array(columns[name], np.int32), **Texts.pack(texts)}
        if name in keys:
            parts |= Dense.pack(texts, embedder) if embedder else Lexical.pack(texts)
        arrays |= {f"{name}/{part}": values for part, values in parts.items()}
    return arrays, keys
