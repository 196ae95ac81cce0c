"""KEPO: hints where a whole group fails, distillation where a sample is good (arXiv 2602.00400).

GRPO; a JSD to a frozen teacher on samples whose score reaches tau; and where all samples of a task
fail, two of them give way to samples drawn with a hint in the prompt, once both succeed (at most
five tries). They are trained under the original prompt, without a ratio to what sampled them.

Their teacher writes the hint from the gold answer; ours is the recorded demonstration itself. Their
tau compares the sum of two reward functions (1.0 of 2); a score here is in [0, 1].
"""

from agentdistill.methods.space import (
    Axes,
    Choice,
    ContextAxis,
    GroupAxis,
    Method,
    RewardAxis,
    SignalAxis,
)

KEPO = Method(
    name="kepo",
    title="GRPO with hints for hopeless groups and gated distillation",
    axes=Axes(
        context=ContextAxis(kind="gold", reader="actor"),
        signal=SignalAxis(divergence="jsd", coupling="loss", route=Choice(name="above")),
        reward=RewardAxis(kind="grpo", eps=1e-4),
        group=GroupAxis(edit="hint"),
    ),
    paper="arXiv:2602.00400",
    notes="Code draws places of replaced samples with repetition; here they differ.",
)
