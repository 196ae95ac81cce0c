"""The same numbers as the installed TRL, values and gradients, on random inputs.

TRL's functions are experimental and move; a missing one skips here with its name.
"""

from __future__ import annotations

import importlib
import warnings
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from agentdistill import advantage as adv
from agentdistill import divergence as dv
from agentdistill.weighting import reduce_weights

pytest.importorskip("trl")
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def trl(module: str, name: str) -> Any:
    """``name`` of a TRL module; its import warns of many things that are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return getattr(importlib.import_module(f"trl.{module}"), name)
        except (ImportError, AttributeError) as error:
            pytest.skip(f"this TRL has no {module}.{name}: {error}")


def random(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def value_and_gradient(
    loss: Callable[[Tensor], Tensor], at: Tensor, pull: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = at.clone().requires_grad_()
    value = loss(leaf)
    (grad,) = torch.autograd.grad((value * pull).sum(), leaf)
    return value.detach(), grad


def same(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], at: Tensor) -> None:
    """Equal values per row, and equal gradients under unequal row weights."""
    pull = torch.linspace(-1, 2, len(at))
    got, want = (value_and_gradient(loss, at, pull) for loss in (ours, theirs))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_gkd(beta: float, temperature: float) -> None:
    trainer = trl("experimental.gkd", "GKDTrainer")
    student, teacher = random(0, 6, 37), random(1, 6, 37)

    def theirs(z: Tensor) -> Tensor:
        terms = trainer.generalized_jsd_loss(
            z[None], teacher[None], beta=beta, temperature=temperature, reduction="none"
        )
        total: Tensor = terms[0].sum(-1)
        return total

    same(lambda z: dv.jsd(z, teacher, beta, temperature=temperature), theirs, student)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_kernel(beta: float, temperature: float) -> None:
    kernel = trl("kernels.chunked_divergence", "ChunkedDivergenceFunction")
    hidden, teacher_hidden = random(2, 6, 8) / 4, random(3, 6, 5) / 4
    head, teacher_head = random(4, 37, 8), random(5, 37, 5)

    def logits(h: Tensor) -> Tensor:
        return h @ head.T

    teacher = teacher_hidden @ teacher_head.T

    def theirs(h: Tensor) -> Tensor:
        value: Tensor = kernel.apply(
            h, head, None, teacher_hidden, teacher_head, None, beta, temperature
        )[0]
        return value

    same(lambda h: dv.jsd(logits(h), teacher, beta, temperature=temperature), theirs, hidden)


def test_chunked_kernel_entropy() -> None:
    kernel = trl("kernels.chunked_divergence", "ChunkedDivergenceFunction")
    hidden, head = random(6, 6, 8), random(7, 37, 8)
    entropy = kernel.apply(hidden, head, None, hidden, head, None, 1.0, 0.7)[1]
    got = dv.entropy(hidden @ head.T, temperature=0.7)
    torch.testing.assert_close(got, entropy, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("alpha", BETAS)
@pytest.mark.parametrize("k", [1, 4, 36])
def test_sdpo_topk_with_tail(alpha: float, k: int) -> None:
    loss = trl("experimental.sdpo.loss_utils", "compute_topk_self_distillation_loss")
    # In float64: TRL's tail is log(1 - sum), off by 5e-5 in float32 where the rest is small.
    student, teacher = random(8, 6, 37).double(), random(9, 6, 37).double()
    ours = dv.divergence("jsd", beta=alpha, top_k=k)

    def theirs(z: Tensor) -> Tensor:
        value: Tensor = loss(
            z, teacher, distillation_topk=k, distillation_alpha=alpha, distillation_add_tail=True
        )
        return value

    same(lambda z: ours(z, teacher), theirs, student)


@pytest.mark.parametrize("alpha", BETAS)
def test_sdpo_whole_vocabulary(alpha: float) -> None:
    loss = trl("experimental.sdpo.loss_utils", "compute_full_logit_self_distillation_loss")
    student, teacher = random(10, 6, 37).double(), random(11, 6, 37).double()

    def theirs(z: Tensor) -> Tensor:
        value: Tensor = loss(z, teacher, distillation_alpha=alpha)
        return value

    same(lambda z: dv.jsd(z, teacher, alpha), theirs, student)


def test_sdpo_sampled_token_descends_what_opd_ascends() -> None:
    loss = trl("experimental.sdpo.loss_utils", "compute_sampled_token_self_distillation_loss")
    student, teacher, token = random(12, 6, 37), random(13, 6, 37), torch.arange(6) * 5

    def logp(z: Tensor) -> Tensor:
        return z.log_softmax(-1).gather(-1, token[:, None])[:, 0]

    def ours(z: Tensor) -> Tensor:
        old, mask = logp(student), torch.ones(6, dtype=torch.bool)
        return adv.importance_loss(logp(z), old, adv.opd(old, logp(teacher), mask))

    def theirs(z: Tensor) -> Tensor:
        value: Tensor = loss(z, teacher, token, distillation_alpha=1.0)
        return value

    pull = torch.linspace(-1, 2, 6)
    got, want = (value_and_gradient(each, student, pull)[1] for each in (ours, theirs))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cap", [1.0, 2.0, 100.0])
def test_sdpo_capped_ratio(cap: float) -> None:
    clip = trl("experimental.sdpo.loss_utils", "apply_importance_sampling_clipping")
    loss, live, old = random(14, 50), random(15, 50), random(16, 50)
    got = loss * adv.truncated_is(live, old, cap)
    torch.testing.assert_close(got, clip(loss, live, old, cap))


@pytest.mark.parametrize(("beta", "k"), [*((beta, None) for beta in BETAS), (1.0, 1), (1.0, 4)])
def test_iw_opd_divergences(beta: float, k: int | None) -> None:
    """Whole vocabulary, and the student's likeliest tokens with a tail (theirs for beta = 1)."""
    trainer = trl("experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer")
    student, teacher = random(17, 6, 37).double(), random(18, 6, 37).double()

    def theirs(z: Tensor) -> Tensor:
        values: Tensor = trainer.generalized_jsd_loss(
            z[None], teacher[None], beta=beta, reduction="none", top_k=k or 0
        )
        return values[0].sum(-1)

    ours = dv.divergence("jsd", beta=beta, top_k=k)
    same(lambda z: ours(z, teacher), theirs, student)


def test_iw_opd_without_its_weights_is_opd() -> None:
    """The same gradient at the policy that sampled; gamma alone would weigh positions."""
    trainer = trl("experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer")
    its = SimpleNamespace(
        temperature=1.0,
        iw_opd_gamma=0.0,
        iw_opd_epsilon=1e-8,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    logits, token = random(19, 2, 6, 37), torch.arange(12).view(2, 6) * 3
    labels = token.clone()
    labels[0, 4:] = -100
    mask = (labels != -100).flatten()
    teacher = -random(20, 2, 6).abs()

    def theirs(z: Tensor) -> Tensor:
        value: Tensor = trainer._compute_iw_opd_loss(its, z, token, labels, teacher)
        return value

    def ours(z: Tensor) -> Tensor:
        live = z.log_softmax(-1).gather(-1, token[..., None]).flatten()
        advantage = adv.opd(live, teacher.flatten(), mask)
        return (reduce_weights(None, mask) * adv.ppo_loss(live, live, advantage)).sum()

    got, want = (value_and_gradient(each, logits, torch.ones(()))[1] for each in (ours, theirs))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
