"""Paired comparisons of methods over replicates: what may be claimed, and how sure one is.

Invariants: a method is compared with another within a replicate, never across; without at least
three replicates nothing is claimed; the p-values of one table are adjusted together (Holm).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import show

from agentdistill.statistics import LEAST, holm, t_test
from agentdistill.statistics import nested as bootstrap


@dataclass(frozen=True, slots=True)
class Contrast:
    """``first`` minus ``second`` in success.

    Attributes:
        mean: over replicates.
        low: of the 95% interval of the paired t.
        high: of the same.
        bootstrap: 95% interval of the hierarchical bootstrap (replicates, then levels).
        p: two-sided, of the paired t.
    """

    first: str
    second: str
    n: int
    mean: float
    low: float
    high: float
    bootstrap: tuple[float, float]
    p: float


def contrast(rows: Sequence[Mapping[str, Any]], first: str, second: str) -> Contrast:
    """One comparison over the replicates in ``rows``."""
    differences = [_differences(row["policies"][first], row["policies"][second]) for row in rows]
    found = t_test([float(d.mean()) for d in differences])
    return Contrast(first, second, *found[:4], bootstrap(differences), found.p)


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Difference by level, without the levels where one of the two had a fault."""
    pairs = zip(first["outcomes"], second["outcomes"], strict=True)
    return np.array([int(a) - int(b) for a, b in pairs if "-" not in (a, b)], float)


def compare(rows: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, str]]) -> str:
    """A table of the declared ``pairs``; says so where there are too few replicates for claims."""
    if len(rows) < LEAST:
        return f"no comparison: {len(rows)} replicates, and a claim about a method needs three"
    found = [contrast(rows, *pair) for pair in pairs]
    adjusted = holm([one.p for one in found])
    lines = [
        [
            f"{one.first} - {one.second}",
            f"{one.mean:+.3f}",
            f"{one.low:+.3f} to {one.high:+.3f}",
            f"{one.bootstrap[0]:+.3f} to {one.bootstrap[1]:+.3f}",
            f"{one.p:.3f}",
            f"{p:.3f}",
        ]
        for one, p in zip(found, adjusted, strict=True)
    ]
    return show(("paired difference", "mean", "t, 95%", "bootstrap, 95%", "p", "Holm"), lines)
