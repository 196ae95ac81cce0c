"""The methods' hand-computed numbers, V1 to V32, one test for each that is a function of tensors.

Elsewhere: V9 (choice of skills) in tests/test_skills.py, V30 (KEPO's gate) in
tests/methods/test_golden_losses.py, V31 (running mean) in tests/test_teachers.py. Nothing in this
project computes these yet: V10 (break-even of in-context distillation),
V26 (pi-Distill's penalties for words and length), V29 (SCoRe's shaped reward), V32 (length of
SD-Zero's teacher input).
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from agentdistill import advantage as adv
from agentdistill import divergence as dv
from agentdistill import weights as ws
from agentdistill.curriculum import b2f_start, f2b_window
from agentdistill.methods.schedule import Controller, Schedule
from agentdistill.weighting import mean1

close = partial(torch.testing.assert_close, atol=1e-6, rtol=0)
S, T = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
RKL = torch.tensor([0.346243, -0.220389, -0.125854])
FKL = torch.tensor([0.3, -0.2, -0.1])
NOTHING = torch.zeros(3)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def every(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bool)


def one_group(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.long)


def test_v1_divergences() -> None:
    got = [dv.forward_kl(S.log(), T.log()), dv.reverse_kl(S.log(), T.log())]
    got += [dv.jsd(S.log(), T.log(), beta) for beta in (0.1, 0.5, 0.9)]
    close(torch.stack(got), t(0.193794, 0.223805, 0.017563, 0.050875, 0.019661))


def _sampled(logits: Tensor, name: str) -> Tensor:
    """Expectation of an estimator's gradient over the three tokens, sampled from S."""
    logp = logits.log_softmax(-1)
    if name == "rho_k3":
        return (S * dv.rho_k3(logp, T.log(), S.log())).sum()
    return (S * getattr(dv, name)(logp, T.log())).sum()


@pytest.mark.parametrize(
    ("name", "want"),
    [("reverse_kl", RKL), ("forward_kl", FKL), ("k1", NOTHING), ("k2", RKL), ("k3", FKL),
     ("rho_k3", RKL)],
)  # fmt: skip
def test_v2_gradients(name: str, want: Tensor) -> None:
    logits = S.log().requires_grad_()
    exact = name.endswith("_kl")
    value = getattr(dv, name)(logits, T.log()) if exact else _sampled(logits, name)
    (gradient,) = torch.autograd.grad(value, logits)
    close(gradient, want)


def test_v3_top_two_of_four() -> None:
    student, teacher = t(0.4, 0.3, 0.2, 0.1).log(), t(0.1, 0.5, 0.1, 0.3).log()
    got = [dv.divergence(kind, top_k=2)(student, teacher) for kind in ("reverse_kl", "forward_kl")]
    got.append(dv.divergence("forward_kl", top_k=2, support="teacher")(student, teacher))
    close(torch.stack(got), t(0.314965, 0.231856, 0.584996))


@pytest.mark.parametrize(
    ("d", "want"),
    [
        pytest.param([0.2, 0.4, 0.1], [1, 0.500001, 1.2], id="v4"),
        pytest.param([0.1, 0.05, 0.4, 0.1, 0.2], [1, 1.2, 0.250002, 1.0, 0.500002], id="v5"),
    ],
)
def test_v4_v5_sod(d: list[float], want: list[float]) -> None:
    n = len(d)
    got = ws.sod(t(*d), one_group(n), torch.arange(n), every(n), delta=0.2, eps=1e-6)
    close(got, t(*want))


@pytest.mark.parametrize(("n", "window"), [(0, 1), (5, 1), (6, 2), (29, 5), (174, 30)])
def test_v6_f2b(n: int, window: int) -> None:
    assert f2b_window(n, 6, max_turns=30) == window


@pytest.mark.parametrize(("n", "start"), [(0, 6), (5, 5), (14, 4), (29, 1), (30, 0)])
def test_v7_b2f(n: int, start: int) -> None:
    assert b2f_start(n, 7, 5) == start


@pytest.mark.parametrize(("ell", "want"), [(0.5, 0.106531), (-0.5, 0.148721)])
def test_v8_skill_sd(ell: float, want: float) -> None:
    logp = t(-1.0).requires_grad_()
    value = dv.rho_k3(logp, t(-1.0 - ell), t(-1.0))
    (slope,) = torch.autograd.grad(value.sum(), logp)
    close(value.detach(), t(want))
    close(slope, t(ell))


@pytest.mark.parametrize(("share", "want"), [(0.5, 0.0), (1.0, 0.5), (1.25, 0.75)])
def test_v11_g_opd(share: float, want: float) -> None:
    close(adv.extrapolated(t(-1.5), t(-1.0), t(-2.0), every(1), share), t(want))


@pytest.mark.parametrize(("a", "want"), [(0.0, 0.606531), (0.5, 0.818731), (1.0, 1.105171)])
def test_v12_trrd(a: float, want: float) -> None:
    anchor = adv.anchored(t(-1.6), t(-1.0), mixing=1 - a)
    close(-adv.importance_loss(t(-1.5), anchor, t(1.0)), t(want))


def test_v13_srpo() -> None:
    weight = ws.entropy_weight(t(0.5, 1, 2), every(3), beta=1.0)
    close(mean1(weight, every(3)), t(1.639648, 0.994497, 0.365855))


@pytest.mark.parametrize(("sign", "want"), [(1, [1.244919, 0.755081]), (-1, [0.755081, 1.244919])])
def test_v14_scope(sign: int, want: list[float]) -> None:
    close(ws.softmax_ppl(t(-1, -0.5), one_group(2), every(2), sign), t(*want))


def test_v15_taid() -> None:
    schedule = Schedule.model_validate({"from": 0.4, "to": 1.0, "shape": "taid", "speed": 5e-4})
    controller = Controller(schedule)
    controller.observe(2.0)
    controller.observe(1.5)
    assert controller.state_dict()["fall"] == pytest.approx(0.0025)
    assert controller.value(0.0) - 0.4 == pytest.approx(0.00015019, abs=1e-8)
    student, teacher = t(0, 1), t(2, 0)
    mixed = torch.lerp(student, teacher, 0.4)
    close(mixed.softmax(-1), t(0.549834, 0.450166))
    close(dv.forward_kl(student, mixed), torch.tensor(0.174924))


def test_v16_paced() -> None:
    close(ws.pass_rate_weight(t(0.125, 0.5, 0.875)), t(0.109375, 0.25, 0.109375))
    close(ws.pass_rate_weight(t(0, 1)), t(0, 0))


def test_v17_adakd() -> None:
    got = ws.difficulty_temperature(t(2.0, 1.0, 0.5), every(3), base=1.0, strength=0.5)
    close(got, t(0.740818, 1.0, 1.349859))


@pytest.mark.parametrize(("a", "d", "want"), [(1, 0.3, 1.1), (1, -0.5, 0.9), (-1, 0.3, -0.9)])
def test_v18_rlsd(a: float, d: float, want: float) -> None:
    close(adv.magnitude(t(a), t(d), mixing=0.5, bound=0.2), t(want))


@pytest.mark.parametrize(("ddof", "want"), [(0, 1.0), (1, 0.866025)])
def test_v19_grpo(ddof: int, want: float) -> None:
    got = adv.grpo(t(1, 0, 0, 1), one_group(4), every(4), ddof=ddof, eps=1e-8)
    close(got, want * t(1, -1, -1, 1))


@pytest.mark.parametrize(
    ("side", "want"),
    [("both", [0.25, -0.25]), ("correct_up", [0.5, 0]), ("incorrect_down", [0, -0.5])],
)
def test_v20_uni_opd(side: str, want: list[float]) -> None:
    mean, success = t(0.2, 0.3), torch.tensor([True, False])
    got = adv.margin_shift(mean, success, one_group(2), every(2), delta=0.4, side=side)
    close(got, t(*want))


def test_v21_redi() -> None:
    nll = -t(-0.5, -0.7)
    weight = ws.signed(torch.tensor([True, False]), positive=1.0, negative=0.8)
    close((weight * nll).sum(), torch.tensor(-0.06))


def test_v22_curio_sft() -> None:
    logp = t(-1.0)
    close(-logp + dv.k2(logp, t(-1.3)), t(1.045))


def test_v23_unisd() -> None:
    variance = torch.arange(41.0)  # its 95% quantile is 38
    assert ws.agreement(variance, every(41), gamma=1.0)[19].item() == pytest.approx(0.666667, 1e-6)


@pytest.mark.parametrize(("p", "want"), [(0.01, 0.090909), (0.1, 0.5), (0.5, 0.833333), (0.9, 0.9)])
def test_v24_ampo(p: float, want: float) -> None:
    close(-adv.shaped_loss(t(math.log(p)), t(1.0)), t(want))


def test_v25_tip() -> None:
    close(ws.soft_or(t(0.2), t(0.9)), t(0.92))


def test_v27_rltf_sd() -> None:
    first, second = t(0, 1), t(1, 1)
    close(adv.retried(second, first, one_group(2), every(2)), t(0.5, 0.5))
    close(adv.retried(second, second, one_group(2), every(2)), t(0, 0))


def test_v28_opd() -> None:
    got = adv.opd(t(-1, -2, -0.5), t(-1.5, -1, -0.5), torch.tensor([True, True, False]))
    close(got, t(-0.5, 1, 0))
