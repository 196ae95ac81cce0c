"""Supervised fine-tuning on recorded episodes (also SeqKD, when a teacher recorded them).

L = mean over tokens of -log pi(y | s), on what the actor wrote; observations are context. The
success filter is on: that is what the field calls rejection sampling fine-tuning.
"""

from agentdistill.methods.space import Axes, Method, SignalAxis

SFT = Method(
    name="sft",
    title="Supervised fine-tuning on recorded episodes",
    axes=Axes(
        actor="data",
        signal=SignalAxis(divergence="nll", coupling="loss"),
        only_success=True,
    ),
    notes="Textbook.",
)
