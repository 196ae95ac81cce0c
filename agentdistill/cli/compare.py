"""Verbs about results on record: compare two sides, reproduce a file."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from agentdistill.cli.base import Json, app, document

if TYPE_CHECKING:
    from agentdistill.comparison import Comparison, Side
    from agentdistill.metrics import Interval


class Mode(StrEnum):
    """How a model plays."""

    sampled = "sampled"
    greedy = "greedy"


Chosen = Annotated[
    Mode | None, typer.Option(help="Default: sampled for compare, all for reproduce.")
]
SIDE = "Run folder or results file, several with commas, or a folder of run folders."


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help=SIDE)],
    second: Annotated[
        str | None, typer.Argument(metavar="[B]", help="The same. Default: A, with two policies.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Whose results; give it twice where B's has another name."),
    ] = None,
    mode: Chosen = None,
    as_json: Json = False,
) -> None:
    """Compare two policies, or with replicates two methods, on the same tasks."""
    from agentdistill import comparison, display

    sides = [None if text is None else text.split(",") for text in (first, second)]
    found = comparison.compare(sides[0] or [], sides[1], policy, mode)
    if as_json:
        document(found.to_json())
        return
    columns = ("side", "runs", "success", "episodes", "faults", "with the faults")
    lines = [
        _line(f"{name}: {side.policy} ({side.mode})", side)
        for name, side in (("A", found.first), ("B", found.second))
    ]
    display.show(columns, lines)
    print(_difference(found))
    for note in found.notes:
        print(f"{note[0].upper()}{note[1:]}.")


def _line(name: str, side: Side) -> list[str]:
    from agentdistill import display

    low, high = side.bounds
    spread = f" ({min(side.success):.0%} to {max(side.success):.0%})" if len(side.runs) > 1 else ""
    return [
        name,
        str(len(side.runs)),
        display.percent(side.mean) + spread,
        f"{side.episodes:,}",
        str(side.faults),
        f"{low:.1%} to {high:.1%}" if side.faults else display.NOTHING,
    ]


def _difference(found: Comparison) -> str:
    """The result in a line or two, in percentage points."""
    over = f"{found.tasks} tasks" if found.about == "policies" else "replicates"
    said = f"A - B: {100 * found.difference:+.1f} points"
    if found.interval is not None:
        said += f", 95% over {over}: {_points(found.interval)}"
    if found.bootstrap is not None:
        said += f" (bootstrap {_points(found.bootstrap)})"
    if found.p is not None:
        said += f"; p = {found.p:.3g} ({found.test})"
    if found.first.faults + found.second.faults:
        said += f"\nWhatever the episodes lost to faults had done: {_points(found.bounds)}."
    return said


def _points(interval: Interval) -> str:
    return f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"


@app.command()
def reproduce(
    result: Annotated[
        str, typer.Argument(metavar="RESULT", help="results.json, its run folder, or eval's file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Places here, as env.options.data=games."),
    ] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable.")] = None,
    mode: Chosen = None,
    as_json: Json = False,
) -> None:
    """Play results again; exit with 1 where one is off by more than two standard errors."""
    from agentdistill import display, reproduction

    found = reproduction.reproduce(result, policy, mode, overrides or ())
    good = all(each.status != "outside" for each in found)
    if as_json:
        document({"ok": good, "results": [each.to_json() for each in found]})
    else:
        columns = ("policy", "mode", "verdict", "on record", "now", "two standard errors")
        lines = [
            [
                each.policy,
                each.mode,
                each.status,
                display.percent(each.known),
                display.percent(each.found),
                display.percent(each.tolerance),
            ]
            for each in found
        ]
        display.show(columns, lines, left=3)
    if not good:
        raise typer.Exit(1)
