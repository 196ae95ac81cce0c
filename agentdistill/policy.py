"""Who acts: one interface for collection, training, evaluation and serving.

``Policy.act`` sees one episode at a time and returns a :class:`Response`; how requests of many
episodes become batches is the engine's business. Invariants: a policy never steps the environment;
what it draws depends on the episode and its seed only, not on what runs beside it.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

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
        kinds: kind of each sampled token.
        prompt: ids of the prompt that was asked, and their authors.
        alternatives: what was drawn and not used.
        usage: tokens spent, alternatives included.
        tool_calls: native tool calls; where there are some, they and not the text say what to do.
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


class Policy(ABC):
    """Acts in episodes."""

    name: str
    wants_admissible: bool = False
    """Whether it reads ``Episode.admissible``."""

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


def _answer(ask: Callable[[], T]) -> T:
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
        return _answer(episode.env.expert_action) or ""


class RandomPolicy(ScriptedPolicy):
    """Uniform over the admissible actions (over the example actions where none are listed)."""

    def __init__(self, grammar: str = "plain") -> None:
        """Write actions in the format of ``grammar``."""
        super().__init__("random", grammar)

    def choose(self, episode: Episode) -> str:
        """One of the admissible actions."""
        choices = list(episode.admissible) or _answer(lambda: episode.env.admissible() or [])
        examples = episode.env.action_space.examples  # type: ignore[attr-defined]
        return str(random.Random(episode.turn_seed).choice(choices or list(examples)))


class ModelPolicy(Policy):
    """A model on an engine, prompted by a renderer."""

    def __init__(self, name: str, engine: Engine, renderer: Renderer, sampling: Sampling) -> None:
        """``name`` is what trajectories call this actor."""
        self.name, self.engine, self.renderer, self.sampling = name, engine, renderer, sampling
        self.wants_admissible = renderer.prompt.lists_admissible
        self._sampled_as = asdict(sampling)
        self._conversations: dict[str, Conversation] = {}

    async def act(self, episode: Episode) -> Response:
        """Ask the engine with everything that happened so far."""
        conversation = self._conversations.get(episode.id)
        if conversation is None:
            conversation = Conversation(self.renderer, episode.goal)
            self._conversations[episode.id] = conversation
        self._catch_up(conversation, episode)
        ids, authors = conversation.ask(episode.observation, episode.admissible)
        sample = await self.engine.generate(
            ids, self.sampling, seed=episode.turn_seed, session=f"{self.name}/{episode.id}"
        )
        parsed = self.renderer.grammar(sample.text)
        return Response(
            sample.text,
            parsed,
            Actor(self.name, sample.version, self._sampled_as),
            sample,
            self.renderer.kinds(sample.ids, parsed),
            (ids, authors),
            usage=sample.usage,
            tool_calls=sample.tool_calls,
        )

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
        self.engine.release(f"{self.name}/{episode.id}")
