"""Rollouts on the real environments: many at once, and what breaks takes nobody else along."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest

from agentdistill.envs.appworld import setup
from agentdistill.envs.base import TextEnv
from agentdistill.envs.make import make
from agentdistill.policy import Episode, RandomPolicy
from agentdistill.records import Trajectory
from agentdistill.rollout import Request, rollout, run

TURNS = 3


@dataclass(frozen=True)
class Case:
    """An environment, and the process that an instance of it depends on."""

    id: str
    options: dict[str, Any]
    process: Callable[[Any], int] | None = None

    def make(self) -> TextEnv:
        return make(self.id, self.options)


CASES = {
    "alfworld": Case(
        "agentdistill/ALFWorld-v0",
        {"games": "generated", "types": ["look_at_obj_in_light"]},
        lambda env: env._worker.child.process.pid,
    ),
    "scienceworld": Case(
        "agentdistill/ScienceWorld-v0",
        {"tasks": ["find-animal", "lifespan-longest-lived"]},
        lambda env: env._held[0].child.process.pid,
    ),
    "webshop": Case("agentdistill/WebShop-v0", {"catalogue": "generated", "products": 100}),
    "appworld": Case("agentdistill/AppWorld-v0", {}, lambda env: env._world.process),
}
MARKS = {
    "alfworld": (pytest.mark.alfworld,),
    "scienceworld": (pytest.mark.java,),
    "webshop": (),
    "appworld": (pytest.mark.appworld,),
}


@pytest.fixture(scope="module", params=[pytest.param(n, marks=MARKS[n]) for n in CASES])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    """One environment with data of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    packages = {"alfworld": "alfworld", "scienceworld": "scienceworld", "webshop": "rapidfuzz"}
    if request.param in packages:
        pytest.importorskip(packages[request.param])
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "appworld":
            from tests.appworld_micro import build

            python = setup.python()
            assert python is not None
            build(python, folder / "root")
            patch.setenv("APPWORLD_ROOT", str(folder / "root"))
        else:
            patch.setenv("AGENTDISTILL_HOME", str(folder))
        yield CASES[request.param]


class Looks(RandomPolicy):
    """Random where actions are listed, otherwise something harmless."""

    def choose(self, episode: Episode) -> str:
        return super().choose(episode) if episode.env.card.id.startswith(LISTING) else "print(1)"


LISTING = ("agentdistill/ALF", "agentdistill/Sci", "agentdistill/Web")


class Kills(Looks):
    """Kills the process of one episode before its second turn."""

    def __init__(self, case: Case, victim: int) -> None:
        super().__init__()
        self.case, self.victim = case, victim

    def choose(self, episode: Episode) -> str:
        if episode.seed == self.victim and len(episode.turns) == 1:
            assert self.case.process is not None
            os.kill(self.case.process(episode.env), signal.SIGKILL)
        return super().choose(episode)


def play(case: Case, number: int, policy: Any = None) -> tuple[list[Trajectory], int]:
    """``number`` episodes at once, and how many environments they needed."""
    made = []

    def make_env() -> TextEnv:
        made.append(case.make())
        return made[-1]

    first = case.make()
    tasks = list(islice(first.tasks("train"), number))
    first.close()
    pairs = zip(range(number), cycle(tasks), strict=False)
    requests = [Request(task, seed=n, sample=n) for n, task in pairs]
    policy = policy or Looks()
    found = run(rollout(policy, make_env, requests, concurrency=64, max_turns=TURNS))
    return found, len(made)


def _sound(trajectories: list[Trajectory]) -> None:
    assert [t.faults for t in trajectories] == [()] * len(trajectories)
    assert all(1 <= len(t.turns) <= TURNS for t in trajectories)


@pytest.mark.timeout(600)
def test_more_episodes_than_slots_are_queued(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(case.make())
    card = kind.card
    two = property(lambda env: replace(card.__get__(env), slots=2))
    monkeypatch.setattr(kind, "card", two)
    found, made = play(case, 8)
    _sound(found)
    assert made <= 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sixty_four_at_once(case: Case) -> None:
    found, made = play(case, 64)
    _sound(found)
    assert made <= (case.make().card.slots or 64)


@pytest.mark.timeout(600)
def test_a_killed_process_is_a_fault_of_one_episode(case: Case) -> None:
    if case.process is None:
        pytest.skip("runs in this process")
    found, _ = play(case, 5, Kills(case, victim=2))
    broken = [t for t in found if t.faults]
    assert [t.sample for t in broken] == [2]
    assert broken[0].end == "fault:environment"
    assert broken[0].faults[0].turn == 1, "what was played until then is kept"
    _sound([t for t in found if not t.faults])


def test_what_no_engine_should_see(case: Case) -> None:
    """A megabyte, control characters, half a surrogate pair: steps like any other."""
    texts = iter(["a" * 2**20, "\x00\x1b[2J\x07", "\ud800"])

    class Strange(Looks):
        def choose(self, episode: Episode) -> str:
            return next(texts)

    [found], _ = play(case, 1, Strange())
    _sound([found])
    assert [r.valid for t in found.turns for r in t.results] == [False] * TURNS


def test_nothing_is_left(case: Case) -> None:
    before = _children()
    play(case, 2)
    assert _children() <= before


def _children() -> set[int]:
    """Processes that this one has started, directly."""
    me, found = os.getpid(), set()
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == me and fields[0] != "Z":
            found.add(int(place.parent.name))
    return found
