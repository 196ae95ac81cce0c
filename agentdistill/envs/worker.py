"""An object in a process of its own, and children that cannot outlive us.

Invariants
----------
* A child ends when this process ends, however that happens (kill -9 too): its standard input is a
  leash, a pipe whose other end only we hold, and the child goes when it is cut.
* A call ends: with its result, with the error that the object raised, or with an EnvError when the
  child died or did not answer within the deadline (it is killed then, and its last words quoted).
  After that the worker is broken and says so; its owner makes a new one.
* What the child prints goes to a log of its own, never to our output.

Linux and macOS. Parent and child trust each other: objects travel as pickles.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import IO, Any, NoReturn

from agentdistill.errors import AgentDistillError, EnvError

KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "JAVA_HOME")
"""Variables that a child with a scrubbed environment still sees: no keys, no tokens."""


def scrubbed(**more: str) -> dict[str, str]:
    """Our environment variables without secrets (:data:`KEPT` only), and ``more``."""
    return {**{name: os.environ[name] for name in KEPT if name in os.environ}, **more}


class Child:
    """A program on a leash. Python programs call :func:`obey`; others must read standard input."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        environ: Mapping[str, str] | None = None,
        cwd: str | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Start ``command`` in a process group of its own.

        Args:
            command: program and arguments.
            environ: its environment variables; None gives it ours.
            cwd: its working directory.
            pass_fds: descriptors it inherits.

        Raises:
            EnvError: it cannot be started.
        """
        self.name = os.path.basename(command[0])
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed in stop)
        try:
            self.process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                env=None if environ is None else dict(environ),
                cwd=cwd,
                pass_fds=tuple(pass_fds),
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise EnvError(f"cannot start {command[0]}: {error.strerror}") from error

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def last_words(self, characters: int = 400) -> str:
        """The end of what it printed, on one line."""
        if self._log.closed:
            return ""
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), 4 * characters, max(0, size - 4 * characters))
        return " ".join(text.decode(errors="replace").split())[-characters:]

    def stop(self, grace: float = 1.0) -> None:
        """Cut the leash, wait ``grace`` seconds, then kill it with all its children."""
        leash = self.process.stdin
        if leash is not None and not leash.closed:
            leash.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()


def obey() -> None:
    """End this process when the leash is cut; called by Python children at their start."""

    def watch() -> NoReturn:
        with contextlib.suppress(OSError):
            while os.read(0, 1024):
                pass
        os._exit(0)

    threading.Thread(target=watch, name="leash", daemon=True).start()


class Worker:
    """``module:Class`` constructed in a child; its methods are called one at a time."""

    def __init__(
        self,
        target: str,
        *arguments: Any,
        deadline: float = 120.0,
        environ: Mapping[str, str] | None = None,
        **keywords: Any,
    ) -> None:
        """Start the child; the object is constructed there while we go on.

        Args:
            target: ``module:Class``, importable in the child.
            arguments: for its constructor.
            deadline: seconds that one call may take, the construction included.
            environ: environment variables of the child; None gives it ours.
            keywords: for its constructor.
        """
        self.target, self._deadline = target, deadline
        ours, theirs = socket.socketpair()
        variables = dict(os.environ if environ is None else environ)
        variables["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        command = [sys.executable, "-m", "agentdistill.envs.worker", str(theirs.fileno())]
        try:
            self.child = Child(command, environ=variables, pass_fds=[theirs.fileno()])
        except EnvError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._connection: Connection | None = Connection(ours.detach())
        self._lock = threading.Lock()
        self._waiting = 1  # for the answer to the construction
        self._send((target, arguments, keywords))

    @property
    def broken(self) -> bool:
        """Whether it must be replaced."""
        return self._connection is None or not self.child.alive

    def call(self, method: str, *arguments: Any, deadline: float | None = None) -> Any:
        """Call ``method`` of the object; see the module docstring for how it ends."""
        with self._lock:
            self._send((method, arguments))
            self._waiting += 1
            limit = self._deadline if deadline is None else deadline
            while self._waiting > 1:  # the construction's answer comes first
                self._receive(limit)
            return self._receive(limit)

    def close(self) -> None:
        """End the child."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        self.child.stop()

    def _send(self, message: Any) -> None:
        if self._connection is None:
            raise EnvError(f"the worker of {self.target} has ended")
        try:
            self._connection.send(message)
        except OSError:
            self._die("")

    def _receive(self, deadline: float) -> Any:
        connection = self._connection
        if connection is None:
            raise EnvError(f"the worker of {self.target} has ended")
        try:
            if not connection.poll(deadline):
                self._die(f"no answer within {deadline:g} s")
            good, value = connection.recv()
        except (EOFError, OSError):
            self._die("")
        self._waiting -= 1
        if good:
            return value
        raise value

    def _die(self, reason: str) -> NoReturn:
        """Close, and say why: ``reason``, or how the child ended."""
        if not reason:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.process.wait(1.0)
            reason = f"it ended with {_status(self.child.process.poll())}"
        words = self.child.last_words()
        self.close()
        raise EnvError(f"the worker of {self.target} failed: {reason}" + (words and f" ({words})"))


def _status(code: int | None) -> str:
    if code is None:
        return "a closed connection"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _portable(error: BaseException) -> AgentDistillError:
    """``error`` as something that survives the way to the parent."""
    if isinstance(error, AgentDistillError):
        return error
    return EnvError(" ".join(f"{type(error).__name__}: {error}".split()))


def serve(connection: Connection) -> None:
    """The child's life: construct the object, then answer calls until the parent has gone."""
    with contextlib.suppress(EOFError, OSError):
        target, arguments, keywords = connection.recv()
        module, _, name = target.partition(":")
        worker: Any = None
        try:
            worker = getattr(importlib.import_module(module), name)(*arguments, **keywords)
            connection.send((True, None))
        except Exception as error:
            connection.send((False, _portable(error)))
            return
        while True:
            method, arguments = connection.recv()
            try:
                answer = (True, getattr(worker, method)(*arguments))
            except Exception as error:
                answer = (False, _portable(error))
            connection.send(answer)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is the parent's business: it cuts the leash
    obey()
    serve(Connection(int(sys.argv[1])))
