"""The space of methods: independent choices with a neutral value each.

A method knows neither environment nor model. What it decides is here: who acts from which state,
who scores what, where that enters the update, what the reward adds. The neutral point
(:class:`Axes` as it stands) is plain on-policy distillation: sampled reverse KL as an advantage.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from agentdistill.config import Over, Section
from agentdistill.curriculum import (
    BackwardToForward,
    Curriculum,
    Fixed,
    ForwardToBackward,
    Full,
)
from agentdistill.errors import ConfigError
from agentdistill.methods.overrides import apart, leaves, merge
from agentdistill.methods.schedule import Schedule


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


class TaskAxis(Section):
    """Which tasks count how much."""

    weight: Literal["none", "pass_rate"] = "none"
    """``pass_rate``: p^a (1 - p)^b, p the student's share of successes on the task (PACED)."""
    a: float = Field(1.0, ge=0)
    b: float = Field(1.0, ge=0)
    normalise: Literal["none", "mean1"] = "none"


class ScorerAxis(Section):
    """Who gives the target, and how its weights move."""

    source: Literal["external", "self"] = "external"
    update: Literal["frozen", "live", "sync", "ema"] = "frozen"
    """Of ``self``, the student: its start, its present weights, a copy every so many iterations, or
    a running mean. (A trust region is a target: ``signal: {share: 0.95, rest: student}``.)"""
    every: int = Field(1, ge=1)
    """Of ``sync``: iterations between copies, made before the rollout."""
    rate: float = Field(0.05, gt=0, le=1)
    """Of ``ema``: teacher ← (1 - rate) · teacher + rate · student, after the update."""
    stored: bool = False
    """Keep the scores of recorded episodes on disk, by tokens and scorer (Lightning OPD)."""


_Kind = Literal["same", "gold", "actions", "sibling", "feedback", "skill", "demonstrations"]


class ContextAxis(Section):
    """What the scorer reads besides what the student read."""

    kind: _Kind = "same"
    """``gold``: the task's demonstration from ``guide``; ``actions``: its actions alone;
    ``sibling``: a successful sample of the same group; ``feedback``: how the episode itself ended;
    ``skill``: from the bank of skills; ``demonstrations``: of other tasks."""
    reader: Literal["scorer", "actor"] = "scorer"
    """Who reads it: the scorer beside what the actor read, or the actor (``informed``, ``data``,
    hints)."""
    control: Literal["none", "shuffled", "empty"] = "none"
    """For experiments: every task reads the note of another one, or one that says nothing."""
    feedback: Literal["never", "fallback", "always"] = "never"
    """Of ``sibling``: say how the episode ended where no sibling succeeded, or in any case."""
    k: int = Field(1, ge=1)
    """Demonstrations."""
    text: str | None = Field(None, pattern=r"\{note\}")
    """The words around the ``{note}``; None takes those of the kind."""
    exploration: float = Field(2**0.5, ge=0)
    """Of ``skill``: the constant of the upper confidence bound."""


class Choice(Section):
    """One rule of a registry (:mod:`agentdistill.methods.rules`) by name, with its parameters.

    ``sod``, ``{name: sod, delta: 0.5}`` and ``{name: sod, parameters: {delta: 0.5}}`` are equal.
    """

    name: str = "none"
    parameters: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if not isinstance(value, Mapping):
            return value
        own = {key: value[key] for key in ("name", "parameters") if key in value}
        more = {key: each for key, each in value.items() if key not in own}
        return {**own, "parameters": {**own.get("parameters", {}), **more}}

    def __bool__(self) -> bool:
        """Whether there is a rule."""
        return self.name != "none"


class WeightAxis(Section):
    """Detached factors of the signal on three nested index sets; they are multiplied."""

    token: Choice = Choice()
    step: Choice = Choice()
    """A step is a maximal run of the actor's tokens (``sod``)."""
    trajectory: Choice = Choice()
    shift: Choice = Choice()
    """Added to the advantage of whole episodes, after the factors (Uni-OPD's margin)."""
    normalise: Literal["none", "mean1", "mean1_group"] = "none"
    """Scale the product to mean 1 over the signal's rows (of each group)."""


class SignalAxis(Section):
    """What is compared, and where it enters the update."""

    divergence: Literal[
        "none", "nll", "k1", "k2", "k3", "rho_k3", "reverse_kl", "forward_kl", "jsd", "tvd"
    ] = "k1"
    """``k…`` compare the sampled token, the others whole distributions; ``nll`` has no teacher."""
    coupling: Literal["advantage", "loss", "reward", "anchor", "magnitude"] = "advantage"
    """An additive advantage (E2); a differentiable loss (E1; E0 for ``nll``); a sum over the
    episode that is taken off its reward (E3); a share in the ratio's denominator (E4, RLAD); a
    factor of the reward's advantage (E5, RLSD)."""
    coef: float = 1.0
    beta: float = Field(0.5, ge=0, le=1)
    """Of ``jsd``."""
    temperature: float = Field(1.0, gt=0)
    """Divides both logits of a full divergence."""
    top_k: int | None = Field(None, ge=1)
    """Compare on so many tokens; None takes the whole vocabulary."""
    support: Literal["student", "teacher"] = "student"
    """Whose likeliest ``top_k`` tokens: the student's and a tail, or the teacher's alone."""
    share: float = 1.0
    """Share of the teacher in the target's logits; above 1 it extrapolates (ExOPD)."""
    rest: Literal["base", "student"] = "base"
    """Whose logits have the other share: those of ``base`` (G-OPD), or the student's own, detached
    (TAID; a trust region)."""
    clip: float | None = Field(None, gt=0)
    """Largest loss of one token; beyond it there is no gradient."""
    ratio_cap: float | None = Field(None, gt=0)
    """Weigh a loss by min(student / old, cap), detached (SDPO caps at 2); None does not."""
    mixing: float = Field(0.5, ge=0, le=1)
    """Of ``anchor``: the teacher's exponent (1 - a of RLAD). Of ``magnitude``: l of RLSD."""
    bound: float = Field(0.2, gt=0, le=1)
    """Of ``magnitude``: the factor stays within 1 ± bound."""
    route: Choice = Choice()
    """Which rows carry it."""


class RewardAxis(Section):
    """What the outcome adds."""

    kind: Literal["none", "grpo"] = "none"
    coef: float = 1.0
    source: Literal["success", "score", "reward"] = "success"
    normalise: Literal["std", "none"] = "std"
    ddof: Literal[0, 1] = 1
    eps: float = Field(1e-6, gt=0)
    route: Choice = Choice()
    """Which rows carry it; ``rest``: those that carry no signal."""


class GroupAxis(Section):
    """What is changed in a group before it teaches."""

    edit: Literal["none", "hint", "teacher"] = "none"
    """Where all samples of a task fail, some give way. ``hint``: to samples drawn with the context
    in the prompt, which count as drawn without it (KEPO). ``teacher``: to successes of the teacher,
    of which only the text is used, so that it may be behind an API (AMPO, LUFFY)."""
    replace: int = Field(2, ge=1)
    """Samples that give way."""
    attempts: int = Field(5, ge=1)
    """Tries until all of them succeed (``teacher``: one of them); those that never do leave the
    group as it was."""


class PolicyGradientAxis(Section):
    """How advantages become a loss."""

    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float | None = Field(3.0, gt=1)
    tis_cap: float | None = Field(None, gt=0)
    """Truncated importance sampling for a sampler in another engine; None: off."""


class Axes(Section):
    """One point in the space."""

    actor: Literal["student", "teacher", "data", "cached", "mixed", "informed"] = "student"
    """Whose tokens are trained on. ``cached``: recorded episodes of the student's start (Lightning
    OPD); ``mixed``: the student's or recorded ones, drawn anew every iteration (GKD);
    ``informed``: the student with the context in its prompt (pi-Distill)."""
    student_share: float = Field(0.5, ge=0, le=1)
    """Of ``mixed``: probability that the student plays an iteration (lambda of GKD)."""
    informed_share: float = Field(0.5, ge=0, le=1)
    """Of ``informed``: the weight of training the prompt with the context (alpha of pi-Distill).
    Of ``data`` whose context the actor reads: the share of episodes that are learnt with it."""
    start: StartAxis = StartAxis()
    task: TaskAxis = TaskAxis()
    scorer: ScorerAxis = ScorerAxis()
    context: ContextAxis = ContextAxis()
    signal: SignalAxis = SignalAxis()
    also: tuple[SignalAxis, ...] = ()
    """Further signals of the same scorer, each with its own route."""
    weight: WeightAxis = WeightAxis()
    reward: RewardAxis = RewardAxis()
    group: GroupAxis = GroupAxis()
    policy_gradient: PolicyGradientAxis = PolicyGradientAxis()
    over: Over = "token"
    """The index set of the mean (``turn`` is TCOD's seq-mean-token-mean)."""
    shared: bool = False
    """Whether all terms have one denominator, over the rows of any of them (SRPO)."""
    only_success: bool = False
    """Train on successful episodes only (the rejection filter of SFT)."""
    schedules: dict[str, Schedule] = Field(default_factory=dict)
    """Dotted key of a number → how it changes (:meth:`at`)."""

    @property
    def signals(self) -> tuple[SignalAxis, ...]:
        """All signals."""
        return tuple(s for s in (self.signal, *self.also) if s.divergence != "none")

    @property
    def full(self) -> bool:
        """Whether the first signal compares whole distributions."""
        return self.signal.divergence in FULL

    @property
    def scores(self) -> bool:
        """Whether a scorer reads the rows."""
        return any(s.divergence != "nll" for s in self.signals)

    @property
    def needs_teacher(self) -> bool:
        """Whether an external teacher must score or act."""
        asked = self.actor == "teacher" or self.group.edit == "teacher"
        return asked or (self.scores and self.scorer.source == "external")

    @property
    def needs_base(self) -> bool:
        """Whether the target has a share of the base."""
        return any(map(self.mixes, self.signals))

    def mixes(self, signal: SignalAxis) -> bool:
        """Whether the target of ``signal`` has a share of the base, now or later."""
        if signal.divergence == "nll":
            return False
        moves = signal is self.signal and "signal.share" in self.schedules
        return signal.rest == "base" and (signal.share != 1 or moves)

    @property
    def advantages(self) -> bool:
        """Whether a policy-gradient term exists."""
        return self.reward.kind != "none" or any(s.coupling == "advantage" for s in self.signals)

    @property
    def on_policy(self) -> bool:
        """Whether the student plays while it is trained."""
        return self.actor in ("student", "mixed", "informed")

    def at(self, values: Mapping[str, float]) -> Axes:
        """The point with the numbers of ``values`` (dotted key → value) in their places.

        Raises:
            ConfigError: a value is outside what its key allows, or the key is no number's.
        """
        if not values:
            return self
        changed = self.model_dump(by_alias=True)
        for key, value in values.items():
            place, last = _place(changed, key)
            number = isinstance(place.get(last), int) and not isinstance(place[last], bool)
            place[last] = round(value) if number else value
        return _validated(changed)


FULL = ("reverse_kl", "forward_kl", "jsd", "tvd")
"""Divergences of whole distributions."""


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
        changes, schedules = apart(overrides)
        values = merge(self.axes.model_dump(by_alias=True), changes)
        fixed = {key for key, _ in leaves(changes)} - set(schedules)
        fixed -= set(changes.get("schedules") or ())
        kept = {k: v for k, v in values["schedules"].items() if k not in fixed}
        values["schedules"] = {**kept, **schedules}
        return _scheduled(_validated(values))


def _scheduled(axes: Axes) -> Axes:
    """``axes`` at the beginning of its schedules; both of their ends must be allowed."""
    axes.at({key: schedule.end for key, schedule in axes.schedules.items()})
    return axes.at({key: schedule.start for key, schedule in axes.schedules.items()})


def _place(values: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The mapping that the number ``key`` stands in, and its name there."""
    *path, last = key.split(".")
    place: Any = values
    for part in path:
        place = place.get(part) if isinstance(place, dict) else None
    if not isinstance(place, dict) or isinstance(place.get(last), bool):
        raise ConfigError(f"axes.{key}: no number that a schedule could move")
    return place, last


def _validated(values: Mapping[str, Any]) -> Axes:
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
        field = getattr(section, "model_fields", {}).get(str(part))
        section = None if field is None else field.annotation
    return list(getattr(section, "model_fields", ()))
