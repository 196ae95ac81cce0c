"""A package in a virtual environment of its own, because it cannot share ours.

Invariants: it is never imported here. The file ``ready.json`` is written last: a folder without it
is half made, and made again by the next :meth:`Apart.setup`; with it, ``setup`` changes nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentdistill.errors import AgentDistillError, ConfigError
from agentdistill.files import locked, refusing, write_text

_OFFLINE = (
    "Temporary failure in name resolution",
    "Failed to establish a new connection",
    "Network is unreachable",
    "ProxyError",
    "ConnectTimeoutError",
    "nodename nor servname",
)
_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do with the new interpreter.

    Attributes:
        what: it is, where it fails.
        arguments: of the interpreter.
        said: what a person is told beforehand; "" for nothing.
    """

    what: str
    arguments: Sequence[str]
    said: str = ""


@dataclass(frozen=True, slots=True)
class Apart:
    """See the module docstring.

    Attributes:
        package: as the package index calls it.
        version: the release that this library was written and tested for.
        home: where it is by default.
        steps: after the environment was made.
        error: what a step that fails is.
        environ: of the steps, by folder.
    """

    package: str
    version: str
    home: Callable[[], Path]
    steps: Sequence[Step]
    error: type[AgentDistillError]
    environ: Callable[[Path], Mapping[str, str]] = field(default=lambda place: {})

    @property
    def requirement(self) -> str:
        """As pip wants it."""
        return f"{self.package}=={self.version}"

    def python(self, place: Path | None = None) -> Path | None:
        """The finished environment's interpreter; None where :meth:`setup` has yet to run."""
        place = place or self.home()
        found = place / "venv" / "bin" / "python"
        return found if self.installed(place) and found.exists() else None

    def installed(self, place: Path | None = None) -> str:
        """Which release is installed; "" where it is none, or another one."""
        try:
            found = json.loads(((place or self.home()) / "ready.json").read_text())
        except (OSError, ValueError):
            return ""
        ours = isinstance(found, dict) and found.get(self.package) == self.version
        return self.version if ours else ""

    def setup(
        self,
        interpreter: str | None = None,
        place: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> dict[str, Any]:
        """Make the environment; nothing where that is done, afresh where it was interrupted.

        Args:
            interpreter: Python 3.11 or newer that it is made with; ours by default.
            place: the folder; :attr:`home` by default.
            say: is told what happens, a line each.

        Returns:
            ``home``, ``python``, the version under the package's name, ``seconds``, and ``made``:
            False where everything was there.

        Raises:
            ConfigError: no such interpreter.
            AgentDistillError: a step failed (:attr:`error`); its last lines are in the message.
            StoreError: the folder cannot be written, or another process is at it.
        """
        place = (place or self.home()).expanduser().absolute()
        begun, made = time.monotonic(), False
        with refusing(place):
            place.mkdir(parents=True, exist_ok=True)
            with locked(place / "lock"):
                if self.python(place) is None:
                    self._make(_program(interpreter), place, say)
                    made = True
        facts = {"home": str(place), "python": str(self.python(place)), self.package: self.version}
        return {**facts, "made": made, "seconds": round(time.monotonic() - begun, 1)}

    def _make(self, interpreter: str, place: Path, say: Callable[[str], None]) -> None:
        venv = place / "venv"
        (place / "ready.json").unlink(missing_ok=True)
        shutil.rmtree(venv, ignore_errors=True)
        told = [f"making {venv}", *(step.said for step in self.steps if step.said)]
        lines = iter(f"{number}/{len(told)} {line}" for number, line in enumerate(told, 1))
        say(next(lines))
        self._run("making the virtual environment", [interpreter, "-m", "venv", str(venv)], place)
        for step in self.steps:
            if step.said:
                say(next(lines))
            self._run(step.what, [str(venv / "bin" / "python"), *step.arguments], place)
        ready = {self.package: self.version, "by": interpreter}
        write_text(place / "ready.json", json.dumps(ready))

    def _run(self, what: str, command: Sequence[str], place: Path) -> None:
        environ = {name: value for name, value in os.environ.items() if name not in _OURS}
        try:
            done = subprocess.run(
                command,
                env={**environ, **self.environ(place)},
                cwd=place,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
            )
        except OSError as error:
            raise self.error(f"{what}: cannot start {command[0]}: {error.strerror}") from error
        if done.returncode != 0:
            offline = any(sign in done.stdout for sign in _OFFLINE)
            reason = "no network, or no package index there" if offline else "failed"
            said = f"{what}: {reason}; the same command starts again: {_last(done.stdout)}"
            raise self.error(said)


def pip(*arguments: str) -> list[str]:
    """Arguments of an interpreter that let pip do something."""
    return ["-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]


def _program(given: str | None) -> str:
    found = shutil.which(given or sys.executable)
    if found is None:
        remedy = "no such program; name a Python 3.11 or newer"
        raise ConfigError(remedy, key="python", value=given)
    return found


def _last(output: str, lines: int = 6) -> str:
    """The last ``lines`` lines that say something, on one line."""
    kept = [line.strip() for line in output.splitlines() if line.strip()][-lines:]
    return " | ".join(kept)[-600:] or "it printed nothing"
