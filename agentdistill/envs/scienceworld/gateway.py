"""Calling Java objects over a socket: the little of Py4J's text protocol that a simulator needs.

Written here because Py4J's own client cannot give up on a call: a simulator that hangs would hang
its rollout for ever.

Invariants
----------
* A command is lines that end with "e"; an answer is one line: ``!y``, a letter for the type, a
  value. Line ends and backslashes inside a value are escaped.
* One command at a time: the server answers in small packets, and several that are on their way at
  once wait 40 ms for each other (Nagle's algorithm and delayed acknowledgements).
* After an EnvError it is unknown what the next answer belongs to: close it.
"""

from __future__ import annotations

import re
import socket
from typing import Any, NamedTuple

from agentdistill.errors import EnvError

LOCALHOST = "127.0.0.1"


class Ref(NamedTuple):
    """An object, or with the prefix ``z:`` a class, on the Java side."""

    name: str


class Long(int):
    """A number that Java shall take as a ``long``."""


class Gateway:
    """One connection to a Py4J gateway server. Not for several threads at once."""

    def __init__(self, port: int, token: str, deadline: float) -> None:
        """Connect and show the token.

        Args:
            port: of the server, on this machine.
            token: what the server printed when it started.
            deadline: seconds that the next answer may take to arrive.

        Raises:
            EnvError: nobody answers there, or the token is wrong.
        """
        try:
            self._socket = socket.create_connection((LOCALHOST, port), timeout=deadline)
        except OSError as error:
            raise EnvError(f"no connection to the Java gateway: {error}") from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answers = self._socket.makefile("rb")
        try:
            self._exchange("A", token)
        except EnvError:
            self.close()
            raise

    def call(self, target: Ref, method: str, *arguments: Any) -> Any:
        """The result of a method.

        Raises:
            EnvError: no answer in time, a broken connection, or an exception in Java.
        """
        return self._exchange("c", target.name, method, *map(_written, arguments), "e")

    def make(self, name: str, *arguments: Any) -> Ref:
        """Construct an object of the class called ``name``."""
        return _object(self._exchange("i", name, *map(_written, arguments), "e"))

    def member(self, owner: str, name: str) -> Ref:
        """The object in the static field ``name`` of the class ``owner``."""
        return _object(self._exchange("r", "m", owner, name, "e"))

    def forget(self, reference: Ref) -> None:
        """Let Java collect an object."""
        self._exchange("m", "d", reference.name, "e")

    def close(self) -> None:
        """Hang up."""
        self._answers.close()
        self._socket.close()

    def _exchange(self, *lines: str) -> Any:
        try:
            self._socket.sendall("\n".join([*lines, ""]).encode())
            answer = self._answers.readline()
        except TimeoutError as error:
            raise EnvError(f"no answer within {self._socket.gettimeout():g} s") from error
        except (OSError, ValueError) as error:  # ValueError: it is closed
            raise EnvError("the connection broke") from error
        return _read(answer.decode(errors="replace"))


def _object(answer: Any) -> Ref:
    if not isinstance(answer, Ref):
        raise EnvError(f"Java answered {answer!r} where an object was expected")
    return answer


def _written(value: Any) -> str:
    """An argument as the protocol spells it."""
    if isinstance(value, bool):
        return f"b{str(value).lower()}"
    if isinstance(value, int):
        return f"{'L' if isinstance(value, Long) else 'i'}{value}"
    if isinstance(value, Ref):
        return f"r{value.name}"
    text = str(value).replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")
    return f"s{text}"


_ESCAPED = re.compile(r"\\(.)")
_MEANING = {"n": "\n", "r": "\r"}


def _plain(text: str) -> str:
    return _ESCAPED.sub(lambda found: _MEANING.get(found[1], found[1]), text)


def _read(line: str) -> Any:
    """The value of an answer."""
    if not line.endswith("\n"):
        raise EnvError("the connection broke")
    line = line[:-1]
    if not line.startswith("!y"):
        words = _plain(line[3:]).strip().split("\n")[0][:300] if line[2:3] == "s" else ""
        raise EnvError(f"an exception in Java: {words or 'no details'}")
    kind, value = line[2:3], line[3:]
    if kind == "s":
        return _plain(value)
    if kind in ("i", "L"):
        return int(value)
    if kind == "d":
        return float(value)
    if kind == "b":
        return value == "true"
    return None if kind in ("", "n", "v") else Ref(value)
