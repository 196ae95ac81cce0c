"""Who plays in ``environments.py``, and what: our environments, the packages underneath, a plan.

Invariant: all contenders play the tasks of one plan with its actions, and nobody looks anything up
while being timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol


class Player(Protocol):
    """What a contender can do.

    Attributes:
        listing: lists the admissible actions; None where nobody can, or each step does.
        in_step: whether each step does.
        alone: whether another worker must be another process.
    """

    listing: Callable[[], Any] | None
    in_step: bool
    alone: bool

    def reset(self, payload: Mapping[str, Any]) -> None:
        """Start an episode."""

    def step(self, action: str) -> bool:
        """Take one action; whether the episode has ended."""

    def close(self) -> None:
        """End everything."""


class Ours:
    """This library's environment."""

    in_step = alone = False

    def __init__(self, env: str, split: str) -> None:
        """Import and construct."""
        from agentdistill.envs.make import make

        self.env, self._split = make(env), split
        self.listing: Callable[[], Any] | None = self.env.admissible

    def reset(self, payload: Mapping[str, Any]) -> None:
        """Start the task with this payload."""
        from agentdistill.records import Task

        data = str(payload["data"])
        task = Task(self.env.card.id, self._split, payload["payload"], data)
        self.env.reset(options={"task": task})

    def step(self, action: str) -> bool:
        """One step."""
        *_, terminated, truncated, _ = self.env.step(action)
        return terminated or truncated

    def close(self) -> None:
        """Close."""
        self.env.close()


class TextWorld:
    """ALFWorld's own loop: a registered game and its wrappers, a process per worker."""

    listing, in_step, alone = None, True, True

    def __init__(self) -> None:
        """Import."""
        import textworld
        import textworld.gym
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos

        self._gym = textworld.gym
        self._infos = textworld.EnvInfos(won=True, admissible_commands=True, extras=["gamefile"])
        self._wrappers = [AlfredDemangler(), AlfredInfos]
        self._env: Any = None

    def reset(self, payload: Mapping[str, Any]) -> None:
        """Load the game's file."""
        self.close()
        arguments = sys.argv  # fast-downward's translator puts its own there
        name = self._gym.register_games(
            [payload["file"]],
            self._infos,
            batch_size=1,
            asynchronous=False,
            max_episode_steps=1000,
            wrappers=self._wrappers,
        )
        self._env = self._gym.make(name)
        self._env.reset()
        sys.argv = arguments

    def step(self, action: str) -> bool:
        """One step; the admissible commands come with it."""
        _, _, done, _ = self._env.step([action])
        return bool(done[0])

    def close(self) -> None:
        """Close."""
        if self._env is not None:
            self._env.close()
        self._env = None


class ScienceWorld:
    """ScienceWorldEnv as its examples use it."""

    listing, in_step, alone = None, True, False

    def __init__(self) -> None:
        """Import, and start Java."""
        from scienceworld import ScienceWorldEnv

        self._env = ScienceWorldEnv("", envStepLimit=1000)

    def reset(self, payload: Mapping[str, Any]) -> None:
        """Load the variation."""
        told = payload["payload"]
        self._env.load(told["task"], told["variation"], told["simplifications"])
        self._env.reset()

    def step(self, action: str) -> bool:
        """One step; the valid actions come with it."""
        *_, done, _ = self._env.step(action)
        return bool(done)

    def close(self) -> None:
        """End Java."""
        self._env.close()


class AppWorld:
    """AppWorld's own client in its own virtual environment, timed from outside: it stops clocks."""

    listing, in_step, alone = None, False, False  # each instance here starts a process

    def __init__(self) -> None:
        """Start its interpreter."""
        from agentdistill.envs.appworld import setup

        place = setup.python()
        assert place is not None
        self._process = subprocess.Popen(
            [str(place), "-c", _APPWORLD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "APPWORLD_ROOT": str(setup.root())},
        )

    def _ask(self, *words: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                return line
        raise RuntimeError("AppWorld's own client has ended; see its words above")

    def reset(self, payload: Mapping[str, Any]) -> None:
        """Open the task's world."""
        self._ask("reset", payload["payload"]["task"])

    def step(self, action: str) -> bool:
        """Execute code."""
        return "True" in self._ask("step", action)

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=60)


_APPWORLD = """
import json, sys
from appworld import AppWorld
world = None
for line in sys.stdin:
    word, told = json.loads(line)
    if word == "reset":
        if world is not None:
            world.close()
        world, answer = AppWorld(task_id=told, experiment_name="benchmark"), ""
    else:
        world.execute(told)
        answer = world.task_completed()
    print("answer", answer, flush=True)
if world is not None:
    world.close()
"""


@dataclass(frozen=True, slots=True)
class Rival:
    """The package underneath: how it is played, or why it is not."""

    name: str
    player: Callable[[], Player] | None = None
    absent: str = ""


OURS = ("ours", "ours, again")

RIVALS = {
    "agentdistill/ALFWorld-v0": Rival("textworld, alfworld's wrappers", TextWorld),
    "agentdistill/AppWorld-v0": Rival("AppWorld's own client", AppWorld),
    "agentdistill/ScienceWorld-v0": Rival("ScienceWorldEnv", ScienceWorld),
    "agentdistill/Sokoban-v0": Rival("", absent="gym-sokoban needs gym, which is not maintained"),
    "agentdistill/WebShop-v0": Rival(
        "", absent="the original needs Python 3.8, torch 1.11 and pyserini"
    ),
}


def plan(env: str, tasks: int, steps: int) -> dict[str, Any]:
    """Tasks and actions that all contenders play; their files, where they have some."""
    from random import Random

    from agentdistill.envs.make import make
    from agentdistill.envs.probe import any_action

    found: list[dict[str, Any]] = []
    with closing(make(env)) as made:
        split = _split(made)
        for task in first(made, split, tasks):
            made.reset(options={"task": task})
            actions: list[str] = []
            ended, rng = False, Random(task.key)
            while len(actions) < steps and not ended:
                actions.append(made.expert_action() or any_action(made, rng))
                result = made.act(actions[-1])
                ended = result.terminated or result.truncated
            told = {"payload": dict(task.payload), "data": task.data, "actions": actions}
            found.append({**told, "file": _file(task)})
        slots = made.card.slots
    return {"split": split, "plan": found, "slots": slots}


def _split(env: Any) -> str:
    """The part to play: that for reports, or another one where there is no expert or task."""
    own = dict.fromkeys(env.card.split(name) for name in ("report", "tune", env.card.splits[0]))
    known = [name for name in own if name in env.card.splits]
    for name in known:
        env.reset(options={"task": first(env, name, 1)[0]})
        if env.expert_action() is not None:
            return str(name)
    return str(known[0])


def first(env: Any, split: str, number: int) -> list[Any]:
    """``number`` tasks, or all of a smaller part."""
    from agentdistill.tasks import draw

    return draw(env, split, number, 0, fewer=True)


def _file(task: Any) -> str:
    """The game file of a task of ALFWorld; "" where there is none."""
    if "ALFWorld" not in task.env or "game" not in task.payload:
        return ""
    from agentdistill.envs.alfworld import games

    return str(games.dataset(games.data_folder()) / task.payload["game"])
