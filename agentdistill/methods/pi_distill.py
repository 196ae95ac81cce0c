"""pi-Distill and PI-OPSD: privileged information, and how to do without it (arXiv 2602.04942).

pi-Distill: the model acts with privileged information I in its prompt (the actions of a successful
episode). R = R_env - beta · KL(pi(·|s, I) || pi(·|s)) over the episode, centred in its group
without a deviation, and the same advantages train both prompts: alpha times the privileged one, 1 -
alpha the plain one, whose ratio is to the privileged policy that sampled. PI-OPSD: the model acts
without I, and pays for the KL(pi(·|s) || pi(·|s, I)).

No code is published. Zero-advantage episodes are dropped there and stay in the mean here. The
penalty for words that give the secret away, and the one for length, are not here.
"""

from agentdistill.methods.schedule import Schedule
from agentdistill.methods.space import (
    Axes,
    ContextAxis,
    Method,
    RewardAxis,
    ScorerAxis,
    SignalAxis,
)

_PAPER = "arXiv:2602.04942"
_LIVE = ScorerAxis(source="self", update="live")
_REWARD = RewardAxis(kind="grpo", source="reward", normalise="none")

PI_DISTILL = Method(
    name="pi-distill",
    title="Acting with privileged information, trained with and without it",
    axes=Axes(
        actor="informed",
        informed_share=0.0,
        schedules={"informed_share": Schedule.model_validate({"from": 0.0, "to": 0.5})},
        scorer=_LIVE,
        context=ContextAxis(kind="actions", reader="actor"),
        signal=SignalAxis(divergence="reverse_kl", coupling="reward", coef=0.25),
        reward=_REWARD,
    ),
    paper=_PAPER,
    evidence="T",
    notes="informed_share is alpha, annealed from 0 to 0.5 as in the paper; it also ran 0 and 1.",
)

PI_OPSD = Method(
    name="pi-opsd",
    title="Acting without privileged information, paying for what it would change",
    axes=Axes(
        scorer=_LIVE,
        context=ContextAxis(kind="actions"),
        signal=SignalAxis(divergence="reverse_kl", coupling="reward", coef=0.5),
        reward=_REWARD,
    ),
    paper=_PAPER,
    evidence="T",
    notes="Text: the KL is in the reward (this). Appendix E.1: it is differentiated.",
)
