"""What this process and the processes below it hold: memory, descriptors, threads.

Invariants: everything is read from ``/proc``, nothing is kept open and nothing is changed; where
there is no ``/proc`` (macOS), :func:`read` returns None. A process is named by its number and its
start time, so that a number that is used again is not mistaken for the same process.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass

PROC = "/proc"

HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""Children that Python itself keeps until the process ends."""

Process = tuple[int, int]
"""Number and start time."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What is held at one moment.

    Attributes:
        memory: resident bytes of this process.
        below: resident bytes of all processes below it, pages that they share counted by each.
        descriptors: open file descriptors of this process.
        threads: threads of this process.
        processes: all processes below it, those that ended and that nobody waited for included.
    """

    memory: int
    below: int
    descriptors: int
    threads: int
    processes: frozenset[Process]


def read() -> Footprint | None:
    """What is held now; None where it cannot be known."""
    if not os.path.exists(f"{PROC}/self/statm"):
        return None
    processes = descendants()
    return Footprint(
        resident(os.getpid()),
        sum(resident(number) for number, _ in processes),
        len(os.listdir(f"{PROC}/self/fd")) - 1,  # the listing itself needs one
        len(os.listdir(f"{PROC}/self/task")),
        processes,
    )


def descendants() -> frozenset[Process]:
    """The processes below this one, without :data:`HELPERS`."""
    found: set[Process] = set()
    waiting = _children(os.getpid())
    while waiting:
        number = waiting.pop()
        fields = _stat(number)
        if fields and not any(name in command(number) for name in HELPERS):
            found.add((number, int(fields[_START])))
            waiting += _children(number)
    return frozenset(found)


def exists(process: Process) -> bool:
    """Whether ``process`` is still in the table of processes, wherever it belongs now."""
    fields = _stat(process[0])
    return bool(fields) and int(fields[_START]) == process[1]


def resident(number: int) -> int:
    """Resident bytes of process ``number``; 0 when it has ended."""
    pages = _text(f"{number}/statm").split()
    return int(pages[1]) * resource.getpagesize() if pages else 0


def command(number: int) -> str:
    """The command line of process ``number``, "" when it has ended."""
    return _text(f"{number}/cmdline").replace("\0", " ").strip()


_PARENT, _START = 1, 19
"""Places in ``stat``, counted from the state."""


def _children(number: int) -> list[int]:
    """The numbers of the children of process ``number``."""
    try:
        threads = os.listdir(f"{PROC}/{number}/task")
    except OSError:
        return []
    if os.path.exists(f"{PROC}/{number}/task/{number}/children"):
        listed = (_text(f"{number}/task/{thread}/children") for thread in threads)
        return [int(child) for text in listed for child in text.split()]
    numbers = [int(name) for name in os.listdir(PROC) if name.isdigit()]
    return [n for n in numbers if _stat(n)[_PARENT : _PARENT + 1] == [str(number)]]


def _stat(number: int) -> list[str]:
    """The fields of ``stat`` from the state on; empty when the process has ended."""
    return _text(f"{number}/stat").rpartition(")")[2].split()  # the name may hold spaces


def _text(path: str) -> str:
    try:
        with open(f"{PROC}/{path}", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:  # it has ended
        return ""
