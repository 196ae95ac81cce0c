"""Factors by which methods weigh tokens, steps and trajectories: one function per formula.

Suffixes: N tokens, B trajectories. :mod:`agentdistill.weighting` brings such factors to a scale
(`mean1`) and turns them into shares of the loss.

Invariants:

* Tensors in, one factor per row out: detached, in float32 (float64 stays), without a loop over
  tokens.
* Rows outside the mask get 0, and what stands there (NaN) has no influence.
* Ids are any integers, and rows come in any order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from agentdistill.errors import ConfigError
from agentdistill.weighting import compact, kept, mean1, segment_mean


def _real(x: Tensor) -> Tensor:
    x = x.detach()
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -- steps ----------------------------------------------------------------------------------------


def step_divergence(
    old_logp_N: Tensor, teacher_logp_N: Tensor, step_N: Tensor, mask_N: Tensor
) -> Tensor:
    """How far the student is from the teacher in each row's step [N], in nats (SOD, eq. 6).

    The mean of |old - teacher| over the masked tokens of the step: a drift to either side counts.

    Args:
        old_logp_N: log-probability of the sampled token under the student before the update.
        teacher_logp_N: the same under the teacher.
        step_N: id of each row's step, distinct between trajectories (``table.units("step")``).
        mask_N: bool, the student's own tokens that the teacher scored.
    """
    index_N, steps = compact(step_N, mask_N)
    gap_N = (_real(old_logp_N) - _real(teacher_logp_N)).abs()
    return kept(segment_mean(gap_N, index_N, mask_N, max(steps, 1))[index_N], mask_N)


def sod(
    divergence_N: Tensor,
    trajectory_N: Tensor,
    step_N: Tensor,
    mask_N: Tensor,
    *,
    delta: float = 0.2,
    eps: float = 1e-6,
) -> Tensor:
    """Step weights of SOD (arXiv 2605.07725, eq. 7) [N]: w_1 = 1, w_k = min(d_1 / d_k, 1 + delta).

    The product of d_u / d_(u+1) over the steps before k telescopes to d_1 / d_k, with ``eps``
    added above and below. The cap is on what comes out, not on the running product. Nothing bounds
    a weight from below: after a first step with d_1 = 0 all later ones are about eps / d_k
    (`sod_report` counts that). The first step is the first one with a masked row, so after a
    hand-over it is the student's first.

    Args:
        divergence_N: of each row's step (`step_divergence`).
        trajectory_N: id of each row's trajectory.
        step_N: step of each row; grows along the trajectory.
        mask_N: bool, as in `step_divergence`.
        delta: the largest weight is 1 + delta (0.5 in the published class, 0.2 in its script).
        eps: added to every divergence.

    Raises:
        ConfigError: ``delta`` is negative, or ``eps`` not positive.
    """
    if delta < 0:
        raise ConfigError("must not be below 0", key="delta", value=delta)
    if eps <= 0:
        raise ConfigError("must be above 0", key="eps", value=eps)
    d_N = kept(_real(divergence_N), mask_N)
    first_N = _first(trajectory_N, step_N, mask_N)
    index_N, size = compact(trajectory_N, mask_N)
    anchor_N = _largest(kept(d_N, first_N), index_N, size)[index_N]
    weight_N = ((anchor_N + eps) / (d_N + eps)).clamp_max(1 + delta)
    return kept(torch.where(first_N, 1.0, weight_N), mask_N)


def sod_report(
    divergence_N: Tensor,
    trajectory_N: Tensor,
    step_N: Tensor,
    mask_N: Tensor,
    *,
    delta: float = 0.2,
    eps: float = 1e-6,
) -> dict[str, float]:
    """What to log of `sod`'s weights, counted by steps (arguments as there, ids as in eq. 6).

    Returns:
        ``steps``; of those after the first of their trajectory ``later_mean`` (of the weights) and
        ``at_cap`` (the share with the largest weight allowed); and ``zero_first``, the number of
        trajectories whose first step has no divergence at all, so that the later ones count for
        almost nothing.
    """
    weight_N = sod(divergence_N, trajectory_N, step_N, mask_N, delta=delta, eps=eps)
    first_N = _first(trajectory_N, step_N, mask_N)
    index_N, steps = compact(step_N, mask_N)
    # A step's rows share one weight: its largest is that weight, exactly.
    later = _largest(weight_N, index_N, steps)
    later = later[_largest(first_N.float(), index_N, steps) == 0] if steps else later[:0]
    zero_N = first_N & (divergence_N == 0)
    return {
        "steps": float(steps),
        "later_mean": float(later.mean()) if len(later) else 1.0,
        "at_cap": float((later >= 1 + delta).float().mean()) if len(later) else 0.0,
        "zero_first": float(compact(trajectory_N, zero_N)[1]),
    }


def _first(trajectory_N: Tensor, step_N: Tensor, mask_N: Tensor) -> Tensor:
    """Masked rows of the first step of their trajectory [N], bool."""
    index_N, size = compact(trajectory_N, mask_N)
    never = torch.iinfo(torch.long).max
    step_N = step_N.long().where(mask_N, never)
    start = step_N.new_full((max(size, 1),), never).scatter_reduce_(0, index_N, step_N, "amin")
    return mask_N & (step_N == start[index_N])


def _largest(x_N: Tensor, index_N: Tensor, size: int) -> Tensor:
    """Largest ``x`` of each segment, at least 0."""
    return x_N.new_zeros(max(size, 1)).scatter_reduce_(0, index_N, x_N, "amax")


# -- tokens ---------------------------------------------------------------------------------------


def entropy_weight(entropy_N: Tensor, mask_N: Tensor, beta: float = 1.0) -> Tensor:
    """exp(-beta * H) [N]: tokens count less where the teacher is unsure (SRPO).

    SRPO (arXiv 2604.02288) scales them to mean 1 over its rows (`mean1`).
    """
    return kept((-beta * _real(entropy_N)).exp(), mask_N)


def agreement(
    variance_N: Tensor,
    mask_N: Tensor,
    gamma: float = 1.0,
    *,
    quantile: float = 0.95,
    cap: float = 10.0,
    floor: float = 0.01,
) -> Tensor:
    """1 / (1 + gamma * v) [N]: tokens count less where a teacher's contexts disagree (UniSD).

    Args:
        variance_N: of the token's log-probability over the contexts.
        mask_N: bool.
        gamma: 0 for ones.
        quantile: v is the variance over this quantile of it among the masked rows.
        cap: v is at most this.
        floor: the weight is at least this.
    """
    values = _real(variance_N)[mask_N]
    if not len(values):
        return torch.zeros_like(_real(variance_N))
    scale = values.quantile(quantile)
    ratio_N = kept(_real(variance_N), mask_N) / torch.where(scale > 0, scale, math.inf)
    return kept((1 / (1 + gamma * ratio_N.clamp_max(cap))).clamp_min(floor), mask_N)


def min_max(x_N: Tensor, mask_N: Tensor) -> Tensor:
    """``x`` moved and scaled to [0, 1] over the masked rows [N]; 0 where all are equal."""
    values = _real(x_N)[mask_N]
    if not len(values):
        return torch.zeros_like(_real(x_N))
    width = values.max() - values.min()
    return kept((_real(x_N) - values.min()) / torch.where(width > 0, width, 1), mask_N)


def soft_or(a_N: Tensor, b_N: Tensor) -> Tensor:
    """Score that is high where either of two in [0, 1] is, a + b - a * b [N].

    TIP's (arXiv 2604.14084) are the student's entropy and its divergence from the teacher, each
    through `min_max`, and it keeps the highest half (`top_share`).
    """
    a_N, b_N = _real(a_N), _real(b_N)
    return a_N + b_N - a_N * b_N


def top_share(score_N: Tensor, mask_N: Tensor, share: float) -> Tensor:
    """1 for the ``share`` of the masked rows with the highest scores, 0 for the others [N].

    At least one row, rounded up; rows as high as the last one kept are kept too.

    Raises:
        ConfigError: ``share`` is outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError("must lie in (0, 1]", key="share", value=share)
    score_N = _real(score_N)
    values = score_N[mask_N]
    if not len(values):
        return torch.zeros_like(score_N)
    bar = values.topk(math.ceil(share * len(values))).values[-1]
    return kept((score_N >= bar).to(score_N.dtype), mask_N)


def difficulty_temperature(
    score_N: Tensor, mask_N: Tensor, *, base: float = 1.0, strength: float = 0.5
) -> Tensor:
    """Temperature of each token, base * exp(-strength * tanh(log(score / median))) (AdaKD) [N].

    Tokens harder than the median are sharpened, easier ones softened. A temperature divides, so
    rows outside the mask get ``base`` here and not 0.

    Args:
        score_N: difficulty, not negative (AdaKD, arXiv 2510.11615: the Hellinger distance).
        mask_N: bool; its rows have the median.
        base: temperature at the median.
        strength: temperatures stay within base * exp(+-strength).
    """
    square_N = kept(_real(score_N), mask_N).square()
    values = square_N[mask_N]
    middle = values.median() if len(values) else square_N.new_zeros(())
    # tanh(log(s / m)) = (s² - m²) / (s² + m²): no logarithm of 0.
    total_N = square_N + middle
    lean_N = (square_N - middle) / torch.where(total_N > 0, total_N, 1)
    return torch.where(mask_N, base * (-strength * lean_N).exp(), base)


# -- trajectories and tasks -----------------------------------------------------------------------


def pass_rate_weight(p_B: Tensor, a: float = 1.0, b: float = 1.0) -> Tensor:
    """p^a (1 - p)^b [B]: tasks count that are neither solved nor hopeless (PACED).

    ``p`` is the student's share of successes on the task (arXiv 2603.11178); a = b = 0 gives ones.
    The paper does not say how the weights are normalised.
    """
    p_B = _real(p_B)
    return p_B**a * (1 - p_B) ** b


def signed(success_B: Tensor, positive: float = 1.0, negative: float = 0.8) -> Tensor:
    """Weight of each trajectory's negative log-likelihood: learn successes, unlearn failures [B].

    ``positive`` for a success and -``negative`` for a failure (REDI, arXiv 2505.24850).
    """
    return torch.where(success_B > 0, positive, -negative)


def softmax_ppl(
    mean_logp_B: Tensor, group_B: Tensor, mask_B: Tensor, sign: float = 1.0, tau: float = 1.0
) -> Tensor:
    """Weights proportional to PPL^(sign / tau) within each group, with mean 1 [B] (SCOPE).

    SCOPE (arXiv 2604.10688) routes by outcome: ``mask_B`` is one branch. Its paper takes the
    student's perplexity and sign 1 among the successes (unsure ones count more; its released
    script has -1), and the teacher's with -1 among the failures.

    Args:
        mean_logp_B: mean log-probability per token, -log PPL.
        group_B: group of each trajectory.
        mask_B: bool, the members of the branch.
        sign: 1 favours high perplexity, -1 low.
        tau: temperature; infinite for ones.

    Raises:
        ConfigError: ``tau`` is not positive.
    """
    if tau <= 0:
        raise ConfigError("must be above 0", key="tau", value=tau)
    score_B = kept(-sign / tau * _real(mean_logp_B), mask_B)
    index_B, size = compact(group_B, mask_B)
    high = score_B.new_full((max(size, 1),), -math.inf)
    high.scatter_reduce_(0, index_B, score_B.where(mask_B, -math.inf), "amax")
    return mean1((score_B - high[index_B]).exp(), mask_B, group_B)
