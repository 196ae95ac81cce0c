"""What must be quick to import, and what must not bring torch along."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers")
CORE = ("errors", "records", "actions", "envs", "config", "store", "render")


def _python(*args: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def _import_seconds(module: str) -> float:
    """Seconds that the interpreter says an import of ``module`` took, its own imports included."""
    report = _python("-X", "importtime", "-c", f"import {module}").stderr
    for line in report.splitlines():
        _, cumulative, name = line.removeprefix("import time:").split("|")
        if name.strip() == module:
            return int(cumulative) / 1e6
    raise AssertionError(f"{module} is not in the report:\n{report}")


def test_package_imports_quickly() -> None:
    assert min(_import_seconds("agentdistill") for _ in range(3)) < 0.3


@pytest.mark.parametrize("name", CORE)
def test_core_brings_no_heavy_module(name: str) -> None:
    code = (
        f"import json, sys, agentdistill.{name};"
        f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    )
    assert json.loads(_python("-c", code).stdout) == []


def test_every_environment_runs_without_heavy_modules() -> None:
    """All that have what they need here; the others are constructed, and say what they lack."""
    code = f"""
import json, sys
import gymnasium
import agentdistill.envs
played, lacking = [], {{}}
for name in sorted(gymnasium.registry):
    if name.startswith("agentdistill/"):
        env = gymnasium.make(name)
        found = env.unwrapped.availability()
        if found.needs:
            lacking[name] = found.needs
        else:
            env.reset(seed=0)
            env.close()
            played.append(name)
print(json.dumps([played, lacking, [name for name in {HEAVY} if name in sys.modules]]))
"""
    played, lacking, heavy = json.loads(_python("-W", "ignore", "-c", code).stdout)
    assert "agentdistill/Sokoban-v0" in played
    assert len(played) + len(lacking) == 6
    assert all(needs and all(needs) for needs in lacking.values())
    assert heavy == []


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        text = _python("-c", "from agentdistill.cli import main; main()", "--help").stdout
        seconds.append(time.perf_counter() - start)
        assert "quickstart" in text
    assert min(seconds) < 1.5


def test_no_module_hides_a_public_name() -> None:
    """A submodule is set as an attribute of the package once it is imported."""
    import agentdistill

    folder = Path(agentdistill.__file__).parent
    assert not {p.stem for p in folder.iterdir()} & set(agentdistill.__all__)
