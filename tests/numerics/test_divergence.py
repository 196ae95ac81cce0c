"""Divergences: golden values, exact gradients, properties, and hostile inputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentdistill import divergence as dv
from agentdistill.errors import ConfigError

INF = math.inf
S, T = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
RKL_GRAD = torch.tensor([0.346243, -0.220389, -0.125854])
FKL_GRAD = torch.tensor([0.3, -0.2, -0.1])
KINDS: dict[str, dv.Divergence] = {
    "forward_kl": dv.forward_kl,
    "reverse_kl": dv.reverse_kl,
    "jsd.1": dv.divergence("jsd", beta=0.1),
    "jsd.5": dv.jsd,
    "jsd.9": dv.divergence("jsd", beta=0.9),
    "tvd": dv.tvd,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def rows(seed: int, n: int = 5, v: int = 11, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = spread * torch.randn(2, n, v, generator=draw)
    return student, teacher


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    loss(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def reference(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """The definitions over probabilities, in float64."""
    s, t = student.double().softmax(-1), teacher.double().softmax(-1)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log()).sum(-1)

    if kind == "tvd":
        return (s - t).abs().sum(-1) / 2
    if kind.startswith("jsd"):
        beta = float(kind[3:])
        mix = (1 - beta) * s + beta * t
        return beta * kl(t, mix) + (1 - beta) * kl(s, mix)
    return kl(t, s) if kind == "forward_kl" else kl(s, t)


def test_golden_values() -> None:
    got = [
        dv.forward_kl(S.log(), T.log()),
        dv.reverse_kl(S.log(), T.log()),
        *(dv.jsd(S.log(), T.log(), beta) for beta in (0.1, 0.5, 0.9)),
        dv.tvd(S.log(), T.log()),
    ]
    want = [0.193794, 0.223805, 0.017563, 0.050875, 0.019661, 0.3]
    torch.testing.assert_close(torch.stack(got), torch.tensor(want), atol=1e-6, rtol=0)


def test_golden_gradients() -> None:
    fkl = gradient(lambda z: dv.forward_kl(z, T.log()), S.log())
    rkl = gradient(lambda z: dv.reverse_kl(z, T.log()), S.log())
    torch.testing.assert_close(fkl, FKL_GRAD, atol=1e-6, rtol=0)
    torch.testing.assert_close(rkl, RKL_GRAD, atol=1e-6, rtol=0)


def test_golden_topk() -> None:
    s, t = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.5, 0.1, 0.3]]).log()
    got = [
        dv.divergence("reverse_kl", top_k=2)(s, t),
        dv.reverse_kl(s, t),
        dv.divergence("forward_kl", top_k=2)(s, t),
        dv.divergence("forward_kl", top_k=2, support="teacher")(s, t),
    ]
    want = torch.tensor([0.314965, 0.430038, 0.231856, 0.584996])
    torch.testing.assert_close(torch.stack(got), want, atol=1e-6, rtol=0)


@every_kind
def test_values_equal_the_definitions(kind: str) -> None:
    student, teacher = rows(0, n=40)
    torch.testing.assert_close(
        KINDS[kind](student, teacher).double(), reference(kind, student, teacher), atol=1e-6, rtol=0
    )


@every_kind
def test_written_derivatives_equal_finite_differences(kind: str) -> None:
    student, teacher = (x.double() for x in rows(1, n=3, v=5))
    leaf = student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: KINDS[kind](z, teacher), (leaf,))


@pytest.mark.parametrize("support", ["student", "teacher"])
@pytest.mark.parametrize("temperature", [0.7, torch.tensor([0.5, 1.0, 3.0]).double()])
def test_topk_and_temperature_derivatives(support: str, temperature: dv.Temperature) -> None:
    student, teacher = (x.double() for x in rows(2, n=3, v=6))
    loss = dv.divergence("forward_kl", top_k=3, support=support, temperature=temperature)
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher), (student.requires_grad_(),))


@pytest.mark.parametrize("temperature", [2.0, torch.tensor([0.5, 1.0, 2.0, 3.0, 9.0])])
def test_temperature_divides_both_logits(temperature: dv.Temperature) -> None:
    student, teacher = rows(3)
    scale = temperature if isinstance(temperature, float) else temperature[:, None]
    loss = dv.divergence("reverse_kl", temperature=temperature)
    want = dv.reverse_kl(student / scale, teacher / scale)
    torch.testing.assert_close(loss(student, teacher), want)
    torch.testing.assert_close(
        gradient(lambda z: loss(z, teacher), student),
        gradient(lambda z: dv.reverse_kl(z / scale, teacher / scale), student),
    )


@every_kind
def test_identical_logits_give_zero_and_exactly_zero_gradient(kind: str) -> None:
    logits, _ = rows(4, n=8, v=1000, spread=5.0)
    assert KINDS[kind](logits, logits).abs().max() < 1e-7
    assert torch.equal(gradient(lambda z: KINDS[kind](z, logits), logits), torch.zeros_like(logits))
    coarse = gradient(lambda z: KINDS[kind](*dv.topk_tail(z, logits, 7)), logits)
    assert torch.equal(coarse, torch.zeros_like(logits))


@every_kind
def test_gradient_flows_to_the_student_only(kind: str) -> None:
    student, teacher = (x.requires_grad_() for x in rows(5))
    assert not KINDS[kind](student.detach(), teacher).requires_grad
    coarse = dv.topk_tail(student, teacher, 4)
    assert not coarse[1].requires_grad
    (KINDS[kind](student, teacher) + KINDS[kind](*coarse)).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None and student.grad.abs().sum() > 0


def test_jsd_ends_are_the_two_kls() -> None:
    student, teacher = rows(6)
    assert torch.equal(dv.jsd(student, teacher, 0), dv.forward_kl(student, teacher))
    assert torch.equal(dv.jsd(student, teacher, 1), dv.reverse_kl(student, teacher))
    near = torch.stack([dv.jsd(student, teacher, beta) for beta in (1e-6, 1 - 1e-6)])
    assert near.max() < 1e-4 < dv.forward_kl(student, teacher).min()


@pytest.mark.parametrize("eps", [1e-2, 1e-3])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd.5"])
def test_small_divergences_are_accurate_over_a_large_vocabulary(kind: str, eps: float) -> None:
    student, _ = rows(7, n=2, v=30_000, spread=3.0)
    teacher = student + eps * torch.randn(student.shape, generator=torch.Generator().manual_seed(1))
    want = KINDS[kind](student.double(), teacher.double())
    torch.testing.assert_close(
        KINDS[kind](student, teacher).double(), want, rtol=30 * eps**-2 * 1e-9, atol=0
    )


HOSTILE = {
    "far apart": ([0.0, 1e4, -1e4, 0.0], [0.0, -1e4, 1e4, 0.0]),
    "masked on both sides": ([0.0, -INF, 1.0, -INF], [0.5, -INF, 0.0, -INF]),
    "masked for the student": ([0.0, -INF, 1.0, 2.0], [0.5, 3.0, 0.0, 0.0]),
    "masked for the teacher": ([0.0, 3.0, 1.0, 2.0], [0.5, -INF, 0.0, 0.0]),
    "masked across": ([0.0, -INF, 1.0, -INF], [-INF, 1.0, -INF, 0.0]),
    "masked by the lowest number": ([0.0, torch.finfo().min, 1.0, 0.0], [0.0, 1.0, -INF, 0.0]),
    "one choice": ([0.0, -INF, -INF, -INF], [0.0, -INF, -INF, -INF]),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
def test_hostile_logits_stay_finite(kind: str, case: str, dtype: torch.dtype) -> None:
    student, teacher = (torch.tensor([row], dtype=dtype) for row in HOSTILE[case])
    loss = KINDS[kind]
    truncated = dv.divergence("forward_kl", top_k=3, support="teacher")
    for fn in (loss, lambda s, t: loss(*dv.topk_tail(s, t, 2)), truncated):
        assert fn(student, teacher).isfinite().all()
        grad = gradient(lambda z, fn=fn: fn(z, teacher), student)  # type: ignore[misc]
        assert grad.dtype == dtype
        assert grad.isfinite().all()


@every_kind
def test_entries_masked_on_both_sides_do_not_count(kind: str) -> None:
    student, teacher = rows(8, v=6)
    pad = torch.full((5, 3), -INF)
    wide_s, wide_t = torch.cat([student, pad], 1), torch.cat([teacher, pad], 1)
    torch.testing.assert_close(KINDS[kind](wide_s, wide_t), KINDS[kind](student, teacher))
    grad = gradient(lambda z: KINDS[kind](z, wide_t), wide_s)
    assert torch.equal(grad[:, 6:], torch.zeros(5, 3))
    torch.testing.assert_close(
        grad[:, :6], gradient(lambda z: KINDS[kind](z, teacher), student), atol=1e-6, rtol=1e-5
    )


def test_one_sided_masks_are_loud() -> None:
    open_, masked = torch.tensor([0.0, 0.0]), torch.tensor([0.0, -INF])
    assert 1e4 < dv.reverse_kl(open_, masked) < 1e6
    assert 1e4 < dv.forward_kl(masked, open_) < 1e6
    assert dv.forward_kl(open_, masked) == pytest.approx(math.log(2))
    pull = gradient(lambda z: dv.reverse_kl(z, masked), open_)
    assert pull[1] > 1e4


def test_bfloat16_is_computed_in_float32() -> None:
    student, teacher = (x.bfloat16() for x in rows(9))
    got = dv.reverse_kl(student, teacher)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, dv.reverse_kl(student.float(), teacher.float()))


def test_empty_and_batched_shapes() -> None:
    student, teacher = rows(10, n=6)
    folded = dv.jsd(student.view(2, 3, 11), teacher.view(2, 3, 11))
    torch.testing.assert_close(folded, dv.jsd(student, teacher).view(2, 3))
    assert dv.reverse_kl(*dv.topk_tail(student[:0], teacher[:0], 3)).shape == (0,)


logit = st.floats(-8, 8, width=32)
pair = st.integers(2, 8).flatmap(
    lambda v: st.tuples(*[st.lists(logit, min_size=v, max_size=v)] * 2).map(torch.tensor)
)


@settings(max_examples=60, deadline=None)
@given(pair, st.data())
def test_properties(both: Tensor, data: st.DataObject) -> None:
    student, teacher = both
    k = data.draw(st.integers(1, len(student)))
    for kind, fn in KINDS.items():
        full = fn(student, teacher)
        assert full > -1e-6
        assert fn(*dv.topk_tail(student, teacher, k)) < full + 1e-5, kind
        torch.testing.assert_close(
            fn(*dv.topk_tail(student, teacher, len(student))), full, atol=2e-6, rtol=1e-5
        )
    torch.testing.assert_close(
        dv.jsd(student, teacher), dv.jsd(teacher, student), atol=1e-6, rtol=1e-5
    )
    assert dv.tvd(student, teacher) <= 1 + 1e-6
    assert dv.jsd(student, teacher) <= math.log(2) + 1e-6
    whole = dv.teacher_topk_forward_kl(student, teacher, len(student))
    torch.testing.assert_close(whole, dv.forward_kl(student, teacher), atol=2e-6, rtol=1e-5)


@every_kind
def test_rows_are_independent_and_the_vocabulary_has_no_order(kind: str) -> None:
    student, teacher = rows(11, n=9)
    row_order, word_order = torch.randperm(9), torch.randperm(11)
    whole = KINDS[kind](student, teacher)
    assert torch.equal(KINDS[kind](student[row_order], teacher[row_order]), whole[row_order])
    shuffled = KINDS[kind](student[:, word_order], teacher[:, word_order])
    torch.testing.assert_close(shuffled, whole, atol=1e-6, rtol=1e-5)


def test_coarsened_sides_are_distributions() -> None:
    student, teacher = rows(12)
    for log_p in dv.topk_tail(student, teacher, 3):
        torch.testing.assert_close(log_p.logsumexp(-1), torch.zeros(5), atol=1e-6, rtol=0)
    ids = student.topk(3).indices
    torch.testing.assert_close(
        dv.topk_tail(student, teacher, 3)[1][:, :3], teacher.log_softmax(-1).gather(1, ids)
    )


@every_kind
def test_every_token_in_the_top_k_is_the_full_gradient(kind: str) -> None:
    student, teacher = rows(16)
    full = gradient(lambda z: KINDS[kind](z, teacher), student)
    coarse = gradient(lambda z: KINDS[kind](*dv.topk_tail(z, teacher, 11)), student)
    torch.testing.assert_close(coarse, full, atol=1e-6, rtol=1e-5)


def test_teacher_truncation_can_be_negative_and_clamps() -> None:
    student, teacher = torch.tensor([0.9, 0.05, 0.05]).log(), torch.tensor([0.5, 0.3, 0.2]).log()
    assert dv.teacher_topk_forward_kl(student, teacher, 1) < 0
    clamped = lambda z: dv.teacher_topk_forward_kl(z, teacher, 1, clamp=True)  # noqa: E731
    assert clamped(student) == 0
    assert torch.equal(gradient(clamped, student), torch.zeros(3))


def test_entropy() -> None:
    assert dv.entropy(torch.zeros(8)) == pytest.approx(math.log(8))
    masked = torch.tensor([0.0, 0.0, -INF])
    assert dv.entropy(masked) == pytest.approx(math.log(2))
    assert gradient(dv.entropy, masked).isfinite().all()
    logits = rows(13, n=2, v=4)[0].double().requires_grad_()
    assert torch.autograd.gradcheck(dv.entropy, (logits,))
    assert dv.entropy(logits, temperature=100.0).min() > dv.entropy(logits).max()


def test_kl_rows_is_p_to_q_without_gradient() -> None:
    p, q = (x.requires_grad_() for x in rows(14))
    got = dv.kl_rows(p, q)
    assert not got.requires_grad
    torch.testing.assert_close(
        got.double(), reference("reverse_kl", p.detach(), q.detach()), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s, t: dv.forward_kl(s, t[:, 1:]),
        lambda s, t: dv.forward_kl(s, t, temperature=0.0),
        lambda s, t: dv.jsd(s, t, 1.1),
        lambda s, t: dv.topk_tail(s, t, 0),
        lambda s, t: dv.teacher_topk_forward_kl(s, t, 12),
        lambda s, t: dv.divergence("kl"),
        lambda s, t: dv.divergence("reverse_kl", top_k=2, support="teacher"),
    ],
)
def test_what_cannot_work_is_refused(wrong: Callable[[Tensor, Tensor], object]) -> None:
    with pytest.raises(ConfigError):
        wrong(*rows(15))
