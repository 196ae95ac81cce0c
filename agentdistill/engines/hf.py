"""Any transformers causal language model in this process, with keys and values kept between turns.

Invariants
----------
* Requests that wait together run together: the batch is whatever has arrived when the queue has
  stopped growing for two passes of the event loop. There are no timers, so the batches depend on
  the order of the coroutines and on nothing else.
* A response depends on its ids, its sampling, its seed and the weights. Each request has its own
  random numbers, one per token, turned into a token by the inverse of the cumulative distribution.
* The batch runs synchronously inside the event loop. Whoever could use the loop meanwhile is
  waiting for this batch, or works in a thread or process of its own; and the trainer shares the
  module, which must not be updated while it generates.
* An error belongs to the request that caused it. An unexpected one fails the batch that it
  happened in, drops all kept keys and values, and leaves the engine usable.
* The module leaves a batch as it came: same mode of every submodule, no gradients.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agentdistill.engines import forward
from agentdistill.engines.base import Capabilities, Engine, Sample, Sampling, ScoreRequest, Scores
from agentdistill.engines.kv import open_kv
from agentdistill.errors import EngineError
from agentdistill.records import Usage

SHORT = 8
"""Responses of at most this many ids are decoded once and remembered."""


class HFEngine(Engine):
    """Generates with and scores by a model that lives in this process.

    Args:
        model: a causal language model, possibly wrapped by peft; shared, not copied.
        tokenizer: only decodes responses.
        name: name of the policy in records.
        max_batch: most requests that run together.
        max_slots: most sessions whose keys and values are kept, by default ``max_batch``; a batch
            never has more rows than this. Memory is taken as sessions come.
        reuse_kv: keep keys and values between the turns of a session.
        stop_ids: ids that end a response; by default the end-of-sequence ids of the tokenizer and
            of the model's generation settings.
        budget: padded tokens in one forward; larger prefills and scorings take several.

    Raises:
        EngineError: the model's own logits differ from its head on its body's hidden states.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str = "hf",
        max_batch: int = 256,
        max_slots: int | None = None,
        reuse_kv: bool = True,
        stop_ids: Sequence[int] | None = None,
        budget: int = 1 << 16,
    ) -> None:
        """Probe what the model can do; see the class for the arguments."""
        self.name, self.model = name, model
        self._tokenizer, self._budget = tokenizer, budget
        max_slots = max_slots or max_batch
        self._max_batch = min(max_batch, max_slots)
        self._device = forward.device_of(model)
        self._vocabulary = forward.vocabulary(model)
        self._limit = getattr(forward.body(model).config, "max_position_embeddings", None)
        self.stop_ids = frozenset(_end_ids(model, tokenizer) if stop_ids is None else stop_ids)
        self._decode_short = lru_cache(maxsize=1 << 14)(self._decode)
        self._waiting: deque[_Request] = deque()
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        with forward.evaluating(model):
            forward.check_head(model)
            self._kv, why = open_kv(
                forward.body(model),
                self._device,
                max_slots=max_slots,
                keep=reuse_kv,
                budget=budget,
            )
        self._notes = tuple(filter(None, (why, "" if self.stop_ids else _ENDLESS)))

    @property
    def capabilities(self) -> Capabilities:
        """Everything that weights in this process allow."""
        return Capabilities(ids=True, sampled=True, full=True, train=True, notes=self._notes)

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int = 0, session: str | None = None
    ) -> Sample:
        """Draw one response; see :meth:`Engine.generate`.

        Raises:
            EngineError: the request cannot run (see its message), or its batch failed.
        """
        if self._closed:
            raise EngineError(f"engine {self.name!r} is closed")
        loop = asyncio.get_running_loop()
        prompt = ids.tolist() if isinstance(ids, np.ndarray | Tensor) else list(ids)
        request = _Request(prompt, sampling, seed, session, loop.create_future())
        self._waiting.append(request)
        if self._task is None or self._task.done() or self._task.get_loop() is not loop:
            self._task = loop.create_task(self._flush(loop))
        return await request.future

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        """Log-probabilities of given tokens; see :meth:`score_now`."""
        return self.score_now(requests)

    def score_now(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        """Log-probability and entropy at each position of each request, at temperature 1.

        Raises:
            EngineError: a request has a position or an id that cannot be scored; names it.
        """
        for number, request in enumerate(requests):
            self._check_score(number, request)
        if not requests:
            return []
        lengths = np.fromiter((len(r.ids) for r in requests), np.int64, len(requests))
        results: dict[int, Scores] = {}
        with torch.no_grad(), forward.evaluating(self.model):
            for group in forward.length_groups(lengths, budget=self._budget):
                scores = self._score_group([requests[i] for i in group])
                results.update(zip(group.tolist(), scores, strict=True))
        return [results[i] for i in range(len(requests))]

    def release(self, session: str) -> None:
        """Forget the keys and values of ``session``."""
        self._kv.release(session)

    def publish(self, version: int) -> None:
        """The weights changed: keys and values of the old ones are dropped."""
        super().publish(version)
        self._kv.clear()

    async def close(self) -> None:
        """Free the cache and refuse what still waits."""
        self._closed = True
        self._kv.clear()
        while self._waiting:
            self._waiting.popleft().fail(f"engine {self.name!r} was closed")

    async def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run batches in order of arrival until nobody waits."""
        try:
            while self._waiting:
                await self._settle()
                batch: list[_Request] = []
                while self._waiting and len(batch) < self._max_batch:
                    request = self._waiting.popleft()
                    # Cancelled, or left over from an event loop that is gone.
                    if not request.future.done() and request.future.get_loop() is loop:
                        batch.append(request)
                self._run(batch)
        except asyncio.CancelledError:
            for request in self._waiting:
                request.future.cancel()
            self._waiting.clear()
            raise

    async def _settle(self) -> None:
        """Wait until the queue has kept its length for two passes of the event loop."""
        length, quiet = -1, 0
        while quiet < 2:
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._waiting) == length else 0
            length = len(self._waiting)

    def _run(self, batch: list[_Request]) -> None:
        """One batch, from checks to results; every future of it is done afterwards."""
        fit: list[_Request] = []
        for request in batch:
            problem = self._problem(request)
            if problem:
                request.fail(problem)
            else:
                fit.append(request)
        if not fit:
            return
        try:
            with torch.no_grad(), forward.evaluating(self.model):
                self._generate(fit)
            self._deliver(fit)
        except BaseException as error:  # whatever it was, it must not hang whoever waits
            self._kv.clear()
            for request in fit:
                request.fail(f"batch of {len(fit)} failed: {type(error).__name__}: {error}", error)
            if not isinstance(error, Exception):
                raise

    def _problem(self, request: _Request) -> str:
        """Why ``request`` cannot run, "" if it can."""
        prompt, sampling = request.prompt, request.sampling
        if not prompt or sampling.max_tokens < 1:
            return f"nothing to do: {len(prompt)} prompt tokens, max_tokens={sampling.max_tokens}"
        if sampling.temperature < 0 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
            return f"{sampling}: needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1"
        if self._limit is not None and len(prompt) + sampling.max_tokens > self._limit:
            return (
                f"{len(prompt)} prompt tokens and max_tokens={sampling.max_tokens} do not fit into "
                f"max_position_embeddings={self._limit}: shorten the prompt or the response"
            )
        if min(prompt) < 0 or max(prompt) >= self._vocabulary:
            return f"prompt ids {min(prompt)}..{max(prompt)} exceed 0..{self._vocabulary - 1}"
        return ""

    def _generate(self, batch: list[_Request]) -> None:
        """Prefill what is new, then draw token after token; rows that are done leave the batch."""
        slots = self._kv.open([r.session for r in batch], [r.prompt for r in batch])
        for request, slot in zip(batch, slots, strict=True):
            request.reused = len(slot.ids)
        chunks = [r.prompt[r.reused :] for r in batch]
        draws, running = _Draws(batch, self._device), batch
        while running:
            hidden = self._kv.extend(slots, chunks)
            tokens, logps = draws(forward.logits(self.model, hidden))
            drawn = enumerate(zip(running, tokens, logps, strict=True))
            keep = [i for i, (r, token, p) in drawn if r.goes_on(token, p, self.stop_ids)]
            if len(keep) < len(running):
                draws.keep(keep)
                running, slots = [running[i] for i in keep], [slots[i] for i in keep]
            chunks = [[request.ids[-1]] for request in running]
        self._kv.close()

    def _deliver(self, batch: list[_Request]) -> None:
        """Resolve every future of the batch."""
        for request in batch:
            if math.isfinite(sum(request.logp)):
                request.succeed(self._sample(request))
            else:
                request.fail("the model's probabilities are not finite")
                self._kv.clear()

    def _sample(self, request: _Request) -> Sample:
        """What was drawn, as a record."""
        ids, prompt = tuple(request.ids), len(request.prompt)
        return Sample(
            ids=ids,
            logp=tuple(request.logp),
            text=self._decode_short(ids) if len(ids) <= SHORT else self._decode(ids),
            stop="stop" if ids[-1] in self.stop_ids else "length",
            version=self.version,
            usage=Usage(prompt - request.reused, request.reused, 0, len(ids)),
        )

    def _decode(self, ids: tuple[int, ...]) -> str:
        """Text of ``ids`` as they are: cleaning up spaces would change actions."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(ids, **options))

    def _check_score(self, number: int, request: ScoreRequest) -> None:
        """Refuse what cannot be scored before anything runs."""
        ids, where = np.asarray(request.ids, np.int64), np.asarray(request.positions, np.int64)
        problem = ""
        if self._limit is not None and len(ids) > self._limit:
            problem = f"{len(ids)} ids exceed max_position_embeddings={self._limit}"
        elif len(ids) and not 0 <= ids.min() <= ids.max() < self._vocabulary:
            problem = f"ids {ids.min()}..{ids.max()} exceed 0..{self._vocabulary - 1}"
        elif len(where) and not (where[0] >= 1 and where[-1] < len(ids)):
            problem = f"positions must lie in 1..{len(ids) - 1}"
        elif (np.diff(where) <= 0).any():
            problem = "positions must increase"
        if problem:
            raise EngineError(f"score request {number}: {problem}")

    def _score_group(self, requests: list[ScoreRequest]) -> list[Scores]:
        """Requests of similar length, in one or a few forwards."""
        where = [np.asarray(r.positions, np.int64) for r in requests]
        ids = [np.asarray(r.ids, np.int64) for r in requests]
        hidden = forward.hidden_states(self.model, ids, where)
        tokens = np.concatenate([row[p] for row, p in zip(ids, where, strict=True)])
        token = torch.from_numpy(tokens).to(self._device)
        columns = [c.cpu().numpy() for c in forward.log_probs_at(self.model, hidden, token)]
        cuts = np.cumsum([len(p) for p in where])[:-1]
        logp, entropy = (np.split(column, cuts) for column in columns)
        return [Scores(*pair) for pair in zip(logp, entropy, strict=True)]


_ENDLESS = "no id ends a response: every response runs to max_tokens"


@dataclass(slots=True, eq=False)
class _Request:
    """A prompt on its way to a sample."""

    prompt: list[int]
    sampling: Sampling
    seed: int
    session: str | None
    future: asyncio.Future[Sample]
    reused: int = 0
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)

    def goes_on(self, token: int, logp: float, stop_ids: frozenset[int]) -> bool:
        """Take one token; whether another one is wanted."""
        self.ids.append(token)
        self.logp.append(logp)
        return token not in stop_ids and len(self.ids) < self.sampling.max_tokens

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


class _Draws:
    """How each row of a running batch turns logits into a token."""

    def __init__(self, requests: Sequence[_Request], device: torch.device) -> None:
        """Collect the rows' settings; rows with temperature 0 need no random numbers."""
        asked = [r.sampling for r in requests]
        self._device = device
        drawn = [r.seed if r.sampling.temperature else None for r in requests]
        self._randoms = [None if seed is None else random.Random(seed) for seed in drawn]
        self._temperature = self._column([s.temperature or 1.0 for s in asked])
        self._greedy = self._column([s.temperature == 0 for s in asked])
        self._top_k = self._column([s.top_k or 1 << 31 for s in asked])
        self._top_p = self._column([s.top_p for s in asked])
        self._plain = all(s.top_k == 0 and s.top_p == 1 for s in asked)

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self._device)[:, None]

    def keep(self, rows: list[int]) -> None:
        """Only these rows go on."""
        self._randoms = [self._randoms[i] for i in rows]
        index = torch.tensor(rows, dtype=torch.int64, device=self._device)
        for name in ("_temperature", "_greedy", "_top_k", "_top_p"):
            setattr(self, name, getattr(self, name)[index])

    def __call__(self, raw: Tensor) -> tuple[list[int], list[float]]:
        """Draw one token per row of logits [B, V]; tokens and their log-probabilities."""
        logp = torch.log_softmax(raw.float() / self._temperature, -1)
        if any(self._randoms):
            token = torch.where(self._greedy, raw.argmax(-1, keepdim=True), self._random(logp))
        else:
            token = raw.argmax(-1, keepdim=True)
        return token[:, 0].tolist(), logp.gather(-1, token)[:, 0].tolist()

    def _random(self, logp: Tensor) -> Tensor:
        """Inverse of the cumulative distribution at one uniform number per row; ids [B, 1]."""
        weights = logp.exp()
        if not self._plain:
            weights = _nucleus(weights, self._top_k, self._top_p)
        # In fp32 a running sum close to 1 would swallow every token less likely than 6e-8.
        wide = torch.float32 if weights.device.type == "mps" else torch.float64
        sums = weights.cumsum(-1, dtype=wide)
        numbers = [source.random() if source else 0.0 for source in self._randoms]
        level = torch.tensor(numbers, dtype=wide, device=weights.device)[:, None] * sums[:, -1:]
        return torch.searchsorted(sums, level, right=True).clamp_(max=weights.shape[-1] - 1)


def _nucleus(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """``weights`` [B, V] without what is outside the ``top_k`` likeliest and, of these, ``top_p``.

    Ties go to the lower id; the likeliest token always stays.
    """
    ordered, ids = torch.sort(weights, dim=-1, descending=True, stable=True)
    ordered = ordered * (torch.arange(ordered.shape[-1], device=weights.device) < top_k)
    before = ordered.cumsum(-1) - ordered
    # Rounding must not cut the tail of a row that asked for everything.
    inside = ((before < top_p * ordered.sum(-1, keepdim=True)) | (top_p == 1)) & (ordered > 0)
    return weights * torch.zeros_like(inside).scatter_(-1, ids, inside)


def _end_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """End-of-sequence ids of the tokenizer and of the model's generation settings.

    Of the latter only what the tokenizer knows as special: a model built from a bare configuration
    has some family's default, which is an ordinary word of another tokenizer.
    """
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = given if isinstance(given, list | tuple) else [given]
    ends = {i for i in ids if i is not None and not tokenizer.decode([i], skip_special_tokens=True)}
    own = getattr(tokenizer, "eos_token_id", None)
    return ends if own is None else ends | {own}
