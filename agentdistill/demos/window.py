"""What a student is shown: some steps of an episode around the one that matched, as text.

Invariants: a window never leaves its episode; nothing in it is shortened; what an action led to is
the next step's observation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentdistill import actions as grammars

LEFT_OUT = "…"


@dataclass(frozen=True, slots=True)
class Step:
    """One turn of a demonstration: what was seen, thought and done.

    ``index`` is that of the turn in its episode.
    """

    index: int
    observation: str
    actions: tuple[str, ...]
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class Match:
    """A window of a successful episode.

    Attributes:
        trajectory: id of the episode.
        task: key of its task.
        step: index of the turn that matched.
        score: weighted mean of ``scores``.
        scores: by key (goal, plan, observation); only those that were compared.
        goal: of the episode, "" where it is not known.
        plan: of the episode, "" where there is none.
        steps: the window, in order.
        at: place of the step that matched among ``steps``.
        before: steps of the episode that come before the window.
        after: steps of the episode that come after it.
    """

    trajectory: str
    task: str
    step: int
    score: float
    scores: Mapping[str, float]
    goal: str
    plan: str
    steps: tuple[Step, ...]
    at: int
    before: int
    after: int

    def text(self, *, reasoning: bool = True, plan: bool = True, grammar: str | None = None) -> str:
        """The window in words.

        Args:
            reasoning: show the thoughts.
            plan: show the plan.
            grammar: write what was done as responses of this grammar, thoughts in ``<think>``;
                None puts names before thoughts and actions.

        Raises:
            ConfigError: no such grammar.
        """
        shown = self.steps[0].observation if self.steps else ""
        lines = [f"Task: {self.goal}"] if self.goal and self.goal not in shown else []
        lines += [f"Plan: {self.plan}"] if plan and self.plan else []
        lines += [LEFT_OUT] if self.before else []
        for step in self.steps:
            thought = step.reasoning if reasoning else ""
            lines += [f"Seen:\n{step.observation}", _said(step.actions, thought, grammar)]
        lines += [LEFT_OUT] if self.after else []
        return "\n".join(lines)


def _said(actions: tuple[str, ...], thought: str, grammar: str | None) -> str:
    if grammar is not None:
        opening = f"{grammars.THINK}{thought}{grammars.THOUGHT}" if thought else ""
        return f"Answered:\n{opening}{grammars.write(grammar, actions)}"
    done = " || ".join(actions)
    named = f"Done:\n{done}" if "\n" in done else f"Done: {done}"
    return f"Thought: {thought}\n{named}" if thought else named


def block(
    matches: Sequence[Match],
    *,
    reasoning: bool = True,
    plan: bool = True,
    grammar: str | None = None,
) -> str:
    """All windows, numbered, the best first; "" without any. Arguments as in ``Match.text``."""
    texts = [match.text(reasoning=reasoning, plan=plan, grammar=grammar) for match in matches]
    return "\n\n".join(f"Demonstration {number}\n{text}" for number, text in enumerate(texts, 1))
