"""Our side of AppWorld: the process that forks worlds, and the worlds that we talk to.

Invariants
----------
* One forking process for each Python process, interpreter, root and limit: started by the first
  world, shared by all, ended when nobody holds it any more; it ends with us, and its worlds too.
* A call ends: with its result, or with an EnvError after which the world is gone (killed where it
  did not answer in time).
* The other side sees no environment variable of ours but :data:`agentdistill.envs.worker.KEPT`.

Requests and answers are lines of JSON on a socket pair: there is no port that another program, or a
page in a browser, could reach.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import Any, NoReturn
from weakref import WeakValueDictionary

from agentdistill.envs.worker import Child, scrubbed
from agentdistill.errors import EnvError

START = 180.0
"""Seconds that importing AppWorld may take (about 6 on a warm disk)."""

_nurseries: WeakValueDictionary[tuple[Any, ...], Nursery] = WeakValueDictionary()
_lock = threading.Lock()


def nursery(python: Path, root: Path, memory: int) -> Nursery:
    """The forking process for these arguments, started if need be; keep what is returned.

    Args:
        python: interpreter of AppWorld's virtual environment.
        root: the folder above ``data``.
        memory: bytes of address space per world; 0 sets no limit.
    """
    key = (os.getpid(), python, root, memory)
    with _lock:
        found = _nurseries.get(key)
        if found is None or found.broken:
            found = _nurseries[key] = Nursery(python, root, memory)
        return found


class Nursery:
    """The process in which server.py forks worlds."""

    def __init__(self, python: Path, root: Path, memory: int) -> None:
        """Start it; it imports AppWorld while we go on."""
        folder = tempfile.mkdtemp(prefix="agentdistill-appworld-")
        ours, theirs = socket.socketpair()
        server = Path(__file__).with_name("server.py")
        arguments = [str(theirs.fileno()), folder, str(memory)]
        try:
            self.child = Child(
                [str(python), "-P", str(server), *arguments],  # -P: do not import from our folder
                environ=scrubbed(
                    APPWORLD_ROOT=str(root),
                    APPWORLD_CACHE=str(python.parents[2] / "cache"),
                    IPYTHONDIR=os.path.join(folder, "ipython"),
                    PYTHONHASHSEED="0",
                    PYTHONUTF8="1",
                ),
                cwd=folder,
                pass_fds=[theirs.fileno()],
            )
        except EnvError:
            ours.close()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            theirs.close()
        self._control, self.folder = ours, folder
        self._lock = threading.Lock()
        self.close = weakref.finalize(self, _end, os.getpid(), ours, self.child, folder)
        """End it, and all its worlds."""

    @property
    def broken(self) -> bool:
        """Whether it must be replaced."""
        return not self.close.alive or not self.child.alive

    def world(self) -> World:
        """A new world, without a task yet; EnvError when the process has ended."""
        ours, theirs = socket.socketpair()
        try:
            with theirs, self._lock:
                socket.send_fds(self._control, [b"w"], [theirs.fileno()])
        except OSError:
            ours.close()
            self.fail("it has ended")
        return World(self, ours)

    def fail(self, reason: str) -> NoReturn:
        """EnvError with ``reason`` and what the process printed last, where it has ended."""
        words = "" if self.child.alive else self.child.last_words()
        raise EnvError(f"AppWorld's process failed: {reason}" + (words and f" ({words})"))


def _end(owner: int, control: socket.socket, child: Child, folder: str) -> None:
    if os.getpid() != owner:
        return  # a forked copy of us: the process is not its own
    control.close()
    child.stop()
    shutil.rmtree(folder, ignore_errors=True)


class World:
    """One episode's process; its methods are those of ``World`` in server.py."""

    def __init__(self, nursery: Nursery, connection: socket.socket) -> None:
        """Wait until it is there."""
        self._nursery = nursery
        self._connection, self._rest = connection, bytearray()
        self.process: int | None = None
        self._folder = ""
        hello = self._receive(START)
        self.process, self._folder = int(hello["process"]), str(hello["folder"])
        self.close = weakref.finalize(
            self, _kill, os.getpid(), connection, self.process, self._folder
        )
        """End it; a world that has ended may be closed too."""

    def call(self, do: str, deadline: float, **arguments: Any) -> dict[str, Any]:
        """Call the method ``do``; see the module docstring for how it ends."""
        if not self.close.alive:
            raise EnvError("this AppWorld world has ended; reset the environment")
        try:
            self._connection.settimeout(deadline)
            self._connection.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
        except OSError:
            self._fail("its process has ended")
        answer = self._receive(deadline)
        if "error" in answer:
            self._fail(" ".join(str(answer["error"]).split())[:600])
        return dict(answer["value"])

    def _receive(self, deadline: float) -> dict[str, Any]:
        """One line, within ``deadline`` seconds in all."""
        until = time.monotonic() + deadline
        while b"\n" not in self._rest:
            try:
                self._connection.settimeout(max(0.001, until - time.monotonic()))
                part = self._connection.recv(1 << 16)
            except TimeoutError:
                self._fail(f"no answer within {deadline:g} s")
            except OSError:
                part = b""
            if not part:
                self._fail("its process has ended")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _fail(self, reason: str) -> NoReturn:
        if self.process is None:
            self._connection.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._nursery.child.process.wait(1.0)  # it may be about to end, and to say why
        else:
            self.close()
        self._nursery.fail(reason)


def _kill(owner: int, connection: socket.socket, process: int, folder: str) -> None:
    """Kill the process at once: code that runs there may not listen to anything else."""
    if os.getpid() != owner:
        return
    if _open(connection):  # else it has gone, and its number may be somebody else's by now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)
    connection.close()
    shutil.rmtree(folder, ignore_errors=True)


def _open(connection: socket.socket) -> bool:
    """Whether the other end is still held by somebody."""
    try:
        connection.setblocking(False)
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False
