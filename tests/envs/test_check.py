"""check_env passes what is sound, and each planted fault fails the check that is meant for it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from agentdistill.envs.base import Card, Moved, TextEnv
from agentdistill.envs.check import Report, check_env
from agentdistill.envs.sokoban import SokobanEnv
from agentdistill.errors import ConfigError
from agentdistill.records import Task


class Counting(TextEnv):
    """A third party's environment: say "add" until the goal is reached."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(actions=("add", "wait"), **kwargs)

    @property
    def card(self) -> Card:
        return Card("other/Counting-v1", "1", "", "MIT", ("train", "test"), step_limit=20)

    @property
    def instruction(self) -> str:
        return "Say add until the goal is reached."

    def tasks(self, split: str, seed: int = 0) -> Iterator[Task]:
        if split not in self.card.splits:
            raise ConfigError("unknown", key="split", value=split)
        for number in itertools.count(seed % 7):
            odd = split == "test"
            yield Task(self.card.id, split, {"goal": 3 + 2 * number + odd})

    def _begin(self, task: Task) -> str:
        self._goal, self._count = int(task.payload["goal"]), 0
        return f"0 of {self._goal}"

    def _advance(self, action: str) -> Moved:
        self._count += action == "add"
        done = self._count >= self._goal
        text = f"{self._count} of {self._goal}"
        return Moved(text, float(done), done, done, float(done), action in ("add", "wait"))


class Silent(Counting):
    @property
    def instruction(self) -> str:
        return " "


class Repeating(Counting):
    def tasks(self, split: str, seed: int = 0) -> Iterator[Task]:
        return itertools.chain.from_iterable((t, t) for t in super().tasks(split, seed))


class Shared(Counting):
    def tasks(self, split: str, seed: int = 0) -> Iterator[Task]:
        for task in super().tasks(split, 0):
            yield Task(task.env, split, {"goal": task.payload["goal"] // 2 * 2 + 1})


class Forgetful(Counting):
    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        return super().reset(options=options)


class Noisy(Counting):
    def _begin(self, task: Task) -> str:
        return super()._begin(task) + str(Random().random())


class Drifting(Counting):
    drift = 0

    def _advance(self, action: str) -> Moved:
        Drifting.drift += 1
        moved = super()._advance(action)
        return Moved(moved.observation, Drifting.drift, moved.terminated, moved.success)


class Hashing(Counting):
    def _begin(self, task: Task) -> str:
        return super()._begin(task) + str(hash("a word") % 1000)


class Amnesic(Counting):
    def _save(self) -> Any:
        return {"goal": self._goal}

    def _load(self, state: Any) -> None:
        self._goal = state["goal"]


class Fragile(Counting):
    def _advance(self, action: str) -> Moved:
        action.encode()
        return super()._advance(action)


class Endless(Counting):
    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, _, info = super().step(action)
        return observation, reward, terminated, False, info


class Overrated(Counting):
    def _advance(self, action: str) -> Moved:
        moved = super()._advance(action)
        return Moved(moved.observation, moved.reward, moved.terminated, moved.success, 1.5)


class Hopeless(Counting):
    def expert_action(self) -> str:
        return "wait"


class Contradictory(SokobanEnv):
    def optimal_actions(self) -> frozenset[str] | None:
        best = super().optimal_actions()
        return best and frozenset({"Up", "Down", "Left", "Right"}) - best


def status(report: Report) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def test_sokoban_keeps_every_promise() -> None:
    report = check_env("agentdistill/Sokoban-v0", episodes=3, seconds=0.05)
    assert report.ok, report
    assert set(status(report).values()) == {"ok"}
    assert json.loads(json.dumps(report.to_json()))["card"]["id"] == "agentdistill/Sokoban-v0"
    messages = {check.name: check.message for check in report.checks}
    assert messages["expert"].startswith("solved 100% of 3 tasks")
    assert messages["gymnasium"] == "no warning"


def test_a_third_partys_environment_passes_and_says_what_it_lacks() -> None:
    report = check_env("tests.envs.test_check:Counting", episodes=2, seconds=0.02)
    assert report.ok, report
    found = status(report)
    assert {name for name, state in found.items() if state == "skipped"} == {"expert", "optimal"}


def test_an_instance_is_checked_and_left_open() -> None:
    report = check_env(SokobanEnv(boxes=2), episodes=2, seconds=0.02)
    assert report.ok, report
    assert status(report)["processes"] == "skipped"
    assert report.target == "SokobanEnv"


@pytest.mark.parametrize(
    ("fault", "checks"),
    [
        (Silent, {"card"}),
        (Repeating, {"tasks"}),
        (Shared, {"tasks"}),
        (Forgetful, {"gymnasium"}),
        (Noisy, {"replay"}),
        (Drifting, {"gymnasium", "replay", "snapshot"}),
        (Amnesic, {"snapshot"}),
        (Fragile, {"hostile"}),
        (Endless, {"limit"}),
        (Overrated, {"hostile", "random"}),
        (Hopeless, {"expert"}),
        (Contradictory, {"optimal"}),
    ],
)
def test_a_planted_fault_is_found(fault: type[TextEnv], checks: set[str]) -> None:
    report = check_env(fault(), episodes=3, seconds=0.01)
    assert not report.ok
    failed = {name for name, state in status(report).items() if state == "failed"}
    assert failed == checks, str(report)


def test_a_difference_between_processes_is_found() -> None:
    report = check_env("tests.envs.test_check:Hashing", episodes=1, seconds=0.01)
    assert {c.name for c in report.checks if c.status == "failed"} == {"processes"}, str(report)


@pytest.mark.parametrize(
    "target",
    ["nowhere:Env", "agentdistill.envs.base:Missing", "NoSuch-v0", "collections:Counter"],
)
def test_what_cannot_be_made_is_a_config_error(target: str) -> None:
    with pytest.raises(ConfigError, match=r"^env(\.id)?="):
        check_env(target)


def test_a_wrong_argument_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"env\.options=.*options of"):
        check_env("agentdistill.envs.sokoban:SokobanEnv", kwargs={"colour": "red"})
    with pytest.raises(ConfigError, match="boxes=0"):
        check_env("agentdistill/Sokoban-v0", kwargs={"boxes": 0})
    with pytest.raises(ConfigError, match="episodes=0"):
        check_env("agentdistill/Sokoban-v0", episodes=0)
