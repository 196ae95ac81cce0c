"""One line of a log: a conversation, and what is known of its task and outcome.

Invariants: a line is read as a whole, or a ValueError says why it cannot be; only named fields are
looked at, so that keys and addresses of requests go nowhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from agentdistill.actions import parse_plain
from agentdistill.records import Json, Usage, digest

_ROLES = ("system", "developer", "user", "assistant", "tool")
_FACTS = ("success", "score", "reward", "task", "task_id", "goal", "plan", "split", "env", "policy")
_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True, slots=True)
class Message:
    """What is kept of a chat message; ``answers`` is the id of the tool call that it answers."""

    role: str
    text: str
    calls: tuple[Mapping[str, Json], ...] = ()
    answers: str = ""
    thought: str = ""
    model: str = ""
    usage: Usage = Usage()

    @property
    def identity(self) -> Json:
        """What a client repeats of it."""
        said = parse_plain(self.text).actions if self.role == "assistant" else (self.text,)
        return [self.role, said, [_called(call) for call in self.calls]]


@dataclass(frozen=True, slots=True)
class Line:
    """One line, read. ``prefixes``: digest of the conversation up to each message."""

    number: int
    messages: tuple[Message, ...]
    facts: Mapping[str, Json]
    prefixes: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether it gives an outcome."""
        return any(name in self.facts for name in ("success", "score", "reward"))


def read(number: int, raw: bytes) -> Line:
    """Line ``number`` of a log; ValueError says why it cannot be read."""
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    messages = _messages(record)
    facts = _facts(record)
    prefixes, known = [], ""
    for message in messages:
        known = digest([known, message.identity], 32)
        prefixes.append(known)
    return Line(number, tuple(messages), facts, tuple(prefixes))


def _messages(record: Mapping[str, Json]) -> list[Message]:
    """The conversation up to its last answer, and what came back from that."""
    request = _mapping(record.get("request", record), "request")
    request = _mapping(request.get("body", request), "request.body")
    listed = request.get("messages")
    if not isinstance(listed, list) or not listed:
        raise ValueError("it has no messages")
    found = []
    for number, message in enumerate(listed, 1):
        try:
            found.append(read_message(message))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from error
    if "response" in record:
        found.append(_answer(_mapping(record["response"], "response")))
    if not any(message.role == "assistant" for message in found):
        raise ValueError("no message is the assistant's")
    return found


def _answer(response: Mapping[str, Json]) -> Message:
    """The first choice of a response."""
    response = _mapping(response.get("body", response), "response.body")
    if response.get("error"):
        raise ValueError("the response is an error")
    choices = response.get("choices")
    if not isinstance(choices, list) or not choices:
        raise ValueError("the response has no choices")
    message = read_message(_mapping(choices[0], "choice").get("message"))
    if message.role != "assistant":
        raise ValueError("the response is not the assistant's")
    model = response.get("model")
    usage = _usage(response.get("usage"))
    return replace(message, model=model if isinstance(model, str) else "", usage=usage)


def read_message(message: Json) -> Message:
    """One chat message; ValueError says why it cannot be read."""
    message = _mapping(message, "a message")
    role = message.get("role")
    if role not in _ROLES:
        raise ValueError(f"role {role!r} is none of {', '.join(_ROLES)}")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError("tool_calls is not a list of objects")
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    return Message(
        role,
        _content(message.get("content")),
        tuple(calls),
        str(message.get("tool_call_id") or ""),
        thought if isinstance(thought, str) else "",
    )


def _content(content: Json) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ValueError("its content is neither text nor a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _PARTS or not isinstance(part.get("text"), str):
            raise ValueError(f"a part of type {kind!r}: only text is read")
        texts.append(part["text"])
    return "".join(texts)


def _usage(usage: Json) -> Usage:
    """Token counts; zeros where they are not given or make no sense."""
    given = usage if isinstance(usage, dict) else {}
    details = given.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
    prompt = max(_count(given.get("prompt_tokens")) - cached, 0)
    return Usage(input=prompt, cache_read=cached, output=_count(given.get("completion_tokens")))


def _count(value: Json) -> int:
    return value if type(value) is int and value >= 0 else 0


def _facts(record: Mapping[str, Json]) -> dict[str, Json]:
    """What a line says of task and outcome, checked."""
    given = record.get("metadata")
    sources = [record, given if isinstance(given, dict) else {}]
    facts: dict[str, Json] = {}
    for name in _FACTS:
        value = next((s[name] for s in sources if s.get(name) is not None), None)
        if value is not None:
            facts[name] = value
    if not isinstance(facts.get("success", False), bool):
        raise ValueError("success is neither true nor false")
    for name in ("score", "reward"):
        value = facts.get(name, 0)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ValueError(f"{name} is not a number")
    for name in ("goal", "plan", "split", "env", "policy", "task_id"):
        if not isinstance(facts.get(name, ""), str):
            raise ValueError(f"{name} is not a text")
    if not isinstance(facts.get("task", ""), str | dict):
        raise ValueError("task is neither a text nor an object")
    return facts


def _mapping(value: Json, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not an object")
    return value


def _called(call: Mapping[str, Json]) -> Json:
    """Name and arguments of a tool call, whatever else a client says with it."""
    function = call.get("function", call)
    if not isinstance(function, dict):
        return [None, None]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return [function.get("name"), arguments]
    return [function.get("name"), arguments]
