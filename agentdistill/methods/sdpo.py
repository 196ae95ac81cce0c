"""SDPO and SRPO: a sample that failed is taught by itself, shown a sibling that succeeded.

SDPO (arXiv 2601.20802): the teacher is a running mean of the student and reads, besides the task, a
successful sibling of the same group (and, where there is none, how the episode ended). JSD with
beta 0.5 on the student's 100 likeliest tokens and a tail, weighted by min(pi_th / pi_old, 2); it
replaces the reward's term. Samples without anything to be shown are masked.

SRPO (arXiv 2604.02288): failures that have something to be shown take SDPO's term, weighted by
exp(-beta H_T) with mean 1; all others take GRPO's. Both terms share one denominator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentdistill.methods.rules import Rows, rule
from agentdistill.methods.space import (
    Axes,
    Choice,
    ContextAxis,
    Method,
    PolicyGradientAxis,
    RewardAxis,
    ScorerAxis,
    SignalAxis,
    WeightAxis,
)

if TYPE_CHECKING:
    from torch import Tensor


@rule("token", "entropy", needs=("entropy/teacher",), source="arXiv:2604.02288", beta=1.0)
def _entropy(rows: Rows, beta: float) -> Tensor:
    """exp(-beta H) of the teacher's entropy: what it is unsure of counts less."""
    from agentdistill.weights import entropy_weight

    return entropy_weight(rows.column("entropy/teacher"), rows.mask, beta)


_SCORER = ScorerAxis(source="self", update="ema", rate=0.05)
_SIGNAL = {"divergence": "jsd", "coupling": "loss", "top_k": 100, "ratio_cap": 2.0}

SDPO = Method(
    name="sdpo",
    title="Self-distillation from a successful sibling",
    axes=Axes(
        scorer=_SCORER,
        context=ContextAxis(kind="sibling", feedback="fallback"),
        signal=SignalAxis.model_validate(_SIGNAL),
        policy_gradient=PolicyGradientAxis(tis_cap=2.0),
    ),
    paper="arXiv:2601.20802",
    notes="Code: running mean 0.05; a trust region is signal.share 0.95 with rest: student.",
)

SRPO = Method(
    name="srpo",
    title="Failures learn from a sibling, the rest from the reward",
    axes=Axes(
        scorer=_SCORER,
        context=ContextAxis(kind="sibling"),
        signal=SignalAxis.model_validate({**_SIGNAL, "route": "failure"}),
        weight=WeightAxis(token=Choice(name="entropy"), normalise="mean1"),
        reward=RewardAxis(kind="grpo", route=Choice(name="rest")),
        shared=True,
    ),
    paper="arXiv:2604.02288",
    evidence="T",
)
