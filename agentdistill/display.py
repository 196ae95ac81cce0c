"""What a person sees at the end of a run: tables.

Invariants: on a terminal tables are drawn; elsewhere they are Markdown, so that a log can be
searched. What was not measured is shown as a dash, never as zero. rich is imported when something
is drawn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from agentdistill.config import RunConfig
from agentdistill.files import write_text

if TYPE_CHECKING:
    from agentdistill.evaluation import Result
    from agentdistill.recipe import Outcome

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
