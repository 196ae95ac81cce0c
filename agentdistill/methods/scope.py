"""SCOPE: successes are imitated, failures distilled (arXiv 2604.10688).

Successful samples take a weighted NLL, the others the sampled reverse KL to the teacher as an
advantage. Weights are softmax within each group's branch, with mean 1: successes by the student's
perplexity (unsure ones count more), failures by the teacher's, inverted (what it is sure of).
The released script has the first sign the other way round (``weight.trajectory.sign: -1``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentdistill.methods.rules import Rows, rule
from agentdistill.methods.space import Axes, Choice, Method, SignalAxis, WeightAxis

if TYPE_CHECKING:
    from torch import Tensor


@rule(
    "trajectory",
    "perplexity",
    needs=("logp/old", "logp/teacher"),
    source="arXiv:2604.10688",
    sign=1.0,
    tau=1.0,
)
def _perplexity(rows: Rows, sign: float, tau: float) -> Tensor:
    """Softmax of mean log-probabilities within the group, for either outcome apart."""
    import torch

    from agentdistill.weighting import segment_mean
    from agentdistill.weights import softmax_ppl

    table, size = rows.table, len(rows.table.trajectories)
    won = rows.rewards > 0
    total = torch.zeros(size)
    for column, branch, way in (("logp/old", won, sign), ("logp/teacher", ~won, -1.0)):
        logp = segment_mean(rows.column(column), table.index["trajectory"], rows.mask, size)
        total = total + softmax_ppl(logp, table.groups, branch, way, tau)
    return rows.spread(total)


SCOPE = Method(
    name="scope",
    title="Successes imitated, failures distilled",
    axes=Axes(
        signal=SignalAxis(route=Choice(name="failure")),
        also=(SignalAxis(divergence="nll", coupling="loss", route=Choice(name="success")),),
        weight=WeightAxis(trajectory=Choice(name="perplexity")),
    ),
    paper="arXiv:2604.10688",
    notes="Signs as in the paper; the released script's differ for successes.",
)
