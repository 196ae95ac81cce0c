"""What cannot be combined, as objects that are checked when the configuration is read.

Numbers K1, K3, … are those of the product space's list of constraints (docs/methods.md). Each names
the keys in conflict and the remedy; nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agentdistill.config import RunConfig, TrainStage
from agentdistill.errors import ConfigError
from agentdistill.methods.space import Axes


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
        "data",
        "data, axes.actor",
        lambda run, stage, axes: (axes.actor == "data") != (stage.data is not None),
        "methods whose actor is data need a collect stage as data, the others refuse one",
    ),
    Constraint(
        "turns",
        "turns, axes.actor",
        lambda run, stage, axes: stage.turns is not None and axes.actor == "data",
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
        lambda run, stage, axes: axes.reward.kind != "none" and axes.start.kind in ("f2b", "fixed"),
        "a window that ends the episode censors its outcome: use start full or b2f, or no reward",
    ),
    Constraint(
        "K4",
        "guide, axes.start.kind",
        lambda run, stage, axes: (axes.start.kind == "b2f") != (stage.guide is not None),
        "a backward curriculum replays the demonstrations of a collect stage named as guide; "
        "other curricula take none",
    ),
    Constraint(
        "start",
        "axes.start.kind, axes.actor",
        lambda run, stage, axes: axes.start.kind != "full" and axes.actor != "student",
        "a curriculum is for episodes that the student plays",
    ),
    Constraint(
        "K5",
        "samples, axes.reward.kind",
        lambda run, stage, axes: axes.reward.kind == "grpo" and stage.samples < 2,
        "a group needs at least 2 samples per task",
    ),
    Constraint(
        "K8",
        "axes.actor, axes.signal.coupling",
        lambda run, stage, axes: axes.actor != "student" and axes.advantages,
        "an advantage is for tokens that the student sampled: use coupling loss",
    ),
    Constraint(
        "K10",
        "axes.signal.divergence, axes.signal.coupling",
        lambda run, stage, axes: axes.signal.divergence == "k1" and axes.signal.coupling == "loss",
        "k1 as a loss has no gradient in expectation: use coupling advantage, or rho_k3",
    ),
    Constraint(
        "coupling",
        "axes.signal.divergence, axes.signal.coupling",
        lambda run, stage, axes: (
            axes.signal.divergence not in ("none", "k1") and axes.signal.coupling == "advantage"
        ),
        "only k1 enters as an advantage; use coupling loss",
    ),
    Constraint(
        "K11",
        "sampling, axes.signal",
        lambda run, stage, axes: axes.actor == "student" and not _sampling_is_plain(run, stage),
        "teacher and student are scored at temperature 1 over the whole vocabulary, so training "
        "rollouts must be sampled that way (temperature 1, top_p 1, top_k 0)",
    ),
    Constraint(
        "nothing",
        "axes.signal.divergence, axes.reward.kind",
        lambda run, stage, axes: axes.signal.divergence == "none" and axes.reward.kind == "none",
        "neither a signal nor a reward: there is nothing to learn from",
    ),
)


def check(run: RunConfig, stage: TrainStage, axes: Axes) -> None:
    """Refuse a stage that breaks a constraint, naming stage, rule, keys and remedy."""
    for constraint in CONSTRAINTS:
        if constraint.broken(run, stage, axes):
            where = f"stages.{stage.name}: {constraint.keys} ({constraint.name})"
            raise ConfigError(f"{where}: {constraint.remedy}")
