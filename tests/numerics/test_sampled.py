"""Sampled-token estimators: what they estimate and, more important, what they descend.

Expectations are exact: sums over the three tokens of the vocabulary, weighted by who samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentdistill import divergence as dv
from agentdistill.advantage import importance_loss, opd, ppo_loss

S, T = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
RKL_GRAD = torch.tensor([0.346243, -0.220389, -0.125854])
FKL_GRAD = torch.tensor([0.3, -0.2, -0.1])


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    return grad


Estimator = Callable[[Tensor, Tensor, Tensor], Tensor]
ESTIMATORS: dict[str, tuple[Estimator, Tensor]] = {
    "k1": (lambda s, t, old: dv.k1(s, t), torch.zeros(3)),
    "k2": (lambda s, t, old: dv.k2(s, t), RKL_GRAD),
    "k3": (lambda s, t, old: dv.k3(s, t), FKL_GRAD),
    "rho_k3": (dv.rho_k3, RKL_GRAD),
    "k3+": (lambda s, t, old: dv.straight_through(dv.k3(s, t), dv.k2(s, t)), RKL_GRAD),
    "k1+": (lambda s, t, old: dv.straight_through(dv.k1(s, t), dv.k2(s, t)), RKL_GRAD),
    "policy gradient": (lambda s, t, old: dv.k1(old, t) * s, RKL_GRAD),
    "importance": (
        lambda s, t, old: importance_loss(s, old, opd(old, t, torch.ones(3).bool())),
        RKL_GRAD,
    ),
    "ppo": (lambda s, t, old: ppo_loss(s, old, opd(old, t, torch.ones(3).bool())), RKL_GRAD),
}


def expected_gradient(estimator: Estimator, old: Tensor) -> Tensor:
    return gradient(lambda z: old * estimator(z.log_softmax(-1), T.log(), old.log()), S.log())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_expected_gradients_on_policy(name: str) -> None:
    estimator, want = ESTIMATORS[name]
    torch.testing.assert_close(expected_gradient(estimator, S), want, atol=2e-6, rtol=0)


def test_rho_k3_corrects_for_the_policy_that_sampled() -> None:
    old = torch.tensor([0.1, 0.3, 0.6])
    torch.testing.assert_close(expected_gradient(dv.rho_k3, old), RKL_GRAD, atol=2e-6, rtol=0)
    value = (old * dv.rho_k3(S.log(), T.log(), old.log())).sum()
    assert value == pytest.approx(0.223805, abs=1e-6)


def test_golden_estimator_values() -> None:
    s, t = S.log(), T.log()
    table = torch.stack([dv.k1(s, t), dv.k2(s, t), dv.k3(s, t)])
    want = torch.tensor(
        [
            [0.916291, -0.510826, -0.405465],
            [0.419794, 0.130471, 0.082201],
            [0.316291, 0.155841, 0.094535],
        ]
    )
    torch.testing.assert_close(table, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        table @ S, torch.tensor([0.223805, 0.265479, 0.223805]), atol=1e-6, rtol=0
    )


def test_skill_sd_values_and_derivative() -> None:
    logp = torch.tensor([0.5, -0.5, 0.0, -1.0])
    zero = torch.zeros(4)
    value = dv.rho_k3(logp, zero, logp)
    torch.testing.assert_close(
        value[:3], torch.tensor([0.106531, 0.148721, 0.0]), atol=1e-6, rtol=0
    )
    grad = gradient(lambda x: dv.rho_k3(x, zero, logp), logp)
    torch.testing.assert_close(grad, logp, atol=0, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-4, 0)] * 3), min_size=1, max_size=5))
def test_rho_k3_gradient_equals_the_traced_one(rows_: list[tuple[float, float, float]]) -> None:
    live, teacher, old = torch.tensor(rows_, dtype=torch.float64).T

    def traced(x: Tensor) -> Tensor:
        ell = x - teacher
        return (x - old).exp() * ((-ell).exp() - 1 + ell)

    torch.testing.assert_close(dv.rho_k3(live, teacher, old), traced(live))
    torch.testing.assert_close(
        gradient(lambda x: dv.rho_k3(x, teacher, old), live), gradient(traced, live)
    )


@pytest.mark.parametrize("ell", [-1e4, -25.0, -15.0, 15.0, 25.0, 1e4])
@pytest.mark.parametrize("name", ["k1", "k2", "k3", "rho_k3", "k3+"])
def test_extreme_log_ratios_stay_finite(name: str, ell: float) -> None:
    estimator, _ = ESTIMATORS[name]
    logp, zero = torch.tensor([ell]), torch.zeros(1)
    assert estimator(logp, zero, logp).isfinite().all()
    grad = gradient(lambda x: estimator(x, zero, logp.detach()), logp)
    assert grad.isfinite().all()
    if name in ("k2", "k3+", "rho_k3"):
        assert grad.item() == pytest.approx(ell)
    stale = gradient(lambda x: dv.rho_k3(x, zero, zero), logp)
    assert stale.isfinite().all()


def test_k3_clamps_are_verls_by_default_and_optional() -> None:
    logp, zero = torch.tensor([-5.0, -1.0, 30.0]), torch.zeros(3)
    free = dv.k3(logp, zero, ratio_clamp=None, value_clamp=None)
    want = torch.tensor([math.exp(5) - 6, math.e - 2, 29.0])
    torch.testing.assert_close(free, want)
    torch.testing.assert_close(dv.k3(logp, zero), torch.tensor([10.0, math.e - 2, 10.0]))
    grad = gradient(lambda x: dv.k3(x, zero), logp)
    torch.testing.assert_close(grad, torch.tensor([0.0, 1 - math.e, 0.0]))
