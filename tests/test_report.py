"""The report: one file, nothing but what the run says, whatever is in it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from agentdistill import api
from agentdistill.curriculum import f2b_window
from agentdistill.errors import ConfigError, MissingExtraError, StoreError
from agentdistill.records import Actor, Author, Fault, Stream, Turn
from agentdistill.report import page, report
from agentdistill.report.figures import by_turn, curves, spent, stages
from agentdistill.report.read import read_runs
from agentdistill.report.sample import choose
from agentdistill.report.words import number
from agentdistill.store import Store
from tests import reports
from tests.cli_calls import answer, call, python, refused
from tests.reports import Reader, copied, hostile_trajectory, plant

runs = reports.runs


@pytest.fixture(scope="module")
def both(runs, tmp_path_factory):
    """The report over both seeds: what was written, and its text."""
    written = report(runs, tmp_path_factory.mktemp("page") / "both.html", trajectories=8)
    return written, Path(written.file).read_text()


# -- the file --------------------------------------------------------------------------------------


def test_the_file_asks_for_nothing_outside_itself(both):
    _, text = both
    seen = Reader(text)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(seen.tags)
    assert [value for name, value in seen.attributes if name == "src"] == []
    assert all(v.startswith("#") for n, v in seen.attributes if n == "href")
    assert not re.search(r"@import|url\(", text)
    [policy] = [v for _, v in seen.attributes if v.startswith("default-src")]
    [script] = re.findall(r"<script>(.*)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_ids_are_unique_and_links_have_targets(both):
    _, text = both
    attributes = Reader(text).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for name, value in attributes if name == "href"} <= set(ids)


def test_results_are_the_means_over_seeds(runs, both):
    files = [json.loads((r / "evaluation" / "taught-sampled.json").read_text()) for r in runs]
    rates = [values["success"] for values in files]
    text = Reader(both[1]).text
    assert f"{sum(rates) / 2:.1%}" in text
    assert "Mean of 2 seeds" in text
    assert both[0].results == ("expert", "taught", "distilled", "windowed")


def test_one_run_has_its_interval(runs, tmp_path):
    file = tmp_path / "one.html"
    report(runs[:1], file, trajectories=0)
    values = json.loads((runs[0] / "evaluation" / "expert.json").read_text())
    low, high = (100 * bound for bound in values["interval"])
    text = Reader(file.read_text()).text
    assert f"{low:.0f} to {high:.0f}" in text
    assert "95% Wilson" in text and "no bands" in text


def test_what_was_written_is_said(runs, both):
    written, text = both
    stored = 0
    for run in runs:
        for folder in (run / "stages").iterdir():
            with Store(folder, readonly=True) as store:
                stored += sum(ref.count for c in store.commits() for ref in c.shards)
    assert written.trajectories == stored
    assert written.shown == text.count('<details class="card"') == 24
    assert written.bytes == len(text.encode())
    assert f"{written.shown} of {stored}" in text
    assert written.finished and written.seeds == (0, 1)


def test_a_report_changes_nothing_and_repeats(runs, both, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in runs[0].rglob("*") if p.is_file()}
    file = tmp_path / "again.html"
    report(runs, file, trajectories=8)
    after = {p: p.stat().st_mtime_ns for p in runs[0].rglob("*") if p.is_file()}
    assert before == after
    assert file.read_text() == both[1]


def test_a_report_while_the_run_is_written(runs, tmp_path):
    with Store(runs[0] / "stages" / "distilled"):  # holds the lock, as a training does
        assert report(runs[:1], tmp_path / "r.html", score=False).shown > 0


# -- figures ---------------------------------------------------------------------------------------


def test_curves_leave_out_what_is_not_the_students(runs):
    rows = stages(read_runs(runs))
    found = {chart.title: [line.label for line in chart.lines] for chart in curves(rows)}
    assert found["Optimal actions"] == ["distilled", "windowed"]
    assert found["Loss"] == ["taught"]
    # The window of one or two turns ends most episodes: what is left is no success rate.
    assert "distilled" in found["Success"] and "windowed" not in found["Success"]


def test_curves_have_the_logged_numbers(runs):
    rows = stages(read_runs(runs[:1]))
    [stage] = rows["distilled"]
    chart = next(c for c in curves(rows) if c.title == "Divergence from the teacher")
    places = [i for i, cell in enumerate(chart.head) if cell == "distilled"]
    shown = [line[places[0]] for line in chart.table if line[places[0]] != "–"]  # noqa: RUF001
    logged = [number(line["divergence"]) for line in stage.metrics]
    assert shown == logged


def test_the_depth_of_a_curriculum(runs):
    found = read_runs(runs)
    _, facts = choose(found, "windowed", 4, 4, 0)
    for fact in facts:
        assert {n: d.allowed for n, d in fact.depth.items()} == {
            n: f2b_window(n, 2, 1, max_turns=12) for n in range(4)
        }
        assert all(depth.replayed == 0 for depth in fact.depth.values())


def test_weights_by_turn_are_drawn_when_a_method_logs_them(runs, tmp_path):
    run = copied(runs, tmp_path)
    file = run / "stages" / "distilled" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    more = [{**line, "weight_by_turn": [1.5, 0.5]} for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in more))
    maps = by_turn(stages(read_runs([run])))
    assert sorted(maps) == ["divergence_by_turn", "weight_by_turn"]
    assert {line[1] for line in maps["weight_by_turn"][0].table} == {"1.50", "0.50"}
    report([run], score=False)
    assert "Weight by turn over training" in (run / "report.html").read_text()


def test_evaluations_while_training_have_charts(runs, tmp_path):
    run = copied(runs, tmp_path)
    file = run / "stages" / "distilled" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1] |= {"tune/greedy/success": 0.25, "tune/greedy/invalid": 0.0}
    lines[3] |= {"tune/greedy/success": 0.75, "tune/greedy/invalid": None}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {chart.title: chart for chart in curves(stages(read_runs([run])))}
    chart = found["Success, greedy"]
    assert [cell for _, cell in chart.table] == ["25.0%", "75.0%"]
    assert not [title for title in found if title.startswith("Invalid")]


def test_time_adds_up(runs):
    found = read_runs(runs[:1])
    for item, stage in zip(spent(stages(found)), found[0].stages, strict=True):
        assert item.total == pytest.approx(stage.done["seconds"], abs=0.05)
        logged = sum(line.get("seconds/update", 0) for line in stage.metrics)
        assert item.seconds[2] == pytest.approx(logged)


# -- empty states ----------------------------------------------------------------------------------


def shown(run: Path, **options) -> str:
    report([run], **options)
    return Reader((run / "report.html").read_text()).text


def test_a_run_that_only_collected(tmp_path):
    api.collect("tests.toy:Corridor", "random", 6, output=str(tmp_path), only_success=False)
    text = shown(tmp_path / "collect")
    for words in ("Nothing was evaluated", "No stage has trained", "6 of 6", "episodes of random"):
        assert words in text


def test_a_run_that_has_not_begun(runs, tmp_path):
    run = tmp_path / "new"
    run.mkdir()
    shutil.copy(runs[0] / "config.yaml", run)
    text = shown(run)
    for words in (
        "not finished",
        "not begun",
        "No iteration has ended",
        "No episode has been kept",
    ):
        assert words in text


def test_a_run_that_stopped_early(runs, tmp_path):
    run = copied(runs, tmp_path)
    folder = run / "stages" / "windowed"
    (folder / "done.json").unlink()
    shutil.rmtree(folder / "model")
    shutil.rmtree(run / "evaluation")
    (run / "machine.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "succ')  # torn
    written = report([run])
    text = Reader((run / "report.html").read_text()).text
    assert not written.finished and written.results == ()
    assert written.scored > 0  # the teacher is there, the student of the end is not
    assert "unfinished" in text and "Nothing was evaluated" in text


def test_one_seed_of_two_is_not_finished(runs, tmp_path):
    run = copied(runs, tmp_path)
    (run / "stages" / "windowed" / "done.json").unlink()
    report([run, runs[1]], tmp_path / "r.html", score=False)
    text = Reader((tmp_path / "r.html").read_text()).text
    assert "finished in 1 of 2" in text and "not finished" in text


def test_faults_are_counted_and_shown(runs, tmp_path):
    run = copied(runs, tmp_path)
    fault = Fault("env", "the floor gave way", 0)
    broken = dataclasses.replace(hostile_trajectory("fault"), faults=(fault,))
    plant(run, [broken, dataclasses.replace(broken, sample=1)])
    text = shown(run, score=False, trajectories=6)
    assert re.search(r"demos\s*env\s*2\s*the floor gave way", text)
    assert 'data-kinds="fault"' in (run / "report.html").read_text()


def test_no_trajectories_on_demand(runs, tmp_path):
    written = report(runs, tmp_path / "none.html", trajectories=0)
    assert (written.shown, written.scored) == (0, 0)
    assert "No trajectory was asked for" in (tmp_path / "none.html").read_text()


def test_replayed_turns_are_marked(runs, tmp_path):
    run = copied(runs, tmp_path)
    turn = Turn(0, "there", Actor("expert"), author=Author.REPLAY, text="left", actions=("left",))
    own = Turn(1, "here", Actor("distilled"), text="right", actions=("right",))
    empty = Stream(*(np.zeros(0, d) for d in (np.int32, np.uint8, np.uint8, np.float32)))
    whole = dataclasses.replace(hostile_trajectory("replay"), turns=(turn, own), streams=(empty,))
    plant(run, [whole])
    assert "1 turn after 1 replayed" in shown(run, score=False, trajectories=6)


# -- errors ----------------------------------------------------------------------------------------


def test_what_is_no_run_is_refused(runs, tmp_path):
    assert "no such folder" in refused(2, "report", str(tmp_path / "nowhere"))
    assert "config.yaml" in refused(2, "report", str(tmp_path))
    with pytest.raises(ConfigError, match="at least one"):
        report([])


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    run = copied(runs, tmp_path)
    with pytest.raises(ConfigError, match="has seed 0"):
        report([runs[0], run])
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("iterations: 3", "iterations: 5"))
    with pytest.raises(ConfigError, match=r"differs from .* in stages\.1\.iterations"):
        report([runs[1], run])


def test_damaged_files_are_named(runs, tmp_path):
    run = copied(runs, tmp_path)
    (run / "evaluation" / "expert.json").write_text('{"policy": "expert"}')
    with pytest.raises(StoreError, match=r"expert\.json"):
        report([run])
    (run / "evaluation" / "expert.json").write_text("{")
    assert "expert.json" in refused(5, "report", str(run))


def test_what_is_missing_is_named(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"agentdistill\[report\]"):
        report(runs)


def test_scoring_without_torch_is_refused_only_on_demand(runs, tmp_path, monkeypatch):
    import importlib.util

    import agentdistill.report as package

    known = importlib.util.find_spec
    without = lambda name: None if name == "torch" else known(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.setattr(package, "find_spec", without)
    with pytest.raises(MissingExtraError, match=r"agentdistill\[train\]"):
        report(runs, tmp_path / "r.html", score=True)
    assert report(runs, tmp_path / "r.html").scored == 0
    assert "Not scored token by token" in (tmp_path / "r.html").read_text()


# -- the verb --------------------------------------------------------------------------------------


def test_verb_writes_into_the_run(runs, tmp_path):
    run = copied(runs, tmp_path)  # models are found although the folder moved
    told = answer("report", str(run), "--trajectories", "4")
    assert told["file"] == str(run / "report.html")
    assert told["scored"] == 8 and told["shown"] == 12
    said = call("report", str(run), "--no-score", "--output", str(tmp_path / "new" / "x.html"))
    assert said.exit_code == 0, said.stderr
    assert f"report: {tmp_path / 'new' / 'x.html'}" in said.stdout
    assert "0 scored" in said.stdout


def test_without_scoring_no_torch_is_imported(runs, tmp_path):
    code = (
        "import sys; from agentdistill.report import report;"
        f"report([{str(runs[0])!r}], {str(tmp_path / 'r.html')!r}, score=False);"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = python("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
