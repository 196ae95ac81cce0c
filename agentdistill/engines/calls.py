"""Tool calls that a model wrote as text, in the formats that families of models were trained on.

Invariants: what cannot be read is text and stays text, all of it: nobody executes the readable half
of an answer. Nothing raises, whatever the text.

Formats: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>`` (Hermes, Qwen 2.5 and 3);
``<tool_call><function=NAME><parameter=KEY>value</parameter></function></tool_call>`` (Qwen3-Coder);
and, for tools that were offered, an answer that is nothing but ``{"name": …, "parameters": {…}}``
or a list of such objects (Llama 3, Mistral).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from agentdistill.records import Json

Called = tuple[str, dict[str, Json]]
"""Name and arguments."""

# Some models end their turn in place of the last closing tag.
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FUNCTION, _PARAMETER = "<function=", "<parameter="


def read(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, tuple[Called, ...]]:
    """What ``text`` says beside its calls, and the calls; all of it and none where it has none.

    Args:
        text: an answer without its thought.
        tools: what was offered, in OpenAI's format.
    """
    if "<tool_call>" not in text:
        found = _bare(text, tools)
        return ("", found) if found else (text, ())
    read_ = [_tagged(match[1], tools) for match in _TAGGED.finditer(text)]
    calls = tuple(call for call in read_ if call is not None)
    if len(calls) < len(read_):
        return text, ()
    return _TAGGED.sub("", text).strip(), calls


def written(calls: Sequence[Called], identity: str) -> tuple[dict[str, Json], ...]:
    """``calls`` as OpenAI writes them; ``identity`` is that of the answer."""
    return tuple(
        {
            "id": f"call_{identity}_{number}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
        }
        for number, (name, arguments) in enumerate(calls)
    )


def _tagged(body: str, tools: Sequence[Mapping[str, Any]]) -> Called | None:
    text = body.strip()
    if not text.startswith(_FUNCTION):
        return _object(_json(text))
    name, closed, rest = text.removeprefix(_FUNCTION).partition(">")
    before, *parts = rest.removesuffix("</function>").split(_PARAMETER)
    found = [_parameter(part) for part in parts]
    if not closed or not name.strip() or before.strip() or None in found:
        return None
    typed = _types(name.strip(), tools)
    return name.strip(), {pair[0]: _value(pair[1], typed.get(pair[0])) for pair in found if pair}


def _parameter(text: str) -> tuple[str, str] | None:
    """Name and value of what follows ``<parameter=``."""
    name, closed, rest = text.partition(">")
    value, ended, after = rest.rpartition("</parameter>")
    if not closed or not ended or after.strip():
        return None
    return name.strip(), value.removeprefix("\n").removesuffix("\n")


def _bare(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[Called, ...]:
    """The calls of an answer that is JSON and nothing else; of known tools only."""
    if not tools or text.lstrip()[:1] not in ("{", "["):
        return ()
    value = _json(text)
    listed = value if isinstance(value, list) else [value]
    calls = [_object(each) for each in listed]
    known = {tool.get("function", tool).get("name") for tool in tools}
    if not calls or any(call is None or call[0] not in known for call in calls):
        return ()
    return tuple(call for call in calls if call is not None)


def _object(value: Json) -> Called | None:
    """``{"name": …, "arguments": {…}}``; the arguments may be missing, or JSON in a text."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    return (value["name"], arguments) if isinstance(arguments, dict) else None


def _json(text: str) -> Json:
    """The value of ``text``, None where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _types(name: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, Json]:
    """What the schema of the tool called ``name`` says of its arguments."""
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties") or {}
            return {key: (said or {}).get("type") for key, said in properties.items()}
    return {}


def _value(text: str, kind: Json) -> Json:
    """A value that stands there without quotes: a text unless its schema says something else."""
    if kind in (None, "string"):
        return text
    value = _json(text)
    return text if value is None and text.strip() != "null" else value
