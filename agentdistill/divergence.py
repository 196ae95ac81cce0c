"""How far the student is from the teacher, per token, in nats.

Shape suffixes: N rows (tokens), V vocabulary, K top-k. Two families:

* **Distributions** (`forward_kl`, `reverse_kl`, `jsd`, `tvd`, and the top-k forms): logits
  [..., V] in, one value per row [...] out. Log-probabilities are logits too.
* **Sampled tokens** (`k1`, `k2`, `k3`, `rho_k3`): log-probabilities of the drawn token [N] in,
  one value per token [N] out.

Invariants:

* No reduction. Inputs are raised to float32 (float64 stays) before anything is computed.
* The teacher is a constant: no gradient flows into it.
* The derivative of every distribution divergence is written down, not traced through the value:
  identical logits give a gradient of exactly zero, and only one [N, V] tensor, in the student's
  dtype, is kept for the backward pass. It is differentiable once.
* Log-probabilities stop at `LOG_FLOOR`. An entry masked with -inf on both sides contributes
  nothing; one masked on one side costs a large finite amount. Values and gradients are finite for
  every row that has at least one finite logit on each side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from agentdistill.errors import ConfigError

LOG_FLOOR = -1e5
"""Smallest log-probability, in nats; its exponential is 0 in every float format."""

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(student_logits_NV, teacher_logits_NV) -> value_N."""

Temperature = float | Tensor
"""Divides logits: one number, or one per row [...]."""

_Pointwise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# (logS_NV, logT_NV) -> value_N and slope_NV = d value / d logS, with logS taken as free.


def _raise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _cool(x_NV: Tensor, temperature: Temperature) -> Tensor:
    if isinstance(temperature, Tensor):
        return x_NV / temperature.unsqueeze(-1)
    if temperature <= 0:
        raise ConfigError("must be above 0", key="temperature", value=temperature)
    return x_NV if temperature == 1 else x_NV / temperature


def log_probs(logits_NV: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """Log-softmax of logits [..., V] in at least float32, floored at `LOG_FLOOR`."""
    log_p = torch.log_softmax(_cool(_raise(logits_NV), temperature), dim=-1)
    return log_p.clamp_min(LOG_FLOOR) if log_p.requires_grad else log_p.clamp_min_(LOG_FLOOR)


class _Rows(torch.autograd.Function):
    """Value per row, with the gradient computed in the forward pass (see the module)."""

    @staticmethod
    def forward(
        ctx: Any,
        student_NV: Tensor,
        teacher_NV: Tensor,
        pointwise: _Pointwise,
        temperature: Temperature,
        wants_grad: bool,
    ) -> Tensor:
        log_s, log_t = log_probs(student_NV, temperature), log_probs(teacher_NV, temperature)
        value_N, slope_NV = pointwise(log_s, log_t)
        if wants_grad:
            pull_N1 = slope_NV.sum(-1, keepdim=True)
            grad_NV = slope_NV.sub_(log_s.exp_().mul_(pull_N1))
            ctx.save_for_backward(_cool(grad_NV, temperature).to(student_NV.dtype))
        return value_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NV,) = ctx.saved_tensors
        return (grad_NV * grad_N.unsqueeze(-1)).to(grad_NV.dtype), None, None, None, None


def _rows(
    pointwise: _Pointwise, student_NV: Tensor, teacher_NV: Tensor, temperature: Temperature
) -> Tensor:
    if student_NV.shape != teacher_NV.shape:
        raise ConfigError(
            f"student logits have shape {tuple(student_NV.shape)}; both need the same rows and "
            "the same vocabulary",
            key="teacher_logits.shape",
            value=tuple(teacher_NV.shape),
        )
    wants_grad = student_NV.requires_grad and torch.is_grad_enabled()
    value_N = _Rows.apply(student_NV, teacher_NV.detach(), pointwise, temperature, wants_grad)  # type: ignore[no-untyped-call]
    return cast(Tensor, value_N)


# S - T sums to zero over the vocabulary. Adding it makes every term of a KL >= 0, cancels errors of
# normalisation to first order, and makes the slope vanish where the distributions agree.


def _forward_kl(log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    t = log_t.exp()
    slope = log_s.exp().sub_(t)
    return t.mul_(log_t - log_s).add_(slope).sum(-1), slope


def _reverse_kl(log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    s = log_s.exp()
    slope = (log_s - log_t).mul_(s)
    return log_t.exp().sub_(s).add_(slope).sum(-1), slope


def _jsd(log_s: Tensor, log_t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    gap = log_t - log_s
    # log M - log S = log(1 - beta + beta * e^gap), exact at gap = 0 and safe for any gap.
    share = torch.full_like(gap, beta).masked_fill_(gap > 0, 1 - beta)
    lift = torch.log1p(torch.expm1(-gap.abs()).mul_(share)).add_(gap.clamp_min(0))
    slope = log_s.exp().mul_(lift).mul_(beta - 1)
    return (gap.sub_(lift).mul_(log_t.exp()).mul_(beta) + slope).sum(-1), slope


def _tvd(log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    s = log_s.exp()
    gap = s - log_t.exp()
    return gap.abs().sum(-1).mul_(0.5), s.mul_(gap.sign()).mul_(0.5)


def _teacher_topk(log_s: Tensor, log_t: Tensor, k: int) -> tuple[Tensor, Tensor]:
    top = log_t.topk(k, dim=-1)
    t_NK = top.values.exp()
    value = (t_NK * (top.values - log_s.gather(-1, top.indices))).sum(-1)
    return value, torch.zeros_like(log_s).scatter_(-1, top.indices, -t_NK)


def forward_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: Temperature = 1.0
) -> Tensor:
    """KL(teacher || student) per row [N]; covers all that the teacher does.

    Args:
        student_logits_NV: logits or log-probabilities [..., V]; receives the gradient S - T.
        teacher_logits_NV: same shape; a constant.
        temperature: divides both logits.

    Raises:
        ConfigError: the shapes differ, or the temperature is not positive.
    """
    return _rows(_forward_kl, student_logits_NV, teacher_logits_NV, temperature)


def reverse_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: Temperature = 1.0
) -> Tensor:
    """KL(student || teacher) per row [N]; keeps to what the teacher does.

    Arguments and errors as in `forward_kl`. Gradient: S * (log S - log T - KL).
    """
    return _rows(_reverse_kl, student_logits_NV, teacher_logits_NV, temperature)


def jsd(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    beta: float = 0.5,
    *,
    temperature: Temperature = 1.0,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, eq. 1) per row [N].

    With M = (1 - beta) * S + beta * T it is beta * KL(T || M) + (1 - beta) * KL(S || M). The
    ends are the usual special cases, beta = 0 forward KL and beta = 1 reverse KL; they are not
    limits of the formula, which tends to 0 at both. Other arguments as in `forward_kl`.

    Raises:
        ConfigError: ``beta`` is outside [0, 1], or as in `forward_kl`.
    """
    if not 0 <= beta <= 1:
        raise ConfigError("must lie in [0, 1]", key="beta", value=beta)
    ends: dict[float, _Pointwise] = {0: _forward_kl, 1: _reverse_kl}
    pointwise = ends.get(beta) or partial(_jsd, beta=beta)
    return _rows(pointwise, student_logits_NV, teacher_logits_NV, temperature)


def tvd(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: Temperature = 1.0
) -> Tensor:
    """Total variation distance, half the sum of |S - T|, per row [N], in [0, 1].

    ``1 - tvd`` is the acceptance rate of speculative decoding (DistillSpec). Arguments and errors
    as in `forward_kl`; where S = T the subgradient is 0.
    """
    return _rows(_tvd, student_logits_NV, teacher_logits_NV, temperature)


def coarsen(logits_NV: Tensor, ids_NK: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """Log-probabilities of ``ids_NK`` and of everything else together [..., K + 1].

    The last column is the tail, the log of the summed rest (no ``1 - sum``, so no cancellation).
    Differentiable in the logits; ids of one row must differ.
    """
    log_p = log_probs(logits_NV, temperature)
    rest = log_p.scatter(-1, ids_NK, LOG_FLOOR).logsumexp(-1, keepdim=True).clamp_min(LOG_FLOOR)
    return torch.cat([log_p.gather(-1, ids_NK), rest], dim=-1)


def topk_tail(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    k: int,
    *,
    temperature: Temperature = 1.0,
) -> tuple[Tensor, Tensor]:
    """Both sides on the student's k likeliest tokens plus one tail bucket, as in SDPO and TRL.

    Returns log-probabilities (student [..., K + 1], teacher [..., K + 1]); any divergence of this
    module takes them as logits, and is then at most the full one (data processing). The teacher's
    side carries no gradient.

    Raises:
        ConfigError: ``k`` is outside [1, V].
    """
    _check_k(k, student_logits_NV)
    ids_NK = student_logits_NV.detach().topk(k, dim=-1).indices
    student_NK1 = coarsen(student_logits_NV, ids_NK, temperature=temperature)
    return student_NK1, coarsen(teacher_logits_NV.detach(), ids_NK, temperature=temperature)


def teacher_topk_forward_kl(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    k: int,
    *,
    temperature: Temperature = 1.0,
    clamp: bool = False,
) -> Tensor:
    """Forward KL cut to the teacher's k likeliest tokens, without tail or renormalisation [N].

    The sum over those tokens of T * (log T - log S), as verl's ``forward_kl_topk``. It is no
    divergence: it can be negative, and its gradient does not vanish where S = T unless k = V.
    ``clamp`` cuts negative values to 0, as verl does, and with them their gradient.

    Raises:
        ConfigError: ``k`` is outside [1, V], or as in `forward_kl`.
    """
    _check_k(k, teacher_logits_NV)
    cut = partial(_teacher_topk, k=k)
    value_N = _rows(cut, student_logits_NV, teacher_logits_NV, temperature)
    return value_N.clamp_min(0) if clamp else value_N


def _check_k(k: int, logits_NV: Tensor) -> None:
    if not 1 <= k <= logits_NV.shape[-1]:
        raise ConfigError(f"must lie in [1, {logits_NV.shape[-1]}]", key="top_k", value=k)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "tvd": tvd,
}
"""Divergences by name; each takes (student_logits, teacher_logits, temperature=...)."""


def divergence(
    kind: str,
    *,
    beta: float = 0.5,
    temperature: Temperature = 1.0,
    top_k: int | None = None,
    support: str = "student",
) -> Divergence:
    """The divergence called ``kind`` as a function of (student logits, teacher logits).

    Args:
        kind: a key of `DIVERGENCES`.
        beta: weight of the teacher in the mixture, for ``jsd`` only.
        temperature: divides both logits.
        top_k: compare on this many tokens instead of the whole vocabulary.
        support: whose likeliest tokens: ``student`` (plus a tail, `topk_tail`) or ``teacher``
            (truncated, `teacher_topk_forward_kl`; forward KL only). Unused without ``top_k``.

    Raises:
        ConfigError: an unknown name, or a combination that does not exist.
    """
    if kind not in DIVERGENCES:
        raise ConfigError(f"one of {', '.join(DIVERGENCES)}", key="divergence", value=kind)
    full = partial(jsd, beta=beta) if kind == "jsd" else DIVERGENCES[kind]
    if top_k is None:
        return partial(full, temperature=temperature)
    if support == "teacher" and kind == "forward_kl":
        return partial(teacher_topk_forward_kl, k=top_k, temperature=temperature)
    if support != "student":
        raise ConfigError("student, or teacher with forward_kl", key="support", value=support)
    # A vocabulary with fewer tokens is compared whole.
    return lambda s, t: full(*topk_tail(s, t, min(top_k, s.shape[-1]), temperature=temperature))


def entropy(logits_NV: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """Entropy per row [N], in nats; differentiable. Entries at -inf count for nothing."""
    log_p = log_probs(logits_NV, temperature)
    return -(log_p.exp() * log_p).sum(-1)


@torch.no_grad()
def kl_rows(p_logits_NV: Tensor, q_logits_NV: Tensor) -> Tensor:
    """KL(P || Q) per row [N] without gradient: a statistic between any two views or scorers."""
    return forward_kl(q_logits_NV, p_logits_NV)


def straight_through(value_N: Tensor, carrier_N: Tensor) -> Tensor:
    """The value of ``value_N`` with the gradient of ``carrier_N`` (both finite), per token [N].

    ``straight_through(k3(s, t), k2(s, t))`` is verl's ``k3+``: it reports the KL and descends it.
    """
    return value_N.detach() + (carrier_N - carrier_N.detach())


def k1(logp_N: Tensor, teacher_logp_N: Tensor) -> Tensor:
    """Log-ratio ``ell`` = student - teacher of the sampled token [N]; estimates the reverse KL.

    Report it or turn it into an advantage. As a direct loss its expected gradient is zero.
    """
    return _raise(logp_N) - _raise(teacher_logp_N.detach())


def k2(logp_N: Tensor, teacher_logp_N: Tensor) -> Tensor:
    """``ell**2 / 2`` [N]; not a KL, but on policy its expected gradient is the reverse KL's."""
    return k1(logp_N, teacher_logp_N).square() / 2


def k3(
    logp_N: Tensor,
    teacher_logp_N: Tensor,
    *,
    ratio_clamp: float | None = 20.0,
    value_clamp: float | None = 10.0,
) -> Tensor:
    """``exp(-ell) - 1 + ell`` [N]; estimates the reverse KL, never negative.

    As a direct loss it descends the *forward* KL: its expected gradient on policy is S - T. Use
    `rho_k3`, or `straight_through` with `k2`, for the reverse KL.

    Args:
        logp_N: student's log-probability of the sampled token.
        teacher_logp_N: teacher's; a constant.
        ratio_clamp: ``ell`` is cut to +- this (verl: 20); None leaves it and may overflow.
        value_clamp: the result is cut to at most this (verl: 10); None leaves it. Where a clamp
            acts the gradient is 0.
    """
    ell = k1(logp_N, teacher_logp_N)
    if ratio_clamp is not None:
        ell = ell.clamp(-ratio_clamp, ratio_clamp)
    value = torch.expm1(-ell) + ell
    return value if value_clamp is None else value.clamp_max(value_clamp)


def rho_k3(
    logp_N: Tensor,
    teacher_logp_N: Tensor,
    old_logp_N: Tensor,
    *,
    ratio_clamp: float = 20.0,
) -> Tensor:
    """Importance-weighted k3 of Skill-SD (arXiv 2604.10674, C.3) [N], rho = student / old.

    Its derivative by the log-probability is exactly ``rho * ell``: the reverse KL's, and zero
    where ``ell`` is. It is attached as such, because tracing it through the value subtracts two
    exponentials, and through a clamped value it has the wrong sign. So ``ratio_clamp``, which
    cuts ``ell`` to +- itself, bounds the reported value only; the exponent of rho is cut too.

    Args:
        logp_N: student's log-probability of the sampled token; receives the gradient.
        teacher_logp_N: teacher's; a constant.
        old_logp_N: that of the policy that sampled; a constant.
        ratio_clamp: bound on both log-ratios where they are exponentiated.
    """
    live = _raise(logp_N)
    shift = (live - _raise(old_logp_N)).detach()
    rho = shift.clamp(-ratio_clamp, ratio_clamp).exp()
    value = rho * k3(live.detach(), teacher_logp_N, ratio_clamp=ratio_clamp, value_clamp=None)
    return straight_through(value, rho * k1(live, teacher_logp_N).detach() * live)
