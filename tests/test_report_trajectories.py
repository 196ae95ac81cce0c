"""Which trajectories a report shows, their tokens, and texts that would do harm if they could."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from agentdistill.report import page, report
from agentdistill.report.read import read_runs
from agentdistill.report.sample import DIVERGENT, FAILED, FIRST, LAST, choose, trim
from agentdistill.report.score import pieces
from agentdistill.report.tokens import NAN, Token
from agentdistill.report.words import clean, duration, number
from tests import reports
from tests.reports import HOSTILE, NASTY, Reader, copied, hostile_trajectory, plant

runs = reports.runs


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


def test_page_shows_the_scored_values(runs, tmp_path):
    written = report(runs[:1], tmp_path / "r.html", trajectories=8)
    items, _ = choose(read_runs(runs[:1]), "distilled", 8, 16, 0)
    stored = {f"{v:.3f}" for i in items for s in i.trajectory.streams for v in s.logp if v == v}
    values = re.findall(r'data-v="(\S*) (\S*) (\S*)"', (tmp_path / "r.html").read_text())
    assert written.scored == 16
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
