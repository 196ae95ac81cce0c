"""Weights and shifts of the methods: direct formulas, reductions, invariances, extreme numbers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentdistill import advantage as adv
from agentdistill import weights as ws
from agentdistill.errors import ConfigError
from agentdistill.weighting import mean1

NAN = float("nan")
EPS = 1e-6
quick = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 10**6)
close = partial(torch.testing.assert_close, atol=1e-6, rtol=1e-5)


class Batch:
    """Rows of a few trajectories with a few steps each; NaN outside the mask."""

    def __init__(self, seed: int, n: int = 24, *, scale: float = 1.0) -> None:
        self.source = torch.Generator().manual_seed(seed)
        names = torch.tensor([-3, 10**12, 7])
        self.trajectory = names[torch.randint(3, (n,), generator=self.source)]
        self.number = torch.randint(4, (n,), generator=self.source) * 5 - 2
        self.step = self.trajectory * 100 + self.number
        self.mask = torch.rand(n, generator=self.source) < 0.75
        self.old, self.teacher = (scale * self.column() for _ in range(2))

    def column(self) -> Tensor:
        values = torch.randn(len(self.mask), generator=self.source)
        return values.where(self.mask, NAN)

    def divergence(self) -> Tensor:
        return ws.step_divergence(self.old, self.teacher, self.step, self.mask)

    def sod(self, **options: float) -> Tensor:
        place = self.trajectory, self.number, self.mask
        return ws.sod(self.divergence(), *place, **options)  # type: ignore[arg-type]

    def take(self, rows: Tensor) -> Batch:
        """These rows only, in this order."""
        other = Batch.__new__(Batch)
        for name, values in vars(self).items():
            setattr(other, name, values if name == "source" else values[rows])
        return other


def running_products(batch: Batch, delta: float) -> Tensor:
    """SOD's weights as its code has them: a running product over steps, capped where it is used."""
    want = torch.zeros(len(batch.mask))
    for name in batch.trajectory.unique():
        mine = batch.mask & (batch.trajectory == name)
        product, last = 1.0, None
        for number in batch.number[mine].unique().tolist():
            rows = mine & (batch.number == number)
            d = float((batch.old - batch.teacher)[rows].abs().double().mean())
            product *= 1.0 if last is None else (last + EPS) / (d + EPS)
            want[rows], last = min(product, 1 + delta), d
    return want


@quick
@given(seeds, st.sampled_from([0.0, 0.2, 0.5]))
def test_sod_is_the_running_product_capped_on_its_way_out(seed: int, delta: float) -> None:
    batch = Batch(seed)
    close(batch.sod(delta=delta), running_products(batch, delta), atol=1e-5, rtol=1e-4)


@quick
@given(seeds)
def test_step_divergence_is_the_mean_of_absolute_gaps(seed: int) -> None:
    batch = Batch(seed)
    want = torch.zeros(len(batch.mask))
    for step in batch.step.unique():
        rows = batch.mask & (batch.step == step)
        want[rows] = (batch.old - batch.teacher)[rows].abs().mean()
    close(batch.divergence(), want)


@quick
@given(seeds)
def test_order_and_padding_do_not_matter(seed: int) -> None:
    batch = Batch(seed)
    order = torch.randperm(len(batch.mask), generator=batch.source)
    shuffled = batch.take(order)
    close(shuffled.sod(), batch.sod()[order])
    close(batch.take(batch.mask).sod(), batch.sod()[batch.mask])
    assert torch.equal(batch.sod()[~batch.mask], torch.zeros(int((~batch.mask).sum())))


@quick
@given(seeds)
def test_the_anchor_is_the_first_step_that_the_student_wrote(seed: int) -> None:
    """K14: rows before the hand-over are masked, and the anchor moves with it."""
    batch = Batch(seed)
    handed = batch.number > 0
    batch.mask = batch.mask & handed
    close(batch.sod()[handed], batch.take(handed).sod())
    for name in batch.trajectory[batch.mask].unique():
        mine = batch.mask & (batch.trajectory == name)
        first = mine & (batch.number == batch.number[mine].min())
        assert torch.equal(batch.sod()[first], torch.ones(int(first.sum())))


@quick
@given(seeds, st.floats(0, 30), st.booleans())
def test_a_constant_divergence_gives_ones(seed: int, d: float, below: bool) -> None:
    batch = Batch(seed)
    batch.teacher = batch.teacher.round()  # so that the difference is exactly d again
    batch.old = batch.teacher + (-round(d) if below else round(d))
    assert torch.equal(batch.sod(), batch.mask.float())


@quick
@given(seeds)
def test_one_step_has_weight_one(seed: int) -> None:
    batch = Batch(seed)
    one = torch.zeros_like(batch.step)
    d = ws.step_divergence(batch.old, batch.teacher, batch.trajectory, batch.mask)
    assert torch.equal(ws.sod(d, batch.trajectory, one, batch.mask), batch.mask.float())


def test_a_step_back_after_the_cap_is_measured_from_the_first_step() -> None:
    d, step = torch.tensor([0.1, 0.05, 0.4]), torch.arange(3)
    every = torch.ones(3, dtype=torch.bool)
    got = ws.sod(d, torch.zeros_like(step), step, every, delta=0.0)
    close(got, torch.tensor([1.0, 1.0, 0.25]), atol=1e-5)


def test_what_to_log_of_sod() -> None:
    d = torch.tensor([0.0, 0.3, 0.1, 0.1, 0.05, 0.05, 0.4, NAN, 0.2, 0.0])
    trajectory = torch.tensor([5, 5, 2, 2, 2, 2, 2, 2, 9, 9])
    step = torch.tensor([50, 51, 20, 20, 21, 21, 22, 23, 90, 91])
    mask = ~d.isnan()
    report = ws.sod_report(d, trajectory, step, mask, delta=0.2)
    assert report["steps"] == 7
    assert report["zero_first"] == 1
    assert report["at_cap"] == pytest.approx(2 / 4)
    assert report["later_mean"] == pytest.approx((1.2 + 0.25 + 0.0 + 1.2) / 4, rel=1e-4)
    nothing = ws.sod_report(d, trajectory, step, mask & False)
    assert nothing == {"steps": 0, "later_mean": 1, "at_cap": 0, "zero_first": 0}


@pytest.mark.parametrize("options", [{"delta": -0.1}, {"eps": 0.0}])
def test_sod_refuses_impossible_numbers(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Batch(0).sod(**options)


# -- the other factors ----------------------------------------------------------------------------

Tokens = Any
TOKEN_WEIGHTS = {
    "entropy": lambda x, m: ws.entropy_weight(x, m, 0.7),
    "agreement": lambda x, m: ws.agreement(x, m, 2.0),
    "min_max": ws.min_max,
    "top_share": lambda x, m: ws.top_share(x, m, 0.4),
    "temperature": ws.difficulty_temperature,
    "perplexity": lambda x, m: ws.softmax_ppl(-x, (x.nan_to_num() > 1).long(), m, tau=0.5),
}
every_token_weight = pytest.mark.parametrize("name", TOKEN_WEIGHTS)


@every_token_weight
@quick
@given(seed=seeds)
def test_factors_see_the_masked_rows_only(name: str, seed: int) -> None:
    batch, weigh = Batch(seed), TOKEN_WEIGHTS[name]
    x = batch.column().abs().requires_grad_()
    got = weigh(x, batch.mask)
    outside = 1.0 if name == "temperature" else 0.0
    assert not got.requires_grad and got.isfinite().all()
    assert (got[~batch.mask] == outside).all()
    order = torch.randperm(len(x), generator=batch.source)
    close(weigh(x[order], batch.mask[order]), got[order])
    close(weigh(x[batch.mask], batch.mask[batch.mask]), got[batch.mask])


@every_token_weight
def test_factors_of_nothing_and_of_zeros(name: str) -> None:
    weigh = TOKEN_WEIGHTS[name]
    empty = torch.zeros(4, dtype=torch.bool)
    assert (weigh(torch.full((4,), NAN), empty) == (name == "temperature")).all()
    flat = weigh(torch.zeros(4), ~empty)
    assert (flat == (name != "min_max")).all()


def test_neutral_parameters_give_ones() -> None:
    x, mask = torch.tensor([0.3, 2.0, 9.0]), torch.ones(3, dtype=torch.bool)
    one = torch.ones(3)
    assert torch.equal(ws.entropy_weight(x, mask, 0.0), one)
    assert torch.equal(ws.agreement(x, mask, 0.0), one)
    assert torch.equal(ws.top_share(x, mask, 1.0), one)
    assert torch.equal(ws.difficulty_temperature(x, mask, strength=0.0), one)
    assert torch.equal(ws.pass_rate_weight(torch.tensor([0.0, 0.5, 1.0]), 0, 0), one)
    assert torch.equal(ws.softmax_ppl(x, torch.zeros(3).long(), mask, tau=math.inf), one)
    assert torch.equal(ws.signed(mask), one)


def test_agreement_is_bounded_on_both_sides() -> None:
    variance = torch.cat([torch.ones(99), torch.tensor([1e6])])
    mask = torch.ones(100, dtype=torch.bool)
    assert ws.agreement(variance, mask, 1.0).min() == pytest.approx(1 / 11)
    assert ws.agreement(variance, mask, 1e6).min() == pytest.approx(0.01)


def test_the_top_share_rounds_up_and_keeps_ties() -> None:
    score, mask = torch.tensor([1.0, 3.0, 3.0, 2.0, NAN]), torch.tensor([True] * 4 + [False])
    assert ws.top_share(score, mask, 0.01).tolist() == [0, 1, 1, 0, 0]
    assert ws.top_share(score, mask, 0.51).tolist() == [0, 1, 1, 1, 0]
    for share in (0.0, 1.1):
        with pytest.raises(ConfigError, match="share"):
            ws.top_share(score, mask, share)


def test_temperatures_of_extreme_scores_stay_within_bounds() -> None:
    score, mask = torch.tensor([0.0, 1.0, 1e15]), torch.ones(3, dtype=torch.bool)
    got = ws.difficulty_temperature(score, mask, base=2.0, strength=0.5)
    close(got, 2 * torch.tensor([0.5, 0.0, -0.5]).exp())


@quick
@given(seeds, st.sampled_from([-1.0, 1.0]), st.sampled_from([0.3, 1.0, 4.0]))
def test_perplexity_weights_are_a_softmax_times_the_count(
    seed: int, sign: float, tau: float
) -> None:
    batch = Batch(seed)
    logp = -batch.column().abs()
    got = ws.softmax_ppl(logp, batch.trajectory, batch.mask, sign, tau)
    for name in batch.trajectory[batch.mask].unique():
        mine = batch.mask & (batch.trajectory == name)
        close(got[mine], int(mine.sum()) * (-sign * logp[mine] / tau).softmax(-1))


def test_perplexity_weights_of_far_values_are_finite() -> None:
    logp, mask = torch.tensor([-1e4, -1.0]), torch.ones(2, dtype=torch.bool)
    assert ws.softmax_ppl(logp, mask.long(), mask).tolist() == [2, 0]
    with pytest.raises(ConfigError, match="tau"):
        ws.softmax_ppl(logp, mask.long(), mask, tau=0.0)


# -- advantages -----------------------------------------------------------------------------------


@quick
@given(seeds, st.sampled_from(["both", "correct_up", "incorrect_down"]), st.floats(-1, 3))
def test_a_shift_closes_the_gap_exactly_and_only_where_there_is_one(
    seed: int, side: str, delta: float
) -> None:
    batch = Batch(seed, 12)
    mean, success = batch.column(), torch.rand(12, generator=batch.source) < 0.5
    options: dict[str, Any] = {"delta": delta, "side": side}
    shift = adv.margin_shift(mean, success, batch.trajectory, batch.mask, **options)
    assert (shift[~batch.mask] == 0).all()
    for name in batch.trajectory.unique():
        mine = batch.mask & (batch.trajectory == name)
        right, wrong = mine & success, mine & ~success
        if not (right.any() and wrong.any()):
            assert (shift[mine] == 0).all()
            continue
        before = mean[right].mean() - mean[wrong].mean()
        moved = (mean + shift).nan_to_num()
        after = moved[right].mean() - moved[wrong].mean()
        assert after.item() == pytest.approx(max(float(before), delta), abs=1e-5)
        assert side != "correct_up" or (shift[wrong] == 0).all()
        assert side != "incorrect_down" or (shift[right] == 0).all()


def test_a_shift_by_the_closest_pair() -> None:
    mean, success = torch.tensor([0.9, 0.1, 0.3, -0.5]), torch.tensor([True, True, False, False])
    every, group = success | True, torch.zeros(4, dtype=torch.long)
    got = adv.margin_shift(mean, success, group, every, delta=0.4, statistic="minmax")
    close(got, torch.tensor([0.3, 0.3, -0.3, -0.3]))
    nothing = adv.margin_shift(mean, success, group, every, delta=-math.inf)
    assert torch.equal(nothing, torch.zeros(4))
    for options in ({"side": "up"}, {"statistic": "median"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            adv.margin_shift(mean, success, group, every, **options)  # type: ignore[arg-type]


def test_retries_without_a_valid_reward_neither_get_nor_give() -> None:
    first, second = torch.tensor([0.0, NAN, 1.0]), torch.tensor([1.0, 1.0, NAN])
    valid, group = torch.tensor([True, False, False]), torch.zeros(3, dtype=torch.long)
    assert adv.retried(second, first, group, valid).tolist() == [1.0, 0.0, 0.0]


@quick
@given(seeds)
def test_the_shaped_loss_has_the_gradient_of_its_formula(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    logp, a = -torch.rand(5, generator=source) * 9, torch.randn(5, generator=source)
    leaf, other = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    p = other.exp()
    (got,) = torch.autograd.grad(adv.shaped_loss(leaf, a).sum(), leaf)
    (want,) = torch.autograd.grad((-a * p / (p + 0.1)).sum(), other)
    close(got, want)


@quick
@given(seeds, st.sampled_from([0.3, 1.0, 2.5]))
def test_methods_at_their_neutral_values_are_opd_and_grpo(seed: int, coef: float) -> None:
    """OPD = G-OPD(1) = SOD(no drift) = Uni-OPD(-inf); GRPO = TRRD(a = 1) = RLSD(0) = SOD(0)."""
    batch = Batch(seed)
    opd = adv.opd(batch.old, batch.teacher, batch.mask, coef)
    nothing = torch.full_like(batch.old, NAN)
    place = batch.old, batch.teacher, nothing, batch.mask
    assert torch.equal(adv.extrapolated(*place, share=1.0, coef=coef), opd)
    alone = ws.sod(batch.divergence(), batch.trajectory, batch.trajectory * 0, batch.mask)
    assert torch.equal(alone * opd, opd)
    shift = adv.margin_shift(
        opd, batch.old > 0, batch.trajectory, batch.mask, delta=-math.inf
    )  # per row instead of per trajectory
    assert torch.equal(opd + shift, opd)

    reward = torch.randn(len(opd), generator=batch.source)
    assert torch.equal(adv.magnitude(reward, opd, mixing=0.0), reward)
    assert torch.equal(adv.magnitude(reward, opd * 0, mixing=0.6), reward)
    assert torch.equal(adv.anchored(reward, nothing, mixing=0.0), reward)
    assert torch.equal(adv.anchored(reward, opd, mixing=1.0), opd)
    assert torch.equal(reward + 0.0 * batch.sod() * opd, reward)


@quick
@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_the_teacher_never_turns_an_advantage_round(seed: int, mixing: float, bound: float) -> None:
    source = torch.Generator().manual_seed(seed)
    a, gap = torch.randn(2, 9, generator=source)
    assume(bool((a != 0).all()))
    got = adv.magnitude(a, 30 * gap, mixing, bound)
    assert (got * a >= 0).all()
    assert ((got / a - 1).abs() <= mixing * bound + 1e-5).all()
    close(adv.magnitude(3 * a, 30 * gap, mixing, bound), 3 * got)
    grows = adv.magnitude(a, a * gap.abs(), mixing, bound)
    assert (grows.abs() >= a.abs() * (1 - 1e-6)).all()


def test_the_bound_of_the_magnitude_is_checked() -> None:
    with pytest.raises(ConfigError, match="bound"):
        adv.magnitude(torch.ones(1), torch.ones(1), bound=1.5)


@quick
@given(seeds, st.sampled_from([1.0, 30.0, 1e4]))
def test_extreme_ratios_give_finite_losses_and_gradients(seed: int, scale: float) -> None:
    batch = Batch(seed, scale=scale)
    mask = batch.mask
    opd = adv.opd(batch.old, batch.teacher, mask)
    base, reward = scale * batch.column(), torch.randn(len(mask), generator=batch.source)
    advantages = {
        "sod": reward + batch.sod() * opd,
        "g-opd": adv.extrapolated(batch.old, batch.teacher, base, mask, 1.25),
        "rlsd": adv.magnitude(reward, opd, 0.5, 0.2),
        "srpo": mean1(ws.entropy_weight(base.abs(), mask), mask) * opd,
    }
    old = {name: batch.old for name in advantages}
    advantages["trrd"], old["trrd"] = reward, adv.anchored(batch.old, batch.teacher, 0.5)
    for name, advantage in advantages.items():
        live = (scale * batch.column()).requires_grad_()
        for loss in (adv.ppo_loss, adv.importance_loss):
            values = loss(live[mask], old[name][mask], advantage[mask])
            (gradient,) = torch.autograd.grad(values.sum(), live)
            assert values.isfinite().all(), name
            assert gradient[mask].isfinite().all(), name
            assert (gradient[~mask] == 0).all(), name
