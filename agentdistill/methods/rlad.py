"""RLAD: the teacher as a share of the ratio's anchor (TRRD, arXiv 2602.22495).

r = pi_th / (pi_old^a · pi_T^(1 - a)) in GRPO's clipped surrogate. By the formula a = 1 is GRPO and
a = 0 is held by the teacher alone; one sentence of the paper has it the other way round. Here
``signal.mixing`` is 1 - a. The paper's KL to a reference is not here.
"""

from agentdistill.methods.space import Axes, Method, RewardAxis, SignalAxis

RLAD = Method(
    name="rlad",
    title="GRPO whose ratio is anchored at old policy and teacher",
    axes=Axes(
        signal=SignalAxis(coupling="anchor", mixing=0.5),
        reward=RewardAxis(kind="grpo"),
    ),
    paper="arXiv:2602.22495",
    evidence="T",
    notes="The formula, not the sentence about its ends.",
)
