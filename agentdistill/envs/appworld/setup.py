"""AppWorld's own virtual environment: where it is, and how it is made.

Invariants
----------
* AppWorld pins packages that ours cannot live with (pydantic 1.10): it is installed apart and never
  imported here.
* The file ``ready.json`` is written last. A folder without it is half made, and made again by the
  next :func:`setup`; with it, :func:`setup` changes nothing.
* What `appworld install` unpacks stays inside that folder: it may be passed on encrypted only.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from agentdistill.envs.sources import cache
from agentdistill.errors import ConfigError, EnvError
from agentdistill.files import locked, refusing, write_text

VERSION = "0.1.3.post1"
"""The release of the package ``appworld`` that this adapter was written and tested for."""

REMEDY = "run `agentdistill setup appworld`"

_IMPORT = "import appworld.environment, appworld.apps.supervisor.apis"
_OFFLINE = (
    "Temporary failure in name resolution",
    "Failed to establish a new connection",
    "Network is unreachable",
    "ProxyError",
    "ConnectTimeoutError",
    "nodename nor servname",
)
_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


def home() -> Path:
    """Where the virtual environment is: ``$AGENTDISTILL_HOME/appworld`` or below ``~/.cache``."""
    return cache() / "appworld"


def root() -> Path:
    """AppWorld's root, the folder above ``data``: ``$APPWORLD_ROOT`` or ``home()/root``."""
    given = os.environ.get("APPWORLD_ROOT")
    return Path(given).expanduser() if given else home() / "root"


def python(place: Path | None = None) -> Path | None:
    """The finished virtual environment's interpreter; None where :func:`setup` has yet to run."""
    place = place or home()
    found = place / "venv" / "bin" / "python"
    return found if _ready(place) and found.exists() else None


def version(place: Path | None = None) -> str:
    """Which AppWorld is installed; "" where none is."""
    return str(_ready(place or home()).get("appworld", ""))


def _ready(place: Path) -> dict[str, Any]:
    """The content of ``ready.json``; empty where there is none of this version."""
    try:
        found = json.loads((place / "ready.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("appworld") == VERSION else {}


def setup(
    interpreter: str | None = None,
    place: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Make the virtual environment, install AppWorld and unpack its apps; about 230 MB.

    Does nothing where that is done, and starts afresh where an earlier attempt was interrupted.

    Args:
        interpreter: Python 3.11 or newer that the virtual environment is made with; ours by
            default.
        place: the folder; :func:`home` by default.
        say: is told what happens, a line each.

    Returns:
        ``home``, ``python``, ``appworld`` (the version), ``seconds``, and ``made``: False where
        everything was there.

    Raises:
        ConfigError: no such interpreter.
        EnvError: a step failed; its last lines are in the message.
        StoreError: the folder cannot be written, or another process is at it.
    """
    place = (place or home()).expanduser().absolute()
    begun, made = time.monotonic(), False
    with refusing(place):
        place.mkdir(parents=True, exist_ok=True)
        with locked(place / "lock"):
            if python(place) is None:
                _make(_interpreter(interpreter), place, say)
                made = True
    seconds = round(time.monotonic() - begun, 1)
    facts = {"home": str(place), "python": str(python(place)), "appworld": VERSION}
    return {**facts, "made": made, "seconds": seconds}


def _interpreter(given: str | None) -> str:
    found = shutil.which(given or sys.executable)
    if found is None:
        remedy = "no such program; name a Python 3.11 or newer"
        raise ConfigError(remedy, key="python", value=given)
    return found


def _make(interpreter: str, place: Path, say: Callable[[str], None]) -> None:
    venv = place / "venv"
    (place / "ready.json").unlink(missing_ok=True)
    shutil.rmtree(venv, ignore_errors=True)
    program = str(venv / "bin" / "python")
    package = f"appworld=={VERSION}"
    pip = [program, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", package]
    say(f"1/4 making {venv}")
    _step("making the virtual environment", [interpreter, "-m", "venv", str(venv)], place)
    say(f"2/4 installing {package} (a minute or two)")
    _step(f"pip install {package}", pip, place)
    say("3/4 unpacking its apps")
    _step("appworld install", [program, "-m", "appworld.cli", "install"], place)
    say("4/4 trying it")
    _step("importing appworld", [program, "-c", _IMPORT], place)
    write_text(place / "ready.json", json.dumps({"appworld": VERSION, "by": interpreter}))


def _step(what: str, command: Sequence[str], place: Path) -> None:
    """Run ``command``; EnvError with its last lines where it fails."""
    environ = {name: value for name, value in os.environ.items() if name not in _OURS}
    environ |= {"APPWORLD_ROOT": str(place), "APPWORLD_CACHE": str(place / "cache")}
    try:
        done = subprocess.run(
            command,
            env=environ,
            cwd=place,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise EnvError(f"{what}: cannot start {command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        offline = any(sign in done.stdout for sign in _OFFLINE)
        reason = "no network, or no package index there" if offline else "failed"
        raise EnvError(f"{what}: {reason}; the same command starts again: {_last(done.stdout)}")


def _last(output: str, lines: int = 6) -> str:
    """The last ``lines`` lines that say something, on one line."""
    kept = [line.strip() for line in output.splitlines() if line.strip()][-lines:]
    return " | ".join(kept)[-600:] or "it printed nothing"
