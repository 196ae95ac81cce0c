"""TAID: a target that moves from the student to the teacher (arXiv 2501.16937).

L = KL(p_t || pi_S) with p_t = softmax((1 - t) · logits of the student, detached + t · the
teacher's). t rises from 0.4 to 1, linearly at least, and faster while the loss falls.
"""

from agentdistill.methods.schedule import Schedule
from agentdistill.methods.space import Axes, Method, SignalAxis

TAID = Method(
    name="taid",
    title="Distillation to an interpolated, moving target",
    axes=Axes(
        actor="teacher",
        signal=SignalAxis(divergence="forward_kl", coupling="loss", share=0.4, rest="student"),
        schedules={
            "signal.share": Schedule.model_validate({"from": 0.4, "to": 1.0, "shape": "taid"})
        },
    ),
    paper="arXiv:2501.16937",
    notes="signal.share is t. Episodes are the teacher's, played anew; the paper's are a corpus.",
)
