"""What no method may depend on: order, packing, and how far a teacher is from the student.

And what every method must depend on: the seed of its episodes, and its own choice on every axis.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from agentdistill.methods import compile as plan
from agentdistill.methods.index import METHODS, get
from agentdistill.methods.space import Axes
from agentdistill.table import Table
from tests.dense import gap
from tests.methods import descend, episodes, gradient_of, rates_of, scored

SAME = 1e-6


def point(name: str) -> Axes:
    """The method, with a number of tokens that the small vocabulary has, and both prompts."""
    axes = get(name).resolve({})
    small = {} if axes.signal.top_k is None else {"signal": {"top_k": 5}}
    both = {"informed_share": 0.4} if axes.actor == "informed" else {}
    return get(name).resolve({**small, **both})


@cache
def usual(name: str) -> Tensor:
    return gradient_of(point(name), episodes())[1]


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_order_packing_and_chunks_do_not_matter(name: str) -> None:
    axes, shuffled = point(name), list(episodes())
    random.Random(3).shuffle(shuffled)
    one = gradient_of(axes, shuffled, micro=1, chunk=1)
    other = gradient_of(axes, episodes(), micro=1 << 20, chunk=None)
    assert gap(one[1], usual(name)) < SAME
    assert gap(other[1], usual(name)) < SAME
    assert one[0].losses == pytest.approx(other[0].losses, rel=1e-5, abs=SAME)


def test_other_episodes_give_another_gradient(name: str) -> None:
    assert gap(gradient_of(point(name), episodes(1))[1], usual(name)) > 1e-2


def _extreme(table: Table, heads: plan.Heads) -> None:
    """Log-ratios of thousands to either side; teachers that are certain of the least likely."""
    source = torch.Generator().manual_seed(4)
    for column in list(table.columns):
        if column.startswith(("logp/teacher", "logp/base")):
            far = 1e4 * torch.randn(len(table), generator=source)
            table[column] = table.columns[column] + far
        if column.startswith("entropy/teacher"):
            table[column] = table.columns[column] * 1e4
    for name in (plan.TEACHER, plan.BASE):
        heads[name] = partial(_turned, heads[name])


def _turned(head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return -1e4 * head(hidden)


def test_extreme_teachers_leave_everything_finite(name: str) -> None:
    batch, found = gradient_of(point(name), episodes(), spoil=_extreme)
    assert bool(found.isfinite().all())
    assert all(math.isfinite(value) for value in batch.losses.values())
    assert (gap(found, usual(name)) > 1e-3) == point(name).scores


def test_views_that_do_not_fit_mask_their_rows(name: str) -> None:
    axes = point(name)
    table, heads = scored(axes, episodes(), limit=13)
    metrics = plan.fill(table, axes, pass_rates=rates_of(axes, episodes()), heads=heads)
    batch, found = descend(axes, (table, heads))
    assert batch.rows > 0 and not bool(table.valid().all())
    assert bool(found.isfinite().all())
    numbers = {**metrics, **batch.as_metrics()}
    assert [key for key, value in numbers.items() if not math.isfinite(value)] == []


@pytest.mark.parametrize("coupling", ["advantage", "loss"])
def test_a_share_that_leaves_one_needs_the_base_from_the_beginning(coupling: str) -> None:
    rising = {"divergence": "reverse_kl" if coupling == "loss" else "k1", "coupling": coupling,
              "share": {"from": 1, "to": 1.25}}  # fmt: skip
    axes = get("exopd").resolve({"signal": rising})
    table, heads = scored(axes, episodes())  # with what the beginning of the stage asks for
    later = axes.at({"signal.share": 1.25})
    plan.fill(table, later, heads=heads)
    _, found = descend(later, (table, heads))
    fixed = get("exopd").resolve({"signal": {**rising, "share": 1.25}})
    assert gap(found, gradient_of(fixed, episodes())[1]) < SAME


def test_weights_that_need_a_teacher_leave_alone_what_none_has_read() -> None:
    """SRPO, and its successes learnt as they are: nobody was shown anything beside them."""
    also = [{"divergence": "nll", "coupling": "loss", "route": "success"}]
    axes = get("srpo").resolve({"signal": {"top_k": 5}, "also": also})
    batch, found = gradient_of(axes, episodes())
    assert bool(found.isfinite().all())
    assert all(math.isfinite(value) for value in batch.losses.values())
