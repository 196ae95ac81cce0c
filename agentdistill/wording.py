"""What a prompt says, as text: one preset's templates filled in for one environment.

Invariants: no tokens here, and no model: :mod:`~agentdistill.render` turns the same texts into ids,
and both show the same turns (tested). What an environment says is filled in, never read as a
template.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from agentdistill import actions
from agentdistill.actions import Grammar
from agentdistill.config import PromptConfig
from agentdistill.config.template import fill, listing
from agentdistill.records import Json, Turn


class Wording:
    """The texts of one prompt preset in one environment."""

    def __init__(self, prompt: PromptConfig, instruction: str = "") -> None:
        """``instruction`` is the environment's own, used where the preset asks for it."""
        self.prompt = prompt
        answer = actions.explain(prompt.grammar, prompt.max_actions)
        self._static = {"instruction": instruction, "format": answer}
        template = "{instruction}" if prompt.instruction == "env" else prompt.instruction
        self.system = fill(template, self._static)
        """Text of the system message, "" for none."""

    @property
    def identity(self) -> Json:
        """What this wording depends on, as JSON."""
        return [self.prompt.model_dump(), self.system, fill(self.prompt.observation, self._static)]

    @cached_property
    def grammar(self) -> Grammar:
        """How a response is read that begins outside of a thought."""
        return actions.grammar(self.prompt.grammar, most=self.prompt.max_actions)

    def first(self, past: int) -> int:
        """Number of the first of ``past`` earlier turns that the next prompt shows."""
        prompt = self.prompt
        if prompt.history is not None and past < prompt.history_from:
            return past
        return 0 if prompt.window is None else max(0, past - prompt.window)

    def message(
        self,
        observation: str,
        *,
        step: int = 1,
        goal: str = "",
        admissible: Sequence[str] = (),
        history: str = "",
        hint: str = "",
    ) -> str:
        """The user message of turn number ``step`` (from 1); ``hint`` goes before what is seen."""
        prompt = self.prompt
        values = {
            **self._static,
            "observation": f"{hint.rstrip()}\n\n{observation}" if hint else observation,
            "step": str(step),
            "goal": "" if goal in observation else goal,
            "admissible": listing(admissible, prompt.admissible, prompt.admissible_limit),
            "history": history,
        }
        return fill(prompt.observation, values)

    def entry(self, observation: str, chosen: Sequence[str], *, step: int) -> str:
        """How an earlier turn is written inside a later user message."""
        values = {"observation": observation, "step": str(step), "action": " || ".join(chosen)}
        return fill(self.prompt.history or "", values)

    def answer(self, turn: Turn) -> str:
        """What a turn said; native tool calls as this grammar writes their actions."""
        if not turn.tool_calls or not any(turn.actions):
            return turn.text
        calls = actions.write(self.prompt.grammar, turn.actions)
        return f"{turn.text}\n{calls}" if turn.text else calls

    def messages(
        self,
        turns: Sequence[Turn],
        observation: str,
        *,
        goal: str = "",
        admissible: Sequence[str] = (),
        hint: str = "",
    ) -> list[dict[str, str]]:
        """The prompt for ``observation`` after ``turns``, as chat messages; none repeats a hint."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        shown = list(enumerate(turns, 1))[self.first(len(turns)) :]
        history = ""
        for step, turn in shown:
            if self.prompt.history is not None:
                history += self.entry(turn.observation, turn.actions, step=step)
                continue
            asked = self.message(turn.observation, step=step, goal=goal, admissible=turn.admissible)
            found.append({"role": "user", "content": asked})
            found.append({"role": "assistant", "content": self._past(turn)})
        step = len(turns) + 1
        now = self.message(
            observation, step=step, goal=goal, admissible=admissible, history=history, hint=hint
        )
        return [*found, {"role": "user", "content": now}]

    def _past(self, turn: Turn) -> str:
        """An earlier answer, without its thought where the preset drops that."""
        text = self.answer(turn)
        thought = self.grammar(text).reason_span if self.prompt.drop_reasoning else None
        return text if thought is None else text[: thought[0]] + text[thought[1] :]
