"""What lives in the worker process: one TextWorld game at a time.

Invariants
----------
* A game is identified by its content: a file whose hash is not the one that was listed is refused.
* ``sys.argv`` is what it was after every call, though fast-downward overwrites it.
* Whatever is wrong with a game file is an EnvError of one line that names the file.

A game file is trusted like a program: TextWorld evaluates expressions in its grammar.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import textworld
from alfworld.agents.utils.misc import Demangler

from agentdistill.envs.alfworld.games import HASH_LENGTH
from agentdistill.envs.alfworld.quick import Game, argv_kept, quicken
from agentdistill.errors import EnvError

PARTS = ("pddl_domain", "grammar", "pddl_problem")
"""What a game file must have; ``walkthrough`` may be missing."""


class Engine:
    """One game: its text, its admissible commands, its plans."""

    def __init__(self, *, cache: str | None = None, handcoded: bool = False) -> None:
        """Get ready.

        Args:
            cache: folder for grounded problems, or None.
            handcoded: keep alfworld's handcoded expert informed.
        """
        quicken().folder = folder = Path(cache) if cache else None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        infos = textworld.EnvInfos(won=True, admissible_commands=True, facts=handcoded)
        self._game, self._name = Game(infos), ""
        self._state: Any = None
        self._expert: Any = None
        if handcoded:
            from agentdistill.envs.alfworld.handcoded import Handcoded

            self._expert = Handcoded()

    def begin(self, source: Mapping[str, Any]) -> tuple[str, list[str]]:
        """Start a game, the same one again or another.

        Args:
            source: ``path`` and ``sha`` of a file, or ``kind``, ``seed`` and ``split`` of a
                generated game.

        Returns:
            The first text of the game, and the recorded walkthrough ([] where there is none).

        Raises:
            EnvError: the file is gone, has changed, or is no game that can be played.
        """
        name = json.dumps(dict(source), sort_keys=True)
        try:
            with argv_kept():
                if name != self._name:
                    self._name = ""  # a game that does not load must not be played
                    self._load(_content(source))
                    self._name = name
                self._state = self._game.reset()
        except EnvError:
            raise
        except Exception as error:
            reason = "it cannot be won" if "dummy" in str(error) else f"{type(error).__name__}"
            words = " ".join(f"{reason}: {error}".split())[:200]
            raise EnvError(f"{_place(source)} cannot be played ({words})") from error
        if self._expert is not None:
            self._expert.begin(self._game.problem, self._state)
        return str(self._state.feedback), [str(step) for step in self._game.walkthrough or ()]

    def _load(self, content: Mapping[str, Any]) -> None:
        self._game.load(content)
        entities = self._game.entities
        names = Demangler(game_infos=entities)
        for entity in entities.values():
            entity.name = names.demangle_alfred_name(entity.id)

    def step(self, command: str) -> tuple[str, bool, bool]:
        """Execute ``command``: the text, whether the game is won, whether it was a command."""
        self._state, _, _ = self._game.step(command)
        if self._expert is not None:
            self._expert.see(self._state, command)
        return str(self._state.feedback), bool(self._state["won"]), self._game.understood

    def admissible(self) -> list[str]:
        """All commands that do something now, sorted."""
        return list(self._state["admissible_commands"])

    def plan(self) -> list[str]:
        """Commands that win from here; [] where there is no way."""
        with argv_kept():
            return self._game.plan()

    def handcoded(self) -> str | None:
        """What the handcoded expert would do; None when it gave up."""
        action: str | None = self._expert.action
        return action


def _content(source: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a game."""
    if "kind" in source:
        from agentdistill.envs.alfworld.generate import generate

        return generate(source["kind"], source["seed"], source["split"])
    path = Path(source["path"])
    try:
        text = path.read_bytes()
    except OSError as error:
        raise EnvError(f"cannot read the game {path}: {error.strerror}") from error
    if hashlib.sha256(text).hexdigest()[:HASH_LENGTH] != source["sha"]:
        raise EnvError(f"the game {path} is not the one of this task: its content has changed")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise EnvError(f"the game {path} is damaged: no JSON ({error})") from error
    lacking = [part for part in PARTS if not isinstance(content, dict) or part not in content]
    if lacking:
        raise EnvError(f"the game {path} is damaged: it has no {', '.join(lacking)}")
    return dict(content)


def _place(source: Mapping[str, Any]) -> str:
    """``source`` in words."""
    if "path" in source:
        return f"the game {source['path']}"
    return f"the generated game {source['kind']} {source['seed']} of {source['split']}"
