"""What an agent may say: the action grammar as instruction and as tools.

Invariants: everything follows from one table of verbs, so that instruction, tools and the action
that a tool call makes agree; where the wordings of alfworld 0.3 and 0.4 differ, a caller says
which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from agentdistill.envs.alfworld.games import MOVE, PUT

PLACING = {MOVE: "move {object} to {place}", PUT: "put {object} in/on {place}"}

VERBS: tuple[tuple[str, str], ...] = (
    ("go to {place}", "Walk to a piece of furniture or an appliance."),
    ("open {place}", "Open the closed furniture or appliance in front of you."),
    ("close {place}", "Close the open furniture or appliance in front of you."),
    ("take {object} from {place}", "Pick up an object; you can hold one at a time."),
    ("", "Put down the object that you hold."),
    ("clean {object} with {place}", "Clean the object that you hold at a sinkbasin."),
    ("heat {object} with {place}", "Heat the object that you hold with a microwave."),
    ("cool {object} with {place}", "Cool the object that you hold with a fridge."),
    ("slice {object} with {knife}", "Slice an object in front of you with the knife you hold."),
    ("use {object}", "Switch on or off a lamp in front of you."),
    ("examine {name}", "Look closely at an object, or at the furniture in front of you."),
    ("look", "Describe where you are."),
    ("inventory", "Say what you hold."),
)
"""Template of the action ("" for putting down, which has two wordings), and what it does."""

EXAMPLES = {
    "place": "Name and number of furniture or an appliance, such as 'cabinet 3'.",
    "object": "Name and number of an object, such as 'mug 1'.",
    "knife": "Name and number of a knife, such as 'butterknife 1'.",
    "name": "Name and number of an object, furniture or an appliance.",
}


def verbs(wording: str) -> dict[str, tuple[str, str]]:
    """Verb → template and explanation."""
    table = [(template or PLACING[wording], meaning) for template, meaning in VERBS]
    return {template.split(" ", 1)[0]: (template, meaning) for template, meaning in table}


def fields(template: str) -> list[str]:
    """The gaps of a template."""
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def instruction(wordings: Sequence[str]) -> str:
    """The rules and the actions in words."""
    lines = []
    for template, meaning in VERBS:
        spoken = [template] if template else [PLACING[wording] for wording in wordings]
        lines.append(f"- {' or '.join(spoken)}: {meaning}")
    return "\n".join([_RULES, *lines, _NOTE])


_RULES = """\
You are in a room of a house, described in text, and have a task to do there. You see what is on \
a piece of furniture, or in it, when you are in front of it and it is open. Each turn you do one \
action:"""

_NOTE = """\
Use names with their numbers as the text gives them, such as "go to cabinet 3". "Nothing happens." \
means that the action was not possible. The episode ends when the task is done."""


def tools(wording: str) -> list[dict[str, Any]]:
    """One tool per verb, in OpenAI's function format."""
    return [_tool(verb, *entry) for verb, entry in verbs(wording).items()]


def _tool(verb: str, template: str, meaning: str) -> dict[str, Any]:
    names = fields(template)
    return {
        "type": "function",
        "function": {
            "name": verb,
            "description": meaning,
            "parameters": {
                "type": "object",
                "properties": {
                    name: {"type": "string", "description": EXAMPLES[name]} for name in names
                },
                "required": names,
                "additionalProperties": False,
            },
        },
    }


def spoken(wording: str, verb: str, arguments: Mapping[str, Any]) -> str | None:
    """The action of a tool call; None where there is no such tool or its arguments are others."""
    template, _ = verbs(wording).get(verb, (None, ""))
    if template is None or set(arguments) != set(fields(template)):
        return None
    if not all(isinstance(value, str) for value in arguments.values()):
        return None
    return template.format(**arguments)
