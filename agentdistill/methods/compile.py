"""From axes to numbers: what must be scored, which columns follow, which terms are minimised.

The order of one iteration (docs/methods.md): tasks, start, rollout, group edits, contexts, scoring
(teacher, base, and the student itself without gradient: ``old``), then the steps of
:mod:`~agentdistill.methods.steps`, then the terms below.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from agentdistill import advantage, divergence
from agentdistill.methods import rules
from agentdistill.methods.space import FULL, Axes, SignalAxis
from agentdistill.methods.steps import (
    BASE,
    CONTEXT,
    OLD,
    STEPS,
    STUDENT,
    TEACHER,
    Heads,
    Work,
    full_divergence,
    rows_column,
    scorer_view,
    student_view,
    target_column,
)
from agentdistill.objective import LIVE, Divergence, Term, TokenLoss
from agentdistill.table import Table
from agentdistill.views import PLAIN

__all__ = [
    "BASE", "CONTEXT", "OLD", "STUDENT", "TEACHER", "Heads", "fill", "scorer_view",
    "student_view", "terms", "wanted",
]  # fmt: skip


def wanted(axes: Axes, scorer: str = TEACHER) -> set[str]:
    """What ``scorer`` (teacher, base or old) must say of every row: logp, entropy, hidden."""
    found = {name.split("/")[0] for name in rules.needs(axes) if name.endswith(f"/{scorer}")}
    for signal in axes.signals:
        if signal.divergence == "nll":
            continue
        mixed = axes.mixes(signal)
        if scorer == TEACHER or (scorer == BASE and mixed):
            found.add("hidden" if signal.divergence in FULL else "logp")
        if scorer == OLD and signal.coupling == "reward" and signal.divergence in FULL:
            found.add("hidden")
    if scorer == OLD and _reads_old(axes):
        found.add("logp")
    return found


def _reads_old(axes: Axes) -> bool:
    """Whether the sampled tokens' log-probabilities before the update are needed."""
    sampled = any(s.coupling != "loss" and s.divergence not in FULL for s in axes.signals)
    live = any(s.divergence == "rho_k3" or s.ratio_cap is not None for s in axes.signals)
    capped = axes.on_policy and axes.policy_gradient.tis_cap is not None
    return axes.advantages or sampled or live or capped


def fill(
    table: Table,
    axes: Axes,
    *,
    pass_rates: Tensor | None = None,
    heads: Heads | None = None,
) -> dict[str, float]:
    """Compute the method's own columns; return what is worth logging.

    Needs the columns of :func:`wanted`. Adds ``rows/kd`` (``rows/kd1``, … of further signals),
    ``rows/pg``, ``rows/all``, ``weight/signal`` and, with a policy gradient, ``advantage``.

    Args:
        table: scored.
        axes: the point, its schedules resolved.
        pass_rates: share of successes on each trajectory's task [B], for the task axis.
        heads: output heads, where a divergence enters the reward.
    """
    work = Work(table, axes, pass_rates, dict(heads or {}))
    for step in STEPS.values():
        step(work)
    return work.metrics


def terms(axes: Axes) -> list[Term]:
    """The objective."""
    found = _policy_gradient(axes) if axes.advantages else []
    for number, signal in enumerate(axes.signals):
        if signal.coupling != "loss":
            continue
        cap = signal.ratio_cap
        found.append(
            Term(
                signal.divergence + (f"/{number}" if number else ""),
                _loss(axes, signal),
                rows_column(number),
                view=student_view(axes),
                coef=signal.coef,
                weight="weight/loss",
                over=axes.over,
                clip=signal.clip,
                ratio=("logp/old", cap) if cap is not None else None,
                shared="rows/all" if axes.shared else None,
            )
        )
    return found


def _policy_gradient(axes: Axes) -> list[Term]:
    """One term, or one for each prompt of an informed actor (pi-Distill); the anchor is its own."""
    gradient = axes.policy_gradient
    anchor = "anchor" if any(s.coupling == "anchor" for s in axes.signals) else "logp/old"
    loss = partial(
        _ppo,
        anchor=anchor,
        clip_low=gradient.clip_low,
        clip_high=gradient.clip_high,
        dual_clip=gradient.dual_clip,
    )
    views = {"policy_gradient": (PLAIN, 1.0)}
    if axes.actor == "informed":
        views = {
            "policy_gradient/informed": (PLAIN, axes.informed_share),
            "policy_gradient": (student_view(axes), 1 - axes.informed_share),
        }
    return [
        Term(
            name,
            TokenLoss((anchor, "advantage"), loss),
            "rows/pg",
            view=view,
            coef=coef,
            weight="weight/tis" if gradient.tis_cap else None,
            over=axes.over,
            shared="rows/all" if axes.shared else None,
        )
        for name, (view, coef) in views.items()
    ]


def _ppo(logp: Tensor, columns: dict[str, Tensor], anchor: str, **clips: float | None) -> Tensor:
    return advantage.ppo_loss(logp, columns[anchor], columns["advantage"], **clips)  # type: ignore[arg-type]


def _loss(axes: Axes, signal: SignalAxis) -> TokenLoss | Divergence:
    """The differentiable loss of one signal."""
    if signal.divergence in FULL:
        rest = "" if signal.share == 1 else BASE if signal.rest == "base" else LIVE
        function = full_divergence(signal)
        return Divergence(TEACHER, function, scorer_view(axes), signal.share, rest)
    if signal.divergence == "nll":
        return TokenLoss((), lambda logp, _: -logp)
    target = target_column(axes, signal)
    if signal.divergence == "rho_k3":
        return TokenLoss(
            (target, "logp/old"),
            lambda logp, c: divergence.rho_k3(logp, c[target], c["logp/old"]),
        )
    estimator = {"k1": divergence.k1, "k2": divergence.k2, "k3": divergence.k3}[signal.divergence]
    return TokenLoss((target,), lambda logp, c: estimator(logp, c[target]))
