"""What a person sees at the end of a run: tables.

Invariants: on a terminal tables are drawn; elsewhere they are Markdown, so that a log can be
searched. What was not measured is shown as a dash, never as zero. rich is imported when something
is drawn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from agentdistill.config import RunConfig
from agentdistill.files import write_text
from agentdistill.standings import (
    COLUMNS,
    NOTHING,
    Row,
    columns,
    money,
    notes,
    percent,
    rows,
)

if TYPE_CHECKING:
    from agentdistill.evaluation import Result
    from agentdistill.recipe import Outcome

__all__ = [
    "COLUMNS", "NOTHING", "Row", "columns", "labels", "markdown", "money", "notes", "percent",
    "results", "rows", "save", "show",
]  # fmt: skip

# -- results ---------------------------------------------------------------------------------------


def labels(config: RunConfig) -> dict[str, str]:
    """What the policies of the quickstart are called in its table."""
    method = getattr(config.stage("distilled"), "method", "")
    return {
        "expert": "solver",
        "taught": "teacher",
        "before": "student, before",
        "offpolicy": "student, off-policy",
        "distilled": f"student, distilled ({method})",
    }


def save(
    outcome: Outcome, config: RunConfig, seconds: float, labels: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write results.json and results.md into the run's folder; return the former.

    The files of a run that was complete before stay as they are: they tell what it took.

    Args:
        outcome: of the run.
        config: of the run.
        seconds: wall time of the call that completed the run.
        labels: names of policies for readers.
    """
    table = rows(outcome.results, outcome.stages, labels)
    machine = json.loads((outcome.path / "machine.json").read_text())
    values = {
        "name": config.name,
        "seconds": round(seconds, 3),
        "commit": machine["commit"],
        "machine": machine,
        "rows": [asdict(row) for row in table],
        **{k: v for k, v in outcome.to_json().items() if k != "path"},
    }
    file = outcome.path / "results.json"
    if file.exists():
        known = json.loads(file.read_text())
        if known["results"] == json.loads(json.dumps(values["results"])):
            return dict(known)
    write_text(file, json.dumps(values, indent=1))
    write_text(outcome.path / "results.md", _report(table, outcome.results, config, values))
    return values


def _report(
    table: Sequence[Row], results: Sequence[Result], config: RunConfig, values: Mapping[str, Any]
) -> str:
    machine = values["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    facts = (
        f"Commit {machine['commit']}, seed {config.seed}, {values['seconds']:.0f} s on "
        f"{machine['cores']} cores ({machine['cpu']}, {machine['system']}); "
        f"Python {machine['python']}, {versions}."
    )
    head = columns(table)
    lines = [row.cells(head) for row in table]
    body = [markdown(head, lines), *notes(table, results, config), facts]
    return "\n\n".join([f"# {config.name}", *body]) + "\n"


# -- tables ----------------------------------------------------------------------------------------


def results(table: Sequence[Row]) -> None:
    """Print the rows of results."""
    head = columns(table)
    show(head, [row.cells(head) for row in table])


def show(columns: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print a table: drawn on a terminal, Markdown elsewhere.

    Args:
        columns: headers.
        lines: cells as text.
        left: how many columns, from the first, are words; the others are aligned to the right.
    """
    if not sys.stdout.isatty():
        print(markdown(columns, lines, left))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < left else "right")
    for line in lines:
        table.add_row(*map(Text, line))
    Console().print(table)


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """The same table as aligned Markdown."""
    grid = [list(columns), *([cell.replace("|", "\\|") for cell in line] for line in lines)]
    widths = [max(3, *(len(line[place]) for line in grid)) for place in range(len(columns))]

    def write(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = [
        "-" * width if place < left else "-" * (width - 1) + ":"
        for place, width in enumerate(widths)
    ]
    return "\n".join([write(grid[0]), write(rule), *(write(line) for line in grid[1:])])
