"""Answers that were paid for, by the hash of what was asked: none is paid twice.

Invariants: an answer is one file, which appears complete or not at all and is never changed. Of
several who ask the same at the same time, in one process or in several, one pays and the others
wait for its answer. Requests are kept as hashes only; answers must be JSON and not null.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from agentdistill.files import refusing, write_text
from agentdistill.records import Json, digest

_FIRST_PAUSE, _LAST_PAUSE = 0.01, 0.25


def payload_key(payload: Json) -> str:
    """Identity of a request: 64 hex digits of its canonical JSON.

    Everything that changes the answer belongs into ``payload``: model, endpoint, messages, tools,
    sampling and, where several samples of one prompt are wanted, their number or seed. Keys and
    other secrets do not.
    """
    return digest(payload, 64)


class RequestCache:
    """See the module docstring."""

    def __init__(self, folder: Path | None) -> None:
        """Answers in ``folder``, shared with any number of processes; None: in memory."""
        self.folder = folder
        self._memory: dict[str, str] = {}
        self._turns = weakref.WeakValueDictionary[tuple[int, str], asyncio.Lock]()

    def get(self, key: str) -> Json | None:
        """The answer to ``key``, or None; a damaged one counts as none.

        Raises:
            StoreError: the disk refuses.
        """
        if self.folder is None:
            text = self._memory.get(key)
            return None if text is None else json.loads(text)
        path = self._path(key)
        with refusing(path):
            data = path.read_bytes() if path.is_file() else b""
        try:
            return json.loads(data)["answer"] if data else None
        except (ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, answer: Json) -> None:
        """Keep ``answer``, on the disk before this returns; an answer that is there stays.

        Raises:
            StoreError: the disk refuses.
            TypeError: the answer is not JSON, or None, which stands for no answer.
        """
        if answer is None:
            raise TypeError("an answer is not None")
        if self.get(key) is not None:
            return
        if self.folder is None:
            self._memory[key] = json.dumps(answer)
            return
        path = self._path(key)
        with refusing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"answer": answer}))

    async def answer(self, key: str, ask: Callable[[], Awaitable[Json]]) -> tuple[Json, bool]:
        """The answer to ``key``, and whether it had to be asked for.

        ``ask`` is awaited by one caller at a time; if it raises, the next one asks.

        Raises:
            StoreError: the disk refuses.
        """
        async with self._turn(key):
            found = self.get(key)
            if found is not None:
                return found, False
            fresh = await ask()
            self.put(key, fresh)
            return fresh, True

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.json"

    @asynccontextmanager
    async def _turn(self, key: str) -> AsyncIterator[None]:
        """Nobody else asks for ``key`` meanwhile, in this loop or in another process."""
        place = id(asyncio.get_running_loop()), key
        turn = self._turns.get(place)
        if turn is None:
            turn = self._turns[place] = asyncio.Lock()
        async with turn:
            if self.folder is None:
                yield
                return
            path, pause = self._path(key).with_suffix(".lock"), _FIRST_PAUSE
            while (lock := _lock(path)) is None:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_PAUSE)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                os.close(lock)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock ``path`` until it is closed; None if somebody else does."""
    with refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it may have removed the name before we got it: then it locks nothing.
            if os.fstat(file).st_ino == path.stat().st_ino:
                return file
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        return None
