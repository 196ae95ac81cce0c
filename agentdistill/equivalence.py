"""When two answers ask for the same: their text, their tool calls, their code.

Each function gives what equal answers have in common, as text. Invariants: none of them raises,
whatever a model wrote; what cannot be read as code is equal to the same text only.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from agentdistill.actions import read_call


def text(action: str) -> str:
    """The very text."""
    return action


def code(action: str) -> str:
    """Python without its comments and its layout; the text where it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what a model wrote
            return ast.dump(ast.parse(action))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return action


def call(given: Mapping[str, Any]) -> str | None:
    """A tool call as its name and its arguments in canonical JSON; None for one without them."""
    found = read_call(given)
    if found is None:
        return None
    name, arguments = found
    try:
        return json.dumps([name, dict(arguments)], sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError):
        return None


KINDS: dict[str, Callable[[str], str]] = {"text": text, "code": code}
"""By the name that a configuration uses; besides them ``auto``, which asks the environment."""
