"""From axes to numbers: which columns a method computes, and which terms it minimises.

The order follows one iteration: rows → teacher's columns → the student's own, without gradient
(``old``) → reward advantages by group → advantages by row → terms. Every weight and advantage is a
detached column, fixed before the first backward.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from agentdistill import advantage, divergence
from agentdistill.methods.space import Axes
from agentdistill.objective import Divergence, Term, TokenLoss
from agentdistill.table import Table

TEACHER, OLD = "teacher", "old"


def wanted(axes: Axes) -> set[str]:
    """What the teacher must score: hidden states, or log-probabilities of the sampled tokens."""
    if not axes.scores:
        return set()
    return {"hidden"} if axes.full else {"logp"}


def needs_old(axes: Axes) -> bool:
    """Whether the student is scored once without gradient before the update."""
    return axes.advantages or axes.signal.divergence == "rho_k3"


def terms(axes: Axes) -> list[Term]:
    """The objective."""
    found: list[Term] = []
    if axes.advantages:
        gradient = axes.policy_gradient
        loss = partial(
            _ppo,
            clip_low=gradient.clip_low,
            clip_high=gradient.clip_high,
            dual_clip=gradient.dual_clip,
        )
        token = TokenLoss(("logp/old", "advantage"), loss)
        weight = "weight/tis" if gradient.tis_cap else None
        found.append(Term("policy_gradient", token, rows="rows/pg", weight=weight, over=axes.over))
    signal = axes.signal
    if signal.divergence != "none" and signal.coupling == "loss":
        found.append(
            Term(signal.divergence, _signal(axes), "rows/kd", coef=signal.coef, over=axes.over)
        )
    return found


def _ppo(logp: Tensor, columns: dict[str, Tensor], **clips: float | None) -> Tensor:
    return advantage.ppo_loss(logp, columns["logp/old"], columns["advantage"], **clips)  # type: ignore[arg-type]


def _signal(axes: Axes) -> TokenLoss | Divergence:
    """The differentiable loss of the signal axis."""
    signal = axes.signal
    teacher = f"logp/{TEACHER}"
    if axes.full:
        function = divergence.divergence(
            signal.divergence,
            beta=signal.beta,
            temperature=signal.temperature,
            top_k=signal.top_k,
        )
        return Divergence(TEACHER, function)
    if signal.divergence == "nll":
        return TokenLoss((), lambda logp, _: -logp)
    if signal.divergence == "rho_k3":
        return TokenLoss(
            (teacher, "logp/old"),
            lambda logp, c: divergence.rho_k3(logp, c[teacher], c["logp/old"]),
        )
    estimator = {"k1": divergence.k1, "k2": divergence.k2, "k3": divergence.k3}[signal.divergence]
    return TokenLoss((teacher,), lambda logp, c: estimator(logp, c[teacher]))


def fill(table: Table, axes: Axes) -> dict[str, float]:
    """Compute the method's own columns; return what is worth logging.

    Needs the teacher's columns and, where :func:`needs_old`, ``logp/old``. Adds ``rows/kd``,
    ``rows/pg`` and, with a policy gradient, ``advantage``.
    """
    kept = [t.success or not axes.only_success for t in table.trajectories]
    chosen = table.acted & table.valid() & table.spread(torch.tensor(kept, dtype=torch.bool))
    table["rows/kd"] = chosen
    table["rows/pg"] = table["rows/kd"]
    metrics: dict[str, float] = {}
    if not axes.advantages:
        return metrics
    total = torch.zeros(len(table))
    if axes.scores and axes.signal.coupling == "advantage":
        total = advantage.opd(
            table["logp/old"], table[f"logp/{TEACHER}"], table["rows/kd"], axes.signal.coef
        )
        metrics["kd_advantage"] = float(total[chosen].mean()) if bool(chosen.any()) else 0.0
    if axes.reward.kind == "grpo":
        gains = reward_advantages(table, axes)
        groups = {t.group for t in table.trajectories}
        taught = {
            t.group for t, gain in zip(table.trajectories, gains.tolist(), strict=True) if gain
        }
        metrics["zero_advantage_groups"] = 1 - len(taught) / max(len(groups), 1)
        total = total + axes.reward.coef * table.spread(gains)
    if axes.policy_gradient.tis_cap:
        cap = axes.policy_gradient.tis_cap
        table["weight/tis"] = advantage.truncated_is(table["logp/old"], table["logp/sampler"], cap)
    table["advantage"] = total
    return metrics


def reward_advantages(table: Table, axes: Axes) -> Tensor:
    """Group-normalised advantage of each trajectory [B]; censored episodes get none."""
    reward = axes.reward
    values = torch.tensor([float(getattr(t, reward.source)) for t in table.trajectories])
    valid = torch.tensor([t.reward_valid for t in table.trajectories], dtype=torch.bool)
    names = {name: i for i, name in enumerate(dict.fromkeys(t.group for t in table.trajectories))}
    group = torch.tensor([names[t.group] for t in table.trajectories])
    return advantage.grpo(
        values, group, valid, normalise=reward.normalise, ddof=reward.ddof, eps=reward.eps
    )
