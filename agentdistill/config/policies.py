"""Policies that are made of others: a student with demonstrations, and a teacher to be asked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from agentdistill.agreement import Rule
from agentdistill.config.prompts import Section


class CascadeConfig(Section):
    """A cascade; its key in ``policies`` is a policy's name wherever one is named."""

    student: str
    """A model or a train stage."""
    teacher: str | None = None
    """A model, a train stage or ``expert``; None: whatever most samples say is done."""
    rule: Literal[
        "unanimous", "majority", "threshold", "confidence", "random", "never", "always"
    ] = "unanimous"
    """When the student's answer stands; ``never`` and ``always`` say when the teacher is asked."""
    samples: int = Field(3, ge=1)
    """Of the student at each step; with 1 nothing can disagree."""
    threshold: float | None = None
    """Of the rules threshold (share of the samples), confidence (mean log-probability per token)
    and random (probability of the teacher)."""
    equivalence: Literal["auto", "text", "code"] = "auto"
    """When two samples are the same; ``auto`` asks the environment."""
    demos: str | None = None
    """A collect stage whose successful episodes are shown, or a folder of demonstrations."""
    k: int = Field(6, ge=0)
    """Demonstrations at most."""
    window: int = Field(2, ge=0)
    """Steps of one that are shown to each side of the step that matched."""
    place: Literal["after", "before"] = "after"
    """After the history, new at each step; or before it, found once for the whole episode."""
    teacher_demos: bool = False
    """Show them to the teacher, too."""
    plan: bool = False
    """Ask the student for a plan once, before its first answer, and find demonstrations by it."""
    execute: bool = False
    """Compare what the samples lead to, tried out on snapshots of the environment."""

    @model_validator(mode="after")
    def _possible(self) -> CascadeConfig:
        self.decides()  # refuses what is no rule
        if self.teacher is None and self.rule in ("always", "random"):
            raise ValueError(f"rule={self.rule!r}: needs a teacher to be asked; name one")
        if self.teacher == self.student:
            raise ValueError(f"teacher={self.teacher!r}: is the student itself; name another one")
        return self

    def decides(self) -> Rule:
        """The rule as the core has it."""
        return Rule(self.rule, self.samples, self.threshold)

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of what it is made of: models, stages, ``expert``; perhaps a folder."""
        return tuple(filter(None, (self.student, self.teacher, self.demos)))
