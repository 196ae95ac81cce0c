"""Samples that are tried out: where the environment is afterwards, and votes on what happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentdistill.agreement import Rule
from agentdistill.cascade import CascadePolicy
from agentdistill.config import load
from agentdistill.envs.base import Card, Moved, TextEnv
from agentdistill.envs.make import make
from agentdistill.errors import ConfigError, EnvError
from agentdistill.recipe import validate
from agentdistill.records import Trajectory
from agentdistill.rollout import Request, rollout, run
from agentdistill.run import Run
from tests.test_cascade import TASK, Asked, actor, play
from tests.test_tool_calls import Tools, walk
from tests.toy import Corridor, micro


class Replayed(Corridor):
    """A corridor whose states come back by replay."""

    def _save(self) -> None:
        return None


class Counting(Corridor):
    """A corridor that lies about its state: its clock goes on."""

    ticks = 0

    def _show(self) -> str:
        return f"{super()._show()} {self.ticks}"

    def _advance(self, action: str) -> Moved:
        self.ticks += 1
        return super()._advance(action)

    def _save(self) -> None:
        return None


class Mail(Corridor):
    """A corridor in which something stays done."""

    @property
    def card(self) -> Card:
        return Card("tests/Mail-v0", "1", "", "Apache-2.0", ("train",), 12, restores=False)


def sokoban() -> TextEnv:
    return make("agentdistill/Sokoban-v0", {})


def lockroom() -> TextEnv:
    return make("agentdistill/LockRoom-v0", {})


words = st.lists(st.sampled_from(["left", "right", "up", "down", "Up", "Left", "", "jump"]))


@pytest.mark.parametrize("world", [Corridor, Replayed, sokoban])
@given(before=words, tried=st.lists(words, max_size=3), after=words)
@settings(max_examples=20)
def test_nothing_that_is_tried_happened(
    world: Callable[[], TextEnv], before: list[str], tried: list[list[str]], after: list[str]
) -> None:
    one, other = world(), world()
    task = next(one.tasks("train"))
    for env in (one, other):
        env.reset(options={"task": task})
    alive = not any(r.terminated or r.truncated for r in one.replay(before))
    other.replay(before)
    if not alive:
        return
    for some in tried:
        copy = world()
        copy.reset(options={"task": task})
        copy.replay(before)
        assert one.attempt(some) == copy.replay(some)  # what would have come of it
    assert one.snapshot() == other.snapshot()
    assert one.admissible() == other.admissible()
    assert one.expert_action() == other.expert_action()
    assert one.replay(after) == other.replay(after)


def test_a_state_that_does_not_come_back_is_a_fault() -> None:
    env = Counting()
    env.reset(options={"task": TASK})
    env.step("right")
    with pytest.raises(EnvError, match="not where it was"):
        env.attempt(["right"])
    found = play(Asked("student", ["right", "left"]), None, Counting, execute=True, turns=3)
    assert [fault.kind for fault in found.faults] == ["environment"]


def test_where_something_stays_done_nothing_is_tried(tmp_path: Path) -> None:
    env = Mail()
    with pytest.raises(EnvError, match="cannot restore"):
        env.attempt(["right"])
    mix = {"student": "student", "teacher": "expert", "execute": True}
    values = micro(tmp_path, stages=[], policies={"mix": mix}, evaluate={})
    loaded = load({**values, "env": {"id": "tests.test_attempts:Mail"}})
    with pytest.raises(ConfigError, match=r"policies\.mix\.execute"):
        validate(loaded)
    with Run(loaded) as the_run, pytest.raises(ConfigError, match=r"policies\.mix\.execute"):
        the_run.policy("mix")


# -- votes ----------------------------------------------------------------------------------------


def episode(
    said: list[str], env: Any = Corridor, rule: Rule | None = None, turns: int = 1
) -> tuple[Trajectory, Asked]:
    teacher = Asked("teacher", ["right"])
    rule = rule or Rule(samples=len(said))
    return play(Asked("student", said), teacher, env, turns, rule=rule, execute=True), teacher


class Wordy(Corridor):
    """Two words for each way."""

    def _advance(self, action: str) -> Moved:
        return super()._advance({"east": "right", "west": "left"}.get(action, action))


@pytest.mark.parametrize("isolation", ["inline", "thread"])
def test_other_words_with_the_same_outcome_agree(isolation: str) -> None:
    def world() -> TextEnv:
        return Wordy(isolation=isolation)

    found, teacher = episode(["east", "right", "east"], world, turns=6)
    assert teacher.drawn == 0 and found.success
    assert [turn.actions for turn in found.turns] == [("east",)] * 3
    assert found.env_steps == 3  # what was tried is no step
    plain = play(Asked("student", ["east", "right", "east"]), teacher, world, 1)
    assert plain.turns[0].actor.name == "teacher"


def test_other_outcomes_do_not() -> None:
    found, teacher = episode(["right", "left"])
    assert teacher.drawn == 1 and found.turns[0].actor.name == "teacher"
    found, teacher = episode(["left", "right", "right"], rule=Rule("majority"))
    assert teacher.drawn == 0 and found.turns[0].actions == ("right",)


@pytest.mark.parametrize("bad", ["jump", ""])
def test_what_fails_has_no_vote(bad: str) -> None:
    assert episode([bad, bad, bad])[1].drawn == 1
    found, teacher = episode([bad, bad, "right"], rule=Rule("never"))
    assert teacher.drawn == 0 and found.turns[0].actions == ("right",)
    found, _ = episode([bad, "left", "right"], rule=Rule("never"))
    assert found.turns[0].actions == ("left",)  # all different: the first valid one
    found, _ = episode([bad, bad], rule=Rule("never"))
    assert found.turns[0].text == bad  # none valid: the first


def test_calls_are_tried_as_the_environment_reads_them() -> None:
    from agentdistill.engines.base import Sample

    call = Sample((), (), "", "stop", tool_calls=(walk("right"),))
    student, teacher = Asked("student", [call, "right"]), Asked("teacher", ["left"])
    found = play(student, teacher, Tools, 6, rule=Rule(samples=2), execute=True, native_tools=True)
    assert found.success and teacher.drawn == 0


def test_equal_samples_are_tried_once() -> None:
    class Watched(Corridor):
        tried: list[tuple[str, ...]] = []  # noqa: RUF012

        def attempt(self, actions: Any) -> Any:
            self.tried.append(tuple(actions))
            return super().attempt(actions)

    episode(["right", "right", "left", "right"], Watched)
    assert Watched.tried == [("right",), ("left",)]


def test_one_sample_is_not_tried() -> None:
    class Untouched(Corridor):
        def attempt(self, actions: Any) -> Any:
            raise AssertionError("nothing to compare")

    student = actor(Asked("student", ["right"]))
    policy = CascadePolicy("mix", student, None, Rule(samples=1), execute=True)
    (found,) = run(rollout(policy, Untouched, [Request(TASK, 0)]))
    assert found.success
