"""GKD: generalised knowledge distillation (arXiv 2306.13649; trl's GKDTrainer).

With probability lambda a batch is the student's own, otherwise recorded episodes; the loss is the
generalised Jensen-Shannon divergence to the teacher, without a gradient through the sampling.
trl divides both logits by its sampling temperature of 0.9; rollouts here are drawn at 1 (K11).
"""

from agentdistill.methods.space import Axes, Method, SignalAxis

GKD = Method(
    name="gkd",
    title="Generalised knowledge distillation, half on-policy",
    axes=Axes(actor="mixed", signal=SignalAxis(divergence="jsd", coupling="loss")),
    paper="arXiv:2306.13649",
    notes="lambda is student_share (0.5); an iteration is one batch. Temperature 1, trl's is 0.9.",
)
