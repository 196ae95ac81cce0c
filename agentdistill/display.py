"""What a person sees: progress while a run goes on, tables at its end.

Invariants: on a terminal progress is live and tables are drawn; elsewhere progress is one line at
the start and one at the end of a stage, and tables are Markdown, so that a log can be searched.
What was not measured is shown as a dash, never as zero. rich is imported when something is drawn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from agentdistill.callbacks import Says
from agentdistill.config import RunConfig, StageConfig
from agentdistill.files import write_text

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from agentdistill.evaluation import Result
    from agentdistill.recipe import Outcome

EVALUATION = "evaluation"
NOTHING = "–"  # noqa: RUF001  (a dash, as in printed tables)

MEASURES = ("success (95%)", "greedy", "optimal", "turns", "invalid", "env steps", "seconds")
COLUMNS = ("policy", *MEASURES)

# -- results ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One policy with its modes side by side; None where nothing was measured.

    Attributes:
        policy: its name.
        label: what a reader sees.
        success: rate of the sampled episodes (of the only ones, for a policy without modes).
        low: lower bound of its 95% interval.
        high: upper bound.
        greedy: rate of the greedy episodes.
        optimal: share of optimal actions.
        turns: mean turns of an episode.
        invalid: share of turns that could not be read or were not valid.
        faults: episodes lost to faults, in no rate.
        env_steps: steps that its stage took in the environment.
        seconds: wall time of its stage.
    """

    policy: str
    label: str
    success: float | None
    low: float | None
    high: float | None
    greedy: float | None
    optimal: float | None
    turns: float | None
    invalid: float | None
    faults: int
    env_steps: int | None
    seconds: float | None

    def cells(self) -> list[str]:
        """As text, in the order of :data:`COLUMNS`."""
        return [
            self.label,
            _interval(self.success, self.low, self.high),
            percent(self.greedy),
            percent(self.optimal),
            NOTHING if self.turns is None else f"{self.turns:.1f}",
            percent(self.invalid),
            NOTHING if self.env_steps is None else f"{self.env_steps:,}",
            NOTHING if self.seconds is None else f"{self.seconds:.1f}",
        ]


def percent(rate: float | None) -> str:
    """A rate for people."""
    return NOTHING if rate is None else f"{rate:.1%}"


def _interval(rate: float | None, low: float | None, high: float | None) -> str:
    bounds = "" if low is None or high is None else f" ({100 * low:.0f} to {100 * high:.0f})"
    return percent(rate) + bounds


def rows(
    results: Sequence[Result],
    stages: Mapping[str, Mapping[str, Any]] | None = None,
    labels: Mapping[str, str] | None = None,
) -> list[Row]:
    """One row per policy, in the order of ``results``.

    Success, optimal, turns and invalid are of the sampled episodes where there are some. What is
    measured without a single sound episode is no measurement.
    """
    by_policy: dict[str, dict[str, Result]] = {}
    for result in results:
        by_policy.setdefault(result.policy, {})[result.mode] = result
    return [
        _row(name, modes, (stages or {}).get(name, {}), (labels or {}).get(name, name))
        for name, modes in by_policy.items()
    ]


def _row(name: str, modes: Mapping[str, Result], stage: Mapping[str, Any], label: str) -> Row:
    greedy = _sound(modes.get("greedy"))
    sampled = _sound(modes.get("sampled") or modes.get("-"))
    behaviour = sampled or greedy
    return Row(
        policy=name,
        label=label,
        success=sampled.success if sampled else None,
        low=sampled.interval.low if sampled else None,
        high=sampled.interval.high if sampled else None,
        greedy=greedy.success if greedy else None,
        optimal=behaviour.optimal if behaviour else None,
        turns=behaviour.turns if behaviour else None,
        invalid=behaviour.invalid if behaviour else None,
        faults=sum(result.faults for result in modes.values()),
        env_steps=stage.get("env_steps"),
        seconds=stage.get("seconds"),
    )


def _sound(result: Result | None) -> Result | None:
    return result if result and result.episodes else None


def notes(table: Sequence[Row], results: Sequence[Result], config: RunConfig) -> list[str]:
    """What a reader of the table has to know."""
    said = [result.setting.get("panel", {}) for result in results]
    named = zip(said, results, strict=True)
    panels = ", ".join(sorted({f"{p.get('name', '')} {r.panel[:12]}".strip() for p, r in named}))
    split = said[0].get("split", config.evaluate.split)
    found = [
        f"{len(results[0].keys)} tasks of split {split} of {config.env.id} (panel {panels}). "
        "success: sampled episodes with their 95% Wilson interval; greedy: the likeliest token; "
        "optimal, turns and invalid as sampled, where sampled."
    ]
    faults = sum(row.faults for row in table)
    if faults:
        found.append(f"{faults} episodes were lost to faults and are in no rate.")
    if apart := {line for panel in said for line in panel.get("deviations", ())}:
        found.append(f"Not as the panel says: {'; '.join(sorted(apart))}.")
    return found


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
    lines = [row.cells() for row in table]
    body = [markdown(COLUMNS, lines), *notes(table, results, config), facts]
    return "\n\n".join([f"# {config.name}", *body]) + "\n"


# -- tables ----------------------------------------------------------------------------------------


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


class Progress(Says):
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
