"""TCOD: temporal curricula for on-policy distillation (arXiv 2604.24005).

Forward to backward (f2b): the student plays the first k(n) turns of an episode, and k grows with
the iteration n. Backward to forward (b2f): a demonstration is replayed up to its last k(n) turns
and the student goes on from there. Replayed turns are state and history; they carry no loss.

Paper and code differ. The paper writes KL(teacher || student); the code uses the sampled-token
reverse KL as a PPO advantage, which is what these presets do (``-exact`` sums over the vocabulary).
After the hand-over the paper's student has k turns, the code's may go on to the step limit
(``start.horizon: k | remaining``). The paper's eta is 2, the released configurations use 4 to 6.
f2b averages by turn (the ALFWorld configuration, against length collapse), b2f by token.
"""

from agentdistill.methods.space import Axes, Method, SignalAxis, StartAxis

_PAPER = "arXiv:2604.24005"
_EXACT = SignalAxis(divergence="reverse_kl", coupling="loss")

F2B = Method(
    name="tcod-f2b",
    title="TCOD, forward to backward",
    axes=Axes(start=StartAxis(kind="f2b"), over="turn"),
    paper=_PAPER,
    notes="Code: k1 advantage, mean over turns. Paper: writes the forward KL.",
)

B2F = Method(
    name="tcod-b2f",
    title="TCOD, backward to forward",
    axes=Axes(start=StartAxis(kind="b2f")),
    paper=_PAPER,
    notes="Code: until the step limit after the hand-over. Paper: k turns (start.horizon: k).",
)

F2B_EXACT = Method(
    name="tcod-f2b-exact",
    title="TCOD, forward to backward, exact reverse KL",
    axes=Axes(start=StartAxis(kind="f2b"), signal=_EXACT, over="turn"),
    paper=_PAPER,
    evidence="I",
    notes="The curriculum of the paper with the exact divergence instead of the code's estimator.",
)

B2F_EXACT = Method(
    name="tcod-b2f-exact",
    title="TCOD, backward to forward, exact reverse KL",
    axes=Axes(start=StartAxis(kind="b2f"), signal=_EXACT),
    paper=_PAPER,
    evidence="I",
    notes="The curriculum of the paper with the exact divergence instead of the code's estimator.",
)
