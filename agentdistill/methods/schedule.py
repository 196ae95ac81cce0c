"""Numbers that change while a stage runs: any numeric parameter of any axis may be a schedule.

In a configuration a number is replaced by a mapping, ``coef: {from: 0, to: 1, over: 0.5}``.
Invariants: a schedule is a function of the stage's progress in [0, 1]; one that follows the loss
(``taid``) has state, which its controller gives to the checkpoint.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from agentdistill.config import Section


class Schedule(Section):
    """From one value to another over a share of the stage."""

    start: float = Field(alias="from")
    """Value at the beginning."""
    end: float = Field(alias="to")
    """Value at the end of the rise or fall, and after it."""
    over: float = Field(1.0, gt=0, le=1)
    """Share of the stage that it takes."""
    shape: Literal["linear", "cosine", "step", "taid"] = "linear"
    """``step`` jumps at ``over``; ``taid`` is linear, and faster while the loss falls."""
    speed: float = Field(5e-4, gt=0)
    """Of ``taid``: largest step per iteration beside the linear rise."""
    momentum: float = Field(0.99, ge=0, lt=1)
    """Of ``taid``: of the running relative fall of the loss."""

    def value(self, progress: float) -> float:
        """The value at ``progress`` of the stage, without what the loss adds."""
        done = min(1.0, max(0.0, progress) / self.over)
        if self.shape == "cosine":
            done = 0.5 * (1 - math.cos(math.pi * done))
        elif self.shape == "step":
            done = float(done >= 1.0)
        return self.start + (self.end - self.start) * done


class Controller:
    """One schedule while a stage runs; remembers what TAID needs (arXiv 2501.16937).

    With d the relative fall of the loss and m its running mean,
    t ← min(1, max(linear, t + speed · sigmoid(m) · (1 - t))) for a schedule that ends at 1.
    """

    def __init__(self, schedule: Schedule) -> None:
        """Begin at the schedule's start."""
        self.schedule = schedule
        self._reached = schedule.start
        self._fall = 0.0
        self._loss: float | None = None

    def value(self, progress: float) -> float:
        """The value now."""
        planned = self.schedule.value(progress)
        if self.schedule.shape != "taid":
            return planned
        rising = self.schedule.end >= self.schedule.start
        bound, further = (min, max) if rising else (max, min)
        self._reached = bound(self.schedule.end, further(planned, self._reached))
        return self._reached

    def observe(self, loss: float) -> None:
        """The loss of the iteration that just ended."""
        chosen, before = self.schedule, self._loss
        self._loss = loss
        if chosen.shape != "taid" or before is None:
            return
        fall = (before - loss) / (before + 1e-15)
        self._fall = chosen.momentum * self._fall + (1 - chosen.momentum) * fall
        pace = chosen.speed / (1 + math.exp(-self._fall))
        self._reached += pace * (chosen.end - self._reached)

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""
        return {"reached": self._reached, "fall": self._fall, "loss": self._loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._reached, self._fall, self._loss = state["reached"], state["fall"], state["loss"]
