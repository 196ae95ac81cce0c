"""The verb that shows what a run paid: cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentdistill.cli.base import Json, app, document

if TYPE_CHECKING:
    from decimal import Decimal

    from agentdistill.spending import Sum

TOKENS = ("input", "cache read", "cache write", "output")
COLUMNS = (
    "role", "model", "calls", "failed", "retries", *TOKENS,
    "money", "median s", "95% s", "waited s",
)  # fmt: skip


@app.command()
def cost(
    run: Annotated[Path, typer.Argument(help="Folder of a run that called a provider.")],
    as_json: Json = False,
) -> None:
    """Show what a run paid by role and model: calls, tokens, money, latency, failures."""
    from agentdistill.spending import read, sums

    groups, whole = sums(read(run))
    if as_json:
        document({"by": [each.to_json() for each in groups], "all": whole.to_json()})
        return
    from agentdistill.display import show

    lines = [_cells(each, each.role, each.model) for each in groups]
    show(COLUMNS, [*lines, _cells(whole, "all", "")], left=2)
    for note in _notes(groups, whole):
        print(note)


def _cells(each: Sum, role: str, model: str) -> list[str]:
    from agentdistill.display import NOTHING

    latency = each.latency()
    seconds = [NOTHING] * 2 if latency is None else [f"{value:.2f}" for value in latency]
    counts = (each.calls, each.failures, each.retries, *astuple(each.usage))
    return [role, model, *(f"{n:,}" for n in counts), _money(each), *seconds, f"{each.waited:.1f}"]


def _money(each: Sum) -> str:
    """What nobody priced is never shown as 0."""
    if not each.unpriced:
        return _amount(each.money)
    return f"{_amount(each.money)} + unpriced" if each.money else "unpriced"


def _amount(value: Decimal) -> str:
    """To a hundredth of a cent, and what is smaller to three digits: it must not look like 0."""
    digits = max(4, 2 - value.adjusted()) if value else 4
    return f"{value:.{digits}f}"


def _notes(groups: list[Sum], whole: Sum) -> Iterator[str]:
    """What else a reader has to know."""
    for source in sorted(whole.prices):
        models = sorted({each.model for each in groups if source in each.prices})
        yield f"Prices from {source}: {', '.join(models)}."
    if whole.unpriced:
        models = sorted({each.model for each in groups if each.unpriced})
        yield f"Unpriced, in no sum: {', '.join(models)} (calls: {whole.unpriced:,})."
    if whole.failed_money:
        yield (
            f"{_amount(whole.failed_money)} of it is for calls that failed; one whose answer was "
            "lost counts with the most that it can have cost."
        )
    if whole.over:
        yield f"Calls that used more than they had reserved: {whole.over:,}."
