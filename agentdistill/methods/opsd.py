"""OPSD: the student's start, shown the solution, teaches the student (arXiv 2601.18734).

Teacher = the initial weights (adapters off), reading the task and its recorded solution; the
student reads the task. Code: JSD with beta 0.5 over the vocabulary. Paper: forward KL with a clip
per token (``signal: {divergence: forward_kl, clip: …}``); a running mean of the weights is an
option of the code (``scorer: {update: ema, rate: 0.001}``).
"""

from agentdistill.methods.space import Axes, ContextAxis, Method, ScorerAxis, SignalAxis

OPSD = Method(
    name="opsd",
    title="On-policy self-distillation with the solution in the teacher's prompt",
    axes=Axes(
        scorer=ScorerAxis(source="self", update="frozen"),
        context=ContextAxis(kind="gold"),
        signal=SignalAxis(divergence="jsd", coupling="loss"),
    ),
    paper="arXiv:2601.18734",
    notes="Code: JSD 0.5. Paper: forward KL, clipped. Sampling at 1, theirs 1.1 with top-p (K11).",
)
