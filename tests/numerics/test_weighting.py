"""Reduction weights against plain loops, and their invariance to how a batch is cut."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentdistill import weighting as wt
from agentdistill.errors import ConfigError

NAN = float("nan")
row = st.tuples(st.floats(-5, 5), st.sampled_from([-7, 0, 3, 900_000_000_007]), st.booleans())
batches = st.lists(row, max_size=24)
Row = tuple[float, int, bool]


def columns(batch: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    x, unit, mask = zip(*batch, strict=True) if batch else ((), (), ())
    return (
        torch.tensor(x, dtype=torch.float64),
        torch.tensor(unit, dtype=torch.long),
        torch.tensor(mask, dtype=torch.bool),
    )


def mean_of_means(batch: list[Row]) -> float:
    units = defaultdict(list)
    for x, unit, kept in batch:
        if kept:
            units[unit].append(x)
    return sum(sum(v) / len(v) for v in units.values()) / max(len(units), 1)


@settings(max_examples=80, deadline=None)
@given(batches)
def test_weights_give_the_mean_over_units_of_the_mean_over_tokens(batch: list[Row]) -> None:
    x, unit, mask = columns(batch)
    weight = wt.reduce_weights(unit, mask)
    assert weight.dtype == torch.float32
    assert (weight * x).sum().item() == pytest.approx(mean_of_means(batch), abs=1e-6)
    assert weight.sum().item() == pytest.approx(float(mask.any()), abs=1e-6)
    assert torch.equal(weight[~mask], torch.zeros(int((~mask).sum())))


@settings(max_examples=80, deadline=None)
@given(batches)
def test_without_units_every_token_counts_the_same(batch: list[Row]) -> None:
    x, _, mask = columns(batch)
    got = (wt.reduce_weights(None, mask) * x).sum().item()
    kept = x[mask].tolist()
    assert got == pytest.approx(sum(kept) / max(len(kept), 1), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 7]), st.booleans())
def test_cutting_the_batch_changes_nothing(seed: int, parts: int, by_unit: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(30, generator=draw, dtype=torch.float64)
    unit = torch.randint(-4, 4, (30,), generator=draw) * 1000
    mask = torch.rand(30, generator=draw) < 0.7
    ids = unit if by_unit else None
    whole = (wt.reduce_weights(ids, mask) * x).sum()
    units, tokens = wt.count_units(ids, mask), wt.tokens_per_unit(unit, mask)
    total = torch.zeros((), dtype=torch.float64)
    for part in torch.randperm(30, generator=draw).tensor_split(parts):
        part_ids = None if ids is None else ids[part]
        weight = wt.reduce_weights(part_ids, mask[part], units=units, unit_tokens=tokens[part])
        total += (weight * x[part]).sum()
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(batches, st.randoms())
def test_row_order_does_not_matter(batch: list[Row], random: object) -> None:
    order = list(range(len(batch)))
    getattr(random, "shuffle")(order)  # noqa: B009
    _, unit, mask = columns(batch)
    shuffled = wt.reduce_weights(unit[order], mask[order])
    assert torch.equal(shuffled, wt.reduce_weights(unit, mask)[order])


def test_shared_denominator() -> None:
    mask = torch.tensor([True, True, False, True])
    branch = torch.tensor([True, False, False, False])
    weight = wt.reduce_weights(None, branch, units=wt.count_units(None, mask))
    torch.testing.assert_close(weight, torch.tensor([1 / 3, 0, 0, 0]))


def test_token_and_unit_means_differ_by_length() -> None:
    x = torch.tensor([1.0, 1.0, 1.0, 5.0])
    unit = torch.tensor([4, 4, 4, 9])
    mask = torch.ones(4, dtype=torch.bool)
    assert (wt.reduce_weights(None, mask) * x).sum() == pytest.approx(2)
    assert (wt.reduce_weights(unit, mask) * x).sum() == pytest.approx(3)


def test_an_empty_mask_gives_zeros() -> None:
    nothing = torch.zeros(3, dtype=torch.bool)
    for unit in (None, torch.tensor([1, 2, 2])):
        assert torch.equal(wt.reduce_weights(unit, nothing), torch.zeros(3))
    assert wt.count_units(torch.tensor([1, 2, 2]), nothing) == 0
    assert torch.equal(wt.mean1(torch.ones(3), nothing), torch.zeros(3))


def test_segments_ignore_what_is_masked() -> None:
    x = torch.tensor([1.0, NAN, 3.0, 5.0, NAN])
    index = torch.tensor([2, -1, 2, 0, 99])
    mask = torch.tensor([True, False, True, True, False])
    assert wt.segment_sum(x, index, mask, 4).tolist() == [5, 0, 4, 0]
    assert wt.segment_mean(x, index, mask, 4).tolist() == [5, 0, 2, 0]
    assert wt.segment_count(index, mask, 4).tolist() == [1, 0, 2, 0]


def test_segments_of_half_precision_are_summed_in_float32() -> None:
    x = torch.ones(1000, dtype=torch.bfloat16)
    index = torch.zeros(1000, dtype=torch.long)
    total = wt.segment_sum(x, index, index == 0, 1)
    assert total.dtype == torch.float32
    assert total.item() == 1000


def test_tokens_per_unit() -> None:
    unit = torch.tensor([8, -2, 8, 8, -2])
    mask = torch.tensor([True, True, True, False, False])
    assert wt.tokens_per_unit(unit, mask).tolist() == [2, 1, 2, 0, 0]


@settings(max_examples=60, deadline=None)
@given(batches)
def test_mean1_has_mean_one_in_every_scope(batch: list[Row]) -> None:
    x, scope, mask = columns(batch)
    weight = x.abs() + 0.1
    scaled = wt.mean1(weight, mask, scope)
    for unit in scope[mask].unique():
        inside = mask & (scope == unit)
        assert scaled[inside].mean().item() == pytest.approx(1, abs=1e-9)
        ratio = scaled[inside] / weight[inside]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert torch.equal(scaled[~mask], torch.zeros_like(scaled[~mask]))


def test_mean1_over_everything_and_over_zeros() -> None:
    mask = torch.tensor([True, True, True, False])
    weight = torch.tensor([1.0, 2.0, 3.0, NAN])
    torch.testing.assert_close(wt.mean1(weight, mask), torch.tensor([0.5, 1.0, 1.5, 0.0]))
    dead = wt.mean1(torch.zeros(4), mask, torch.tensor([1, 1, 2, 2]))
    assert torch.equal(dead, torch.zeros(4))


def test_weights_carry_no_gradient() -> None:
    weight = torch.ones(3, requires_grad=True)
    mask = torch.ones(3, dtype=torch.bool)
    index = torch.zeros(3, dtype=torch.long)
    for got in (wt.mean1(weight, mask), wt.segment_mean(weight, index, mask, 1)):
        assert not got.requires_grad


def test_a_mask_must_be_bool() -> None:
    with pytest.raises(ConfigError, match="bool"):
        wt.reduce_weights(None, torch.ones(3))
