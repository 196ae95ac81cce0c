"""Places where a test can kill the process, to prove that nothing committed is lost.

Invariants: without the variable ``AGENTDISTILL_CRASH_AT`` nothing happens here. With
``AGENTDISTILL_CRASH_AT=name:k`` the process dies by SIGKILL (no handlers, no flushing) when it
reaches the point ``name`` for the ``k``-th time, counted from 1 within this process.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable

from agentdistill.errors import ConfigError

POINTS = (
    "shard:before-write",
    "shard:before-rename",
    "shard:after-rename",
    "commit:before",
    "commit:torn",
    "commit:after",
    "checkpoint:before-write",
    "checkpoint:before-complete",
    "checkpoint:before-rename",
    "checkpoint:replacing",
    "checkpoint:after-rename",
    "checkpoint:pruning",
    "export:before-write",
    "export:before-rename",
    "export:after-rename",
)
"""Every point there is, in the order in which a run reaches them.

``commit:torn`` has written half of a line. ``checkpoint:replacing`` is reached only when a step is
saved again: the old directory is aside, the new one not yet in place.
"""

RUN_POINTS = (
    "file:before-write",
    "file:before-rename",
    "file:after-rename",
    "iteration:after-generate",
    "iteration:after-update",
)
"""Points that only a whole run reaches."""

VARIABLE = "AGENTDISTILL_CRASH_AT"

_reached: Counter[str] = Counter()


def crash_point(name: str, last_act: Callable[[], object] | None = None) -> None:
    """Die here if the environment variable asks for it.

    Args:
        name: one of :data:`POINTS`.
        last_act: called right before dying, such as writing half of a line.

    Raises:
        ConfigError: the variable does not read ``name:k`` with a known name and k >= 1, so that a
            misspelt point cannot pass for a survived one.
        ValueError: ``name`` is not one of :data:`POINTS`.
    """
    if name not in POINTS + RUN_POINTS:
        raise ValueError(f"{name!r} is not in crash.POINTS")
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    point, _, count = wanted.rpartition(":")
    if point not in POINTS + RUN_POINTS or not count.isdecimal() or int(count) < 1:
        raise ConfigError(f"write point:count, with one of {POINTS}", key=VARIABLE, value=wanted)
    _reached[name] += 1
    if point == name and _reached[name] == int(count):
        if last_act is not None:
            last_act()
        os.kill(os.getpid(), signal.SIGKILL)
