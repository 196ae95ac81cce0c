"""Messages over a model with tokens: its own chat template in, text, thoughts and tool calls out.

So a local model can be student or teacher of everything that takes messages, as a model behind an
API can.

Invariants
----------
* The prompt is the chat template's, in one go. What a message, a tool or an argument *says* is
  text, also where it spells the name of a special token: nobody ends a turn by printing.
* What the template cannot show is refused (tools, their results), never left out. A system message
  goes before the first user message where the template knows no such role.
* The same messages, tools, sampling, seed and weights give the same answers; the first of several
  is the one that a request for one gets.
* An answer keeps the ids and log-probabilities that were sampled; its ``text`` has neither the
  thought nor the calls that could be read. Its usage is what was computed: every answer of a
  request with ``n`` reads the prompt.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from agentdistill import actions
from agentdistill.engines import calls
from agentdistill.engines.base import (
    Capabilities,
    Engine,
    Message,
    Sample,
    Sampling,
    ScoreRequest,
    Scores,
)
from agentdistill.errors import ConfigError, UnfitError
from agentdistill.frames import Tokenizer
from agentdistill.records import Json, digest

_NO_TOOLS = "its chat template shows no tools"
_TOOL = {
    "type": "function",
    "function": {
        "name": "t0marker",
        "description": "d0marker",
        "parameters": {"type": "object", "properties": {"a0marker": {"type": "string"}}},
    },
}
_CALLED = {"name": "t0marker", "arguments": '{"a0marker": "v0marker"}'}
_CALL = {"id": "c0", "type": "function", "function": _CALLED}


class TemplatedEngine(Engine):
    """An engine that takes token ids, as one that takes messages; see the module docstring."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, name: str = "") -> None:
        """Probe the template.

        Args:
            engine: takes token ids; everything but :meth:`chat` is its own.
            tokenizer: of its model, with a chat template.
            name: "" takes the engine's.

        Raises:
            ConfigError: the engine takes no ids, or the tokenizer has no usable chat template.
        """
        self.engine, self.name, self._tokenizer = engine, name or engine.name, tokenizer
        if not engine.capabilities.ids:
            raise ConfigError("this engine takes no token ids", key="engine", value=engine.name)
        special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = {str(token) for token in special} | {tokenizer.eos_token}
        self._special = sorted(filter(None, names), key=len, reverse=True)
        try:
            shown = self._shows([Message("user", "u0marker")], "u0marker")
        except UnfitError as error:
            raise ConfigError(f"no usable chat template ({error})", key="engine") from error
        if not shown:
            raise ConfigError("its chat template drops messages", key="engine", value=self.name)
        ask = Message("user", "u0marker")
        self._system = self._probe([Message("system", "s0marker"), ask], "s0marker", "u0marker")
        called = [ask, Message("assistant", "", (_CALL,)), Message("tool", "r0marker", (), "c0")]
        self.takes_tools = self._probe([ask], "d0marker", tools=[_TOOL]) and self._probe(
            called, "v0marker", "r0marker", tools=[_TOOL]
        )

    @property
    def version(self) -> int:  # type: ignore[override]
        """Of the engine's weights."""
        return self.engine.version

    @property
    def capabilities(self) -> Capabilities:
        """Those of the engine, and text."""
        own = self.engine.capabilities
        notes = own.notes if self.takes_tools else (*own.notes, _NO_TOOLS)
        return replace(own, text=True, notes=notes)

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int = 0, session: str | None = None
    ) -> Sample:
        """See :meth:`Engine.generate`."""
        return await self.engine.generate(ids, sampling, seed=seed, session=session)

    async def score(self, requests: Sequence[ScoreRequest], *, top_k: int = 0) -> list[Scores]:
        """See :meth:`Engine.score`."""
        return await self.engine.score(requests, top_k=top_k)

    async def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        n: int = 1,
        tools: Sequence[Mapping[str, Any]] = (),
        seed: int = 0,
    ) -> list[Sample]:
        """See :meth:`Engine.chat`.

        Raises:
            UnfitError: the template cannot show these messages or tools, or they are too long.
            EngineError: the model failed.
        """
        if n < 1:
            raise ValueError(f"n={n}: at least 1")
        ids, opened = self.prompt(messages, tools)
        seeds = [_seed(seed, number) for number in range(n)]
        asked = [asyncio.ensure_future(self.generate(ids, sampling, seed=each)) for each in seeds]
        try:
            samples = await asyncio.gather(*asked)
        finally:
            for each in asked:
                each.cancel()
        return [
            self._read(sample, opened, tools, digest([ids, each]))
            for sample, each in zip(samples, seeds, strict=True)
        ]

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[list[int], bool]:
        """The ids of ``messages``, and whether the answer begins inside a thought.

        Raises:
            UnfitError: the template cannot show them.
        """
        shows = tools or any(m.role == "tool" or m.tool_calls for m in messages)
        if shows and not self.takes_tools:
            raise UnfitError(f"{self.name}: {_NO_TOOLS}; let the agent act by text")
        conversation = [self._written(messages, m) for m in self._with_system(messages)]
        spelled = _Spelled(self._special, digest([conversation, list(tools)]))
        text = self._render(spelled.hide(conversation), spelled.hide(list(tools)))
        ids: list[int] = []
        for part, secret in spelled.parts(text):
            options = {"split_special_tokens": True} if secret else {}
            ids += self._tokenizer.encode(part, add_special_tokens=False, **options)
        return ids, text.rstrip().endswith(actions.THINK)

    def _read(
        self, sample: Sample, opened: bool, tools: Sequence[Mapping[str, Any]], identity: str
    ) -> Sample:
        """``sample`` with thought and calls apart from its text."""
        thought, text = _apart(sample.text, opened)
        text, called = calls.read(text, tools) if tools else (text, ())
        return replace(
            sample,
            text=text,
            reasoning=thought,
            tool_calls=calls.written(called, identity) if called else (),
        )

    # -- the template ------------------------------------------------------------------------------

    def _render(self, conversation: Json, tools: Json) -> str:
        options = {"tokenize": False, "add_generation_prompt": True, "tools": tools or None}
        try:
            return str(self._tokenizer.apply_chat_template(conversation, **options))
        except Exception as error:  # templates raise whatever they like
            line = " ".join(str(error).split())
            raise UnfitError(
                f"{self.name}: its chat template refuses this chat ({line})"
            ) from error

    def _shows(
        self, messages: Sequence[Message], *markers: str, tools: Sequence[Mapping[str, Any]] = ()
    ) -> bool:
        conversation = [self._written(messages, message) for message in messages]
        text = self._render(conversation, list(tools))
        return all(marker in text for marker in markers)

    def _probe(self, messages: Sequence[Message], *markers: str, **options: Any) -> bool:
        try:
            return self._shows(messages, *markers, **options)
        except UnfitError:
            return False

    def _with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        """``messages`` as the template knows their roles."""
        rules = "\n\n".join(m.content for m in messages if m.role == "system")
        if self._system or not rules:
            return messages
        rest = [message for message in messages if message.role != "system"]
        at = next((n for n, message in enumerate(rest) if message.role == "user"), None)
        if at is None:
            return [Message("user", rules), *rest]
        return [
            replace(m, content=f"{rules}\n\n{m.content}") if n == at else m
            for n, m in enumerate(rest)
        ]

    def _written(self, messages: Sequence[Message], message: Message) -> dict[str, Json]:
        """A message as chat templates take it: arguments as objects, results with their tool."""
        written: dict[str, Json] = {"role": message.role, "content": _valid(message.content)}
        if message.tool_calls:
            written["tool_calls"] = [_call(call) for call in message.tool_calls]
        if message.tool_call_id:
            written["tool_call_id"] = message.tool_call_id
            written |= _tool_of(messages, message.tool_call_id)
        return written

    # -- the engine's own --------------------------------------------------------------------------

    def release(self, session: str) -> None:
        """See :meth:`Engine.release`."""
        self.engine.release(session)

    def publish(self, version: int) -> None:
        """See :meth:`Engine.publish`."""
        self.engine.publish(version)

    async def close(self) -> None:
        """See :meth:`Engine.close`."""
        await self.engine.close()


class _Spelled:
    """Names of special tokens in what somebody else says, out of the way of the template."""

    def __init__(self, names: Sequence[str], secret: str) -> None:
        """``secret`` cannot be guessed by who wrote the text: it is a hash of all of it."""
        self._marks = {name: f"x{secret}x{number}x" for number, name in enumerate(names)}

    def hide(self, value: Json) -> Json:
        """``value`` with a word of letters and digits in place of each name."""
        if isinstance(value, str):
            for name, mark in self._marks.items():
                value = value.replace(name, mark)
            return value
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(each) for key, each in value.items()}
        return [self.hide(each) for each in value] if isinstance(value, list | tuple) else value

    def parts(self, text: str) -> list[tuple[str, bool]]:
        """``text`` in pieces, with whether each is a name that somebody spelled."""
        found = [(text, False)]
        for name, mark in self._marks.items():
            found = [piece for part in found for piece in _cut(part, mark, name)]
        return [piece for piece in found if piece[0]]


def _cut(part: tuple[str, bool], mark: str, name: str) -> list[tuple[str, bool]]:
    text, secret = part
    if secret or mark not in text:
        return [part]
    pieces = [(piece, False) for piece in text.split(mark)]
    between = [(name, True)] * len(pieces)
    return [each for pair in zip(pieces, between, strict=True) for each in pair][:-1]


def _seed(seed: int, number: int) -> int:
    """Of answer ``number``; 63 bits."""
    return int(digest([seed, number]), 16) >> 1


def _apart(text: str, opened: bool) -> tuple[str, str]:
    """The thought of an answer, and the rest; one that has not ended is all thought."""
    begin = text.lstrip()
    if actions.THOUGHT not in text and (opened or begin.startswith(actions.THINK)):
        return begin.removeprefix(actions.THINK).strip(), ""
    parsed = actions.parse_plain(text, opened=opened)
    span = parsed.reason_span
    return (parsed.reasoning, text[: span[0]] + text[span[1] :]) if span else ("", text)


def _valid(text: str) -> str:
    """``text`` with ``?`` for lone surrogates, which no tokenizer takes."""
    return text.encode(errors="replace").decode()


def _call(call: Mapping[str, Json]) -> dict[str, Json]:
    """A call of the past; templates write its arguments as JSON themselves."""
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(_valid(arguments))
        except (ValueError, RecursionError):
            arguments = _valid(arguments)
    written = {"name": _valid(str(function.get("name"))), "arguments": arguments}
    return {"id": str(call.get("id") or ""), "type": "function", "function": written}


def _tool_of(messages: Sequence[Message], identity: str) -> dict[str, Json]:
    """The name of the tool whose call ``identity`` was; some templates show it."""
    for message in messages:
        for call in message.tool_calls:
            if call.get("id") == identity:
                return {"name": str(call.get("function", call).get("name"))}
    return {}
