"""What two scorers say about the rows of a table: divergence, steps, entropy, agreement.

Invariants
----------
* Every number is over tokens that the actor wrote and that both models scored, at temperature 1.
* ``kl`` and ``log_ratio`` are over the tokens that are there. They estimate a divergence only where
  the student drew those tokens, as it is now; ``reverse_kl`` sums over the vocabulary and is exact.
* What was not measured is None. An episode that a window ended is neither a success nor a failure.
* Nothing loops over tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from agentdistill.table import Table, column
from agentdistill.views import PLAIN
from agentdistill.weighting import compact, segment_count, segment_sum
from agentdistill.weights import sod, step_divergence

ZERO = 1e-6
"""A log-ratio below this, in nats, teaches nothing."""
DELTAS = (0.2, 0.5)
"""SOD's caps less 1: its training script's, and its class's (arXiv 2605.07725)."""
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Of the distribution of step weights."""


@dataclass(frozen=True, slots=True)
class Means:
    """Numbers about some rows: all of them, or those of one turn. In nats.

    Attributes:
        trajectories: with at least one row here.
        tokens: rows.
        kl: mean over trajectories of the sum of log p(student) - log p(teacher) over their rows
            (TCOD's trajectory-level KL, arXiv 2604.24005).
        kl_sd: its standard deviation over those trajectories (of a population, as in TCOD's code).
        drawn_kl: ``kl`` with the student's log-probability of the moment when it drew the token,
            over the trajectories whose rows all have one.
        drawn_kl_sd: its standard deviation.
        log_ratio: mean of log p(student) - log p(teacher) per token.
        reverse_kl: mean exact KL(student || teacher) per token.
        zero_signal: share of rows whose log-ratio is less than :data:`ZERO` either way.
        student_entropy: mean per token.
        teacher_entropy: mean per token.
        agreement: share of rows where both think the same token the likeliest.
        tvd: mean total variation distance, in [0, 1].
    """

    trajectories: int
    tokens: int
    kl: float
    kl_sd: float
    drawn_kl: float | None
    drawn_kl_sd: float | None
    log_ratio: float
    reverse_kl: float | None
    zero_signal: float
    student_entropy: float | None
    teacher_entropy: float | None
    agreement: float | None
    tvd: float | None


@dataclass(frozen=True, slots=True)
class StepWeights:
    """SOD's weights of the steps after the first of their trajectory, min(d_1 / d_k, 1 + delta).

    Attributes:
        delta: of the cap.
        mean: over steps.
        quantiles: at :data:`QUANTILES`, over steps.
        at_cap: share of steps whose weight is the cap.
        all_at_cap: share of trajectories, of those with later steps, where all of them are.
    """

    delta: float
    mean: float
    quantiles: tuple[float, ...]
    at_cap: float
    all_at_cap: float


@dataclass(frozen=True, slots=True)
class Steps:
    """Step divergences d_k (SOD, eq. 6): mean |log p(student) - log p(teacher)| over a step.

    Attributes:
        divergence: mean d_k of the k-th step of the actor's, over trajectories that have one.
        trajectories: how many have a k-th step.
        zero_first: trajectories with d_1 = 0, whose later weights are nearly 0.
        first_largest: share of trajectories, of those with later steps, of which none diverges
            more than the first: every weight is at least 1. None where nobody has later steps.
        weights: one per :data:`DELTAS`; empty where nobody has later steps.
    """

    divergence: tuple[float, ...]
    trajectories: tuple[int, ...]
    zero_first: int
    first_largest: float | None
    weights: tuple[StepWeights, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Some trajectories.

    Attributes:
        total: over all their rows.
        by_turn: of the episodes that still went on, by turn since the environment's reset; None
            for a turn in which nobody acted (it was replayed).
        steps: divergences and weights of steps.
    """

    total: Means
    by_turn: tuple[Means | None, ...]
    steps: Steps


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found.

    Attributes:
        all: every trajectory; None without a single row.
        success: those that succeeded; None where none did.
        failure: those that failed; None where none did.
        undecided: trajectories that a window or a budget ended before they had an outcome.
        stage: whose episodes they are, "" for a table of one's own.
        student: name of the model.
        teacher: name of the model.
        iterations: (first, last) of the stage that was read, from 0.
        faults: trajectories left out because something outside the agent broke.
        dropped: streams left out because they are longer than the student can read.
        from_text: trajectories whose tokens were made from their texts: nobody drew those.
    """

    all: Part | None
    success: Part | None
    failure: Part | None
    undecided: int
    stage: str = ""
    student: str = "student"
    teacher: str = "teacher"
    iterations: tuple[int, int] | None = None
    faults: int = 0
    dropped: int = 0
    from_text: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


# -- a scored table --------------------------------------------------------------------------------


def diagnose(
    table: Table,
    *,
    student: str = "student",
    teacher: str = "teacher",
    view: str = PLAIN,
    rows: Tensor | None = None,
) -> Diagnosis:
    """What the columns of ``table`` say.

    Reads ``logp/<student>`` and ``logp/<teacher>``; where they are there also ``entropy/…``,
    ``logp/sampler``, and the teacher's ``reverse_kl``, ``tvd`` and ``agree`` (:func:`score`). A
    table in training has them as well: ``diagnose(table, student="old", view="context")``.

    Args:
        table: scored.
        student: name of a scorer.
        teacher: name of another.
        view: what the teacher read.
        rows: bool [N]; None takes what the actor wrote. Rows that one of them did not score (NaN)
            are left out.
    """
    scored = _Scored(table, student, teacher, view)
    mask = (table.acted if rows is None else rows) & scored.gap.isfinite()
    wins = torch.tensor([t.success for t in table.trajectories], dtype=torch.bool)
    valid = torch.tensor([t.reward_valid for t in table.trajectories], dtype=torch.bool)
    here = segment_count(table.index["trajectory"], mask, len(wins)) > 0
    return Diagnosis(
        scored.part(mask),
        scored.part(mask & table.spread(wins)),
        scored.part(mask & table.spread(valid & ~wins)),
        int((here & ~valid & ~wins).sum()),
        student=student,
        teacher=teacher,
    )


@dataclass(eq=False)
class _Scored:
    """The columns of two scorers."""

    table: Table
    student: str
    teacher: str
    view: str
    gap: Tensor = field(init=False)

    def __post_init__(self) -> None:
        theirs = self.table[column("logp", self.teacher, self.view)].double()
        self.gap = self.table[column("logp", self.student)].double() - theirs
        self.drawn = self.table["logp/sampler"].double() - theirs

    def part(self, mask: Tensor) -> Part | None:
        """The rows in ``mask``."""
        if not bool(mask.any()):
            return None
        turn = self.table.index["turn"]
        last = int(turn[mask].max())
        by_turn = [self._means(mask & (turn == number)) for number in range(last + 1)]
        total = self._means(mask)
        assert total is not None
        return Part(total, tuple(by_turn), self._steps(mask))

    def _means(self, mask: Tensor) -> Means | None:
        if not bool(mask.any()):
            return None
        kl, kl_sd = self._sums(self.gap, mask)
        index, size = compact(self.table.index["trajectory"], mask)
        unknown = segment_count(index, mask & ~self.drawn.isfinite(), size) > 0
        drawn = mask & ~unknown[index]
        drawn_kl, drawn_kl_sd = self._sums(self.drawn, drawn) if bool(drawn.any()) else (None, None)
        return Means(
            trajectories=size,
            tokens=int(mask.sum()),
            kl=kl,
            kl_sd=kl_sd,
            drawn_kl=drawn_kl,
            drawn_kl_sd=drawn_kl_sd,
            log_ratio=float(self.gap[mask].mean()),
            reverse_kl=self._mean("reverse_kl", mask),
            zero_signal=float((self.gap[mask].abs() < ZERO).double().mean()),
            student_entropy=self._mean("entropy", mask, own=True),
            teacher_entropy=self._mean("entropy", mask),
            agreement=self._mean("agree", mask),
            tvd=self._mean("tvd", mask),
        )

    def _sums(self, values: Tensor, mask: Tensor) -> tuple[float, float]:
        """Mean and standard deviation over trajectories of the sum over their rows."""
        index, size = compact(self.table.index["trajectory"], mask)
        sums = segment_sum(values, index, mask, size)
        return float(sums.mean()), float(sums.std(correction=0))

    def _mean(self, what: str, mask: Tensor, own: bool = False) -> float | None:
        """Mean of a column over the rows of ``mask`` that have it."""
        name = column(what, self.student) if own else column(what, self.teacher, self.view)
        values = self.table.columns.get(name)
        if values is None or not bool((known := mask & values.isfinite()).any()):
            return None
        return float(values[known].double().mean())

    def _steps(self, mask: Tensor) -> Steps:
        table = self.table
        mine, theirs = column("logp", self.student), column("logp", self.teacher, self.view)
        unit = table.units("step")
        of_row = step_divergence(table[mine].double(), table[theirs].double(), unit, mask)
        index, size = compact(unit, mask)
        # One row per step from here on, in the order of trajectories and steps.
        d, owner = of_row.new_zeros(size), index.new_zeros(size)
        d[index[mask]] = of_row[mask]
        owner[index[mask]] = table.index["trajectory"][mask]
        return _of_steps(d, owner)


def _of_steps(d: Tensor, owner: Tensor) -> Steps:
    """From the divergence of each step [S] and the trajectory it belongs to [S], sorted."""
    every = torch.ones_like(owner, dtype=torch.bool)
    owner, size = compact(owner, every)
    lengths = segment_count(owner, every, size)
    number = torch.arange(len(d)) - (lengths.cumsum(0) - lengths)[owner]
    count = segment_count(number, every, int(lengths.max()))
    means = segment_sum(d, number, every, len(count)) / count
    first, longer = d[number == 0], lengths > 1
    highest = d.new_zeros(size).scatter_reduce_(0, owner, d, "amax")
    return Steps(
        tuple(means.tolist()),
        tuple(count.tolist()),
        int((first == 0).sum()),
        float((first >= highest)[longer].double().mean()) if bool(longer.any()) else None,
        tuple(_step_weights(d, owner, number, delta) for delta in DELTAS if bool(longer.any())),
    )


def _step_weights(d: Tensor, owner: Tensor, number: Tensor, delta: float) -> StepWeights:
    weight = sod(d, owner, number, torch.ones_like(owner, dtype=torch.bool), delta=delta)
    later = number > 0
    capped = weight >= 1 + delta
    index, size = compact(owner, later)
    below = segment_count(index, later & ~capped, size)
    points = torch.tensor(QUANTILES, dtype=weight.dtype)
    return StepWeights(
        delta,
        float(weight[later].mean()),
        tuple(weight[later].quantile(points).tolist()),
        float(capped[later].double().mean()),
        float((below == 0).double().mean()),
    )
