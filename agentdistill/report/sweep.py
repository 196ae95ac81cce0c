"""A sweep over settings of a cascade as one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

from agentdistill.costs import episodes
from agentdistill.report.charts import Chart, curve_chart
from agentdistill.report.page import environment
from agentdistill.report.words import NOTHING, percent
from agentdistill.tuning import Point, Sweep

COLUMNS = (
    "rule", "N", "k", "success (95%)", "teacher", "cost", "uncached", "cached",
    "pays after", "pays, cached",
)  # fmt: skip

NOTE = (
    "teacher: share of the turns that it answered; N: samples of the student; k: demonstrations. "
    "Costs per episode: as paid, without any prompt cache, with an ideal one (estimated). pays "
    "after: episodes until the demonstrations have paid for themselves against the teacher alone, "
    "without and with a prompt cache."
)


def cells(point: Point) -> list[str]:
    """One setting, in the order of :data:`COLUMNS`."""
    result, cost = point.result, point.result.cost or {}
    low, high = result.interval
    money = (cost.get(kind) for kind in ("paid", "uncached", "cached"))
    even = [NOTHING] * 2 if point.even is None else [episodes(n) for n in point.even.values()]
    return [
        point.label,
        str(point.said.samples) if point.said.rule != "always" else NOTHING,
        str(point.said.k) if point.said.rule != "always" or point.said.k else NOTHING,
        f"{percent(result.success)} ({100 * low:.0f} to {100 * high:.0f})",
        percent(point.share),
        *(NOTHING if amount is None else f"{amount:.3g}" for amount in money),
        *even,
    ]


def areas(sweep: Sweep) -> list[str]:
    """A line for each rule: how far it lies above random escalation."""
    return [
        f"{curve.label}: {100 * curve.gain:+.1f} points above random escalation at equal share of "
        f"teacher calls (area {curve.area:.4f}, shares up to {curve.points[-1][0]:.0%})"
        for curve in sweep.curves
        if curve.gain is not None and curve.area is not None
    ]


def charts(sweep: Sweep) -> list[Chart]:
    """Success against the share of teacher calls, and against each kind of cost."""
    shares = {curve.label: curve.points for curve in sweep.curves}
    found = [
        curve_chart(
            "Success against teacher calls",
            shares,
            x_label="turns answered by the teacher",
            x_unit="rate",
            note="Random escalation is the line to beat.",
        )
    ]
    for kind in ("uncached", "cached"):
        found.append(
            curve_chart(
                f"Success against cost, {kind}",
                _by_cost(sweep.points, kind),
                x_label="money per 1,000 episodes",
            )
        )
    return [chart for chart in found if chart is not None]


def _by_cost(points: Sequence[Point], kind: str) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, dict[float, float]] = {}
    for point in points:
        if point.result.cost is not None:
            alone = point.said.rule in ("always", "never")
            name = {"always": "teacher alone", "never": "student alone"}.get(point.said.rule)
            label = name if alone and name else point.label.split(" ")[0]
            label += "" if point.said.rule == "always" else f", k={point.said.k}"
            mine = found.setdefault(label, {})
            mine[1000 * point.result.cost[kind]] = point.result.success
    return {label: sorted(some.items()) for label, some in found.items()}


def page(sweep: Sweep) -> str:
    """The whole file.

    Raises:
        MissingExtraError: Jinja2 is not installed.
    """
    engine = environment()
    source = engine.loader.get_source  # type: ignore[union-attr]
    css, js = (source(engine, name)[0] for name in ("report.css", "report.js"))
    return engine.get_template("sweep.html").render(
        title=f"{sweep.policy}: settings of a cascade",
        css=css,
        js=js,
        hash=base64.b64encode(hashlib.sha256(js.encode()).digest()).decode(),
        tasks=sweep.tasks,
        panel=sweep.panel,
        shown=sweep.demonstrations,
        charts=charts(sweep),
        columns=COLUMNS,
        lines=[cells(point) for point in sweep.points],
        note=NOTE,
        areas=areas(sweep),
    )
