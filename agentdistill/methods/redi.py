"""REDI: learn from recorded successes and, less, against recorded failures (arXiv 2505.24850).

L = -c_+ log pi(y_+)/|y_+| + c_- log pi(y_-)/|y_-|, c_+ = 1 and c_- = 0.8, after a stage of SFT on
the successes alone. The mean runs over episodes of both kinds, so that a pair counts as one half of
each: hence ``coef: 2``. Collect with ``only_success: false``. What a window or a fault ended is no
failure, and is not unlearnt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentdistill.methods.rules import Rows, rule
from agentdistill.methods.space import Axes, Choice, Method, SignalAxis, WeightAxis

if TYPE_CHECKING:
    from torch import Tensor


@rule("trajectory", "signed", source="arXiv:2505.24850", positive=1.0, negative=0.8)
def _signed(rows: Rows, positive: float, negative: float) -> Tensor:
    """c_+ for successes, -c_- for failures, 0 for episodes that nobody can judge."""
    import torch

    from agentdistill.weights import signed

    judged = torch.tensor([float(t.reward_valid) for t in rows.table.trajectories])
    return rows.spread(judged * signed(rows.rewards, positive, negative))


REDI = Method(
    name="redi",
    title="Recorded episodes, successes learnt and failures unlearnt",
    axes=Axes(
        actor="data",
        signal=SignalAxis(divergence="nll", coupling="loss", coef=2.0),
        weight=WeightAxis(trajectory=Choice(name="signed")),
        over="trajectory",
    ),
    paper="arXiv:2505.24850",
    notes="Episodes are not paired by task; in the code each failure has its success.",
)
