"""On what, and by what, numbers came about: versions, commit, machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import agentdistill


def machine() -> dict[str, Any]:
    """Versions of what numbers depend on, the commit of this checkout, and the machine."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {"agentdistill": agentdistill.__version__}
    for name in ("torch", "transformers", "tokenizers", "numpy", "gymnasium"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return {
        "versions": versions,
        "commit": _commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }


def _commit() -> str:
    """The commit of the checkout this code runs from; "" for an installed package."""
    import subprocess

    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
