"""RLSD: the reward says which way, the teacher how far (arXiv 2604.03128).

A' = A (1 - l + l · clip(exp(sign(A) · Delta), 1 ± 0.2)) with Delta = log pi_T - log pi_old of the
model itself, shown the solution. Tokens that the informed model finds likelier than the student
move more where the episode went well, and less where it did not.
"""

from agentdistill.methods.space import (
    Axes,
    ContextAxis,
    Method,
    RewardAxis,
    ScorerAxis,
    SignalAxis,
)

RLSD = Method(
    name="rlsd",
    title="GRPO whose advantages are scaled by an informed self",
    axes=Axes(
        scorer=ScorerAxis(source="self", update="live"),
        context=ContextAxis(kind="gold"),
        signal=SignalAxis(coupling="magnitude", mixing=0.5, bound=0.2),
        reward=RewardAxis(kind="grpo"),
    ),
    paper="arXiv:2604.03128",
    evidence="T",
)
