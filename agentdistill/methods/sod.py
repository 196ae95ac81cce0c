"""SOD: step-wise on-policy distillation (arXiv 2605.07725).

A_t = A_grpo + w_k (log pi_T - log pi_old) on the sampled tokens; k is the step of token t, a
maximal run of tokens that the student wrote. d_k = mean |log pi_old - log pi_T| over the step, w_1
= 1, w_k = min(d_1 / d_k, 1 + delta): a step further from the teacher than the first one counts
less.

Code and script differ: delta is 0.5 in the class and 0.2 in the training script, which this follows
(``weight.step.delta: 0.5``). The cap acts on the emitted weight only, the product runs on without
it. The reward's advantage is normalised by group, the distillation term is not: their balance
depends on the scale of log-probabilities. Where d_1 is 0 every later weight is near 0; it is
logged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentdistill.methods.rules import Rows, rule
from agentdistill.methods.space import (
    Axes,
    Choice,
    Method,
    PolicyGradientAxis,
    RewardAxis,
    WeightAxis,
)

if TYPE_CHECKING:
    from torch import Tensor


def _divergence(rows: Rows) -> Tensor:
    from agentdistill.weights import step_divergence

    old, teacher = rows.column("logp/old"), rows.column("logp/teacher")
    return step_divergence(old, teacher, rows.table.units("step"), rows.mask)


def _report(rows: Rows, delta: float, eps: float) -> dict[str, float]:
    from agentdistill.weights import sod_report

    table = rows.table
    place = table.index["trajectory"], table.units("step"), rows.mask
    return sod_report(_divergence(rows), *place, delta=delta, eps=eps)


@rule(
    "step",
    "sod",
    needs=("logp/old", "logp/teacher"),
    source="arXiv:2605.07725",
    report=_report,
    delta=0.2,
    eps=1e-6,
)
def _sod(rows: Rows, delta: float, eps: float) -> Tensor:
    """Ratio of the first step's divergence to the step's own, capped above."""
    from agentdistill.weights import sod

    table = rows.table
    place = table.index["trajectory"], table.units("step"), rows.mask
    return sod(_divergence(rows), *place, delta=delta, eps=eps)


SOD = Method(
    name="sod",
    title="Step-wise on-policy distillation, added to GRPO",
    axes=Axes(
        weight=WeightAxis(step=Choice(name="sod")),
        reward=RewardAxis(kind="grpo"),
        policy_gradient=PolicyGradientAxis(clip_high=0.28),
    ),
    paper="arXiv:2605.07725",
    notes="Code: delta 0.2 in the script, 0.5 in the class. Not here: the overlong penalty.",
)
