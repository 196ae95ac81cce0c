"""agent-distillation: demonstrations that begin as the teacher reasons, and SFT on them.

The teacher (arXiv 2505.17612) first answers the task step by step, without acting; what stands
before the first blank line is put into its mouth as the opening of its first step. That happens
where the episodes are collected (``first_thought: true``). Here they are learnt: only successful
ones without an unreadable answer, the openings included. Its second part, several candidates at
inference of which the executed results are compared, is no matter of training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentdistill.methods.rules import Rows, rule
from agentdistill.methods.space import Axes, Choice, Method, SignalAxis
from agentdistill.records import Verdict

if TYPE_CHECKING:
    from torch import Tensor


@rule("route", "clean", source="arXiv:2505.17612")
def _clean(rows: Rows) -> Tensor:
    """Rows of successful episodes in which every answer could be read."""
    unread = (Verdict.MISSING, Verdict.MALFORMED)
    clean = [
        t.success and not any(turn.verdict in unread for turn in t.acted)
        for t in rows.table.trajectories
    ]
    return rows.spread([float(value) for value in clean]) > 0


AGENT_DISTILLATION = Method(
    name="agent-distillation",
    title="SFT on demonstrations with a forced first thought",
    axes=Axes(
        actor="data",
        signal=SignalAxis(divergence="nll", coupling="loss", route=Choice(name="clean")),
        only_success=True,
    ),
    paper="arXiv:2505.17612",
    notes="The openings come from a collect stage with first_thought: true.",
)
