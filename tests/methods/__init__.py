"""What the golden tests share: nine episodes as lists of tokens, and two ways to their gradient.

:func:`gradient_of` goes the library's way: records, table, views by splices, scorers, plan, terms.
:func:`check` compares it with a formula over :class:`Token` objects, which were read turn by turn,
each prompt written out and alone in its forward pass. The formulas are in the test files.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agentdistill.methods import compile as plan
from agentdistill.methods.index import get
from agentdistill.methods.space import Axes
from agentdistill.optimise import Batch, backward
from agentdistill.records import Actor, Kind, StreamBuilder, Task, Trajectory, Turn, Verdict
from agentdistill.table import Table, build
from agentdistill.teachers.scorer import LocalScorer
from agentdistill.views import PLAIN, Splice, View, ViewBuilder, plain, splice, within
from tests.dense import VOCAB, gap, gradient, logits_at, make_model, sampled_by

CLOSE = 1e-6
"""Relative difference of what is equal up to rounding; recorded columns are float32."""
MICRO = 60
"""Tokens of a micro-batch: about three of the eleven streams."""


# -- models ---------------------------------------------------------------------------------------


@cache
def model(name: str) -> Any:
    """``old`` played by ``sampler``; ``student`` after an update, ``self`` before some others."""
    if name in ("teacher", "base"):
        return make_model({"teacher": 1, "base": 3}[name])
    found = make_model(0)
    seed, size = {"old": (0, 0.0), "student": (1, 0.03), "self": (2, 0.1), "sampler": (3, 0.1)}[
        name
    ]
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in found.parameters():
            weight += size * torch.randn(weight.shape, generator=source, dtype=weight.dtype)
    return found


def scorer_of(axes: Axes) -> str:
    """Whose weights the scorer has: another model's, the student's present or its past ones."""
    if axes.scorer.source == "external":
        return "teacher"
    return "old" if axes.scorer.update in ("live", "sync") else "self"


# -- episodes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Episode:
    """One episode as lists; what was seen and what was said, turn by turn."""

    number: int
    group: str
    end: str
    score: float
    rewards: tuple[float, ...]
    system: tuple[int, ...]
    note: tuple[int, ...] | None
    seen: tuple[tuple[int, ...], ...]
    said: tuple[tuple[int, ...], ...]
    window: bool = False
    forced: int = 0
    verdict: Verdict = Verdict.OK

    @property
    def success(self) -> bool:
        return self.end == "success"

    @property
    def valid(self) -> bool:
        return self.end in ("success", "failure")

    def before(self, turn: int, *, noted: bool) -> list[int]:
        """The prompt of one turn; with a window it forgets all turns before."""
        past = [] if self.window else list(zip(self.seen[:turn], self.said[:turn], strict=True))
        note = self.note if noted and self.note is not None else ()
        words = [token for pair in past for part in pair for token in part]
        return [*self.system, *note, *words, *self.seen[turn]]

    def steps(self) -> list[int]:
        """The step of each turn: a response right behind another one goes on with its step."""
        found = [0]
        for seen in self.seen[1:]:
            found.append(found[-1] + bool(seen or self.window))
        return found

    @cache  # noqa: B019
    def record(self, *, noted: bool) -> Trajectory:
        """What the library is given."""
        builder, turns = StreamBuilder(), []
        for n, said in enumerate(self.said):
            size, forced = len(said), 0 if n else self.forced
            nothing, act = [math.nan] * size, [Kind.ACT] * size
            span = builder.extend(
                self.before(n, noted=noted), said, logp=nothing, kind=act, forced=forced
            )
            turn = Turn(n, "", Actor("student"), reward=self.rewards[n], span=span)
            turns.append(replace(turn, verdict=self.verdict))
        task = Task("tests/golden", "train", {"group": self.group})
        found = Trajectory(
            task, self.group, self.number, tuple(turns), builder.finish(), self.end, self.success,
            self.score, provenance={"note": None if self.note is None else list(self.note)},
        )  # fmt: skip
        return sampled_by(model("sampler"), found)


OUTLINE: tuple[tuple[str, str, tuple[float, ...], int | None, tuple[tuple[int, int], ...]], ...] = (
    ("a", "success", (0.0, 1.0), 3, ((2, 3), (3, 2))),
    ("a", "failure", (0.0, 0.2, 0.0), 2, ((2, 2), (3, 4), (2, 3))),
    ("a", "horizon", (0.0, 0.1), 3, ((3, 2), (2, 3))),
    ("a", "success", (0.8,), None, ((4, 4),)),
    ("b", "failure", (0.0, 0.0, 0.3), 4, ((2, 3), (0, 2), (3, 3))),
    ("b", "success", (0.1, 0.7), 2, ((3, 3), (2, 4))),
    ("b", "failure", (0.0,), None, ((2, 5),)),
    ("c", "failure", (0.0, 0.1), 3, ((2, 2), (2, 2))),
    ("c", "failure", (0.1,), 3, ((5, 3),)),
)
"""Group, end, rewards, length of the note, and per turn the tokens seen and said.

One episode is censored, two have no note, one forgets (three streams), one says two responses in a
row (one step of two turns), and in group c nothing differs.
"""
SCORES = (1.0, 0.25, 0.5, 0.9, 0.0, 0.8, 0.4, 0.1, 0.1)


@cache
def episodes(seed: int = 0) -> tuple[Episode, ...]:
    """The nine episodes with random tokens."""
    source = random.Random(seed)

    def words(size: int) -> tuple[int, ...]:
        return tuple(source.randrange(VOCAB) for _ in range(size))

    return tuple(
        Episode(
            number, group, end, SCORES[number], rewards, words(2),
            None if note is None else words(note),
            tuple(words(seen) for seen, _ in turns), tuple(words(said) for _, said in turns),
            window=number == 1,
        )
        for number, (group, end, rewards, note, turns) in enumerate(OUTLINE)
    )  # fmt: skip


def with_note(trajectory: Trajectory, stream: int) -> View | None:
    note = trajectory.provenance["note"]
    if note is None:
        return None
    return splice(trajectory.streams[stream], [Splice(2, insert=tuple(note))])


def without_note(trajectory: Trajectory, stream: int) -> View:
    size = len(trajectory.provenance["note"] or ())
    return splice(trajectory.streams[stream], [Splice(2, drop=size)])


# -- the library's way ----------------------------------------------------------------------------


def scored(
    axes: Axes,
    played: Sequence[Episode],
    *,
    micro: int = MICRO,
    context: ViewBuilder = with_note,
    limit: int = 512,
) -> tuple[Table, plan.Heads]:
    """A table as an iteration scores it, and the heads."""
    table = build([e.record(noted=axes.actor == "informed") for e in played])
    table.add_view(PLAIN, within(plain, limit))
    if plan.student_view(axes) == plan.STUDENT:
        table.add_view(plan.STUDENT, within(without_note, limit))
    if plan.scorer_view(axes) == plan.CONTEXT:
        table.add_view(plan.CONTEXT, within(context, limit))
    names = {plan.TEACHER: scorer_of(axes), plan.BASE: "base", plan.OLD: "old"}
    heads = {}
    for name, weights in names.items():
        scorer = LocalScorer(name, model(weights))
        heads[name] = scorer.head
        want = plan.wanted(axes, name)
        view = plan.scorer_view(axes) if name == plan.TEACHER else PLAIN
        scorer.score(table, want, view=view, rows=table.acted, micro_tokens=micro)
    return table, heads


def rates_of(axes: Axes, played: Sequence[Episode]) -> Tensor | None:
    """Share of successes on each episode's task, if somebody asks."""
    won: dict[str, list[bool]] = defaultdict(list)
    for each in played:
        won[each.group].append(each.success)
    if axes.task.weight == "none":
        return None
    return torch.tensor([statistics.fmean(won[e.group]) for e in played])


def descend(
    axes: Axes,
    filled: tuple[Table, plan.Heads],
    student: str = "student",
    trained: Sequence[int] | None = None,
    *,
    micro: int = MICRO,
    chunk: int | None = 3,
) -> tuple[Batch, Tensor]:
    """Losses and gradient of one optimiser batch on a table that is filled."""
    table, heads = filled
    options = {"micro_tokens": micro, "chunk_rows": chunk, "trajectories": trained}
    batch = backward(model(student), table, plan.terms(axes), heads, **options)
    return batch, gradient(model(student))


def gradient_of(
    axes: Axes,
    played: Sequence[Episode],
    *,
    student: str = "student",
    micro: int = MICRO,
    chunk: int | None = 3,
    spoil: Callable[[Table, plan.Heads], None] | None = None,
) -> tuple[Batch, Tensor]:
    """Losses and gradient of a whole iteration; ``spoil`` may change what was scored."""
    table, heads = scored(axes, played, micro=micro)
    if spoil is not None:
        spoil(table, heads)
    plan.fill(table, axes, pass_rates=rates_of(axes, played), heads=heads)
    return descend(axes, (table, heads), student, micro=micro, chunk=chunk)


# -- the slow way ---------------------------------------------------------------------------------


@dataclass
class Token:
    """One token of interest. Logs of whole distributions have ``log_`` in their names.

    Attributes:
        s: of the student that is trained, reading its own prompt; carries the gradient.
        informed: the same with the note in the prompt, for an actor that read it.
        teacher: None where its context could not be written.
    """

    turn: int
    step: int
    forced: bool
    old: float
    sampler: float
    base: float
    teacher: float | None
    log_old: Tensor
    log_base: Tensor
    log_teacher: Tensor | None
    s: Tensor
    informed: Tensor
    log_s: Tensor


@dataclass
class Play:
    """An episode, its tokens, and whether it is in the optimiser batch."""

    of: Episode
    tokens: list[Token]
    trained: bool = True
    extra: dict[str, float] = field(default_factory=dict)


@cache
def _fixed(name: str, episode: Episode, noted: bool) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return _live(name, episode, noted)


def _live(name: str, episode: Episode, noted: bool) -> tuple[Tensor, ...]:
    """Log-probabilities [tokens, V] of every turn."""
    found = []
    for turn, said in enumerate(episode.said):
        before = episode.before(turn, noted=noted)
        ids = [*before, *said]
        found.append(logits_at(model(name), ids, range(len(before), len(ids))).log_softmax(-1))
    return tuple(found)


def _single(value: Tensor) -> float:
    return float(np.float32(value.item()))


def read(
    played: Iterable[Episode], student: str, scorer: str, told: str | None, trained: Sequence[int]
) -> list[Play]:
    """All tokens; ``told`` is who reads the note: nobody (None), ``scorer`` or ``actor``."""
    plays = []
    for number, episode in enumerate(played):
        acted = told == "actor"
        answers = _live if number in trained else _fixed  # without a gradient
        log_s = answers(student, episode, False)
        informed = answers(student, episode, True) if acted else log_s
        old, sampler = (_fixed(name, episode, acted) for name in ("old", "sampler"))
        teacher, base = _fixed(scorer, episode, told == "scorer"), _fixed("base", episode, acted)
        silent = told == "scorer" and episode.note is None
        tokens = []
        for turn, said in enumerate(episode.said):
            for i, word in enumerate(said):
                log_t = None if silent else teacher[turn][i]
                token = Token(
                    turn, episode.steps()[turn], turn == 0 and i < episode.forced,
                    _single(old[turn][i][word]), _single(sampler[turn][i][word]),
                    _single(base[turn][i][word]),
                    None if log_t is None else _single(log_t[word]),
                    old[turn][i], base[turn][i], log_t,
                    log_s[turn][i][word], informed[turn][i][word], log_s[turn][i],
                )  # fmt: skip
                tokens.append(token)
        plays.append(Play(episode, tokens, number in trained))
    return plays


# -- what several formulas share ------------------------------------------------------------------


def mean(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


def trained_tokens(plays: Iterable[Play]) -> list[tuple[Play, Token]]:
    return [(play, token) for play in plays if play.trained for token in play.tokens]


def clipped(
    live: Tensor, anchor: float, gain: float, high: float = 0.2, dual: float = 3.0
) -> Tensor:
    """The clipped surrogate of one token, as a loss."""
    ratio = (live - anchor).exp()
    value = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1 + high) * gain)
    return value.clamp_max(-dual * gain) if gain < 0 else value


def set_gains(
    plays: Sequence[Play], reward: Callable[[Play], float], eps: float = 1e-6, std: bool = True
) -> None:
    """Each play's advantage over the valid ones of its group, in ``extra["gain"]``."""
    for play in plays:
        mine = [reward(p) for p in plays if p.of.group == play.of.group and p.of.valid]
        gain = reward(play) - statistics.fmean(mine) if play.of.valid else 0.0
        play.extra["gain"] = gain / (statistics.stdev(mine) + eps) if std and gain else gain


def won(play: Play) -> float:
    return float(play.of.success)


Formula = Callable[[list[Play]], dict[str, Tensor]]


def check(
    method: str | Axes,
    formula: Formula,
    *,
    told: str | None = None,
    played: Sequence[Episode] | None = None,
    close: float = CLOSE,
    **overrides: Any,
) -> None:
    """Two optimiser batches, the second with a student that has moved: losses and gradients."""
    axes = method if isinstance(method, Axes) else get(method).resolve(overrides)
    mine = tuple(episodes()) if played is None else tuple(played)
    filled = scored(axes, mine)
    plan.fill(filled[0], axes, pass_rates=rates_of(axes, mine), heads=filled[1])
    for student, trained in (("old", range(0, len(mine), 2)), ("student", range(1, len(mine), 2))):
        batch, found = descend(axes, filled, student, list(trained))
        plays = read(mine, student, scorer_of(axes), told, trained)
        losses = formula(plays)
        wanted = {name: value.item() for name, value in losses.items()}
        assert batch.losses == pytest.approx(wanted, rel=close, abs=close), student
        assert float(found.norm()) > 1e-4
        assert gap(found, gradient(model(student), sum(losses.values()))) < close, student
