"""The page: everything that was read, as one HTML file.

Invariants: no request ever leaves the page (its content security policy forbids any, and scripts
other than its own); every text is escaped by the template engine; the file stays under
:data:`BYTES`, and says what it left out for that.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from agentdistill.errors import MissingExtraError
from agentdistill.report import figures
from agentdistill.report.cards import Card
from agentdistill.report.read import RunData, StageData
from agentdistill.report.results import columns, note, result_rows
from agentdistill.report.sample import Facts
from agentdistill.report.words import NOTHING, clean, clip, count, duration, seeds

if TYPE_CHECKING:
    from jinja2 import Environment

BYTES = 4_800_000
"""The size of a report at most."""


@dataclass(frozen=True, slots=True)
class Material:
    """What a page is made of.

    Attributes:
        runs: seeds of one recipe.
        facts: of each stage, one per run.
        cards: trajectories that may be shown, the first ones first.
        scored: whether tokens were scored, and why not where they were not.
        threshold: mean from which on divergence counts as high.
    """

    runs: Sequence[RunData]
    facts: dict[str, list[Facts]]
    cards: Sequence[Card]
    scored: str
    threshold: float | None


def environment() -> Environment:
    """The template engine, which escapes everything.

    Raises:
        MissingExtraError: it is not installed.
    """
    if find_spec("jinja2") is None:
        raise MissingExtraError("a report", "report")
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("agentdistill.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: Any) -> Any:
    """What a template writes for ``value``: texts made safe to look at, then escaped."""
    return clean(value) if type(value) is str else value


def render(material: Material) -> tuple[str, int]:
    """The page, and how many trajectories it shows."""
    engine = environment()
    source = engine.loader.get_source  # type: ignore[union-attr]
    css, js = (source(engine, name)[0] for name in ("report.css", "report.js"))
    page = engine.get_template("report.html")
    context = {
        **_context(material),
        "css": css,
        "js": js,
        "hash": base64.b64encode(hashlib.sha256(js.encode()).digest()).decode(),
    }
    left = BYTES - len(page.render(**context, cards=[""], shown=0).encode())
    one = engine.get_template("card.html")
    cards = list(_fitting((one.render(card=card) for card in material.cards), left))
    return page.render(**context, cards=cards, shown=len(cards)), len(cards)


def _fitting(cards: Iterator[str], left: int) -> Iterator[str]:
    """As many as fit into ``left`` bytes; one that is too large lets smaller ones in."""
    for text in cards:
        size = len(text.encode())
        if size <= left:
            left -= size
            yield text


def _context(material: Material) -> dict[str, Any]:
    runs, facts = material.runs, material.facts
    rows = figures.stages(runs)
    results = result_rows(runs)
    return {
        "title": ", ".join(run.config.name for run in runs),
        "runs": runs,
        "seeds": seeds([run.seed for run in runs]),
        "facts": _about(runs),
        "finished": all(run.finished for run in runs),
        "columns": columns(runs),
        "results": results,
        "results_note": note(runs, results),
        "curves": figures.curves(rows),
        "maps": figures.by_turn(rows),
        "divergence": figures.DIVERGENCE,
        "depth": figures.depth(rows, facts),
        "weights": figures.weights(rows),
        "counted": figures.counted(rows),
        "spent": figures.spent(rows),
        "longest": max((item.total for item in figures.spent(rows)), default=1.0),
        "phases": figures.PHASES,
        "stages": [_stage(name, row, facts[name]) for name, row in rows.items()],
        "faults": list(_faults(facts)),
        "total": sum(fact.count for row in facts.values() for fact in row),
        "candidates": len(material.cards),
        "scored": material.scored,
        "threshold": material.threshold,
        "shown_stages": list(dict.fromkeys(card.stage for card in material.cards)),
        "config": _yaml(runs[0]),
        "nothing": NOTHING,
    }


def _about(runs: Sequence[RunData]) -> list[tuple[str, str]]:
    """Facts for the head of the page."""
    machine, config = runs[0].machine, runs[0].config
    versions = machine.get("versions", {})
    trained = [stage.what for stage in runs[0].stages if stage.axes is not None]
    cores = machine.get("cores")
    found = {
        "environment": config.env.id,
        "methods": ", ".join(dict.fromkeys(trained)),
        "commit": machine.get("commit", ""),
        "machine": f"{cores} cores, {machine.get('system', '')}" if cores else "",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return [(name, str(value)) for name, value in found.items() if value]


def _stage(name: str, row: Sequence[StageData], facts: Sequence[Facts]) -> list[str]:
    """One line of the table of stages, mean over seeds."""
    last = [stage.metrics[-1] for stage in row if stage.metrics]
    steps = [line["total/env_steps"] for line in last if line.get("total/env_steps")]
    took = [stage.done["seconds"] for stage in row if stage.done and "seconds" in stage.done]
    kept = [fact.count for fact in facts if fact.count]
    iterations = [line["iteration"] + 1 for line in last]
    return [
        name,
        row[0].what,
        _status(row),
        *(
            count(sum(values) / len(values)) if values else NOTHING
            for values in (iterations, steps, kept)
        ),
        count(sum(sum(fact.faults.values()) for fact in facts)),
        duration(sum(took) / len(took) if took else None),
    ]


def _status(row: Sequence[StageData]) -> str:
    done = sum(stage.done is not None for stage in row)
    if done == len(row):
        return "finished"
    if len(row) > 1 and done:
        return f"finished in {done} of {len(row)}"
    return "unfinished" if any(stage.started for stage in row) else "not begun"


def _faults(facts: dict[str, list[Facts]]) -> Iterator[tuple[str, str, int, str]]:
    """Stage, kind, how often, and the first message."""
    for stage, row in facts.items():
        for kind in sorted({kind for fact in row for kind in fact.faults}):
            times = sum(fact.faults[kind] for fact in row)
            said = next(fact.messages[kind] for fact in row if kind in fact.messages)
            yield stage, kind, times, clip(said, 300)[0]


def _yaml(run: RunData) -> str:
    import yaml

    values = run.config.model_dump(mode="json")
    return str(yaml.safe_dump(values, sort_keys=False, width=100, allow_unicode=True))
