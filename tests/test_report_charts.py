"""Geometry of the report's charts: means, bands, bins, shades."""

from __future__ import annotations

import math
import re

from agentdistill.report.charts import heat_maps, line_chart


def test_bands_are_smallest_and_largest_over_seeds():
    tracks = {"a": [[(1.0, 0.2), (2.0, 0.4)], [(1.0, 0.4), (2.0, 0.8)]]}
    chart = line_chart("t", tracks, x_label="x", unit="rate")
    assert [line[1] for line in chart.table] == ["30.0% (20.0% to 40.0%)", "60.0% (40.0% to 80.0%)"]
    [line] = chart.lines
    assert line.path == "M50 70L100 40"  # percent of the plot, downwards
    assert line.band == "M50 60L100 20L100 60L50 80Z"


def test_one_seed_has_no_band_and_bins_are_means():
    track = [(float(x), x / 100) for x in range(1, 101)]
    chart = line_chart("t", {"a": [track]}, x_label="x", unit="rate")
    assert chart.lines[0].band == ""
    assert len(chart.table) == 40
    assert chart.table[0] == ("2", "1.5%")  # iterations 1 and 2, of 100 in 40 bins
    assert chart.table[-1] == ("99", "99.0%")


def test_seeds_count_once_each():
    tracks = {"a": [[(1.0, 0.0)] * 9, [(1.0, 1.0)]]}
    chart = line_chart("t", tracks, x_label="x", unit="rate")
    shown = [line[1] for line in chart.table if "%" in line[1]]
    assert shown == ["50.0% (0.0% to 100.0%)"]


def test_means_do_not_jump_where_seeds_stand_apart():
    """Ten points each, at other places: in ten bins some would hold one seed only."""
    one = [(float(x), 0.0) for x in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)]
    other = [(float(x) + 0.9, 1.0) for x in (0.05, 1.2, 2.0, 3.2, 4.0, 5.2, 6.0, 7.2, 8.0, 9.1)]
    chart = line_chart("t", {"a": [one, other]}, x_label="x", unit="rate")
    assert {cell for _, cell in chart.table} == {"50.0% (0.0% to 100.0%)"}
    assert 4 <= len(chart.table) < 10


def test_charts_without_numbers_and_with_one():
    assert line_chart("t", {"a": [[], []]}, x_label="x", unit="rate") is None
    assert line_chart("t", {}, x_label="x", unit="rate") is None
    chart = line_chart("t", {"a": [[(0.0, 0.0)]]}, x_label="x", unit="nats")
    assert chart.lines[0].path.startswith("M") and "nan" not in chart.lines[0].path


def test_negative_values_stay_inside():
    chart = line_chart("t", {"a": [[(1.0, -0.5), (2.0, 1.0)]]}, x_label="x", unit="nats")
    heights = [float(y) for y in re.findall(r" ([\d.-]+)", chart.lines[0].path)]
    assert all(0 <= y <= 100 for y in heights)
    assert [tick.text for tick in chart.y_ticks][-1] == "\u22120.5"


def test_heat_maps_share_a_scale_and_leave_gaps():
    rows = {
        "a": [[(1.0, [0.0, None]), (2.0, [1.0, 2.0])]],
        "b": [[(1.0, [0.5])]],
    }
    names = {name: name for name in rows}
    one, two = heat_maps(names, rows, x_labels=names, what="nats")
    assert [hit.shade for hit in one.hits] == [0, -1, 4, 8]  # column by column
    assert [hit.shade for hit in two.hits] == [2]
    assert one.scale == two.scale
    assert one.hits[1].text.startswith("turn 2, a 0 to 1:")


def test_long_episodes_share_rows():
    rows = {"a": [[(1.0, [float(turn) for turn in range(90)])]]}
    [chart] = heat_maps({"a": "a"}, rows, x_labels={"a": "x"}, what="")
    assert chart.rows == 30
    assert chart.table[0] == ("turn 1 to 3", "1.00")


def test_values_that_are_not_finite_are_left_out():
    rows = {"a": [[(1.0, [math.inf, 1.0, math.nan])]]}
    [chart] = heat_maps({"a": "a"}, rows, x_labels={"a": "x"}, what="")
    assert [hit.shade >= 0 for hit in chart.hits] == [False, True, False]
