"""ScienceWorld (Wang et al., EMNLP 2022): elementary science tasks in a simulated house, as text.

Invariants
----------
* A task's payload is ``{"task", "variation", "simplifications"}``; its parts are the official ones.
* The first observation is the task's description and the room, as in the papers' prompts; later
  ones are the simulator's answer to the command and nothing else.
* The official score runs from 0 to 100 and is -100 after a failure (focusing on a wrong thing),
  which ends the episode. ``score`` is that /100 and never below 0, or its highest value so far
  with the option ``score="best"`` (TCOD's convention); success is 100. The reward is the change:
  of the official score /100, so that a failure costs what was gained and 1 more, or with "best"
  of the highest value so far.
* ``valid`` is false where the parser does not know the command, or where the answer to its question
  ("Ambiguous request: …") is no number from the list. A command that it knows and that does nothing
  is valid, and so is one that makes it ask.
* One command is one step, also where no time passes in the world (looking, unknown commands).
* The expert is the simulator's gold path, which begins at the start and leads to 100. It is known
  as long as the agent has kept to it, apart from commands that took no time.
* Admissible actions are listed only when asked for: that costs several times a step.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

from agentdistill.envs.base import Availability, Card, Moved, TextEnv
from agentdistill.envs.scienceworld.problems import (
    EASY,
    SPLITS,
    VARIATIONS,
    checked_simplifications,
    checked_tasks,
    listing,
)
from agentdistill.envs.scienceworld.simulator import (
    NO_JAVA,
    Simulator,
    jar_hash,
    java,
    need,
    version,
)
from agentdistill.errors import ConfigError, EnvError
from agentdistill.records import Task

ID = "agentdistill/ScienceWorld-v0"

LONGEST = 300
"""Characters of a command; nothing that the parser knows is longer."""

UNKNOWN = "No known action matches that input."
QUESTION = "Ambiguous request"
REFUSED = (UNKNOWN, "Unknown action.")
"""How the simulator's answers to what it does not understand begin."""

OVERHEAD_MB = 120
"""What a Java process needs besides its heap, in MiB (measured)."""

INSTRUCTION = """\
You are in a house with a garden and do science experiments in text. Your task is given at the \
start; it may need several rooms, devices and substances. Give one command at a time.
Commands (OBJ is the name of a thing you see or carry, with "in" and the name of its container \
where several share a name):
look around | look at OBJ | look in OBJ | read OBJ | inventory | task
open OBJ | close OBJ | go to PLACE | pick up OBJ | put down OBJ | move OBJ to OBJ
pour OBJ into OBJ | dunk OBJ into OBJ | mix OBJ | eat OBJ | flush OBJ
activate OBJ | deactivate OBJ | use OBJ on OBJ
{more}focus on OBJ: names the thing that the task asks for; a wrong one fails the task for good.
wait1: let a moment pass | wait: let ten pass | reset task: forget what you focused on
If a command can mean several things you are shown a numbered list: answer with the number."""

TELEPORT = "teleport to PLACE: be there at once\n"
WIRES = "connect OBJ to OBJ | disconnect OBJ{where}\n"

TOOL = {
    "type": "function",
    "function": {
        "name": "act",
        "description": "Give one command to the simulated house; returns what happens.",
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "string", "maxLength": LONGEST}},
            "required": ["command"],
            "additionalProperties": False,
        },
    },
}

_gold_paths: OrderedDict[str, tuple[str, ...]] = OrderedDict()
"""Gold paths that were computed in this process, by the key of the task; the last thousand."""


class ScienceWorldEnv(TextEnv):
    """ScienceWorld. See the module docstring for what holds."""

    def __init__(
        self,
        *,
        tasks: Sequence[str] | None = None,
        simplifications: str = EASY,
        per_task: int | None = None,
        score: Literal["last", "best"] = "last",
        heap_mb: int = 256,
        deadline: float = 120.0,
        max_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Choose the problems; nothing is started.

        Args:
            tasks: names of tasks (problems.VARIATIONS) to list; None lists all thirty.
            simplifications: "easy" (the papers'), "" for none, or names from
                problems.SIMPLIFICATIONS with commas between.
            per_task: list only so many variations of each task, the first ones of the part.
            score: "last" or "best"; see the module docstring.
            heap_mb: limit on the heap of the Java process, in MiB.
            deadline: seconds after which a call that has no answer ends the Java process.
            max_steps: step limit; None is 100.
            render_mode: ``ansi`` or None.
        """
        examples = ("look around", "inventory", "task", "wait1")
        super().__init__(max_steps=max_steps, render_mode=render_mode, actions=examples)
        self._names = checked_tasks(tasks)
        self._simplifications = checked_simplifications(simplifications, self._names)
        _check("per_task", per_task, per_task is None or per_task >= 1, "must be at least 1")
        _check("score", score, score in ("last", "best"), "one of 'last', 'best'")
        _check("heap_mb", heap_mb, heap_mb >= 64, "must be at least 64")
        _check("deadline", deadline, deadline > 0, "must be positive")
        self._per_task, self._best_counts = per_task, score == "best"
        self._heap_mb, self._deadline = heap_mb, float(deadline)
        self._goal, self._over = "", False
        self._history: list[tuple[str, bool]] = []  # command, whether it changed nothing
        self._held: list[Simulator] = []  # none or one
        weakref.finalize(self, _let_go, self._held)

    # -- facts ---------------------------------------------------------------------------------

    @cached_property
    def card(self) -> Card:
        """The facts; ``data`` is the hash of the simulator's file."""
        simple = self._simplifications or "none"
        scored = "its highest value so far" if self._best_counts else "its value at the end"
        return Card(
            id=ID,
            version=version(),
            data=jar_hash(),
            licence="Apache-2.0",
            splits=SPLITS,
            step_limit=self._max_steps or 100,
            isolation="process",
            source="Wang et al. 2022, arXiv 2203.07540; https://github.com/allenai/ScienceWorld",
            slots=_slots(self._heap_mb),
            roles={"tune": "dev", "report": "test"},
            notes=(
                f"simplifications: {simple}",
                f"score: the official score / 100, not below 0, {scored}",
                "steps: every command counts, also those that take no time in the world",
                "random numbers are seeded before every command; Java's sets keep their order",
            ),
        )

    @classmethod
    def availability(cls) -> Availability:
        """The package and Java, without starting either."""
        found = version()
        needs = []
        if not found:
            needs.append("pip install 'agentdistill[scienceworld]'")
        if java() is None:
            needs.append(NO_JAVA)
        total = f"{len(VARIATIONS)} tasks, {sum(VARIATIONS.values()):,} variations, in the package"
        return Availability(
            f"scienceworld {found}" if found else "",
            total if found else "",
            missing=tuple(needs),
            needs=tuple(needs),
        )

    @property
    def instruction(self) -> str:
        """The rules and the commands that these simplifications leave."""
        simple = self._simplifications
        more = TELEPORT if simple == EASY or "teleportAction" in simple else ""
        if "noElectricalAction" not in simple:
            more += WIRES.format(where=" (in tasks with circuits)" if simple == EASY else "")
        return INSTRUCTION.format(more=more)

    @property
    def goal(self) -> str:
        """The description of the current task."""
        return self._goal

    @property
    def tools(self) -> list[dict[str, Any]]:
        """One tool, ``act``, whose ``command`` is an action."""
        return [TOOL]

    def tasks(self, split: str, seed: int = 0) -> Iterator[Task]:
        """The problems of ``split``, balanced over the tasks (problems.listing).

        Raises:
            ConfigError: an unknown split, or no Java.
            MissingExtraError: the package is not installed.
        """
        _check("split", split, split in SPLITS, f"one of {', '.join(SPLITS)}")
        need()
        return self._tasks(split, seed)

    def _tasks(self, split: str, seed: int) -> Iterator[Task]:
        counts = {name: VARIATIONS[name] for name in self._names}
        for index, (name, variation) in enumerate(listing(split, seed, counts, self._per_task)):
            payload = {
                "task": name,
                "variation": variation,
                "simplifications": self._simplifications,
            }
            yield Task(ID, split, payload, data=self.card.data, index=index)

    # -- an episode ----------------------------------------------------------------------------

    def _begin(self, task: Task) -> str:
        name, variation, simple = _problem(task)
        simulator = self._simulator(start=True)
        simulator.load(name, variation, simple)
        room = simulator.step("look around", 0)
        self._goal = simulator.describe()
        self._score, self._best, self._clock = room.score, max(0, room.score), room.clock
        self._asking = self._over = False
        self._history = []
        return f"{self._goal}\n\n{room.text}"

    def _advance(self, action: str) -> Moved:
        command = action.strip()
        if len(action) > LONGEST or not command.isprintable():
            self._history.append(("", True))
            return self._moved(UNKNOWN, 0.0, valid=False)
        answer = self._simulator().step(command, len(self._actions) + 1)
        asking, asked = answer.text.startswith(QUESTION), self._asking
        idle = answer.clock == self._clock and not (asking or asked)
        self._history.append((_plain(command), idle))
        gained, record = answer.score - self._score, max(self._best, answer.score)
        reward = record - self._best if self._best_counts else gained
        self._score, self._best, self._clock = answer.score, record, answer.clock
        self._asking, self._over = asking, answer.ended or answer.score < 0
        valid = not answer.text.startswith(REFUSED)
        return self._moved(answer.text, reward / 100, valid=valid)

    def _moved(self, text: str, reward: float, *, valid: bool) -> Moved:
        counted = self._best if self._best_counts else max(0, self._score)
        return Moved(
            text,
            reward,
            terminated=self._over,
            success=self._over and self._score == 100,
            score=counted / 100,
            valid=valid,
            extra={"official_score": self._score, "best_score": self._best, "clock": self._clock},
        )

    def admissible(self) -> list[str]:
        """All commands that the parser would accept now (hundreds; numbers while it asks)."""
        return self._simulator().admissible(len(self._actions) + 1)

    def close(self) -> None:
        """End the Java process; the next reset starts another."""
        _let_go(self._held)
        super().close()

    def _simulator(self, *, start: bool = False) -> Simulator:
        """Ours; where it has died another one, if we may ``start`` an episode with it."""
        if self._held and (self._held[0].alive or not start):
            return self._held[0]
        if not start:
            raise EnvError("no simulator runs; reset the environment")
        _let_go(self._held)
        self._held.append(Simulator(self._heap_mb, self._deadline))
        return self._held[0]

    # -- the expert ----------------------------------------------------------------------------

    def expert_action(self) -> str | None:
        """The next command of the gold path; None at its end, or when the agent has left it."""
        if self._over:
            return None
        path, place = self._gold_path(), 0
        for command, idle in self._history:
            if place < len(path) and command == _plain(path[place]):
                place += 1
            elif not idle:
                return None
        return path[place] if place < len(path) else None

    def _gold_path(self) -> tuple[str, ...]:
        """From the cache, or from the simulator, which then has to be brought back to here."""
        key = self.task.key
        if key not in _gold_paths:
            simulator = self._simulator()
            simulator.load(*_problem(self.task), gold=True)
            _gold_paths[key] = simulator.gold_path()
            simulator.step("look around", 0)
            for number, action in enumerate(self._actions, start=1):
                if len(action) <= LONGEST and action.strip().isprintable():
                    simulator.step(action.strip(), number)
        _gold_paths.move_to_end(key)
        while len(_gold_paths) > 1000:
            _gold_paths.popitem(last=False)
        return _gold_paths[key]


def _problem(task: Task) -> tuple[str, int, str]:
    """Task, variation and simplifications of a payload; ConfigError where it is none."""
    name, variation = task.payload.get("task"), task.payload.get("variation")
    simple = task.payload.get("simplifications", EASY)
    _check("task.payload.task", name, isinstance(name, str), "needs the name of a task")
    whole = isinstance(variation, int) and 0 <= variation < 2**31
    _check("task.payload.variation", variation, whole, "needs the number of a variation")
    _check("task.payload.simplifications", simple, isinstance(simple, str), "needs a text")
    return str(name), int(variation or 0), checked_simplifications(simple, [str(name)])


def _plain(command: str) -> str:
    """A command as the parser sees it: case and spaces do not matter."""
    return " ".join(command.lower().split())


def _let_go(held: list[Simulator]) -> None:
    while held:
        held.pop().close()


def _slots(heap_mb: int) -> int:
    """How many Java processes half of the memory holds, and at most four for each core."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    return max(1, min(4 * (os.cpu_count() or 1), memory // 2 // (heap_mb + OVERHEAD_MB)))


def _check(key: str, value: object, holds: bool, remedy: str) -> None:
    if not holds:
        raise ConfigError(remedy, key=key, value=value)
