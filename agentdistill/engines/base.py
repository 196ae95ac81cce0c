"""What runs weights or calls a provider: one interface for every role.

Teacher, student, analyser and judge are roles on engines, not classes of model. Requests are
single; an engine gathers those that wait as it sees fit, and nothing above knows how. Nothing
degrades silently: what an engine cannot do raises
:class:`~agentdistill.errors.EngineError`, and :class:`Capabilities` says so beforehand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentdistill.errors import EngineError
from agentdistill.records import FloatArray, IntArray, Json, Usage


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw a response.

    Attributes:
        temperature: 0 is greedy (ties go to the lowest id).
        top_p: nucleus; 1 keeps everything.
        top_k: 0 keeps everything.
        max_tokens: at most this many new tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 64


@dataclass(frozen=True, slots=True)
class Sample:
    """One response.

    Attributes:
        ids: the sampled ids, the end-of-turn id included when it was sampled.
        logp: natural log-probability of each id [len(ids)] under the temperature-scaled
            distribution before top-p and top-k (greedy: at temperature 1).
        text: decoded without special tokens.
        stop: ``stop`` (end of turn) or ``length``.
        version: version of the weights that drew it.
        usage: tokens spent; ``cache_read`` are prompt tokens that were not computed again.
        tool_calls: native tool calls, as the provider returned them.
        reasoning: what a provider gave as reasoning of its own, apart from ``text``.
        estimated: ``usage`` is an estimate, because the provider's counts were missing or cannot
            be.

    A sample that is only text (:meth:`Engine.chat`) has neither ``ids`` nor ``logp``.
    """

    ids: tuple[int, ...]
    logp: tuple[float, ...]
    text: str
    stop: str
    version: int = 0
    usage: Usage = Usage()
    tool_calls: tuple[Mapping[str, Json], ...] = ()
    reasoning: str = ""
    estimated: bool = False

    @property
    def confidence(self) -> float | None:
        """Mean log-probability per token; None where nobody knows."""
        return sum(self.logp) / len(self.logp) if self.logp else None


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat, as plain text.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        content: the text.
        tool_calls: of an assistant: the calls that it made.
        tool_call_id: of a tool's answer: the call that it answers.
    """

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Json], ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Token ids of one sequence and the positions whose tokens are in question.

    ``positions[j]`` is scored given ``ids[:positions[j]]``; positions are >= 1 and increasing.
    """

    ids: Sequence[int]
    positions: Sequence[int]


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probability of the token at each position [N], natural log, temperature 1.

    Attributes:
        logp: [N].
        entropy: of the whole distribution [N], where the engine has it.
        top_ids: the K likeliest ids of each position [N, K], likeliest first, where asked for.
        top_logp: their log-probabilities [N, K].
    """

    logp: FloatArray
    entropy: FloatArray | None = None
    top_ids: IntArray | None = None
    top_logp: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can give; probed at start, never assumed.

    Attributes:
        ids: takes and returns token ids.
        sampled: log-probabilities of given ids.
        top_k: number of alternatives with log-probabilities, 0 for none.
        full: whole distributions (in process: hidden states and the head).
        train: its weights are in this process and can be trained.
        text: answers messages in text (:meth:`Engine.chat`).
        notes: what a user should know, such as why something is off.
    """

    ids: bool = False
    sampled: bool = False
    top_k: int = 0
    full: bool = False
    train: bool = False
    notes: tuple[str, ...] = field(default=())
    text: bool = False
    at_ids: bool = False
    hidden: bool = False


class Engine(ABC):
    """Runs one set of weights."""

    name: str
    version: int = 0

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this engine can give."""

    @abstractmethod
    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int = 0, session: str | None = None
    ) -> Sample:
        """Draw one response to the prompt ``ids``.

        The same ids, sampling, seed and weights give the same response, whatever else is in the
        batch (up to floating-point differences between batch shapes).

        Args:
            ids: the prompt.
            sampling: how to draw.
            seed: of this response's random numbers.
            session: requests of one session usually extend each other; a hint for KV reuse.
        """

    async def score(self, requests: Sequence[ScoreRequest], *, top_k: int = 0) -> list[Scores]:
        """Log-probabilities of given tokens, one result per request, in order.

        Args:
            requests: sequences and positions.
            top_k: so many alternatives at each position, too.

        Raises:
            EngineError: this engine only generates (which its capabilities say).
        """
        raise EngineError(f"{self.name} cannot score tokens; it only generates")

    async def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        n: int = 1,
        tools: Sequence[Mapping[str, Any]] = (),
        seed: int = 0,
    ) -> list[Sample]:
        """Draw ``n`` answers to ``messages``; the sum of their usages is what they cost together.

        Args:
            messages: the chat so far.
            sampling: how to draw.
            n: how many answers.
            tools: what may be called, in OpenAI's function format.
            seed: of these answers' random numbers, where whoever answers takes one.

        Raises:
            EngineError: this engine takes token ids only (which its capabilities say), or no answer
                came.
        """
        raise EngineError(f"{self.name} takes token ids and cannot answer messages")

    def wake(self) -> None:  # noqa: B027  (optional)
        """Be ready to generate with the present weights; called before episodes are played."""

    def release(self, session: str) -> None:  # noqa: B027  (optional)
        """Forget what is kept for ``session``."""

    def publish(self, version: int) -> None:
        """The weights changed: drop whatever was computed with the old ones."""
        self.version = version

    async def close(self) -> None:  # noqa: B027  (optional)
        """Free what is held."""
