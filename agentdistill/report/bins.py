"""From one number per iteration and seed to means and bands over parts of the training.

Invariants: a mean goes over seeds, each seed counting once; the band is their smallest and largest;
what is not there is NaN or None, never zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Track = Sequence[tuple[float, float]]
"""(x, y) of one seed, one pair per iteration."""
Tracks = Sequence[Track]
"""One track per seed."""


class Point(NamedTuple):
    """Over the seeds: mean, smallest, largest, and how many there were."""

    x: float
    mean: float
    low: float
    high: float
    seeds: int


def bounds(tracks: Tracks, most: int, shared: Tracks = ()) -> list[float]:
    """Bounds of bins of equal width from 0 to the largest x.

    Args:
        tracks: everything on the chart.
        most: bins at most.
        shared: tracks that are averaged with others. Where one of them skips a bin the mean jumps,
            so there are fewer bins if that helps.
    """
    width = max(x for track in tracks for x, _ in track) or 1.0
    size = max(1, min(most, max(len(track) for track in tracks)))
    for fewer in range(size, size // 3, -1):
        edges = [width * place / fewer for place in range(fewer + 1)]
        if all(_dense(track, edges) for track in shared):
            return edges
    return [width * place / size for place in range(size + 1)]


def _where(xs: Floats, edges: Sequence[float]) -> npt.NDArray[np.intp]:
    """Number of each one's bin; a bin holds its upper bound."""
    return np.clip(np.searchsorted(edges, xs, side="left") - 1, 0, len(edges) - 2)


def _dense(track: Track, edges: Sequence[float]) -> bool:
    """Whether ``track`` has a point in every bin from its first to its last one."""
    places = np.unique(_where(np.asarray([x for x, _ in track]), edges))
    return bool(len(places) == places[-1] - places[0] + 1)


def _binned(track: Track, edges: Sequence[float]) -> tuple[Floats, Floats]:
    """Mean x and y of one seed in each bin, NaN where there is nothing."""
    xs, ys = np.asarray(track, np.float64).reshape(-1, 2).T
    size, where = len(edges) - 1, _where(xs, edges)
    counts = np.bincount(where, minlength=size).astype(float)
    counts[counts == 0] = np.nan
    return (
        np.bincount(where, xs, minlength=size) / counts,
        np.bincount(where, ys, minlength=size) / counts,
    )


def over_seeds(seeds: Tracks, edges: Sequence[float]) -> list[Point | None]:
    """One point per bin, None where no seed has one."""
    found = [_binned(track, edges) for track in seeds if track]
    xs, ys = (np.stack([pair[axis] for pair in found]) for axis in (0, 1))
    points: list[Point | None] = []
    for place in range(ys.shape[1]):
        values = ys[:, place][~np.isnan(ys[:, place])]
        if not len(values):
            points.append(None)
            continue
        x = float(np.nanmean(xs[:, place]))
        low, high = float(values.min()), float(values.max())
        points.append(Point(x, float(values.mean()), low, high, len(values)))
    return points
