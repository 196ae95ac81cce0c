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

DRAWS = 10_000


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
    from scipy import stats

    differences = [_differences(row["policies"][first], row["policies"][second]) for row in rows]
    means = np.array([d.mean() for d in differences])
    n, mean = len(means), float(means.mean())
    error = float(means.std(ddof=1)) / n**0.5 if n > 1 else float("nan")
    reach = float(stats.t.ppf(0.975, n - 1)) * error if n > 1 else float("nan")
    p = float(stats.ttest_1samp(means, 0.0).pvalue) if n > 1 and error > 0 else 1.0
    return Contrast(first, second, n, mean, mean - reach, mean + reach, bootstrap(differences), p)


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Difference by level, without the levels where one of the two had a fault."""
    pairs = zip(first["outcomes"], second["outcomes"], strict=True)
    return np.array([int(a) - int(b) for a, b in pairs if "-" not in (a, b)], float)


def bootstrap(differences: Sequence[np.ndarray[Any, Any]], seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean: replicates are drawn again, and the levels within each of them."""
    generator = np.random.default_rng(seed)
    n = len(differences)
    chosen = generator.integers(n, size=(DRAWS, n))
    # The mean over redrawn levels of one replicate, as often as that replicate is drawn.
    means = np.empty((DRAWS, n))
    for number, values in enumerate(differences):
        where = chosen == number
        places = generator.integers(len(values), size=(int(where.sum()), len(values)))
        means[where] = values[places].mean(axis=1)
    low, high = np.quantile(means.mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given. Source: Holm (1979)."""
    order, adjusted, least = np.argsort(p), [0.0] * len(p), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = least
    return adjusted


def compare(rows: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, str]]) -> str:
    """A table of the declared ``pairs``; says so where there are too few replicates for claims."""
    if len(rows) < 3:
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
