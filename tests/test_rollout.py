"""Episodes: how they end, what becomes of faults, and that the tokens are those that were sampled.

The environment is the corridor with traps, named by the task's payload, so that single episodes
can go wrong among others that do not.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from agentdistill import actions
from agentdistill.actions import Parsed
from agentdistill.config import (
    PROMPTS,
    LimitsConfig,
    PromptConfig,
    TinyModel,
    TokenizerConfig,
    load,
)
from agentdistill.engines.base import Engine, Sample, Sampling, ScoreRequest
from agentdistill.engines.hf import HFEngine
from agentdistill.envs.base import Card, Moved
from agentdistill.errors import ConfigError, EngineError
from agentdistill.policy import (
    Episode,
    ExpertPolicy,
    ModelPolicy,
    Policy,
    RandomPolicy,
    Response,
    derive_seed,
)
from agentdistill.recipe import execute
from agentdistill.records import Actor, Author, Start, Task, Trajectory, Usage, Verdict
from agentdistill.render import Conversation, Renderer
from agentdistill.rollout import Request, rollout, run
from agentdistill.students import tiny
from agentdistill.table import build
from agentdistill.views import rows_of
from tests.store_worker import image
from tests.toy import Corridor, micro

# -- environments and policies ---------------------------------------------------------------------


class Traps(Corridor):
    """A corridor whose task may name a trap; remembers its threads, and all its instances."""

    made: list[Traps] = []  # noqa: RUF012

    def __init__(
        self, sleep: float = 0.0, barrier: threading.Barrier | None = None, **options: Any
    ):
        super().__init__(**options)
        self._sleep, self._barrier = sleep, barrier
        self.closed = False
        self.threads: set[str] = set()
        self.made.append(self)

    @property
    def card(self) -> Card:
        return dataclasses.replace(super().card, id="tests/Traps-v0")

    def _trap(self, task: Task | None = None) -> str:
        return str((task or self.task).payload.get("trap", ""))

    def _begin(self, task: Task) -> str:
        if self._trap(task) == "reset":
            raise OSError("no corridor today")
        return super()._begin(task)

    def _advance(self, action: str) -> Moved:
        self.threads.add(threading.current_thread().name)
        time.sleep(self._sleep)
        if self._barrier is not None:
            self._barrier.wait(10)
        if self._trap() in ("step", "close") and self._steps == 1:
            raise RuntimeError("the floor gave way")
        if self._trap() == "stop" and self._steps == 1:
            raise StopIteration
        if self._trap() == "interrupt" and self._steps == 1:
            signal.raise_signal(signal.SIGINT)
        moved = super()._advance(action)
        if self._trap() == "pit" and self._steps == 2:
            return dataclasses.replace(moved, terminated=True, success=False, score=0.0)
        return moved

    def expert_action(self) -> str:
        asked = sys._getframe(1).f_code.co_name != "_advance"
        if asked and self._trap() == "expert" and self._steps == 1:
            raise KeyError("no plan")
        return super().expert_action()

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True
        if self._task is not None and self._trap() == "close":
            raise ValueError("stuck")


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Whatever a test does, every environment that a rollout made is closed in the end."""
    Traps.made.clear()
    yield
    assert all(env.closed for env in Traps.made)


def task(at: int = 0, goal: int = 4, trap: str = "", **more: Any) -> Task:
    payload = {"at": at, "goal": goal, **({"trap": trap} if trap else {}), **more}
    return Task("tests/Traps-v0", "train", payload)


def request(trap: str = "", *, number: int = 0, at: int = 0, goal: int = 4, **more: Any) -> Request:
    chosen = task(at, goal, trap)
    return Request(chosen, derive_seed(7, number), more.pop("group", f"g{number}"), **more)


def play(policy: Policy, requests: Iterable[Request], **options: Any) -> list[Trajectory]:
    make = options.pop("make_env", Traps)
    return run(asyncio.wait_for(rollout(policy, make, requests, **options), 60))


def one(policy: Policy, wanted: Request, **options: Any) -> Trajectory:
    return play(policy, [wanted], **options)[0]


class Watched(Policy):
    """Another policy, and what happened to it."""

    def __init__(self, inner: Policy) -> None:
        self.inner, self.name = inner, inner.name
        self.started: set[str] = set()
        self.finished: list[str] = []

    async def act(self, episode: Episode) -> Response:
        self.started.add(episode.id)
        return await self.inner.act(episode)

    def finish(self, episode: Episode) -> None:
        self.finished.append(episode.id)
        self.inner.finish(episode)

    def check(self, episodes: int | None = None) -> None:
        """Everything that began has been finished, once."""
        assert sorted(self.finished) == sorted(set(self.finished))
        assert self.started <= set(self.finished)
        assert episodes is None or len(self.finished) == episodes


class Says(Policy):
    """Fixed texts, one a turn; the last one again and again."""

    name = "says"

    def __init__(self, *texts: str, grammar: str = "answer", tokens: int = 0) -> None:
        self._texts, self._parse, self._tokens = texts, actions.grammar(grammar), tokens

    async def act(self, episode: Episode) -> Response:
        text = self._texts[min(len(episode.turns), len(self._texts) - 1)]
        usage = Usage(output=self._tokens)
        return Response(text, self._parse(text), Actor(self.name), usage=usage)


class Raises(ExpertPolicy):
    """The expert, but in groups called ``bad`` its second turn raises ``error``."""

    def __init__(self, error: BaseException, wait: float = 0.0) -> None:
        super().__init__()
        self._error, self._wait = error, wait

    async def act(self, episode: Episode) -> Response:
        if episode.id.startswith("bad") and len(episode.turns) == 1:
            raise self._error
        await asyncio.sleep(self._wait)
        return await super().act(episode)


# -- policies --------------------------------------------------------------------------------------


def test_expert_through_the_asynchronous_interface() -> None:
    found = asyncio.run(
        rollout(ExpertPolicy("action"), Traps, [request(), request(number=1, at=5)])
    )
    assert [t.end for t in found] == ["success", "success"]
    first = found[0]
    assert [turn.text for turn in first.turns] == ["<action>right</action>"] * 4
    assert [turn.actions for turn in first.turns] == [("right",)] * 4
    assert [turn.index for turn in first.turns] == [0, 1, 2, 3]
    assert first.turns[0].observation == "P...G.\nstart"
    assert first.turns[1].observation == first.turns[0].results[0].observation
    assert all(turn.span is None and turn.stop == "none" for turn in first.turns)
    assert first.streams == () and first.success and first.score == 1.0
    assert first.reward == pytest.approx(0.7) and first.env_steps == 4
    assert {turn.actor.name for turn in first.turns} == {"expert"}


def test_random_is_uniform_and_seeded() -> None:
    requests = [request(number=n, at=2, goal=5) for n in range(200)]
    once, again = (play(RandomPolicy(), requests, max_turns=2) for _ in range(2))
    assert image(once) == image(again)
    taken = [turn.actions[0] for t in once for turn in t.turns]
    assert abs(taken.count("right") - 200) < 4 * 10  # 4 standard deviations of 400 coins
    assert len({tuple(turn.actions for turn in t.turns) for t in once}) == 4


def test_random_without_a_list_of_actions_takes_the_examples() -> None:
    class Unlisted(Traps):
        def admissible(self) -> None:
            return None

    found = play(RandomPolicy(), [request(number=n) for n in range(20)], make_env=Unlisted)
    assert {turn.actions[0] for t in found for turn in t.turns} == {"left", "right"}


def test_an_expert_that_is_lost_gives_the_empty_action() -> None:
    class Lost(Traps):
        def expert_action(self) -> None:
            return None

        def _advance(self, action: str) -> Moved:
            assert action == ""
            return Moved("still here", 0.0, valid=False)

    found = one(ExpertPolicy(), request(), make_env=Lost)
    assert (found.end, found.env_steps) == ("step_limit", 12)
    assert {turn.verdict for turn in found.turns} == {Verdict.MISSING}
    assert {turn.actions for turn in found.turns} == {("",)}


# -- several actions per response ------------------------------------------------------------------


def test_several_actions_in_one_response() -> None:
    say = "<think>far</think><answer>right || right||right</answer>"
    found = one(Says(say, "<answer>right || left</answer>"), request())
    assert [turn.actions for turn in found.turns] == [("right",) * 3, ("right", "left")]
    assert [len(turn.results) for turn in found.turns] == [3, 1]  # the goal ends the episode
    assert found.turns[0].reasoning == "far"
    assert found.turns[0].reward == pytest.approx(-0.3) and found.reward == pytest.approx(0.7)
    assert found.turns[1].observation == found.turns[0].results[-1].observation
    assert (found.env_steps, found.end) == (4, "success")


def test_what_cannot_be_read_costs_a_step() -> None:
    found = one(Says("I think so", "<answer>", "<answer>fly</answer>"), request(), max_turns=3)
    verdicts = [Verdict.MISSING, Verdict.MALFORMED, Verdict.INADMISSIBLE]
    assert [turn.verdict for turn in found.turns] == verdicts
    assert [turn.actions for turn in found.turns] == [("",), ("",), ("fly",)]
    assert not any(turn.results[0].valid or turn.results[0].optimal for turn in found.turns)
    assert found.env_steps == 3


def test_one_bad_action_among_good_ones_is_on_record() -> None:
    found = one(Says("<answer>right || fly || right</answer>"), request(), max_turns=1)
    assert [result.valid for result in found.turns[0].results] == [True, False, True]
    assert found.turns[0].verdict is Verdict.INADMISSIBLE


# -- ends ------------------------------------------------------------------------------------------


def test_failure_of_the_task_is_an_outcome() -> None:
    found = one(ExpertPolicy(), request("pit"))
    assert (found.end, found.success, found.reward_valid) == ("failure", False, True)
    assert len(found.turns) == 2 and found.faults == ()


def test_the_environments_step_limit() -> None:
    found = one(Says("<answer>left</answer>"), request())
    assert (found.end, len(found.turns), found.reward_valid) == ("step_limit", 12, True)
    assert found.turns[-1].results[0].truncated


def test_the_limit_on_turns_is_a_step_limit() -> None:
    found = one(ExpertPolicy(), request(), max_turns=3)
    assert (found.end, len(found.turns), found.reward_valid) == ("step_limit", 3, True)


def test_a_horizon_censors() -> None:
    found = one(ExpertPolicy(), request(horizon=3))
    assert (found.end, len(found.turns), found.horizon) == ("horizon", 3, 3)
    assert not found.reward_valid
    assert one(ExpertPolicy(), request(horizon=4)).end == "success"


def test_budget_of_environment_steps_is_hard() -> None:
    """Also in the middle of a response that asks for more."""
    say = Says("<answer>right || left || right || left</answer>")
    found = one(say, request(), limits=LimitsConfig(env_steps=6))
    assert (found.end, found.env_steps, found.reward_valid) == ("budget", 6, False)
    assert [len(turn.results) for turn in found.turns] == [4, 2]
    enough = one(ExpertPolicy(), request(), limits=LimitsConfig(env_steps=4))
    assert enough.end == "success"


def test_budget_of_tokens_counts_what_was_paid_for() -> None:
    say = Says("<answer>left</answer>", tokens=10)
    found = one(say, request(), limits=LimitsConfig(tokens=25))
    assert (found.end, len(found.turns)) == ("budget", 3)


def test_budget_of_seconds_between_turns_and_within_one() -> None:
    limits = LimitsConfig(seconds=0.2)
    slow = one(ExpertPolicy(), request(), limits=limits, make_env=lambda: Traps(sleep=0.12))
    assert (slow.end, len(slow.turns)) == ("budget", 2)
    began = time.monotonic()
    hung = one(Raises(OSError(), wait=30), request(), limits=limits)
    assert (hung.end, hung.faults, len(hung.turns)) == ("budget", (), 0)
    assert time.monotonic() - began < 10


# -- faults are data -------------------------------------------------------------------------------


FAULTS: dict[str, tuple[str, int]] = {
    "reset": ("environment", 0),
    "step": ("environment", 1),
    "stop": ("environment", 1),
    "expert": ("environment", 1),
}
"""Trap → kind of the fault and the turn in which it happens."""


@pytest.mark.parametrize("isolation", ["inline", "thread"])
@pytest.mark.parametrize("trap", FAULTS)
def test_a_broken_environment_loses_nobody_else(trap: str, isolation: str) -> None:
    sound = [request(number=n, at=n % 4, goal=5) for n in range(8)]
    bad = request(trap, number=99, group="bad")
    policy = Watched(ExpertPolicy())
    options = {"make_env": lambda: Traps(isolation=isolation), "concurrency": 3}
    found = play(policy, [*sound[:4], bad, *sound[4:]], **options)
    broken = found.pop(4)
    kind, turn = FAULTS[trap]
    assert broken.end == f"fault:{kind}" and not broken.reward_valid and not broken.success
    assert [(fault.kind, fault.turn) for fault in broken.faults] == [(kind, turn)]
    assert broken.task.key == bad.task.key
    policy.check(episodes=8 + (trap != "reset"))
    assert image(found) == image(play(ExpertPolicy(), sound))


def test_what_was_sampled_and_executed_before_a_fault_is_kept() -> None:
    found = one(Says("<answer>right || right || right</answer>", tokens=5), request("step"))
    assert found.end == "fault:environment" and "the floor gave way" in found.faults[0].message
    (turn,) = found.turns
    assert turn.actions == ("right",) * 3 and len(turn.results) == 1 and turn.usage.output == 5
    assert found.env_steps == 1 and found.faults[0].turn == 0


def test_an_environment_that_broke_is_not_used_again() -> None:
    requests = [request("step"), *(request(number=n) for n in range(1, 4))]
    found = play(ExpertPolicy(), requests, concurrency=1)
    assert [t.end for t in found] == ["fault:environment", *["success"] * 3]
    assert len(Traps.made) == 2


def test_one_that_cannot_even_be_closed_is_on_record() -> None:
    found = one(ExpertPolicy(), request("close"))
    assert [fault.message for fault in found.faults] == [
        "RuntimeError: the floor gave way",
        "when closed: ValueError: stuck",
    ]


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (EngineError("out of memory"), "fault:engine"),
        (TimeoutError("no answer"), "fault:timeout"),
    ],
)
def test_faults_of_engines(error: Exception, end: str) -> None:
    sound = [request(number=n, at=n % 4, goal=5) for n in range(6)]
    policy = Watched(Raises(error))
    *found, broken = play(policy, [*sound, request(group="bad")])
    assert (broken.end, len(broken.turns)) == (end, 1)
    assert [(f.kind, f.message, f.turn) for f in broken.faults] == [(end[6:], str(error), 1)]
    policy.check(episodes=7)
    assert len(Traps.made) == 7
    assert image(found) == image(play(ExpertPolicy(), sound))


def test_a_configuration_error_is_no_fault() -> None:
    wrong = Request(Task("tests/Other-v0", "train", {"at": 0, "goal": 1}), 0)
    with pytest.raises(ConfigError, match=r"task\.env"):
        one(ExpertPolicy(), wrong)


# -- what is nobody's fault but ours ---------------------------------------------------------------


async def _nothing_left(work: Coroutine[Any, Any, Any]) -> BaseException | None:
    """The error of ``work``; it leaves no task behind, and does not hang."""
    try:
        async with asyncio.timeout(20):
            await work
    except BaseException as error:
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return error
    return None


@pytest.mark.parametrize("isolation", ["inline", "thread"])
def test_programming_errors_propagate_and_nothing_hangs(isolation: str) -> None:
    policy = Watched(Raises(TypeError("unsupported operand"), wait=0.005))
    requests = [request(number=n) for n in range(12)] + [request(group="bad")]
    make = lambda: Traps(isolation=isolation, sleep=0.005)  # noqa: E731
    error = asyncio.run(_nothing_left(rollout(policy, make, requests, concurrency=13)))
    assert isinstance(error, TypeError)
    assert len(policy.started) == 13
    policy.check(episodes=13)


def test_a_cancelled_rollout_leaves_nothing_behind() -> None:
    policy = Watched(Raises(OSError(), wait=3600))
    requests = [request(number=n) for n in range(6)]

    async def scenario() -> None:
        work = asyncio.ensure_future(rollout(policy, Traps, requests, concurrency=4))
        while len(policy.started) < 4:
            await asyncio.sleep(0)
        work.cancel()
        assert isinstance(await _nothing_left(work), asyncio.CancelledError)

    asyncio.run(scenario())
    policy.check(episodes=4)
    assert len(Traps.made) == 4


def test_an_interrupt_ends_a_rollout() -> None:
    policy = Watched(ExpertPolicy())
    with pytest.raises(KeyboardInterrupt):
        play(policy, [request("interrupt"), request(number=1)])
    policy.check()
    policy = Watched(Raises(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        play(policy, [request(number=1), request(group="bad")])
    policy.check()


def test_an_interrupt_before_anything_began_says_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(work: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(asyncio, "run", interrupted)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(KeyboardInterrupt):
            run(rollout(ExpertPolicy(), Traps, [request()]))
        gc.collect()
    assert said == []


def test_a_synchronous_call_inside_a_running_loop() -> None:
    """As in a notebook."""

    async def cell() -> list[Trajectory]:
        return run(rollout(ExpertPolicy(), Traps, [request()]))

    assert [t.end for t in asyncio.run(cell())] == ["success"]

    async def wrong() -> list[Trajectory]:
        return run(rollout(Raises(TypeError("x")), Traps, [request(group="bad")]))

    with pytest.raises(TypeError, match="x"):
        asyncio.run(wrong())


def test_a_notebook_can_be_interrupted() -> None:
    policy = Watched(Raises(OSError(), wait=3600))

    async def cell() -> None:
        run(rollout(policy, Traps, [request()]))

    loop = asyncio.new_event_loop()  # as a kernel's: it leaves SIGINT to Python
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(cell())
    finally:
        timer.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
    policy.check(episodes=1)


# -- isolation and concurrency ---------------------------------------------------------------------


def test_slow_steps_in_threads_stall_nobody() -> None:
    requests = [request(number=n) for n in range(8)]
    began = time.monotonic()
    found = play(ExpertPolicy(), requests, make_env=lambda: Traps(sleep=0.03, isolation="thread"))
    steps = sum(t.env_steps for t in found)
    assert steps == 32
    assert time.monotonic() - began < 0.5 * steps * 0.03
    assert not set.union(*(env.threads for env in Traps.made)) & {"MainThread"}


def test_as_many_threads_as_episodes() -> None:
    """However few cores there are: a step that waits for a server needs none."""
    barrier = threading.Barrier(40)
    requests = [request(number=n, at=3) for n in range(40)]
    make = lambda: Traps(isolation="thread", barrier=barrier)  # noqa: E731
    assert {t.end for t in play(ExpertPolicy(), requests, make_env=make)} == {"success"}


def test_inline_stays_in_the_loop() -> None:
    play(ExpertPolicy(), [request(number=n) for n in range(3)])
    assert set.union(*(env.threads for env in Traps.made)) == {"MainThread"}


def test_concurrency_is_a_limit_and_environments_are_reused() -> None:
    class Crowd(RandomPolicy):
        inside = most = 0

        async def act(self, episode: Episode) -> Response:
            self.inside += 1
            self.most = max(self.most, self.inside)
            await asyncio.sleep(0)
            self.inside -= 1
            return await super().act(episode)

    policy = Crowd()
    play(policy, [request(number=n) for n in range(20)], concurrency=3)
    assert policy.most == 3 and len(Traps.made) == 3


class Few(Traps):
    """Counts the instances that are in an episode, over all threads."""

    lock = threading.Lock()
    inside = most = 0

    @property
    def card(self) -> Card:
        return dataclasses.replace(super().card, slots=3)

    def _begin(self, task: Task) -> str:
        with self.lock:
            Few.inside += 1
            Few.most = max(Few.most, Few.inside)
        return super()._begin(task)

    def _advance(self, action: str) -> Moved:
        moved = super()._advance(action)
        if moved.terminated:
            with self.lock:
                Few.inside -= 1
        return moved


def test_slots_of_the_card_are_a_limit_and_the_others_wait() -> None:
    Few.inside = Few.most = 0

    def make() -> Few:
        return Few(sleep=0.001, isolation="process")

    requests = [request(number=n) for n in range(64)]
    found = play(ExpertPolicy(), requests, make_env=make, concurrency=64)
    assert [t.end for t in found] == ["success"] * 64
    assert [t.task.key for t in found] == [r.task.key for r in requests]
    assert Few.most == len(Traps.made) == 3 and Few.inside == 0
    assert len(play(ExpertPolicy(), requests[:4], make_env=make, concurrency=2)) == 4
    assert len(Traps.made) == 3 + 2, "the lower of the two limits holds"


def test_order_is_that_of_the_requests() -> None:
    requests = [request(number=n, at=n % 5, goal=5, sample=n, counter=n) for n in range(10)]
    ended: list[Trajectory] = []
    found = play(Raises(OSError()), iter(requests), on_end=ended.append)
    assert [t.sample for t in found] == list(range(10))
    assert [t.task.key for t in found] == [r.task.key for r in requests]
    assert [t.counter for t in found] == list(range(10))
    assert [len(t.turns) for t in ended] == sorted(len(t.turns) for t in found)
    assert {id(t) for t in ended} == {id(t) for t in found}
    assert play(ExpertPolicy(), []) == []


def test_a_run_closes_its_environments(tmp_path: Path) -> None:
    """Those of rollouts wait open for the next rollout until then."""
    stages = [{"name": name, "do": "collect", "episodes": 5} for name in ("first", "second")]
    evaluate = {"policies": ["expert", "random"], "tasks": 6}
    env = {"id": "tests.test_rollout:Traps"}
    execute(load(micro(tmp_path, env=env, models={}, stages=stages, evaluate=evaluate)))
    assert len(Traps.made) > 1  # and the fixture checks that they are closed
    played = [env for env in Traps.made if env.threads]
    assert len(played) < 5 * 4, "environments are used again"


# -- replay ----------------------------------------------------------------------------------------


def demonstration(**more: Any) -> tuple[Request, Trajectory]:
    """A request that replays two turns of the expert, and the expert's whole episode."""
    whole = one(ExpertPolicy(), request())
    replayed = whole.turns[:2]
    expected = tuple(turn.results[0].observation for turn in replayed)
    start = Start(tuple(turn.actions[0] for turn in replayed), "demos/x")
    return request(start=start, **{"expected": expected, **more}), whole


def test_replayed_turns_are_state_and_history() -> None:
    wanted, whole = demonstration()
    found = one(ExpertPolicy(), wanted)
    assert [turn.author for turn in found.turns] == [Author.REPLAY] * 2 + [Author.ACTOR] * 2
    assert [turn.observation for turn in found.turns] == [t.observation for t in whole.turns]
    assert [turn.index for turn in found.turns] == [0, 1, 2, 3]
    assert {turn.actor.name for turn in found.turns[:2]} == {"demos/x"}
    assert len(found.acted) == 2 and found.env_steps == 2
    assert found.reward == pytest.approx(0.9)
    assert found.start == wanted.start and found.success


def test_limits_after_a_replay() -> None:
    """A horizon counts from the hand-over, the limit on turns from the reset."""
    wanted, _ = demonstration(horizon=1)
    found = one(ExpertPolicy(), wanted)
    assert (found.end, len(found.acted)) == ("horizon", 1)
    wanted, _ = demonstration()
    found = one(ExpertPolicy(), wanted, max_turns=3)
    assert (found.end, len(found.acted)) == ("step_limit", 1)


def test_a_replay_that_looks_different_is_a_fault() -> None:
    wanted, _ = demonstration(expected=("P.....\ngo", "P.....\ngo"))
    found = one(ExpertPolicy(), wanted)
    assert found.end == "fault:replay" and found.turns == ()
    assert (found.faults[0].kind, found.faults[0].turn) == ("replay", 0)
    unchecked, _ = demonstration(expected=None)
    assert one(ExpertPolicy(), unchecked).end == "success"


def test_a_replay_that_ends_the_task_is_a_fault() -> None:
    wanted = request(start=Start(("right",) * 5, "demos/x"))
    found = one(ExpertPolicy(), wanted)
    assert (found.end, len(found.turns)) == ("fault:replay", 3)
    assert found.env_steps == 0


def test_an_environment_that_breaks_in_a_replay() -> None:
    found = one(ExpertPolicy(), request("step", start=Start(("right",) * 3, "demos/x")))
    assert (found.end, len(found.turns)) == ("fault:environment", 1)


# -- models: token in, token out -------------------------------------------------------------------


THOUGHT = "<think>go on</think><action>right</action>"
SAMPLING = Sampling(max_tokens=6)


class Spy(Engine):
    """An engine that remembers every request and its sample; faulty for groups called ``bad``."""

    def __init__(self, inner: HFEngine, error: Exception | None = None) -> None:
        self.inner, self.name, self._error = inner, inner.name, error
        self.calls: dict[str, list[tuple[list[int], Sample]]] = {}
        self.released: list[str] = []

    @property
    def capabilities(self) -> Any:
        return self.inner.capabilities

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int = 0, session: str | None = None
    ) -> Sample:
        assert session is not None
        mine = self.calls.setdefault(session, [])
        if self._error is not None and "/bad/" in session and len(mine) == 1:
            raise self._error
        sample = await self.inner.generate(ids, sampling, seed=seed, session=session)
        mine.append((list(ids), sample))
        return sample

    async def score(self, requests: Sequence[ScoreRequest]) -> Any:
        return self.inner.score_now(requests)

    def release(self, session: str) -> None:
        self.released.append(session)
        self.inner.release(session)


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    """A tiny model that has learned to think and act in tags, and its tokenizer."""
    torch.set_num_threads(1)
    # Thought and action are a token each: no text of the corpus has them side by side.
    texts = [*tiny.corpus(Corridor(), "action", 40, 0), *["<think>go on</think>"] * 9]
    tokenizer = tiny.train_tokenizer(texts, TokenizerConfig(vocabulary=340))
    model = tiny.build(TinyModel(hidden=32, heads=2, layers=1), tokenizer, 3)
    renderer = Renderer(tokenizer, PROMPTS["react"], "Walk.")
    conversation, reply = Conversation(renderer), renderer.written(THOUGHT)
    for observation in ("P...G.\nstart", ".P..G.\ngo", "..P.G.\ngo", "...PG.\ngo"):
        conversation.add(observation, reply)
    ids, authors = (torch.tensor([column]) for column in conversation.ask("G....P\ngo"))
    labels = ids.where(authors == Author.ACTOR, -100)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        model(input_ids=ids, labels=labels).loss.backward()
        adam.step()
        adam.zero_grad()
    return model, tokenizer


def actor(
    parts: tuple[Any, Any], prompt: PromptConfig, error: Exception | None = None
) -> ModelPolicy:
    model, tokenizer = parts
    engine = Spy(HFEngine(model, tokenizer, name="student"), error)
    renderer = Renderer(tokenizer, prompt, "Walk.")
    return ModelPolicy("student", engine, renderer, SAMPLING)


TOKEN_PROMPTS = {
    "full": PROMPTS["react"],
    "window": PROMPTS["react"].model_copy(update={"window": 2}),
    "react-drop": PROMPTS["react-drop"],
}
MANY = [request(number=n, at=n % 3, goal=5) for n in range(10)]


def scored(policy: ModelPolicy, ids: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    (scores,) = policy.engine.inner.score_now([ScoreRequest(ids, positions)])
    return scores.logp


@pytest.mark.parametrize("prompt", TOKEN_PROMPTS)
def test_streams_are_what_the_model_saw_and_sampled(parts: tuple[Any, Any], prompt: str) -> None:
    policy = actor(parts, TOKEN_PROMPTS[prompt])
    found = play(policy, MANY)
    calls = [policy.engine.calls[name] for name in sorted(policy.engine.calls, key=_number)]
    assert len(calls) == len(found) and sorted(policy.engine.released) == sorted(
        policy.engine.calls
    )
    thought = 0
    for trajectory, samples in zip(found, calls, strict=True):
        assert len(trajectory.turns) == len(samples)
        for turn, (ids, sample) in zip(trajectory.turns, samples, strict=True):
            stream, span = trajectory.streams[turn.span.stream], turn.span
            assert stream.ids[span.start : span.end].tolist() == list(sample.ids)
            assert stream.ids[: span.start].tolist() == ids
            assert set(stream.author[span.start : span.end]) == {Author.ACTOR}
            np.testing.assert_array_equal(
                stream.logp[span.start : span.end], np.float32(sample.logp)
            )
            again = scored(policy, stream.ids[: span.end], range(span.start, span.end))
            np.testing.assert_allclose(again, sample.logp, atol=1e-4)
            assert (turn.text, turn.stop) == (sample.text, sample.stop)
            thought += bool(turn.reasoning)
        rows = np.concatenate([s.author == Author.ACTOR for s in trajectory.streams])
        sampler = np.concatenate([s.logp for s in trajectory.streams])
        np.testing.assert_array_equal(rows, ~np.isnan(sampler))
        _check_number_of_streams(prompt, trajectory)
    assert thought > 20, "the model does not think: nothing is dropped"


def _number(session: str) -> int:
    return int(session.rsplit("/", 1)[1])


def _check_number_of_streams(prompt: str, trajectory: Trajectory) -> None:
    turns = len(trajectory.turns)
    if prompt == "full":
        assert len(trajectory.streams) == 1
    elif prompt == "window":
        assert len(trajectory.streams) == 1 + max(0, turns - 3)
    else:  # a new stream wherever the turn before had a thought to be dropped
        thoughts = sum(bool(turn.reasoning) for turn in trajectory.turns[:-1])
        assert len(trajectory.streams) == 1 + thoughts


def test_dropped_reasoning_is_not_in_later_prompts(parts: tuple[Any, Any]) -> None:
    policy = actor(parts, PROMPTS["react-drop"])
    trajectory = one(policy, MANY[0])
    ((*_, (ids, _)),) = policy.engine.calls.values()
    text = parts[1].decode(ids).replace(policy.renderer.instruction, "")
    assert "<think>" not in text and text.count("<action>right</action>") >= 1
    assert "<think>" in trajectory.turns[0].text


def test_outcomes_do_not_depend_on_concurrency(parts: tuple[Any, Any]) -> None:
    """Nor on threads, and equal requests side by side are equal."""
    twice = [*MANY[:5], *MANY[:5]]
    reference = play(RandomPolicy(), twice, concurrency=1)
    for concurrency in (3, 64):
        assert image(play(RandomPolicy(), twice, concurrency=concurrency)) == image(reference)
    threaded = play(RandomPolicy(), twice, make_env=lambda: Traps(isolation="thread"))
    assert image(threaded) == image(reference)
    sampled = [play(actor(parts, PROMPTS["react"]), twice, concurrency=c) for c in (1, 3, 64)]
    for other in sampled:
        _assert_same(other, sampled[0])
        _assert_same(other[:5], other[5:])


def test_equal_requests_at_different_times_share_nothing(parts: tuple[Any, Any]) -> None:
    """The second begins when the first is in the middle."""
    twin, short = request(number=1, at=0, goal=5), request(number=2, at=4, goal=5)
    policy = actor(parts, PROMPTS["react"])
    policy.sampling = Sampling(temperature=0, max_tokens=6)
    first, _, second = play(policy, [twin, short, twin], concurrency=2)
    assert len(first.turns) > 2
    _assert_same([first, first], [second, one(policy, twin)])


def _assert_same(found: Sequence[Trajectory], wanted: Sequence[Trajectory]) -> None:
    """Equal, but for the rounding of log-probabilities in batches of another shape."""
    for one_, other in zip(found, wanted, strict=True):
        for mine, theirs in zip(one_.streams, other.streams, strict=True):
            np.testing.assert_array_equal(mine.ids, theirs.ids)
            np.testing.assert_allclose(mine.logp, theirs.logp, atol=1e-5)
        facts = [
            [dataclasses.replace(turn, usage=Usage()) for turn in t.turns] for t in (one_, other)
        ]
        assert facts[0] == facts[1] and one_.end == other.end


@pytest.mark.parametrize("error", [EngineError("gone"), TimeoutError("late")])
def test_a_faulty_request_changes_no_other_sample(parts: tuple[Any, Any], error: Exception) -> None:
    bad = request(number=50, group="bad")
    *found, broken = play(actor(parts, PROMPTS["react"], error), [*MANY, bad])
    assert broken.end in ("fault:engine", "fault:timeout") and len(broken.turns) == 1
    assert len(broken.streams) == 1, "the turn before the fault was sampled, and is data"
    _assert_same(found, play(actor(parts, PROMPTS["react"]), MANY))


@pytest.mark.parametrize("prompt", TOKEN_PROMPTS)
def test_replayed_tokens_are_context(parts: tuple[Any, Any], prompt: str) -> None:
    wanted, _ = demonstration()
    policy = actor(parts, TOKEN_PROMPTS[prompt])
    found = one(policy, wanted, grammar="action")
    assert [turn.span is None for turn in found.turns[:3]] == [True, True, False]
    first = found.streams[0]
    replayed = first.ids[first.author == Author.REPLAY].tolist()
    written = policy.renderer.written("<action>right</action>", Author.REPLAY).ids
    assert replayed == [*written, *written]
    assert np.isnan(first.logp[first.author == Author.REPLAY]).all()
    table = build([found])
    turns = [turn for turn in found.turns if turn.span]
    assert len(table) == sum(turn.span.end - turn.span.start for turn in turns)
    assert sum(len(rows_of(stream)) for stream in found.streams) == len(table)
    assert set(table.index["turn"].tolist()) == {turn.index for turn in turns}
    assert set(table.index["author"].tolist()) == {Author.ACTOR}


def test_a_policy_that_takes_over_reads_the_others_turns_as_context(parts: tuple[Any, Any]) -> None:
    """Turns of another actor in the same episode are history, not its own tokens."""
    model = actor(parts, PROMPTS["react"])

    class Relay(Policy):
        name = "relay"

        async def act(self, episode: Episode) -> Response:
            expert = ExpertPolicy("action")
            return await (expert if len(episode.turns) < 2 else model).act(episode)

        def finish(self, episode: Episode) -> None:
            model.finish(episode)

    found = one(Relay(), request(at=0, goal=5))
    assert [turn.actor.name for turn in found.turns[:3]] == ["expert", "expert", "student"]
    span = found.turns[2].span
    assert set(found.streams[0].author[: span.start]) == {Author.CONTEXT}
    assert model.engine.released


def test_a_plain_policy_needs_no_engine() -> None:
    """The interface is one method; anything can act."""

    class Mine(Policy):
        name = "mine"

        async def act(self, episode: Episode) -> Response:
            right = Parsed(("right",), Verdict.OK)
            return Response("right", right, Actor("mine"))

    assert one(Mine(), request()).success


def test_a_slow_expert_stalls_nobody() -> None:
    """In environments that block, the expert and random play are asked where they run."""

    class Ponders(Corridor):
        threads: ClassVar[set[int]] = set()

        def expert_action(self) -> str:
            self.threads.add(threading.get_ident())
            time.sleep(0.05)
            return super().expert_action()

    task = next(Corridor().tasks("train"))
    requests = [Request(task, seed=n, sample=n) for n in range(8)]
    begun = time.monotonic()
    found = run(rollout(ExpertPolicy(), lambda: Ponders(isolation="thread"), requests))
    assert all(t.success for t in found)
    assert time.monotonic() - begun < 8 * 10 * 0.05, "one after the other"
    assert threading.get_ident() not in Ponders.threads
