"""The space of methods: independent choices with a neutral value each.

A method knows neither environment nor model. What it decides is decided here: who acts and from
which state, who scores and what is compared, where the signal enters the update, what the reward
adds, and how it is reduced. The neutral point (:class:`Axes` as it stands) is plain on-policy
distillation: sampled-token reverse KL as an advantage, uniform weights, an external frozen teacher
that reads what the student read.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError

from agentdistill.config import Over, Section
from agentdistill.curriculum import (
    BackwardToForward,
    Curriculum,
    Fixed,
    ForwardToBackward,
    Full,
)
from agentdistill.errors import ConfigError


class StartAxis(Section):
    """Where the actor starts and how long it may act (TCOD's curricula)."""

    kind: Literal["full", "f2b", "b2f", "fixed"] = "full"
    eta: int = Field(2, ge=1)
    """Iterations per additional turn."""
    k_start: int = Field(1, ge=1)
    """Student turns at the beginning."""
    horizon: Literal["remaining", "k"] = "remaining"
    """After the hand-over of b2f: until the step limit (the code), or k turns (the paper)."""
    turns: int | None = Field(None, ge=1)
    """Length for ``fixed``; for ``f2b`` where the growth stops."""

    def curriculum(self) -> Curriculum:
        """The curriculum this axis stands for."""
        if self.kind == "f2b":
            return ForwardToBackward(self.eta, self.k_start, self.turns)
        if self.kind == "b2f":
            return BackwardToForward(self.eta, self.k_start, self.horizon)
        if self.kind == "fixed":
            return Fixed(self.turns or 1)
        return Full()


class SignalAxis(Section):
    """What is compared, and where it enters the update."""

    divergence: Literal[
        "none", "nll", "k1", "k2", "k3", "rho_k3", "reverse_kl", "forward_kl", "jsd", "tvd"
    ] = "k1"
    """``k…`` compare the sampled token, the others whole distributions; ``nll`` has no teacher."""
    coupling: Literal["advantage", "loss"] = "advantage"
    """An additive advantage (E2), or a differentiable loss term (E1; E0 for ``nll``)."""
    coef: float = 1.0
    beta: float = Field(0.5, ge=0, le=1)
    """Of ``jsd``."""
    temperature: float = Field(1.0, gt=0)
    """Divides both logits of a full divergence."""
    top_k: int | None = Field(None, ge=1)
    """Compare on the student's likeliest tokens and a tail; None takes the whole vocabulary."""


class RewardAxis(Section):
    """What the outcome adds."""

    kind: Literal["none", "grpo"] = "none"
    coef: float = 1.0
    source: Literal["success", "score", "reward"] = "success"
    normalise: Literal["std", "none"] = "std"
    ddof: Literal[0, 1] = 1
    eps: float = Field(1e-6, gt=0)


class PolicyGradientAxis(Section):
    """How advantages become a loss."""

    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float | None = Field(3.0, gt=1)
    tis_cap: float | None = Field(None, gt=0)
    """Truncated importance sampling for a sampler in another engine; None: off."""


class Axes(Section):
    """One point in the space."""

    actor: Literal["student", "teacher", "data"] = "student"
    """Whose tokens are trained on."""
    start: StartAxis = StartAxis()
    signal: SignalAxis = SignalAxis()
    reward: RewardAxis = RewardAxis()
    policy_gradient: PolicyGradientAxis = PolicyGradientAxis()
    over: Over = "token"
    """The index set of the mean (``turn`` is TCOD's seq-mean-token-mean)."""
    only_success: bool = False
    """Train on successful episodes only (the rejection filter of SFT)."""

    @property
    def full(self) -> bool:
        """Whether whole distributions are compared."""
        return self.signal.divergence in ("reverse_kl", "forward_kl", "jsd", "tvd")

    @property
    def needs_teacher(self) -> bool:
        """Whether somebody must score or act."""
        return self.actor == "teacher" or self.signal.divergence not in ("none", "nll")

    @property
    def scores(self) -> bool:
        """Whether the teacher scores the rows."""
        return self.signal.divergence not in ("none", "nll")

    @property
    def advantages(self) -> bool:
        """Whether a policy-gradient term exists."""
        return self.reward.kind != "none" or (self.scores and self.signal.coupling == "advantage")


@dataclass(frozen=True, slots=True)
class Method:
    """A published method, as a point and where it comes from.

    Attributes:
        name: what configurations call it.
        title: in words.
        axes: the point.
        paper: arXiv id or address, "" for textbook methods.
        evidence: C (reference code read), T (paper's text), S (notes), A (abstract), I (inferred).
        notes: in what paper and code differ, and which one this follows.
    """

    name: str
    title: str
    axes: Axes
    paper: str = ""
    evidence: str = "C"
    notes: str = ""

    def resolve(self, overrides: Mapping[str, Any]) -> Axes:
        """The axes with ``overrides`` (nested mappings) applied.

        Raises:
            ConfigError: names the key and the nearest known one.
        """
        values = _merge(self.axes.model_dump(), overrides)
        try:
            return Axes.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(["axes", *map(str, first["loc"])])
            message = first["msg"]
            if first["type"] == "extra_forbidden":
                near = difflib.get_close_matches(str(first["loc"][-1]), _known(first["loc"]), n=1)
                message = f"unknown key{f'; did you mean {near[0]}?' if near else ''}"
            raise ConfigError(message, key=key, value=first.get("input")) from None


def _known(location: tuple[int | str, ...]) -> list[str]:
    section: Any = Axes
    for part in location[:-1]:
        section = section.model_fields[str(part)].annotation
    return list(section.model_fields)


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged
