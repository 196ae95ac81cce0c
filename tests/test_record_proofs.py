"""Methods that are not presets, written in a few lines: the records can hold them.

Each builds trajectories by hand, states its objective as views, columns and terms, and is compared
with sums over separately written token lists that go through the whole model. Sources: pi-Distill
(arXiv 2602.04942, algorithm 1), SD-Zero (arXiv 2604.12002), RLTF-SD (arXiv 2602.02482).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agentdistill import divergence
from agentdistill.advantage import grpo, ppo_loss
from agentdistill.objective import Divergence, Term, TokenLoss
from agentdistill.optimise import backward
from agentdistill.records import (
    Actor,
    Author,
    Kind,
    Span,
    Stream,
    StreamBuilder,
    Task,
    Trajectory,
    Turn,
)
from agentdistill.table import Table, build
from agentdistill.teachers.scorer import LocalScorer
from agentdistill.views import Splice, View, splice, within
from agentdistill.weighting import segment_sum
from tests.dense import VOCAB, gap, gradient, logits_at, make_model, sampled_by

CLOSE = 1e-6  # relative; row weights and recorded log-probabilities are float32


def words(source: random.Random, size: int) -> list[int]:
    return [source.randrange(VOCAB) for _ in range(size)]


def moved(model: Any) -> Any:
    """A copy of the model after some update."""
    found = make_model(0)
    found.load_state_dict(model.state_dict())
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in found.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=source, dtype=weight.dtype)
    return found


def rows_of_list(model: Any, before: Sequence[int], said: Sequence[int]) -> Tensor:
    """Log-probabilities [len(said), V] of what follows ``before``, token by token."""
    ids = [*before, *said]
    return logits_at(model, ids, range(len(before), len(ids))).log_softmax(-1)


def of_tokens(log_p: Tensor, said: Sequence[int]) -> Tensor:
    return torch.stack([row[token] for row, token in zip(log_p, said, strict=True)])


def check(
    model: Any, table: Table, terms: list[Term], dense: dict[str, Tensor], **heads: Any
) -> None:
    """Value of every term, and the gradient of their sum; cut finely, to be sure."""
    batch = backward(model, table, terms, heads, micro_tokens=30, chunk_rows=3)
    mine = gradient(model)
    assert batch.losses == pytest.approx({n: v.item() for n, v in dense.items()}, rel=CLOSE)
    assert gap(mine, gradient(model, sum(dense.values()))) < CLOSE


# -- pi-Distill -----------------------------------------------------------------------------------

PRIVILEGED = 3  # tokens of the hint, after two tokens of system text
ALPHA, BETA = 0.3, 0.25


class Attempt:
    """One privileged episode of two turns, as lists."""

    def __init__(self, seed: int) -> None:
        source = random.Random(seed)
        self.system, self.hint = words(source, 2), words(source, PRIVILEGED)
        self.seen = [words(source, 2 + seed % 2), words(source, 3)]
        self.said = [words(source, 3), words(source, 2 + seed % 3)]
        self.reward = [0.0, float(seed % 2)]

    def before(self, turn: int, *, hint: bool) -> list[int]:
        """What stands before the response of ``turn``."""
        past = [*self.seen[0], *self.said[0]] if turn else []
        return [*self.system, *(self.hint if hint else []), *past, *self.seen[turn]]

    def record(self, group: str) -> Trajectory:
        builder, turns = StreamBuilder(), []
        for n, said in enumerate(self.said):
            span = builder.extend(
                self.before(n, hint=True), said, logp=[0.0] * len(said), kind=[Kind.ACT] * len(said)
            )
            turns.append(Turn(n, "", Actor("privileged"), reward=self.reward[n], span=span))
        task = Task("tests/hints", "train", {})
        end = "success" if self.reward[1] else "failure"
        return Trajectory(
            task, group, 0, tuple(turns), builder.finish(), end, bool(self.reward[1]), 0.0
        )

    def log_p(self, model: Any, *, hint: bool) -> Tensor:
        parts = [
            rows_of_list(model, self.before(n, hint=hint), said) for n, said in enumerate(self.said)
        ]
        return torch.cat(parts)

    @property
    def tokens(self) -> list[int]:
        return [token for said in self.said for token in said]


def without_hint(trajectory: Trajectory, stream: int) -> View:
    return splice(trajectory.streams[stream], [Splice(2, drop=PRIVILEGED)])


def ppo_on(anchor: str) -> TokenLoss:
    """Clipped surrogate whose ratio is anchored in column ``anchor``."""
    return TokenLoss(
        (anchor, "advantage"), lambda logp, c: ppo_loss(logp, c[anchor], c["advantage"])
    )


def privileged_advantage(table: Table, old: Any) -> Tensor:
    """R - beta * KL(privileged || plain) by trajectory, centred in its group, on all its rows."""
    scorer = LocalScorer("old", old)
    for view in ("plain", "student"):
        scorer.score(table, ("hidden",), view=view)
    with torch.no_grad():
        with_hint, plain = (
            scorer.head(table[name]) for name in ("hidden/old", "hidden/old@student")
        )
    kl = divergence.kl_rows(with_hint, plain)
    size = len(table.trajectories)
    of_episode = segment_sum(kl, table["trajectory"], table.acted, size)
    reward = torch.tensor([t.reward for t in table.trajectories]).double() - BETA * of_episode
    valid = torch.ones(size, dtype=torch.bool)
    return table.spread(grpo(reward, torch.zeros(size).long(), valid, normalise="none"))


def test_pi_distill_trains_two_views_of_the_same_rows() -> None:
    old = make_model(0)
    student = moved(old)
    attempts = [Attempt(seed) for seed in range(4)]
    table = build([sampled_by(old, a.record("g")) for a in attempts], {"student": without_hint})
    table["advantage"] = privileged_advantage(table, old)
    loss = ppo_on("logp/sampler")
    terms = [
        Term("teacher", loss, view="plain", coef=ALPHA),
        Term("student", loss, view="student", coef=1 - ALPHA),
    ]
    check(student, table, terms, _pi_distill(attempts, old, student))


def _pi_distill(attempts: list[Attempt], old: Any, student: Any) -> dict[str, Tensor]:
    """Algorithm 1 with separate lists of tokens."""
    returns, anchors = [], []
    for a in attempts:
        p, q = a.log_p(old, hint=True).detach(), a.log_p(old, hint=False).detach()
        returns.append(sum(a.reward) - BETA * float((p.exp() * (p - q)).sum()))
        anchors.append(of_tokens(p, a.tokens))
    centre = sum(returns) / len(returns)
    found = {}
    for name, hint, coef in (("teacher", True, ALPHA), ("student", False, 1 - ALPHA)):
        parts = []
        for a, total, anchor in zip(attempts, returns, anchors, strict=True):
            gain = total - centre
            ratio = (of_tokens(a.log_p(student, hint=hint), a.tokens) - anchor).exp()
            part = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
            parts.append(part.clamp_max(-3 * gain) if gain < 0 else part)
        found[name] = coef * torch.cat(parts).mean()
    return found


def test_pi_distill_at_alpha_one_trains_the_privileged_policy_only() -> None:
    old = make_model(0)
    table = build([sampled_by(old, Attempt(1).record("g"))], {"student": without_hint})
    table["advantage"] = torch.ones(len(table))
    loss = ppo_on("logp/sampler")
    both = [Term("teacher", loss), Term("student", loss, view="student", coef=0.0)]
    batches = []
    for terms in (both, both[:1]):
        batches.append((backward(old, table, terms, {}, micro_tokens=99), gradient(old)))
    assert batches[0][0].rows == batches[1][0].rows == len(table)
    assert torch.equal(batches[0][1], batches[1][1])


# -- SD-Zero --------------------------------------------------------------------------------------

PHRASES = {True: [5, 6], False: [7, 8, 9]}
"""What switches the reviser on, by the verdict."""


def answered(seed: int) -> tuple[list[int], list[int], bool, Trajectory]:
    """One question, answer and verdict, as lists and as a record."""
    source = random.Random(seed)
    x, y, right = words(source, 3 + seed), words(source, 4 + seed % 2), seed % 2 == 0
    builder = StreamBuilder()
    span = builder.extend(x, y, logp=[0.0] * len(y), kind=[Kind.ACT] * len(y))
    turns = (Turn(0, "", Actor("student"), span=span),)
    end = "success" if right else "failure"
    task = Task("tests/questions", "train", {"seed": seed})
    return x, y, right, Trajectory(task, "g", seed, turns, builder.finish(), end, right, 0.0)


def second_copy(trajectory: Trajectory, stream: int) -> View:
    """x y phrase y: the answer, what is said about it, and the answer again."""
    span = trajectory.turns[0].span
    assert span is not None
    ids = trajectory.streams[stream].ids[span.start : span.end].tolist()
    insert = (*ids, *PHRASES[trajectory.success])
    return splice(trajectory.streams[stream], [Splice(span.start, insert=insert)])


def both_ways(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    forward = divergence.forward_kl(student_NV, teacher_NV)
    return 0.5 * forward + 0.5 * divergence.reverse_kl(student_NV, teacher_NV)


def test_sd_zero_scores_the_second_copy() -> None:
    student, teacher = make_model(0), make_model(1)
    cases = [answered(seed) for seed in range(4)]
    table = build([case[3] for case in cases], {"second": second_copy})
    for (x, y, right, _), view in zip(cases, table.views["second"], strict=True):
        assert view is not None
        before = len(x) + len(y) + len(PHRASES[right])
        assert len(view.ids) == before + len(y)
        assert view.positions.tolist() == [*range(before, before + len(y))]
    scorer = LocalScorer("teacher", teacher)
    scorer.score(table, ("hidden",), view="second")
    term = Term("kl", Divergence("teacher", both_ways, scorer_view="second"))
    parts = []
    for x, y, right, _ in cases:
        log_t = rows_of_list(teacher, [*x, *y, *PHRASES[right]], y).detach()
        log_s = rows_of_list(student, x, y)
        parts.append(((log_t.exp() - log_s.exp()) * (log_t - log_s)).sum(-1) / 2)
    check(student, table, [term], {"kl": torch.cat(parts).mean()}, teacher=scorer.head)


def test_sd_zero_drops_and_counts_second_copies_beyond_the_budget() -> None:
    student, teacher = make_model(0), make_model(1)
    cases = [answered(seed) for seed in range(4)]
    table = build([case[3] for case in cases])
    lengths = [len(x) + 2 * len(y) + len(PHRASES[right]) for x, y, right, _ in cases]
    assert lengths == [13, 17, 15, 19]
    assert table.add_view("second", within(second_copy, 15)) == 2
    scorer = LocalScorer("teacher", teacher)
    scorer.score(table, ("hidden",), view="second")
    term = Term("kl", Divergence("teacher", both_ways, scorer_view="second"))
    batch = backward(student, table, [term], {"teacher": scorer.head}, micro_tokens=99)
    assert batch.rows == 4 + 4


def revised(seed: int) -> tuple[list[list[int]], Trajectory]:
    """x, first answer, phrase and revision: lists, and one stream with three authors."""
    source = random.Random(seed)
    parts = [words(source, 4), words(source, 2 + seed), PHRASES[False], words(source, 3)]
    authors = (Author.CONTEXT, Author.ACTOR, Author.FORCED, Author.ACTOR)
    ids = [token for part in parts for token in part]
    stream = Stream(
        np.asarray(ids, np.int32),
        np.repeat(np.asarray(authors, np.uint8), [len(part) for part in parts]),
        np.full(len(ids), Kind.ACT, np.uint8),
        np.full(len(ids), np.nan, np.float32),
    )
    turn = Turn(0, "", Actor("student"), span=Span(0, len(parts[0]), len(ids)))
    task = Task("tests/questions", "train", {"seed": seed})
    return parts, Trajectory(task, "g", seed, (turn,), (stream,), "success", True, 1.0)


def test_sd_zero_srt_selects_rows_of_one_stream_twice() -> None:
    student = make_model(0)
    cases = [revised(seed) for seed in range(3)]
    table = build([trajectory for _, trajectory in cases])
    step = table["step"]
    assert step.tolist() == [0] * len(step)  # the phrase parts nothing: all of it is one run
    forced = table["author"] == Author.FORCED
    last = torch.cat([table["position"][table.rows(s)] >= len(c[0][0]) + len(c[0][1]) + 3
                      for s, c in enumerate(cases)])  # fmt: skip
    table["rows/completion"], table["rows/revision"] = table.acted | forced, last & table.acted
    nll = TokenLoss((), lambda logp, _: -logp)
    terms = [
        Term("both", nll, rows="rows/completion"),
        Term("revision", nll, rows="rows/revision", coef=0.5),
        Term("sampled", nll, coef=0.25),
    ]
    found: dict[str, list[Tensor]] = {term.name: [] for term in terms}
    for (x, first, phrase, second), _ in cases:
        said = [*first, *phrase, *second]
        whole = -of_tokens(rows_of_list(student, x, said), said)
        found["both"].append(whole)
        found["revision"].append(
            -of_tokens(rows_of_list(student, [*x, *first, *phrase], second), second)
        )
        found["sampled"] += [whole[: len(first)], whole[-len(second) :]]
    dense = {
        n: torch.cat(v).mean() * t.coef for (n, v), t in zip(found.items(), terms, strict=True)
    }
    check(student, table, terms, dense)


# -- RLTF-SD --------------------------------------------------------------------------------------

FIRST, SECOND = [0.0, 1.0], [1.0, 1.0]
"""Rewards of the first and second attempts of a group of two (V27)."""


class Retry:
    """A first attempt, a critique of it, and a second attempt."""

    def __init__(self, seed: int) -> None:
        source = random.Random(seed)
        self.x0, self.y0 = words(source, 4), words(source, 3 + seed)
        self.c0, self.y1 = words(source, 5), words(source, 4 - seed)
        self.seed = seed

    def record(self) -> Trajectory:
        builder, turns = StreamBuilder(), []
        prompts = (self.x0, [*self.x0, *self.y0, *self.c0])
        rewards = (FIRST[self.seed], SECOND[self.seed])
        for n, (prompt, said) in enumerate(zip(prompts, (self.y0, self.y1), strict=True)):
            size = len(said)
            span = builder.extend(prompt, said, logp=[0.0] * size, kind=[Kind.ACT] * size)
            turns.append(Turn(n, "", Actor("student"), reward=rewards[n], span=span))
        task = Task("tests/retries", "train", {})
        return Trajectory(
            task, "g", self.seed, tuple(turns), builder.finish(), "success", True, 1.0
        )


def alone(trajectory: Trajectory, stream: int, *, forget: bool = True) -> View:
    """The second attempt as if it were the first: attempt and critique are gone."""
    one, two = (turn.span for turn in trajectory.turns)
    assert one is not None and two is not None
    cut = Splice(one.start, drop=two.start - one.start)
    return splice(trajectory.streams[stream], [cut], forget=forget)


def centred(rewards: Sequence[float], by: Sequence[float]) -> Tensor:
    return torch.tensor(rewards) - torch.tensor(by).mean()


def test_rltf_sd_trains_second_attempts_where_the_first_stood() -> None:
    student = make_model(0)
    cases = [Retry(seed) for seed in range(2)]
    table = build([sampled_by(student, case.record()) for case in cases], {"alone": alone})
    LocalScorer("old", student).score(table, view="alone", rows=table.acted)
    assert torch.equal(table["logp/old@alone"].isnan(), table["turn"] == 0)
    gain = centred(SECOND, FIRST)
    assert gain.tolist() == [0.5, 0.5]
    assert centred(SECOND, SECOND).tolist() == [0.0, 0.0]
    second = table["turn"] == 1
    assert torch.equal(table.valid("alone"), second)
    lengths = segment_sum(second.float(), table["trajectory"], second, 2)
    table["rows/second"] = second
    table["weight/gain"] = table.spread(gain * lengths)  # a sum over tokens, not their mean
    both = [a + b for a, b in zip(FIRST, SECOND, strict=True)]
    of_turn = torch.stack([centred(both, both), centred(SECOND, SECOND)], 1)
    table["advantage"] = of_turn[table["trajectory"], table["turn"]]
    terms = [
        Term("sd", TokenLoss((), lambda logp, _: -logp), rows="rows/second", view="alone",
             weight="weight/gain", over="trajectory"),
        Term("two_turns", ppo_on("logp/sampler")),
    ]  # fmt: skip
    check(student, table, terms, _rltf(cases, student, of_turn))


def _rltf(cases: list[Retry], student: Any, of_turn: Tensor) -> dict[str, Tensor]:
    """Mean of A * log pi(y1 | x0), and the two-turn policy gradient at ratio one."""
    told, surrogate = [], []
    for case, gains in zip(cases, of_turn, strict=True):
        told.append(-0.5 * of_tokens(rows_of_list(student, case.x0, case.y1), case.y1).sum())
        befores = (case.x0, [*case.x0, *case.y0, *case.c0])
        for before, said, gain in zip(befores, (case.y0, case.y1), gains, strict=True):
            logp = of_tokens(rows_of_list(student, before, said), said)
            surrogate.append(-gain * (logp - logp.detach()).exp())
    return {"sd": torch.stack(told).mean(), "two_turns": torch.cat(surrogate).mean()}


def test_a_view_forgets_rows_only_where_it_says_so() -> None:
    table = build([Retry(0).record()])
    with pytest.raises(ValueError, match="would drop tokens in question"):
        table.add_view("alone", partial(alone, forget=False))
