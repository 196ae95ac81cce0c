"""The command line: reads arguments, calls the functions of the Python interface, shows results.

Invariants: with ``--json`` standard output holds one JSON document and nothing else; an error that
a user can cause is one line on standard error and the exit code of its class; any other exception
is a bug and shows its traceback. Nothing but typer is imported before a verb runs.
"""

import os
import sys

from agentdistill.cli import (
    compare,
    cost,
    data,
    diagnose,
    importing,
    lists,
    panels,
    plan,
    probe,
    report,
    runs,
    serving,
    setup,
    tune,
)
from agentdistill.cli.base import app

__all__ = [
    "app", "compare", "cost", "data", "diagnose", "importing", "lists", "main", "panels", "plan",
    "probe", "report", "runs", "serving", "setup", "tune",
]  # fmt: skip


def main() -> None:
    """Entry point of the command ``agentdistill``.

    The current folder can be imported from, for environments of one's own (``module:Class``); it
    comes last, so that it never shadows what is installed.
    """
    sys.path.append(os.getcwd())
    app()
