"""The checks behind :func:`agentdistill.envs.check.check_env`.

Invariants: a check returns what it saw, or raises :class:`FailedError` (a promise is broken) or
:class:`SkippedError` (the environment does not offer what the check is about). Any other exception
is the environment's and counts as failed. Checks leave the environment open, in any state.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from random import Random
from typing import Any

from gymnasium.utils.env_checker import check_env as gymnasium_check

from agentdistill.envs.base import ISOLATIONS, TextEnv
from agentdistill.errors import ConfigError
from agentdistill.records import StepResult, Task, digest

HOSTILE = (
    "",
    " \t\n",
    "\x00",
    "\ud800",
    "\u202eUp",
    "\N{SLIGHTLY SMILING FACE}" * 100,
    "../../../etc/passwd",
    "'; DROP TABLE tasks; --",
    "{{7*7}} {0} %s %n ${HOME}",
    "<action>go</action>",
    "click[",
    "null",
    "-1",
    '"\\',
    "A" * 2**20,
    "go " * 2**18,
    "\n" * 2**20,
)
"""Action texts that no environment may stumble over; the last three have about 1 MB."""

MAX_STEPS = 40
"""Steps per episode of the checks that compare episodes."""


class FailedError(Exception):
    """A promise was not kept."""


class SkippedError(Exception):
    """The environment does not offer what a check is about."""


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise FailedError(message)


@dataclass
class Probe:
    """What every check is given."""

    env: TextEnv
    target: str | None
    kwargs: Mapping[str, Any]
    episodes: int
    seed: int
    seconds: float

    @cached_property
    def tasks(self) -> list[Task]:
        """The first tasks of the first split."""
        env = self.env
        found = list(islice(env.tasks(env.card.splits[0], seed=self.seed), self.episodes))
        _need(bool(found), f"split {env.card.splits[0]} has no task")
        return found

    def start(self, task: Task) -> str:
        """Reset to ``task``; the first observation."""
        return self.env.reset(options={"task": task})[0]

    def walk(self, task: Task, steps: int = MAX_STEPS) -> Iterator[tuple[str, StepResult]]:
        """A random episode of at most ``steps`` steps, admissible actions where they are listed."""
        rng = Random(f"{self.seed} {task.key}")
        self.start(task)
        for _ in range(steps):
            action = _any_action(self.env, rng)
            result = self.env.act(action)
            yield action, result
            if result.terminated or result.truncated:
                return


def _any_action(env: TextEnv, rng: Random) -> str:
    choices = env.admissible() or list(getattr(env.action_space, "examples", ("",)))
    return rng.choice(choices)


def _card(probe: Probe) -> str:
    env, card = probe.env, probe.env.card
    _need(re.search(r"-v\d+$", card.id) is not None, f"id {card.id!r} has no version such as -v0")
    _need(card.isolation in ISOLATIONS, f"isolation {card.isolation!r} is none of {ISOLATIONS}")
    _need(len(set(card.splits)) == len(card.splits) > 0, f"splits {card.splits} repeat or are none")
    _need(card.step_limit >= 1, f"step_limit is {card.step_limit}")
    _need(bool(card.licence), "no licence")
    _need(bool(env.instruction.strip()), "no instruction")
    for tool in env.tools:
        _need(bool(tool["function"]["name"]), "a tool without a name")
    json.dumps([card.to_json(), env.tools])
    return f"{card.id}, {', '.join(card.splits)}, {card.licence}, {len(env.tools)} tools"


def _gymnasium(probe: Probe) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gymnasium_check(probe.env, skip_render_check=True, skip_close_check=True)
    texts = sorted({str(warning.message) for warning in caught})
    return "; ".join(texts) or "no warning"


def _tasks(probe: Probe) -> str:
    env, owner, counts = probe.env, dict[str, str](), []
    for split in env.card.splits:
        found = list(islice(env.tasks(split, seed=probe.seed), 4 * probe.episodes))
        again = list(islice(env.tasks(split, seed=probe.seed), 4 * probe.episodes))
        _need([t.key for t in found] == [t.key for t in again], f"{split}: two listings differ")
        for task in found:
            json.dumps(dict(task.payload))
            _need(task.env == env.card.id, f"{split}: a task of {task.env}")
            _need(task.split == split, f"{split}: a task of split {task.split}")
            _need(
                task.key not in owner, f"{split}: task {task.key} is in {owner.get(task.key)} too"
            )
            owner[task.key] = split
        counts.append(f"{split} {len(found)}")
    try:
        next(iter(env.tasks("no such split")), None)
    except ConfigError:
        return f"distinct, in their split: {', '.join(counts)}"
    raise FailedError("an unknown split is no ConfigError")


def trace(probe: Probe) -> list[Any]:
    """Random episodes as JSON."""
    episodes = []
    for task in probe.tasks:
        taken = [[action, asdict(result)] for action, result in probe.walk(task)]
        episodes.append([task.key, probe.start(task), taken])
    return episodes


def _replay(probe: Probe) -> str:
    total = 0
    for task in probe.tasks:
        taken = list(probe.walk(task))
        first, again = probe.start(task), probe.start(task)
        _need(first == again, f"task {task.key}: two resets show different observations")
        results = probe.env.replay([action for action, _ in taken])
        for step, (result, (action, expected)) in enumerate(zip(results, taken, strict=True)):
            _need(result == expected, f"task {task.key}, step {step}, {action!r}: results differ")
        total += len(taken)
    return f"{total} steps repeated"


_CHILD = (
    "import json, sys; from agentdistill.envs.check import trace_digest; "
    "print(trace_digest(*json.load(sys.stdin)))"
)


def _processes(probe: Probe) -> str:
    if probe.target is None:
        raise SkippedError("give an id or module:Class to compare with another process")
    request = json.dumps([probe.target, dict(probe.kwargs), probe.episodes, probe.seed])
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=request,
        env={**os.environ, "PYTHONHASHSEED": "20240229", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    _need(done.returncode == 0, f"the other process failed: {done.stderr[-300:]}")
    here = digest(trace(probe))
    _need(done.stdout.split()[-1:] == [here], "another process saw other episodes")
    return f"{probe.episodes} episodes are the same in another process"


def _snapshot(probe: Probe) -> str:
    rng, env = Random(probe.seed), probe.env
    for task in probe.tasks:
        walk = probe.walk(task)
        for _ in islice(walk, rng.randrange(MAX_STEPS // 2)):
            pass
        saved = env.snapshot()
        taken = list(walk)
        for attempt in ("first", "second"):
            env.restore(saved)
            results = env.replay([action for action, _ in taken])
            same = results == [result for _, result in taken]
            _need(same, f"task {task.key}: not the same after the {attempt} restore")
    return f"{len(probe.tasks)} restored, twice each"


def _expert(probe: Probe) -> str:
    solved, steps = 0, 0
    for number, task in enumerate(probe.tasks):
        probe.start(task)
        result = None
        while result is None or not (result.terminated or result.truncated):
            action = probe.env.expert_action()
            if action is None:
                break
            result = probe.env.act(action)
            steps += 1
        if number == 0 and result is None:
            raise SkippedError("no expert")
        solved += result is not None and result.success
    _need(solved > 0, f"the expert solved none of {len(probe.tasks)} tasks")
    rate, mean = solved / len(probe.tasks), steps / len(probe.tasks)
    return f"solved {rate:.0%} of {len(probe.tasks)} tasks in {mean:.1f} steps on average"


def _optimal(probe: Probe) -> str:
    known = 0
    for task in probe.tasks[:2]:
        rng = Random(f"{probe.seed} {task.key}")
        probe.start(task)
        for _ in range(MAX_STEPS // 2):
            best, action = probe.env.optimal_actions(), _any_action(probe.env, rng)
            result = probe.env.act(action)
            if best is not None and result.optimal is not None:
                known += 1
                agrees = (action in best) == result.optimal
                _need(agrees, f"{action!r}: step says {result.optimal}, best were {sorted(best)}")
            if result.terminated or result.truncated:
                break
    if not known:
        raise SkippedError("no optimal actions known")
    return f"step and optimal_actions agree on {known} steps"


def _random(probe: Probe) -> str:
    scores, successes = [], 0
    for task in probe.tasks:
        result = None
        for _, result in probe.walk(task, steps=min(probe.env.step_limit, 1000)):
            _sound(result)
        scores.append(result.score if result else 0.0)
        successes += bool(result and result.success)
    mean = sum(scores) / len(scores)
    return f"mean score {mean:.2f}, success {successes / len(scores):.0%} of {len(scores)} tasks"


def _sound(result: StepResult) -> None:
    _need(isinstance(result.observation, str), "an observation that is no string")
    _need(math.isfinite(result.reward), f"reward {result.reward}")
    _need(0 <= result.score <= 1, f"score {result.score} is outside [0, 1]")
    _need(not (result.terminated and result.truncated), "terminated and truncated at once")


def _hostile(probe: Probe) -> str:
    slowest, task = 0.0, probe.tasks[0]
    for text in HOSTILE:
        probe.start(task)
        begun = time.perf_counter()
        try:
            result = probe.env.act(text)
        except Exception as error:
            raise FailedError(f"{text[:20]!r} raised {type(error).__name__}: {error}") from error
        slowest = max(slowest, time.perf_counter() - begun)
        _sound(result)
    return f"{len(HOSTILE)} strange actions, slowest {1000 * slowest:.1f} ms"


def _limit(probe: Probe) -> str:
    limit = probe.env.step_limit
    if limit > 1000:
        raise SkippedError(f"step limit {limit} is too far away")
    probe.start(probe.tasks[0])
    for step in range(1, limit + 1):
        result = probe.env.act("")
        if result.terminated:
            return f"ended by itself after {step} empty actions"
        _need(result.truncated == (step == limit), f"truncated={result.truncated} at step {step}")
    return f"truncated at step {limit}"


def _speed(probe: Probe) -> str:
    rng, steps, spent, number = Random(probe.seed), 0, 0.0, 0
    while spent < probe.seconds:
        probe.start(probe.tasks[number % len(probe.tasks)])
        number += 1
        ended = False
        while not ended and spent < probe.seconds:
            action = _any_action(probe.env, rng)
            begun = time.perf_counter()
            *_, terminated, truncated, _ = probe.env.step(action)
            spent += time.perf_counter() - begun
            steps, ended = steps + 1, terminated or truncated
    return f"{steps / spent:,.0f} steps/s" if steps else "not measured"


CHECKS: dict[str, Callable[[Probe], str]] = {
    "card": _card,
    "tasks": _tasks,
    "gymnasium": _gymnasium,
    "replay": _replay,
    "processes": _processes,
    "snapshot": _snapshot,
    "limit": _limit,
    "hostile": _hostile,
    "expert": _expert,
    "optimal": _optimal,
    "random": _random,
    "speed": _speed,
}
"""Name → check, in the order in which they run."""
