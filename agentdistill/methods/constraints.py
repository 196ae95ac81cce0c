"""What cannot be combined, as objects that are checked when the configuration is read.

Numbers K1, K3, … are those of the product space's list of constraints (docs/methods.md). Each names
the keys in conflict and the remedy; nothing here runs a model. K1 needs the tokenizers and is
checked when they are loaded; K2, K14 and K15 hold by construction, K12 is also counted at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agentdistill.config import RunConfig, Section, TrainStage
from agentdistill.errors import ConfigError
from agentdistill.methods import needs, rules
from agentdistill.methods.space import FULL, Axes, SignalAxis


@dataclass(frozen=True, slots=True)
class Constraint:
    """One rule.

    Attributes:
        name: K1, K3, … or a word.
        keys: the keys in conflict.
        broken: whether (run, stage, axes) break it.
        remedy: what is wrong and what to do.
    """

    name: str
    keys: str
    broken: Callable[[RunConfig, TrainStage, Axes], bool]
    remedy: str


ABOUT_TASKS = ("gold", "actions", "demonstrations", "skill")
"""Contexts that can be written before an episode is played."""


def _couplings(axes: Axes, *names: str) -> bool:
    return any(signal.coupling in names for signal in axes.signals)


def _censors(axes: Axes) -> bool:
    return axes.reward.kind != "none" and axes.start.kind in ("f2b", "fixed")


def _needs_guide(axes: Axes) -> bool:
    return axes.start.kind == "b2f" or axes.context.kind in ("gold", "actions", "demonstrations")


def _past(axes: Axes) -> bool:
    """Whether skills about recorded episodes are needed before anything is played."""
    return axes.context.kind == "skill" and axes.actor == "data"


def _read(axes: Axes) -> bool:
    """Whether somebody reads the context."""
    if axes.context.reader == "scorer":
        return axes.scores and axes.actor != "informed"
    return axes.actor in ("informed", "data") or axes.group.edit == "hint"


def _reads_itself(axes: Axes) -> bool:
    """Whether the scorer is the student, with its own weights and its own prompt."""
    scorer = axes.scorer
    fresh = scorer.update == "live" or (scorer.update == "sync" and scorer.every == 1)
    alone = all(signal.share == 1 or signal.rest == "student" for signal in axes.signals)
    plain = axes.context.kind == "same" and alone
    return axes.scores and axes.scorer.source == "self" and fresh and plain


def _others_played(run: RunConfig, stage: TrainStage) -> bool:
    """Whether somebody else than the student's start played ``stage.data``."""
    played = None if stage.data is None else getattr(run.stage(stage.data), "policy", None)
    return played not in (None, stage.init or stage.model)


def _shares(axes: Axes, signal: SignalAxis) -> bool:
    """Whether somebody else than the scorer has a share in the target, now or later."""
    return signal.share != 1 or (signal is axes.signal and "signal.share" in axes.schedules)


def _weighs(axes: Axes) -> bool:
    """Whether there is a factor of the signal."""
    weight = axes.weight
    chosen = weight.token or weight.step or weight.trajectory
    return bool(chosen) or weight.normalise != "none" or axes.task.weight != "none"


def _double(axes: Axes) -> bool:
    """Whether two signals enter the same advantages on the same rows."""
    entering = [s for s in axes.signals if s.coupling in ("advantage", "anchor", "magnitude")]
    return len(entering) > 1 and not all(signal.route for signal in entering)


def _sampling_is_plain(run: RunConfig, stage: TrainStage) -> bool:
    sampling = stage.sampling or run.sampling
    return (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)


CONSTRAINTS: tuple[Constraint, ...] = (
    Constraint(
        "teacher",
        "teacher",
        lambda run, stage, axes: axes.needs_teacher and stage.teacher is None,
        "this method needs a teacher: name a model or an earlier train stage",
    ),
    Constraint(
        "no teacher",
        "teacher",
        lambda run, stage, axes: not axes.needs_teacher and stage.teacher is not None,
        "this method uses no teacher; remove the key",
    ),
    Constraint(
        "base",
        "base, axes.signal.share",
        lambda run, stage, axes: not axes.needs_base and stage.base is not None,
        "nothing is extrapolated from a base; remove the key, or set axes.signal.share",
    ),
    Constraint(
        "data",
        "data, axes.actor",
        lambda run, stage, axes: (
            (axes.actor in ("data", "cached", "mixed")) != (stage.data is not None)
        ),
        "methods whose actor is data, cached or mixed need a collect stage as data, the others "
        "refuse one",
    ),
    Constraint(
        "cached",
        "data, axes.actor",
        lambda run, stage, axes: axes.actor == "cached" and _others_played(run, stage),
        "the actor cached learns from episodes of the student's own start: collect them with the "
        "policy that init (or model) names",
    ),
    Constraint(
        "turns",
        "turns, axes.actor",
        lambda run, stage, axes: stage.turns is not None and axes.actor in ("data", "cached"),
        "recorded episodes are counted in tasks; remove turns",
    ),
    Constraint(
        "fixed",
        "axes.start.turns",
        lambda run, stage, axes: axes.start.kind == "fixed" and axes.start.turns is None,
        "a fixed horizon needs its number of turns",
    ),
    Constraint(
        "K3",
        "axes.start.kind, axes.reward.kind",
        lambda run, stage, axes: _censors(axes) and not axes.signals,
        "a window that ends the episode censors its outcome, and there is no other signal: use "
        "start full or b2f",
    ),
    Constraint(
        "K4",
        "guide, axes.start.kind, axes.context.kind",
        lambda run, stage, axes: (
            _needs_guide(axes) if stage.guide is None else not (_needs_guide(axes) or _past(axes))
        ),
        "a backward curriculum and the contexts gold, actions and demonstrations need the "
        "demonstrations of a collect stage named as guide; others take none (but skills that are "
        "read beside recorded episodes may come from one)",
    ),
    Constraint(
        "start",
        "axes.start.kind, axes.actor",
        lambda run, stage, axes: (
            axes.start.kind != "full" and axes.actor not in ("student", "informed")
        ),
        "a curriculum is for episodes that the student plays",
    ),
    Constraint(
        "K5",
        "samples, axes",
        lambda run, stage, axes: (
            stage.samples < 2
            and (
                axes.reward.kind == "grpo"
                or axes.context.kind == "sibling"
                or axes.group.edit != "none"
                or bool(axes.weight.shift)
            )
        ),
        "a group (reward grpo, context sibling, group edits, a margin) needs at least 2 samples "
        "per task",
    ),
    Constraint(
        "K6",
        "axes.signal.coupling, axes.also",
        lambda run, stage, axes: _double(axes),
        "one scorer's signal may enter as advantage, anchor or magnitude only once: choose one, or "
        "give each a route of its own rows",
    ),
    Constraint(
        "K7",
        "axes.signal.coupling, axes.reward.kind",
        lambda run, stage, axes: (
            _couplings(axes, "reward", "anchor", "magnitude") and axes.reward.kind == "none"
        ),
        "a signal inside the reward, the ratio or the advantage's size needs a reward: set "
        "axes.reward.kind: grpo",
    ),
    Constraint(
        "K8",
        "axes.actor, axes.signal.coupling",
        lambda run, stage, axes: axes.actor in ("teacher", "data", "mixed") and axes.advantages,
        "an advantage is for tokens that the student sampled: use coupling loss",
    ),
    Constraint(
        "K10",
        "axes.signal.divergence, axes.signal.coupling",
        lambda run, stage, axes: any(
            s.divergence == "k1" and s.coupling == "loss" for s in axes.signals
        ),
        "k1 as a loss has no gradient in expectation: use coupling advantage, or rho_k3",
    ),
    Constraint(
        "coupling",
        "axes.signal.divergence, axes.signal.coupling",
        lambda run, stage, axes: any(
            (s.coupling in ("advantage", "anchor", "magnitude") and s.divergence != "k1")
            or (s.coupling == "reward" and s.divergence not in ("k1", *FULL))
            for s in axes.signals
        ),
        "as an advantage, an anchor or a magnitude only k1 enters, into the reward k1 or a whole "
        "distribution's divergence; use coupling loss",
    ),
    Constraint(
        "target",
        "axes.signal.share, axes.signal.rest",
        lambda run, stage, axes: any(
            _shares(axes, s) and s.rest == "student" and s.divergence not in FULL
            for s in axes.signals
        ),
        "a target that the student has a share in must be compared as a whole distribution: use "
        "reverse_kl, forward_kl, jsd or tvd",
    ),
    Constraint(
        "K11",
        "sampling, axes.signal",
        lambda run, stage, axes: axes.on_policy and not _sampling_is_plain(run, stage),
        "teacher and student are scored at temperature 1 over the whole vocabulary, so training "
        "rollouts must be sampled that way (temperature 1, top_p 1, top_k 0)",
    ),
    Constraint(
        "K12",
        "axes.scorer, axes.context.kind",
        lambda run, stage, axes: axes.actor != "informed" and _reads_itself(axes),
        "the student's own weights, reading what it read, agree with it: the signal is zero; give "
        "the scorer a context, or older weights (frozen, ema)",
    ),
    Constraint(
        "context",
        "axes.context.kind",
        lambda run, stage, axes: axes.context.kind != "same" and not _read(axes),
        "nobody reads the context: it needs a scorer, the actor informed, or a group edit",
    ),
    Constraint(
        "informed",
        "axes.actor, axes.group.edit, axes.context.kind",
        lambda run, stage, axes: (
            (axes.actor == "informed" or axes.group.edit == "hint")
            and (axes.context.kind not in ABOUT_TASKS or axes.context.reader != "actor")
        ),
        "an informed actor and hints need a context with reader: actor, of a kind that is known "
        f"beforehand: {', '.join(ABOUT_TASKS)}",
    ),
    Constraint(
        "episodes",
        "axes.context.kind, axes.actor",
        lambda run, stage, axes: (
            axes.context.kind in ("sibling", "feedback", "skill")
            and axes.actor not in ("student", "informed")
            and axes.context.reader == "scorer"
        ),
        "sibling, feedback and skill are about episodes that the student plays",
    ),
    Constraint(
        "edit",
        "axes.group.edit, axes.actor",
        lambda run, stage, axes: (
            axes.group.edit != "none" and axes.actor not in ("student", "mixed")
        ),
        "groups are edited where the student plays without the context: use actor student or mixed",
    ),
    Constraint(
        "pass_rate",
        "axes.task.weight, axes.actor",
        lambda run, stage, axes: (
            axes.task.weight == "pass_rate" and axes.actor in ("teacher", "data")
        ),
        "pass rates are the student's: use actor student, mixed or cached",
    ),
    Constraint(
        "stored",
        "axes.scorer.stored, axes.actor",
        lambda run, stage, axes: (
            axes.scorer.stored
            and (
                axes.on_policy
                or axes.scorer.source != "external"
                or any(s.divergence in FULL for s in axes.signals)
            )
        ),
        "kept scores are of recorded episodes, by a frozen external teacher, of sampled tokens",
    ),
    Constraint(
        "analyser",
        "analyser, axes.context.kind",
        lambda run, stage, axes: stage.analyser is not None and axes.context.kind != "skill",
        "only the context skill has an analyser; remove the key",
    ),
    Constraint(
        "rules",
        "axes.weight, axes.signal.divergence",
        lambda run, stage, axes: (
            not axes.scores and any(n.endswith("/teacher") for n in rules.needs(axes))
        ),
        "this weight reads what a scorer says, and nothing is scored",
    ),
    Constraint(
        "weights",
        "axes.weight, axes.task.weight, axes.signal.coupling",
        lambda run, stage, axes: _weighs(axes) and not _couplings(axes, "advantage", "loss"),
        "weights are factors of a signal that enters as advantage or loss, and there is none",
    ),
    Constraint(
        "shift",
        "axes.weight.shift, axes.signal.coupling",
        lambda run, stage, axes: bool(axes.weight.shift) and not axes.advantages,
        "a shift is added to advantages, and there are none: use coupling advantage or a reward",
    ),
    Constraint(
        "nothing",
        "axes.signal.divergence, axes.reward.kind",
        lambda run, stage, axes: not axes.signals and axes.reward.kind == "none",
        "neither a signal nor a reward: there is nothing to learn from",
    ),
)

REMARKS: tuple[Constraint, ...] = (
    Constraint(
        "K10",
        "axes.signal.divergence, axes.signal.coupling",
        lambda run, stage, axes: any(
            s.divergence == "k3" and s.coupling == "loss" for s in axes.signals
        ),
        "k3 as a loss descends the forward KL; rho_k3 descends the reverse KL",
    ),
    Constraint(
        "K3",
        "axes.start.kind, axes.reward.kind",
        lambda run, stage, axes: _censors(axes) and bool(axes.signals),
        "episodes that the window ends have no outcome: the reward teaches on the others only "
        "(metric censored)",
    ),
    Constraint(
        "pass_rate",
        "axes.task.weight, samples",
        lambda run, stage, axes: axes.task.weight == "pass_rate" and stage.samples < 2,
        "a task that was played once has a pass rate of 0 or 1, and weighs nothing until it comes "
        "again: use samples",
    ),
)
"""What is allowed and often not meant."""


def check(run: RunConfig, stage: TrainStage, axes: Axes) -> None:
    """Refuse a stage that breaks a constraint, naming stage, keys, values, rule and remedy."""
    for level, choice in rules.chosen(axes):
        rules.find(level, choice, f"stages.{stage.name}.axes")
    for constraint in CONSTRAINTS:
        if constraint.broken(run, stage, axes):
            raise ConfigError(_sentence(run, stage, axes, constraint))
    needs.check(run, stage, axes)


def remarks(run: RunConfig, stage: TrainStage, axes: Axes) -> list[str]:
    """What is allowed and worth a line."""
    return [_sentence(run, stage, axes, r) for r in REMARKS if r.broken(run, stage, axes)]


def _sentence(run: RunConfig, stage: TrainStage, axes: Axes, constraint: Constraint) -> str:
    keys = ", ".join(_shown(run, stage, axes, key) for key in constraint.keys.split(", "))
    return f"stages.{stage.name}: {keys} ({constraint.name}): {constraint.remedy}"


def _shown(run: RunConfig, stage: TrainStage, axes: Axes, key: str) -> str:
    """``key`` and its value; the key alone where that is a whole section."""
    first, *path = key.split(".")
    value: Any = axes if first == "axes" else getattr(stage, first)
    for part in path:
        value = getattr(value, part)
    if first == "sampling":
        value = value or run.sampling
        return f"sampling={value.model_dump(exclude={'max_tokens'})}"
    return key if isinstance(value, (Section, tuple)) else f"{key}={value!r}"
