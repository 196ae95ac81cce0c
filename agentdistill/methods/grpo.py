"""GRPO: the reward-only control. No teacher; the group's own mean is the baseline.

A_i = (R_i - mean(R)) / (std(R) + eps) within the samples of one task, clipped policy gradient, no
KL to a reference. Averaged by trajectory: with short successful and long failing episodes the
token mean lets failures outweigh successes.
"""

from agentdistill.methods.space import Axes, Method, RewardAxis, SignalAxis

GRPO = Method(
    name="grpo",
    title="Group-relative policy optimisation (no teacher)",
    axes=Axes(
        signal=SignalAxis(divergence="none"),
        reward=RewardAxis(kind="grpo"),
        over="trajectory",
    ),
    paper="arXiv:2402.03300",
    notes="Sample standard deviation and eps 1e-6 as in verl; verl averages by token.",
)
