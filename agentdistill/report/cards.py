"""A trajectory as the page shows it: turns, tokens with their colours, outcome.

Invariants: text is cut only here, and always says how much is missing; colours come in few classes
so that a token costs some fifty bytes.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from agentdistill.records import Author, StepResult, Turn
from agentdistill.report.sample import DIVERGENT, Shown, failed
from agentdistill.report.tokens import NAN, Token, mean_divergence
from agentdistill.report.words import clip, number

CHARACTERS, TOKENS = 3000, 600
"""Of one observation or response, and of one tokenised response, that are shown at most."""

LOGP_BOUNDS = (math.log(0.01), math.log(0.05), math.log(0.2), math.log(0.5), math.log(0.9))
"""Between the colours of a log-probability."""
LEAD_BOUNDS = (-3.0, -1.0, -0.3, -0.1, 0.1, 0.3, 1.0, 3.0)
"""Between the colours of teacher minus student, in nats."""


@dataclass(frozen=True, slots=True)
class Chip:
    """One token: its text, its CSS classes, and its values for the one who points at it."""

    text: str
    shades: str
    values: str


@dataclass(frozen=True, slots=True)
class Text:
    """A text, and how many characters or tokens of it are not shown."""

    text: str
    missing: int = 0


@dataclass(frozen=True, slots=True)
class TurnView:
    """One turn; see the template."""

    number: int
    observation: Text
    response: Text
    chips: tuple[Chip, ...]
    unshown: int
    actions: str
    verdict: str
    optimal: str
    reward: str
    replayed: bool
    actor: str
    student: str
    divergence: str
    shades: str


@dataclass(frozen=True, slots=True)
class Card:
    """One trajectory; see the template."""

    id: str
    stage: str
    seed: int
    iteration: int
    kinds: str
    end: str
    turns: tuple[TurnView, ...]
    replayed: int
    acted: int
    reward: str
    divergence: str
    goal: str
    final: Text
    faults: tuple[str, ...]
    reasons: str


def card(item: Shown, place: int, seed: int, threshold: float | None) -> Card:
    """The view of one trajectory.

    Args:
        item: the trajectory.
        place: of the card on the page.
        seed: of its run.
        threshold: mean from which on divergence counts as high.
    """
    trajectory, divergence = item.trajectory, item.divergence
    sampled = _sampled(item)
    views = [_turn(turn, item.tokens.get(turn.index, ()), sampled) for turn in trajectory.turns]
    last = next((r for t in reversed(trajectory.turns) for r in reversed(t.results)), None)
    return Card(
        id=f"t{place}",
        stage=item.stage,
        seed=seed,
        iteration=item.iteration,
        kinds=_kinds(item, divergence, threshold),
        end=trajectory.end.replace("_", " "),
        turns=tuple(views),
        replayed=len(trajectory.turns) - len(trajectory.acted),
        acted=len(trajectory.acted),
        reward=number(trajectory.reward),
        divergence=number(divergence),
        goal=clip(trajectory.goal, CHARACTERS)[0],
        final=_text(last.observation if last else ""),
        faults=tuple(f"{f.kind}: {clip(f.message, 500)[0]}" for f in trajectory.faults),
        reasons=", ".join(item.reasons),
    )


def _kinds(item: Shown, divergence: float | None, threshold: float | None) -> str:
    """What the filters know it by."""
    trajectory = item.trajectory
    high = DIVERGENT in item.reasons or (
        divergence is not None and threshold is not None and divergence >= threshold
    )
    known = {
        "failed": failed(trajectory),
        "success": trajectory.success,
        "fault": bool(trajectory.faults),
        "divergent": high,
    }
    return " ".join(kind for kind, holds in known.items() if holds)


def _sampled(item: Shown) -> dict[int, float]:
    """Mean log-probability of each turn's response under its sampler."""
    found = {}
    for turn in item.trajectory.turns:
        if turn.span is not None:
            logp = item.trajectory.streams[turn.span.stream].logp[turn.span.start : turn.span.end]
            known = logp[logp == logp]  # without NaN
            if len(known):
                found[turn.index] = float(known.mean())
    return found


def _turn(turn: Turn, tokens: Sequence[Token], sampled: dict[int, float]) -> TurnView:
    student = sampled.get(turn.index, NAN)
    return TurnView(
        number=turn.index + 1,
        observation=_text(turn.observation),
        response=_text(turn.text),
        chips=tuple(map(_chip, tokens[:TOKENS])),
        unshown=max(0, len(tokens) - TOKENS),
        actions=" · ".join(clip(action, 500)[0] for action in turn.actions),
        verdict="" if turn.verdict == "ok" else turn.verdict.replace("_", " "),
        optimal=_optimal(turn.results),
        reward=number(turn.reward),
        replayed=turn.author is Author.REPLAY,
        actor=turn.actor.name,
        student=number(student),
        divergence=number(mean_divergence(tokens)),
        shades=_shades(NAN, student, NAN, NAN),
    )


def _text(text: str) -> Text:
    return Text(*clip(text, CHARACTERS))


def _optimal(results: Sequence[StepResult]) -> str:
    """Whether all steps were best ones, "" where nobody knows."""
    known = [result.optimal for result in results if result.optimal is not None]
    return "" if not known else "optimal" if all(known) else "not optimal"


def _chip(token: Token) -> Chip:
    values = (token.student, token.teacher, token.final)
    return Chip(token.text, _shades(token.lead, *values), " ".join(map(_short, values)))


def _short(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _shades(lead: float, student: float, teacher: float, final: float) -> str:
    """CSS classes: a letter for what is coloured, a number for the colour."""
    found = [] if math.isnan(lead) else [f"d{bisect(LEAD_BOUNDS, lead)}"]
    for letter, value in (("s", student), ("t", teacher), ("f", final)):
        if not math.isnan(value):
            found.append(f"{letter}{bisect(LOGP_BOUNDS, value)}")
    return " ".join(found)
