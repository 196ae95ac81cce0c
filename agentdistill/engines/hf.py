"""Any transformers causal language model in this process, with keys and values kept between turns.

Invariants
----------
* Requests that wait together run together: a batch begins with whatever has arrived when the queue
  has stopped growing for two passes of the event loop. There are no timers, so the batches depend
  on the order of the coroutines and on nothing else.
* Each response is delivered with its last token, so that an environment works while others still
  draw; whoever asks while others run joins them at their next token, if the model's cache can.
* A response depends on its ids, its sampling, its seed and the weights
  (:mod:`~agentdistill.engines.batch`), not on when it was asked for, up to rounding. Where
  environments run in threads their clocks decide who shares a forward, and so the rounding.
* A token is drawn synchronously inside the event loop, which the others have between two tokens.
  The trainer shares the module, which must not be updated while somebody generates;
  :meth:`HFEngine.publish` lets whoever does start again.
* An error belongs to the request that caused it. An unexpected one fails whoever ran when it
  happened, drops all kept keys and values, and leaves the engine usable.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agentdistill.engines import forward
from agentdistill.engines.base import Capabilities, Engine, Sample, Sampling, ScoreRequest, Scores
from agentdistill.engines.batch import Batch, Request
from agentdistill.engines.refill import open_kv
from agentdistill.errors import EngineError, UnfitError
from agentdistill.records import Usage

PASSES = 2
"""Of the event loop between two tokens: what a thread has finished is a request after so many."""

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
        self._waiting: deque[Request] = deque()
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        with forward.evaluating(model.modules()):
            forward.check_head(model)
            self._kv, why = open_kv(
                forward.body(model),
                self._device,
                max_slots=max_slots,
                keep=reuse_kv,
                budget=budget,
            )
        self._batch = Batch(model, self._kv, self.stop_ids)
        self._notes = tuple(filter(None, (why, "" if self.stop_ids else _ENDLESS)))

    @property
    def capabilities(self) -> Capabilities:
        """Everything that weights in this process allow."""
        return Capabilities(
            ids=True,
            sampled=True,
            top_k=self._vocabulary,
            full=True,
            train=True,
            notes=self._notes,
            at_ids=True,
            hidden=True,
        )

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int = 0, session: str | None = None
    ) -> Sample:
        """Draw one response; see :meth:`Engine.generate`.

        Raises:
            UnfitError: the request cannot run (see its message).
            EngineError: its batch failed.
        """
        if self._closed:
            raise EngineError(f"engine {self.name!r} is closed")
        loop = asyncio.get_running_loop()
        prompt = ids.tolist() if isinstance(ids, np.ndarray | Tensor) else list(ids)
        request = Request(prompt, sampling, seed, session, loop.create_future())
        if problem := self._problem(request):
            raise UnfitError(problem)
        self._waiting.append(request)
        if self._task is None or self._task.done() or self._task.get_loop() is not loop:
            self._task = loop.create_task(self._flush(loop))
        return await request.future

    async def score(self, requests: Sequence[ScoreRequest], *, top_k: int = 0) -> list[Scores]:
        """Log-probabilities of given tokens; see :meth:`score_now`."""
        return self.score_now(requests, top_k)

    def score_now(self, requests: Sequence[ScoreRequest], top_k: int = 0) -> list[Scores]:
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
        with torch.no_grad(), forward.evaluating(self.model.modules()):
            for group in forward.length_groups(lengths, budget=self._budget):
                scores = self._score_group([requests[i] for i in group], top_k)
                results.update(zip(group.tolist(), scores, strict=True))
        return [results[i] for i in range(len(requests))]

    def release(self, session: str) -> None:
        """Forget the keys and values of ``session``."""
        self._kv.release(session)

    def publish(self, version: int) -> None:
        """The weights changed: what the old ones computed is dropped, responses start again."""
        super().publish(version)
        self._restart()

    async def close(self) -> None:
        """Free the cache and refuse what still waits."""
        self._closed = True
        for request in (*self._batch.dissolve(), *self._waiting):
            request.fail(f"engine {self.name!r} was closed")
        self._waiting.clear()

    async def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        """Draw token after token, in order of arrival, until nobody waits."""
        batch = self._batch
        try:
            while self._waiting or batch.rows:
                batch.leave([r for r in batch.rows if not r.alive(loop)])
                if not batch.rows:
                    await self._settle()
                try:
                    self._admit(loop)
                    self._step()
                except BaseException as error:  # whatever it was, it must not hang whoever waits
                    self._fail(error)
                for _ in range(PASSES):
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            for request in (*batch.dissolve(), *self._waiting):
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

    def _admit(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let those who wait join; beside others only where the cache can do it."""
        running = len(self._batch.rows)
        if running and not self._kv.joins:
            return
        fresh: list[Request] = []
        while self._waiting and len(fresh) + running < self._max_batch:
            request = self._waiting.popleft()
            if request.alive(loop):
                fresh.append(request)
        if fresh:
            self._batch.join(fresh)

    def _step(self) -> None:
        """One token for everybody; those whose response is complete have it afterwards."""
        if not self._batch.rows:
            return
        ended, rows = self._batch.step(), self._batch.rows
        broken = [r for r in rows if not math.isfinite(r.logp[-1])]
        for request in broken:
            request.fail("the model's probabilities are not finite")
        for request in ended:
            request.succeed(self._sample(request))
        self._batch.leave(ended)
        if broken:
            self._restart()

    def _restart(self) -> None:
        """Whoever runs starts again, from nothing: what is kept cannot be trusted any more."""
        self._waiting.extendleft(reversed(self._batch.dissolve()))

    def _fail(self, error: BaseException) -> None:
        """Everybody who runs hears of ``error``; it goes on only if it should end the process."""
        rows = self._batch.dissolve()
        for request in rows:
            request.fail(f"batch of {len(rows)} failed: {type(error).__name__}: {error}", error)
        if not isinstance(error, Exception):
            raise error

    def _problem(self, request: Request) -> str:
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

    def _sample(self, request: Request) -> Sample:
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

    def _score_group(self, requests: list[ScoreRequest], top_k: int) -> list[Scores]:
        """Requests of similar length, in one or a few forwards."""
        where = [np.asarray(r.positions, np.int64) for r in requests]
        ids = [np.asarray(r.ids, np.int64) for r in requests]
        hidden = forward.hidden_states(self.model, ids, where)
        tokens = np.concatenate([row[p] for row, p in zip(ids, where, strict=True)])
        token = torch.from_numpy(tokens).to(self._device)
        columns = [*forward.log_probs_at(self.model, hidden, token)]
        if top_k:
            best = forward.logits(self.model, hidden).float().log_softmax(-1).topk(top_k)
            columns += [best.indices.int(), best.values]
        cuts = np.cumsum([len(p) for p in where])[:-1]
        parts = [np.split(column.cpu().numpy(), cuts) for column in columns]
        return [Scores(*each) for each in zip(*parts, strict=True)]


_ENDLESS = "no id ends a response: every response runs to max_tokens"


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
