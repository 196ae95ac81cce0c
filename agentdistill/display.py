"""What a person sees: progress while a run goes on, tables at its end.

Invariants: on a terminal progress is live and tables are drawn; elsewhere progress is one line at
the start and one at the end of a stage, and tables are Markdown, so that a log can be searched.
What was not measured is shown as a dash, never as zero. rich is imported when something is drawn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from agentdistill.callbacks import Callback
from agentdistill.config import RunConfig, StageConfig
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
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from agentdistill.evaluation import Result
    from agentdistill.recipe import Outcome

EVALUATION = "evaluation"

__all__ = [
    "COLUMNS", "NOTHING", "Bars", "Progress", "Row", "columns", "detail", "labels", "markdown",
    "money", "notes", "percent", "progress", "results", "rows", "save", "show",
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


# -- progress --------------------------------------------------------------------------------------


class Progress(Callback):
    """What a run is doing; a context manager, because a live display must be taken down."""

    def __init__(self, stream: TextIO, stages: Iterable[str], evaluation: bool) -> None:
        """``stages`` will run, and after the last of them perhaps the ``evaluation``."""
        self.stream, self.left, self.evaluation = stream, set(stages), evaluation

    def __enter__(self) -> Progress:
        """Nothing to put up."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing to take down."""

    def say(self, line: str) -> None:
        """One line, at once."""
        print(line, file=self.stream, flush=True)

    def ended(self, stage: StageConfig) -> bool:
        """Note the end of ``stage``; whether only the evaluation is left now."""
        self.left.discard(stage.name)
        return self.evaluation and not self.left

    def on_stage_start(self, stage: StageConfig, folder: Path, iteration: int) -> None:
        """One line."""
        self.say(
            f"{stage.name}: " + (f"goes on at iteration {iteration}" if iteration else "start")
        )

    def on_stage_end(self, stage: StageConfig, summary: Mapping[str, Any]) -> None:
        """One line; after the last stage another one."""
        self.say(f"{stage.name}: done, {_summary(summary)}")
        if self.ended(stage):
            self.say(f"{EVALUATION}: start")


class Bars(Progress):
    """One live line per stage."""

    def __init__(self, stream: TextIO, stages: Iterable[str], evaluation: bool) -> None:
        """Nothing is drawn before the first stage starts."""
        super().__init__(stream, stages, evaluation)
        self._bars: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the display down; its last state stays on the screen."""
        if self._bars is not None:
            if error is None and EVALUATION in self._tasks:
                self._bars.update(self._tasks[EVALUATION], total=1.0, completed=1.0)
            self._bars.stop()

    def on_stage_start(self, stage: StageConfig, folder: Path, iteration: int) -> None:
        """A line; the first one starts the display."""
        note = f"goes on at iteration {iteration}" if iteration else ""
        self._tasks[stage.name] = self._display().add_task(stage.name, total=1.0, detail=note)

    def on_iteration(
        self, stage: StageConfig, iteration: int, metrics: Mapping[str, Any], progress: float
    ) -> None:
        """The bar moves."""
        note = detail(iteration, metrics)
        self._display().update(self._tasks[stage.name], completed=progress, detail=note)

    def on_stage_end(self, stage: StageConfig, summary: Mapping[str, Any]) -> None:
        """The bar is full; after the last stage comes a line for the evaluation."""
        bars = self._display()
        bars.update(self._tasks[stage.name], completed=1.0, detail=_summary(summary))
        bars.stop_task(self._tasks[stage.name])
        if self.ended(stage):
            self._tasks[EVALUATION] = bars.add_task(EVALUATION, total=None, detail="")

    def _display(self) -> RichProgress:
        """Started late: its thread must not exist when stages are forked into processes."""
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            self._bars = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TimeElapsedColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                console=Console(file=self.stream),
                refresh_per_second=4,
            )
            self._bars.start()
        return self._bars


def progress(stages: Iterable[str], *, evaluation: bool = False, stderr: bool = False) -> Progress:
    """Live bars on a terminal, lines elsewhere.

    Args:
        stages: names of those that will run.
        evaluation: whether one follows the last of them.
        stderr: leave standard output alone.
    """
    stream = sys.stderr if stderr else sys.stdout
    return (Bars if stream.isatty() else Progress)(stream, stages, evaluation)


def detail(iteration: int, metrics: Mapping[str, Any]) -> str:
    """The numbers of one iteration that are worth watching, where there are any."""
    parts = [f"iteration {iteration + 1}"]
    parts += [
        f"{key} {metrics[key]:.0%}"
        for key in ("success", "optimal")
        if metrics.get(key) is not None
    ]
    loss = next((key for key in metrics if key.startswith("loss/")), None)
    numbers = {"loss": metrics.get(loss or ""), "divergence": metrics.get("divergence")}
    parts += [f"{key} {value:.3f}" for key, value in numbers.items() if value is not None]
    return ", ".join(parts)


def _summary(summary: Mapping[str, Any]) -> str:
    counts = {
        "iterations": "iterations",
        "env_steps": "environment steps",
        "episodes": "episodes",
    }
    parts = [f"{summary[key]:,} {words}" for key, words in counts.items() if summary.get(key)]
    return ", ".join([*parts, f"{summary['seconds']:.1f} s"])
