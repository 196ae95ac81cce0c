"""What an engine really gives: found out by real requests, before anything is spent on it.

Invariant: a capability is true here only if a request has just shown it; what is not asked for
(because it costs, or because nobody could) is false, and the notes say why.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from agentdistill.engines.base import Capabilities, Engine, Message, Sampling, ScoreRequest
from agentdistill.engines.endpoint import ServerError
from agentdistill.engines.vllm import VLLMEngine
from agentdistill.errors import EngineError
from agentdistill.records import FloatArray

REPEATS = 3
TEXT = "You are in the kitchen. 17 apples\n  go to desk 3; \u00fcber"
"""Words, numbers, spaces and a letter that is no ASCII."""

CLOSE = 0.05
"""Nats a token, on average, by which scorings of the same ids may differ: the rounding of bfloat16
in batches of other shapes, not another context."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was found out about one model.

    Attributes:
        name: of the model.
        kind: of its configuration, and where its responses are drawn.
        able: what it gives.
        repeat: largest difference between scorings of the same ids, nats; None where nothing is
            scored.
        agree: largest difference between the log-probability that a sample came with and its
            score, nats.
        language: identity of vocabulary and chat template as prompts use them ("" without ids).
        seconds: what the probe took.
        spent: what was asked that costs, in words; "" for nothing.
    """

    name: str
    kind: str
    able: Capabilities
    repeat: float | None = None
    agree: float | None = None
    language: str = ""
    seconds: float = 0.0
    spent: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


async def by_ids(engine: Engine, prompt: Sequence[int], name: str, kind: str) -> Report:
    """Probe an engine that takes token ids, with a handful of small requests.

    Args:
        engine: to be asked; a :class:`VLLMEngine` learns how many alternatives it may ask for.
        prompt: ids, a few at least.
        name: of the model.
        kind: see :class:`Report`.

    Raises:
        EngineError: it does not even answer, or gives different scores for the same ids.
    """
    began = time.monotonic()
    engine.wake()
    promised = engine.capabilities
    sample = await engine.generate(prompt, Sampling(max_tokens=8), seed=1)
    report = Report(name, kind, replace(promised, ids=True, sampled=False, top_k=0, text=False))
    whole = [*prompt, *sample.ids]
    request = ScoreRequest(whole, range(1, len(whole)))
    if promised.sampled:
        scored = [(await engine.score([request]))[0].logp for _ in range(REPEATS)]
        both = await engine.score([request, request])
        scored += [each.logp for each in both]
        repeat = max(_gap(scored[0], other) for other in scored[1:])
        apart = max(float(np.abs(scored[0] - other).mean()) for other in scored[1:])
        if not apart <= CLOSE:
            raise EngineError(
                f"{name}: in {len(scored)} tries the same ids were scored {apart:.3g} nats apart "
                "on average; switch prefix caching off (--no-enable-prefix-caching)"
            )
        drawn = scored[0][len(prompt) - 1 :]
        agree = _gap(drawn, np.asarray(sample.logp, np.float32))
        top_k = await _most(engine, whole[:2], promised.top_k)
        able = replace(report.able, sampled=True, top_k=top_k)
        report = replace(report, able=able, repeat=repeat, agree=agree)
    if isinstance(engine, VLLMEngine):
        engine.top_k = report.able.top_k
        if not await engine.reads_alike(TEXT):
            raise EngineError(
                f"{name}: {engine.endpoint.url} makes other ids of the same text than the "
                "tokenizer that is configured here; name the folder that is served"
            )
    if promised.text:
        report = replace(report, able=replace(report.able, text=await _chats(engine)))
    return replace(report, seconds=round(time.monotonic() - began, 3))


async def by_text(engine: Engine, name: str, kind: str, *, ask: bool) -> Report:
    """Probe an engine that answers in text; ``ask`` spends one call of at most four tokens."""
    began, able, spent = time.monotonic(), engine.capabilities, ""
    if ask:
        sampling = Sampling(temperature=0.0, max_tokens=4)
        (sample,) = await engine.chat([Message("user", "Say yes.")], sampling)
        used = sample.usage
        spent = f"one call: {used.input + used.cache_read} tokens in, {used.output} out"
    else:
        able = replace(able, notes=(*able.notes, "nothing was asked: a call would cost"))
    return Report(name, kind, able, seconds=round(time.monotonic() - began, 3), spent=spent)


async def _most(engine: Engine, ids: Sequence[int], most: int) -> int:
    """How many alternatives at a position the engine admits, up to ``most``."""

    async def admits(k: int) -> bool:
        try:
            await engine.score([ScoreRequest(ids, [1])], top_k=k)
        except ServerError as error:
            if error.status is None or error.status >= 500:
                raise
            return False
        return True

    if most <= 0 or await admits(most):
        return max(most, 0)
    low, high = 0, most  # admits(low), and not high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if await admits(middle) else (low, middle)
    return low


async def _chats(engine: Engine) -> bool:
    """Whether it answers messages (a model without a chat template does not)."""
    try:
        await engine.chat([Message("user", "?")], Sampling(max_tokens=1))
    except EngineError:
        return False
    return True


def _gap(one: FloatArray, other: FloatArray) -> float:
    return float(np.abs(one - other).max()) if len(one) == len(other) else float("inf")
