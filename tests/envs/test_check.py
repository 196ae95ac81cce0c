"""check_env passes what is sound, and each planted fault fails the check that is meant for it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from agentdistill.envs import strain
from agentdistill.envs.base import Card, Moved, TextEnv
from agentdistill.envs.check import Check, Report, check_env
from agentdistill.envs.sokoban import SokobanEnv
from agentdistill.envs.worker import Child
from agentdistill.errors import ConfigError
from agentdistill.records import Task
from tests.cli_calls import call


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


class Lucky(Counting):
    """Its expert solves half of the first twelve tasks."""

    def expert_action(self) -> str:
        return "add" if self._goal % 3 else "wait"  # 21 and more are beyond the limit


class Rated(Lucky):
    @property
    def card(self) -> Card:
        return dataclasses.replace(super().card, expert_rate=0.5)


class Crosstalk(Counting):
    """Keeps its state where all instances see it."""

    def _begin(self, task: Task) -> str:
        Crosstalk.now = 0
        return super()._begin(task)

    def _advance(self, action: str) -> Moved:
        Crosstalk.now += action == "add"
        time.sleep(0)
        moved = super()._advance(action)
        return dataclasses.replace(moved, observation=str(Crosstalk.now))


class Single(Counting):
    @property
    def card(self) -> Card:
        return dataclasses.replace(super().card, slots=1)


HELD: list[Any] = []
"""What the leaking environments below hold for ever."""


class Hoarding(Counting):
    def _begin(self, task: Task) -> str:
        HELD.append(b"x" * (256 << 10))
        return super()._begin(task)


class Opening(Counting):
    def _begin(self, task: Task) -> str:
        HELD.append(Path(os.devnull).open())  # noqa: SIM115
        return super()._begin(task)


def thread() -> threading.Event:
    """End a new thread through the event."""
    event = threading.Event()
    threading.Thread(target=event.wait, daemon=True).start()
    return event


class Threading(Counting):
    def _begin(self, task: Task) -> str:
        HELD.append(thread())
        return super()._begin(task)


class Forking(Counting):
    """A child per episode, until all are closed."""

    def _begin(self, task: Task) -> str:
        HELD.append(Child(["cat"]))
        return super()._begin(task)


class Orphaning(Counting):
    """One child, which is never stopped."""

    child: Child | None = None

    def _begin(self, task: Task) -> str:
        if self.child is None:
            self.child = Child(["cat"])
            HELD.append(self.child)
        return super()._begin(task)


class Careful(Orphaning):
    """Starts again after close, as every environment may be asked to."""

    def close(self) -> None:
        if self.child is not None:
            self.child.stop()
        self.child = None


class Littering(Counting):
    """Each instance leaves a thread."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        HELD.append(thread())


class Slow(Counting):
    resets = 0

    def _begin(self, task: Task) -> str:
        time.sleep(0.15)
        Slow.resets += 1
        return super()._begin(task)

    def _advance(self, action: str) -> Moved:
        time.sleep(0.007)
        return super()._advance(action)


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
        (Hoarding, {"leaks"}),
        (Opening, {"leaks"}),
        (Threading, {"leaks"}),
        (Forking, {"leaks"}),
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


@pytest.fixture(autouse=True)
def _let_go(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few episodes, and what the planted faults hold must not stay until the next test."""
    monkeypatch.setattr(strain, "EPISODES", 60)
    yield
    for held in HELD:
        if isinstance(held, threading.Event):
            held.set()
        elif isinstance(held, Child):
            held.stop()
        elif not isinstance(held, bytes):
            held.close()
    HELD.clear()


@pytest.mark.parametrize(
    ("fault", "check", "message"),
    [
        ("Crosstalk", "threads", "4 at once see something else than one alone"),
        ("Orphaning", "leaks", r"close leaves 4 of its processes behind: \d+ cat; \d+ cat"),
        ("Littering", "leaks", "close leaves threads behind: 1 more than before"),
    ],
)
def test_a_fault_that_shows_in_several_instances_is_found(
    fault: str, check: str, message: str
) -> None:
    report = check_env(f"tests.envs.test_check:{fault}", episodes=3, seconds=0.01)
    (failed,) = [check for check in report.checks if check.status == "failed"]
    assert failed.name == check, str(report)
    assert re.search(message, failed.message), failed.message


def test_what_is_closed_is_gone_and_a_card_s_slots_hold() -> None:
    report = check_env("tests.envs.test_check:Careful", episodes=2, seconds=0.01)
    assert report.ok, str(report)
    found = {check.name: check for check in report.checks}
    assert found["leaks"].message.endswith("nothing is left after close")
    assert "1 process below" in found["leaks"].message
    assert found["threads"].episodes == 10
    report = check_env("tests.envs.test_check:Single", episodes=1, seconds=0.01)
    assert status(report)["threads"] == "skipped"


def test_slow_environments_are_checked_less_and_the_report_says_so() -> None:
    Slow.resets = 0
    began = time.monotonic()
    report = check_env(Slow(), episodes=50, seconds=0.1, budget=0.4)
    assert report.ok, str(report)
    assert time.monotonic() - began < 20
    found = {check.name: check for check in report.checks}
    for name in ("replay", "snapshot", "random"):
        assert 1 <= found[name].episodes < 5
        assert f"{found[name].episodes} of 50 tasks (no time for more)" in found[name].message
        assert 0.4 <= found[name].seconds < 2
    assert found["hostile"].episodes == 1, "one reset is enough where no action ends the episode"
    assert 3 <= found["leaks"].episodes < 10
    assert sum(check.episodes for check in report.checks) < Slow.resets < 100
    assert "replay" in str(report) and f"{found['replay'].episodes} episodes" in str(report)


def test_the_expert_must_be_as_good_as_it_is_known_to_be() -> None:
    def expert(env: TextEnv, rate: float | None) -> tuple[str, str]:
        report = check_env(env, episodes=12, seconds=0.01, expert_rate=rate)
        (found,) = [check for check in report.checks if check.name == "expert"]
        return found.status, found.message

    assert expert(Lucky(), None)[0] == expert(Lucky(), 0.5)[0] == expert(Lucky(), 0.0)[0] == "ok"
    assert expert(Rated(), None)[1].startswith("solved 50% of 12 tasks (known: 50%)")
    state, message = expert(Rated(), 0.99)
    assert state == "failed"
    assert message.startswith("the expert solved 6 of 12 tasks, and is known to solve 99%")
    assert expert(SokobanEnv(), 1.0)[0] == "ok"
    with pytest.raises(ConfigError, match=r"expert_rate=1\.5"):
        check_env(SokobanEnv(), expert_rate=1.5)


def test_every_result_is_told_as_it_comes() -> None:
    told: list[Check] = []
    report = check_env(Counting(), episodes=1, seconds=0.01, on_check=told.append)
    assert tuple(told) == report.checks and len(told) > 10


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


def test_the_command_has_the_options() -> None:
    words = ["envs", "check", "tests.envs.test_check:Lucky", "--episodes", "12", "--json"]
    result = call(*words, "--seconds", "0.01", "--budget", "5", "--expert-rate", "0.99")
    assert result.exit_code == 1
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert [name for name, check in checks.items() if check["status"] == "failed"] == ["expert"]
    assert (
        checks["expert"]["episodes"] == 12 and "known to solve 99%" in checks["expert"]["message"]
    )
    assert "leaks: ok, " in result.stderr, "progress"
