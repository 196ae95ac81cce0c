"""What the report shows of methods that weigh: weights, schedules, counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentdistill.report import report
from agentdistill.report.figures import counted, stages, weights
from agentdistill.report.read import read_runs
from agentdistill.report.words import number, percent
from tests import reports
from tests.reports import Reader, copied

run = reports.weighed


def charts(run: Path):
    return {chart.title: chart for chart in weights(stages(read_runs([run])))}


def logged(run: Path, stage: str) -> list[dict]:
    lines = (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def rewritten(run: Path, tmp_path: Path, stage: str, **more) -> Path:
    """A copy in which a stage logged ``more`` in every iteration."""
    mine = copied([run], tmp_path)
    lines = [json.dumps({**line, **more}) + "\n" for line in logged(run, stage)]
    (mine / "stages" / stage / "metrics.jsonl").write_text("".join(lines))
    return mine


def test_step_weights_are_the_logged_ones(run):
    chart = charts(run)["Step weights, stepped (sod)"]
    assert chart.head[1:] == ("mean", "least", "most", "mean of later steps")
    keys = [f"weight/step/{key}" for key in ("mean", "min", "max", "later_mean")]
    wanted = [tuple(number(line[key]) for key in keys) for line in logged(run, "stepped")]
    assert [line[1:] for line in chart.table] == wanted
    capped = charts(run)["Step weights at the cap"]
    shares = [percent(line["weight/step/at_cap"]) for line in logged(run, "stepped")]
    assert [cell for _, cell in capped.table] == shares
    # One weight alone is the whole signal's, and is drawn once.
    assert not [title for title in charts(run) if title.startswith("Weights of the signal")]


def test_the_product_is_drawn_where_it_is_something_else(run, tmp_path):
    mine = rewritten(run, tmp_path, "stepped", **{"weight/signal/mean": 0.25})
    assert {line[1] for line in charts(mine)["Weights of the signal, stepped (sod)"].table} == {
        "0.25"
    }


def test_schedules_and_penalties_have_charts(run):
    shares = [line["schedule/signal.share"] for line in logged(run, "moved")]
    assert len(set(shares)) == 3
    chart = charts(run)["Schedule of signal.share"]
    assert chart.head[1:] == ("moved",)
    assert [cell for _, cell in chart.table] == [number(share) for share in shares]
    paid = [line["kl_per_episode"] for line in logged(run, "told")]
    assert [c for _, c in charts(run)["Divergence of an episode"].table] == [number(paid[0])]


def test_missing_signal_is_drawn_where_some_is_missing(run, tmp_path):
    assert "Tokens without signal" not in charts(run)
    mine = rewritten(run, tmp_path, "stepped", zero_signal=0.5)
    assert {cell for _, cell in charts(mine)["Tokens without signal"].table} == {"50.0%"}


def test_counts_stand_below_the_stages(run, tmp_path):
    assert counted(stages(read_runs([run]))) == []
    counts = {"masked_contexts": 2, "without_note": 1, "skills": 1200, "used_skills": 0}
    mine = rewritten(run, tmp_path, "stepped", **counts, **{"weight/step/zero_first": 1.0})
    wanted = (
        "streams without the scorer's context: 6, episodes without a note: 3, "
        "episodes whose first step had no divergence: 3, skills in the end: 1,200"
    )
    assert counted(stages(read_runs([mine]))) == [("stepped", wanted)]
    report([mine], score=False)
    page = Reader((mine / "report.html").read_text()).text
    assert f"stepped, {wanted}." in page
    assert "Step weights, stepped (sod)" in page and "Schedule of signal.share" in page


@pytest.mark.parametrize("name", ["demos", "taught"])
def test_who_does_not_weigh_has_no_chart(run, name):
    assert not [title for title in charts(run) if name in title]
