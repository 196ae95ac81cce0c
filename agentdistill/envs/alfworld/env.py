"""ALFWorld: household tasks in text, played by the real TextWorld engine.

Invariants
----------
* The engine lives in a process of its own per instance (engine.py), started at the first reset and
  replaced when it died; nothing heavy is imported here.
* Observations are the engine's text. Only the banner line of the first one is dropped.
* A task's payload is the path and the hash of a game file, or type, seed and split of a generated
  game; a file with another content is an EnvError.
* Reward, score and success are 1 when the engine says that the goal holds, which ends the episode;
  ``valid`` is false when the engine answers "Nothing happens.".
* Actions are taken as they are, surrounding spaces apart (the engine knows lower case only). What
  no command can be, because it is too long or not printable, does not reach the engine.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path, PurePosixPath
from random import Random
from typing import Any

from agentdistill.envs.alfworld import words
from agentdistill.envs.alfworld.expert import Follower
from agentdistill.envs.alfworld.games import (
    MOVE,
    PUT,
    SPLITS,
    Index,
    cache_folder,
    data_folder,
    dataset,
    has_games,
    index,
    splits,
)
from agentdistill.envs.alfworld.goals import TYPES
from agentdistill.envs.base import Availability, Card, Moved, TextEnv
from agentdistill.envs.worker import Worker, scrubbed
from agentdistill.errors import ConfigError, EnvError, MissingExtraError
from agentdistill.records import Task

ID = "agentdistill/ALFWorld-v0"

EXPERTS = ("walkthrough", "planner", "handcoded")

LONGEST = 200
"""Characters that a command may have; real ones have less than 60."""

LONG_WAY = 20
"""Steps within which a plan wins; 500 recorded walkthroughs had 10 at most."""

MEMORY = 150 * 2**20
"""Bytes of memory that an episode is reckoned with; measured: 100 to 150 MB."""

DOWNLOAD = "agentdistill data alfworld"

_BANNER = re.compile(r"\A-= .* =-\s*")
_TASK = re.compile(r"Your task is to: (.*)")


class ALFWorldEnv(TextEnv):
    """ALFWorld on official or generated games. See the module docstring for what holds."""

    def __init__(
        self,
        *,
        games: str | Path = "auto",
        types: Sequence[str] | None = None,
        expert: str = "walkthrough",
        max_steps: int | None = None,
        deadline: float = 120.0,
        render_mode: str | None = None,
    ) -> None:
        """Choose the games.

        Args:
            games: "official" (those in alfworld's data folder), "generated" (ours, see
                generate.py), "auto" (official where there are any), or a folder of game files.
            types: only these task types (goals.TYPES); None plays all.
            expert: "walkthrough" follows the way recorded with the game and plans anew when the
                agent left it; "planner" plans from the start; "handcoded" is alfworld's own.
            max_steps: step limit; None is 50, as upstream.
            deadline: seconds that the engine may take for one answer, its start included.
            render_mode: ``ansi`` or None.
        """
        super().__init__(max_steps=max_steps, render_mode=render_mode, actions=("look",))
        chosen = TYPES if types is None else (types,) if isinstance(types, str) else tuple(types)
        _check("types", types, bool(chosen) and set(chosen) <= set(TYPES), f"some of {TYPES}")
        _check("expert", expert, expert in EXPERTS, f"one of {EXPERTS}")
        _check("deadline", deadline, deadline > 0, "must be above 0")
        self._games, self._expert, self._deadline = games, expert, deadline
        self._types = tuple(name for name in TYPES if name in chosen)
        self._worker: Worker | None = None
        self._end: weakref.finalize[Any, Any] | None = None
        self._goal = ""
        self._follower: Follower | None = None

    # -- facts ---------------------------------------------------------------------------------

    @classmethod
    def availability(cls) -> Availability:
        """What is installed and which games there are."""
        package, needs = _package(), []
        if not package:
            needs.append("the package alfworld: pip install 'agentdistill[alfworld]'")
        root = dataset(data_folder())
        if _is_folder_of_games(root):
            found = splits(root)
            missing = [f"split {name}: {DOWNLOAD}" for name in SPLITS if name not in found]
            return Availability(
                package, f"{', '.join(found)} in {root}", tuple(missing), tuple(needs)
            )
        remedy = f"official games: {DOWNLOAD}"
        return Availability(package, "generated games", (remedy,), tuple(needs))

    @cached_property
    def card(self) -> Card:
        """The facts; ``data`` is the hash of all games, or the version of the generator."""
        limit = self._max_steps or 50
        return Card(
            id=ID,
            version=_package(),
            data=self._index.data if self._index else f"generated-{_generator()}",
            licence="MIT AND GPL-3.0-or-later",
            splits=tuple(self._index.entries) if self._index else SPLITS,
            step_limit=limit,
            isolation="process",
            source="Shridhar et al. 2021 (arXiv:2010.03768); TextWorld, Côté et al. 2018",
            slots=_slots(),
            roles={"tune": "valid_seen", "report": "valid_unseen"},
            notes=self._notes(),
            expert_rate=1.0 if self._expert != "handcoded" and limit >= LONG_WAY else None,
        )

    def _notes(self) -> tuple[str, ...]:
        if self._index:
            counts = {name: len(found) for name, found in self._index.entries.items()}
            games = "games: " + ", ".join(f"{number} {name}" for name, number in counts.items())
        else:
            games = "games: generated, not the official ones"
        return (
            games,
            f"wording: {' and '.join(self._wordings)}",
            f"types: {'all' if self._types == TYPES else ', '.join(self._types)}",
            "the banner line of the first observation is dropped",
            "admissible actions: all but help",
        )

    @cached_property
    def _index(self) -> Index | None:
        """The game files; None where games are generated."""
        if self._games == "generated":
            return None
        named = self._games not in ("auto", "official")
        root = dataset(Path(self._games).expanduser() if named else data_folder())
        if _is_folder_of_games(root):
            return index(root)
        remedy = f"no game file in {root}: {DOWNLOAD}"
        _check("games", str(self._games), self._games == "auto", remedy)
        return None

    @cached_property
    def _wordings(self) -> tuple[str, ...]:
        """How the games speak; the most frequent wording first."""
        if self._index:
            return self._index.wordings or (MOVE,)
        if not _package():
            return (MOVE,)
        from agentdistill.envs.alfworld.generate_package import package

        return (MOVE if package().commands["PutObject"].startswith("move") else PUT,)

    @property
    def instruction(self) -> str:
        """The rules, in the wording of the games."""
        return words.instruction(self._wordings)

    @property
    def goal(self) -> str:
        """The words after "Your task is to:"."""
        return self._goal

    @property
    def tools(self) -> list[dict[str, Any]]:
        """One tool per verb, in the wording of the games."""
        return words.tools(self._wordings[0])

    def tool_action(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The action that a tool call asks for."""
        action = words.spoken(self._wordings[0], name, arguments)
        return super().tool_action("", {name: arguments}) if action is None else action

    def tasks(self, split: str, seed: int = 0) -> Iterator[Task]:
        """The games of ``split`` in an order that follows from ``seed``.

        Generated games go on for ever, the types in turn. Raises ConfigError for an unknown split
        or one without games, MissingExtraError without the package.
        """
        _require()
        known = self.card.splits
        remedy = f"one of {', '.join(known)}" + (f"; {DOWNLOAD}" if split in SPLITS else "")
        _check("split", split, split in known, remedy)
        if self._index is None:
            return self._generated(split, seed)
        every = self._types == TYPES  # even games of a type of their own, or too damaged to tell
        found = [e for e in self._index.entries[split] if every or e.kind in self._types]
        _check("split", split, bool(found), f"no game of these types in {self._index.root}")
        order = list(enumerate(found))
        Random(f"{split} {seed}").shuffle(order)
        return (Task(ID, split, {"game": e.path, "sha": e.sha}, index=i) for i, e in order)

    def _generated(self, split: str, seed: int) -> Iterator[Task]:
        rng, used = Random(f"{split} {seed}"), set()
        for number in count():
            choice = self._types[number % len(self._types)], rng.randrange(2**31)
            if choice not in used:
                used.add(choice)
                payload = {"kind": choice[0], "seed": choice[1], "split": split}
                yield Task(ID, split, payload, f"generated-{_generator()}", number)

    # -- an episode ----------------------------------------------------------------------------

    def _begin(self, task: Task) -> str:
        _require()
        self._follower, self._goal = None, ""
        source, worker = self._source(task), self._engine()
        text, way = worker.call("begin", source)
        found = _TASK.search(text)
        self._goal = found[1].strip() if found else ""
        known = way if self._expert == "walkthrough" else ()
        self._follower = Follower(known, partial(worker.call, "plan"))
        return _BANNER.sub("", text)

    def _source(self, task: Task) -> dict[str, Any]:
        """Where the engine finds the game."""
        payload = task.payload
        if "game" not in payload:
            mine = f"generated-{_generator()}"
            _check("task.data", task.data, task.data == mine, f"these games are {mine}")
            return {name: payload.get(name) for name in ("kind", "seed", "split")}
        path = PurePosixPath(str(payload["game"]))
        inside = not path.is_absolute() and ".." not in path.parts
        _check("task.payload.game", str(path), inside, "must lie in the folder of the games")
        root = self._index.root if self._index else dataset(data_folder())
        return {"path": str(root / path), "sha": payload.get("sha")}

    def _engine(self) -> Worker:
        """The worker; a new one where there is none that can be used."""
        if self._worker is None or self._worker.broken:
            self.close()
            folder = cache_folder()
            variables = {"PYTHONHASHSEED": "0"}  # the planner must break ties alike everywhere
            if folder is not None:
                variables["ALFWORLD_DATA"] = str(folder)  # alfworld makes this folder at import
            self._worker = Worker(
                "agentdistill.envs.alfworld.engine:Engine",
                deadline=self._deadline,
                environ=scrubbed(**variables),
                cache=str(folder / "grounded") if folder else None,
                handcoded=self._expert == "handcoded",
            )
            self._end = weakref.finalize(self, self._worker.close)
        return self._worker

    def _call(self, method: str, *arguments: Any) -> Any:
        if self._worker is None or self._follower is None:
            raise EnvError("the engine of this episode has ended: reset the environment")
        return self._worker.call(method, *arguments)

    def _advance(self, action: str) -> Moved:
        command = action.strip()
        if len(command) > LONGEST or not command.isprintable():
            command = ""  # the engine refuses it as it refuses all that is no command
        text, won, valid = self._call("step", command)
        if self._follower is not None:
            self._follower.saw(command, valid)
        reward = float(won)
        return Moved(text, reward, terminated=won, success=won, score=reward, valid=valid)

    def close(self) -> None:
        """End the engine's process."""
        if self._end is not None:
            self._end()
        self._worker = self._end = None

    # -- what is best --------------------------------------------------------------------------

    def admissible(self) -> list[str]:
        """All commands that the engine takes now, without help (which is always the same)."""
        return [command for command in self._call("admissible") if command != "help"]

    def expert_action(self) -> str | None:
        """The next action of the expert; None where it gave up (the handcoded one may).

        Planning anew takes about 0.1 s. Which of several equally short ways is taken may depend on
        when the expert was asked before.
        """
        if self._expert == "handcoded":
            action: str | None = self._call("handcoded")
            return action
        return self._follower.action() if self._follower else None


def _check(key: str, value: object, holds: bool, remedy: str) -> None:
    if not holds:
        raise ConfigError(remedy, key=key, value=value)


def _package() -> str:
    """Name and version of what is installed, "" where something is missing."""
    try:
        return ", ".join(f"{name} {version(name)}" for name in ("alfworld", "textworld"))
    except PackageNotFoundError:
        return ""


def _require() -> None:
    if not _package():
        raise MissingExtraError("the environment ALFWorld", "alfworld")


def _generator() -> str:
    """The version of generated games; another alfworld makes other games of the same seed."""
    from agentdistill.envs.alfworld.rooms import VERSION

    installed = _package().partition(",")[0].partition(" ")[2]
    return f"{VERSION}-{installed}" if installed else VERSION


def _is_folder_of_games(root: Path) -> bool:
    return root.is_dir() and has_games(root)


def _slots() -> int:
    """Episodes at once: steps are short, so that memory limits before the processors do."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(16 * (os.cpu_count() or 1), memory // 2 // MEMORY))
