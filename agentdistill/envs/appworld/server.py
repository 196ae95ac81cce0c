"""AppWorld's side: a process that has imported everything, and forks one world per episode.

This file runs with the interpreter of AppWorld's own virtual environment, as a script, and imports
nothing of ours. worlds.py is the other side.

Invariants
----------
* An episode has a process of its own, forked for it and ended with it: what its code changed in
  Python (a patched function, a stopped clock) is gone with it.
* Nothing listens: each world talks over the one end of a socket pair that it was given.
* When the other side of the control socket goes, all worlds are killed.
* The forking process has one thread and never runs an agent's code.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import socket
import sys
from typing import Any

NEVER = 10**9
"""A limit of the engine that we do not use, because the environment has its own."""

_REFUSED = (
    "os.chmod",
    "os.chown",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.killpg",
    "os.link",
    "os.mkdir",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.spawn",
    "os.symlink",
    "os.system",
    "os.truncate",
    "pty.spawn",
    "shutil.rmtree",
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
)
_LATE = (
    "IPython.core.completerlib",
    "anyio._backends._asyncio",
    "jsonref",
    "libcst.native",
    "pytest",
)
"""What AppWorld imports when it first starts, executes and evaluates."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Guard:
    """Refuses what executed code has no business with; see :meth:`watch` for why it is no sandbox.

    Attributes:
        armed: whether an agent's code is running.
    """

    def __init__(self, readable: list[str], secret: str) -> None:
        """Files below ``readable`` may be read, except those below ``secret``."""
        self.armed = False
        self._readable = tuple(os.path.realpath(path) + os.sep for path in readable)
        self._secret = os.path.realpath(secret) + os.sep

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Judge an audit event.

        Code in the same process can find ways around it: it stops accidents and the short cuts that
        a learner finds (reading the answers), not an attacker.
        """
        if not self.armed:
            return
        if event == "open":
            self._open(*arguments)
        elif event in _REFUSED:
            raise PermissionError(f"{event} is not available here")

    def _open(self, path: Any, mode: str | None, flags: int) -> None:
        if not isinstance(path, (str, bytes)):
            return
        if flags & _WRITING or set(mode or "r") & set("wax+"):
            raise PermissionError("files cannot be written here; print what you need")
        real = os.path.realpath(os.fsdecode(path))
        if real.startswith(self._secret) or not real.startswith(self._readable):
            raise PermissionError("this file cannot be read here")


class World:
    """One task in AppWorld's own engine; the methods are what the other side may ask for."""

    def __init__(self, folder: str, guard: Guard) -> None:
        """``folder`` is where the engine writes the state that it evaluates."""
        self._folder, self._guard = folder, guard
        self._world: Any = None

    def start(self, task: str, seconds: int) -> dict[str, Any]:
        """Set up ``task``; code is interrupted after ``seconds`` per call."""
        engine = importlib.import_module("appworld.environment").AppWorld
        guard, run = self._guard, engine._shell_run_cell

        def guarded(world: Any, code: str) -> Any:
            guard.armed = True
            try:
                return run(world, code)
            finally:
                guard.armed = False

        engine._shell_run_cell = guarded
        engine.save_logs = lambda world: None  # it writes the whole history at every call
        self._world = engine(
            task_id=task,
            experiment_name=self._folder,  # absolute: nothing is written below the data
            max_interactions=NEVER,
            timeout_seconds=seconds,
        )
        return {}

    def execute(self, code: str, limit: int) -> dict[str, Any]:
        """Run ``code``.

        Returns:
            ``output``, the first ``limit`` characters of it; ``cut``, how many more there were;
            ``ran``, False where the engine refused the code; ``completed``, whether the agent has
            declared the task done.
        """
        before = self._world.num_interactions
        output = self._world.execute(code)
        return {
            "output": output[:limit],
            "cut": max(0, len(output) - limit),
            "ran": self._world.num_interactions > before,
            "completed": self._world.task_completed(),
        }

    def evaluate(self) -> dict[str, Any]:
        """``success``, and how many of the engine's tests passed: ``passed`` of ``tests``."""
        result = self._world.evaluate().to_dict(stats_only=False)
        passed, tests = len(result["passes"]), result["num_tests"]
        return {"success": bool(result["success"]), "passed": passed, "tests": tests}

    def save_state(self, name: str) -> dict[str, Any]:
        """Keep the databases as they are (and not Python's variables)."""
        self._world.save_state(name)
        return {}

    def load_state(self, name: str) -> dict[str, Any]:
        """Go back to the databases of :meth:`save_state`."""
        self._world.load_state(name)
        return {}


def answer(world: World, line: bytes) -> dict[str, Any]:
    """What a request, a line of JSON, comes to; ``error`` where it raises."""
    request = json.loads(line)
    try:
        return {"value": getattr(world, request.pop("do"))(**request)}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"}


def live(descriptor: int, folder: str, memory: int) -> None:
    """A world's life: limits, then requests until the other side has gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _at_most(resource.RLIMIT_FSIZE, 1 << 26)  # bytes per file: the engine's own are far smaller
    _at_most(resource.RLIMIT_CORE, 0)
    if memory and sys.platform == "linux":  # others refuse, or ignore it
        _at_most(resource.RLIMIT_AS, memory)
    place = os.path.join(folder, str(os.getpid()))
    os.mkdir(place)
    data = os.path.join(os.environ["APPWORLD_ROOT"], "data")
    readable = [sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), data]
    guard = Guard([*readable, "/usr/share/zoneinfo"], os.path.join(data, "tasks"))
    sys.addaudithook(guard.watch)
    world = World(place, guard)
    with socket.socket(fileno=descriptor) as conversation, conversation.makefile("rwb") as stream:
        stream.write(json.dumps({"process": os.getpid(), "folder": place}).encode() + b"\n")
        stream.flush()
        while line := stream.readline():
            stream.write(json.dumps(answer(world, line)).encode() + b"\n")
            stream.flush()


def _at_most(kind: int, limit: int) -> None:
    hard = resource.getrlimit(kind)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (limit, limit))


def prepare() -> None:
    """Import all that a world needs, so that each has it from the start and they share it."""
    load: Any = importlib.import_module  # this file is checked where these packages are not
    # AppWorld reads a .env file from any folder above its own, and with it somebody's keys.
    load("dotenv").load_dotenv = lambda *arguments, **keywords: False
    load("appworld.environment")
    names = load("appworld.apps").get_all_apps
    for app in names():
        load(f"appworld.apps.{app}.apis")
        load(f"appworld.apps.{app}.models")
    for name in _LATE:
        with contextlib.suppress(ImportError):
            load(name)
    with load("freezegun").freeze_time("2023-05-18"):
        pass  # it has looked at every module now, and remembers
    with contextlib.suppress(OSError, ValueError):  # a world that misses its files says so itself
        documents = load("appworld.collections.api_docs").ApiDocCollection
        documents.load(load_apps=tuple(names(skip_admin=True)), include_response_schemas=True)
    gc.collect()
    gc.freeze()


def main(descriptor: int, folder: str, memory: int) -> None:
    """Fork a world for every socket that comes in over the control socket ``descriptor``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is the other side's business
    prepare()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for worlds: they may just go
    control = socket.socket(fileno=descriptor)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            break
        for given in descriptors:
            with contextlib.suppress(OSError):  # no process to be had: the other side sees the end
                if os.fork() == 0:
                    control.close()
                    _end_after(live, given, folder, memory)
            os.close(given)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _end_after(function: Any, *arguments: Any) -> None:
    """Call ``function`` and end this process, without what Python does at the end."""
    try:
        function(*arguments)
    finally:
        os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
