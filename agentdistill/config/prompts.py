"""How an episode is shown to a model: the section ``prompt`` and its presets. No torch here.

The presets named after papers keep the *structure* of their prompts (messages, history, tags, list
of actions, counter), and each says what of it; the words are our own. docs/prompts.md shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from agentdistill.config.template import places
from agentdistill.errors import ConfigError


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, and defaults that are checked too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


_STATIC = ("instruction", "format")
_PLACES: dict[str, tuple[str, ...]] = {
    "instruction": _STATIC,
    "observation": (*_STATIC, "observation", "admissible", "goal", "step", "history"),
    "history": ("step", "observation", "action"),
}


class PromptConfig(Section):
    """How an episode is shown to a model; presets are in :data:`PROMPTS`.

    ``instruction``, ``observation`` and ``history`` are templates. A line whose places are all
    empty vanishes. The places: ``{instruction}`` is the environment's own, ``{format}`` how to
    answer (from ``grammar`` and ``max_actions``), ``{observation}`` and ``{step}`` (from 1) the
    turn's, ``{goal}`` the task in words (empty where this observation says it itself),
    ``{admissible}`` the actions that the environment lists, ``{history}`` earlier turns.
    """

    grammar: Literal["plain", "action", "answer", "code"] = "plain"
    """How a response is read."""
    instruction: str = "env"
    """System text, "" for none; ``env`` is short for ``{instruction}``."""
    observation: str = Field("{observation}", pattern=r"\{observation\}")
    """One user message."""
    history: str | None = None
    """One earlier turn inside the user message, with ``{action}`` for what was done. With it, every
    prompt is one user message, written anew; None shows earlier turns as messages of their own."""
    window: int | None = Field(None, ge=0)
    """Earlier turns that stay in the prompt; None keeps all."""
    history_from: int = Field(1, ge=1)
    """Fewer earlier turns than this are not shown; only with ``history``."""
    max_actions: int | None = Field(None, ge=1)
    """Actions that one response may ask for (grammar ``answer``); those beyond are not executed
    and are on record as ``Turn.cut``."""
    admissible: Literal["lines", "quoted"] = "lines"
    """How ``{admissible}`` is written."""
    admissible_limit: int | None = Field(None, ge=1)
    """Actions that ``{admissible}`` names at most; of the others it gives the number."""
    drop_reasoning: bool = False
    """Whether the reasoning of earlier turns is deleted from the prompt."""

    @field_validator("instruction", "observation", "history")
    @classmethod
    def _known_places(cls, template: str | None, info: ValidationInfo) -> str | None:
        known = _PLACES[str(info.field_name)]
        for name in sorted(places(template or "") - set(known)):
            raise ValueError(f"{{{name}}} is no place here; known: {', '.join(known)}")
        return template

    @model_validator(mode="after")
    def _history_has_a_place(self) -> PromptConfig:
        if (self.history is not None) != ("history" in places(self.observation)):
            raise ValueError(
                "history says how an earlier turn is written where observation has {history}: "
                "give both or neither"
            )
        return self

    @property
    def lists_admissible(self) -> bool:
        """Whether the model is shown the admissible actions, so that they must be on record."""
        return "admissible" in places(self.observation)


_EXPLAINED = "{instruction}\n{format}"

_REBUILT = """\
{instruction}
The task: {goal}
Before this, oldest first:{history}
Step {step}. This is what you see:
{observation}
What can be done now: {admissible}
{format}"""

_EARLIER = "\n- step {step}: saw '{observation}' and did '{action}'"

PROMPTS: dict[str, PromptConfig] = {
    "chat": PromptConfig(),
    "bare": PromptConfig(instruction=""),
    "window": PromptConfig(window=2, observation="The task: {goal}\n{observation}"),
    "react": PromptConfig(grammar="action", instruction=_EXPLAINED),
    "react-drop": PromptConfig(grammar="action", instruction=_EXPLAINED, drop_reasoning=True),
    "tcod": PromptConfig(
        grammar="action",
        instruction="",
        observation=_REBUILT,
        history=_EARLIER,
        window=2,
        history_from=2,
        admissible="quoted",
        admissible_limit=100,
    ),
    "verl-agent": PromptConfig(
        grammar="action",
        instruction="",
        observation=_REBUILT,
        history=_EARLIER,
        window=2,
        admissible="quoted",
        admissible_limit=100,
    ),
    "ragen": PromptConfig(
        grammar="answer",
        instruction=_EXPLAINED,
        observation="Turn {step}. The state:\n{observation}",
        max_actions=5,
    ),
    "skill-sd": PromptConfig(grammar="code", instruction=_EXPLAINED),
}
"""Presets by name.

* ``chat``: the environment's instruction, then the whole episode as a chat; ``bare`` without the
  instruction; ``window`` with the last two turns only, and the goal where they do not say it.
* ``react``: ``chat`` with thought and action in tags, which the instruction explains;
  ``react-drop`` deletes earlier thoughts.
* ``tcod`` (arXiv 2604.24005, its prompt with two turns of history): one user message written anew
  each step; in it the task, the last two observations and actions (from the third step on), the
  step's number, the observation and the admissible actions; the answer is
  ``<think>…</think><action>…</action>``.
* ``verl-agent``: the same, with its history from the second step on. (Its AppWorld prompt asks
  for ``<code>``: ``grammar: code``.)
* ``ragen``: a chat over the whole episode, each turn with its number; the answer is
  ``<think>…</think><answer>A || B</answer>`` with up to five actions. RAGEN also shows rewards
  and how many actions are left: this preset does not.
* ``skill-sd`` (arXiv 2604.10674): a chat over the whole episode that never holds a skill, and code
  as the answer (AppWorld; for Sokoban set ``grammar: action``). The paper published no prompt:
  nothing else of this is theirs.
"""


def prompt(value: Any) -> Any:
    """A prompt section from a preset's name, or from ``{preset: name, field: …}``."""
    if isinstance(value, str):
        value = {"preset": value}
    if not isinstance(value, Mapping) or "preset" not in value:
        return value
    fields = dict(value)
    name = fields.pop("preset")
    if not isinstance(name, str) or name not in PROMPTS:
        known = ", ".join(PROMPTS)
        raise ConfigError(f"unknown preset; known: {known}", key="prompt", value=name)
    return {**PROMPTS[name].model_dump(), **fields}
