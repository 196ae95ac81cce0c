"""The verb that shows a run: report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from agentdistill.cli.base import Json, app, document


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folder of a run; of several, seeds of one recipe."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="File to write. Default: report.html in the first folder.")
    ] = None,
    trajectories: Annotated[
        int, typer.Option(min=0, help="Trajectories of each stage that are shown.")
    ] = 24,
    score: Annotated[
        bool | None,
        typer.Option(
            "--score/--no-score",
            help="Ask the run's models about every token shown. Default: if they are tiny.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of trajectories.")] = 0,
    as_json: Json = False,
) -> None:
    """Write one HTML file about a run: results, curves, where time went, trajectories."""
    from agentdistill.report import report as write

    def say(line: str) -> None:
        if sys.stderr.isatty():
            print(line, file=sys.stderr)

    found = write(runs, output, trajectories=trajectories, score=score, seed=seed, say=say)
    if as_json:
        document(found.to_json())
        return
    print(
        f"{len(found.runs)} run{'s' if len(found.runs) > 1 else ''}, "
        f"{found.shown:,} of {found.trajectories:,} trajectories, {found.scored:,} scored"
    )
    print(f"report: {found.file} ({found.bytes / 1e6:.1f} MB)")
