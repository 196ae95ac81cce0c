"""The simulator: a Java process of ours, with one world that is built anew for every problem.

Invariants
----------
* The process ends with ours, however that happens (worker.Child), listens on 127.0.0.1 only, at a
  port of the system's choice, obeys only who knows its token, and inherits no secrets from us.
* The same commands give the same answers in every process, a new one or one that has played before.
  Two things would break that, and are taken care of: the simulator walks over sets in the order of
  Java's identity hashes (``-XX:hashCode=2`` makes them all equal, so that sets keep the order of
  insertion), and looking for admissible actions draws from the random numbers that the world moves
  by (they are seeded anew before every command, from the problem and the step).
* Trouble of any kind is an EnvError, after which the process is gone and ``alive`` false.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import weakref
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from agentdistill.envs.scienceworld.gateway import Gateway, Long, Ref
from agentdistill.envs.worker import Child, scrubbed
from agentdistill.errors import ConfigError, EnvError, MissingExtraError

PACKAGE = "scienceworld"

NO_JAVA = (
    "ScienceWorld needs a Java runtime, version 8 or newer, on PATH or in JAVA_HOME: "
    "install one, such as the package openjdk-17-jre-headless"
)

JVM_OPTIONS = (
    "-XX:+UseSerialGC",  # one thread collects: a small process, and its neighbours keep their cores
    "-XX:+ExitOnOutOfMemoryError",
    "-XX:-UsePerfData",  # leaves no file behind when killed
    "-XX:+UnlockExperimentalVMOptions",
    "-XX:hashCode=2",
)

_GREETING = re.compile(r"(?:^| )(\d{1,5}) ([A-Za-z0-9+/_-]{20,}=*)(?: |$)")
_RANDOM_BITS = 2**48  # java.util.Random's state


def java() -> str | None:
    """The Java program, or None."""
    home = os.environ.get("JAVA_HOME")
    found = shutil.which(os.path.join(home, "bin", "java")) if home else None
    return found or shutil.which("java")


def version() -> str:
    """Version of the package, "" where it is missing."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return ""


def jar() -> Path | None:
    """The simulator's file inside the package; nothing is imported."""
    spec = find_spec(PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "scienceworld.jar"
        if path.is_file():
            return path
    return None


def jar_hash() -> str:
    """16 hex digits of the simulator's content, "" where it is missing."""
    path = jar()
    return _hash(path) if path else ""


@lru_cache
def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def need() -> tuple[str, Path]:
    """Java and the jar.

    Raises:
        MissingExtraError: the package is not installed.
        ConfigError: there is no Java.
    """
    path = jar()
    if path is None:
        raise MissingExtraError("the environment ScienceWorld", PACKAGE)
    program = java()
    if program is None:
        raise ConfigError(NO_JAVA)
    return program, path


class Answer(NamedTuple):
    """What one command led to.

    Attributes:
        text: the observation.
        score: official, 0 to 100; -100 after a failure.
        ended: whether the task is completed (a failure does not say so).
        clock: time that has passed in the world; looking takes none.
    """

    text: str
    score: int
    ended: bool
    clock: int


class Simulator:
    """One Java process with one world."""

    def __init__(self, heap_mb: int, deadline: float) -> None:
        """Start it; about two seconds.

        Args:
            heap_mb: limit on Java's heap, in MiB.
            deadline: seconds that one call may take.

        Raises:
            MissingExtraError, ConfigError: as :func:`need`.
            EnvError: it does not start.
        """
        self.heap_mb, self.deadline = heap_mb, deadline
        self._owner = os.getpid()
        self._gateway: Gateway | None = None
        self._token = ""
        program, path = need()
        options = [*JVM_OPTIONS, f"-Xmx{heap_mb}m", "-cp", _classpath(path)]
        server = ["py4j.GatewayServer", "--die-on-broken-pipe", "--enable-auth", "0"]
        self.child = Child(
            [program, *options, *server], environ=scrubbed(), cwd=tempfile.gettempdir()
        )
        _started.add(self)
        try:
            self._connect()
        except EnvError as error:
            self._fail(error)

    def _connect(self) -> None:
        port, self._token = self._greeting()
        gateway = self._gateway = Gateway(port, self._token, self.deadline)
        # Scala keeps the standard output that it finds when it is first used, so this comes first:
        # the simulator prints dozens of lines for every step.
        sink = gateway.make("java.io.FileOutputStream", os.devnull)
        buffered = gateway.make("java.io.BufferedOutputStream", sink)
        silent = gateway.make("java.io.PrintStream", buffered)
        gateway.call(Ref("z:java.lang.System"), "setOut", silent)
        self._random = gateway.member("scala.util.Random$", "MODULE$")
        self._world = gateway.make("scienceworld.runtime.pythonapi.PythonInterface")
        self._problem = 0

    def _greeting(self) -> tuple[int, str]:
        """Port and token, as the gateway server prints them."""
        end = time.monotonic() + self.deadline
        while time.monotonic() < end:
            ended = not self.child.alive
            found = _GREETING.search(self.child.last_words(2000))
            if found:
                return int(found[1]), found[2]
            if ended:
                raise EnvError("it ended at once")
            time.sleep(0.01)
        raise EnvError(f"it did not start within {self.deadline:g} s")

    @property
    def alive(self) -> bool:
        """Whether it can be used."""
        ours = self._owner == os.getpid()
        return ours and self._gateway is not None and self.child.alive

    def close(self) -> None:
        """End the process; closing twice does no harm."""
        gateway, self._gateway = self._gateway, None
        if gateway is not None:
            gateway.close()
        if self._owner == os.getpid():  # a forked process must leave its parent's alone
            self.child.stop()

    # -- the world -------------------------------------------------------------------------------

    def load(self, task: str, variation: int, simplifications: str, *, gold: bool = False) -> None:
        """Build the world of a problem, and its gold path where asked for (:meth:`gold_path`).

        Raises:
            ConfigError: there is no such task or variation.
        """
        self._problem = variation
        complaint = self._ask("load", task, variation, simplifications, gold)
        if complaint:
            raise ConfigError(complaint.removeprefix("ERROR: "), key="task.payload", value=task)

    def describe(self) -> str:
        """What is to be done."""
        return str(self._ask("getTaskDescription"))

    def step(self, command: str, number: int) -> Answer:
        """Execute a command; ``number`` counts them since the world was loaded."""
        self._seed(2 * number)
        text = self._ask("step", command)
        score, ended = self._ask("getScore"), self._ask("getCompleted")
        if score < 0 and ended:  # how the simulator says that it has crashed; a failure goes on
            self._fail(EnvError(f"the simulator crashed: {text}"))
        return Answer(text.strip(), round(100 * score), ended, self._ask("getNumMoves"))

    def admissible(self, number: int) -> list[str]:
        """All commands that the parser would accept as command ``number``, sorted."""
        self._seed(2 * number + 1)
        listed = json.loads(self._ask("getValidActionObjectCombinationsJSON"))
        return sorted({item["action"] for item in listed["validActions"]})

    def gold_path(self) -> tuple[str, ...]:
        """The commands of the gold path, computed by the last :meth:`load`."""
        path = self._ask("getGoldActionSequence")
        text = self._call(Ref("z:java.lang.String"), "join", "\n", path)
        self._use(lambda gateway: gateway.forget(path))
        return tuple(text.split("\n")) if text else ()

    def variations(self, task: str) -> int:
        """Number of variations of ``task``."""
        return int(self._ask("getTaskMaxVariations", task))

    def _seed(self, draw: int) -> None:
        mixed = (self._problem * 1_000_003 + draw + 1) * 0x9E3779B97F4A7C15
        self._call(self._random, "setSeed", Long(mixed % _RANDOM_BITS))

    def _ask(self, method: str, *arguments: Any) -> Any:
        return self._call(self._world, method, *arguments)

    def _call(self, target: Ref, method: str, *arguments: Any) -> Any:
        return self._use(lambda gateway: gateway.call(target, method, *arguments))

    def _use(self, exchange: Callable[[Gateway], Any]) -> Any:
        if self._gateway is None:
            raise EnvError("the simulator has ended; reset the environment")
        try:
            return exchange(self._gateway)
        except EnvError as error:
            self._fail(error)
        except BaseException:  # interrupted between question and answer: what comes next is lost
            self.close()
            raise

    def _fail(self, error: EnvError) -> NoReturn:
        """Close, and say why."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.process.wait(0.2)  # a dying process may still have something to say
        status = self.child.process.poll()
        words = self.child.last_words().replace(self._token or "\0", "")
        self.close()
        how = "" if status is None else f"; it ended with status {status}"
        quoted = f" ({' '.join(words.split())})" if words else ""
        if "OutOfMemoryError" in words:
            quoted += f"; raise heap_mb, which is {self.heap_mb}"
        raise EnvError(f"ScienceWorld's Java process failed: {error}{how}{quoted}") from error


def _classpath(path: Path) -> str:
    from py4j.java_gateway import find_jar_path

    return os.pathsep.join([os.path.abspath(find_jar_path()), str(path)])


_started: weakref.WeakSet[Simulator] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    for simulator in list(_started):
        simulator.close()
