"""Off-policy knowledge distillation: forward KL on states that the teacher visits.

L = mean over tokens of KL(pi_T || pi_S), full vocabulary, along episodes that the teacher plays.
``kd-sft`` trains on the teacher's tokens alone (SeqKD): what a teacher without log-probs allows.
"""

from agentdistill.methods.space import Axes, Method, SignalAxis

KD = Method(
    name="kd",
    title="Off-policy distillation on the teacher's episodes (forward KL)",
    axes=Axes(actor="teacher", signal=SignalAxis(divergence="forward_kl", coupling="loss")),
    paper="arXiv:1503.02531",
    notes="Token-level KL of Hinton et al. along sampled teacher episodes; no filter.",
)

KD_SFT = Method(
    name="kd-sft",
    title="Supervised fine-tuning on fresh teacher episodes (SeqKD)",
    axes=Axes(actor="teacher", signal=SignalAxis(divergence="nll", coupling="loss")),
    paper="arXiv:1606.07947",
    evidence="A",
    notes="Sampled teacher text where the paper takes the beam's mode; no success filter.",
)
