"""What a provider said: its answers as samples, its counts as usage, its errors in one line.

Invariants: nothing here knows how a request is sent; counts that are missing or cannot be are
replaced by an estimate and marked; whatever leaves this module went through :func:`scrub`, so that
no key is in it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from agentdistill.engines.base import Message, Sample
from agentdistill.engines.patience import Failure, asked_to_wait
from agentdistill.records import Json, Usage

_SECRET = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
_NAMED: set[str] = set()
"""Variables that a configuration named as keys, whatever they are called."""

_SHOWN = 200
"""Characters of a provider's own words in an error."""

_AGAIN = frozenset({408, 409, 425, 429})
_HOPELESS = ("insufficient_quota", "billing", "credit balance")
"""A 429 with these words is no rate limit: waiting does not pay the bill."""


def guard(variable: str) -> None:
    """From now on :func:`scrub` knows that ``variable`` of the environment holds a secret."""
    _NAMED.add(variable)


def scrub(text: str) -> str:
    """``text`` with the variable's name in place of every secret in this process's environment.

    Secrets are the variables that were named as keys, and long ones with the name of one.
    """
    for name, value in os.environ.items():
        secret = len(value) >= 16 and _SECRET.search(name) is not None
        if value and (secret or name in _NAMED) and value in text:
            text = text.replace(value, f"<{name}>")
    return text


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer among those of a request."""

    text: str
    stop: str
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, Json], ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """What one request brought; ``estimated`` where the counts are ours."""

    choices: tuple[Choice, ...]
    usage: Usage
    estimated: bool = False

    def to_json(self) -> Json:
        """As plain JSON."""
        return cast(Json, asdict(self))

    @classmethod
    def of_json(cls, values: Any) -> Reply:
        """From plain JSON."""
        choices = [
            Choice(**{**choice, "tool_calls": tuple(choice["tool_calls"])})
            for choice in values["choices"]
        ]
        return cls(tuple(choices), Usage(**values["usage"]), values["estimated"])

    def samples(self) -> list[Sample]:
        """One sample per choice; input counts with the first, output in equal parts."""
        number, samples = len(self.choices), []
        for index, choice in enumerate(self.choices):
            part, rest = divmod(self.usage.output, number)
            output = part + (index < rest)
            usage = Usage(output=output)
            if index == 0:
                read, write = self.usage.cache_read, self.usage.cache_write
                usage = Usage(self.usage.input, read, write, output)
            samples.append(
                Sample(
                    (),
                    (),
                    choice.text,
                    choice.stop,
                    usage=usage,
                    tool_calls=choice.tool_calls,
                    reasoning=choice.reasoning,
                    estimated=self.estimated,
                )
            )
        return samples


def worst_case(messages: Sequence[Message], tools: Sequence[Any], n: int, most: int) -> Usage:
    """Tokens that a request cannot exceed, whatever the tokenizer.

    A token has at least one byte, and templates add some around each message. Some gateways turn
    ``n`` answers into ``n`` requests, and bill the prompt each time.
    """
    return Usage(input=n * (_bytes(messages, tools) + _around(messages, tools)), output=n * most)


def _bytes(messages: Sequence[Message], tools: Sequence[Any]) -> int:
    parts = [*(m.content for m in messages), *(_compact(m.tool_calls) for m in messages)]
    return sum(len(part.encode(errors="replace")) for part in (*parts, _compact(tools)))


def _around(messages: Sequence[Message], tools: Sequence[Any]) -> int:
    return 64 + 16 * len(messages) + (1024 if tools else 0)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def read(answer: Mapping[str, Any], messages: Sequence[Message], most: Usage) -> Reply:
    """A provider's answer in OpenAI's shape, without secrets.

    Args:
        answer: the whole answer as a mapping.
        messages: what was asked, for an estimate of its tokens.
        most: :func:`worst_case` of the request; higher counts cannot be.

    Raises:
        ValueError: it has no choices.
    """
    answer = json.loads(scrub(json.dumps(answer, default=str)))
    choices = tuple(_choice(choice) for choice in answer.get("choices") or [])
    if not choices:
        raise ValueError("an answer without choices")
    usage = _usage(answer.get("usage") or {})
    said = [_compact(asdict(choice)) for choice in choices if choice.text or choice.tool_calls]
    written = sum(len(text.encode(errors="replace")) for text in said)
    if usage is None or (usage.output == 0 and said):
        read_in = -(-_bytes(messages, ()) // 3) + 4 * len(messages)
        spoken = sum(len((c.text + c.reasoning).encode(errors="replace")) for c in choices)
        calls = sum(len(_compact(c.tool_calls)) for c in choices if c.tool_calls)
        return Reply(choices, Usage(input=read_in, output=-(-(spoken + calls) // 3)), True)
    bounded = _bounded(usage, most.input, max(most.output, written))
    return Reply(choices, bounded, bounded != usage)


def _choice(choice: Mapping[str, Any]) -> Choice:
    message = choice.get("message") or {}
    calls = message.get("tool_calls") or []
    stop = "length" if choice.get("finish_reason") == "length" else "stop"
    return Choice(
        str(message.get("content") or ""),
        stop,
        str(message.get("reasoning_content") or ""),
        tuple(_call(call) for call in calls if isinstance(call, Mapping)),
    )


def _call(call: Mapping[str, Any]) -> dict[str, Json]:
    function = call.get("function") or {}
    function = {"name": function.get("name"), "arguments": function.get("arguments") or "{}"}
    return {"id": str(call.get("id") or ""), "type": "function", "function": function}


def _usage(counts: Mapping[str, Any]) -> Usage | None:
    """The four classes; None where a count is missing or cannot be."""
    details = counts.get("prompt_tokens_details") or {}
    prompt, output = counts.get("prompt_tokens"), counts.get("completion_tokens")
    cached = details.get("cached_tokens") or counts.get("cache_read_input_tokens") or 0
    written = counts.get("cache_creation_input_tokens") or details.get("cache_creation_tokens") or 0
    numbers = (prompt, cached, written, output)
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        return None
    assert isinstance(prompt, int) and isinstance(output, int)
    rest = prompt - cached - written
    return Usage(rest, cached, written, output) if prompt > 0 and rest >= 0 else None


def _bounded(usage: Usage, most_input: int, most_output: int) -> Usage:
    """``usage``, or what it can be at most."""
    if usage.input + usage.cache_read + usage.cache_write > most_input:
        usage = Usage(input=most_input, output=usage.output)
    if usage.output > most_output:
        usage = Usage(usage.input, usage.cache_read, usage.cache_write, most_output)
    return usage


# -- errors ---------------------------------------------------------------------------------------


_UNREADABLE = "an answer that cannot be read"


def failure(error: BaseException) -> Failure:
    """What an exception of the client means for the request.

    Only what certainly cost nothing is not ``lost``: a refusal by the provider, no connection, and
    what the client refused to send.
    """
    names = [type(link).__name__ for link in _chain(error)]
    status = getattr(error, "status_code", None)
    if "HTTPStatusError" in names:
        return _refused(error, _line(getattr(error, "message", None) or error))
    if any(name in names for name in ("ConnectError", "ConnectTimeout", "PoolTimeout")):
        return Failure(None, "no connection", True)
    if "ImportError" in names or "ModuleNotFoundError" in names or status in (400, 401, 404, 422):
        return Failure(None, _line(getattr(error, "message", None) or error), False)
    if any("Timeout" in name for name in names):
        return Failure(None, "no answer in time", True, lost=True)
    if any(name in names for name in ("RemoteProtocolError", "ReadError", "WriteError")):
        return Failure(None, "the connection broke before the answer was complete", True, lost=True)
    kind = next((name for name in reversed(names) if name != "StopIteration"), "")
    return Failure(None, f"{_UNREADABLE} ({kind})", True, lost=True)


def _refused(error: BaseException, message: str) -> Failure:
    status = int(getattr(error, "status_code", 0) or 0)
    again = status in _AGAIN or status >= 500
    if status == 429 and any(word in message.lower() for word in _HOPELESS):
        again = False
    return Failure(status, message, again, wait=asked_to_wait(_headers(error)) if again else None)


def _headers(error: BaseException) -> dict[str, str]:
    """Headers of the response that an error came from, whoever in the chain has them."""
    found: dict[str, str] = {}
    for link in _chain(error):
        response = getattr(link, "response", None)
        for headers in (
            getattr(link, "litellm_response_headers", None),
            getattr(response, "headers", None),
        ):
            found = {**{str(k).lower(): str(v) for k, v in dict(headers or {}).items()}, **found}
    return found


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those it came from."""
    for _ in range(16):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _line(said: object) -> str:
    """One short line of what was said."""
    text = scrub(" ".join(str(said).partition("Traceback")[0].split()))
    text = re.sub(r"^(?:litellm\.)?(?:\w+: )*?(?:\w+Exception - )", "", text)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def explain(name: str, fault: Failure, tried: int, *, key_env: str | None) -> str:
    """One line: who failed, how, after how many tries, and what to do about it."""
    tries = f" ({tried} tries)" if tried > 1 else ""
    said = fault.message if fault.status is None else f"{fault.status}: {fault.message}"
    return f"{name} failed{tries}: {said}; {_remedy(fault, key_env)}"


def _remedy(fault: Failure, key_env: str | None) -> str:
    status, variable = fault.status, f"the key in {key_env}" if key_env else "key_env"
    if fault.wait is not None and fault.again:
        return f"it asks to wait {fault.wait:.0f} s: lower concurrency, or try later"
    if status in (401, 403):
        return f"check {variable}"
    if status == 402 or (status == 429 and not fault.again):
        return "the account has no credit left"
    if status == 404:
        return "check model and base_url"
    if status == 429:
        return "lower concurrency, or raise retries"
    if status is not None and status >= 500:
        return "the provider is in trouble: try later, or raise retries"
    if status is not None:
        return "the provider refuses this request: check model, sampling and tools"
    if fault.lost:
        return "raise timeout or retries, and look at the provider's log"
    if fault.again:
        return "check base_url, and that something answers there"
    return "check model, sampling and tools"
