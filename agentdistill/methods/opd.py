"""On-policy distillation: the teacher judges the student's own tokens. The neutral point.

``opd`` is the sampled-token form: A_t = log pi_T - log pi_old with a clipped policy gradient, whose
expectation is the gradient of the reverse KL. ``opd-exact`` sums the reverse KL over the
vocabulary instead: the same expectation without the sampling noise, where the teacher is white-box.
"""

from agentdistill.methods.space import Axes, Method, SignalAxis

OPD = Method(
    name="opd",
    title="On-policy distillation, sampled token",
    axes=Axes(),
    paper="https://thinkingmachines.ai/blog/on-policy-distillation/",
    notes=(
        "tinker-cookbook uses an unclipped importance ratio and no reward; the PPO clip here is "
        "TCOD's and is inactive with one update per iteration."
    ),
)

OPD_EXACT = Method(
    name="opd-exact",
    title="On-policy distillation, exact reverse KL",
    axes=Axes(signal=SignalAxis(divergence="reverse_kl", coupling="loss")),
    paper="arXiv:2306.13649",
    notes="GKD with lambda = 1 and beta = 1: reverse KL over the whole vocabulary.",
)
