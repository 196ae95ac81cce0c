"""Methods that must coincide: in expectation, at the ends of an axis, or where a term vanishes.

Sources: methods' reductions into each other, and the expected gradients of single-sample
estimators (on policy, by enumeration of everything that can be sampled).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from agentdistill import divergence
from agentdistill.curriculum import Full
from agentdistill.methods import compile as plan
from agentdistill.methods.index import METHODS, get
from agentdistill.methods.space import Axes
from agentdistill.objective import Divergence, Term, TokenLoss
from agentdistill.optimise import backward
from agentdistill.records import Actor, Kind, StreamBuilder, Task, Trajectory, Turn
from agentdistill.table import Table, build
from agentdistill.teachers.scorer import LocalScorer
from tests.dense import gap, gradient, logits_at, make_model, table_logits
from tests.faults.watch import model, recorded, tokenizer, update
from tests.methods import descend, episodes, rates_of, scored

SAME = 1e-6

# -- expectations over everything that can be sampled ---------------------------------------------

WORDS, PROMPT = 7, [3, 1, 4, 1, 5]


def _said(*response: int) -> Trajectory:
    builder = StreamBuilder()
    size = len(response)
    span = builder.extend(PROMPT, response, logp=[0.0] * size, kind=[Kind.ACT] * size)
    turn = Turn(0, "", Actor("student"), span=span)
    task = Task("tests/words", "train", {})
    return Trajectory(task, "g", 0, (turn,), builder.finish(), "failure", False, 0.0)


@cache
def everything() -> tuple[Table, Any, LocalScorer]:
    """All 49 responses of two tokens, scored; each weighted by its probability."""
    student, teacher = make_model(0, vocab=WORDS), make_model(1, vocab=WORDS)
    with torch.no_grad():
        for weight in (*student.parameters(), *teacher.parameters()):
            weight *= 0.6  # so that no log-ratio reaches a clamp
    table = build([_said(*pair) for pair in itertools.product(range(WORDS), repeat=2)])
    scorer = LocalScorer(plan.TEACHER, teacher)
    scorer.score(table, ("logp", "hidden"))
    LocalScorer(plan.OLD, student).score(table)
    chance = torch.zeros(len(table.trajectories), dtype=torch.float64)
    chance.index_add_(0, table["trajectory"], table["logp/old"].double())
    table["weight/chance"] = table.spread(chance.exp()) * len(table)
    return table, student, scorer


def expected(name: str, coupling: str = "loss") -> Tensor:
    """Expected gradient of the method with this divergence, for student and old student equal."""
    table, student, scorer = everything()
    axes = Axes.model_validate({"signal": {"divergence": name, "coupling": coupling}})
    plan.fill(table, axes)
    terms = [replace(term, weight="weight/chance") for term in plan.terms(axes)]
    backward(student, table, terms, {plan.TEACHER: scorer.head}, micro_tokens=100)
    return gradient(student)


def by_states(kind: str) -> Tensor:
    """Gradient of the divergence at the first token, and at each second one by its chance."""
    _, student, scorer = everything()
    total = torch.zeros((), dtype=torch.float64)
    for first in (None, *range(WORDS)):
        before = PROMPT if first is None else [*PROMPT, first]
        ids, where = [*before, 0], [len(before)]
        log_s, log_t = (
            logits_at(m, ids, where).log_softmax(-1)[0] for m in (student, scorer.model)
        )
        p, q = (log_s, log_t) if kind == "reverse_kl" else (log_t, log_s)
        here = logits_at(student, [*PROMPT, 0], [len(PROMPT)]).log_softmax(-1)[0].detach().exp()
        chance = 1.0 if first is None else float(here[first])
        total = total + chance * (p.exp() * (p - q)).sum()
    frozen = scorer.model.requires_grad_(False)
    found = gradient(student, total)
    frozen.requires_grad_(True)
    return found


def test_the_enumeration_is_complete_and_unclamped() -> None:
    table, _, _ = everything()
    assert float(table["weight/chance"].mean()) == pytest.approx(2, rel=1e-6)
    ell = table["logp/old"] - table["logp/teacher"]
    assert float((torch.expm1(-ell) + ell).max()) < 9


@pytest.mark.parametrize(
    ("name", "coupling", "exact"),
    [
        ("k1", "advantage", "reverse_kl"),
        ("k2", "loss", "reverse_kl"),
        ("rho_k3", "loss", "reverse_kl"),
        ("reverse_kl", "loss", "reverse_kl"),
        ("k3", "loss", "forward_kl"),
        ("forward_kl", "loss", "forward_kl"),
    ],
)
def test_expected_gradients_are_those_of_the_exact_divergence(
    name: str, coupling: str, exact: str
) -> None:
    assert gap(expected(name, coupling), by_states(exact)) < SAME


def test_the_two_directions_are_not_the_same() -> None:
    assert gap(by_states("forward_kl"), by_states("reverse_kl")) > 0.1


def test_k1_as_a_loss_has_no_gradient_in_expectation() -> None:
    assert float(expected("k1").norm() / by_states("reverse_kl").norm()) < SAME


# -- ends of axes ---------------------------------------------------------------------------------


def of(name: str, **overrides: Any) -> Tensor:
    """Gradient of a method on the recorded episodes."""
    return update(get(name).resolve(overrides), build(recorded()))[1]


def test_a_curriculum_beyond_the_step_limit_is_opd_by_turns() -> None:
    axes = get("tcod-f2b").resolve({"start": {"k_start": 30}})
    for n in (0, 1, 100):
        assert axes.start.curriculum().plan(n, None, 30) == Full().plan(n, None, 30)
    assert torch.equal(of("tcod-f2b"), of("opd", over="turn"))
    assert gap(of("tcod-f2b"), of("opd")) > 1e-2


def test_a_backward_curriculum_that_reached_the_reset_is_opd() -> None:
    curriculum = get("tcod-b2f").resolve({}).start.curriculum()
    assert curriculum.plan(1000, 7, 30) == Full().plan(1000, 7, 30)
    assert torch.equal(of("tcod-b2f"), of("opd"))


def test_opd_without_its_signal_is_grpo() -> None:
    reward = {"kind": "grpo"}
    mixed = of("opd", signal={"coef": 0.0}, reward=reward, over="trajectory")
    assert gap(mixed, of("grpo")) < SAME
    assert gap(of("opd", reward={**reward, "coef": 0.0}), of("opd")) < SAME


def test_groups_without_variance_keep_the_teachers_signal() -> None:
    equal = [replace(t, success=True, end="success") for t in recorded()]
    axes = get("opd").resolve({"reward": {"kind": "grpo"}})
    assert gap(update(axes, build(equal))[1], of("opd")) < SAME
    batch, nothing = update(get("grpo").resolve({}), build(equal))
    assert float(nothing.norm()) == 0
    assert batch.rows == len(build(equal))


def test_groups_that_teach_nothing_are_counted_as_groups() -> None:
    axes = get("grpo").resolve({})
    rewards = {0: (0, 1), 1: (1, 1), 2: (0, 0)}
    table = build(
        [replace(t, success=bool(rewards[int(t.group[1])][t.sample])) for t in recorded()]
    )
    LocalScorer(plan.OLD, model("student")).score(table)
    assert plan.fill(table, axes)["zero_advantage_groups"] == pytest.approx(2 / 3)


def test_episodes_that_a_window_ended_keep_the_signal_and_get_no_reward() -> None:
    censored = [replace(t, end="horizon") for t in recorded()]
    axes = get("opd").resolve({"reward": {"kind": "grpo"}})
    assert gap(update(axes, build(censored))[1], of("opd")) < SAME


def test_the_ends_of_the_jensen_shannon_family_are_the_two_kls() -> None:
    for beta, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        mixed = of("opd-exact", signal={"divergence": "jsd", "beta": beta})
        assert torch.equal(mixed, of("opd-exact", signal={"divergence": name}))


def test_top_k_of_the_whole_vocabulary_is_no_cut() -> None:
    size = len(tokenizer())
    cut = of("opd-exact", signal={"top_k": size})
    assert gap(cut, of("opd-exact")) < SAME
    assert gap(of("opd-exact", signal={"top_k": 2}), of("opd-exact")) > 1e-3


def test_one_update_on_policy_makes_three_estimators_one() -> None:
    opd = of("opd")
    for name in ("k2", "rho_k3"):
        other = of("opd", signal={"divergence": name, "coupling": "loss"})
        assert gap(other, opd) < SAME


def test_a_sampler_of_the_same_precision_needs_no_correction() -> None:
    assert gap(of("opd", policy_gradient={"tis_cap": 2.0}), of("opd")) < 1e-4


def test_a_filter_that_drops_nothing_is_none() -> None:
    nll = {"divergence": "nll", "coupling": "loss"}
    won = [replace(t, success=True) for t in recorded()]
    every, some = (
        update(get("sft").resolve({"actor": "student"}), build(t))[1] for t in (won, recorded())
    )
    plain = of("opd", signal=nll)
    assert torch.equal(every, plain)
    half = [t for t in recorded() if t.success]
    alone = update(Axes.model_validate({"signal": nll}), build(half))[1]
    assert gap(some, alone) < SAME < gap(some, every)


def test_sft_is_forward_kl_to_a_teacher_that_is_certain() -> None:
    student, table = model("student"), build(recorded())
    table["hidden/certain"] = torch.nn.functional.one_hot(table["token"], len(tokenizer())).double()
    certain = Term("kl", Divergence("certain", divergence.forward_kl))
    nll = Term("nll", TokenLoss((), lambda logp, _: -logp))
    found = []
    for term in (certain, nll):
        backward(student, table, [term], {"certain": lambda h: 1e3 * h}, micro_tokens=100)
        found.append(gradient(student))
    assert gap(found[0], found[1]) < SAME
    values = [table["loss/kl"], table["loss/nll"]]
    assert torch.allclose(values[0], values[1], rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_tables_without_rows_are_no_accident(name: str) -> None:
    axes = get(name).resolve({})
    for played, limit in (((), 99), (episodes()[:2], 1)):
        table, heads = scored(axes, played, limit=limit)
        metrics = plan.fill(table, axes, pass_rates=rates_of(axes, played), heads=heads)
        batch, nothing = descend(axes, (table, heads))
        assert (batch.rows, float(nothing.norm())) == (0, 0.0)
        assert all(math.isfinite(value) for value in {**metrics, **batch.as_metrics()}.values())


@pytest.mark.parametrize("name", ["opd", "opd-exact", "kd"])
def test_a_teacher_like_the_student_teaches_nothing(name: str) -> None:
    axes, student, table = get(name).resolve({}), model("student"), build(recorded())
    scorer = LocalScorer(plan.TEACHER, student)
    scorer.score(table, plan.wanted(axes))
    LocalScorer(plan.OLD, student).score(table)
    plan.fill(table, axes)
    backward(student, table, plan.terms(axes), {plan.TEACHER: scorer.head}, micro_tokens=100)
    assert float(gradient(student).norm()) < 1e-6


def test_the_enumeration_weighs_states_as_the_student_visits_them() -> None:
    table, student, _ = everything()
    with torch.no_grad():
        log_s = table_logits(student, table).log_softmax(-1)
    pairs = log_s[torch.arange(len(table)), table["token"]].view(-1, 2).sum(-1).exp()
    assert torch.allclose(table["weight/chance"].view(-1, 2)[:, 0] / len(table), pairs, rtol=1e-5)
