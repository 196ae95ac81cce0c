"""Advantages and policy-gradient losses: golden values, direct formulas, edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentdistill import advantage as adv
from agentdistill.errors import ConfigError

NAN = float("nan")


def one_group(*reward: float, **options: object) -> Tensor:
    size = len(reward)
    return adv.grpo(
        torch.tensor(reward),
        torch.zeros(size, dtype=torch.long),
        torch.ones(size, dtype=torch.bool),
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("ddof", "want"), [(0, 1.0), (1, 0.866025)])
def test_grpo_golden(ddof: int, want: float) -> None:
    got = one_group(1, 0, 0, 1, ddof=ddof, eps=1e-8)
    torch.testing.assert_close(got, want * torch.tensor([1.0, -1, -1, 1]), atol=1e-6, rtol=0)


def test_grpo_defaults_to_the_sample_deviation() -> None:
    torch.testing.assert_close(one_group(1, 0, 0, 1), one_group(1, 0, 0, 1, ddof=1, eps=1e-6))


def test_grpo_epsilon_is_added_to_the_deviation() -> None:
    assert one_group(1, -1, ddof=0, eps=1.0).tolist() == [0.5, -0.5]


def test_grpo_centres_only() -> None:
    assert one_group(1, 0, 0, 1, normalise="none").tolist() == [0.5, -0.5, -0.5, 0.5]


@pytest.mark.parametrize("reward", [(0.1,) * 7, (0.9,) * 3, (0.7,), (1e9, 1e9), ()])
@pytest.mark.parametrize("normalise", ["std", "none"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_groups_that_teach_nothing_get_exactly_zero(
    reward: tuple[float, ...], normalise: str, ddof: int
) -> None:
    got = one_group(*reward, normalise=normalise, ddof=ddof)
    assert torch.equal(got, torch.zeros(len(reward)))


def test_invalid_trajectories_neither_get_nor_give() -> None:
    reward = torch.tensor([1.0, 0.0, NAN, 5.0, 0.0, 1.0])
    group = torch.tensor([-3, 40, -3, 40, -3, 40])
    valid = torch.tensor([True, True, False, False, True, True])
    got = adv.grpo(reward, group, valid, ddof=0, eps=0.0)
    torch.testing.assert_close(got, torch.tensor([1.0, -1.0, 0.0, 0.0, -1.0, 1.0]))


def test_one_valid_member_is_no_group() -> None:
    valid = torch.tensor([True, False])
    got = adv.grpo(torch.tensor([1.0, 0.0]), torch.tensor([1, 1]), valid)
    assert torch.equal(got, torch.zeros(2))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 1.0]), st.integers(0, 2), st.booleans())),
    st.sampled_from(["std", "none"]),
    st.sampled_from([0, 1]),
)
def test_grpo_equals_a_loop_over_groups(
    batch: list[tuple[float, int, bool]], normalise: str, ddof: int
) -> None:
    reward = torch.tensor([r for r, _, _ in batch])
    group = torch.tensor([g for _, g, _ in batch], dtype=torch.long)
    valid = torch.tensor([v for _, _, v in batch], dtype=torch.bool)
    want = torch.zeros(len(batch))
    for name in group.unique():
        inside = valid & (group == name)
        members = reward[inside]
        if len(members) > 1:
            std = members.std(correction=ddof) + 1e-6 if normalise == "std" else 1
            want[inside] = (members - members.mean()) / std
    got = adv.grpo(reward, group, valid, normalise=normalise, ddof=ddof)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"normalise": "max"}, {"ddof": 2}])
def test_grpo_refuses_unknown_options(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        one_group(1, 0, **options)


def test_opd_golden() -> None:
    old = torch.tensor([-1, -2, -0.5], requires_grad=True)
    teacher = torch.tensor([-1.5, -1, -0.5])
    got = adv.opd(old, teacher, torch.tensor([True, True, False]))
    assert got.tolist() == [-0.5, 1.0, 0.0]
    assert not got.requires_grad
    assert adv.opd(old, teacher, torch.ones(3).bool(), coef=2.0).tolist() == [-1.0, 2.0, 0.0]


def test_opd_ignores_what_is_masked() -> None:
    got = adv.opd(torch.tensor([NAN, -1.0]), torch.tensor([-1.0, -math.inf]), torch.zeros(2).bool())
    assert got.tolist() == [0.0, 0.0]


PPO = [  # ratio, advantage, dual clip, loss, d loss / d logp
    (1.0, 2.0, 3.0, -2.0, -2.0),
    (1.1, 1.0, 3.0, -1.1, -1.1),
    (1.5, 1.0, 3.0, -1.3, 0.0),
    (0.5, 1.0, 3.0, -0.5, -0.5),
    (0.5, -1.0, 3.0, 0.8, 0.0),
    (1.5, -1.0, 3.0, 1.5, 1.5),
    (5.0, -1.0, 3.0, 3.0, 0.0),
    (5.0, -1.0, None, 5.0, 5.0),
    (5.0, -2.0, 4.0, 8.0, 0.0),
    (5.0, 1.0, 3.0, -1.3, 0.0),
    (2.0, 0.0, 3.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "dual", "loss", "slope"), PPO)
def test_ppo_by_the_formula(
    ratio: float, advantage: float, dual: float | None, loss: float, slope: float
) -> None:
    logp = torch.tensor([math.log(ratio) - 1], requires_grad=True)
    got = adv.ppo_loss(
        logp, torch.tensor([-1.0]), torch.tensor([advantage]), clip_high=0.3, dual_clip=dual
    )
    (grad,) = torch.autograd.grad(got.sum(), logp)
    assert got.item() == pytest.approx(loss, rel=1e-6)
    assert grad.item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("advantage", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize("gap", [-1e4, -30.0, 30.0, 1e4])
@pytest.mark.parametrize("dual", [3.0, None])
def test_extreme_ratios_stay_finite(advantage: float, gap: float, dual: float | None) -> None:
    logp = torch.tensor([gap], requires_grad=True)
    old, a = torch.zeros(1), torch.tensor([advantage])
    for loss in (adv.ppo_loss(logp, old, a, dual_clip=dual), adv.importance_loss(logp, old, a)):
        (grad,) = torch.autograd.grad(loss.sum(), logp)
        assert loss.isfinite().all()
        assert grad.isfinite().all()


def test_losses_differentiate_the_live_policy_only() -> None:
    leaves = [torch.tensor([x], requires_grad=True) for x in (-0.9, -1.0, 0.7)]
    for loss in (adv.ppo_loss(*leaves), adv.importance_loss(*leaves)):
        grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        assert grads[0] is not None and grads[0] != 0
        assert all(grad is None for grad in grads[1:])


def test_importance_loss_is_not_clipped() -> None:
    logp = torch.tensor([math.log(5.0)])
    got = adv.importance_loss(logp, torch.zeros(1), torch.tensor([2.0]))
    assert got.item() == pytest.approx(-10.0)


def test_dual_clip_must_exceed_one() -> None:
    with pytest.raises(ConfigError, match="dual_clip"):
        adv.ppo_loss(torch.zeros(1), torch.zeros(1), torch.ones(1), dual_clip=1.0)


def test_clip_fraction_counts_tokens_without_gradient() -> None:
    logp = torch.tensor([1.5, 1.5, 1.5, 0.5, 0.5, 0.5, 1.1, 0.9]).log().requires_grad_()
    old, a = torch.zeros(8), torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0])
    (grad,) = torch.autograd.grad(adv.ppo_loss(logp, old, a, dual_clip=None).sum(), logp)
    want = (grad == 0).float().mean()
    assert adv.clip_fraction(logp, old, a) == want == pytest.approx(2 / 8)
    assert adv.clip_fraction(logp[:0], old[:0], a[:0]) == 0


def test_truncated_importance_weights() -> None:
    train = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1e4, 0.0], requires_grad=True)
    sampler = torch.tensor([-1.0, -1 - math.log(3), -9.0, NAN, 0.0, -1e4])
    got = adv.truncated_is(train, sampler, cap=5.0)
    assert not got.requires_grad
    torch.testing.assert_close(got, torch.tensor([1.0, 3.0, 5.0, 1.0, 0.0, 5.0]))
    with pytest.raises(ConfigError):
        adv.truncated_is(train, sampler, cap=0.0)
