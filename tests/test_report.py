"""The report: one file, nothing but what the run says, whatever is in it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from agentdistill import api
from agentdistill.curriculum import f2b_window
from agentdistill.errors import ConfigError, MissingExtraError, StoreError
from agentdistill.records import Actor, Author, Fault, StepResult, Stream, Task, Trajectory, Turn
from agentdistill.report import page, report
from agentdistill.report.charts import heat_maps, line_chart
from agentdistill.report.figures import by_turn, curves, spent, stages
from agentdistill.report.read import read_runs
from agentdistill.report.sample import DIVERGENT, FAILED, FIRST, LAST, choose, trim
from agentdistill.report.score import pieces
from agentdistill.report.tokens import NAN, Token
from agentdistill.report.words import clean, duration, number
from agentdistill.store import Store
from tests.cli_calls import answer, call, python, refused
from tests.toy import micro

HOSTILE = "</pre><script>window.hacked=1</script><img src=x onerror='hacked=1'>\"'&amp; {{ 7*7 }}"
NASTY = "\x1b[31mred\x1b[0m \x00 \u202eevil\u202c \ud800 \x85 end\r\n"


class Reader(HTMLParser):
    """Elements, attributes, and the text outside of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._inside = tag if tag in ("style", "script") else self._inside

    def handle_endtag(self, tag):
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data):
        if not self._inside:
            self.text += data


def recipe(output: Path, **changes):
    """Four stages that take a second or two."""
    base = micro(output)
    tiny = {"hidden": 16, "heads": 1, "layers": 1, "tokenizer": {"vocabulary": 300, "episodes": 20}}
    student = {"teacher": "taught", "tasks": 4, "iterations": 4}
    names = ["expert", "taught", "distilled", "windowed"]
    return {
        **base,
        "models": {"teacher": tiny, "student": tiny},
        "stages": [
            {"name": "demos", "do": "collect", "episodes": 12, "batch": 6},
            {"name": "taught", "model": "teacher", "method": "sft", "data": "demos", "tasks": 4,
             "iterations": 3},
            {"name": "distilled", "method": "opd", **student},
            {"name": "windowed", "method": "tcod-f2b", **student},
        ],
        "evaluate": {"policies": names, "tasks": 4},
        **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two seeds of one recipe."""
    output = tmp_path_factory.mktemp("runs")
    return [
        api.distill(recipe(output, name=f"seed{seed}", seed=seed)).path for seed in (0, 1)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def both(runs, tmp_path_factory):
    """The report over both seeds: what was written, and its text."""
    written = report(runs, tmp_path_factory.mktemp("page") / "both.html", trajectories=8)
    return written, Path(written.file).read_text()


def copied(runs, tmp_path: Path) -> Path:
    """A run of one's own to spoil."""
    return Path(shutil.copytree(runs[0], tmp_path / "copy"))


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


# -- charts ----------------------------------------------------------------------------------------


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


def test_time_adds_up(runs):
    found = read_runs(runs[:1])
    for item, stage in zip(spent(stages(found)), found[0].stages, strict=True):
        assert item.total == pytest.approx(stage.done["seconds"], abs=0.05)
        logged = sum(line.get("seconds/update", 0) for line in stage.metrics)
        assert item.seconds[2] == pytest.approx(logged)


# -- trajectories ----------------------------------------------------------------------------------


def test_the_choice_covers_beginning_end_and_failures(runs):
    found = read_runs(runs)
    items, facts = choose(found, "distilled", 12, 24, 0)
    again, _ = choose(found, "distilled", 12, 24, 0)
    other, _ = choose(found, "distilled", 12, 2, 1)

    def ids(chosen):
        return [item.trajectory.id for item in chosen]

    assert ids(items) == ids(again) != ids(other)
    assert sum(fact.count for fact in facts) == 2 * 4 * 4
    reasons = {reason for item in items for reason in item.reasons}
    assert {FIRST, LAST, FAILED} <= reasons
    for item in items:
        if FAILED in item.reasons:
            assert not item.trajectory.success
        if FIRST in item.reasons:
            assert item.iteration == 0
    kept = trim(items, 5)
    assert len(kept) == 5


def test_trim_keeps_the_most_divergent(runs):
    items, _ = choose(read_runs(runs), "distilled", 8, 16, 0)
    for place, item in enumerate(items):
        item.tokens = {0: [Token("x", -1.0, -1.0 - place, NAN)]}
    top = max(items, key=lambda item: item.divergence)
    assert top.divergence == len(items) - 1
    kept = trim(items, 8)
    assert [item for item in kept if DIVERGENT in item.reasons].count(top) == 1
    assert sum(DIVERGENT in item.reasons for item in items) == 2


def test_scored_tokens_are_what_the_models_say(runs):
    """The student's are the stored ones; the teacher's agree with transformers alone."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from agentdistill.report.score import Scorer

    [run] = read_runs(runs[:1])
    items, _ = choose([run], "distilled", 4, 4, 0)
    scorer = Scorer(run)
    scorer.score(run.stages[2], items)
    scorer.close()
    models = {
        name: AutoModelForCausalLM.from_pretrained(run.path / "stages" / stage / "model")
        for name, stage in (("teacher", "taught"), ("final", "distilled"))
    }
    for item in items:
        assert sorted(item.tokens) == [turn.index for turn in item.trajectory.turns]
        for turn in item.trajectory.turns:
            span, tokens = turn.span, item.tokens[turn.index]
            stream = item.trajectory.streams[span.stream]
            drawn = stream.logp[span.start : span.end]
            np.testing.assert_allclose([t.student for t in tokens], drawn, rtol=1e-6)
            ids = torch.tensor(stream.ids[None].astype(np.int64))
            for name, model in models.items():
                with torch.no_grad():
                    logp = model(ids).logits[0].log_softmax(-1)
                places = range(span.start, span.end)
                wanted = [float(logp[place - 1, ids[0, place]]) for place in places]
                said = [getattr(token, name) for token in tokens]
                assert said == pytest.approx(wanted, rel=1e-4, abs=1e-5)
            assert turn.text in "".join(token.text for token in tokens)


def test_page_shows_the_scored_values(runs, both):
    [run] = read_runs(runs[:1])
    items, _ = choose([run], "distilled", 8, 16, 0)
    stored = {f"{v:.3f}" for i in items for s in i.trajectory.streams for v in s.logp if v == v}
    values = re.findall(r'data-v="(\S*) (\S*) (\S*)"', both[1])
    assert both[0].scored == 16
    assert stored & {student for student, _, _ in values}
    assert all(teacher and final for _, teacher, final in values)


def test_divergence_looks_from_who_acted():
    student = Token("", -1.0, -3.0, -2.0)
    teacher = Token("", NAN, -1.0, -3.0)
    assert (student.divergence, student.lead) == (2.0, -2.0)
    assert (teacher.divergence, teacher.lead) == (2.0, 2.0)


class Bytes:
    """A tokenizer with one token per byte."""

    def decode(self, ids, **options):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("text", ["plain", "caf\u00e9 \u2713", "\U0001f600!", "a\ufffdb", ""])
def test_pieces_join_to_the_text(text):
    found = pieces(Bytes(), list(text.encode()))
    assert "".join(found) == text
    assert len(found) == len(text.encode())


def test_pieces_of_half_a_character():
    assert pieces(Bytes(), [0x61, 0xE2]) == ["a", "\ufffd"]


# -- hostile texts ---------------------------------------------------------------------------------


def hostile_trajectory(kind: str, turns: int = 1) -> Trajectory:
    text = HOSTILE + NASTY
    turn = Turn(
        0,
        text,
        Actor(text),
        text=text,
        actions=(text,),
        results=(StepResult(text, 0.0, optimal=None),),
    )
    many = tuple(dataclasses.replace(turn, index=index) for index in range(turns))
    return Trajectory(
        Task("tests/Corridor-v0", "train", {"at": kind}),
        f"demos/0/{kind}",
        0,
        many,
        (),
        "fault:env" if kind == "fault" else "success",
        kind != "fault",
        1.0,
        faults=(Fault(text, text, 0),) if kind == "fault" else (),
        goal=text,
    )


def plant(run: Path, trajectories: list[Trajectory]) -> None:
    """Commit them to the run's collect stage."""
    with Store(run / "stages" / "demos") as store:
        store.commit("demos", 99, [store.write("demos", 99, trajectories)], {})


def test_hostile_texts_are_shown_and_do_nothing(runs, tmp_path):
    run = copied(runs, tmp_path)
    plant(run, [hostile_trajectory("plain"), hostile_trajectory("fault")])
    report([run], score=False, trajectories=8)
    text = (run / "report.html").read_text()  # decodes: no lone surrogate got through
    seen = Reader(text)
    assert seen.tags.count("script") == 1 and "img" not in seen.tags
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert seen.text.count(HOSTILE) >= 8  # word for word: escaped once, not twice
    assert "\u241b[31mred" in seen.text and "\u2400" in seen.text
    assert "[U+202E]evil[U+202C] ? [U+0085]" in seen.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def test_hostile_tokens(runs, tmp_path, monkeypatch):
    from agentdistill.report import score

    run = copied(runs, tmp_path)
    monkeypatch.setattr(score, "pieces", lambda tokenizer, ids: [HOSTILE + NASTY] * len(ids))
    assert report([run], trajectories=4).scored > 0
    seen = Reader((run / "report.html").read_text())
    assert seen.tags.count("script") == 1 and "img" not in seen.tags
    assert HOSTILE in seen.text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("a\r\nb\rc", "a\nb\u240dc"),
        ("\x7f\x9b", "\u2421[U+009B]"),
        ("\u2067x", "[U+2067]x"),
        ("\ud83d", "?"),
        ("\U0001f600 \u4f60\u597d", "\U0001f600 \u4f60\u597d"),
    ],
)
def test_clean(text, shown):
    assert clean(text) == shown


def test_numbers_for_people():
    assert [number(v) for v in (None, 0.0, -1.234, 0.0123, 12345.6)] == [
        "–", "0.00", "\u22121.23", "0.012", "12,346",  # noqa: RUF001
    ]  # fmt: skip
    assert [duration(v) for v in (9.94, 600, 7200)] == ["9.9 s", "10.0 min", "2.0 h"]


# -- size ------------------------------------------------------------------------------------------


def test_the_file_stays_small_and_says_what_is_missing(runs, tmp_path, monkeypatch):
    full = report(runs, tmp_path / "full.html", score=False)
    limit = full.bytes - 20_000
    monkeypatch.setattr(page, "BYTES", limit)
    written = report(runs, tmp_path / "less.html", score=False)
    assert written.bytes <= limit and 0 < written.shown < full.shown
    text = Reader((tmp_path / "less.html").read_text()).text
    assert f"{full.shown - written.shown} more were chosen and left out" in text


def test_long_texts_are_cut_and_say_so(runs, tmp_path):
    run = copied(runs, tmp_path)
    long = hostile_trajectory("long")
    turn = dataclasses.replace(long.turns[0], observation="x" * 10_000)
    plant(run, [dataclasses.replace(long, turns=(turn,))])
    report([run], score=False, trajectories=6)
    text = Reader((run / "report.html").read_text()).text
    assert "x" * 3000 in text and "x" * 3001 not in text
    assert "7000 characters more" in text


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
