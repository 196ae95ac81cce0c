"""Who acts by messages: a model that is only known by its text, such as one behind an API.

Invariants
----------
* A prompt is what :class:`~agentdistill.wording.Wording` says, the same preset in the same words as
  for a model with tokens; turns have no token spans.
* What a provider gives as reasoning of its own is on record as the thought of the turn, can never
  be read as an action, and is not sent back, as providers ask (``Actor.sampling["reasoning"]``
  marks such turns).
* With native tools the model is given the environment's, and its calls and their results go back as
  such; calls of other actors go back as the grammar writes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from agentdistill import actions
from agentdistill.engines.base import Engine, Message, Sample, Sampling
from agentdistill.errors import ConfigError
from agentdistill.policy import TAG, Episode, Proposer, Response, derive_seed
from agentdistill.records import Actor, Json, Turn, Usage
from agentdistill.wording import Wording

_APART = {"reasoning": "apart"}
_NOT_DONE = "Not executed."


class ChatPolicy(Proposer):
    """A model on an engine that takes messages."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        wording: Wording,
        sampling: Sampling,
        *,
        native_tools: bool = False,
    ) -> None:
        """``name`` is what trajectories call this actor.

        Args:
            name: see above.
            engine: one whose capabilities say ``text``.
            wording: the prompt preset in this environment.
            sampling: how to draw.
            native_tools: give the model the environment's tools; it may still answer in text.

        Raises:
            ConfigError: the engine takes no messages.
        """
        if not engine.capabilities.text:
            raise ConfigError("this engine takes no messages", key="engine", value=engine.name)
        self.name, self.engine, self.wording, self.sampling = name, engine, wording, sampling
        self.native_tools = native_tools
        self.wants_admissible = wording.prompt.lists_admissible
        self._sampled_as: dict[str, Json] = asdict(sampling)

    async def propose(self, episode: Episode, n: int = 1, hint: str = "") -> list[Response]:
        """Ask the engine with everything that happened so far, in one request."""
        samples = await self.engine.chat(
            self.messages(episode, hint),
            self.sampling,
            n=n,
            tools=self.tools(episode),
            seed=episode.turn_seed,
        )
        return [replace(self.response(sample), hint=hint) for sample in samples]

    async def say(self, question: str, episode: Episode) -> tuple[str, Usage]:
        """Ask the engine with the question alone, after the instruction."""
        system = [Message("system", self.wording.system)] if self.wording.system else []
        seed = derive_seed(episode.turn_seed, "aside")
        asked = [*system, Message("user", question)]
        (sample,) = await self.engine.chat(asked, self.sampling, seed=seed)
        return sample.text, sample.usage

    def tools(self, episode: Episode) -> Sequence[Mapping[str, Any]]:
        """What the model may call in ``episode``."""
        return episode.env.tools if self.native_tools else ()

    def messages(self, episode: Episode, hint: str = "") -> list[Message]:
        """The prompt for the current observation, the note in front of the first user message.

        The hint is in the last user message, or a message of its own after the results of calls.
        """
        answers = bool(episode.turns) and self._called(episode.turns[-1])
        told = self._told(episode, "" if answers else hint)
        if self.native_tools and self.wording.prompt.history is None:
            told = self._with_calls(told, episode.turns)
        if answers and hint:
            told = [*told, Message("user", hint)]
        if not episode.note:
            return told
        note = episode.note if episode.note.endswith("\n") else f"{episode.note}\n"
        at = next(n for n, message in enumerate(told) if message.role == "user")
        return [*told[:at], replace(told[at], content=note + told[at].content), *told[at + 1 :]]

    def response(self, sample: Sample) -> Response:
        """An answer as a response: its text read by the preset's grammar, its reasoning apart."""
        thought = TAG.sub("", sample.reasoning).strip()
        text = f"{actions.THINK}{thought}{actions.THOUGHT}\n\n" if thought else ""
        text += sample.text
        sampled_as = {**self._sampled_as, **(_APART if thought else {})}
        return Response(
            text,
            self.wording.grammar(text),
            Actor(self.name, sample.version, sampled_as),
            usage=sample.usage,
            tool_calls=sample.tool_calls,
            stop=sample.stop,
        )

    def _told(self, episode: Episode, hint: str) -> list[Message]:
        told = self.wording.messages(
            [self._said(turn) for turn in episode.turns],
            episode.observation,
            goal=episode.goal,
            admissible=episode.admissible,
            hint=hint,
        )
        return [Message(message["role"], message["content"]) for message in told]

    def _said(self, turn: Turn) -> Turn:
        """``turn`` without its calls where they go beside the text, and without thoughts apart."""
        if self._called(turn):
            turn = replace(turn, tool_calls=())
        if turn.actor.sampling.get("reasoning") != "apart":
            return turn
        end = turn.text.find(actions.THOUGHT) + len(actions.THOUGHT)
        return replace(turn, text=turn.text[end:].removeprefix("\n\n"))

    def _called(self, turn: Turn) -> bool:
        """Whether the calls of ``turn`` are this model's own, to be shown as calls."""
        own = turn.actor.name == self.name and self.wording.prompt.history is None
        return self.native_tools and own and bool(turn.tool_calls)

    def _with_calls(self, told: Sequence[Message], turns: Sequence[Turn]) -> list[Message]:
        """``told`` with this model's calls, and with what follows them as their results."""
        first = self.wording.first(len(turns))
        at = len(told) - 2 * (len(turns) - first) - 1
        found, calls = list(told[:at]), list[dict[str, Any]]()
        results: list[str] = []
        for number, turn in enumerate(turns[first:], first):
            found += _answered(told[at], calls, results)
            calls, results = [], [result.observation for result in turn.results]
            if self._called(turn):
                calls = [_call(call, number, index) for index, call in enumerate(turn.tool_calls)]
            found.append(replace(told[at + 1], tool_calls=tuple(calls)))
            at += 2
        return [*found, *_answered(told[-1], calls, results)]


def _answered(
    message: Message, calls: Sequence[Mapping[str, Any]], results: Sequence[str]
) -> list[Message]:
    """``message`` as the answer to ``calls``: one for each, the last executed one says it.

    Calls that nobody executed are answered, too: providers refuse a chat in which one is not.
    """
    if not calls:
        return [message]
    last = max(0, min(len(results), len(calls)) - 1)
    found = []
    for index, call in enumerate(calls):
        content = _NOT_DONE if index > last else results[index] if index < last else message.content
        found.append(Message("tool", content, tool_call_id=str(call["id"])))
    return found


def _call(call: Mapping[str, Any], number: int, index: int) -> dict[str, Any]:
    """A past call as it is sent back: with an id, and with arguments that can be read."""
    function = call.get("function", call)
    arguments = function.get("arguments") or "{}"
    try:
        readable = isinstance(json.loads(arguments), dict)
    except (ValueError, TypeError, RecursionError):
        readable = False
    return {
        "id": call.get("id") or f"call_{number}_{index}",
        "type": "function",
        "function": {
            "name": str(function.get("name")),
            "arguments": arguments if readable else "{}",
        },
    }
