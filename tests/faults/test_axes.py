"""Switching an axis on must change the gradient; one that changes nothing is not connected.

All on one table whose trajectories have rewards, in which the student has moved since it sampled
(so that ratios differ from one), and in which no two index sets have the same units. What decides
about the rows themselves, or about who scores them, is switched in whole stages instead, whose
metrics must differ from the iteration on in which it acts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from agentdistill import judging
from agentdistill.config import Over, RunConfig, Section, TrainStage, load
from agentdistill.methods import compile as plan
from agentdistill.methods.index import get
from agentdistill.methods.space import (
    Axes,
    Choice,
    RewardAxis,
    SignalAxis,
    TaskAxis,
    WeightAxis,
)
from agentdistill.optimise import backward
from agentdistill.recipe import execute
from agentdistill.records import Author, Stream, Trajectory, Turn
from agentdistill.run import Run
from agentdistill.table import Table, build
from agentdistill.teachers.scorer import LocalScorer
from tests.dense import episode, gap, gradient, keys, make_model, sampled_by
from tests.test_composition import grown, lines, recipe, stage_of
from tests.test_training import timeless

MOVES = 1e-3
"""Relative change of the gradient that counts as one (rounding is below 1e-6)."""

LOSS = {"coupling": "loss"}
GRPO = RewardAxis(kind="grpo", eps=1e-6)
EXACT = SignalAxis(divergence="reverse_kl", coupling="loss")
FORWARD = SignalAxis(divergence="forward_kl", coupling="loss", top_k=3)
TILTED = SignalAxis(divergence="reverse_kl", coupling="loss", share=1.5)
MIXED = WeightAxis(token=Choice(name="entropy"))
PACED = TaskAxis(weight="pass_rate")
ANCHOR = Axes(signal=SignalAxis(coupling="anchor"), reward=GRPO)
SHAPED = Axes(signal=SignalAxis(coupling="magnitude"), reward=GRPO)
FAILURES = Axes(signal=SignalAxis(route=Choice(name="failure")))
BOTH = {"divergence": "nll", "coupling": "loss", "route": {"name": "success"}}
CHANGES: dict[str, tuple[Axes, dict[str, Any]]] = {
    "coef": (Axes(signal=SignalAxis(divergence="k2", coupling="loss")), {"signal": {"coef": 2.0}}),
    "coef of the advantage": (Axes(), {"signal": {"coef": 0.5}}),
    "coef beside a reward": (Axes(reward=GRPO), {"signal": {"coef": 0.0}}),
    "coupling": (Axes(), {"signal": {"divergence": "rho_k3", **LOSS}}),
    "coupling: reward": (Axes(reward=GRPO), {"signal": {"coupling": "reward"}}),
    "coupling: reward, exact": (
        Axes(reward=GRPO, signal=SignalAxis(coupling="reward")),
        {"signal": {"divergence": "reverse_kl"}},
    ),
    "coupling: anchor": (Axes(reward=GRPO), {"signal": {"coupling": "anchor"}}),
    "coupling: magnitude": (Axes(reward=GRPO), {"signal": {"coupling": "magnitude"}}),
    "beta": (Axes(signal=SignalAxis(divergence="jsd", coupling="loss")), {"signal": {"beta": 0.1}}),
    "temperature": (Axes(signal=EXACT), {"signal": {"temperature": 2.0}}),
    "top_k": (Axes(signal=EXACT), {"signal": {"top_k": 3}}),
    "support": (Axes(signal=FORWARD), {"signal": {"support": "teacher"}}),
    "share": (Axes(signal=EXACT), {"signal": {"share": 1.5}}),
    "share of the advantage": (Axes(), {"signal": {"share": 1.5}}),
    "rest": (Axes(signal=TILTED), {"signal": {"rest": "student"}}),
    "clip": (Axes(signal=EXACT), {"signal": {"clip": 0.5}}),
    "ratio_cap": (Axes(signal=EXACT), {"signal": {"ratio_cap": 2.0}}),
    "mixing of an anchor": (ANCHOR, {"signal": {"mixing": 0.1}}),
    "mixing of a magnitude": (SHAPED, {"signal": {"mixing": 1.0}}),
    "bound": (SHAPED, {"signal": {"bound": 0.9}}),
    "route": (Axes(), {"signal": {"route": {"name": "success"}}}),
    "a route's parameter": (
        Axes(signal=SignalAxis(route=Choice(name="above"))),
        {"signal": {"route": {"name": "above", "threshold": 0.5}}},
    ),
    "also": (FAILURES, {"also": (BOTH,)}),
    "weight.token": (Axes(), {"weight": {"token": {"name": "entropy"}}}),
    "weight.step": (Axes(), {"weight": {"step": {"name": "sod"}}}),
    "weight.trajectory": (Axes(), {"weight": {"trajectory": {"name": "perplexity"}}}),
    "weight.shift": (Axes(), {"weight": {"shift": {"name": "margin", "delta": 9.0}}}),
    "weight.normalise": (Axes(weight=MIXED), {"weight": {"normalise": "mean1"}}),
    "weight.normalise: by group": (
        Axes(weight=WeightAxis(token=Choice(name="entropy"), normalise="mean1")),
        {"weight": {"normalise": "mean1_group"}},
    ),
    "task.weight": (Axes(), {"task": {"weight": "pass_rate"}}),
    "task.a": (Axes(task=PACED), {"task": {"a": 2.0}}),
    "task.b": (Axes(task=PACED), {"task": {"b": 2.0}}),
    "task.normalise": (Axes(task=PACED), {"task": {"normalise": "mean1"}}),
    "reward": (Axes(), {"reward": {"kind": "grpo"}}),
    "reward.coef": (Axes(reward=GRPO), {"reward": {"coef": 3.0}}),
    "reward.source: score": (Axes(reward=GRPO), {"reward": {"source": "score"}}),
    "reward.source: reward": (Axes(reward=GRPO), {"reward": {"source": "reward"}}),
    "reward.normalise": (Axes(reward=GRPO), {"reward": {"normalise": "none"}}),
    "reward.ddof": (Axes(reward=GRPO), {"reward": {"ddof": 0}}),
    "reward.eps": (Axes(reward=GRPO), {"reward": {"eps": 0.5}}),
    "reward.route": (
        Axes(reward=GRPO, signal=SignalAxis(route=Choice(name="failure"))),
        {"reward": {"route": {"name": "rest"}}},
    ),
    "clip_low": (Axes(), {"policy_gradient": {"clip_low": 0.01}}),
    "clip_high": (Axes(), {"policy_gradient": {"clip_high": 0.01}}),
    "dual_clip": (Axes(), {"policy_gradient": {"dual_clip": 1.1}}),
    "tis_cap": (Axes(), {"policy_gradient": {"tis_cap": 1.05}}),
    "tis_cap of a loss": (Axes(signal=EXACT), {"policy_gradient": {"tis_cap": 1.05}}),
    "tis_cap of a reward alone": (
        Axes(reward=GRPO, signal=SignalAxis(divergence="none")),
        {"policy_gradient": {"tis_cap": 1.05}},
    ),
    "shared": (FAILURES, {"also": (BOTH,), "shared": True}),
    "only_success": (Axes(), {"only_success": True}),
}

GKD: dict[str, Any] = {"actor": "mixed", "signal": {"divergence": "jsd", "coupling": "loss"}}
SELF: dict[str, Any] = {
    "scorer": {"source": "self"},
    "context": {"kind": "gold"},
    "signal": {"divergence": "jsd", "coupling": "loss"},
}
SIBLING: dict[str, Any] = {**SELF, "context": {"kind": "sibling"}}
SHOWN: dict[str, Any] = {**SELF, "context": {"kind": "demonstrations"}}
INFORMED: dict[str, Any] = {
    "actor": "informed",
    "context": {"kind": "gold", "reader": "actor"},
}
HINTED: dict[str, Any] = {
    "context": {"kind": "gold", "reader": "actor"},
    "group": {"edit": "hint", "replace": 1},
    "reward": {"kind": "grpo"},
}
STAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "actor": ({}, {"actor": "cached"}),
    "student_share": (GKD, {"student_share": 0.0}),
    "informed_share": (INFORMED, {"informed_share": 1.0}),
    "start.kind": ({}, {"start": {"kind": "f2b"}}),
    "start.eta": ({"start": {"kind": "f2b"}}, {"start": {"eta": 1}}),
    "start.k_start": ({"start": {"kind": "f2b"}}, {"start": {"k_start": 3}}),
    "start.horizon": ({"start": {"kind": "b2f"}}, {"start": {"horizon": "k"}}),
    "start.turns": ({"start": {"kind": "fixed", "turns": 1}}, {"start": {"turns": 3}}),
    "scorer.source": ({"context": {"kind": "gold"}}, {"scorer": {"source": "self"}}),
    "scorer.update": (SELF, {"scorer": {"update": "live"}}),
    "scorer.every": (
        {**SELF, "scorer": {"source": "self", "update": "sync"}},
        {"scorer": {"every": 3}},
    ),
    "scorer.rate": (
        {**SELF, "scorer": {"source": "self", "update": "ema"}},
        {"scorer": {"rate": 1.0}},
    ),
    "scorer.stored": ({"actor": "cached"}, {"scorer": {"stored": True}}),
    "context.kind": (SELF, {"context": {"kind": "actions"}}),
    "context.reader": ({**HINTED, "group": {}, "context": {"kind": "gold"}}, HINTED),
    "context.control": (SELF, {"context": {"control": "shuffled"}}),
    "context.feedback": (SIBLING, {"context": {"feedback": "always"}}),
    "context.k": (SHOWN, {"context": {"k": 3}}),
    "context.text": (SELF, {"context": {"text": "Psst: {note}"}}),
    "group.edit": ({"reward": {"kind": "grpo"}}, HINTED),
    "group.replace": (HINTED, {"group": {"replace": 3}}),
    "group.attempts": (
        {**HINTED, "group": {**HINTED["group"], "attempts": 1}},
        {"group": {"attempts": 5}},
    ),
    "schedules": ({}, {"signal": {"coef": {"from": 1, "to": 0}}}),
}
"""What decides about rows and scorers: overrides of ``opd`` before and after."""


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
def world(moved: bool = True) -> tuple[Table, Any, dict[str, Any]]:
    """A scored table, the student (which has ``moved`` since it sampled) and who scores."""
    old, student, teacher, base = make_model(0), make_model(0), make_model(1), make_model(3)
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in student.parameters() if moved else ():
            weight += 0.02 * torch.randn(weight.shape, generator=source, dtype=weight.dtype)
    played = [episode(n, s, window=1, group=f"g{n // 3}") for n, s in enumerate(SHAPES)]
    made = [_interrupted(sampled_by(old, _with_rewards(t, n))) for n, t in enumerate(played)]
    table = build(made)
    scorers = {plan.TEACHER: teacher, plan.BASE: base, plan.OLD: old}
    for name, model in scorers.items():
        LocalScorer(name, model).score(table, ("logp", "entropy", "hidden"))
    source.manual_seed(3)  # an engine of other precision
    table["logp/sampler"] = table["logp/old"] + 0.2 * torch.randn(len(table), generator=source)
    return table, student, {name: m.get_output_embeddings() for name, m in scorers.items()}


def gradient_of(axes: Axes, *, moved: bool = True) -> Tensor:
    table, student, heads = world(moved)
    own = replace(table, columns=dict(table.columns))
    plan.fill(own, axes, pass_rates=torch.tensor([0.9, 0.2, 0.4, 0.7, 0.3]), heads=heads)
    backward(student, own, plan.terms(axes), heads, micro_tokens=40)
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


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished stages that the others need."""
    output = tmp_path_factory.mktemp("ground")
    execute(load(recipe(output)))
    return output / "micro"


def played(ground: Path, output: Path, axes: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of three iterations, without clocks."""
    stage = stage_of(get("opd").resolve(axes), axes=axes, iterations=3, tasks=5)
    execute(load(grown(ground, output, stage)))
    return [timeless(line) for line in lines(output)]


def merged(axes: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {k: v for k, v in changes.items() if isinstance(v, dict) and k in axes}
    return {**axes, **changes, **{k: merged(axes[k], v) for k, v in both.items()}}


@pytest.mark.parametrize("name", STAGES)
def test_switching_an_axis_on_changes_what_a_stage_does(
    ground: Path, tmp_path: Path, name: str
) -> None:
    before, changes = STAGES[name]
    assert played(ground, tmp_path / "a", before) != played(
        ground, tmp_path / "b", merged(before, changes)
    )


def test_exploration_decides_between_a_good_skill_and_a_rare_one() -> None:
    chosen = []
    for exploration in (0.0, 2.0):
        overrides = {"context": {"kind": "skill", "exploration": exploration}}
        axes = get("skill-sd").resolve(overrides)
        found = judging._skills(Run(RunConfig()), TrainStage(name="one", iterations=1), axes)
        assert found is not None
        bank = found.bank
        for text, reward, times in (("good", 0.6, 50), ("rare", 0.5, 1)):
            skill = bank.add("task", text, 0)
            for _ in range(times):  # one that was never tried comes first
                used = bank.select("task", 1)
                assert used is not None and used.id == skill.id
                bank.reward("task", skill.id, [reward])
        chosen.append(bank.select("task", 1))
    assert [skill.text for skill in chosen if skill] == ["good", "rare"]


def test_a_stage_does_the_same_again(ground: Path, tmp_path: Path) -> None:
    """The other side of the test above."""
    one, two = (played(ground, tmp_path / folder, HINTED) for folder in "ab")
    assert one == two


def _fields(section: type[Section] = Axes, path: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section) and kind is not Choice:
            yield from _fields(kind, f"{path}{name}.")
        else:
            yield path + name


def _switched(axes: Axes, changes: dict[str, Any]) -> set[str]:
    """Dotted keys in which ``axes`` change."""
    one, two = (dict(_values(a.model_dump())) for a in (axes, changed(axes, changes)))
    return {key for key in one if one[key] != two[key]}


def _values(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and "name" not in value:
            yield from _values(value, f"{path}{name}.")
        else:
            yield path + name, value


def test_every_axis_is_covered() -> None:
    switched = set(STAGES) | {"signal.divergence", "over", "context.exploration"}  # tested apart
    for axes, changes in CHANGES.values():
        switched |= _switched(axes, changes)
    known = set(_fields())
    assert known <= switched, known - switched
    assert {name for name in STAGES if name not in known} == set()


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
