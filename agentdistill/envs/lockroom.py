"""Locked rooms with a rule of their own: which container holds the key, and the levers' order.

The environment for methods that carry knowledge from one episode to the next (Skill-SD): the rule
belongs to the room's name, past episodes reveal it, and the prompt does not say it.

Invariants
----------
* A task's payload is the room's name and its size; the rule is a pure function of these
  (:func:`rule_of`) and is written nowhere, neither in a task nor in an observation.
* Every observation is the room's name and what has been achieved, a line each, and nothing else: it
  shows neither what was tried nor what would help.
* ``score`` is the share of conditions that are met now (key found, each lever down in its place),
  so that a wrong lever lowers it; the reward is its change, and an episode's rewards sum to its
  last score.
* A container opened again and a lever without the key are valid and pointless; any other text than
  the listed actions (upper or lower case, spaces ignored) is invalid. Each costs a step.
* A room's split depends on its name alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random
from typing import Any

from agentdistill.envs.base import Card, Moved, TextEnv
from agentdistill.errors import ConfigError
from agentdistill.records import Task

ID = "agentdistill/Lockroom-v0"

SPLITS = ("train", "tune", "report")

HELD_OUT = 0.06
"""Part of all names that is ``report``, and as many again that are ``tune``."""

CONTAINERS = ("chest", "desk", "jar", "safe", "crate", "vase", "trunk", "drum")
LEVERS = ("blue", "green", "red", "white", "black")

_FIRST = (
    "brisk calm dusty early faint giant hasty icy jolly keen lunar mossy noble oval plain quiet "
    "rapid salty tidal upper vivid windy young zesty amber bold crisp dry eager frosty grand hollow"
)
_SECOND = (
    "fox owl elm bay cave dune fern gate hill isle lake mill nest oak pond quay reef star tower "
    "vale wolf yard crow deer barn ford grove heron inlet kiln lodge marsh"
)

INSTRUCTION = """\
You are in a locked room. A key is in one of the containers. With the key you can pull levers, and \
the door opens when all of them are down. They go down in one order only: a wrong lever brings all \
of them up again. Rooms of the same name have the same key place and the same order.
Actions: open one of {containers}; pull one of {levers}. Write for example: open {one}
You see the name of the room and what you have: no key, or the key and how many levers are down."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What is hidden in a room: the container with the key, and the levers in their order."""

    key: str
    order: tuple[str, ...]

    @property
    def actions(self) -> tuple[str, ...]:
        """The shortest way out."""
        return (f"open {self.key}", *(f"pull {lever}" for lever in self.order))


@cache
def rule_of(room: str, containers: int, levers: int) -> Rule:
    """The rule of the room called ``room``, for a number of containers and of levers."""
    chance = Random(f"{room} {containers} {levers}")
    key = chance.choice(CONTAINERS[:containers])
    return Rule(key, tuple(chance.sample(LEVERS[:levers], levers)))


def split_of(room: str) -> str:
    """The split of a room: ``report`` for 6 % of all names, ``tune`` for 6 %, else ``train``.

    The first 8 bytes of the name's SHA-256 as a fraction u of 2**64 decide: u < 0.06 is report,
    u < 0.12 is tune.
    """
    share = int.from_bytes(hashlib.sha256(room.encode()).digest()[:8], "big") / 2**64
    if share < HELD_OUT:
        return "report"
    return "tune" if share < 2 * HELD_OUT else "train"


@cache
def names(split: str) -> tuple[str, ...]:
    """All names of a split, in an order that never changes: few rooms are a part of many."""
    known = [" ".join(pair) for pair in product(_FIRST.split(), _SECOND.split())]
    mine = [name for name in known if split_of(name) == split]
    return tuple(sorted(mine, key=lambda name: hashlib.sha256(f"{name}.".encode()).digest()))


class LockroomEnv(TextEnv):
    """Find the key, pull the levers. See the module docstring for what holds."""

    def __init__(
        self,
        *,
        containers: int = 4,
        levers: int = 3,
        rooms: int = 32,
        max_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Choose the rooms.

        Args:
            containers: how many there are, 1 to 8; one of them holds the key.
            levers: how many there are, 1 to 5; there are levers! orders.
            rooms: rooms of the training split; a smaller number is a part of a larger one.
            max_steps: step limit; None is twice the shortest way, 2 * (levers + 1).
            render_mode: ``ansi`` or None.
        """
        given = {"containers": containers, "levers": levers, "rooms": rooms}
        most = {"containers": len(CONTAINERS), "levers": len(LEVERS), "rooms": len(names("train"))}
        for key, value in given.items():
            if not 1 <= value <= most[key]:
                raise ConfigError(f"must be from 1 to {most[key]}", key=key, value=value)
        self._containers, self._levers, self._rooms = (
            CONTAINERS[:containers],
            LEVERS[:levers],
            rooms,
        )
        opening = [f"open {name}" for name in self._containers]
        known = (*opening, *(f"pull {name}" for name in self._levers))
        super().__init__(max_steps=max_steps, render_mode=render_mode, actions=known)
        self._known = frozenset(known)
        self._room, self._rule = "", Rule("", ())
        self._opened: frozenset[str] = frozenset()
        self._down = 0

    # -- facts ---------------------------------------------------------------------------------

    @property
    def card(self) -> Card:
        """The facts; ``seen`` is another name of ``train``, for evaluations that mean it."""
        return Card(
            id=ID,
            version="1",
            data="",
            licence="Apache-2.0",
            splits=SPLITS,
            step_limit=self._max_steps or 2 * (len(self._levers) + 1),
            metrics=("success", "score", "optimal"),
            roles={"seen": "train"},
            notes=("optimal means: for somebody who knows the rule of the room",),
            expert_rate=1.0,
        )

    @property
    def instruction(self) -> str:
        """What can be done; not the rule of any room."""
        return INSTRUCTION.format(
            containers=", ".join(self._containers),
            levers=", ".join(self._levers),
            one=self._containers[0],
        )

    @property
    def tools(self) -> list[dict[str, Any]]:
        """Two tools, ``open`` and ``pull``."""
        return [
            _tool("open", "Open a container and take the key if it is there.", self._containers),
            _tool("pull", "Pull a lever; they move only for who has the key.", self._levers),
        ]

    def tool_action(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The tool's name and its argument; what they do not fit is invalid."""
        said = super().tool_action(name, arguments)
        return f"{name} {said}" if said in arguments.values() else said

    def tasks(self, split: str, seed: int = 0) -> Iterator[Task]:
        """The rooms of ``split``, each once; ``train`` has as many as the option ``rooms`` says.

        Raises ConfigError for an unknown split.
        """
        if split not in SPLITS:
            raise ConfigError(f"one of {', '.join(SPLITS)}", key="split", value=split)
        return self._listed(split, seed)

    def _listed(self, split: str, seed: int) -> Iterator[Task]:
        rooms = list(names(split))[: self._rooms if split == "train" else None]
        Random(f"{split} {seed}").shuffle(rooms)
        size = {"containers": len(self._containers), "levers": len(self._levers)}
        for index, room in enumerate(rooms):
            yield Task(ID, split, {"room": room, **size}, index=index)

    # -- an episode ----------------------------------------------------------------------------

    def _begin(self, task: Task) -> str:
        self._enter(task)
        self._opened, self._down = frozenset(), 0
        return self._show()

    def _enter(self, task: Task) -> None:
        """Read the room; a room of another size than this environment's is a ConfigError."""
        room, payload = task.payload.get("room"), task.payload
        if not isinstance(room, str) or not room:
            raise ConfigError("needs the name of a room", key="task.payload.room", value=room)
        for key, number in (("containers", len(self._containers)), ("levers", len(self._levers))):
            if payload.get(key) != number:
                remedy = f"this environment was made with {key}={number}"
                raise ConfigError(remedy, key=f"task.payload.{key}", value=payload.get(key))
        self._room, self._rule = room, rule_of(room, len(self._containers), len(self._levers))

    @property
    def _has_key(self) -> bool:
        return self._rule.key in self._opened

    @property
    def _score(self) -> float:
        return (self._has_key + self._down) / (1 + len(self._levers))

    def _show(self) -> str:
        state = f"key, {self._down} of {len(self._levers)}" if self._has_key else "no key"
        return f"{self._room}\n{'open' if self._score == 1 else state}"

    def _advance(self, action: str) -> Moved:
        said, best, before = " ".join(action.lower().split()), self._best(), self._score
        valid = said in self._known
        if valid:
            self._do(*said.split())
        done = self._score == 1
        return Moved(
            self._show(),
            self._score - before,
            terminated=done,
            success=done,
            score=self._score,
            valid=valid,
            optimal=said == best if best else None,
        )

    def _do(self, verb: str, thing: str) -> None:
        if verb == "open":
            self._opened |= {thing}
        elif self._has_key and thing not in self._rule.order[: self._down]:
            self._down = self._down + 1 if thing == self._rule.order[self._down] else 0

    def _save(self) -> tuple[frozenset[str], int]:
        return self._opened, self._down

    def _load(self, state: tuple[frozenset[str], int]) -> None:
        self._enter(self.task)
        self._opened, self._down = state

    # -- what is best --------------------------------------------------------------------------

    def admissible(self) -> list[str]:
        """What somebody who does not know the rule would consider: no action here is a hint.

        Without the key the containers not opened yet, with it the levers that are up.
        """
        if not self._has_key:
            return [f"open {name}" for name in self._containers if name not in self._opened]
        down = self._rule.order[: self._down]
        return [f"pull {name}" for name in self._levers if name not in down]

    def _best(self) -> str | None:
        done = self._has_key + self._down
        return None if done > len(self._levers) else self._rule.actions[done]

    def expert_action(self) -> str | None:
        """The next step of somebody who knows the rule; None when the door is open."""
        return self._best()

    def optimal_actions(self) -> frozenset[str] | None:
        """The expert's action: there is never another as good."""
        best = self._best()
        return frozenset({best}) if best else None

    def held_out(self, observation: str) -> bool:
        """Whether ``observation`` shows a room outside the training split."""
        return split_of(observation.partition("\n")[0]) != "train"


def _tool(name: str, description: str, things: tuple[str, ...]) -> dict[str, Any]:
    """JSON schema of a tool whose only argument, ``name``, is one of ``things``."""
    parameters = {
        "type": "object",
        "properties": {"name": {"type": "string", "enum": list(things)}},
        "required": ["name"],
        "additionalProperties": False,
    }
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}
