"""Who acts: one interface for collection, training, evaluation and serving.

``Policy.act`` sees one episode at a time and returns a :class:`Response`; how requests of many
episodes become batches is the engine's business. Invariants: a policy never steps the environment;
what it draws depends on the episode and its seed only, not on what runs beside it.
"""

from __future__ import annotations

import asyncio
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Protocol, TypeVar

from agentdistill import actions
from agentdistill.actions import Parsed
from agentdistill.engines.base import Engine, Sample, Sampling
from agentdistill.envs.base import TextEnv
from agentdistill.errors import AgentDistillError, EnvError
from agentdistill.records import (
    Actor,
    Alternative,
    Author,
    Json,
    Task,
    Turn,
    Usage,
    Verdict,
    digest,
)
from agentdistill.render import Conversation, Renderer, Reply

T = TypeVar("T")


class Ask(Protocol):
    """Runs a question to an environment where that environment runs."""

    async def __call__(self, question: Callable[[], T], /) -> T:
        """What ``question`` returns."""
        ...


async def _at_once(question: Callable[[], T]) -> T:
    return question()


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything that prints; there is no global generator anywhere."""
    return int(digest([str(part) for part in parts], 16), 16) >> 1


@dataclass(slots=True, eq=False)
class Episode:
    """An episode in progress, as a policy sees it.

    Attributes:
        id: unique among the episodes that run at the same time.
        task: what is to be done.
        env: the environment (experts and admissible actions look at it; nobody steps it).
        observation: what to respond to.
        seed: of this episode; each turn derives its own.
        goal: the task in words; "" where the environment has none.
        admissible: actions that the environment lists now; empty unless somebody asked for them
            (``Policy.wants_admissible``).
        note: what only this actor reads, "" for nothing; a policy may write one before its first
            response, and it goes on record.
        plan: what the actor means to do; a policy may write it, and it goes on record.
        ask: puts a question to the environment where that runs; a fault of it ends the episode.
        turns: finished turns, replayed ones included.
        replies: the tokens of each finished turn, None where it is only text.
    """

    id: str
    task: Task
    env: TextEnv
    observation: str
    seed: int
    goal: str = ""
    admissible: tuple[str, ...] = ()
    turns: list[Turn] = field(default_factory=list)
    replies: list[Reply | None] = field(default_factory=list)
    note: str = ""
    ask: Ask = _at_once
    plan: str = ""

    @property
    def turn_seed(self) -> int:
        """Seed of the current turn."""
        return derive_seed(self.seed, len(self.turns))


@dataclass(frozen=True, slots=True)
class Response:
    """What a policy answers.

    Attributes:
        text: the whole response.
        parsed: what the grammar found in it.
        actor: who answered.
        sample: the engine's sample, or None where nobody sampled.
        kinds: kind of each token, forced ones first.
        prompt: ids of the prompt that was asked, and their authors.
        alternatives: what was drawn and not used.
        usage: tokens spent, alternatives included.
        tool_calls: native tool calls; where there are some, they and not the text say what to do.
        forced: ids that were put into the actor's mouth before what it sampled.
        stop: why a response without a sample ended, as :attr:`Turn.stop` says it.
        hint: what the prompt said besides, see :attr:`Turn.hint`.
        informed: whether who responded read it, see :attr:`Turn.informed`.
    """

    text: str
    parsed: Parsed
    actor: Actor
    sample: Sample | None = None
    kinds: tuple[int, ...] = ()
    prompt: tuple[Sequence[int], Sequence[int]] = ((), ())
    alternatives: tuple[Alternative, ...] = ()
    usage: Usage = Usage()
    tool_calls: tuple[Mapping[str, Json], ...] = ()
    forced: tuple[int, ...] = ()
    stop: str = "none"
    hint: str = ""
    informed: bool = True


class Policy(ABC):
    """Acts in episodes."""

    name: str
    wants_admissible: bool = False
    """Whether it reads ``Episode.admissible``."""

    @property
    def fingerprint(self) -> str | None:
        """Of the renderer whose tokens all of its turns have; None where some have none."""
        return None

    @abstractmethod
    async def act(self, episode: Episode) -> Response:
        """Respond to ``episode.observation``."""

    def finish(self, episode: Episode) -> None:  # noqa: B027  (optional)
        """The episode ended: forget what is kept for it."""


class ScriptedPolicy(Policy):
    """A policy that picks one environment action; base of expert and random.

    It asks the environment, which may be slow: whoever plays calls :meth:`respond` where that
    environment runs.
    """

    def __init__(self, name: str, grammar: str = "plain") -> None:
        """Write actions in the format of ``grammar``."""
        self.name, self._grammar = name, grammar

    @abstractmethod
    def choose(self, episode: Episode) -> str:
        """The action, or "" when there is none."""

    async def act(self, episode: Episode) -> Response:
        """The chosen action as a response."""
        return self.respond(episode)

    def respond(self, episode: Episode) -> Response:
        """The chosen action as a response."""
        action = self.choose(episode)
        if not action:
            return Response("", Parsed((), Verdict.MISSING), Actor(self.name))
        text = actions.write(self._grammar, (action,))
        return Response(text, actions.grammar(self._grammar)(text), Actor(self.name))


def answer(ask: Callable[[], T]) -> T:
    """What the environment says; whatever it raises is its fault, not the policy's."""
    try:
        return ask()
    except AgentDistillError:
        raise
    except Exception as error:
        raise EnvError(f"{type(error).__name__}: {error}") from error


class ExpertPolicy(ScriptedPolicy):
    """The environment's own expert."""

    def __init__(self, grammar: str = "plain") -> None:
        """Write actions in the format of ``grammar``."""
        super().__init__("expert", grammar)

    def choose(self, episode: Episode) -> str:
        """What the expert would do now."""
        return answer(episode.env.expert_action) or ""


class RandomPolicy(ScriptedPolicy):
    """Uniform over the admissible actions (over the example actions where none are listed)."""

    def __init__(self, grammar: str = "plain") -> None:
        """Write actions in the format of ``grammar``."""
        super().__init__("random", grammar)

    def choose(self, episode: Episode) -> str:
        """One of the admissible actions."""
        choices = list(episode.admissible) or answer(lambda: episode.env.admissible() or [])
        examples = episode.env.action_space.examples  # type: ignore[attr-defined]
        return str(random.Random(episode.turn_seed).choice(choices or list(examples)))


class Proposer(Policy):
    """A model that can be asked for several answers to the same state; acts by the first."""

    @abstractmethod
    async def propose(self, episode: Episode, n: int = 1, hint: str = "") -> list[Response]:
        """Draw ``n`` responses to ``episode.observation``.

        The first is the one of :meth:`act`. The usages add up to what they cost together.

        Args:
            episode: in progress.
            n: at least 1.
            hint: what the prompt says besides, right before the observation, this once.
        """

    @abstractmethod
    async def say(self, question: str, episode: Episode) -> tuple[str, Usage]:
        """The answer to a question beside the episode, and what it cost; no turn shows either."""

    async def act(self, episode: Episode) -> Response:
        """The only one of one response."""
        (response,) = await self.propose(episode)
        return response


_ASIDE = "first thought"
"""In the seed of an answer beside the episode."""


class ModelPolicy(Proposer):
    """A model on an engine, prompted by a renderer."""

    def __init__(self, name: str, engine: Engine, renderer: Renderer, sampling: Sampling) -> None:
        """``name`` is what trajectories call this actor."""
        self.name, self.engine, self.renderer, self.sampling = name, engine, renderer, sampling
        self.wants_admissible = renderer.prompt.lists_admissible
        self._sampled_as = asdict(sampling)
        self._conversations: dict[str, Conversation] = {}
        self._sessions: dict[str, int] = {}

    @property
    def fingerprint(self) -> str:
        """Of its renderer."""
        return self.renderer.fingerprint

    async def propose(self, episode: Episode, n: int = 1, hint: str = "") -> list[Response]:
        """Ask the engine with everything that happened so far; each sample in its own session."""
        conversation = self._conversations.get(episode.id)
        if conversation is None:
            conversation = Conversation(self.renderer, episode.goal, episode.note)
            self._conversations[episode.id] = conversation
        self._catch_up(conversation, episode)
        ids, authors = conversation.ask(episode.observation, episode.admissible, hint=hint)
        forced, spent = await self._opening(episode)
        samples = await self._draw([*ids, *forced], episode, n)
        responses = [self._response(sample, forced, (ids, authors), hint) for sample in samples]
        first = replace(responses[0], usage=total(spent, responses[0].usage))
        return [first, *responses[1:]]

    async def say(self, question: str, episode: Episode) -> tuple[str, Usage]:
        """Ask the engine with the question alone."""
        prompt, seed = self.renderer.alone(question), derive_seed(episode.turn_seed, _ASIDE)
        sample = await self.engine.generate(prompt, self.sampling, seed=seed)
        return sample.text, sample.usage

    async def _draw(self, ids: list[int], episode: Episode, n: int) -> list[Sample]:
        """``n`` samples; the first is the one that would be drawn alone."""
        self._sessions[episode.id] = max(n, self._sessions.get(episode.id, 0))
        sessions = self._names(episode)
        if n == 1:
            seed = episode.turn_seed
            return [await self.engine.generate(ids, self.sampling, seed=seed, session=sessions[0])]
        seeds = [episode.turn_seed, *(derive_seed(episode.turn_seed, k) for k in range(1, n))]
        draws = [
            self.engine.generate(ids, self.sampling, seed=seed, session=session)
            for seed, session in zip(seeds, sessions, strict=False)
        ]
        return await together(draws)

    def _names(self, episode: Episode) -> list[str]:
        """Sessions of an episode, as many as it has had."""
        own = f"{self.name}/{episode.id}"
        return [own, *(f"{own}/{k}" for k in range(1, self._sessions.get(episode.id, 1)))]

    def _response(
        self,
        sample: Sample,
        forced: tuple[int, ...],
        prompt: tuple[Sequence[int], Sequence[int]],
        hint: str,
    ) -> Response:
        whole = (*forced, *sample.ids)
        text = self.renderer.text(whole) if forced else sample.text
        parsed = self.renderer.grammar(text)
        return Response(
            text,
            parsed,
            Actor(self.name, sample.version, self._sampled_as),
            sample,
            self.renderer.kinds(whole, parsed),
            prompt,
            usage=sample.usage,
            tool_calls=sample.tool_calls,
            forced=forced,
            stop=sample.stop,
            hint=hint,
        )

    async def _opening(self, episode: Episode) -> tuple[tuple[int, ...], Usage]:
        """What the response must begin with, and what it cost to find out."""
        return (), Usage()

    def _catch_up(self, conversation: Conversation, episode: Episode) -> None:
        """Add the turns since the last call: as sampled where this model sampled them."""
        for number in range(len(conversation), len(episode.turns)):
            turn, reply = episode.turns[number], episode.replies[number]
            if reply is None or turn.actor.name != self.name:
                author = turn.author if turn.author is Author.REPLAY else Author.CONTEXT
                reply = self.renderer.told(turn, author)
            conversation.add(
                turn.observation, reply, chosen=turn.actions, admissible=turn.admissible
            )

    def finish(self, episode: Episode) -> None:
        """Forget the episode and free its cache."""
        self._conversations.pop(episode.id, None)
        for session in self._names(episode):
            self.engine.release(session)
        self._sessions.pop(episode.id, None)


async def together(draws: Iterable[Awaitable[T]]) -> list[T]:
    """What all of them give; where one fails the others are not left running."""
    found = await asyncio.gather(*draws, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return [one for one in found if not isinstance(one, BaseException)]


def total(*usages: Usage) -> Usage:
    """The sum, class by class."""
    return Usage(*map(sum, zip(*map(astuple, usages), strict=True))) if usages else Usage()


_QUESTION = (
    "Do not act yet. Say step by step, in plain sentences, how you would go about this task: what "
    "is wanted, what there is to see, and what has to happen in which order."
)

_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
TAG = re.compile(r"</?(?:think|action|answer|code)>")
"""What would end a thought, or be read as the action that it only speaks of."""


class FirstThought(ModelPolicy):
    """A model whose first response begins with its own plain answer to the task.

    The question comes without any format; what the model answers before the first blank line is
    put into its mouth, as the beginning of a thought. Source: agent-distillation (arXiv
    2505.17612), which writes ``Thought: …``; every grammar here reads thoughts in ``<think>``, so
    that is where this one stands. Where the answer format asks for a thought, the model goes on
    with it; grammar ``plain`` asks for none, so there the thought is closed.
    """

    async def _opening(self, episode: Episode) -> tuple[tuple[int, ...], Usage]:
        own = (turn for turn in episode.turns if turn.author is not Author.REPLAY)
        if any(turn.actor.name == self.name for turn in own):
            return (), Usage()
        goal = "" if episode.goal in episode.observation else f"The task: {episode.goal}\n"
        text, spent = await self.say(f"{_QUESTION}\n\n{goal}{episode.observation}", episode)
        return self._forced(text), spent

    def _forced(self, answer: str) -> tuple[int, ...]:
        """The tokens of the first paragraph of ``answer`` as the beginning of a response."""
        frames, plain = self.renderer.frames, self.renderer.prompt.grammar == "plain"
        said = actions.grammar("plain", opened=bool(frames.opened))(answer)
        text = said.actions[0] if said.actions else said.reasoning
        thought = _BLANK_LINE.split(TAG.sub("", text).strip(), 1)[0].rstrip()
        if not thought:
            return ()
        begin = "" if frames.opened else actions.THINK
        return self.renderer.plain(f"{begin}{thought}{actions.THOUGHT if plain else ''}\n\n")
