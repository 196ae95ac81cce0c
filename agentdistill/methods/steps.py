"""From scored columns to advantages and weights: the named steps between scoring and the loss.

The order is fixed (docs/methods.md says why): rows → signal → penalty → reward → token weight →
step weight → trajectory weight → normalise → shift → combine. Step weights read the raw divergence,
not one that token weights changed; groups without any difference in reward keep their signal.
Invariants: everything written here is a detached column, fixed before the first backward; rows
outside a mask get 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from agentdistill import advantage, divergence
from agentdistill.methods import rules
from agentdistill.methods.space import FULL, Axes, SignalAxis
from agentdistill.records import Author
from agentdistill.table import Table, column
from agentdistill.views import PLAIN
from agentdistill.weighting import mean1, segment_sum
from agentdistill.weights import pass_rate_weight

TEACHER, OLD, BASE = "teacher", "old", "base"
CONTEXT, STUDENT = "context", "student"
"""Views: with a note that the actor did not read; without the note that it did."""

Heads = dict[str, Callable[[Tensor], Tensor]]


def student_view(axes: Axes) -> str:
    """The view in which the student will act once it is trained."""
    return STUDENT if axes.actor == "informed" else PLAIN


def scorer_view(axes: Axes) -> str:
    """The view that the scorer reads."""
    if axes.actor == "informed":
        return STUDENT
    aside = axes.context.kind != "same" and axes.context.reader == "scorer"
    return CONTEXT if aside else PLAIN


def target_column(axes: Axes, signal: SignalAxis) -> str:
    """Log-probabilities of the sampled tokens under the target of ``signal``."""
    if signal.share == 1:
        return column("logp", TEACHER, scorer_view(axes))
    return f"target/{axes.signals.index(signal)}"


@dataclass(slots=True)
class Work:
    """What the steps share.

    Attributes:
        table: scored.
        axes: the point, its schedules resolved.
        pass_rates: the student's share of successes on each trajectory's task [B], if known.
        heads: output heads of the scorers whose hidden states are columns.
        penalties: what each episode pays for its divergence [B], or None.
        metrics: worth logging.
    """

    table: Table
    axes: Axes
    pass_rates: Tensor | None = None
    heads: Heads = field(default_factory=dict)
    penalties: Tensor | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    def rows(self, mask: Tensor) -> rules.Rows:
        """What a rule sees of the rows in ``mask``."""
        view = scorer_view(self.axes)

        def read(name: str) -> Tensor:
            what, _, scorer = name.partition("/")
            return self.table[column(what, scorer, view if scorer == TEACHER else PLAIN)]

        return rules.Rows(self.table, mask, read)

    def signal_rows(self, number: int) -> Tensor:
        """Rows that carry signal ``number`` [N], bool."""
        return self.table[rows_column(number)]


def rows_column(number: int) -> str:
    """Column of the rows of signal ``number``."""
    return f"rows/kd{number or ''}"


def choose_rows(work: Work) -> None:
    """Which rows carry each signal and the reward (routing); the denominators come after it."""
    table, axes = work.table, work.axes
    kept = [t.success or not axes.only_success for t in table.trajectories]
    chosen = table.spread(torch.tensor(kept, dtype=torch.bool))
    chosen = chosen & table.valid(PLAIN) & table.valid(student_view(axes))
    acted = chosen & table.acted
    taken = torch.zeros_like(acted)
    for number, signal in enumerate(axes.signals):
        mine = acted
        if signal.divergence == "nll":  # what a teacher wrote or forced is learnt like what it said
            author = table.index["author"]
            mine = chosen & (table.acted | (author == Author.FORCED) | (author == Author.TEACHER))
        else:
            mine = mine & table.valid(scorer_view(axes))
        if signal.route:
            mine = mine & rules.apply("route", signal.route, work.rows(taken))
        table[rows_column(number)], taken = mine, taken | mine
    if not axes.signals:
        table["rows/kd"] = acted
    table["rows/signals"] = taken
    route = axes.reward.route
    rewarded = acted & rules.apply("route", route, work.rows(taken)) if route else acted
    advised = torch.zeros_like(acted)
    for number, signal in enumerate(axes.signals):
        if signal.coupling == "advantage":
            advised = advised | work.signal_rows(number)
    table["rows/reward"] = rewarded
    rewards = axes.reward.kind != "none"
    table["rows/pg"] = advised | rewarded if rewards else advised
    table["rows/all"] = taken | table["rows/pg"]


def signal(work: Work) -> None:
    """The target's log-probabilities where it is no single scorer's, and the raw signal."""
    table, axes = work.table, work.axes
    for number, each in enumerate(axes.signals):
        if each.divergence in FULL or each.divergence == "nll":
            continue
        if each.share != 1:
            teacher = table[column("logp", TEACHER, scorer_view(axes))]
            table[target_column(axes, each)] = torch.lerp(
                table[column("logp", BASE)], teacher, each.share
            )
        if "logp/old" in table.columns:
            mask = work.signal_rows(number)
            gap = advantage.opd(table["logp/old"], table[target_column(axes, each)], mask)
            table[f"signal/{number}"] = gap
            if bool(mask.any()):  # K12: a scorer that only says what the student says
                work.metrics["zero_signal"] = float((gap[mask].abs() < 1e-7).float().mean())


def penalty(work: Work) -> None:
    """E3: a divergence summed over the episode, which its reward pays for [B]."""
    table, axes = work.table, work.axes
    size = len(table.trajectories)
    for number, each in enumerate(axes.signals):
        if each.coupling != "reward":
            continue
        mask = work.signal_rows(number)
        exact = each.divergence in FULL
        values = _exact(work, each, mask) if exact else -table[f"signal/{number}"]
        table[f"divergence/{number}"] = values
        of_episode = segment_sum(values, table.index["trajectory"], mask, size)
        before = torch.zeros(size) if work.penalties is None else work.penalties
        work.penalties = before + each.coef * of_episode
        work.metrics["kl_per_episode"] = float(of_episode.sum()) / max(size, 1)


def _exact(work: Work, each: SignalAxis, mask: Tensor, chunk: int = 256) -> Tensor:
    """Divergence of the actor from the scorer on the rows of ``mask`` [N], chunk by chunk."""
    table, axes = work.table, work.axes
    function = full_divergence(each)
    mine, theirs = column("hidden", OLD), column("hidden", TEACHER, scorer_view(axes))
    values = torch.zeros(len(table))
    with torch.no_grad():
        for rows in torch.split(mask.nonzero().squeeze(1), chunk):
            a = work.heads[OLD](table[mine][rows.to(table[mine].device)])
            b = work.heads[TEACHER](table[theirs][rows.to(table[theirs].device)])
            values[rows] = function(a, b.to(a.device)).float().cpu()
    return values


def reward(work: Work) -> None:
    """The group's advantage of every episode, penalties included, spread over its rows."""
    table, axes = work.table, work.axes
    if not axes.advantages:
        return
    table["advantage"] = torch.zeros(len(table))
    if axes.reward.kind == "none":
        return
    gains = reward_advantages(table, axes, work.penalties)
    groups = {t.group for t in table.trajectories}
    pairs = zip(table.trajectories, gains.tolist(), strict=True)
    taught = {t.group for t, gain in pairs if gain}
    work.metrics["zero_advantage_groups"] = 1 - len(taught) / max(len(groups), 1)
    spread = axes.reward.coef * table.spread(gains)
    table["advantage"] = torch.where(table["rows/reward"], spread, 0.0)


def reward_advantages(table: Table, axes: Axes, penalties: Tensor | None = None) -> Tensor:
    """Group-normalised advantage of each trajectory [B]; censored episodes get none."""
    reward = axes.reward
    values = torch.tensor([float(getattr(t, reward.source)) for t in table.trajectories])
    if penalties is not None:
        values = values - penalties
    valid = torch.tensor([t.reward_valid for t in table.trajectories], dtype=torch.bool)
    return advantage.grpo(
        values, table.groups, valid, normalise=reward.normalise, ddof=reward.ddof, eps=reward.eps
    )


def weigh(work: Work) -> None:
    """Token, step, trajectory and task weights of the signal, multiplied, and brought to scale."""
    table, axes = work.table, work.axes
    if axes.policy_gradient.tis_cap and "logp/old" in table.columns:
        cap = axes.policy_gradient.tis_cap
        table["weight/tis"] = advantage.truncated_is(table["logp/old"], table["logp/sampler"], cap)
    if not axes.signals:
        return
    mask = table["rows/signals"]
    heard = mask & table.acted & table.valid(scorer_view(axes))
    total = torch.ones(len(table))
    for level in ("token", "step", "trajectory"):
        choice = getattr(axes.weight, level)
        if choice:
            # What nobody scored (NaN) has no say in a rule that reads scores, and counts as 1.
            rows = work.rows(heard if rules.find(level, choice).needs else mask)
            factor = torch.where(rows.mask, rules.apply(level, choice, rows), mask.float())
            table[f"weight/{level}"] = factor
            total = total * factor
            for name, value in rules.report(level, choice, rows).items():
                work.metrics[f"weight/{level}/{name}"] = value
    total = total * _of_task(work, mask)
    if axes.weight.normalise != "none":
        group = table.index["group"] if axes.weight.normalise == "mean1_group" else None
        total = mean1(total, mask, group)
    table["weight/signal"] = total
    table["weight/loss"] = total * table.columns.get("weight/tis", torch.ones(()))
    _report(work, mask)


def _of_task(work: Work, mask: Tensor) -> Tensor:
    """PACED's weight of each row's task [N]; 1 where the axis is off."""
    axis = work.axes.task
    if axis.weight == "none" or work.pass_rates is None:
        return torch.ones(len(work.table))
    of_row = work.table.spread(pass_rate_weight(work.pass_rates, axis.a, axis.b))
    return mean1(of_row, mask) if axis.normalise == "mean1" else of_row


def _report(work: Work, mask: Tensor) -> None:
    """How the weights are spread over their rows."""
    if not bool(mask.any()):
        return
    for level in ("token", "step", "trajectory", "signal"):
        values = work.table.columns.get(f"weight/{level}")
        if values is None or (level == "signal" and not rules.chosen(work.axes)):
            continue
        mine = values[mask].float()
        work.metrics[f"weight/{level}/mean"] = float(mine.mean())
        work.metrics[f"weight/{level}/min"] = float(mine.min())
        work.metrics[f"weight/{level}/max"] = float(mine.max())


def combine(work: Work) -> None:
    """The advantage of every row: reward's, signal's, or one shaped by the other."""
    table, axes = work.table, work.axes
    if not axes.advantages:
        return
    total = table["advantage"]
    for number, each in enumerate(axes.signals):
        if each.coupling == "magnitude":
            gap = each.coef * table[f"signal/{number}"]
            shaped = advantage.magnitude(total, gap, each.mixing, each.bound)
            total = torch.where(work.signal_rows(number), shaped, total)
        elif each.coupling == "anchor":
            target = table[target_column(axes, each)]
            anchor = advantage.anchored(table["logp/old"], target, each.mixing)
            table["anchor"] = torch.where(work.signal_rows(number), anchor, table["logp/old"])
    for number, each in enumerate(axes.signals):
        if each.coupling == "advantage":
            gain = each.coef * table["weight/signal"] * table[f"signal/{number}"]
            total = total + torch.where(work.signal_rows(number), gain, 0.0)
            if bool((mine := work.signal_rows(number)).any()):
                work.metrics["kd_advantage"] = float(gain[mine].mean())
    if axes.weight.shift:
        rows = work.rows(table["rows/pg"])
        table["advantage"] = total
        total = total + torch.where(rows.mask, rules.apply("shift", axes.weight.shift, rows), 0.0)
    table["advantage"] = total


STEPS: dict[str, Callable[[Work], None]] = {
    "rows": choose_rows,
    "signal": signal,
    "penalty": penalty,
    "reward": reward,
    "weights": weigh,
    "combine": combine,
}
"""In this order, after scoring and before the objective."""


def full_divergence(each: SignalAxis) -> divergence.Divergence:
    """The divergence of whole distributions that ``each`` names."""
    return divergence.divergence(
        each.divergence,
        beta=each.beta,
        temperature=each.temperature,
        top_k=each.top_k,
        support=each.support,
    )
