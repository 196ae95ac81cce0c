"""Skill-SD: skill-conditioned self-distillation (arXiv 2604.10674).

The teacher is the student itself, copied before every rollout, and reads one skill more: a text
that an analyser wrote about an earlier episode of the same task, chosen by an upper confidence
bound. The student never sees a skill. L = L_grpo + lambda · mean(rho (exp(-ell) - 1 + ell)) with
ell = log pi_th - log pi_T(·|skill) and rho = pi_th / pi_old: its gradient is rho · ell, the reverse
KL's. Rewards are completion rates; lambda is 1e-3, because the term is summed over long episodes.

No code is published. Where a task has no skill yet the paper's teacher reads the plain prompt and
agrees with the student; here those rows are masked and counted, and stay in the denominator
(``shared``), which is the same loss.
"""

from agentdistill.methods.space import (
    Axes,
    ContextAxis,
    Method,
    PolicyGradientAxis,
    RewardAxis,
    ScorerAxis,
    SignalAxis,
)

SKILL_SD = Method(
    name="skill-sd",
    title="Skill-conditioned self-distillation, added to GRPO",
    axes=Axes(
        scorer=ScorerAxis(source="self", update="sync"),
        context=ContextAxis(kind="skill"),
        signal=SignalAxis(divergence="rho_k3", coupling="loss", coef=1e-3),
        reward=RewardAxis(kind="grpo", source="score", eps=1e-8),
        policy_gradient=PolicyGradientAxis(clip_high=0.28),
        shared=True,
    ),
    paper="arXiv:2604.10674",
    evidence="T",
    notes="The paper's analyser is a large chat model; analyser: grounded needs none.",
)
