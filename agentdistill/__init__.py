"""agentdistill: distil LLM tool-use agents.

Environment, teacher, student, method and inference policy are independent choices. Importing this
package is cheap (no torch); what is heavy loads when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentdistill.api import collect, compare, diagnose, distill, evaluate, reproduce, train
    from agentdistill.callbacks import Callback
    from agentdistill.config import RunConfig, load

__version__ = "0.1.0.dev0"

__all__ = [
    "Callback",
    "RunConfig",
    "collect",
    "compare",
    "diagnose",
    "distill",
    "evaluate",
    "load",
    "reproduce",
    "train",
]

_PLACES = {
    "collect": "agentdistill.api",
    "compare": "agentdistill.api",
    "diagnose": "agentdistill.api",
    "distill": "agentdistill.api",
    "evaluate": "agentdistill.api",
    "reproduce": "agentdistill.api",
    "train": "agentdistill.api",
    "Callback": "agentdistill.callbacks",
    "RunConfig": "agentdistill.config",
    "load": "agentdistill.config",
}


def __getattr__(name: str) -> Any:
    """Load the public names when they are first used."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    """What there is to use."""
    return [*__all__, "__version__"]
