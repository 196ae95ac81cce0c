"""Which cache a model gets, and the one for models whose keys and values cannot be kept.

Invariants
----------
* What cannot be kept correctly (sliding windows, recurrent layers, unknown models) is computed
  again from the prompt: :func:`open_kv` decides, and says why.
* A cache is trusted after it has given what plain forwards give, and not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from agentdistill.engines.forward import fill, within
from agentdistill.engines.kv import KV, Slot, SlotKV
from agentdistill.errors import EngineError


class RefillKV(KV):
    """No memory between turns: each batch is computed from its prompts, then decoded as usual.

    For models that :class:`SlotKV` does not know. Prompts are padded on the left, so that the
    model's own cache can hold whatever its layers need; finished rows stay in the batch.
    """

    joins = False

    def __init__(self, decoder: Any, device: torch.device) -> None:
        """Remember the model; there is no other state between batches."""
        self._decoder, self._device = decoder, device
        self._cache: Any = None
        self._mask, self._rows, self._running = torch.zeros(0), 0, 0

    def open(self, sessions: Sequence[str | None], prompts: Sequence[list[int]]) -> list[Slot]:
        """Empty slots, whatever the sessions are."""
        self._cache, self._rows, self._running = None, len(prompts), len(prompts)
        return [Slot(i) for i in range(len(prompts))]

    def extend(self, slots: Sequence[Slot], chunks: Sequence[list[int]]) -> Tensor:
        """The whole prompts first, then one token for each row that still runs."""
        counts = np.fromiter(map(len, chunks), np.int64, len(chunks))
        width = int(counts.max())
        row = np.fromiter((slot.index for slot in slots), np.int64, len(slots))
        place = np.repeat(row, counts), np.repeat(width - counts, counts) + within(counts)
        flat = np.fromiter(chain.from_iterable(chunks), np.int64, int(counts.sum()))
        ids = fill(*place, flat, (self._rows, width))
        if self._cache is None:
            self._cache = DynamicCache(config=self._decoder.config)
            real = fill(*place, np.ones_like(flat), ids.shape)
            self._mask = torch.from_numpy(real).to(self._device)
            positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        else:
            self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], -1)
            positions = self._mask.sum(-1, keepdim=True) - 1
        output = self._decoder(
            input_ids=torch.from_numpy(ids).to(self._device),
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        for slot, chunk in zip(slots, chunks, strict=True):
            slot.ids += chunk
        last: Tensor = output.last_hidden_state[:, -1]
        return last[torch.from_numpy(row).to(self._device)]

    def close(self, slots: Sequence[Slot]) -> None:
        """Free the batch's cache with its last row."""
        self._running -= len(slots)
        if not self._running:
            self._cache = None


def open_kv(
    decoder: Any, device: torch.device, *, max_slots: int, keep: bool, budget: int
) -> tuple[KV, str]:
    """The cache that fits the model, and why it is not :class:`SlotKV` ("" if it is).

    Raises:
        EngineError: neither cache gives what plain forwards give.
    """
    slots = SlotKV(decoder, device, max_slots=max_slots, keep=keep, budget=budget)
    reason = _obstacle(decoder.config) or _probe(decoder, device, slots, [[2, 1], [0, 1, 2, 1]])
    if not reason:
        return slots, ""
    refill = RefillKV(decoder, device)
    wrong = _probe(decoder, device, refill, [[2], [0]])
    if wrong:
        raise EngineError(f"cannot generate: {wrong}")
    return refill, f"KV is not kept between turns: {reason}"


def _obstacle(config: Any) -> str:
    """Which layers of the model do not attend to everything before, "" if all do."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        other = sorted(set(kinds) - {"full_attention"})
        return f"layers of type {', '.join(other)}" if other else ""
    windows = {n: getattr(config, n, None) for n in ("sliding_window", "attention_chunk_size")}
    return ", ".join(f"{name}={size}" for name, size in windows.items() if size is not None)


@torch.no_grad()
def _probe(decoder: Any, device: torch.device, kv: KV, second: list[list[int]]) -> str:
    """Two ragged chunks against plain forwards; what is wrong, "" if nothing."""
    first = [[0, 1, 2, 0, 2], [2, 1]]
    prompts = [a + b for a, b in zip(first, second, strict=True)]
    try:
        slots = kv.open([None, None], prompts)
        kv.extend(slots, first)
        got = kv.extend(slots, second)
        kv.clear()
        plain = [decoder(input_ids=torch.tensor([p], device=device)) for p in prompts]
    except Exception as error:  # any failure means the same: this model needs the other cache
        return f"{type(decoder).__name__} does not take it ({type(error).__name__}: {error})"
    wanted = torch.stack([output.last_hidden_state[0, -1] for output in plain])
    gap = float((got - wanted).float().norm() / wanted.float().norm())
    return "" if gap < 0.05 else f"{type(decoder).__name__} answers differently with it ({gap:.2g})"
