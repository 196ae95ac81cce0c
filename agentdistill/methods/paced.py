"""PACED: distil most where the student sometimes succeeds (arXiv 2603.11178).

Every task's distillation loss is weighted by p^a (1 - p)^b, p the student's share of successes on
it; a = b = 1. Forward KL for an external teacher; in stages, forward then reverse KL was best (two
train stages, the second with ``axes: {signal: {divergence: reverse_kl}}``). The paper does not say
how the weights are normalised over a batch (``task.normalise``).
"""

from agentdistill.methods.space import Axes, Method, SignalAxis, TaskAxis

PACED = Method(
    name="paced",
    title="Distillation weighted by how often the student succeeds",
    axes=Axes(
        task=TaskAxis(weight="pass_rate"),
        signal=SignalAxis(divergence="forward_kl", coupling="loss"),
    ),
    paper="arXiv:2603.11178",
    evidence="S",
    notes="p is counted over all episodes of a task so far, this batch included.",
)
