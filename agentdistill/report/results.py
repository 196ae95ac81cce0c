"""The result table: one line per policy, over the seeds that have it.

Invariants: with one run a rate has its 95% Wilson interval; with several the mean of the seeds is
shown with the smallest and the largest. Episodes lost to faults are in no rate, and are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agentdistill.evaluation import Result
from agentdistill.report.read import RunData
from agentdistill.report.words import NOTHING, count, duration, percent

COLUMNS = ("policy", "success", "greedy", "optimal", "turns", "invalid", "env steps", "time")


@dataclass(frozen=True, slots=True)
class Cell:
    """What a cell says, and in small letters its spread."""

    text: str
    spread: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One policy.

    Attributes:
        policy: its name.
        method: how it was trained, "" for others.
        bar: success with its bounds, in percent; None where nothing was measured.
        cells: after the policy, in the order of :func:`columns`.
    """

    policy: str
    method: str
    bar: tuple[float, float, float] | None
    cells: tuple[Cell, ...]


def columns(runs: Sequence[RunData]) -> tuple[str, ...]:
    """:data:`COLUMNS`, and those about teachers and money where some result has them."""
    results = [result for run in runs for result in run.results]
    asked = ("teacher",) if any(result.asked is not None for result in results) else ()
    return (*COLUMNS, *asked, *(("cost",) if any(result.cost for result in results) else ()))


def result_rows(runs: Sequence[RunData]) -> list[Row]:
    """The table, in the order of the configuration."""
    names = dict.fromkeys(result.policy for run in runs for result in run.results)
    ordered = [name for name in dict.fromkeys(runs[0].config.evaluate.policies) if name in names]
    return [_row(name, runs) for name in ordered]


def _row(name: str, runs: Sequence[RunData]) -> Row:
    by_mode: dict[str, list[Result]] = {}
    for run in runs:
        for result in run.results:
            if result.policy == name and result.episodes:
                by_mode.setdefault(result.mode, []).append(result)
    greedy = by_mode.get("greedy", [])
    sampled = by_mode.get("sampled") or by_mode.get("-") or []
    behaviour = sampled or greedy
    stages = [stage for run in runs for stage in run.stages if stage.name == name and stage.done]
    done = [dict(stage.done or {}) for stage in stages]
    success = _mean([result.success for result in sampled], percent)
    bar = None
    if sampled:
        low, high = _bounds(sampled)
        mean = sum(result.success for result in sampled) / len(sampled)
        bar = (round(100 * low, 1), round(100 * mean, 1), round(100 * high, 1))
        if len(sampled) == 1:
            success = Cell(success.text, f"{100 * low:.0f} to {100 * high:.0f}")
    cells: tuple[Cell, ...] = (
        success,
        _mean([result.success for result in greedy], percent),
        _mean([r.optimal for r in behaviour if r.optimal is not None], percent),
        _mean([result.turns for result in behaviour], lambda value: f"{value:.1f}"),
        _mean([result.invalid for result in behaviour], percent),
        _mean([summary["env_steps"] for summary in done if summary.get("env_steps")], count),
        _mean([summary["seconds"] for summary in done if "seconds" in summary], duration),
    )
    more = {
        "teacher": _mean([r.asked for r in behaviour if r.asked is not None], percent),
        "cost": _mean([r.cost["paid"] for r in behaviour if r.cost], lambda value: f"{value:.3g}"),
    }
    cells += tuple(more[column] for column in columns(runs)[len(COLUMNS) :])
    method = stages[0].what if stages else ""
    return Row(name, method, bar, cells)


def _bounds(results: Sequence[Result]) -> tuple[float, float]:
    if len(results) == 1:
        return results[0].interval.low, results[0].interval.high
    rates = [result.success for result in results]
    return min(rates), max(rates)


def _mean(values: Sequence[float], words: Callable[[float], str]) -> Cell:
    if not values:
        return Cell(NOTHING)
    low, high = words(min(values)), words(max(values))
    return Cell(words(sum(values) / len(values)), "" if low == high else f"{low} to {high}")


def note(runs: Sequence[RunData], rows: Sequence[Row]) -> str:
    """What a reader of the table has to know."""
    results = [result for run in runs for result in run.results]
    if not results:
        return ""
    panels = sorted({_panel(result) for result in results})
    tasks = sorted({len(result.keys) for result in results})
    said = f"{' or '.join(map(str, tasks))} tasks (panel {', '.join(panels)}). "
    if len(runs) > 1:
        evaluated = sum(bool(run.results) for run in runs)
        said += f"Mean of {evaluated} seeds, with the smallest and the largest. "
    else:
        said += "Success of sampled episodes with its 95% Wilson interval. "
    said += "Greedy: the likeliest token. The others as sampled, where sampled."
    if "teacher" in columns(runs):
        said += " Teacher: share of the turns that the teacher of a cascade answered."
    if "cost" in columns(runs):
        said += " Cost: money per episode."
    faults = sum(result.faults for result in results)
    return said + (f" {count(faults)} episodes were lost to faults." if faults else "")


def _panel(result: Result) -> str:
    name = result.setting.get("panel", {}).get("name", "")
    return f"{name} {result.panel[:12]}".strip()
