"""Checks that use an environment hard: in threads, in another process, for many episodes.

See probe.py for what a check is given and how it ends.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice, pairwise
from random import Random
from statistics import median
from threading import Barrier
from typing import Any

from agentdistill.envs import footprint
from agentdistill.envs.base import TextEnv
from agentdistill.envs.footprint import Footprint, Process
from agentdistill.envs.make import make
from agentdistill.envs.probe import FailedError, Probe, SkippedError, any_action, need, trace
from agentdistill.records import Task, digest

MANY = 4
"""Instances that are used at once."""

EPISODES = 200
"""Short episodes that must not leave anything behind."""

SHORT = 5
"""Steps of a short episode."""

JUDGED = 40
"""From so many short episodes on the growth of memory is judged, and not only told."""

GROWTH = {"memory": (32 << 10, 2 << 20), "below": (1 << 20, 256 << 20)}
"""Bytes per episode, and bytes in all, that are too much over the second half of the episodes. A
process below may be a Java machine, which takes what it is allowed before it collects."""

GRACE = 2.0
"""Seconds that the system may take until what was closed is gone."""

MIB = 1 << 20


# -- several at once -------------------------------------------------------------------------------


def threads(probe: Probe) -> str:
    """Several instances that are used at once see what one alone sees."""
    if probe.target is None:
        raise SkippedError("give an id or module:Class to use several at once")
    slots = probe.env.card.slots
    if slots == 1:
        raise SkippedError("its card allows one episode at a time on this machine")
    number = min(MANY, slots or MANY)
    play = partial(trace, seed=probe.seed, steps=probe.steps)
    tasks, alone = list[Task](), list[str]()
    for task in probe.each(1 / (number + 1)):
        tasks.append(task)
        alone.append(digest(play(probe.env, task)))
    others = [make(probe.target, probe.kwargs) for _ in range(number - 1)]
    try:
        _at_once([probe.env, *others], tasks, play, alone)
    finally:
        for env in others:
            env.close()
    probe.played = len(tasks) * (number + 1)
    return f"{number} at once see the same as one alone in {len(tasks)} tasks"


def _at_once(
    envs: Sequence[TextEnv],
    tasks: Sequence[Task],
    play: Callable[[TextEnv, Task], list[Any]],
    alone: Sequence[str],
) -> None:
    gate = Barrier(len(envs))

    def all_of(place: int) -> None:
        gate.wait(60)
        for number in range(len(tasks)):
            turn = (number + place) % len(tasks)  # each is somewhere else
            need(
                digest(play(envs[place], tasks[turn])) == alone[turn],
                f"task {tasks[turn].key}: {len(envs)} at once see something else than one alone",
            )

    with _impatient(), ThreadPoolExecutor(len(envs)) as pool:
        for future in [pool.submit(all_of, place) for place in range(len(envs))]:
            future.result()


@contextmanager
def _impatient() -> Iterator[None]:
    """Python changes threads every 10 microseconds, so that a race has a chance to show."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


# -- in another process ----------------------------------------------------------------------------

_CHILD = (
    "import json, sys; from agentdistill.envs.check import trace_digest; "
    "print(trace_digest(*json.load(sys.stdin)))"
)


def processes(probe: Probe) -> str:
    """Another process, with another order of sets, sees the same."""
    if probe.target is None:
        raise SkippedError("give an id or module:Class to compare with another process")
    steps = probe.steps
    here = digest([trace(probe.env, task, probe.seed, steps) for task in probe.each(0.4)])
    request = json.dumps([probe.target, dict(probe.kwargs), probe.played, probe.seed, steps])
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=request,
        env={**os.environ, "PYTHONHASHSEED": "20240229", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120 + 10 * probe.spent,
        check=False,
    )
    need(done.returncode == 0, f"the other process failed: {done.stderr[-300:]}")
    need(done.stdout.split()[-1:] == [here], "another process saw other episodes")
    return f"{probe.many} are the same in another process"


# -- speed -----------------------------------------------------------------------------------------


def speed(probe: Probe) -> str:
    """Steps per second, the listing of actions not counted, and seconds per reset."""
    rng, steps, spent, resets = Random(probe.seed), 0, 0.0, list[float]()
    while spent < probe.seconds and not (steps and probe.late()):
        begun = time.perf_counter()
        probe.start(probe.tasks[len(resets) % len(probe.tasks)])
        resets.append(time.perf_counter() - begun)
        ended = False
        while not ended and spent < probe.seconds and not (steps and probe.late()):
            action = any_action(probe.env, rng)
            begun = time.perf_counter()
            *_, terminated, truncated, _ = probe.env.step(action)
            spent += time.perf_counter() - begun
            steps, ended = steps + 1, terminated or truncated
    probe.played = len(resets)
    if not steps:
        return "not measured"
    return f"{steps / spent:,.0f} steps/s, reset {1000 * median(resets):,.1f} ms"


# -- leaks -----------------------------------------------------------------------------------------


def leaks(probe: Probe) -> str:
    """Many short episodes leave nothing behind, and neither does :meth:`TextEnv.close`."""
    if footprint.read() is None:
        raise SkippedError("needs /proc, which this system does not have")
    seen = list(_readings(probe))
    second = seen[len(seen) // 2 :]
    _steady("file descriptors", [found.descriptors for found in second])
    _steady("threads", [found.threads for found in second])
    _steady("processes", [len(found.processes) for found in second])
    if len(seen) >= JUDGED:
        _level("memory of this process", [found.memory for found in second], *GROWTH["memory"])
        _level("memory below it", [found.below for found in second], *GROWTH["below"])
    told = f"{_change(second)} over the last {len(second)} of {len(seen)} episodes"
    if probe.target is None:
        return told
    _closes(probe, frozenset[Process]().union(*(found.processes for found in seen)))
    return f"{told}; nothing is left after close"


def _readings(probe: Probe) -> Iterator[Footprint]:
    """The footprint after each of up to :data:`EPISODES` short episodes."""
    collected = 0.0
    for task in islice(cycle(probe.tasks), EPISODES):
        if probe.played > 2 and probe.late(0.8):
            return
        for _ in probe.walk(task, SHORT):
            pass
        probe.played += 1
        if time.monotonic() - collected > 0.5:  # not each time: it may take longer than an episode
            gc.collect()  # what only waits for Python's collector is not lost
            collected = time.monotonic()
        found = footprint.read()
        assert found is not None
        yield found


def _steady(what: str, counts: Sequence[int]) -> None:
    """Fail where a count grows by one in four episodes or more."""
    growth = counts[-1] - counts[0]
    need(
        growth < max(3, len(counts) / 4),
        f"{what} grow: {counts[0]} to {counts[-1]} in {len(counts)} episodes",
    )


def _level(what: str, sizes: Sequence[int], per_episode: int, in_all: int) -> None:
    """Fail where memory rises from quarter to quarter, and by too much."""
    size = len(sizes) // 4
    quarters = [median(sizes[size * n : size * (n + 1)]) for n in range(4)]
    rises = all(a < b for a, b in pairwise(quarters))
    growth = quarters[-1] - quarters[0]
    rate = growth / (3 * size)
    need(
        not rises or growth < in_all or rate < per_episode,
        f"{what} grows: {rate / 1024:,.0f} KiB per episode",
    )


def _change(seen: Sequence[Footprint]) -> str:
    first, last = seen[0], seen[-1]
    parts = [f"memory {(last.memory - first.memory) / MIB:+.1f} MiB"]
    if last.processes:
        below = (last.below - first.below) / MIB
        word = "process" if len(last.processes) == 1 else "processes"
        parts.append(f"{below:+.1f} MiB in {len(last.processes)} {word} below")
    parts.append(f"descriptors {last.descriptors - first.descriptors:+d}")
    parts.append(f"threads {last.threads - first.threads:+d}")
    return ", ".join(parts)


def _closes(probe: Probe, seen: frozenset[Process]) -> None:
    """Close the environment, then open and close another one: nothing of either is left."""
    assert probe.target is not None
    probe.close()
    _gone(seen - probe.before)
    first = {what: _held(what) for what in ("descriptors", "threads")}
    env = make(probe.target, probe.kwargs)
    try:
        env.reset(options={"task": probe.tasks[0]})
        seen = footprint.descendants()
    finally:
        env.close()
    _gone(seen - probe.before)
    for what, most in first.items():
        if not _soon(partial(_at_most, what, most)):
            more = _held(what) - most
            raise FailedError(f"close leaves {what} behind: {more} more than before")


def _held(what: str) -> int:
    return int(getattr(footprint.read(), what))


def _at_most(what: str, most: int) -> bool:
    return _held(what) <= most


def _gone(processes: frozenset[Process]) -> None:
    if _soon(lambda: not any(map(footprint.exists, processes))):
        return
    left = [number for number, _ in sorted(filter(footprint.exists, processes))]
    names = "; ".join(f"{number} {footprint.command(number)[:60]}".strip() for number in left[:3])
    raise FailedError(f"close leaves {len(left)} of its processes behind: {names}")


def _soon(holds: Callable[[], bool]) -> bool:
    """Whether ``holds`` comes true within :data:`GRACE` seconds."""
    gc.collect()
    until = time.monotonic() + GRACE
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True
