"""Where an episode starts and how long the student may act, as a function of the counter n.

Plain numbers only; no torch. Source: TCOD (arXiv 2604.24005 and its code). The paper and its code
disagree; what follows the code is the default, what follows the paper is an option, and each
docstring says which is which.

* n counts the rollout iterations (the code's explorer batches), not the optimiser's steps.
* The paper's eta is 2; the released configurations use 4 to 6, and k_start 1.
* Expert turns that are replayed are state and history: they carry no loss.
* An episode that a window ends early has no outcome: it is neither success nor failure.
* Curricula shape training only. Evaluation always uses `Full`.

Invariants: ``0 <= start < max_turns``; a horizon is at least 1 and never reaches beyond the step
limit, counted from the reset; ``horizon is None`` exactly when the student may act up to the step
limit of an episode that starts at the reset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from agentdistill.errors import ConfigError


def _at_least(lowest: int, **numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < lowest:
            raise ConfigError(f"must be at least {lowest}", key=f"curriculum.{name}", value=number)


def f2b_window(n: int, eta: int, k_start: int = 1, *, max_turns: int) -> int:
    """Turns the student acts, counted from the start: min(k_start + n // eta, max_turns).

    Forward to backward; paper and code agree (k_start is 1 in the code).
    """
    _at_least(0, n=n)
    _at_least(1, eta=eta, k_start=k_start, max_turns=max_turns)
    return min(k_start + n // eta, max_turns)


def b2f_start(n: int, length: int, eta: int, k_start: int = 1) -> int:
    """Expert turns replayed before the hand-over: (length - k_start) - n // eta within bounds.

    Backward to forward. Bounds are 0 and length - 1; an empty demonstration gives 0. The paper
    counts from the other end: ``length - start`` is its k(n) = min(k_start + n // eta, length).
    """
    _at_least(0, n=n, length=length)
    _at_least(1, eta=eta, k_start=k_start)
    return max(0, min(length - k_start - n // eta, length - 1))


@dataclass(frozen=True, slots=True)
class Plan:
    """How one episode runs.

    Attributes:
        start: expert turns replayed first.
        horizon: turns the student may act after that; None is the step limit.
    """

    start: int = 0
    horizon: int | None = None


class Curriculum(Protocol):
    """Plans an episode from the counter and what is known about the task."""

    def plan(self, n: int, expert_length: int | None, max_turns: int) -> Plan:
        """Plan one episode.

        Args:
            n: the counter when the episode is sampled.
            expert_length: turns of the task's demonstration; None or 0 when it has none.
            max_turns: the step limit, in turns from the reset.
        """


def _limited(start: int, horizon: int, max_turns: int) -> Plan:
    return Plan(start, None if start == 0 and horizon >= max_turns else horizon)


@dataclass(frozen=True, slots=True)
class Full:
    """Ordinary episodes, from the reset to the step limit; also what evaluation always uses."""

    def plan(self, n: int, expert_length: int | None, max_turns: int) -> Plan:
        """Start 0 and no horizon, whatever n."""
        _at_least(1, max_turns=max_turns)
        return Plan()


@dataclass(frozen=True, slots=True)
class Fixed:
    """The student always gets the first ``horizon`` turns: the control without a schedule."""

    horizon: int

    def __post_init__(self) -> None:
        """Refuse a horizon below 1."""
        _at_least(1, horizon=self.horizon)

    def plan(self, n: int, expert_length: int | None, max_turns: int) -> Plan:
        """Start 0 and the fixed horizon."""
        _at_least(1, max_turns=max_turns)
        return _limited(0, self.horizon, max_turns)


@dataclass(frozen=True, slots=True)
class ForwardToBackward:
    """TCOD-F2B: a window over the first turns grows until it is the whole episode.

    Attributes:
        eta: iterations per additional turn.
        k_start: the window at n = 0.
        max_turns: where growth stops (the paper's T_max); None is the step limit.
    """

    eta: int = 2
    k_start: int = 1
    max_turns: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        _at_least(1, eta=self.eta, k_start=self.k_start, max_turns=self.max_turns)

    def plan(self, n: int, expert_length: int | None, max_turns: int) -> Plan:
        """Start 0 and a horizon of `f2b_window` turns."""
        cap = min(self.max_turns or max_turns, max_turns)
        window = f2b_window(n, self.eta, self.k_start, max_turns=cap)
        return _limited(0, window, max_turns)


@dataclass(frozen=True, slots=True)
class BackwardToForward:
    """TCOD-B2F: the expert plays the beginning, and less of it as n grows.

    Demonstrations longer than the step limit count only up to it, so that a turn is left for the
    student. A task without a demonstration gets an ordinary episode.

    Attributes:
        eta: iterations per turn handed over.
        k_start: turns left to the student at n = 0.
        horizon: ``remaining`` (the code): the student acts until the step limit, which counts the
            replayed turns. ``k`` (the paper): as many turns as the expert still needed, also once
            the start has reached the reset.
    """

    eta: int = 2
    k_start: int = 1
    horizon: str = "remaining"

    def __post_init__(self) -> None:
        """Refuse numbers below 1 and unknown horizons."""
        _at_least(1, eta=self.eta, k_start=self.k_start)
        if self.horizon not in ("remaining", "k"):
            raise ConfigError("one of remaining, k", key="curriculum.horizon", value=self.horizon)

    def plan(self, n: int, expert_length: int | None, max_turns: int) -> Plan:
        """Start at `b2f_start`; the horizon as the attribute says."""
        _at_least(1, max_turns=max_turns)
        length = min(expert_length or 0, max_turns)
        start = b2f_start(n, length, self.eta, self.k_start)
        if length == 0:
            return Plan()
        turns = length - start if self.horizon == "k" else max_turns - start
        return _limited(start, turns, max_turns)
