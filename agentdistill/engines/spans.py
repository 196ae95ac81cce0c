"""Attention of rows of any lengths over slots, in one forward of the model.

Invariants
----------
* The new tokens of all rows lie end to end in one row of the model's input: products, norms and
  experts see real tokens, each once. Only attention knows rows.
* A span is a run of neighbouring slots. Its keys and values are a view of the buffers, never a
  copy. Padding within a span, and slots in it that nobody asked for, compute something that nobody
  reads; so buffers must hold finite numbers.
* Key j is visible to a query at position p if and only if j <= p.

While the model runs, its attention function is :func:`_attend`, through the registry that
transformers keeps for this. It sends each span through the kernel that the model would have used,
or through scaled dot products where that kernel takes no mask.

Shape suffixes: T new tokens, N heads, D head dimension; R slots of a span, W most new tokens of one
of them, E most tokens that one of them then has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from agentdistill.engines.forward import Indices, fill, length_groups, within
from agentdistill.errors import EngineError

NAME = "agentdistill_spans"

SPARE_QUERIES = 32
"""Padding below this is cheaper than one more call of attention."""

QUERIES_PER_READ = 16
"""The arithmetic of so many queries takes about as long as reading keys and values once."""

CALL_BYTES = {"cpu": 1_000_000, "cuda": 64_000_000}
"""Of keys and values that are read while a call of attention is prepared: estimates, which decide
speed only. That of a GPU was never measured; other devices take it."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows with about as many new tokens, in spans; see the top of the module for R, W and E.

    Attributes:
        tokens: which of the new tokens.
        shape: R of all spans together, and W.
        grid: numbers [R * W] of the tokens, from 0; None: all of one width, no slot between.
        picks: places of the tokens in the grid; None as for ``grid``.
        extent: E.
        spans: of each one its rows among R, its slots, and its mask [r, 1, W, E]: None where
            everything is visible, or the kernel's own causality is the same.
    """

    tokens: slice
    shape: tuple[int, int]
    grid: Tensor | None
    picks: Tensor | None
    extent: int
    spans: list[tuple[slice, slice, Tensor | None]]


Kernel = Callable[..., tuple[Tensor, Any]]

_RUNNING: ContextVar[tuple[Kernel, Sequence[Group]]] = ContextVar("what the forward attends to")


@contextmanager
def attention(config: Any, kernel: Kernel, groups: Sequence[Group]) -> Iterator[None]:
    """Let the model with this ``config`` attend by ``groups``, which cover its input in order.

    Args:
        config: of the model's body, whose layers ask it for their attention.
        kernel: from :func:`kernel_of`.
        groups: from :func:`arrange`.
    """
    name, token = config._attn_implementation, _RUNNING.set((kernel, groups))
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = name
        _RUNNING.reset(token)


def kernel_of(decoder: Any) -> tuple[Kernel, torch.dtype | None]:
    """The attention function of a model's body, and the type of masks if it adds them.

    It is the model's own eager one, or scaled dot products, whose masks say what is visible.

    Raises:
        EngineError: the model's attention is not made to be replaced.
    """
    if decoder.config._attn_implementation != "eager":
        return AttentionInterface()["sdpa"], None  # type: ignore[no-untyped-call]
    own = getattr(sys.modules[type(decoder).__module__], "eager_attention_forward", None)
    if own is None:
        raise EngineError("its attention cannot be replaced")
    return own, decoder.dtype


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **settings: Any
) -> tuple[Tensor, None]:
    """Outputs [1, T, N, D] for queries [1, N, T, D] over whole buffers [slots, N, capacity, D]."""
    kernel, groups = _RUNNING.get()
    query_TND, parts = query[0].transpose(0, 1), []
    for group in groups:
        mine = query_TND[group.tokens]
        mine = mine if group.grid is None else mine[group.grid]
        mine = mine.reshape(*group.shape, *mine.shape[1:]).transpose(1, 2)
        seen_key, seen_value = key[:, :, : group.extent], value[:, :, : group.extent]
        outputs = [
            kernel(module, mine[rows], seen_key[slots], seen_value[slots], mask, **settings)[0]
            for rows, slots, mask in group.spans
        ]
        flat = _joined(outputs).flatten(0, 1)
        parts.append(flat if group.picks is None else flat[group.picks])
    return _joined(parts)[None], None


AttentionInterface.register(NAME, _attend)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True, slots=True)
class Kept:
    """Keys and values that a forward attends to.

    Attributes:
        device: where they are.
        token_bytes: of a token's keys and values in one layer.
        additive: type of the masks, see :func:`kernel_of`.
    """

    device: torch.device
    token_bytes: int
    additive: torch.dtype | None


def arrange(
    index: Indices, start: Indices, counts: Indices, kept: Kept
) -> tuple[Indices, list[Group]]:
    """In which order the rows of a forward go, and what attention computes for them.

    Args:
        index: slot of each row.
        start: tokens that its slot holds.
        counts: new tokens, at least one.
        kept: what is attended to.

    Returns:
        Row numbers in order, and groups.
    """
    order, groups, first = [], [], 0
    for alike in length_groups(counts, spare=SPARE_QUERIES, part=4):
        rows = alike[np.argsort(index[alike])]
        group = _group(first, index[rows], start[rows], counts[rows], kept)
        order.append(rows)
        groups.append(group)
        first = group.tokens.stop
    return np.concatenate(order), groups


def _group(first: int, index: Indices, start: Indices, counts: Indices, kept: Kept) -> Group:
    """The group of rows whose tokens begin at ``first``, in the order of their slots."""
    device, additive = kept.device, kept.additive
    width, total, extent = int(counts.max()), int(counts.sum()), int((start + counts).max())
    reads = kept.token_bytes * extent * (1 + width / QUERIES_PER_READ)
    between = np.diff(index) - 1
    far = between * reads > CALL_BYTES.get(device.type, CALL_BYTES["cuda"])
    place = np.concatenate([[0], np.cumsum(np.where(far, 1, between + 1))])
    borders = [0, *place[1:][far].tolist(), int(place[-1]) + 1]
    lows = index[:1].tolist() + index[1:][far].tolist()
    shape = borders[-1], width
    grid = picks = mask = None
    if total < shape[0] * width:
        row, column = np.repeat(place, counts), within(counts)
        grid = torch.from_numpy(fill(row, column, np.arange(total), shape).ravel()).to(device)
        picks = torch.from_numpy(row * width + column).to(device)
    whole = width == 1 and int(start.min()) == int(start.max())
    if not whole and (additive is not None or start.any()):
        starts = np.zeros(shape[0], np.int64)
        starts[place] = start
        positions = torch.from_numpy(starts[:, None] + np.arange(width))
        mask = _mask(positions.to(device), extent, additive)
    spans = []
    for low, begin, end in zip(lows, borders[:-1], borders[1:], strict=True):
        rows = slice(begin, end)
        spans.append((rows, slice(low, low + end - begin), None if mask is None else mask[rows]))
    return Group(slice(first, first + total), shape, grid, picks, extent, spans)


def _mask(positions: Tensor, extent: int, additive: torch.dtype | None) -> Tensor:
    """[R, 1, W, E]: whether a key is visible to a query at ``positions`` [R, W], or what to add."""
    keys = torch.arange(extent, device=positions.device)
    visible = keys <= positions[:, None, :, None]
    if additive is None:
        return visible
    return torch.where(visible, 0.0, torch.finfo(additive).min).to(additive)
