"""Rows that generate together: some join, each draws a token, those that are done leave.

Invariants
----------
* A row's tokens depend on its ids, its sampling, its seed and the weights. Each row has its own
  random numbers, one per token, turned into a token by the inverse of the cumulative distribution.
  Who joined and who left changes the shape of a forward, and nothing but its rounding.
* A row that has not drawn yet brings what is new of its prompt, any other its last token: a
  prefill is a step like every other, and those that draw already take part in it.
* A request has one outcome; whatever comes later, or to nobody who waits, is dropped.
* A step leaves the module as it was: same mode of every submodule, no gradients.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from agentdistill.engines import forward
from agentdistill.engines.base import Sample, Sampling
from agentdistill.engines.kv import KV, Slot
from agentdistill.errors import EngineError


@dataclass(slots=True, eq=False)
class Request:
    """A prompt on its way to a sample.

    ``reused`` tokens of the prompt were in the cache already; ``slot`` is its place there.
    """

    prompt: list[int]
    sampling: Sampling
    seed: int
    session: str | None
    future: asyncio.Future[Sample]
    reused: int = 0
    slot: Slot | None = None
    source: random.Random | None = None
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)

    def begin(self, slot: Slot) -> None:
        """Start in ``slot``, or start again: the same numbers come. Temperature 0 needs none."""
        self.slot, self.reused = slot, len(slot.ids)
        self.source = random.Random(self.seed) if self.sampling.temperature else None
        self.ids, self.logp = [], []

    @property
    def chunk(self) -> list[int]:
        """What the model has to read before the next token."""
        return self.ids[-1:] or self.prompt[self.reused :]

    def alive(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether somebody in ``loop`` still waits: not cancelled, not of a loop that is gone."""
        return not self.future.done() and self.future.get_loop() is loop

    def succeed(self, sample: Sample) -> None:
        """Wake whoever waits, if anybody still does."""
        if not self.future.done():
            self.future.set_result(sample)

    def fail(self, message: str, cause: BaseException | None = None) -> None:
        """Raise an :class:`EngineError` at whoever waits; each waiter has its own."""
        if not self.future.done():
            error = EngineError(message)
            error.__cause__ = cause
            self.future.set_exception(error)


class Batch:
    """The rows that generate now.

    Args:
        model: a causal language model.
        kv: where keys and values of the rows are kept.
        stop_ids: ids that end a response.
    """

    def __init__(self, model: nn.Module, kv: KV, stop_ids: frozenset[int]) -> None:
        """Nobody is there yet."""
        self.rows: list[Request] = []
        self._model, self._kv, self._stop_ids = model, kv, stop_ids
        self._device, self._modules = forward.device_of(model), list(model.modules())
        self._draws: Draws | None = None

    def join(self, requests: list[Request]) -> None:
        """Let ``requests`` take part from the next step on."""
        self.rows, self._draws = self.rows + requests, None
        self._modules = list(self._model.modules())
        sessions, prompts = [r.session for r in requests], [r.prompt for r in requests]
        for request, slot in zip(requests, self._kv.open(sessions, prompts), strict=True):
            request.begin(slot)

    def leave(self, requests: Sequence[Request]) -> None:
        """Take ``requests`` out, done or not."""
        if requests:
            gone = set(requests)
            self._kv.close([r.slot for r in requests if r.slot is not None])
            self.rows, self._draws = [r for r in self.rows if r not in gone], None

    def dissolve(self) -> list[Request]:
        """Take everybody out and forget all keys and values; who was in it."""
        rows, self.rows, self._draws = self.rows, [], None
        self._kv.clear()
        return rows

    def step(self) -> list[Request]:
        """Draw one token for each row; those whose response is complete now, still in the batch."""
        with torch.no_grad(), forward.evaluating(self._modules):
            slots = [r.slot for r in self.rows if r.slot is not None]
            hidden = self._kv.extend(slots, [r.chunk for r in self.rows])
            draws = self._draws = self._draws or Draws(self.rows, self._device)
            tokens, logps = draws(forward.logits(self._model, hidden))
        for request, token, logp in zip(self.rows, tokens, logps, strict=True):
            request.ids.append(token)
            request.logp.append(logp)
        drawn = zip(self.rows, tokens, strict=True)
        return [r for r, t in drawn if t in self._stop_ids or len(r.ids) == r.sampling.max_tokens]


class Draws:
    """How each row of a batch turns logits into a token."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        """Collect the rows' settings and random numbers; those with temperature 0 have none."""
        asked = [r.sampling for r in requests]
        self._sources = [r.source for r in requests]
        columns = [(s.temperature or 1.0, s.top_k or 1 << 31, s.top_p) for s in asked]
        table = torch.tensor(columns, dtype=torch.float32, device=device)
        self._temperature, self._top_k, self._top_p = table[:, :, None].unbind(1)
        self._greedy = torch.tensor([[s.temperature == 0] for s in asked], device=device)
        self._plain = all(s.top_k == 0 and s.top_p == 1 for s in asked)

    def __call__(self, raw: Tensor) -> tuple[list[int], list[float]]:
        """Draw one token per row of logits [B, V]; tokens and their log-probabilities."""
        logp = torch.log_softmax(raw.float() / self._temperature, -1)
        token = raw.argmax(-1, keepdim=True)
        if any(self._sources):
            token = torch.where(self._greedy, token, self._random(logp))
        return token[:, 0].tolist(), logp.gather(-1, token)[:, 0].tolist()

    def _random(self, logp: Tensor) -> Tensor:
        """Inverse of the cumulative distribution at one uniform number per row; ids [B, 1]."""
        weights = logp.exp()
        if not self._plain:
            weights = nucleus(weights, self._top_k, self._top_p)
        # In fp32 a running sum close to 1 would swallow every token less likely than 6e-8.
        wide = torch.float32 if weights.device.type == "mps" else torch.float64
        sums = weights.cumsum(-1, dtype=wide)
        numbers = [source.random() if source else 0.0 for source in self._sources]
        level = torch.tensor(numbers, dtype=wide, device=weights.device)[:, None] * sums[:, -1:]
        return torch.searchsorted(sums, level, right=True).clamp_(max=weights.shape[-1] - 1)


def nucleus(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """``weights`` [B, V] without what is outside the ``top_k`` likeliest and, of these, ``top_p``.

    Ties go to the lower id; the likeliest token always stays.
    """
    ordered, ids = torch.sort(weights, dim=-1, descending=True, stable=True)
    ordered = ordered * (torch.arange(ordered.shape[-1], device=weights.device) < top_k)
    before = ordered.cumsum(-1) - ordered
    # Rounding must not cut the tail of a row that asked for everything.
    inside = ((before < top_p * ordered.sum(-1, keepdim=True)) | (top_p == 1)) & (ordered > 0)
    return weights * torch.zeros_like(inside).scatter_(-1, ids, inside)
