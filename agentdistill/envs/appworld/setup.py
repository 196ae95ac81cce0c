"""AppWorld's own virtual environment: where it is, and how it is made; about 230 MB.

Invariants: AppWorld pins packages that ours cannot live with (pydantic 1.10), so it is installed
apart (:mod:`agentdistill.apart`). What `appworld install` unpacks stays inside that folder: it may
be passed on encrypted only.
"""

from __future__ import annotations

import os
from pathlib import Path

from agentdistill.apart import Apart, Step, pip
from agentdistill.envs.sources import cache
from agentdistill.errors import EnvError

VERSION = "0.1.3.post1"
"""The release of the package ``appworld`` that this adapter was written and tested for."""

REMEDY = "run `agentdistill setup appworld`"

_IMPORT = "import appworld.environment, appworld.apps.supervisor.apis"


def home() -> Path:
    """Where the virtual environment is: ``$AGENTDISTILL_HOME/appworld`` or below ``~/.cache``."""
    return cache() / "appworld"


def root() -> Path:
    """AppWorld's root, the folder above ``data``: ``$APPWORLD_ROOT`` or ``home()/root``."""
    given = os.environ.get("APPWORLD_ROOT")
    return Path(given).expanduser() if given else home() / "root"


APART = Apart(
    "appworld",
    VERSION,
    home,
    (
        Step(
            f"pip install appworld=={VERSION}",
            pip("install", f"appworld=={VERSION}"),
            f"installing appworld=={VERSION} (a minute or two)",
        ),
        Step("appworld install", ["-m", "appworld.cli", "install"], "unpacking its apps"),
        Step("importing appworld", ["-c", _IMPORT], "trying it"),
    ),
    EnvError,
    lambda place: {"APPWORLD_ROOT": str(place), "APPWORLD_CACHE": str(place / "cache")},
)

python, version, setup = APART.python, APART.installed, APART.setup
