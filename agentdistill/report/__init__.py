"""One self-contained HTML file about a run, or about several seeds of one recipe.

    from agentdistill.report import report
    report(["runs/quickstart"])

``read`` reads the folders, ``sample`` chooses trajectories, ``score`` asks student and teacher
about their tokens; ``figures``, ``bins`` and ``charts`` the charts, ``cards`` the trajectories,
``page`` the file. Nothing in a run folder is changed, except that the file may be put there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agentdistill.errors import ConfigError
from agentdistill.files import refusing, write_text
from agentdistill.report import page
from agentdistill.report.cards import Card, card
from agentdistill.report.read import RunData, read_runs
from agentdistill.report.sample import Facts, Shown, choose, trim
from agentdistill.report.score import Scorer
from agentdistill.run import need_torch

__all__ = ["Written", "report"]

FILE = "report.html"
PER_STAGE = 24
"""Trajectories of one stage that are shown, unless somebody says otherwise."""
UNREADABLE = "None was scored token by token: no model of the run reads the token ids they hold."
HIGH = 0.75
"""Divergence is called high above this quantile of the scored trajectories."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a report holds.

    Attributes:
        file: where it is.
        bytes: its size.
        runs: folders.
        seeds: of the runs.
        finished: whether every run is complete.
        stages: names of those that have begun.
        results: policies in the result table.
        trajectories: how many the runs have.
        shown: how many of them the report shows.
        scored: how many of those have log-probabilities token by token.
    """

    file: str
    bytes: int
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    finished: bool
    stages: tuple[str, ...]
    results: tuple[str, ...]
    trajectories: int
    shown: int
    scored: int

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def report(
    folders: Sequence[str | Path],
    file: str | Path | None = None,
    *,
    trajectories: int = PER_STAGE,
    score: bool | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Written:
    """Write a report about the runs in ``folders``.

    Args:
        folders: one run, or several that differ in their seed only.
        file: where to; None is ``report.html`` in the first folder.
        trajectories: of each stage that are shown.
        score: whether models of the run are loaded for the log-probabilities of tokens. None does
            it where they are tiny and torch is there.
        seed: of the choice of trajectories.
        say: is told what takes time.

    Raises:
        ConfigError: a folder is no run, or they are not seeds of one recipe.
        MissingExtraError: Jinja2 is not installed, or torch where ``score`` needs it.
        StoreError: a file cannot be read or written.
    """
    if trajectories < 0:
        raise ConfigError("must be at least 0", key="trajectories", value=trajectories)
    page.environment()
    runs = read_runs([Path(folder) for folder in folders])
    scoring = _scores(runs, score) and trajectories > 0
    chosen, facts = _trajectories(runs, trajectories, scoring, seed, say)
    cards, threshold = _cards(runs, chosen)
    scored = sum(bool(item.tokens) for item in chosen)
    why = "" if scored else UNREADABLE if scoring else _without(runs)
    text, shown = page.render(page.Material(runs, facts, cards, why, threshold))
    target = Path(file) if file else runs[0].path / FILE
    with refusing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)
    return Written(
        file=str(target),
        bytes=target.stat().st_size,
        runs=tuple(str(run.path) for run in runs),
        seeds=tuple(run.seed for run in runs),
        finished=all(run.finished for run in runs),
        stages=tuple(s.name for s in runs[0].stages if s.started),
        results=tuple(dict.fromkeys(result.policy for run in runs for result in run.results)),
        trajectories=sum(fact.count for row in facts.values() for fact in row),
        shown=shown,
        scored=scored,
    )


def _scores(runs: Sequence[RunData], score: bool | None) -> bool:
    """Whether tokens are scored."""
    if score:
        need_torch("scoring tokens")
    if score is not None:
        return score
    here = all(find_spec(name) for name in ("torch", "transformers", "tokenizers"))
    return here and runs[0].tiny


def _without(runs: Sequence[RunData]) -> str:
    """Why there are no log-probabilities token by token."""
    cost = "" if runs[0].tiny else " It loads the models of the run."
    return f"Not scored token by token: agentdistill report --score does that.{cost}"


def _trajectories(
    runs: Sequence[RunData], size: int, scoring: bool, seed: int, say: Callable[[str], None]
) -> tuple[list[Shown], dict[str, list[Facts]]]:
    """What is shown, and the facts of every stage."""
    chosen: list[Shown] = []
    facts: dict[str, list[Facts]] = {}
    scorers = [Scorer(run) for run in runs] if scoring else []
    try:
        for place, stage in enumerate(runs[0].stages):
            say(f"reading {stage.name}")
            # More are scored than shown, for there to be highest ones.
            pool = 2 * size if scoring else size
            items, facts[stage.name] = choose(runs, stage.name, size, pool, seed)
            for number, scorer in enumerate(scorers):
                mine = [item for item in items if item.run == number]
                scorer.score(runs[number].stages[place], mine)
            chosen += trim(items, size) if size else []
    finally:
        for scorer in scorers:
            scorer.close()
    return chosen, facts


def _cards(runs: Sequence[RunData], chosen: Sequence[Shown]) -> tuple[list[Card], float | None]:
    """The views, those of train stages first, and from which mean on divergence is high."""
    known = sorted(value for item in chosen if (value := item.divergence) is not None)
    threshold = known[int(HIGH * (len(known) - 1))] if known else None
    trained = {stage.name for stage in runs[0].stages if stage.axes is not None}
    ordered = sorted(chosen, key=lambda item: item.stage not in trained)
    cards = [
        card(item, place, runs[item.run].seed, threshold) for place, item in enumerate(ordered)
    ]
    return cards, threshold
