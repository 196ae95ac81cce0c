"""Advantages, and the policy-gradient losses that take them.

Suffixes: B trajectories, N tokens. Log-probabilities are natural.

Invariants: advantages and importance weights are detached; losses are per token, without
reduction, and differentiable in ``logp_N`` alone. Log-ratios are cut before they are
exponentiated, so that no finite input gives an infinite loss or gradient. Rows that nobody sampled
(NaN) belong in no loss; `truncated_is` and `opd` say what they do with them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from agentdistill.errors import ConfigError
from agentdistill.weighting import kept, segment_count, segment_mean


def grpo(
    reward_B: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    *,
    normalise: str = "std",
    ddof: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """Advantage of each trajectory over its group, (R - mean) / (std + eps) [B].

    Trajectories that are not valid (a fault, a curriculum's window that ended the episode) get 0
    and do not enter the statistics. So do groups that teach nothing: one valid member, or equal
    rewards (exactly 0, whatever the rounding of the mean).

    Args:
        reward_B: reward of each trajectory.
        group_B: group id, any integers.
        valid_B: bool.
        normalise: ``std``, or ``none`` to centre only (Dr.GRPO, pi-Distill).
        ddof: 1 for the sample standard deviation (torch's default, so verl's and TRL's), 0 for
            the population's. Code bases differ here: rewards 1, 0, 0, 1 give +-0.866 or +-1.
        eps: added to the standard deviation (verl 1e-6, Skill-SD 1e-8, TRL 1e-4).

    Raises:
        ConfigError: unknown ``normalise`` or ``ddof``.
    """
    if normalise not in ("std", "none"):
        raise ConfigError("one of std, none", key="normalise", value=normalise)
    if ddof not in (0, 1):
        raise ConfigError("one of 0, 1", key="ddof", value=ddof)
    reward_B = reward_B.detach().to(torch.promote_types(reward_B.dtype, torch.float32))
    groups, index_B = torch.unique(group_B, return_inverse=True)
    size = len(groups)
    centred_B = reward_B - segment_mean(reward_B, index_B, valid_B, size)[index_B]
    if normalise == "std":
        count = segment_count(index_B, valid_B, size)
        bessel = count.clamp_min(1) / (count - ddof).clamp_min(1)
        std = (segment_mean(centred_B.square(), index_B, valid_B, size) * bessel).sqrt()
        centred_B = centred_B / (std[index_B] + eps)
    return torch.where(valid_B & _mixed(reward_B, index_B, valid_B, size), centred_B, 0.0)


def _mixed(reward_B: Tensor, index_B: Tensor, valid_B: Tensor, size: int) -> Tensor:
    """Whether the valid rewards of a trajectory's group differ at all [B]."""
    high = reward_B.new_full((size,), -math.inf)
    low = reward_B.new_full((size,), math.inf)
    high.scatter_reduce_(0, index_B, reward_B.where(valid_B, -math.inf), "amax")
    low.scatter_reduce_(0, index_B, reward_B.where(valid_B, math.inf), "amin")
    return (high > low)[index_B]


def opd(old_logp_N: Tensor, teacher_logp_N: Tensor, mask_N: Tensor, coef: float = 1.0) -> Tensor:
    """On-policy distillation as an advantage, coef * (teacher - old), 0 outside the mask [N].

    With a policy-gradient loss this descends the reverse KL. No baseline and no group
    normalisation, as in tinker-cookbook and TCOD's code. What stands outside the mask is ignored.
    """
    gap_N = teacher_logp_N.detach() - old_logp_N.detach()
    return torch.where(mask_N, coef * gap_N, 0.0)


def extrapolated(
    old_logp_N: Tensor,
    teacher_logp_N: Tensor,
    base_logp_N: Tensor,
    mask_N: Tensor,
    share: float = 1.25,
    coef: float = 1.0,
) -> Tensor:
    """Distil from beyond the teacher, coef * (share * teacher + (1 - share) * base - old) [N].

    G-OPD (arXiv 2602.12125): the implicit reward teacher - base, scaled by ``share`` against the
    KL to the base. Below 1 it interpolates, above it extrapolates (ExOPD). At 1 it is `opd`, and
    the base need not be known. 0 outside the mask.
    """
    if share == 1:
        return opd(old_logp_N, teacher_logp_N, mask_N, coef)
    return opd(old_logp_N, torch.lerp(base_logp_N, teacher_logp_N, share), mask_N, coef)


def anchored(old_logp_N: Tensor, teacher_logp_N: Tensor, mixing: float) -> Tensor:
    """Log of old^(1 - mixing) * teacher^mixing [N], as old log-probability in `ppo_loss`.

    TRRD (arXiv 2602.22495) holds the update by this in place of the policy before it; its alpha
    is 1 - mixing. 0 is the old policy, whatever the teacher says, and 1 the teacher.
    """
    if mixing == 0:
        return old_logp_N.detach()
    return torch.lerp(old_logp_N.detach(), teacher_logp_N.detach(), mixing)


def magnitude(
    advantage_N: Tensor, gap_N: Tensor, mixing: float = 0.5, bound: float = 0.2
) -> Tensor:
    """A * (1 - mixing + mixing * clip(exp(sign(A) * gap), 1 - bound, 1 + bound)) [N].

    RLSD (arXiv 2604.03128): the teacher says how much each token moves, the reward which way.

    Args:
        advantage_N: the reward's advantage A.
        gap_N: teacher - old, as from `opd`; where it is 0, A stays as it is.
        mixing: 0 leaves A alone, 1 scales it by the whole factor.
        bound: the factor lies within 1 +- bound; at most 1, or signs could turn.

    Raises:
        ConfigError: ``bound`` is outside [0, 1].
    """
    if not 0 <= bound <= 1:
        raise ConfigError("must lie in [0, 1]", key="bound", value=bound)
    advantage_N = advantage_N.detach()
    factor_N = (advantage_N.sign() * gap_N.detach()).exp().clamp(1 - bound, 1 + bound)
    return advantage_N * (1 + mixing * (factor_N - 1))


def retried(second_B: Tensor, first_B: Tensor, group_B: Tensor, valid_B: Tensor) -> Tensor:
    """Rewards of second attempts over the group's mean of the first ones [B]; 0 if not valid.

    RLTF-SD (arXiv 2602.02482): second attempts are good because of the critique between, and a
    mean of their own would take that away.
    """
    groups, index_B = torch.unique(group_B, return_inverse=True)
    baseline = segment_mean(first_B, index_B, valid_B, len(groups))
    return torch.where(valid_B, second_B.detach() - baseline[index_B], 0.0)


def margin_shift(
    mean_B: Tensor,
    success_B: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    *,
    delta: float = 0.4,
    side: str = "both",
    statistic: str = "mean",
) -> Tensor:
    """What to add to every advantage of a trajectory, so that successes lead by delta [B].

    Uni-OPD (arXiv 2605.03677): where in a group successes are not ``delta`` above failures, they
    are moved apart by what is missing. Groups of one kind, and rows that are not valid, get 0.

    Args:
        mean_B: mean advantage of each trajectory.
        success_B: bool.
        group_B: group of each trajectory; one id for all compares over the batch.
        valid_B: bool.
        delta: the gap wanted; minus infinity for no shift.
        side: who moves: ``correct_up``, ``incorrect_down``, or ``both`` by half.
        statistic: the gap between ``mean`` and mean, or from the worst success to the best
            failure (``minmax``).

    Raises:
        ConfigError: unknown ``side`` or ``statistic``.
    """
    shares = {"both": (0.5, 0.5), "correct_up": (1.0, 0.0), "incorrect_down": (0.0, 1.0)}
    if side not in shares:
        raise ConfigError(f"one of {', '.join(shares)}", key="side", value=side)
    if statistic not in ("mean", "minmax"):
        raise ConfigError("one of mean, minmax", key="statistic", value=statistic)
    groups, index_B = torch.unique(group_B, return_inverse=True)
    size, mean_B = len(groups), mean_B.detach()
    right_B, wrong_B = valid_B & success_B, valid_B & ~success_B
    if statistic == "mean":
        right, wrong = (segment_mean(mean_B, index_B, m, size) for m in (right_B, wrong_B))
    else:
        right = mean_B.new_full((size,), math.inf)
        right.scatter_reduce_(0, index_B, mean_B.where(right_B, math.inf), "amin")
        wrong = mean_B.new_full((size,), -math.inf)
        wrong.scatter_reduce_(0, index_B, mean_B.where(wrong_B, -math.inf), "amax")
    has = [segment_count(index_B, m, size) > 0 for m in (right_B, wrong_B)]
    short = has[0] & has[1] & (right - wrong < delta)
    missing_B = torch.where(short, delta - (right - wrong), 0.0)[index_B]
    up, down = shares[side]
    return up * kept(missing_B, right_B) - down * kept(missing_B, wrong_B)


def _log_ratio(logp_N: Tensor, old_logp_N: Tensor, clamp: float) -> Tensor:
    return (logp_N - old_logp_N.detach()).clamp(-clamp, clamp)


def ppo_loss(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
    log_ratio_clamp: float = 20.0,
) -> Tensor:
    """Clipped PPO loss per token [N]: max(-r * A, -clip(r, 1 - low, 1 + high) * A).

    Args:
        logp_N: log-probability of the sampled token under the policy in training.
        old_logp_N: the same under the policy that the update started from.
        advantage_N: a constant.
        clip_low: r is not pushed below 1 - clip_low.
        clip_high: r is not pushed above 1 + clip_high.
        dual_clip: for A < 0 the loss is at most -dual_clip * A (arXiv 1912.09729; verl: 3),
            with no gradient beyond; None leaves it unbounded.
        log_ratio_clamp: log r is cut to +- this (verl: 20), with no gradient beyond.

    Raises:
        ConfigError: ``dual_clip`` does not exceed 1.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ConfigError("must exceed 1, or be None", key="dual_clip", value=dual_clip)
    advantage_N = advantage_N.detach()
    ratio_N = _log_ratio(logp_N, old_logp_N, log_ratio_clamp).exp()
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    loss_N = torch.maximum(-ratio_N * advantage_N, -clipped_N * advantage_N)
    if dual_clip is None:
        return loss_N
    return torch.where(advantage_N < 0, loss_N.minimum(-dual_clip * advantage_N), loss_N)


@torch.no_grad()
def clip_fraction(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """Share of tokens whose gradient the PPO clip removes, a scalar in [0, 1]; 0 for no tokens.

    Those with r > 1 + clip_high and A > 0, or r < 1 - clip_low and A < 0.
    """
    ratio_N = (logp_N - old_logp_N).exp()
    above_N = (ratio_N > 1 + clip_high) & (advantage_N > 0)
    below_N = (ratio_N < 1 - clip_low) & (advantage_N < 0)
    return (above_N | below_N).sum() / max(len(logp_N), 1)


def importance_loss(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, *, log_ratio_clamp: float = 20.0
) -> Tensor:
    """-r * A per token [N] without clipping: tinker's ``importance_sampling``.

    ``old_logp_N`` is the sampler's log-probability there. ``log_ratio_clamp`` as in `ppo_loss`.
    """
    return -_log_ratio(logp_N, old_logp_N, log_ratio_clamp).exp() * advantage_N.detach()


def shaped_loss(logp_N: Tensor, advantage_N: Tensor, gamma: float = 0.1) -> Tensor:
    """-f(p) * A per token [N] with f(p) = p / (p + gamma), without ratio or clip.

    AMPO (arXiv 2510.02227) trains tokens that a teacher wrote so; the steep beginning of f lifts
    those that the student finds unlikely.
    """
    return -torch.sigmoid(logp_N - math.log(gamma)) * advantage_N.detach()


def truncated_is(train_logp_N: Tensor, sampler_logp_N: Tensor, cap: float) -> Tensor:
    """Weight min(train / sampler, cap) [N], detached: for a sampler in another engine.

    Both are log-probabilities of the same weights, from the trainer and from the sampler (G-OPD
    caps at 5, SDPO at 2). Tokens without a sampler's log-probability (NaN: edited, spliced) have
    no ratio and get 1.
    """
    if cap <= 0:
        raise ConfigError("must be above 0", key="cap", value=cap)
    gap_N = train_logp_N.detach() - sampler_logp_N.detach()
    weight_N = gap_N.clamp_max(math.log(cap)).exp()
    return torch.where(sampler_logp_N.isnan(), torch.ones_like(weight_N), weight_N)
