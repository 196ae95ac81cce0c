"""Which share each token has in the loss: L = sum of a_i * w_i * loss_i.

``a`` (`reduce_weights`) is the denominator and names its index set: tokens, or the turns, steps,
streams, trajectories or groups that the tokens belong to. ``w`` are a method's own weights,
brought to a scale by `mean1`.

Invariants:

* Nothing here carries a gradient; every result is detached, in float32 (float64 inputs of `mean1`
  and the segment functions stay).
* Rows outside the mask get 0, and what stands there (NaN, an index of -1) has no influence.
  ``0 * NaN`` is NaN, though: leave such rows out of the loss itself.
* Unit ids are any integers: gaps, negative numbers and any order are fine.
* Denominators can be given from outside. Computed once over the whole optimiser batch (and summed
  over ranks), they make every split into micro-batches sum to the same loss.
* No loop over tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentdistill.errors import ConfigError


def kept(x_N: Tensor, mask_N: Tensor) -> Tensor:
    """``x`` where the mask is set, 0 elsewhere, whatever stands there [N], detached.

    Raises:
        ConfigError: the mask is not bool.
    """
    if mask_N.dtype != torch.bool:
        raise ConfigError("must be a bool tensor", key="mask.dtype", value=mask_N.dtype)
    x_N = x_N.detach()
    return torch.where(mask_N, x_N, torch.zeros_like(x_N))


def compact(unit_N: Tensor, mask_N: Tensor) -> tuple[Tensor, int]:
    """Ids renumbered to 0..U-1 (0 outside the mask), and U."""
    ids, inverse = torch.unique(unit_N[mask_N], return_inverse=True)
    index_N = torch.zeros_like(mask_N, dtype=torch.long)
    index_N[mask_N] = inverse
    return index_N, len(ids)


def segment_sum(x_N: Tensor, index_N: Tensor, mask_N: Tensor, size: int) -> Tensor:
    """Sum of the masked ``x`` per segment [size]; empty segments give 0.

    Args:
        x_N: values; float16 and bfloat16 are summed in float32.
        index_N: segment of each row, in 0..size-1 where the mask is set, anything elsewhere.
        mask_N: bool.
        size: number of segments.
    """
    x_N = kept(x_N, mask_N)
    x_N = x_N.to(torch.promote_types(x_N.dtype, torch.float32))
    return x_N.new_zeros(size).index_add_(0, kept(index_N, mask_N).long(), x_N)


def segment_count(index_N: Tensor, mask_N: Tensor, size: int) -> Tensor:
    """Masked rows per segment [size], int64."""
    return torch.bincount(index_N[mask_N].long(), minlength=size)


def segment_mean(x_N: Tensor, index_N: Tensor, mask_N: Tensor, size: int) -> Tensor:
    """Mean of the masked ``x`` per segment [size]; empty segments give 0. See `segment_sum`."""
    count = segment_count(index_N, mask_N, size).clamp_min(1)
    return segment_sum(x_N, index_N, mask_N, size) / count


def count_units(unit_N: Tensor | None, mask_N: Tensor) -> int:
    """Units with at least one masked token (masked tokens, for None): `reduce_weights`' units."""
    return int(mask_N.sum()) if unit_N is None else compact(unit_N, mask_N)[1]


def tokens_per_unit(unit_N: Tensor, mask_N: Tensor) -> Tensor:
    """For each row the number of masked tokens of its unit [N], int64; 0 outside the mask."""
    index_N, units = compact(unit_N, mask_N)
    return kept(segment_count(index_N, mask_N, max(units, 1))[index_N], mask_N)


def reduce_weights(
    unit_N: Tensor | None,
    mask_N: Tensor,
    *,
    units: int | None = None,
    unit_tokens: Tensor | None = None,
) -> Tensor:
    """Weights ``a`` [N] with which ``sum(a * x)`` is a mean over units of the mean over tokens.

    Units without a masked token do not count (verl's ``agg_loss``). None for ``unit_N`` is
    token-mean; turn ids give TCOD's seq-mean-token-mean, where a row of its batch is a turn.

    Args:
        unit_N: id of each row's unit (turn, step, stream, trajectory, group), or None: each
            token is its own unit.
        mask_N: bool, the tokens that are reduced.
        units: denominator of the outer mean instead of the number of units found here: the count
            over all ranks and micro-batches, or one shared between terms.
        unit_tokens: per row [N], tokens of its unit instead of the number found here
            (`tokens_per_unit` of the whole batch), for parts that cut through a unit.

    Returns:
        float32 [N]; all 0 when nothing is masked.
    """
    outer = count_units(unit_N, mask_N) if units is None else units
    weight_N = torch.full(mask_N.shape, 1 / max(outer, 1), device=mask_N.device)
    if unit_N is not None:
        inner_N = tokens_per_unit(unit_N, mask_N) if unit_tokens is None else unit_tokens
        weight_N = weight_N / inner_N.clamp_min(1)
    return kept(weight_N, mask_N)


def mean1(weights_N: Tensor, mask_N: Tensor, scope_N: Tensor | None = None) -> Tensor:
    """Weights scaled so that their mean over the masked rows of each scope is 1 [N].

    Args:
        weights_N: weights, not negative.
        mask_N: bool; rows outside get 0.
        scope_N: id of each row's scope (a group, a branch of a routing), None for one scope.

    Returns:
        Weights [N]; a scope whose weights are all 0 stays 0.
    """
    scope_N = torch.zeros_like(mask_N, dtype=torch.long) if scope_N is None else scope_N
    index_N, scopes = compact(scope_N, mask_N)
    mean_N = segment_mean(weights_N, index_N, mask_N, max(scopes, 1))[index_N]
    return kept(weights_N, mask_N) / torch.where(mean_N == 0, 1, mean_N)
