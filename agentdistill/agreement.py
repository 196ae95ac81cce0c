"""When a student's own answers are enough, and when somebody better has to be asked.

The core of a cascade, for anything that can be drawn: actions in an environment, messages of a
chat. Invariants: samples that cannot be read agree with nothing, not even with each other; one
sample alone has nothing to disagree with, so that rules of agreement then leave it to the student;
nothing here draws random numbers but from the seed that it is given.

Source: unanimity of N = 3 samples is in-context distillation's (arXiv 2512.02543).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from agentdistill.errors import ConfigError

T = TypeVar("T")

AGREEMENT = ("unanimous", "majority", "threshold")
"""Rules that count samples."""

RULES = (*AGREEMENT, "confidence", "random", "never", "always")
"""All rules, the default first."""

_THRESHOLDS = {
    "threshold": (0.0, 1.0, "a share of the samples, from 0 to 1"),
    "confidence": (-1e9, 0.0, "a mean log-probability per token (natural, at most 0)"),
    "random": (0.0, 1.0, "a probability, from 0 to 1"),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """Whether the student's answer stands.

    Attributes:
        name: ``unanimous``: all samples agree. ``majority``: more than half of them do.
            ``threshold``: at least this share of them does. ``confidence``: the mean
            log-probability of the tokens of one sample is at least the threshold. ``random``: with
            the probability of the threshold the teacher answers, whatever the student would say.
            ``never``: the teacher never answers. ``always``: it always does.
        samples: how many the student draws; ``confidence`` draws one.
        threshold: of the rules that have one.
    """

    name: str = "unanimous"
    samples: int = 3
    threshold: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is no rule."""
        if self.name not in RULES:
            known = f"one of {', '.join(RULES)}"
            raise ConfigError(f"no such rule; {known}", key="rule", value=self.name)
        if self.samples < 1:
            raise ConfigError("must be at least 1", key="samples", value=self.samples)
        if self.name not in _THRESHOLDS:
            if self.threshold is not None:
                raise ConfigError(
                    f"rule {self.name} has none", key="threshold", value=self.threshold
                )
            return
        low, high, what = _THRESHOLDS[self.name]
        if self.threshold is None or not low <= self.threshold <= high:
            remedy = f"rule {self.name} needs one: {what}"
            raise ConfigError(remedy, key="threshold", value=self.threshold)

    @property
    def draws(self) -> int:
        """How many samples the student draws where it is asked at all."""
        return 1 if self.name == "confidence" else self.samples

    def skips(self, seed: int) -> bool:
        """Whether the teacher answers whatever the student would say."""
        if self.name == "random":
            return random.Random(seed).random() < (self.threshold or 0.0)
        return self.name == "always"

    def holds(self, largest: int, drawn: int, confidence: float | None) -> bool:
        """Whether the student's answer stands: ``largest`` of ``drawn`` samples agree."""
        if self.name == "confidence":
            if confidence is None:
                raise ConfigError(
                    "rule confidence needs log-probabilities, and this student gives none; "
                    "use unanimous",
                    key="rule",
                    value=self.name,
                )
            return largest > 0 and confidence >= (self.threshold or 0.0)
        if self.name not in AGREEMENT or drawn == 1:
            return True
        if self.name == "unanimous":
            return largest == drawn
        if self.name == "majority":
            return 2 * largest > drawn
        return largest > 0 and largest >= (self.threshold or 0.0) * drawn


@dataclass(frozen=True, slots=True)
class Decision(Generic[T]):
    """Who answers, and what.

    Attributes:
        chosen: the answer.
        by_teacher: whether it is the teacher's.
        drawn: all samples of the student; empty where the rule skipped it.
        place: of ``chosen`` in ``drawn``; None where it is the teacher's.
        votes: the class of each sample by number of its first member, None for one that cannot be
            read.
        confidence: what rule ``confidence`` looked at.
    """

    chosen: T
    by_teacher: bool
    drawn: tuple[T, ...] = ()
    place: int | None = None
    votes: tuple[int | None, ...] = ()
    confidence: float | None = None

    @property
    def share(self) -> float:
        """Share of the samples that agree with most others, 0 without any."""
        return _largest(self.votes)[1] / len(self.votes) if self.votes else 0.0

    @property
    def others(self) -> tuple[T, ...]:
        """The samples that were not chosen."""
        return tuple(one for place, one in enumerate(self.drawn) if place != self.place)


async def decide(
    rule: Rule,
    draw: Callable[[int], Awaitable[Sequence[T]]],
    ask: Callable[[], Awaitable[T]] | None,
    same: Callable[[T], Hashable | None],
    *,
    confidence: Callable[[T], float | None] = lambda _: None,
    seed: int = 0,
) -> Decision[T]:
    """Draw from the student, and ask the teacher where ``rule`` says so.

    The student's answer is the first of the largest class of equal samples (the first such class);
    the very first sample where none can be read.

    Args:
        rule: see :class:`Rule`.
        draw: so many samples of the student.
        ask: the teacher; None where there is none: the student's answer then always stands.
        same: what equal samples have in common; None for one that cannot be read.
        confidence: mean log-probability of a sample's tokens, None where nobody knows.
        seed: of this decision, for rule ``random``.

    Raises:
        ConfigError: rule ``confidence`` with a student that gives no log-probabilities.
    """
    if ask is not None and rule.skips(seed):
        return Decision(await ask(), True)
    drawn = tuple(await draw(rule.draws))
    votes = _classes([same(one) for one in drawn])
    first, size = _largest(votes)
    sure = confidence(drawn[first]) if rule.name == "confidence" else None
    if ask is None or rule.holds(size, len(drawn), sure):
        return Decision(drawn[first], False, drawn, first, votes, sure)
    return Decision(await ask(), True, drawn, None, votes, sure)


def _classes(keys: Sequence[Hashable | None]) -> tuple[int | None, ...]:
    """For each sample the number of the first that equals it."""
    first: dict[Hashable, int] = {}
    return tuple(
        None if key is None else first.setdefault(key, place) for place, key in enumerate(keys)
    )


def _largest(votes: Sequence[int | None]) -> tuple[int, int]:
    """The first member of the largest class, and its size; (0, 0) where nothing can be read."""
    sizes = Counter(vote for vote in votes if vote is not None)
    return max(sizes.items(), key=lambda item: (item[1], -item[0]), default=(0, 0))
