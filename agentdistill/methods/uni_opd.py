"""Uni-OPD: successes keep a lead over failures in what distillation says (arXiv 2605.03677).

Where in a group the mean advantage of successes is less than delta above that of failures, every
token of the successes is moved up and of the failures down by half of what is missing. delta = -inf
would be plain on-policy distillation. Its balancing of the data is not here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentdistill.methods.rules import Rows, rule
from agentdistill.methods.space import Axes, Choice, Method, WeightAxis

if TYPE_CHECKING:
    from torch import Tensor


@rule("shift", "margin", source="arXiv:2605.03677", delta=0.4)
def _margin(rows: Rows, delta: float) -> Tensor:
    """What is missing to the margin, added to every row of an episode."""
    import torch

    from agentdistill.advantage import margin_shift
    from agentdistill.weighting import segment_mean

    table, size = rows.table, len(rows.table.trajectories)
    valid = torch.tensor([t.reward_valid for t in table.trajectories], dtype=torch.bool)
    mean = segment_mean(table["advantage"], table.index["trajectory"], rows.mask, size)
    return rows.spread(margin_shift(mean, rows.rewards > 0, table.groups, valid, delta=delta))


UNI_OPD = Method(
    name="uni-opd",
    title="On-policy distillation with a margin between outcomes",
    axes=Axes(weight=WeightAxis(shift=Choice(name="margin"))),
    paper="arXiv:2605.03677",
    notes="Group scope, mean statistic, both sides, delta 0.4, as in the released scripts.",
)
