"""Numbers about episodes and tables: what is logged while training and printed in results.

Invariants: faults of environments and engines are counted apart and are in no rate; the rate of
optimal actions is over turns taken in states that could still be solved, and an unreadable or
invalid action there is not optimal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from agentdistill.records import Trajectory, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from agentdistill.methods.space import Axes
    from agentdistill.table import Table


class Interval(NamedTuple):
    """Bounds of a rate."""

    low: float
    high: float


def wilson(successes: int, trials: int, z: float = 1.959964) -> Interval:
    """Wilson's score interval of a rate (95% by default); (0, 1) without trials.

    Source: Wilson (1927), JASA 22.
    """
    if trials == 0:
        return Interval(0.0, 1.0)
    rate = successes / trials
    scale = 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials**2)) / scale
    # The bounds of 0 and 1 are the rate itself, which rounding must not put outside.
    return Interval(max(0.0, min(centre - spread, rate)), min(1.0, max(centre + spread, rate)))


def of_trajectories(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Rates and means over episodes without faults; ``episodes`` and ``faults`` are counts."""
    sound = [t for t in trajectories if not t.faults]
    judged = [t for t in sound if t.reward_valid]
    turns = [turn for t in sound for turn in t.acted]
    results = [result for turn in turns for result in turn.results]
    optimal = [result.optimal for result in results if result.optimal is not None]
    return {
        "episodes": len(sound),
        "faults": len(trajectories) - len(sound),
        "success": _mean([t.success for t in judged]),
        "score": _mean([t.score for t in judged]),
        "optimal": _mean(optimal),
        "turns": _mean([len(t.acted) for t in sound]),
        "invalid": _mean([turn.verdict is not Verdict.OK for turn in turns]),
        "censored": len(sound) - len(judged),
    }


def _mean(values: Sequence[float]) -> float | None:
    """The mean, None without values (nothing was measured)."""
    return sum(values) / len(values) if values else None


def of_table(table: Table, axes: Axes) -> dict[str, Any]:
    """Divergence between student and teacher, overall and by turn (TCOD's diagnostic), in nats.

    Exact where the method compares distributions, else the sampled estimate log pi_S - log pi_T.
    """
    import torch

    from agentdistill.weighting import segment_count, segment_mean

    if not axes.scores or not len(table):
        return {}
    values = _divergence(table, axes)
    if values is None:
        return {}
    mask = table["rows/kd"] & ~torch.isnan(values)
    if not bool(mask.any()):
        return {}
    turn = table.index["turn"]
    size = int(turn.max()) + 1
    means = segment_mean(values, turn, mask, size)
    counts = segment_count(turn, mask, size)
    by_turn = [round(float(m), 5) if c else None for m, c in zip(means, counts, strict=True)]
    return {"divergence": float(values[mask].mean()), "divergence_by_turn": by_turn}


def _divergence(table: Table, axes: Axes) -> Tensor | None:
    """What the first signal compares, per row [N]; None where it was not kept."""
    from agentdistill.methods.steps import target_column

    signal = axes.signal
    for name in (f"loss/{signal.divergence}", "divergence/0"):
        if axes.full and name in table.columns:
            return table[name]
    if axes.full or target_column(axes, signal) not in table.columns:
        return None
    own = table.columns.get("logp/old", table["logp/sampler"])
    return own - table[target_column(axes, signal)]
