"""An append-only file of JSON lines that several processes write, and what each has open.

Invariants
----------
* Lines are only appended, and only inside :meth:`Journal.exclusive`: one process at a time, which
  has read all earlier lines. A line that was appended is on the disk.
* Only a line that ends in a newline counts. A torn line (kill -9 in the middle of a write) is
  ignored; the next append closes it in a way that can never turn it into a record.
* What a process has open lies in a file that it keeps locked, so that the operating system tells
  whether the process still lives. What a dead process had open stays until somebody has written
  down how it counts.
* A forked child, after :meth:`Journal.disown`, has nothing open and takes locks of its own.

Layout beside ``NAME.jsonl``: ``NAME.lock``, and ``NAME.open/`` with one file per process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from agentdistill.files import refusing, sync
from agentdistill.records import Json

Record = dict[str, Json]

_TORN = b" #torn\n"


class Journal:
    """See the module docstring."""

    def __init__(self, path: Path) -> None:
        """Open ``path``; it and its folder are made when the first line is appended.

        Raises:
            StoreError: (here and in every method) the disk refuses.
        """
        self._lock: BinaryIO | None = None
        self._mine: BinaryIO | None = None
        self.path, self._place = path, 0
        self._folder = path.with_suffix(".open")
        self.disown()

    def disown(self) -> None:
        """Leave the locks, and what is open, to the process that this one was forked from."""
        self._forget()
        self._token = uuid.uuid4().hex[:12]
        self._thread = threading.RLock()

    def __del__(self) -> None:
        """Let go of the locks; never wait for one here."""
        self._forget()

    def close(self) -> None:
        """Give up what is open and every lock; used again, it opens them again."""
        with self._thread:
            if self._mine is not None:
                with self.exclusive():
                    self._own().unlink(missing_ok=True)
            self._forget()

    def _forget(self) -> None:
        for file in (self._mine, self._lock):
            if file is not None:
                file.close()
        self._mine = self._lock = None

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nobody else is inside, in no process and no thread."""
        with self._thread, refusing(self.path):
            if self._lock is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._lock = self.path.with_suffix(".lock").open("ab")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    # -- lines ------------------------------------------------------------------------------------

    def news(self) -> list[Record]:
        """The records since the last time, whoever wrote them."""
        with refusing(self.path):
            if not self.path.exists():
                return []
            with self.path.open("rb") as file:
                file.seek(self._place)
                data = file.read()
        lines = data[: data.rfind(b"\n") + 1]
        self._place += len(lines)
        return records(lines)

    def append(self, record: Mapping[str, Json]) -> None:
        """One more line, on the disk before this returns; :meth:`news` will not repeat it."""
        with refusing(self.path):
            there = self.path.exists()
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            descriptor = os.open(self.path, flags, 0o666)
            try:
                size = os.fstat(descriptor).st_size
                torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
                line = (_TORN if torn else b"") + json.dumps(record).encode() + b"\n"
                if os.write(descriptor, line) < len(line):
                    raise OSError(errno.ENOSPC, "the line was written only in part")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if not there:
                sync(self.path.parent)
            self._place = size + len(line)

    # -- what is open -----------------------------------------------------------------------------

    def hold(self, open_now: Mapping[str, Json]) -> None:
        """What this process has open from now on, for the others to see."""
        with refusing(self._folder):
            if self._mine is None:
                self._folder.mkdir(exist_ok=True)
                self._mine = self._own().open("w+b", buffering=0)
                fcntl.flock(self._mine, fcntl.LOCK_EX)
            data = json.dumps(open_now).encode() + b"\n"  # whatever follows the newline is old
            if os.pwrite(self._mine.fileno(), data, 0) < len(data):
                raise OSError(errno.ENOSPC, "what is open was written only in part")

    def held(self) -> dict[str, Json]:
        """What other living processes have open."""
        found: dict[str, Json] = {}
        for path in self._others():
            found |= _open(path.read_bytes())
        return found

    def lost(self) -> dict[Path, dict[str, Json]]:
        """What dead processes had open, by file; remove the file once that is written down.

        A line may tell already how one of these ended: compare with :meth:`known`.
        """
        found = {}
        for path in self._others():
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                found[path] = _open(file.read())
        return found

    def known(self, name: str) -> set[Json]:
        """What all records say under ``name``."""
        data = self.path.read_bytes() if self.path.exists() else b""
        return {record.get(name) for record in records(data)}

    def _own(self) -> Path:
        return self._folder / f"{os.getpid()}-{self._token}.json"

    def _others(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return [path for path in sorted(self._folder.glob("*.json")) if path != self._own()]


def records(data: bytes) -> list[Record]:
    """The records in the lines of ``data``; torn and malformed lines are left out."""
    found = []
    for line in data.split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _open(data: bytes) -> dict[str, Json]:
    """What one process has open; nothing if it died before it could say so."""
    try:
        found = json.loads(data.partition(b"\n")[0])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
