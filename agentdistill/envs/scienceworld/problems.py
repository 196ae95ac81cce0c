"""Which problems ScienceWorld has, and which part each belongs to; needs neither Java nor the jar.

Invariants
----------
* A problem is a task's name, the number of a variation and the simplifications it is played with.
* The parts are the official ones: of ``n`` variations the first two quarters are train, the third
  dev, the fourth test, where a quarter is ``n // 4``. What is left over goes to test, but never
  more than one further quarter, so that some variations belong to no part.
* A listing goes round by round, each with one more variation of every task that has one: the
  beginning of a listing is balanced over the tasks, however unequal their numbers are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random

from agentdistill.errors import ConfigError

SPLITS = ("train", "dev", "test")

VARIATIONS = {
    "boil": 30,
    "change-the-state-of-matter-of": 30,
    "chemistry-mix": 32,
    "chemistry-mix-paint-secondary-color": 36,
    "chemistry-mix-paint-tertiary-color": 36,
    "find-animal": 300,
    "find-living-thing": 300,
    "find-non-living-thing": 300,
    "find-plant": 300,
    "freeze": 30,
    "grow-fruit": 126,
    "grow-plant": 126,
    "identify-life-stages-1": 14,
    "identify-life-stages-2": 10,
    "inclined-plane-determine-angle": 168,
    "inclined-plane-friction-named-surfaces": 1386,
    "inclined-plane-friction-unnamed-surfaces": 162,
    "lifespan-longest-lived": 125,
    "lifespan-longest-lived-then-shortest-lived": 125,
    "lifespan-shortest-lived": 125,
    "measure-melting-point-known-substance": 436,
    "measure-melting-point-unknown-substance": 300,
    "melt": 30,
    "mendelian-genetics-known-plant": 120,
    "mendelian-genetics-unknown-plant": 480,
    "power-component": 20,
    "power-component-renewable-vs-nonrenewable-energy": 20,
    "test-conductivity": 900,
    "test-conductivity-of-unknown-substances": 600,
    "use-thermometer": 540,
}
"""Task → number of variations in the simulator 1.2.3; 7,207 in all. A test asks the simulator."""

EASY = "easy"
SIMPLIFICATIONS = (
    "noElectricalAction",
    "openContainers",
    "openDoors",
    "selfWateringFlowerPots",
    "teleportAction",
)
"""What can be made simpler; "easy" is all but ``openContainers``, with wires where needed."""


def needs_wires(task: str) -> bool:
    """Whether ``task`` cannot be done without connecting things electrically."""
    return task.startswith(("power-component", "test-conductivity"))


def part(split: str, count: int) -> range:
    """The variations of ``split`` among ``count`` (five or more, as all tasks have)."""
    quarter = count // 4
    if split == "train":
        return range(2 * quarter)
    if split == "dev":
        return range(2 * quarter, 3 * quarter)
    return range(3 * quarter, min(5 * quarter, count))


def listing(
    split: str, seed: int, counts: Mapping[str, int], per_task: int | None = None
) -> Iterator[tuple[str, int]]:
    """Task and variation of every problem in ``split``, in the order that ``seed`` gives.

    Args:
        split: one of :data:`SPLITS`.
        seed: seeds the order.
        counts: task → number of variations.
        per_task: take only so many variations of each task, the first ones of its part.
    """
    chance = Random(f"{split} {seed}")
    waiting: dict[str, list[int]] = {}
    for name in sorted(counts):
        waiting[name] = list(part(split, counts[name]))[:per_task]
        chance.shuffle(waiting[name])
    while waiting:
        names = [name for name in waiting if waiting[name]]
        waiting = {name: waiting[name] for name in names}
        chance.shuffle(names)
        for name in names:
            yield name, waiting[name].pop()


def checked_tasks(names: Sequence[str] | None) -> tuple[str, ...]:
    """``names`` sorted, all tasks for None; ConfigError for an unknown one."""
    if names is None:
        return tuple(VARIATIONS)
    if isinstance(names, str) or not names:
        raise ConfigError("needs a list with at least one name", key="tasks", value=names)
    for name in names:
        if name not in VARIATIONS:
            raise ConfigError(f"one of {', '.join(VARIATIONS)}", key="tasks", value=name)
    return tuple(sorted(set(names)))


def checked_simplifications(text: str, tasks: Sequence[str]) -> str:
    """``text`` in its one spelling (sorted, no spaces); ConfigError where it cannot be.

    Args:
        text: "easy", or names from :data:`SIMPLIFICATIONS` with commas between, or "".
        tasks: what will be played; tasks that need wires refuse to be without.
    """
    names = sorted({name.strip() for name in text.split(",")} - {""})
    if names == [EASY]:
        return EASY
    for name in names:
        if name not in SIMPLIFICATIONS:
            remedy = f"'easy' alone, or a list from {', '.join(SIMPLIFICATIONS)}"
            raise ConfigError(remedy, key="simplifications", value=text)
    wired = [task for task in tasks if needs_wires(task)]
    if "noElectricalAction" in names and wired:
        remedy = f"leave out, with the option tasks, what needs wires: {', '.join(wired)}"
        raise ConfigError(remedy, key="simplifications", value=text)
    return ",".join(names)
