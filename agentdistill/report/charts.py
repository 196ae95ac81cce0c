"""Line charts and heat maps as geometry: what the template draws, in percent of the plot.

The template puts lines and cells into an SVG that is stretched to its place, and words around it as
HTML, so that a chart fits a phone without its letters shrinking. A plotting library would bring
megabytes of script into every report, or pictures that nobody can point at.

Invariants: a chart that has no numbers is None; every number that is drawn can also be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from agentdistill.report.bins import Floats, Point, Tracks, bounds, over_seeds
from agentdistill.report.words import NOTHING, count, number, percent, short

BINS, CELLS, ROWS = 40, 24, 30
"""At most so many points of a line, columns of a heat map, and rows of one."""
SHADES = 9
"""Colours of a heat map."""


class Tick(NamedTuple):
    """Words at a place of an axis, in percent."""

    at: float
    text: str


class Hit(NamedTuple):
    """A region to point at, and what it says; in percent."""

    x: float
    y: float
    width: float
    height: float
    text: str
    shade: int = -1


@dataclass(frozen=True, slots=True)
class Line:
    """A line with its band, as SVG paths; ``band`` is "" for one seed, ``tone`` its colour."""

    label: str
    path: str
    band: str
    tone: int


@dataclass(frozen=True, slots=True)
class Chart:
    """Everything about a chart.

    Attributes:
        title: what is shown.
        note: what a reader has to know.
        x_label: of the horizontal axis.
        lines: empty for a heat map.
        x_ticks: from the left.
        y_ticks: from the top.
        hits: column by column.
        rows: regions per column.
        head: of the table of all values.
        table: its lines.
        scale: of a heat map: words at its lower and upper end.
    """

    title: str
    note: str
    x_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    hits: tuple[Hit, ...]
    rows: int
    head: tuple[str, ...]
    table: tuple[tuple[str, ...], ...]
    scale: tuple[str, str] = ("", "")


FORMATS: Mapping[str, Callable[[float | None], str]] = {
    "rate": percent,
    "nats": number,
    "turns": number,
    "": number,
}


def line_chart(
    title: str,
    tracks: Mapping[str, Tracks],
    *,
    x_label: str,
    unit: str,
    note: str = "",
    tones: Mapping[str, int] | None = None,
) -> Chart | None:
    """A chart with one line per entry of ``tracks``; None without numbers.

    Args:
        title: what is shown.
        tracks: by label.
        x_label: of the horizontal axis.
        unit: a key of :data:`FORMATS`.
        note: what a reader has to know.
        tones: colour of each label, so that a stage has the same in every chart.
    """
    tracks = {label: seeds for label, seeds in tracks.items() if any(seeds)}
    if not tracks:
        return None
    found = [[track for track in seeds if track] for seeds in tracks.values()]
    shared = [track for seeds in found for track in seeds if len(seeds) > 1]
    edges = bounds([track for seeds in found for track in seeds], BINS, shared)
    bands = {label: over_seeds(seeds, edges) for label, seeds in tracks.items()}
    points = [point for band in bands.values() for point in band if point]
    low = 0.0 if unit == "rate" else min(0.0, *(point.low for point in points))
    high = 1.0 if unit == "rate" else max(point.high for point in points)
    ticks = _ticks(low, high if high > low else low + 1, 5)
    bottom, top = min(low, ticks[0]), max(high, ticks[-1])
    frame = _Frame(edges[-1], bottom, top)
    lines = tuple(
        _line(label, [p for p in band if p], frame, (tones or {}).get(label, place))
        for place, (label, band) in enumerate(bands.items())
    )
    words = FORMATS[unit]
    table = _values(edges, bands, words)
    hits = tuple(
        Hit(frame.x(start), 0, frame.x(end) - frame.x(start), 100, _said(x_label, bands, line))
        for (start, end), line in zip(pairwise(edges), table, strict=True)
    )
    y_ticks = (Tick(frame.y(tick), _axis(tick, unit)) for tick in reversed(ticks))
    shown = tuple(line for line in table if any(cell != NOTHING for cell in line[1:]))
    head = (x_label, *bands)
    ticks_x = _x_ticks(edges[-1])
    return Chart(title, note, x_label, lines, ticks_x, tuple(y_ticks), hits, 1, head, shown)


def curve_chart(
    title: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    x_unit: str = "",
    unit: str = "rate",
    note: str = "",
) -> Chart | None:
    """A chart through given points, none of them averaged; None without points.

    Args:
        title: what is shown.
        curves: by label: (x, y), x at least 0 and increasing.
        x_label: of the horizontal axis.
        x_unit: a key of :data:`FORMATS`.
        unit: the same, of what is drawn.
        note: what a reader has to know.
    """
    curves = {label: points for label, points in curves.items() if points}
    if not curves:
        return None
    every = [point for points in curves.values() for point in points]
    width = max(x for x, _ in every) or 1.0
    high = 1.0 if unit == "rate" else max(y for _, y in every)
    ticks = _ticks(0.0, high if high > 0 else 1.0, 5)
    frame = _Frame(width, ticks[0], max(high, ticks[-1]))
    lines = tuple(
        Line(label, _path(points, frame), "", tone)
        for tone, (label, points) in enumerate(curves.items())
    )
    across, words = FORMATS[x_unit], FORMATS[unit]
    places = sorted({x for x, _ in every})
    table = tuple(
        (across(x), *(words(dict(points).get(x)) for points in curves.values())) for x in places
    )
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(places)), width]
    hits = tuple(
        Hit(frame.x(start), 0, frame.x(end) - frame.x(start), 100, _said(x_label, curves, line))
        for (start, end), line in zip(pairwise(edges), table, strict=True)
    )
    y_ticks = tuple(Tick(frame.y(tick), _axis(tick, unit)) for tick in reversed(ticks))
    x_ticks = tuple(
        Tick(frame.x(tick), _axis(tick, x_unit)) for tick in _ticks(0, width, 4) if tick <= width
    )
    head = (x_label, *curves)
    return Chart(title, note, x_label, lines, x_ticks, y_ticks, hits, 1, head, table)


class _Frame(NamedTuple):
    """From numbers to percent of the plot; y points down."""

    width: float
    bottom: float
    top: float

    def x(self, value: float) -> float:
        return round(100 * value / self.width, 2)

    def y(self, value: float) -> float:
        return round(100 * (self.top - value) / (self.top - self.bottom), 2)


def _line(label: str, band: Sequence[Point], frame: _Frame, tone: int) -> Line:
    path = _path([(point.x, point.mean) for point in band], frame)
    if all(point.seeds == 1 for point in band):
        return Line(label, path, "", tone)
    upper = [(point.x, point.high) for point in band]
    lower = [(point.x, point.low) for point in reversed(band)]
    return Line(label, path, _path(upper + lower, frame) + "Z", tone)


def _path(points: Sequence[tuple[float, float]], frame: _Frame) -> str:
    """An SVG path; a single point becomes a dash that can be seen."""
    if len(points) == 1:
        (x, y) = frame.x(points[0][0]), frame.y(points[0][1])
        return f"M{max(x - 1, 0):g} {y:g}H{min(x + 1, 100):g}"
    return "M" + "L".join(f"{frame.x(x):g} {frame.y(y):g}" for x, y in points)


def _values(
    edges: Sequence[float],
    bands: Mapping[str, Sequence[Point | None]],
    words: Callable[[float | None], str],
) -> tuple[tuple[str, ...], ...]:
    """All values as text: the bin, then each line's mean and band."""

    def cell(point: Point | None) -> str:
        if point is None:
            return NOTHING
        spread = f" ({words(point.low)} to {words(point.high)})" if point.seeds > 1 else ""
        return words(point.mean) + spread

    places = range(len(edges) - 1)
    return tuple(
        (count(_middle(bands, place, edges)), *(cell(band[place]) for band in bands.values()))
        for place in places
    )


def _middle(
    bands: Mapping[str, Sequence[Point | None]], place: int, edges: Sequence[float]
) -> float:
    """Where the points of a bin are, on average."""
    xs = [point.x for band in bands.values() if (point := band[place])]
    return sum(xs) / len(xs) if xs else (edges[place] + edges[place + 1]) / 2


def _said(x_label: str, labels: Iterable[str], line: Sequence[str]) -> str:
    values = (f"{label} {cell}" for label, cell in zip(labels, line[1:], strict=True))
    return f"{x_label} {line[0]}: {', '.join(values)}"


def _axis(value: float, unit: str) -> str:
    return f"{value:.0%}" if unit == "rate" else short(round(value, 6))


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers that span [low, high]."""
    raw = (high - low) / most
    size = 10 ** math.floor(math.log10(raw))
    step = size * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * place for place in range(first, last + 1)]


def _x_ticks(width: float) -> tuple[Tick, ...]:
    ticks = (tick for tick in _ticks(0, width, 4) if tick <= width * 1.001)
    return tuple(Tick(round(100 * tick / width, 2), short(round(tick, 6))) for tick in ticks)


# -- heat maps -------------------------------------------------------------------------------------


def heat_maps(
    titles: Mapping[str, str],
    rows: Mapping[str, Sequence[Sequence[tuple[float, Sequence[float | None]]]]],
    *,
    x_labels: Mapping[str, str],
    what: str,
) -> list[Chart]:
    """One map per entry of ``rows``: training from left to right, turns from the top down.

    Args:
        titles: of each map.
        rows: per map, per seed, per iteration: x, and a value per turn (None: nothing there).
        x_labels: of each map.
        what: is measured, with its unit.

    All maps share one colour scale, from 0 to their 98th percentile.
    """
    grids = {name: _grid(seeds) for name, seeds in rows.items() if any(seeds)}
    values = np.concatenate([grid.ravel() for _, _, grid in grids.values()] or [np.zeros(0)])
    values = values[~np.isnan(values)]
    if not len(values):
        return []
    top = max(float(np.percentile(values, 98)), 1e-9)
    return [
        _heat(titles[name], grid, edges, step, top, x_labels[name], what)
        for name, (edges, step, grid) in grids.items()
        if not np.isnan(grid).all()
    ]


def _grid(
    seeds: Sequence[Sequence[tuple[float, Sequence[float | None]]]],
) -> tuple[list[float], int, Floats]:
    """Bounds of the columns, turns per row, and the mean of each cell [rows, columns]."""
    depth = max((len(values) for track in seeds for _, values in track), default=0)
    step = math.ceil(depth / ROWS) or 1
    edges = bounds([[(x, 0.0) for x, _ in track] for track in seeds if track], CELLS)
    size = math.ceil(depth / step)
    grid = np.full((size, len(edges) - 1), np.nan)
    for row in range(size):
        tracks = [
            [
                (x, value)
                for x, values in track
                for value in values[row * step : (row + 1) * step]
                if value is not None and math.isfinite(value)
            ]
            for track in seeds
        ]
        if any(tracks):
            grid[row] = [p.mean if p else np.nan for p in over_seeds(tracks, edges)]
    return edges, step, grid


def _heat(
    title: str,
    grid: Floats,
    edges: Sequence[float],
    step: int,
    top: float,
    x_label: str,
    what: str,
) -> Chart:
    rows, columns = grid.shape
    names = [_turns(row, step) for row in range(rows)]
    spans = [f"{count(edges[c])} to {count(edges[c + 1])}" for c in range(columns)]
    wide, high = 100 / columns, 100 / rows
    hits = tuple(
        Hit(
            round(column * wide, 2),
            round(row * high, 2),
            round(wide, 2),
            round(high, 2),
            f"turn {names[row]}, {x_label} {spans[column]}: {number(grid[row, column])}",
            _shade(grid[row, column], top),
        )
        for column in range(columns)
        for row in range(rows)
    )
    every = math.ceil(rows / 6)
    y_ticks = tuple(Tick((row + 0.5) * high, names[row]) for row in range(0, rows, every))
    table = tuple(
        (f"turn {name}", *(number(value) for value in line))
        for name, line in zip(names, grid, strict=True)
    )
    scale = ("0", f"{number(top)} {what} or more")
    ticks = _x_ticks(edges[-1])
    head = (x_label, *(count(edge) for edge in edges[1:]))
    return Chart(title, "", x_label, (), ticks, y_ticks, hits, rows, head, table, scale)


def _turns(row: int, step: int) -> str:
    first = row * step + 1
    return str(first) if step == 1 else f"{first} to {first + step - 1}"


def _shade(value: float, top: float) -> int:
    """Which colour, -1 for none."""
    if math.isnan(value):
        return -1
    return int(min(max(value, 0.0) / top, 0.999) * SHADES)
