"""Keys and values that stay between turns, one slot per session.

Invariants
----------
* ``Slot.ids`` are exactly the tokens whose keys and values lie at the slot's positions 0, 1, 2, …
  Nothing else is ever written: padding leaves no dead tokens behind.
* Numbers beyond a slot's end are weighed by zero, so they must be finite: buffers start as zeros
  and are dropped after any failure.
* Slots in use are kept next to each other, so that a batch is a few spans of the buffers
  (:mod:`~agentdistill.engines.spans`).
* A slot is free when no session owns it and nobody extends it: a session may be released, or asked
  again, while its last request still runs.
* What cannot be kept correctly is computed again from the prompt
  (:func:`agentdistill.engines.refill.open_kv` decides).

Buffers are laid out [slots, kv_heads, capacity, head_dim] per layer, as attention reads them: with
a token's heads side by side, attention of one query takes two to three times as long on a CPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from agentdistill.engines import spans
from agentdistill.engines.forward import Indices, length_groups, within

FIRST_SLOTS, FIRST_CAPACITY = 8, 64


@dataclass(slots=True, eq=False)
class Slot:
    """A place in the cache: ``ids`` whose keys and values it has, in buffer row ``index``."""

    index: int
    session: str | None = None
    ids: list[int] = field(default_factory=list)


class KV(ABC):
    """Context of running sequences: open slots, extend them, close them.

    ``joins``: whether slots can be opened while others are still extended.
    """

    joins: bool

    @abstractmethod
    def open(self, sessions: Sequence[str | None], prompts: Sequence[list[int]]) -> list[Slot]:
        """One slot per prompt; its ``ids`` are a proper prefix of the prompt."""

    @abstractmethod
    def extend(self, slots: Sequence[Slot], chunks: Sequence[list[int]]) -> Tensor:
        """Compute ``chunks`` (not empty) after what the slots hold; last hidden states [B, H]."""

    @abstractmethod
    def close(self, slots: Sequence[Slot]) -> None:
        """``slots`` are not extended any more; those that belong to no session are free."""

    def release(self, session: str) -> None:  # noqa: B027  (optional)
        """Forget ``session``."""

    def clear(self) -> None:  # noqa: B027  (optional)
        """Forget everything."""


class _Buffers(Cache):
    """The tensors of all slots, as the cache object that the model writes to."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.size = (FIRST_SLOTS, FIRST_CAPACITY)
        self.target: tuple[Tensor, Tensor]  # slot and place of each token of the forward that runs
        self._layers: list[list[Tensor]] = []

    def reserve(self, slots: int, capacity: int) -> None:
        """Make room, by powers of two; layers follow at their next write."""
        slots, capacity = (1 << (n - 1).bit_length() for n in (slots, capacity))
        self.size = (max(self.size[0], slots), max(self.size[1], capacity))

    def drop(self) -> None:
        """Free the memory; the size stays what it was."""
        self._layers = []

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of slot ``source`` to slot ``target``."""
        for tensor in chain.from_iterable(self._layers):
            tensor[target, :, :length] = tensor[source, :, :length]

    @property
    def token_bytes(self) -> int:
        """Of a token's keys and values in one layer; 0 before anything was written."""
        return sum(t[0, :, 0].nbytes for t in self._layers[0]) if self._layers else 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the keys and values [1, heads, T, dim] of all new tokens; return whole buffers."""
        if layer_idx == len(self._layers):
            self._layers.append([_room(key_states, self.size), _room(value_states, self.size)])
        layer = self._layers[layer_idx]
        for i, states in enumerate((key_states, value_states)):
            old = layer[i]
            if (len(old), old.shape[2]) != self.size:
                layer[i] = _room(old, self.size)
                layer[i][: len(old), :, : old.shape[2]] = old
            layer[i].transpose(1, 2)[self.target] = states[0].transpose(0, 1)
        return layer[0], layer[1]


class SlotKV(KV):
    """Slots for models whose layers all attend to everything before.

    Args:
        decoder: body of the model.
        device: where it lives.
        max_slots: at most this many; the session used longest ago makes room.
        keep: whether sessions keep their slot after a batch.
        budget: padded tokens of one forward; larger batches take several.
    """

    joins = True

    def __init__(
        self, decoder: Any, device: torch.device, *, max_slots: int, keep: bool, budget: int
    ) -> None:
        """Start without any slot; buffers come with the first forward."""
        self._decoder, self._device = decoder, device
        self._max_slots, self._keep, self._budget = max_slots, keep, budget
        self._buffers = _Buffers()
        self._sessions: OrderedDict[str | None, Slot] = OrderedDict()
        self._free: list[int] = []
        self._top = 0
        self._busy: set[Slot] = set()

    def open(self, sessions: Sequence[str | None], prompts: Sequence[list[int]]) -> list[Slot]:
        """Find or make a slot per prompt and cut it to what it shares with the prompt.

        A request of a session that another one is using gets a slot of its own, which is not kept.
        """
        for session in sessions:
            if session in self._sessions:
                self._sessions.move_to_end(session)  # first, so that _new takes none of these
        opened = []
        for session, prompt in zip(sessions, prompts, strict=True):
            slot = self._sessions.get(session)
            if slot is None or slot in self._busy:
                slot = self._new(session)
            del slot.ids[shared(slot.ids, prompt) :]
            self._busy.add(slot)
            opened.append(slot)
        self._close_gaps()
        return opened

    def _new(self, session: str | None) -> Slot:
        if not self._free and self._top == self._max_slots:
            idle = (name for name, slot in self._sessions.items() if slot not in self._busy)
            self.release(str(next(idle)))
        slot = Slot(heappop(self._free) if self._free else self._top, session)
        self._top = max(self._top, slot.index + 1)
        if self._keep and session is not None and session not in self._sessions:
            self._sessions[session] = slot
        return slot

    def _close_gaps(self) -> None:
        """Move the highest slots into free places below, which keeps batches contiguous."""
        if not self._free:
            return
        used = {slot.index: slot for slot in chain(self._sessions.values(), self._busy)}
        for index in sorted(used, reverse=True):
            if not self._free or self._free[0] > index:
                break
            target = heappop(self._free)
            self._buffers.move(index, target, len(used[index].ids))
            used[index].index = target
        self._free = []
        self._top = len(used)

    def close(self, slots: Sequence[Slot]) -> None:
        """Give back those of ``slots`` that no session owns (:meth:`clear` gave back all)."""
        for slot in self._busy.intersection(slots):
            self._busy.remove(slot)
            self._free_if_idle(slot)

    def release(self, session: str) -> None:
        """Forget ``session``; its place is free, or will be when nobody extends it any more."""
        slot = self._sessions.pop(session, None)
        if slot is not None:
            self._free_if_idle(slot)

    def _free_if_idle(self, slot: Slot) -> None:
        if slot not in self._busy and self._sessions.get(slot.session) is not slot:
            heappush(self._free, slot.index)

    def clear(self) -> None:
        """Forget every session and free the buffers: what they hold belongs to other weights."""
        self._sessions.clear()
        self._free, self._top, self._busy = [], 0, set()
        self._buffers.drop()

    def extend(self, slots: Sequence[Slot], chunks: Sequence[list[int]]) -> Tensor:
        """One forward for everybody; several, long to short, where the budget would not hold."""
        index, start, counts = (
            np.fromiter(values, np.int64, len(slots))
            for values in (
                (slot.index for slot in slots),
                (len(slot.ids) for slot in slots),
                map(len, chunks),
            )
        )
        self._buffers.reserve(self._top, int((start + counts).max()))
        groups = length_groups(counts, spare=self._budget, budget=self._budget)
        parts = [
            self._forward([chunks[i] for i in g], index[g], start[g], counts[g]) for g in groups
        ]
        for slot, chunk in zip(slots, chunks, strict=True):
            slot.ids += chunk
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)[self._tensor(np.argsort(np.concatenate(groups)))]

    def _forward(
        self, chunks: Sequence[list[int]], index: Indices, start: Indices, counts: Indices
    ) -> Tensor:
        """Last hidden states [B, H] of one forward over the chunks, end to end."""
        kernel, additive = spans.kernel_of(self._decoder)
        kept = spans.Kept(self._device, self._buffers.token_bytes, additive)
        order, groups = spans.arrange(index, start, counts, kept)
        lengths = counts[order]
        ids = chain.from_iterable(chunks[i] for i in order.tolist())
        flat = np.fromiter(ids, np.int64, int(lengths.sum()))
        where = self._tensor(np.repeat(start[order], lengths) + within(lengths))
        self._buffers.target = self._tensor(np.repeat(index[order], lengths)), where
        with spans.attention(self._decoder.config, kernel, groups):
            output = self._decoder(
                input_ids=self._tensor(flat)[None],
                position_ids=where[None],
                past_key_values=self._buffers,
                use_cache=True,
            )
        last = np.empty_like(order)
        last[order] = np.cumsum(lengths) - 1
        hidden: Tensor = output.last_hidden_state[0]
        return hidden[self._tensor(last)]

    def _tensor(self, values: Indices) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def shared(held: list[int], prompt: list[int]) -> int:
    """Length of the common prefix, always leaving a token of ``prompt`` to compute."""
    limit = min(len(held), len(prompt) - 1)
    if held[:limit] == prompt[:limit]:
        return limit
    differ = np.asarray(held[:limit]) != np.asarray(prompt[:limit])
    return int(differ.argmax())


def _room(like: Tensor, size: tuple[int, int]) -> Tensor:
    """Zeros for ``size`` slots and tokens like ``like`` [.., heads, .., dim]."""
    return like.new_zeros(size[0], like.shape[1], size[1], like.shape[3])
