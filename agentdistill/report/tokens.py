"""A token with what student and teacher said about it.

Invariant: what nobody said is NaN, and is in no mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a response; NaN where nobody said anything.

    Attributes:
        text: what it adds to the text.
        student: log-probability of the student that drew it, at that time, as it sampled.
        teacher: log-probability of the teacher.
        final: log-probability of the student as it is at the end of the stage.
    """

    text: str
    student: float
    teacher: float
    final: float

    @property
    def lead(self) -> float:
        """How much better the teacher likes the token: log pi_teacher - log pi_student."""
        return self.teacher - (self.final if math.isnan(self.student) else self.student)

    @property
    def divergence(self) -> float:
        """The log-probability of who drew the token, minus that of the other one.

        Its mean over drawn tokens estimates the KL from who acted to the other one.
        """
        return self.lead if math.isnan(self.student) else -self.lead


Turns = Mapping[int, Sequence[Token]]
"""Tokens of each turn, by the turn's index."""


def mean_divergence(tokens: Sequence[Token]) -> float | None:
    """Mean of :attr:`Token.divergence`, None where no token has one."""
    known = [value for token in tokens if not math.isnan(value := token.divergence)]
    return sum(known) / len(known) if known else None
