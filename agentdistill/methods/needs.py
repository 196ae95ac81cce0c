"""What a method needs of a teacher that is not in this process, and whether one gives it.

Invariant: a need names the key that causes it, so that a refusal says what to change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from agentdistill.config import ApiModel, ModelConfig, RunConfig, TrainStage, VllmModel
from agentdistill.engines.base import Capabilities
from agentdistill.errors import ConfigError
from agentdistill.methods import rules
from agentdistill.methods.space import FULL, Axes, SignalAxis


@dataclass(frozen=True, slots=True)
class Need:
    """One thing.

    Attributes:
        what: ``ids`` (acts by token ids), ``sampled`` (log-probabilities of given tokens),
            ``top_k`` (those of the ``k`` likeliest, too) or ``full`` (whole distributions).
        why: the key and its value.
        k: of ``top_k``.
    """

    what: str
    why: str
    k: int = 0

    def met(self, able: Capabilities) -> bool:
        """Whether ``able`` is enough."""
        if self.what == "top_k":
            return able.top_k >= self.k
        return bool(getattr(able, self.what))

    def __str__(self) -> str:
        """As a refusal says it."""
        word = f"its {self.k} likeliest tokens" if self.what == "top_k" else _WORDS[self.what]
        return f"{self.why} needs {word}"


_WORDS = {
    "ids": "a teacher that acts by token ids",
    "sampled": "log-probabilities of given tokens",
    "full": "whole distributions",
}


def of_teacher(axes: Axes) -> list[Need]:
    """What an external teacher must give."""
    found = [Need("ids", "axes.actor='teacher'")] if axes.actor == "teacher" else []
    if not axes.scores or axes.scorer.source != "external":
        return found
    for signal in axes.signals:
        if signal.divergence != "nll":
            found.append(_of_signal(axes, signal))
    for level, choice in rules.chosen(axes):
        needed = rules.find(level, choice).needs
        for column, what in (("logp/teacher", "sampled"), ("entropy/teacher", "full")):
            if column in needed:
                found.append(Need(what, f"{level} rule {choice.name!r}"))
    if axes.scorer.stored:
        found.append(Need("full", "axes.scorer.stored=True (entropies are kept, too)"))
    return found


def _of_signal(axes: Axes, signal: SignalAxis) -> Need:
    why = f"axes.signal.divergence={signal.divergence!r}"
    if signal.divergence not in FULL:
        return Need("sampled", why)
    moves = any(key.startswith("signal.") for key in axes.schedules)
    plain = signal.share == 1 and signal.temperature == 1 and not moves
    if signal.divergence == "forward_kl" and signal.support == "teacher" and plain:
        if signal.top_k is not None:
            return Need("top_k", f"{why} on support='teacher', top_k={signal.top_k}", signal.top_k)
        return Need("full", f"{why} without top_k")
    return Need("full", why)


def by_ids(stage: TrainStage, axes: Axes) -> bool:
    """Whether the stage's teacher is needed by its tokens, and not by its text alone."""
    return stage.teacher is not None and bool(of_teacher(axes))


def top_k(axes: Axes) -> int:
    """How many of the teacher's likeliest tokens are compared; 0 where none are."""
    return max((need.k for need in of_teacher(axes)), default=0)


def lacking(axes: Axes, able: Capabilities) -> list[str]:
    """What the method needs of a teacher and ``able`` does not give, with the reasons."""
    unmet: Iterable[Need] = (need for need in of_teacher(axes) if not need.met(able))
    return [str(need) for need in dict.fromkeys(unmet)]


def known(config: ModelConfig | None) -> Capabilities | None:
    """What a model elsewhere can give at most, by its kind; None for weights that are here."""
    if isinstance(config, VllmModel):
        return Capabilities(ids=True, sampled=True, top_k=config.top_k, text=True)
    return Capabilities(text=True) if isinstance(config, ApiModel) else None


def check(run: RunConfig, stage: TrainStage, axes: Axes) -> None:
    """Refuse a teacher that can never give what ``axes`` need, before anybody is asked."""
    if stage.teacher is not None:
        refuse(stage.name, stage.teacher, axes, known(run.models.get(stage.teacher)))


def refuse(stage: str, teacher: str, axes: Axes, able: Capabilities | None) -> None:
    """Refuse a teacher that lacks something, with the reasons; None lacks nothing.

    Raises:
        ConfigError: it lacks something.
    """
    missing = [] if able is None else lacking(axes, able)
    if not missing:
        return
    remedy = "load the teacher in this process (kind: local), or choose a method that needs less"
    if able is not None and not able.ids:
        remedy = (
            "it answers in text only: let it play a collect stage (policy) and learn from its "
            "episodes with sft, or use it for demonstrations and in a cascade"
        )
    notes = f" [{'; '.join(able.notes)}]" if able is not None and able.notes else ""
    raise ConfigError(
        f"cannot give what this method needs: {'; '.join(missing)}; {remedy}{notes}",
        key=f"stages.{stage}.teacher",
        value=teacher,
    )
