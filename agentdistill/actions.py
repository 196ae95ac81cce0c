"""Action grammars: from the text of a response to the actions it asks for.

Invariants: parsing never raises, whatever the text; the result says what was found (a
:class:`~agentdistill.records.Verdict`) and *where*, as character spans, so that tokens can be
labelled as reasoning, action or format without searching the text again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

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
    """

    actions: tuple[str, ...]
    verdict: Verdict
    reasoning: str = ""
    reason_span: CharSpan | None = None
    act_span: CharSpan | None = None


_THINK = re.compile(r"<think>(.*?)</think>\s*", re.DOTALL)
_ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def _reasoning(text: str) -> tuple[str, CharSpan | None]:
    match = _THINK.search(text)
    return (match.group(1).strip(), match.span()) if match else ("", None)


def parse_plain(text: str) -> Parsed:
    """The whole response, stripped, is one action (a leading ``<think>`` block is reasoning)."""
    reasoning, span = _reasoning(text)
    start = span[1] if span else 0
    action = text[start:].strip()
    if not action:
        return Parsed((), Verdict.MISSING, reasoning, span)
    begin = text.index(action, start)
    return Parsed((action,), Verdict.OK, reasoning, span, (begin, begin + len(action)))


def _parse_tagged(text: str, tag: re.Pattern[str], opening: str, separator: str | None) -> Parsed:
    reasoning, span = _reasoning(text)
    match = tag.search(text, span[1] if span else 0)
    if match is None:
        verdict = Verdict.MALFORMED if opening in text else Verdict.MISSING
        return Parsed((), verdict, reasoning, span)
    body = match.group(1)
    parts = body.split(separator) if separator else [body]
    actions = tuple(part.strip() for part in parts if part.strip())
    if not actions:
        return Parsed((), Verdict.MISSING, reasoning, span)
    return Parsed(actions, Verdict.OK, reasoning, span, match.span(1))


def parse_action_tag(text: str) -> Parsed:
    """``<think>…</think><action>A</action>``: the format of verl-agent and TCOD."""
    return _parse_tagged(text, _ACTION, "<action>", None)


def parse_answer_tag(text: str) -> Parsed:
    """``<think>…</think><answer>A || B</answer>``: RAGEN's format, several actions a turn."""
    return _parse_tagged(text, _ANSWER, "<answer>", "||")


Grammar = Callable[[str], Parsed]

GRAMMARS: dict[str, Grammar] = {
    "plain": parse_plain,
    "action": parse_action_tag,
    "answer": parse_answer_tag,
}

_FORMATS = {"plain": "{}", "action": "<action>{}</action>", "answer": "<answer>{}</answer>"}


def grammar(name: str) -> Grammar:
    """The grammar called ``name``; raises ConfigError with the known names."""
    if name not in GRAMMARS:
        raise ConfigError(
            f"unknown grammar; one of {', '.join(GRAMMARS)}", key="grammar", value=name
        )
    return GRAMMARS[name]


def write(name: str, actions: tuple[str, ...]) -> str:
    """The response text that ``grammar(name)`` reads back as ``actions`` (experts, replays)."""
    grammar(name)
    return _FORMATS[name].format(" || ".join(actions))
