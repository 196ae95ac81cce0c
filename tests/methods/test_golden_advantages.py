"""Methods that end in a policy gradient, token by token as their papers write them."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from agentdistill.methods import compile as plan
from agentdistill.methods.index import get
from agentdistill.optimise import backward
from agentdistill.records import Trajectory
from agentdistill.views import Splice, View, splice
from tests.dense import gap, gradient
from tests.methods import (
    CLOSE,
    Play,
    Token,
    check,
    clipped,
    episodes,
    mean,
    model,
    read,
    scored,
    set_gains,
    trained_tokens,
    won,
)

# -- GRPO, OPD, TCOD ------------------------------------------------------------------------------


def test_grpo() -> None:
    def formula(plays: list[Play]) -> dict[str, Tensor]:
        set_gains(plays, won)
        return {
            "policy_gradient": mean(
                mean(clipped(t.s, t.old, p.extra["gain"]) for t in p.tokens)
                for p in plays
                if p.trained
            )
        }

    check("grpo", formula)


def _opd(plays: list[Play]) -> dict[str, Tensor]:
    return {
        "policy_gradient": mean(clipped(t.s, t.old, t.teacher - t.old)
                                for _, t in trained_tokens(plays))
    }  # fmt: skip


@pytest.mark.parametrize("name", ["opd", "lightning-opd", "tcod-b2f"])
def test_on_policy_distillation_by_tokens(name: str) -> None:
    check(name, _opd)


def test_tcod_f2b_means_over_turns() -> None:
    def formula(plays: list[Play]) -> dict[str, Tensor]:
        turns: dict[tuple[int, int], list[Tensor]] = {}
        for play, token in trained_tokens(plays):
            loss = clipped(token.s, token.old, token.teacher - token.old)
            turns.setdefault((play.of.number, token.turn), []).append(loss)
        return {"policy_gradient": mean(mean(losses) for losses in turns.values())}

    check("tcod-f2b", formula)


# -- SOD ------------------------------------------------------------------------------------------


def step_weights(tokens: list[Token], delta: float, eps: float = 1e-6) -> list[float]:
    """Section B.2: the running product goes on without the cap."""
    steps = range(tokens[-1].step + 1)
    d = [statistics.fmean(abs(t.old - t.teacher) for t in tokens if t.step == k) for k in steps]
    weights, product = [1.0], 1.0
    for before, after in itertools.pairwise(d):
        product *= (before + eps) / (after + eps)
        weights.append(min(product, 1 + delta))
    return weights


def sod(delta: float = 0.2, coef: float = 1.0) -> Any:
    def formula(plays: list[Play]) -> dict[str, Tensor]:
        set_gains(plays, won)
        losses = []
        for play in plays:
            weights = step_weights(play.tokens, delta)
            for token in play.tokens if play.trained else ():
                distil = coef * weights[token.step] * (token.teacher - token.old)
                losses.append(clipped(token.s, token.old, play.extra["gain"] + distil, 0.28))
        return {"policy_gradient": mean(losses)}

    return formula


def test_sod() -> None:
    check("sod", sod())


def test_sod_with_the_published_class_cap_and_a_coefficient() -> None:
    check("sod", sod(0.5, 0.3), weight={"step": {"delta": 0.5}}, signal={"coef": 0.3})


def test_the_episodes_reach_every_part_of_the_weights_of_sod() -> None:
    plays = read(episodes(), "old", "teacher", None, ())
    found = [step_weights(play.tokens, 0.2) for play in plays]
    later = [w for weights in found for w in weights[1:]]
    assert any(w == 1.2 for w in later) and any(w < 0.8 for w in later)
    assert [len(weights) for weights in found] == [2, 3, 2, 1, 2, 2, 1, 2, 1]
    assert len(episodes()[4].said) == 3  # of which the first two are one step


def _after_the_first(trajectory: Trajectory, stream: int) -> View:
    """A note that stands behind the first response, so that it cannot matter to it."""
    turn = trajectory.turns[0].span
    assert turn is not None
    at = turn.end if turn.stream == stream else 2
    return splice(trajectory.streams[stream], [Splice(at, insert=(7, 8))])


def test_sod_with_a_first_step_that_agrees_exactly() -> None:
    axes = get("sod").resolve(
        {"scorer": {"source": "self", "update": "live"}, "context": {"kind": "gold"}}
    )
    mine = [replace(episodes()[n], group="a") for n in (0, 2, 5, 7)]
    table, heads = scored(axes, mine, context=_after_the_first)
    first = table["step"] == 0
    gaps = table["logp/teacher@context"] - table["logp/old"]
    table["logp/teacher@context"][first] = table["logp/old"][first]
    assert float(gaps[first].abs().max()) < 1e-5 < float(gaps[~first].abs().max())
    metrics = plan.fill(table, axes)
    weights = table["weight/step"]
    d = [float(gaps[(table["trajectory"] == b) & ~first].abs().mean()) for b in range(len(mine))]
    wanted = [1e-6 / (d[b] + 1e-6) for b in table["trajectory"].tolist()]
    later = torch.tensor(wanted)[~first]
    assert torch.allclose(weights[~first], later, rtol=1e-3)
    assert float(weights[~first].max()) < 1e-3
    assert weights[first].tolist() == [1.0] * int(first.sum())
    assert metrics["weight/step/zero_first"] == len(mine)
    backward(model("student"), table, plan.terms(axes), heads, micro_tokens=99)
    found = gradient(model("student"))
    grpo = get("grpo").resolve({"over": "token", "policy_gradient": {"clip_high": 0.28}})
    plan.fill(table, grpo)
    backward(model("student"), table, plan.terms(grpo), heads, micro_tokens=99)
    assert gap(found, gradient(model("student"))) < 1e-2  # nothing but the reward is left


# -- G-OPD ----------------------------------------------------------------------------------------


def exopd(share: float, cap: float | None) -> Any:
    def formula(plays: list[Play]) -> dict[str, Tensor]:
        losses = []
        for _, t in trained_tokens(plays):
            gain = share * t.teacher + (1 - share) * t.base - t.old
            truncated = 1.0 if cap is None else min(math.exp(t.old - t.sampler), cap)
            losses.append(truncated * clipped(t.s, t.old, gain))
        return {"policy_gradient": mean(losses)}

    return formula


def test_exopd() -> None:
    check("exopd", exopd(1.25, 5.0))


def test_exopd_below_one_interpolates_and_a_tight_cap_bites() -> None:
    check("exopd", exopd(0.5, 1.1), signal={"share": 0.5}, policy_gradient={"tis_cap": 1.1})
    plays = read(episodes(), "old", "teacher", None, ())
    ratios = [math.exp(t.old - t.sampler) for play in plays for t in play.tokens]
    assert min(ratios) < 0.9 and max(ratios) > 1.2


def test_the_vector_of_g_opd() -> None:
    axes = get("exopd").resolve({})
    played = episodes()[:1]
    for share, wanted in ((0.5, 0.0), (1.0, 0.5), (1.25, 0.75)):
        table, _ = scored(axes, played)
        for name, value in (("teacher", -1.0), ("base", -2.0), ("old", -1.5)):
            table[f"logp/{name}"] = torch.full((len(table),), value)
        plan.fill(table, axes.at({"signal.share": share}))
        assert table["advantage"].tolist() == pytest.approx([wanted] * len(table))


# -- RLAD, RLSD -----------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0.5, 0.0, 0.8])
def test_rlad(a: float) -> None:
    def formula(plays: list[Play]) -> dict[str, Tensor]:
        set_gains(plays, won)
        losses = []
        for p, t in trained_tokens(plays):
            # r = (S / old)^a (S / T)^(1 - a)
            log_ratio = a * (t.s - t.old) + (1 - a) * (t.s - t.teacher)
            anchor = float((t.s - log_ratio).detach())
            losses.append(clipped(t.s, anchor, p.extra["gain"]))
        return {"policy_gradient": mean(losses)}

    check("rlad", formula, signal={"mixing": 1 - a})


@pytest.mark.parametrize("mixing", [0.5, 1.0])
def test_rlsd(mixing: float) -> None:
    def formula(plays: list[Play]) -> dict[str, Tensor]:
        set_gains(plays, won)
        losses = []
        for p, t in trained_tokens(plays):
            gain = p.extra["gain"]
            if t.teacher is not None:
                sign = (gain > 0) - (gain < 0)
                w = math.exp(sign * (t.teacher - t.old))
                gain *= (1 - mixing) + mixing * min(max(w, 0.8), 1.2)
            losses.append(clipped(t.s, t.old, gain))
        return {"policy_gradient": mean(losses)}

    check("rlsd", formula, told="scorer", signal={"mixing": mixing})


def test_the_solution_moves_some_advantages_of_rlsd_within_the_bound() -> None:
    plays = read(episodes(), "old", "old", "scorer", ())
    gaps = [abs(t.teacher - t.old) for p in plays for t in p.tokens if t.teacher is not None]
    assert min(gaps) < 0.18 and max(gaps) > 0.3


# -- pi-Distill, PI-OPSD --------------------------------------------------------------------------


def _kl(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_pi_distill(alpha: float) -> None:
    def formula(plays: list[Play]) -> dict[str, Tensor]:
        def paid(play: Play) -> float:
            return sum(play.of.rewards) - 0.25 * sum(
                _kl(t.log_old, t.log_teacher) for t in play.tokens
            )

        set_gains(plays, paid, std=False)
        teacher, student = [], []
        for p, t in trained_tokens(plays):
            teacher.append(clipped(t.informed, t.old, p.extra["gain"]))
            student.append(clipped(t.s, t.old, p.extra["gain"]))
        return {
            "policy_gradient/informed": alpha * mean(teacher),
            "policy_gradient": (1 - alpha) * mean(student),
        }

    check("pi-distill", formula, told="actor", informed_share=alpha)


@pytest.mark.parametrize("sampled", [False, True])
def test_pi_opsd(sampled: bool) -> None:
    """With the whole distributions (Rao-Blackwellised, as published), and with sampled tokens."""

    def formula(plays: list[Play]) -> dict[str, Tensor]:
        def paid(play: Play) -> float:
            told = [t for t in play.tokens if t.teacher is not None]
            kl = [t.old - t.teacher if sampled else _kl(t.log_old, t.log_teacher) for t in told]
            return sum(play.of.rewards) - 0.5 * sum(kl)

        set_gains(plays, paid, std=False)
        losses = [clipped(t.s, t.old, p.extra["gain"]) for p, t in trained_tokens(plays)]
        return {"policy_gradient": mean(losses)}

    kind = {"divergence": "k1" if sampled else "reverse_kl"}
    check("pi-opsd", formula, told="scorer", signal=kind)


# -- Uni-OPD --------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [0.4, 3.0])
def test_uni_opd(delta: float) -> None:
    def formula(plays: list[Play]) -> dict[str, Tensor]:
        for play in plays:
            play.extra["a"] = statistics.fmean(t.teacher - t.old for t in play.tokens)
        losses = []
        for p, t in trained_tokens(plays):
            shift = _shift(p, plays, delta) if p.of.valid else 0.0
            losses.append(clipped(t.s, t.old, t.teacher - t.old + shift))
        return {"policy_gradient": mean(losses)}

    check("uni-opd", formula, weight={"shift": {"delta": delta}})


def _shift(play: Play, plays: list[Play], delta: float) -> float:
    group = [p for p in plays if p.of.group == play.of.group and p.of.valid]
    right = [p.extra["a"] for p in group if p.of.success]
    wrong = [p.extra["a"] for p in group if not p.of.success]
    if not right or not wrong:
        return 0.0
    correct, incorrect = statistics.fmean(right), statistics.fmean(wrong)
    if correct - incorrect >= delta:
        return 0.0
    missing = (incorrect - correct) + delta
    return missing / 2 if play.of.success else -missing / 2


def test_the_vector_of_uni_opd_reaches_the_margin_exactly() -> None:
    one, two = episodes()[5], replace(episodes()[6], end="failure")
    axes = get("uni-opd").resolve({})
    table, _ = scored(axes, (one, two))
    table["logp/old"] = torch.zeros(len(table))
    table["logp/teacher"] = table.spread(torch.tensor([0.2, 0.3]))
    plan.fill(table, axes)
    found = {b: table["advantage"][table["trajectory"] == b].unique() for b in (0, 1)}
    assert found[0].tolist() == pytest.approx([0.45])
    assert found[1].tolist() == pytest.approx([0.05])
    assert CLOSE < float(found[0] - found[1]) == pytest.approx(0.4)
