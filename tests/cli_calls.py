"""What the tests of the command line share: a micro recipe, and ways to call the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from agentdistill.cli import app

ROOT = Path(__file__).resolve().parents[1]
ENV: dict[str, Any] = {
    "id": "agentdistill/Sokoban-v0",
    "options": {"height": 6, "width": 6, "max_moves": 5, "max_steps": 6},
}
ROOM = [f"--option={key}={value}" for key, value in ENV["options"].items()]
TINY = {"hidden": 16, "heads": 2, "layers": 1, "tokenizer": {"vocabulary": 300, "episodes": 20}}
RECIPE: dict[str, Any] = {
    "name": "micro",
    "env": ENV,
    "prompt": "bare",
    "sampling": {"max_tokens": 2},
    "models": {"teacher": TINY, "student": TINY},
    "stages": [
        {"name": "demos", "do": "collect", "policy": "expert", "episodes": 24, "batch": 16},
        {"name": "taught", "model": "teacher", "method": "sft", "data": "demos", "iterations": 6},
        {"name": "distilled", "teacher": "taught", "method": "opd", "iterations": 3, "tasks": 4},
        {"name": "later", "teacher": "taught", "method": "opd-exact", "iterations": 1, "tasks": 2},
    ],
    "evaluate": {"policies": ["expert", "taught", "distilled"], "tasks": 6},
}


def call(*args: str) -> Result:
    """The command in this process; a bug raises here."""
    result = CliRunner().invoke(app, args)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def answer(*args: str) -> Any:
    """The JSON document of a command that must succeed."""
    result = call(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(code: int, *args: str) -> str:
    """The one line that a command prints which must fail with ``code``."""
    result = call(*args)
    assert (result.exit_code, result.stdout) == (code, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def python(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """The interpreter with ``args``, from the repository."""
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        timeout=120,
        **{"cwd": ROOT, **more},
    )
