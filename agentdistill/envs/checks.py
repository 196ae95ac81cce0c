"""The checks behind :func:`agentdistill.envs.check.check_env`: one environment in one process.

Those that use several instances, processes or many episodes are in strain.py; what a check is given
and how it ends is in probe.py. Any other exception than the two that are named there is the
environment's, and counts as failed.
"""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from collections.abc import Callable
from itertools import islice
from random import Random

from gymnasium.utils.env_checker import check_env as gymnasium_check

from agentdistill.envs import strain
from agentdistill.envs.base import ISOLATIONS
from agentdistill.envs.probe import FailedError, Probe, SkippedError, any_action, need
from agentdistill.errors import ConfigError
from agentdistill.records import StepResult

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


def _card(probe: Probe) -> str:
    env, card = probe.env, probe.env.card
    need(re.search(r"-v\d+$", card.id) is not None, f"id {card.id!r} has no version such as -v0")
    need(card.isolation in ISOLATIONS, f"isolation {card.isolation!r} is none of {ISOLATIONS}")
    need(len(set(card.splits)) == len(card.splits) > 0, f"splits {card.splits} repeat or are none")
    need(card.step_limit >= 1, f"step_limit is {card.step_limit}")
    need(bool(card.licence), "no licence")
    need(card.slots is None or card.slots >= 1, f"slots is {card.slots}")
    need(card.expert_rate is None or 0 <= card.expert_rate <= 1, f"expert_rate {card.expert_rate}")
    need(bool(env.instruction.strip()), "no instruction")
    for tool in env.tools:
        need(bool(tool["function"]["name"]), "a tool without a name")
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
        need([t.key for t in found] == [t.key for t in again], f"{split}: two listings differ")
        for task in found:
            json.dumps(dict(task.payload))
            need(task.env == env.card.id, f"{split}: a task of {task.env}")
            need(task.split == split, f"{split}: a task of split {task.split}")
            need(task.key not in owner, f"{split}: task {task.key} is in {owner.get(task.key)} too")
            owner[task.key] = split
        counts.append(f"{split} {len(found)}")
    try:
        next(iter(env.tasks("no such split")), None)
    except ConfigError:
        return f"distinct, in their split: {', '.join(counts)}"
    raise FailedError("an unknown split is no ConfigError")


def _replay(probe: Probe) -> str:
    total = 0
    for task in probe.each():
        taken = list(probe.walk(task))
        first, again = probe.start(task), probe.start(task)
        need(first == again, f"task {task.key}: two resets show different observations")
        results = probe.env.replay([action for action, _ in taken])
        for step, (result, (action, expected)) in enumerate(zip(results, taken, strict=True)):
            need(result == expected, f"task {task.key}, step {step}, {action!r}: results differ")
        total += len(taken)
    return f"{total} steps of {probe.many} repeated"


def _snapshot(probe: Probe) -> str:
    rng, env = Random(probe.seed), probe.env
    for task in probe.each():
        walk, before = probe.walk(task), rng.randrange(probe.steps // 2)
        if not before:
            probe.start(task)  # the walk begins with its first step, and the same reset
        for _ in islice(walk, before):
            pass
        saved = env.snapshot()
        taken = list(walk)
        for attempt in ("first", "second"):
            env.restore(saved)
            results = env.replay([action for action, _ in taken])
            same = results == [result for _, result in taken]
            need(same, f"task {task.key}: not the same after the {attempt} restore")
    return f"{probe.many} restored, twice each"


def _expert(probe: Probe) -> str:
    solved, steps = 0, 0
    for task in probe.each():
        probe.start(task)
        result = None
        while result is None or not (result.terminated or result.truncated):
            action = probe.env.expert_action()
            if action is None:
                break
            result = probe.env.act(action)
            steps += 1
        if result is None and probe.played == 1:
            raise SkippedError("no expert")
        solved += result is not None and result.success
    return _solved(probe, solved, steps)


def _solved(probe: Probe, solved: int, steps: int) -> str:
    """Judge the expert: better than nothing, or as good as it is known to be."""
    played, rate = probe.played, probe.expert_rate
    if rate is None:
        need(solved > 0, f"the expert solved none of {probe.many}")
        known = ""
    else:
        chance = sum(
            math.comb(played, k) * rate**k * (1 - rate) ** (played - k) for k in range(solved + 1)
        )
        said = f"the expert solved {solved} of {probe.many}, and is known to solve {rate:.0%}"
        need(chance >= UNLIKELY, f"{said}: so few come with probability {chance:.1e}")
        known = f" (known: {rate:.0%})"
    mean = steps / played
    return f"solved {solved / played:.0%} of {probe.many}{known} in {mean:.1f} steps on average"


def _optimal(probe: Probe) -> str:
    known = 0
    for task in islice(probe.each(), 2):  # the best actions may take a search
        rng = Random(f"{probe.seed} {task.key}")
        probe.start(task)
        for _ in range(probe.steps // 2):
            best, action = probe.env.optimal_actions(), any_action(probe.env, rng)
            result = probe.env.act(action)
            if best is not None and result.optimal is not None:
                known += 1
                agrees = (action in best) == result.optimal
                need(agrees, f"{action!r}: step says {result.optimal}, best were {sorted(best)}")
            if result.terminated or result.truncated:
                break
    if not known:
        raise SkippedError("no optimal actions known")
    return f"step and optimal_actions agree on {known} steps"


def _random(probe: Probe) -> str:
    scores, successes, cut = list[float](), 0, 0
    for task in probe.each():
        result, ended = None, False
        for _, result in probe.walk(task, steps=min(probe.env.step_limit, 1000)):
            _sound(result)
            ended = result.terminated or result.truncated
            if probe.late():
                break
        cut += not ended
        scores.append(result.score if result else 0.0)
        successes += bool(result and result.success)
    mean, rate = sum(scores) / len(scores), successes / len(scores)
    short = f", {cut} cut short" if cut else ""
    return f"mean score {mean:.2f}, success {rate:.0%} of {probe.many}{short}"


def _sound(result: StepResult) -> None:
    need(isinstance(result.observation, str), "an observation that is no string")
    need(math.isfinite(result.reward), f"reward {result.reward}")
    need(0 <= result.score <= 1, f"score {result.score} is outside [0, 1]")
    need(not (result.terminated and result.truncated), "terminated and truncated at once")


def _hostile(probe: Probe) -> str:
    slowest, task, ended = 0.0, probe.tasks[0], True
    for text in HOSTILE:
        if ended:
            probe.start(task)
            probe.played += 1
        begun = time.perf_counter()
        try:
            result = probe.env.act(text)
        except Exception as error:
            raise FailedError(f"{text[:20]!r} raised {type(error).__name__}: {error}") from error
        slowest = max(slowest, time.perf_counter() - begun)
        _sound(result)
        ended = result.terminated or result.truncated
    return f"{len(HOSTILE)} strange actions, slowest {1000 * slowest:.1f} ms"


def _limit(probe: Probe) -> str:
    limit = probe.env.step_limit
    probe.start(probe.tasks[0])
    probe.played = 1
    for step in range(1, limit + 1):
        if step > 1000 or probe.late():
            raise SkippedError(f"step limit {limit} is too far away: {step - 1} steps taken")
        result = probe.env.act("")
        if result.terminated:
            return f"ended by itself after {step} empty actions"
        need(result.truncated == (step == limit), f"truncated={result.truncated} at step {step}")
    return f"truncated at step {limit}"


UNLIKELY = 0.01
"""An expert is worse than it is known to be when its successes are less probable than this."""

CHECKS: dict[str, Callable[[Probe], str]] = {
    "card": _card,
    "tasks": _tasks,
    "gymnasium": _gymnasium,
    "replay": _replay,
    "processes": strain.processes,
    "threads": strain.threads,
    "snapshot": _snapshot,
    "limit": _limit,
    "hostile": _hostile,
    "expert": _expert,
    "optimal": _optimal,
    "random": _random,
    "speed": strain.speed,
    "leaks": strain.leaks,
}
"""Name → check, in the order in which they run; the last one closes the environment."""
