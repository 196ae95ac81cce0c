"""Action grammars: from the text of a response to the actions it asks for.

Invariants: parsing never raises, whatever the text; the result says what was found (a
:class:`~agentdistill.records.Verdict`) and *where*, as character spans, so that tokens can be
labelled as reasoning, action or format without searching the text again.

A thought is what stands before ``</think>``. Its opening tag may be missing: some chat templates
put it into the prompt (``opened``), and the response begins inside the thought.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from agentdistill.errors import ConfigError
from agentdistill.records import Verdict

CharSpan = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a grammar found in one response.

    Attributes:
        actions: the environment steps asked for, in order; empty unless the verdict is ``OK``.
        verdict: ``OK``, ``MISSING`` (no action at all) or ``MALFORMED``. Whether an action is
            admissible is for the environment to say, afterwards.
        reasoning: the text of the thought, "" when the grammar has none.
        reason_span: characters ``[start, end)`` of the reasoning with its tags, or None.
        act_span: characters ``[start, end)`` of the action itself without tags, or None.
        cut: actions beyond the limit of the prompt; not to be executed.
    """

    actions: tuple[str, ...]
    verdict: Verdict
    reasoning: str = ""
    reason_span: CharSpan | None = None
    act_span: CharSpan | None = None
    cut: tuple[str, ...] = ()


_FENCE = re.compile(
    r"^[ \t]*```(?:python|py)?[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE | re.IGNORECASE
)
_SPACE = re.compile(r"\s*")

THINK, THOUGHT = "<think>", "</think>"


def _reasoning(text: str, opened: bool = False) -> tuple[str, CharSpan | None]:
    """The thought, and its characters with the tags and the space after them."""
    close = text.find(THOUGHT)
    if close < 0:
        return (text.strip(), (0, len(text))) if opened and text else ("", None)
    start = text.find(THINK, 0, close)
    inside = start + len(THINK) if start >= 0 else 0
    if opened or start < 0:
        start = 0
    end = close + len(THOUGHT)
    gap = _SPACE.match(text, end)
    return text[inside:close].strip(), (start, gap.end() if gap else end)


def parse_plain(text: str, *, opened: bool = False) -> Parsed:
    """The whole response, stripped, is one action (a thought before it is reasoning)."""
    reasoning, span = _reasoning(text, opened)
    return _whole(text, span[1] if span else 0, len(text), reasoning, span)


def _whole(text: str, start: int, end: int, reasoning: str, span: CharSpan | None) -> Parsed:
    """Characters ``[start, end)``, stripped, as one action."""
    action = text[start:end].strip()
    if not action:
        return Parsed((), Verdict.MISSING, reasoning, span)
    begin = text.index(action, start)
    return Parsed((action,), Verdict.OK, reasoning, span, (begin, begin + len(action)))


def _between(text: str, tag: str, start: int) -> CharSpan | None:
    """Characters between ``<tag>`` and ``</tag>``, the first after ``start``."""
    opening = text.find(f"<{tag}>", start)
    begin = opening + len(tag) + 2
    end = text.find(f"</{tag}>", begin) if opening >= 0 else -1
    return (begin, end) if end >= 0 else None


def _parse_tagged(text: str, opened: bool, tag: str, separator: str | None) -> Parsed:
    reasoning, span = _reasoning(text, opened)
    found = _between(text, tag, span[1] if span else 0)
    if found is None:
        verdict = Verdict.MALFORMED if f"<{tag}>" in text else Verdict.MISSING
        return Parsed((), verdict, reasoning, span)
    body = text[slice(*found)]
    parts = body.split(separator) if separator else [body]
    actions = tuple(part.strip() for part in parts if part.strip())
    if not actions:
        return Parsed((), Verdict.MISSING, reasoning, span)
    return Parsed(actions, Verdict.OK, reasoning, span, found)


def parse_action_tag(text: str, *, opened: bool = False) -> Parsed:
    """``<think>…</think><action>A</action>``: the format of verl-agent and TCOD."""
    return _parse_tagged(text, opened, "action", None)


def parse_answer_tag(text: str, *, opened: bool = False) -> Parsed:
    """``<think>…</think><answer>A || B</answer>``: RAGEN's format, several actions a turn."""
    return _parse_tagged(text, opened, "answer", "||")


def parse_code(text: str, *, opened: bool = False) -> Parsed:
    """``<think>…</think><code>…</code>``, a fence of Python, or both: one action of many lines.

    Of several blocks the first counts; the indentation of its first line is kept.
    """
    reasoning, span = _reasoning(text, opened)
    start, end = span[1] if span else 0, len(text)
    tagged = _between(text, "code", start)
    if tagged is not None:
        start, end = tagged
    fenced = _FENCE.search(text[start:end])
    if fenced is not None:
        start, end = start + fenced.start(1), start + fenced.end(1)
    elif tagged is None:
        marked = "<code>" in text[start:] or "```" in text[start:]
        return Parsed((), Verdict.MALFORMED if marked else Verdict.MISSING, reasoning, span)
    code = text[start:end].rstrip()
    blank = len(code) - len(_BLANK.sub("", code, count=1))
    if not code:
        return Parsed((), Verdict.MISSING, reasoning, span)
    return Parsed((code[blank:],), Verdict.OK, reasoning, span, (start + blank, start + len(code)))


_BLANK = re.compile(r"\A(?:[ \t]*\n)+")
"""Empty lines before the first line of code."""


Grammar = Callable[[str], Parsed]

GRAMMARS: dict[str, Callable[..., Parsed]] = {
    "plain": parse_plain,
    "action": parse_action_tag,
    "answer": parse_answer_tag,
    "code": parse_code,
}

_FORMATS = {
    "plain": "{}",
    "action": "<action>{}</action>",
    "answer": "<answer>{}</answer>",
    "code": "<code>\n{}\n</code>",
}

_THINK_FIRST = "Think first, between <think> and </think>. Then give "
_EXPLAINED = {
    "plain": "Answer with {count} and nothing else.",
    "action": _THINK_FIRST + "{count} between <action> and </action>.",
    "answer": _THINK_FIRST + "{count} between <answer> and </answer>.",
    "code": _THINK_FIRST + "one piece of Python code between <code> and </code>.",
}


def grammar(name: str, *, opened: bool = False, most: int | None = None) -> Grammar:
    """The grammar called ``name``.

    Args:
        name: a key of :data:`GRAMMARS`.
        opened: the prompt ends with ``<think>``, so that every response begins inside a thought.
        most: actions that one response may ask for; what is beyond goes to ``Parsed.cut``.

    Raises:
        ConfigError: no such grammar; with the known names.
    """
    _known(name)
    parse = partial(GRAMMARS[name], opened=opened) if opened else GRAMMARS[name]
    return parse if most is None else lambda text: _limited(parse(text), most)


def _limited(parsed: Parsed, most: int) -> Parsed:
    if len(parsed.actions) <= most:
        return parsed
    return replace(parsed, actions=parsed.actions[:most], cut=parsed.actions[most:])


def _known(name: str) -> None:
    if name not in GRAMMARS:
        raise ConfigError(
            f"unknown grammar; one of {', '.join(GRAMMARS)}", key="grammar", value=name
        )


def write(name: str, actions: tuple[str, ...]) -> str:
    """The response text that ``grammar(name)`` reads back as ``actions`` (experts, replays)."""
    _known(name)
    return _FORMATS[name].format(" || ".join(actions))


def explain(name: str, most: int | None = None) -> str:
    """What tells a model to answer so that ``grammar(name, most=most)`` can read it."""
    _known(name)
    count = "exactly one action"
    if name == "answer":
        number = "one action or more" if most is None else f"one to {most} actions"
        count = f"{number}, in the order of execution and separated by ||,"
    return _EXPLAINED[name].format(count=count)


def parse_calls(
    calls: Sequence[Mapping[str, Any]],
    to_action: Callable[[str, Mapping[str, Any]], str],
    reasoning: str = "",
) -> Parsed:
    """Native tool calls as actions, in order.

    One call that cannot be read makes the whole response malformed: nothing of it is executed.

    Args:
        calls: as the provider returned them: ``{"function": {"name", "arguments"}}`` with the
            arguments as JSON text or as a mapping; also without the level ``function``.
        to_action: such as ``TextEnv.tool_action``.
        reasoning: the thought that came with the calls.
    """
    read = [read_call(call) for call in calls]
    actions = tuple(to_action(*call) for call in read if call is not None)
    if len(actions) < len(read):
        return Parsed((), Verdict.MALFORMED, reasoning)
    return Parsed(actions, Verdict.OK if actions else Verdict.MISSING, reasoning)


def read_call(call: Any) -> tuple[str, Mapping[str, Any]] | None:
    """Name and arguments of one tool call; None where it has none that can be read."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return (function["name"], arguments) if isinstance(arguments, Mapping) else None
