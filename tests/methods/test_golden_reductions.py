"""Methods that must become each other at the ends of their axes, or where a term has no rows.

Each pair is two presets with overrides, on the same random episodes, after an update (so that
ratios differ from one). Source: the reductions that the papers state, and those that follow.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from agentdistill.methods import compile as plan
from agentdistill.methods.index import get
from agentdistill.table import Table
from tests.dense import VOCAB, gap
from tests.methods import CLOSE, Episode, episodes, gradient_of

SEEDS = (1, 2)
EXACT = {"divergence": "reverse_kl", "coupling": "loss"}
OUTCOME = {"source": "success", "normalise": "std", "eps": 1e-6}
CLIP = {"clip_high": 0.2, "tis_cap": None}
SELF = {"source": "self", "update": "ema"}


KNOWN: dict[tuple[int, str, str], Tensor] = {}


def on(seed: int, name: str, edit: str = "", **overrides: Any) -> Tensor:
    """Gradient of a method on the random episodes of a seed, for a student that has moved."""
    axes = get(name).resolve(overrides)
    key = seed, edit, repr(axes)
    if key not in KNOWN:
        KNOWN[key] = gradient_of(axes, edited(seed, edit))[1]
    return KNOWN[key]


def edited(seed: int, edit: str) -> tuple[Episode, ...]:
    """The random episodes of a seed, as they are or all alike in one respect."""
    played = episodes(seed)
    if edit in ("success", "failure"):
        return tuple(replace(e, end=edit) for e in played)
    if edit in ("no note", "note"):
        kept = edit == "note"
        return tuple(replace(e, note=(e.note or (9, 8, 7)) if kept else None) for e in played)
    return played


Point = tuple[str, str, dict[str, Any]]
REDUCTIONS: dict[str, tuple[Point, Point]] = {
    # on-policy distillation
    "exopd, share 1": (
        ("exopd", "", {"signal": {"share": 1}, "policy_gradient": CLIP}),
        ("opd", "", {}),
    ),
    "exopd on distributions, share 1": (
        ("exopd", "", {"signal": {**EXACT, "share": 1}, "policy_gradient": CLIP}),
        ("opd-exact", "", {}),
    ),
    "sod without weights and reward": (
        ("sod", "", {"weight": {"step": "none"}, "reward": {"kind": "none"},
                     "policy_gradient": CLIP}),
        ("opd", "", {}),
    ),
    "sod, coefficient of the reward 0": (
        ("sod", "", {"weight": {"step": "none"}, "reward": {"coef": 0}, "policy_gradient": CLIP}),
        ("opd", "", {}),
    ),
    "tcod-f2b over tokens": (("tcod-f2b", "", {"over": "token"}), ("opd", "", {})),
    "lightning-opd": (("lightning-opd", "", {}), ("opd", "", {})),
    "uni-opd, no margin": (
        ("uni-opd", "", {"weight": {"shift": {"delta": -math.inf}}}), ("opd", "", {})
    ),
    "scope, all wrong and flat": (
        ("scope", "failure", {"weight": {"trajectory": {"tau": math.inf}}}),
        ("opd", "failure", {}),
    ),
    # the reward alone
    "skill-sd, lambda 0": (
        ("skill-sd", "", {"signal": {"coef": 0}, "reward": OUTCOME, "policy_gradient": CLIP}),
        ("grpo", "", {"over": "token"}),
    ),
    "srpo without notes": (
        ("srpo", "no note", {"signal": {"top_k": 5}}), ("grpo", "no note", {"over": "token"})
    ),
    "rlad, a = 1": (("rlad", "", {"signal": {"mixing": 0}}), ("grpo", "", {"over": "token"})),
    "rlsd, l = 0": (("rlsd", "", {"signal": {"mixing": 0}}), ("grpo", "", {"over": "token"})),
    "rlsd without notes": (("rlsd", "no note", {}), ("grpo", "", {"over": "token"})),
    "sod, coefficient of the signal 0": (
        ("sod", "", {"signal": {"coef": 0}, "policy_gradient": CLIP}),
        ("grpo", "", {"over": "token"}),
    ),
    "kepo, tau above all, nobody edited": (
        ("kepo", "", {"signal": {"route": {"threshold": 1.5}}, "reward": {"eps": 1e-6}}),
        ("grpo", "", {"over": "token"}),
    ),
    "pi-opsd, beta 0": (
        ("pi-opsd", "", {"signal": {"coef": 0}, "reward": OUTCOME}),
        ("grpo", "", {"over": "token"}),
    ),
    # supervised fine-tuning
    "redi on successes alone": (
        ("redi", "success", {"signal": {"coef": 1}}), ("sft", "", {"only_success": False,
                                                                   "over": "trajectory"})
    ),
    "redi, nothing unlearnt": (
        ("redi", "", {"weight": {"trajectory": {"negative": 0}}, "signal": {"coef": 3}}),
        ("sft", "", {"over": "trajectory"}),
    ),
    "agent-distillation without openings": (("agent-distillation", "", {}), ("sft", "", {})),
    "scope, all right and flat": (
        ("scope", "success", {"weight": {"trajectory": {"tau": math.inf}}}), ("sft", "success", {})
    ),
    # distillation on given states
    "taid, t = 1": (("taid", "", {"signal": {"share": 1}, "schedules": {}}), ("kd", "", {})),
    "gkd, beta 0": (("gkd", "", {"student_share": 0, "signal": {"beta": 0}}), ("kd", "", {})),
    "gkd, beta 1": (
        ("gkd", "", {"student_share": 1, "signal": {"beta": 1}}), ("opd-exact", "", {})
    ),
    "paced, a = b = 0": (("paced", "", {"task": {"a": 0, "b": 0}}), ("kd", "", {})),
    "paced, mean 1 and a = b = 0": (
        ("paced", "", {"task": {"a": 0, "b": 0, "normalise": "mean1"}}), ("kd", "", {})
    ),
    # self-distillation
    "sdpo is the whole reverse KL": (
        ("sdpo", "", {"signal": {"beta": 1, "top_k": VOCAB, "ratio_cap": None},
                      "policy_gradient": CLIP}),
        ("opd-exact", "", {"scorer": SELF, "context": {"kind": "gold"}}),
    ),
    "opsd is gkd with a context": (
        ("opsd", "", {}), ("gkd", "", {"scorer": SELF, "context": {"kind": "gold"}})
    ),
    "srpo, all wrong and none weighed": (
        ("srpo", "failure", {"signal": {"top_k": 5}, "shared": False,
                             "weight": {"token": "none", "normalise": "none"}}),
        ("sdpo", "", {"signal": {"top_k": 5}, "policy_gradient": CLIP}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_methods_reduce_to_each_other(reduction: str) -> None:
    (one, edit, overrides), (other, same, changes) = REDUCTIONS[reduction]
    for seed in SEEDS:
        found, wanted = on(seed, one, edit, **overrides), on(seed, other, same, **changes)
        assert float(wanted.norm()) > 1e-4
        assert gap(found, wanted) < CLOSE, seed


@pytest.mark.parametrize(
    ("name", "edit", "other"),
    [
        ("exopd", "", "opd"), ("sod", "", "opd"), ("uni-opd", "", "opd"),
        ("scope", "failure", "opd"),
        ("skill-sd", "", "grpo"), ("srpo", "", "grpo"), ("rlad", "", "grpo"), ("rlsd", "", "grpo"),
        ("sod", "", "grpo"), ("kepo", "", "grpo"), ("pi-opsd", "", "grpo"), ("redi", "", "sft"),
        ("taid", "", "kd"), ("gkd", "", "kd"), ("paced", "", "kd"), ("gkd", "", "opd-exact"),
    ],
)  # fmt: skip
def test_none_of_them_is_the_other_as_it_stands(name: str, edit: str, other: str) -> None:
    small = {"signal": {"top_k": 5}} if name == "srpo" else {}
    changes = {} if name != "skill-sd" else {"reward": OUTCOME, "policy_gradient": CLIP}
    over = {"over": "token"} if other == "grpo" else {}
    mine = on(1, name, edit, **{**small, **changes})
    assert gap(mine, on(1, other, edit, **over)) > (1e-6 if name == "skill-sd" else 1e-3)


def _certain(table: Table, heads: plan.Heads) -> None:
    """A teacher that says what was said."""
    table["hidden/teacher"] = torch.nn.functional.one_hot(table["token"], VOCAB).double()
    heads[plan.TEACHER] = lambda hidden: 1e3 * hidden


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("gkd", {"student_share": 0, "signal": {"beta": 0}}),
        ("taid", {"signal": {"share": 1}, "schedules": {}}),
        ("kd", {}),
    ],
)
def test_a_teacher_that_is_certain_of_the_data_makes_them_sft(
    name: str, overrides: dict[str, Any]
) -> None:
    axes = get(name).resolve(overrides)
    for seed in SEEDS:
        _, found = gradient_of(axes, episodes(seed), spoil=_certain)
        assert gap(found, on(seed, "sft", only_success=False)) < CLOSE


def test_pi_distill_at_alpha_one_trains_the_informed_prompt_only() -> None:
    """GRPO on the same episodes, where the note is no note but part of the prompt."""
    for seed in SEEDS:
        signal = {"signal": {"coef": 0}, "reward": OUTCOME}
        found = on(seed, "pi-distill", informed_share=1, **signal)
        inside = tuple(
            replace(e, system=(*e.system, *(e.note or ())), note=None) for e in episodes(seed)
        )
        axes = get("grpo").resolve({"over": "token"})
        assert gap(found, gradient_of(axes, inside)[1]) < CLOSE
        assert gap(on(seed, "pi-distill", informed_share=0, **signal), found) > 1e-2


def test_a_missing_note_is_a_plain_prompt_for_pi_distill() -> None:
    for seed in SEEDS:
        for alpha in (0, 0.5, 1):
            found = on(seed, "pi-distill", "no note", informed_share=alpha, reward=OUTCOME)
            assert gap(found, on(seed, "grpo", "no note", over="token")) < CLOSE
