"""Diagnostics: against loops over whole distributions, and against what training logged."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch

import agentdistill as ad
from agentdistill.diagnostics import Diagnosis, Means, diagnose, episodes, score
from agentdistill.errors import ConfigError
from agentdistill.table import Table, build
from agentdistill.views import Splice, splice
from agentdistill.weights import sod_report, step_divergence
from tests import dense
from tests.cli_calls import answer, call, refused
from tests.reports import copied, hostile_trajectory, plant, weighed

# -- two small models, and everything by hand ------------------------------------------------------

OUTCOMES = [
    {"success": True, "end": "success"},
    {"success": False, "end": "failure"},
    {"success": False, "end": "horizon"},
]


def scored(**models: int) -> tuple[Table, dict[str, torch.Tensor]]:
    """A table of six episodes that two models scored, and their whole distributions [N, V]."""
    student, teacher = dense.make_model(models.get("student", 1)), dense.make_model(2)
    shapes = [*dense.SHAPES, [(2, 3)]]
    found = [dense.episode(n, shape, **OUTCOMES[n % 3]) for n, shape in enumerate(shapes)]
    table = build([dense.sampled_by(student, t) for t in found])
    score(table, student, teacher if "student" not in models else student, micro_tokens=24)
    with torch.no_grad():
        logs = {
            name: dense.table_logits(model, table).log_softmax(-1)
            for name, model in (("student", student), ("teacher", teacher))
        }
    return table, logs


def by_hand(table: Table, logs: dict[str, torch.Tensor], rows: list[int]) -> Means:
    """The same numbers with loops."""
    s, t = (logs[name].tolist() for name in ("student", "teacher"))
    token, owner = table.index["token"].tolist(), table.index["trajectory"].tolist()
    gap = {n: s[n][token[n]] - t[n][token[n]] for n in rows}
    sums = [
        sum(gap[n] for n in rows if owner[n] == which) for which in sorted({owner[n] for n in rows})
    ]
    e = torch.tensor
    p, q = e([s[n] for n in rows]).exp(), e([t[n] for n in rows]).exp()
    return Means(
        trajectories=len(sums),
        tokens=len(rows),
        kl=statistics.fmean(sums),
        kl_sd=statistics.pstdev(sums),
        drawn_kl=statistics.fmean(sums),
        drawn_kl_sd=statistics.pstdev(sums),
        log_ratio=statistics.fmean(gap.values()),
        reverse_kl=float((p * (p / q).log()).sum(-1).mean()),
        zero_signal=0.0,
        student_entropy=float(-(p * p.log()).sum(-1).mean()),
        teacher_entropy=float(-(q * q.log()).sum(-1).mean()),
        agreement=float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        tvd=float(0.5 * (p - q).abs().sum(-1).mean()),
    )


def close(found: Means | None, wanted: Means) -> bool:
    """Up to rounding to float32."""
    assert found is not None
    return all(
        getattr(found, name) == pytest.approx(getattr(wanted, name), abs=2e-5)
        for name in Means.__slots__
    )


def test_every_number_is_that_of_the_whole_distributions() -> None:
    table, logs = scored()
    found = diagnose(table)
    turn, owner = table.index["turn"].tolist(), table.index["trajectory"].tolist()
    everyone = list(range(len(table)))
    assert found.all is not None and found.success is not None and found.failure is not None
    assert close(found.all.total, by_hand(table, logs, everyone))
    assert [m is not None and m.trajectories for m in found.all.by_turn] == [6, 4, 1]
    for number, means in enumerate(found.all.by_turn):
        assert close(means, by_hand(table, logs, [n for n in everyone if turn[n] == number]))
    for which, part in ((0, found.success), (1, found.failure)):
        assert close(
            part.total, by_hand(table, logs, [n for n in everyone if owner[n] % 3 == which])
        )
    assert found.undecided == 2


def test_steps_are_those_of_sod() -> None:
    """Step by step from the rows, and as the method reports it from the rows."""
    table, _ = scored()
    found = diagnose(table).all
    assert found is not None
    gap = (table["logp/student"] - table["logp/teacher"]).abs().tolist()
    pairs = sorted(zip(dense.keys(table, "step"), gap, strict=True), key=lambda pair: pair[0])
    d: dict[int, list[float]] = {}
    for (owner, _), rows in groupby(pairs, key=lambda pair: pair[0]):
        d.setdefault(owner, []).append(statistics.fmean(value for _, value in rows))
    of_step = [[each[k] for each in d.values() if k < len(each)] for k in range(3)]
    assert found.steps.divergence == pytest.approx([statistics.fmean(x) for x in of_step], rel=1e-5)
    assert found.steps.trajectories == tuple(map(len, of_step)) == (6, 4, 1)
    longer = [each for each in d.values() if len(each) > 1]
    wanted = statistics.fmean(each[0] >= max(each) for each in longer)
    assert found.steps.first_largest == pytest.approx(wanted)
    place = table.index["trajectory"], table.units("step"), table.acted
    divergence = step_divergence(table["logp/student"], table["logp/teacher"], *place[1:])
    for each in found.steps.weights:
        said = sod_report(divergence, *place, delta=each.delta)
        assert each.mean == pytest.approx(said["later_mean"], rel=1e-5)
        assert each.at_cap == pytest.approx(said["at_cap"])
        w = [[min(x[0] / y, 1 + each.delta) for y in x[1:]] for x in longer]
        flat = sorted(value for weights in w for value in weights)
        assert each.quantiles[0] == pytest.approx(flat[0], rel=1e-4)
        assert each.quantiles[-1] == pytest.approx(flat[-1], rel=1e-4)
        assert each.quantiles[3] == pytest.approx(statistics.median(flat), rel=1e-4)
        full = [all(value > 1 + each.delta - 1e-6 for value in weights) for weights in w]
        assert each.all_at_cap == pytest.approx(statistics.fmean(full))
    assert {each.at_cap for each in found.steps.weights} - {0.0}, "a cap that nobody reaches"


def test_a_model_held_against_itself() -> None:
    table, _ = scored(student=1)
    found = diagnose(table).all
    assert found is not None
    total = found.total
    assert (total.kl, total.kl_sd, total.log_ratio, total.tvd) == (0, 0, 0, 0)
    assert (total.agreement, total.zero_signal) == (1, 1)
    assert total.reverse_kl == pytest.approx(0, abs=1e-12)
    # Nothing diverges, so no first step does, and the weights are eps / eps.
    assert found.steps.zero_first == 6 and found.steps.first_largest == 1
    assert [each.mean for each in found.steps.weights] == [1, 1]


def test_chunks_and_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table, _ = scored()
    monkeypatch.setattr(episodes, "LOGITS_AT_ONCE", 3 * dense.VOCAB)
    again, _ = scored()
    for name in ("logp/student", "entropy/teacher", "reverse_kl/teacher", "tvd/teacher"):
        torch.testing.assert_close(again[name], table[name])


def test_the_order_of_rows_changes_nothing() -> None:
    """The reductions go by index columns."""
    table, _ = scored()
    order = list(range(len(table)))
    random.Random(0).shuffle(order)
    moved = replace(
        table,
        index={name: values[order] for name, values in table.index.items()},
        columns={name: values[order] for name, values in table.columns.items()},
        in_view={name: values[order] for name, values in table.in_view.items()},
    )
    assert _rounded(diagnose(moved).to_json()) == _rounded(diagnose(table).to_json())


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_rounded(inner) for inner in value]
    return round(value, 5) + 0.0 if isinstance(value, float) else value


def test_a_teacher_may_read_another_view_and_have_a_wider_head() -> None:
    student, teacher = dense.make_model(1), dense.make_model(3, vocab=dense.VOCAB + 7)
    with torch.no_grad():
        teacher.get_output_embeddings().weight[dense.VOCAB :] = 0
    found = build(dense.episodes())
    found.add_view("context", lambda t, s: splice(t.streams[s], [Splice(1, insert=(3, 4))]))
    score(found, student, teacher, view="context")
    with torch.no_grad():
        logits = dense.table_logits(teacher, found, "context")
    wanted = dense.chosen(logits, found)
    torch.testing.assert_close(found["logp/teacher@context"], wanted.float())
    means = diagnose(found, view="context").all
    assert means is not None and means.total.tokens == len(found)
    assert means.total.reverse_kl is not None and means.total.reverse_kl > 0


def test_only_log_probabilities_are_needed() -> None:
    """A table in training has no more; nobody drew these tokens."""
    table = build(dense.episodes())
    table["logp/old"] = torch.full((len(table),), -1.0)
    table["logp/teacher"] = torch.full((len(table),), -2.0)
    table.columns["logp/teacher"][0] = torch.nan  # not scored
    found = diagnose(table, student="old").all
    assert found is not None
    assert (found.total.tokens, found.total.log_ratio) == (len(table) - 1, 1.0)
    assert found.total.reverse_kl is found.total.tvd is found.total.drawn_kl is None
    nothing = diagnose(table, student="old", rows=torch.zeros(len(table), dtype=torch.bool))
    assert nothing.all is nothing.success is None
    json.dumps(nothing.to_json(), allow_nan=False)


# -- a run -----------------------------------------------------------------------------------------

run = weighed


def test_what_was_drawn_is_what_training_logged(run: Path) -> None:
    """The teacher is frozen, so it says today what it said then."""
    lines = (run / "stages" / "stepped" / "metrics.jsonl").read_text().splitlines()
    for n, line in enumerate(map(json.loads, lines)):
        found = ad.diagnose(run, "stepped", iterations=(n, n + 1))
        assert found.all is not None and found.iterations == (n, n)
        total = found.all.total
        assert total.trajectories == line["episodes"] and total.tokens == line["rows"]
        assert total.drawn_kl is not None
        mean = total.drawn_kl * total.trajectories / total.tokens
        assert mean == pytest.approx(line["divergence"], abs=1e-4)


def test_a_student_that_did_not_move_drew_what_it_says(run: Path) -> None:
    """Episodes of a finished model: both ways to the trajectory KL are one."""
    found = ad.diagnose(run, "cache", teacher="taught")
    assert (found.student, found.teacher, found.from_text) == ("stepped", "taught", 0)
    assert found.all is not None and found.all.total.drawn_kl is not None
    assert found.all.total.drawn_kl == pytest.approx(found.all.total.kl, abs=1e-3)
    # On the student's own samples the sampled estimate is that of the exact divergence.
    exact = found.all.total.reverse_kl
    assert exact is not None and found.all.total.log_ratio == pytest.approx(exact, rel=0.25)
    sides = [part for part in (found.success, found.failure) if part]
    assert sum(part.total.tokens for part in sides) == found.all.total.tokens


def test_recorded_episodes_are_read_from_their_texts(run: Path) -> None:
    found = ad.diagnose(run, "taught", teacher="stepped")
    assert (found.stage, found.student, found.from_text) == ("taught", "taught", 12)
    assert found.all is not None and found.all.total.drawn_kl is None
    other = ad.diagnose(run, "demos", student="stepped", teacher="taught")
    assert other.all is not None
    # The same tokens, seen from the other side.
    assert other.all.total.kl == pytest.approx(-found.all.total.kl, rel=1e-6)
    assert other.all.total.tokens == found.all.total.tokens


def test_a_note_that_the_actor_read_is_not_shown(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The informed actor's tokens, as the student will read them."""
    found = ad.diagnose(run, "told", student="student", teacher="taught")
    assert found.all is not None and found.all.total.drawn_kl is None
    with monkeypatch.context() as patch:
        patch.setattr(episodes, "_informed", lambda _: False)
        noted = ad.diagnose(run, "told", student="student", teacher="taught")
    assert noted.all is not None and noted.all.total.tokens == found.all.total.tokens
    assert noted.all.total.kl != found.all.total.kl


def test_faults_and_long_streams_are_left_out_and_counted(run: Path, tmp_path: Path) -> None:
    mine = copied([run], tmp_path)
    plant(mine, [hostile_trajectory("fault")])
    found = ad.diagnose(mine, "demos", student="stepped", teacher="taught")
    assert found.all is not None and (found.faults, found.all.total.trajectories) == (1, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episodes, "context_length", lambda _: 4)
        nothing = ad.diagnose(run, "stepped", last=1)
    assert nothing.all is None and nothing.dropped == 8
    told = call("diagnose", str(mine), "demos", "--student", "stepped", "--teacher", "taught")
    assert "1 episodes were lost to faults" in told.stdout


def test_verb_prints_what_the_function_returns(run: Path) -> None:
    found = ad.diagnose(run, "stepped", last=1)
    assert isinstance(found, Diagnosis) and found.iterations == (2, 2)
    told = answer("diagnose", str(run), "stepped", "--last", "1")
    assert told == json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert answer("diagnose", str(run), "stepped", "--iterations", "2:") == told
    shown = call("diagnose", str(run), "stepped", "--last", "1").stdout
    assert found.all is not None
    assert f"{found.all.total.kl:.4g} (sd {found.all.total.kl_sd:.4g})" in shown
    assert f"| {found.all.steps.divergence[1]:.4g} |".replace(" ", "") in shown.replace(" ", "")
    assert f"{found.all.steps.weights[0].at_cap:.1%}" in shown


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["demos"], "stage demos has no student of its own"),
        (["taught"], "stage taught has no teacher of its own"),
        (["told"], "stage told has no teacher of its own"),  # it teaches itself
        (["other"], "no such stage; known: demos, taught"),
        (["stepped", "--iterations", "9:"], "stage stepped has iterations 0 to 2"),
        (["stepped", "--iterations", "1"], "give two numbers as A:B"),
        (["stepped", "--teacher", "nobody"], "no such model"),
        (["stepped", "--teacher", "stranger"], "reads other token ids"),
    ],
)
def test_what_cannot_be_diagnosed_is_refused(run: Path, args: list[str], said: str) -> None:
    assert said in refused(2, "diagnose", str(run), *args)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the folder of a run"):
        ad.diagnose(tmp_path)
