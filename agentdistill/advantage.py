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
from agentdistill.weighting import segment_count, segment_mean


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
