"""The student as its own teacher, and scores that are kept on disk."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agentdistill.checkpoint import load_state, save_state
from agentdistill.config import LoraConfig, TrainStage
from agentdistill.errors import ConfigError, EngineError
from agentdistill.optimise import Optimiser, backward
from agentdistill.students import local
from agentdistill.table import Table, build
from agentdistill.teachers.scorer import LocalScorer
from agentdistill.teachers.selves import SelfScorer, silent
from agentdistill.teachers.stored import StoredScorer, weights_identity
from agentdistill.views import PLAIN, Splice, View, splice
from tests.dense import episode, episodes, gap, gradient, make_model, table_logits
from tests.losses import term_of

ROOT = Path(__file__).resolve().parents[1]
UPDATES = ("frozen", "live", "sync", "ema")
ROUNDING = 2e-5
APART = (0, 5, 5, 6)
"""Pairs of rules that differ in iteration n: sync is as frozen in 0 and 1, and as live in 2."""


def nudge(model: Any, seed: int = 1, size: float = 0.05) -> None:
    """What an update does: every trained weight moves."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trained(model).values():
            weight += (size * torch.randn(weight.shape, generator=source)).to(weight.dtype)


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapted(seed: int = 0, **options: Any) -> Any:
    """A student with adapters that already do something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = local.add_lora(make_model(1, dtype=torch.float32), LoraConfig(rank=2, **options))
    nudge(model, seed + 10, 0.3)
    return model


def students(kind: str) -> Any:
    """``whole``: one weight for embedding and head; ``head``: adapters on the head as well."""
    if kind in ("whole", "untied"):
        return make_model(0 if kind == "whole" else 1)
    modules = {"targets": ["q_proj", "lm_head"]} if kind == "head" else {}
    return adapted(dropout=0.5, **modules)


KINDS = ("whole", "untied", "adapters", "head")


def noted(note: tuple[int, ...]) -> Callable[[Any, int], View | None]:
    """View builder: ``note`` after the first token."""
    return lambda trajectory, s: splice(trajectory.streams[s], [Splice(1, insert=note)])


def table_of(**views: Any) -> Table:
    return build(episodes(), views)


def scored(scorer: LocalScorer, what: str = "logp", view: str = PLAIN, **views: Any) -> Tensor:
    table = table_of(**views)
    scorer.score(table, (what,), view=view)
    return table[f"{what}/{scorer.name}" + (f"@{view}" if view != PLAIN else "")]


def exact(model: Any) -> Tensor:
    """The column of a scorer that is ``model`` itself."""
    return scored(LocalScorer("old", model))


# -- how the weights move -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_rule_scores_as_a_model_with_those_weights(kind: str) -> None:
    student = students(kind).train()
    first = copy.deepcopy(student)
    scorers = {u: SelfScorer("self", student, u, every=2, rate=0.25) for u in UPDATES}  # type: ignore[arg-type]
    mean = {name: weight.detach().clone() for name, weight in trained(student).items()}
    synced = first
    for n in range(4):
        for scorer in scorers.values():
            scorer.before(n)
        if n % 2 == 0:
            synced = copy.deepcopy(student)
        expected = {"frozen": first, "live": copy.deepcopy(student), "sync": synced}
        expected["ema"] = copy.deepcopy(student)
        for name, weight in trained(expected["ema"]).items():
            weight.data = mean[name]
        for update, model in expected.items():
            assert torch.allclose(scored(scorers[update]), exact(model), atol=ROUNDING), (update, n)
            assert update == "ema" or torch.equal(scored(scorers[update]), exact(model))
        now = [exact(model) for model in expected.values()]
        gaps = [float((a - b).abs().max()) for i, a in enumerate(now) for b in now[:i]]
        assert sum(value > 100 * ROUNDING for value in gaps) == APART[n], gaps
        nudge(student, n)
        for scorer in scorers.values():
            scorer.after()
        mean = {k: 0.75 * mean[k] + 0.25 * v.detach() for k, v in trained(student).items()}


def test_the_published_step_of_the_mean() -> None:
    """Rate 0.05, teacher 1, student 0: 0.95."""
    student = make_model(0)
    torch.nn.init.ones_(student.model.norm.weight)
    scorer = SelfScorer("self", student, "ema")
    torch.nn.init.zeros_(student.model.norm.weight)
    scorer.after()
    held = scorer.state_dict()["weights"]["model.norm.weight"]
    assert held.tolist() == pytest.approx([0.95] * len(held))


def test_a_mean_of_half_precision_weights_moves() -> None:
    """Each step is a twentieth of what bfloat16 can tell apart at 1, and all steps are the same."""
    student = make_model(0, dtype=torch.bfloat16)
    weight = student.model.norm.weight
    scorer = SelfScorer("self", student, "ema")
    target = 1 + 2**-7
    lost = weight.detach().clone()
    torch.nn.init.constant_(weight, target)
    for _ in range(40):
        scorer.after()
        lost.lerp_(weight.detach(), 0.05)
    mean = scorer.state_dict()["weights"]["model.norm.weight"]
    assert mean.dtype == torch.float32
    assert mean.tolist() == pytest.approx([target + 0.95**40 * (1 - target)] * len(mean), rel=1e-6)
    assert lost.tolist() == [1.0] * len(lost)
    torch.nn.init.constant_(weight, float(mean[0]))  # rounded, as it is to score
    assert torch.equal(scored(scorer), exact(student))
    torch.nn.init.ones_(weight)
    assert not torch.equal(scored(scorer), exact(student))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"update": "fresh"}, "scorer.update"),
        ({"update": "sync", "every": 0}, "scorer.every"),
        ({"update": "ema", "rate": 0.0}, "scorer.rate"),
        ({"update": "ema", "rate": 1.5}, "scorer.rate"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        SelfScorer("self", make_model(0), **options)


def test_another_model_has_the_same_calls() -> None:
    scorer = LocalScorer("teacher", make_model(1))
    before = exact(scorer.model)
    scorer.before(0)
    scorer.after()
    scorer.load_state_dict(scorer.state_dict())
    assert scorer.state_dict() == {}
    assert torch.equal(scored(scorer), before)
    assert not scorer.present


# -- the student is left alone --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_is_itself_after_a_scoring_and_after_a_failed_one(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = students(kind)
    scorer = SelfScorer("self", student, "frozen")
    nudge(student)
    own = {name: (p.data_ptr(), p.detach().clone()) for name, p in student.named_parameters()}
    before = exact(student)
    scorer.score(table_of(), ("logp", "hidden"))
    scorer.head(torch.zeros(1, 16, dtype=student.dtype))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("agentdistill.teachers.scorer.hidden_states", fail)
    monkeypatch.setattr("agentdistill.teachers.scorer.logits", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        scorer.score(table_of())
    with pytest.raises(RuntimeError, match="out of memory"):
        scorer.head(torch.zeros(1, 16, dtype=student.dtype))
    monkeypatch.undo()
    for name, parameter in student.named_parameters():
        assert parameter.data_ptr() == own[name][0]
        assert torch.equal(parameter, own[name][1])
    assert torch.equal(exact(student), before)
    assert not torch.equal(scored(scorer), before)


def test_adapters_have_second_adapters_and_no_second_model(tmp_path: Path) -> None:
    student = adapted()
    whole = sum(p.numel() for p in student.parameters())
    small = trained(student)
    assert len(small) == len(Optimiser(student, stage()).parameters)
    scorer = SelfScorer("self", student, "ema")
    kept = scorer.state_dict()["weights"]
    assert sorted(kept) == sorted(small)
    assert 0 < sum(t.numel() for t in kept.values()) == sum(t.numel() for t in small.values())
    assert sum(p.numel() for p in student.parameters()) == whole
    mine = Optimiser(student, stage()).parameters
    assert [id(p) for p in mine] == [id(p) for p in small.values()]
    nudge(student)
    student.save_pretrained(tmp_path, save_embedding_layers=False)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []
    other = adapted(5)
    local.load_weights(other, tmp_path)
    assert torch.equal(exact(other), exact(student))


def stage() -> TrainStage:
    return TrainStage(name="s", model="m", method="opd", iterations=1, lr=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("update", UPDATES)
def test_gradients_are_those_against_a_second_model(kind: str, update: Any) -> None:
    """The head is worn between the student's forward and its backward, in training mode."""
    student = students(kind).eval()
    second = copy.deepcopy(student)
    scorer = SelfScorer("teacher", student, update)
    if update != "live":
        nudge(student)
    second_scorer = LocalScorer("teacher", second)
    table, other = table_of(note=noted((7, 8))), table_of(note=noted((7, 8)))
    scorer.score(table, ("hidden",), view="note")
    second_scorer.score(other, ("hidden",), view="note")
    term = term_of("reverse_kl")
    for own in (table, other):
        own["hidden/teacher"] = own["hidden/teacher@note"]
    found = []
    for own, teacher in ((table, scorer), (other, second_scorer)):
        backward(student, own, [term], {"teacher": teacher.head}, micro_tokens=30, chunk_rows=4)
        found.append(gradient(student))
        student.zero_grad(set_to_none=True)
    assert float(found[1].norm()) > 1e-3
    assert gap(*found) < 1e-6


def test_the_head_of_live_stays_with_its_hidden_states() -> None:
    student = make_model(1)
    scorer = SelfScorer("self", student, "live")
    table = table_of()
    wanted = table_logits(student, table).detach()
    scorer.score(table, ("hidden",))
    nudge(student)
    assert gap(scorer.head(table["hidden/self"]), wanted) < 1e-6
    assert scorer.head(table["hidden/self"].requires_grad_(True)).requires_grad is False
    scorer.after()
    assert gap(scorer.head(table["hidden/self"]), wanted) > 1e-3


def test_dropout_of_an_adapted_head_is_off_while_training() -> None:
    student = students("head").train()
    scorer = SelfScorer("self", student, "frozen")
    hidden = torch.randn(3, 16)
    assert torch.equal(scorer.head(hidden), scorer.head(hidden))
    assert student.training


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["half", "adapters"])
@pytest.mark.parametrize("update", UPDATES)
def test_going_on_from_a_checkpoint_gives_the_same_weights(
    kind: str, update: Any, tmp_path: Path
) -> None:
    def make() -> Any:
        return make_model(0, dtype=torch.bfloat16) if kind == "half" else adapted()

    def iterate(student: Any, scorer: SelfScorer, n: int) -> Tensor:
        scorer.before(n)
        found = scored(scorer)
        nudge(student, n)
        scorer.after()
        return found

    student = make()
    scorer = SelfScorer("self", student, update, every=2)
    for n in range(3):
        iterate(student, scorer, n)
    save_state(tmp_path / "state.pt", state=scorer.state_dict())
    weights = copy.deepcopy(student.state_dict())
    wanted = [iterate(student, scorer, n) for n in (3, 4, 5)]

    again = make()
    nudge(again, 99)  # even where the scorer is not built on the weights of the start
    resumed = SelfScorer("self", again, update, every=2)
    again.load_state_dict(weights)
    resumed.load_state_dict(load_state(tmp_path / "state.pt"))
    for n, column in zip((3, 4, 5), wanted, strict=True):
        assert torch.equal(iterate(again, resumed, n), column)


def test_the_state_of_another_student_is_refused_and_changes_nothing() -> None:
    scorer = SelfScorer("self", make_model(0), "ema")
    before = scored(scorer)
    for other in (SelfScorer("self", make_model(1), "ema"), SelfScorer("self", adapted(), "sync")):
        with pytest.raises(EngineError, match="not of this student"):
            scorer.load_state_dict(other.state_dict())
    with pytest.raises(EngineError, match=r"self \(ema\)"):
        scorer.load_state_dict(SelfScorer("self", scorer.model, "live").state_dict())
    assert torch.equal(scored(scorer), before)


# -- no signal ------------------------------------------------------------------------------------


def late(trajectory: Any, s: int) -> View | None:
    """A note before the second response, none where there is no second, no view of the last."""
    stream = trajectory.streams[s]
    if trajectory.task.payload["seed"] == 4:
        return None
    seconds = [t.span.start for t in trajectory.turns[1:2]]
    return splice(stream, [Splice(at, insert=(VERY,)) for at in seconds])


VERY = 40


def test_rows_without_signal_are_those_whose_log_ratio_must_be_zero() -> None:
    student = make_model(0)
    scorer = SelfScorer("self", student, "live")
    views = {"empty": noted(()), "note": noted((VERY, 3)), "late": late}
    table = table_of(**views)
    mine = exact(student)
    assert silent(scorer, table).all()
    assert silent(scorer, table, "empty").all()
    assert not silent(scorer, table, "note").any()
    quiet = silent(scorer, table, "late")
    gaps = (scored(scorer, view="late", **views) - mine).abs()
    assert torch.equal(quiet, gaps == 0)
    assert 10 < int(quiet.sum()) < len(table) - int(gaps.isnan().sum())


def test_another_note_of_one_length_and_a_forgotten_twin_are_other_readings() -> None:
    scorer = SelfScorer("self", make_model(0), "live")
    first = [Splice(0, drop=1, insert=(VERY,))]
    table = table_of(other=lambda t, s: splice(t.streams[s], first))
    assert not silent(scorer, table, "other").any()
    # Two equal turns, of which the scorer reads the second one where the first one was.
    twins = episode(0, [(2, 2), (2, 2)], vocab=1)
    table = build([twins], {"one": lambda t, s: splice(t.streams[s], [Splice(0, 4)], forget=True)})
    assert table.valid("one").tolist() == [False, False, True, True]
    assert not silent(scorer, table, "one").any()


def test_weights_of_another_moment_are_never_silent() -> None:
    student, table = make_model(0), table_of()
    scorers = [SelfScorer("self", student, update) for update in ("frozen", "sync", "ema")]
    assert all(silent(scorer, table).all() for scorer in scorers)
    nudge(student)
    assert not any(silent(scorer, table).any() for scorer in scorers)
    assert silent(SelfScorer("self", student, "live"), table).all()
    assert not silent(LocalScorer("teacher", student), table).any()
    scorers[1].before(1)
    assert silent(scorers[1], table).all()


# -- scores on disk -------------------------------------------------------------------------------


def columns(scorer: LocalScorer, table: Table, view: str = PLAIN) -> tuple[int, list[Tensor]]:
    """Scored ids, and both columns."""
    tokens = scorer.score(table, ("logp", "entropy"), view=view, rows=table.acted)
    end = "" if view == PLAIN else f"@{view}"
    return tokens, [table[f"{what}/{scorer.name}{end}"] for what in ("logp", "entropy")]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(
        torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(one, other, strict=True)
    )


def stored(folder: Path, seed: int = 1, identity: str = "x") -> StoredScorer:
    return StoredScorer(LocalScorer("teacher", make_model(seed)), folder, identity)


def test_the_second_scoring_reads(tmp_path: Path) -> None:
    tokens, plain = columns(LocalScorer("teacher", make_model(1)), table_of())
    first = stored(tmp_path)
    assert columns(first, table_of())[0] == tokens > 0
    for scorer in (first, stored(tmp_path)):
        again, found = columns(scorer, table_of())
        assert again == 0
        assert equal(found, plain)
    for scorer, left in ((first, 0), (stored(tmp_path, identity="y"), tokens)):
        table = table_of()
        assert scorer.score(table, rows=table.acted) == left
        assert set(table.columns) == {"logp/sampler", "logp/teacher"}


def test_only_what_is_missing_is_scored(tmp_path: Path) -> None:
    few, whole = build(episodes()[:2]), table_of()
    first, _ = columns(stored(tmp_path), few)
    tokens, wanted = columns(LocalScorer("teacher", make_model(1)), whole)
    rest, found = columns(stored(tmp_path), table_of())
    assert 0 < rest == tokens - first
    for mine, true in zip(found, wanted, strict=True):
        assert torch.allclose(mine, true, atol=1e-6, equal_nan=True)
    assert columns(stored(tmp_path), table_of())[0] == 0


def test_the_order_of_trajectories_does_not_matter(tmp_path: Path) -> None:
    _, plain = columns(stored(tmp_path), table_of())
    order = [3, 0, 4, 2, 1]
    table = build([episodes()[n] for n in order])
    tokens, turned = columns(stored(tmp_path), table)
    assert tokens == 0
    own = table_of()
    for mine, true in zip(turned, plain, strict=True):
        for place, n in enumerate(order):
            kept = mine[table["trajectory"] == place]
            assert torch.equal(kept.nan_to_num(9), true[own["trajectory"] == n].nan_to_num(9))


def test_twins_are_scored_once(tmp_path: Path) -> None:
    once, _ = columns(stored(tmp_path / "one"), build(episodes()[:1]))
    table = build([episodes()[0], episodes()[0]])
    tokens, (logp, _) = columns(stored(tmp_path / "two"), table)
    assert tokens == once
    assert torch.equal(*logp.split(len(table) // 2))


def test_other_scorers_views_and_rows_are_not_known(tmp_path: Path) -> None:
    columns(stored(tmp_path), table_of())
    tokens, found = columns(stored(tmp_path, seed=2, identity="y"), table_of())
    assert tokens > 0
    assert equal(found, columns(LocalScorer("teacher", make_model(2)), table_of())[1])
    table = table_of(note=noted((7,)))
    tokens, found = columns(stored(tmp_path), table, "note")
    assert tokens > 0
    other = table_of(note=noted((8,)))  # of one length
    assert columns(stored(tmp_path), other, "note")[0] == tokens
    alone = table_of(note=noted((7,)))
    assert equal(found, columns(LocalScorer("teacher", make_model(1)), alone, "note")[1])
    some = table_of()
    half = some.acted & (torch.arange(len(some)) % 2 == 0)
    assert stored(tmp_path).score(some, rows=half) > 0
    assert torch.equal(some["logp/teacher"].isnan(), ~half)


def test_rows_outside_a_view_get_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        table = table_of(late=late)
        columns(stored(tmp_path), table, "late")
        missing = table["logp/teacher@late"].isnan()
        assert torch.equal(missing, ~table.valid("late"))
    empty = build([])
    assert columns(stored(tmp_path), empty)[0] == 0


@pytest.mark.parametrize("how", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_counted_and_scored_again(how: str, tmp_path: Path) -> None:
    tokens, wanted = columns(stored(tmp_path), table_of())
    (file,) = tmp_path.rglob("*.scores")
    whole = bytearray(file.read_bytes())
    if how == "flipped":
        whole[len(whole) // 2] ^= 1
    file.write_bytes(whole[: {"cut": 300, "flipped": len(whole), "empty": 0}[how]])
    scorer = stored(tmp_path)
    assert scorer.torn == 1
    again, found = columns(scorer, table_of())
    assert again == tokens
    assert equal(found, wanted)
    healed = stored(tmp_path)
    assert (healed.torn, columns(healed, table_of())[0]) == (0, 0)


UNTIL_KILLED = """
import pickle, sys
from agentdistill.teachers.stored import LocalScorer, StoredScorer

class Quick(LocalScorer):  # needs no model, whose imports would take most of this test
    def score(self, table, want, *, rows, **options):
        for what in want:
            table[f"{what}/teacher"] = table["token"].float()
        return int(rows.sum())

scorer = StoredScorer(Quick("teacher", None), sys.argv[1], "x")
for table in pickle.load(sys.stdin.buffer):
    scorer.score(table, rows=table.acted)
"""


def test_a_kill_leaves_a_readable_folder(tmp_path: Path) -> None:
    tables = [build([trajectory]) for trajectory in episodes()]
    point = {"AGENTDISTILL_CRASH_AT": "file:before-rename:2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", UNTIL_KILLED, tmp_path]
    done = subprocess.run(command, env={**os.environ, **point}, input=pickle.dumps(tables))
    assert done.returncode == -signal.SIGKILL
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 2  # one has no name yet
    scorer = stored(tmp_path)
    assert scorer.torn == 0
    each = [columns(scorer, table)[0] for table in tables]
    assert [tokens == 0 for tokens in each] == [True, False, False, False, False]
    assert torch.equal(tables[0]["logp/teacher"], tables[0]["token"].float())


@pytest.mark.parametrize("update", ["live", "sync", "ema"])
def test_scores_of_moving_weights_are_not_kept(update: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scorer\.stored"):
        StoredScorer(SelfScorer("self", make_model(0), update), tmp_path, "x")


def test_hidden_states_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scorer\.stored.*hidden states"):
        stored(tmp_path).score(table_of(), ("logp", "hidden"))


def test_a_stored_self_is_the_frozen_one_also_after_a_checkpoint(tmp_path: Path) -> None:
    def make(model: Any) -> StoredScorer:
        inner = SelfScorer("self", model, "frozen")
        return StoredScorer(inner, tmp_path, weights_identity(model))

    student = make_model(0)
    scorer = make(student)
    assert scorer.present
    _, wanted = columns(scorer, table_of())
    nudge(student)
    assert not scorer.present
    resumed = make(make_model(0))
    resumed.load_state_dict(scorer.state_dict())
    tokens, found = columns(resumed, table_of())
    assert tokens == 0
    assert equal(found, wanted)
    with pytest.raises(EngineError, match="other weights"):
        make(student).load_state_dict(scorer.state_dict())


def test_the_identity_is_that_of_what_is_said(tmp_path: Path) -> None:
    model = make_model(0)
    known = weights_identity(model)
    assert known == weights_identity(make_model(0))
    model.save_pretrained(tmp_path / "a")
    assert weights_identity(type(model).from_pretrained(tmp_path / "a", dtype="auto")) == known
    others = [make_model(1), make_model(0, dtype=torch.float32), adapted(), adapted(alpha=7)]
    nudged = make_model(0)
    with torch.no_grad():
        nudged.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-9
    turned = make_model(0)
    turned.config.rms_norm_eps = 1e-2
    found = {known, *map(weights_identity, [*others, nudged, turned])}
    assert len(found) == 7
