"""Switching an axis on must change the gradient; one that changes nothing is not connected.

All on one table whose trajectories have rewards, in which the student has moved since it sampled
(so that ratios differ from one), and in which no two index sets have the same units.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from agentdistill.config import Over
from agentdistill.methods import compile as plan
from agentdistill.methods.space import Axes, PolicyGradientAxis, RewardAxis, SignalAxis
from agentdistill.optimise import backward
from agentdistill.records import Author, Stream, Trajectory, Turn
from agentdistill.table import Table, build
from agentdistill.teachers.scorer import LocalScorer
from tests.dense import episode, gap, gradient, keys, make_model, sampled_by

MOVES = 1e-3
"""Relative change of the gradient that counts as one (rounding is below 1e-6)."""

LOSS = {"coupling": "loss"}
GRPO = RewardAxis(kind="grpo", eps=1e-6)
CHANGES: dict[str, tuple[Axes, dict[str, Any]]] = {
    "coef": (Axes(signal=SignalAxis(divergence="k2", coupling="loss")), {"signal": {"coef": 2.0}}),
    "coef of the advantage": (Axes(), {"signal": {"coef": 0.5}}),
    "coef beside a reward": (Axes(reward=GRPO), {"signal": {"coef": 0.0}}),
    "coupling": (Axes(), {"signal": {"divergence": "rho_k3", **LOSS}}),
    "beta": (Axes(signal=SignalAxis(divergence="jsd", coupling="loss")), {"signal": {"beta": 0.1}}),
    "temperature": (
        Axes(signal=SignalAxis(divergence="reverse_kl", coupling="loss")),
        {"signal": {"temperature": 2.0}},
    ),
    "top_k": (
        Axes(signal=SignalAxis(divergence="reverse_kl", coupling="loss")),
        {"signal": {"top_k": 3}},
    ),
    "reward": (Axes(), {"reward": {"kind": "grpo"}}),
    "reward.coef": (Axes(reward=GRPO), {"reward": {"coef": 3.0}}),
    "reward.source: score": (Axes(reward=GRPO), {"reward": {"source": "score"}}),
    "reward.source: reward": (Axes(reward=GRPO), {"reward": {"source": "reward"}}),
    "reward.normalise": (Axes(reward=GRPO), {"reward": {"normalise": "none"}}),
    "reward.ddof": (Axes(reward=GRPO), {"reward": {"ddof": 0}}),
    "reward.eps": (Axes(reward=GRPO), {"reward": {"eps": 0.5}}),
    "clip_low": (Axes(), {"policy_gradient": {"clip_low": 0.01}}),
    "clip_high": (Axes(), {"policy_gradient": {"clip_high": 0.01}}),
    "dual_clip": (Axes(), {"policy_gradient": {"dual_clip": 1.1}}),
    "tis_cap": (Axes(), {"policy_gradient": {"tis_cap": 1.05}}),
    "only_success": (Axes(), {"only_success": True}),
}
NOT_HERE = {"actor", "start"}
"""Axes that decide which rows exist, not what is computed on them."""


def _interrupted(trajectory: Trajectory) -> Trajectory:
    """The last response with a token of somebody else in it: one turn, two steps."""
    span = trajectory.turns[-1].span
    assert span is not None
    stream = trajectory.streams[span.stream]
    author = stream.author.copy()
    author[span.start + 1] = Author.CONTEXT
    streams = list(trajectory.streams)
    streams[span.stream] = Stream(stream.ids, author, stream.kind, stream.logp)
    return replace(trajectory, streams=tuple(streams))


def _with_rewards(trajectory: Trajectory, number: int) -> Trajectory:
    turns: list[Turn] = list(trajectory.turns)
    turns[-1] = replace(turns[-1], reward=[0.2, -1.0, 0.5, 3.0, 1.0][number])
    won, score = number in (0, 3), [0.9, 0.1, 0.5, 0.6, 0.2][number]
    end = "success" if won else "failure"
    return replace(trajectory, turns=tuple(turns), success=won, score=score, end=end)


SHAPES = (
    [(3, 4), (2, 2), (2, 3), (1, 2)],
    [(4, 3)],
    [(2, 5), (3, 3)],
    [(3, 2), (2, 6), (1, 4)],
    [(1, 4)],
)


@cache
def world(moved: bool = True) -> tuple[Table, Any, Any]:
    """A scored table, the student (which has ``moved`` since it sampled) and the teacher."""
    old, student, teacher = make_model(0), make_model(0), make_model(1)
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in student.parameters() if moved else ():
            weight += 0.02 * torch.randn(weight.shape, generator=source, dtype=weight.dtype)
    played = [episode(n, s, window=1, group=f"g{n // 3}") for n, s in enumerate(SHAPES)]
    made = [_interrupted(sampled_by(old, _with_rewards(t, n))) for n, t in enumerate(played)]
    table = build(made)
    LocalScorer(plan.TEACHER, teacher).score(table, ("logp", "hidden"))
    LocalScorer(plan.OLD, old).score(table)
    source.manual_seed(3)  # an engine of other precision
    table["logp/sampler"] = table["logp/old"] + 0.2 * torch.randn(len(table), generator=source)
    return table, student, teacher


def gradient_of(axes: Axes, *, moved: bool = True) -> Tensor:
    table, student, teacher = world(moved)
    plan.fill(table, axes)
    heads = {plan.TEACHER: teacher.get_output_embeddings()}
    backward(student, table, plan.terms(axes), heads, micro_tokens=40)
    return gradient(student)


def changed(axes: Axes, changes: dict[str, Any]) -> Axes:
    values = axes.model_dump()
    for name, change in changes.items():
        values[name] = {**values[name], **change} if isinstance(change, dict) else change
    return Axes.model_validate(values)


@pytest.mark.parametrize("name", CHANGES)
def test_switching_an_axis_on_changes_the_gradient(name: str) -> None:
    axes, changes = CHANGES[name]
    before, after = gradient_of(axes), gradient_of(changed(axes, changes))
    assert torch.equal(before, gradient_of(axes))
    assert gap(after, before) > MOVES


def test_every_axis_is_covered() -> None:
    switched = {"divergence", "over"}
    for _, changes in CHANGES.values():
        for name, change in changes.items():
            switched |= set(change) if isinstance(change, dict) else {name}
    known = {"over", "only_success"} | NOT_HERE
    for section in (SignalAxis, RewardAxis, PolicyGradientAxis):
        known |= set(section.model_fields)
    assert switched | NOT_HERE | {"kind"} == known
    sections = {"signal", "reward", "policy_gradient"}
    assert set(Axes.model_fields) == sections | {"over", "only_success"} | NOT_HERE


def test_no_two_divergences_have_one_gradient() -> None:
    kinds = set(get_args(SignalAxis.model_fields["divergence"].annotation)) - {"none", "k1"}
    found = {"k1": gradient_of(Axes())}
    for kind in kinds:
        found[kind] = gradient_of(Axes(signal=SignalAxis(divergence=kind, coupling="loss")))
    assert len(found) == 9
    for one, two in itertools.combinations(found, 2):
        assert gap(found[one], found[two]) > MOVES, (one, two)


def test_no_two_index_sets_have_one_gradient() -> None:
    overs = get_args(Over)
    table = world()[0]
    sizes = {over: len(set(keys(table, over))) for over in overs}
    assert len(set(sizes.values())) == len(overs) == 6, sizes
    found = {over: gradient_of(Axes(over=over)) for over in overs}
    for one, two in itertools.combinations(overs, 2):
        assert gap(found[one], found[two]) > MOVES, (one, two)


def test_without_a_move_nothing_is_clipped() -> None:
    """The other side of the clips above: at ratio one they must not change a thing."""
    tight = {"policy_gradient": {"clip_low": 0.01, "clip_high": 0.01, "dual_clip": 1.1}}
    before = gradient_of(Axes(), moved=False)
    assert float(before.norm()) > 0.1
    assert gap(gradient_of(changed(Axes(), tight), moved=False), before) < 1e-6
