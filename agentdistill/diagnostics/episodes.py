"""Episodes from a store through two models of their run, into a table that can be measured.

Invariants: whole distributions exist for one chunk of rows at a time; an episode whose token ids
the student does not read is told again from its texts, and counted; one that was lost to a fault
is left out, and counted; a stream that is too long is dropped and counted, never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agentdistill import contexts
from agentdistill.config import CollectStage, StageConfig, TrainStage, load
from agentdistill.diagnostics.measures import Diagnosis, diagnose
from agentdistill.divergence import log_probs, reverse_kl, tvd
from agentdistill.engines.forward import (
    LOGITS_AT_ONCE,
    device_of,
    evaluating,
    hidden_states,
    logits,
    vocabulary,
)
from agentdistill.errors import ConfigError
from agentdistill.iteration import context_length
from agentdistill.methods.index import get
from agentdistill.methods.space import Axes
from agentdistill.records import Trajectory
from agentdistill.render import materialise
from agentdistill.run import Loaded, Run
from agentdistill.store import Commit, Store
from agentdistill.table import Table, build, column, gather
from agentdistill.views import PLAIN, ViewBuilder, plain, within

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# -- two models ------------------------------------------------------------------------------------


@torch.no_grad()
def score(
    table: Table,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    *,
    view: str = PLAIN,
    micro_tokens: int = 16384,
) -> None:
    """Add to ``table`` what :func:`diagnose` reads of two models.

    Where one of them has more logits (a head padded to a round size), the others are compared.

    Args:
        table: with ``view``.
        student: reads the streams.
        teacher: reads ``view``.
        view: name of a view.
        micro_tokens: ids per forward pass.
    """
    needed = table.acted & table.valid() & table.valid(view)
    names = [column(what, "student") for what in ("logp", "entropy")]
    whats = ("logp", "entropy", "reverse_kl", "tvd", "agree")
    names += [column(what, "teacher", view) for what in whats]
    found = torch.full((len(names), len(table)), torch.nan)
    with evaluating(student.modules()), evaluating(teacher.modules()):
        for part in table.micro_batches(view, micro_tokens):
            *mine, rows = gather(table, PLAIN, part, needed)
            *theirs, _ = gather(table, view, part, needed)
            if len(rows):
                token = table.index["token"][rows]
                hidden = hidden_states(student, *mine), hidden_states(teacher, *theirs)
                found[:, rows] = _compared((student, teacher), hidden, token).to(found)
    for name, values in zip(names, found, strict=True):
        table[name] = values


def _compared(
    models: tuple[PreTrainedModel, PreTrainedModel], hidden: tuple[Tensor, Tensor], token: Tensor
) -> Tensor:
    """The columns of :func:`score` [7, n] of rows with these hidden states, chunk by chunk."""
    place = device_of(models[0])
    chunk = max(1, LOGITS_AT_ONCE // max(map(vocabulary, models)))
    parts = []
    for mine, theirs, ids in zip(*(torch.split(x, chunk) for x in (*hidden, token)), strict=True):
        s, t = log_probs(logits(models[0], mine)), log_probs(logits(models[1], theirs)).to(place)
        ids = ids.to(place)[:, None]
        size = min(s.shape[-1], t.shape[-1])
        both = s[:, :size], t[:, :size]
        values = [
            s.gather(-1, ids)[:, 0],
            -(s.exp() * s).sum(-1),
            t.gather(-1, ids)[:, 0],
            -(t.exp() * t).sum(-1),
            reverse_kl(*both),
            tvd(*both),
            (both[0].argmax(-1) == both[1].argmax(-1)).to(s.dtype),
        ]
        parts.append(torch.stack(values).cpu())
    return torch.cat(parts, dim=1)


# -- a stage on disk -------------------------------------------------------------------------------


def of_run(
    folder: str | Path,
    stage: str | None = None,
    *,
    iterations: tuple[int | None, int | None] = (None, None),
    last: int | None = None,
    student: str | None = None,
    teacher: str | None = None,
) -> Diagnosis:
    """Hold the episodes of a stage against two models of its run.

    A stage that only learns from recorded episodes is asked about those.

    Args:
        folder: of the run.
        stage: its name; None is the last train stage that has begun.
        iterations: from the first to before the second, as in a slice; of the stage's commits.
        last: only so many of them, the latest.
        student: a train stage or model; None is the stage's own, at its end if it has ended, else
            at its start.
        teacher: a train stage or model; None is the stage's own.

    Raises:
        ConfigError: there is no such run, stage or model, it has no episodes, or the models read
            different token ids.
        StoreError: a file cannot be read.
    """
    with opened(Path(folder)) as the_run:
        config = _stage(the_run, stage)
        names = _names(the_run, config, student, teacher)
        episodes = _episodes(the_run, config, iterations, last)
        return _held(config, _loaded(the_run, names), episodes)


@dataclass(frozen=True, slots=True)
class _Episodes:
    """What is held against the models."""

    trajectories: list[Trajectory]
    iterations: tuple[int, int]
    drawn_by: str
    """The model that drew the tokens without reading more than is shown here, "" for others."""


def _held(config: StageConfig, models: tuple[Loaded, Loaded], episodes: _Episodes) -> Diagnosis:
    student, teacher = models
    sound = [t for t in episodes.trajectories if not t.faults]
    told = [t if reads(student, t) else materialise(t, student.renderer) for t in sound]
    builder = contexts.without_note(student.renderer) if _informed(config) else plain
    table, dropped = table_of(told, student, builder)
    if episodes.drawn_by != student.name:
        table["logp/sampler"] = torch.full((len(table),), torch.nan)
    score(table, student.model, teacher.model)
    return replace(
        diagnose(table),
        stage=config.name,
        student=student.name,
        teacher=teacher.name,
        iterations=episodes.iterations,
        faults=len(episodes.trajectories) - len(sound),
        dropped=dropped,
        from_text=sum(a is not b for a, b in zip(told, sound, strict=True)),
    )


def opened(folder: Path) -> Run:
    """The run in ``folder``, wherever that lies now.

    Raises:
        ConfigError: it is none of a run.
    """
    if not (folder / "config.yaml").is_file():
        remedy = "is not the folder of a run (no config.yaml); `agentdistill train` prints its path"
        raise ConfigError(remedy, key="run", value=str(folder))
    the_run = Run(load(folder / "config.yaml"))
    the_run.path = folder
    return the_run


def reader(the_run: Run, config: StageConfig) -> str | None:
    """Name of the model that acts in a stage, at its end if it has ended; None where none does."""
    if isinstance(config, CollectStage):
        made = the_run.config.policies.get(config.policy)
        name = made.student if made else config.policy
        return None if name in ("expert", "random") else name
    trained = (the_run.folder(config.name) / "model").is_dir()
    return config.name if trained else config.init or config.model


def reads(model: Loaded, trajectory: Trajectory) -> bool:
    """Whether the token ids of ``trajectory`` mean to ``model`` what they meant to its actor."""
    mine = model.renderer.fingerprint
    return bool(trajectory.streams) and trajectory.provenance.get("renderer") == mine


def table_of(
    trajectories: Sequence[Trajectory], model: Loaded, builder: ViewBuilder = plain
) -> tuple[Table, int]:
    """The table of ``trajectories``, and how many streams are too long for ``model``.

    Args:
        trajectories: with streams.
        model: who will read them.
        builder: how; it becomes the plain view.
    """
    table = build(trajectories)
    return table, table.add_view(PLAIN, within(builder, context_length(model)))


def _informed(config: StageConfig) -> bool:
    """Whether the stage's actor read a note that its student will not have."""
    return isinstance(config, TrainStage) and _axes(config).actor == "informed"


def _axes(config: TrainStage) -> Axes:
    return get(config.method).resolve(config.axes)


def _stage(the_run: Run, name: str | None) -> StageConfig:
    stages = the_run.config.stages
    if name is None:
        begun = [s for s in stages if the_run.folder(s.name).is_dir()]
        begun.sort(key=lambda stage: isinstance(stage, TrainStage))
        if not begun:
            raise ConfigError("no stage has begun", key="run", value=str(the_run.path))
        return begun[-1]
    for stage in stages:
        if stage.name == name:
            return stage
    known = ", ".join(stage.name for stage in stages)
    raise ConfigError(f"no such stage; known: {known}", key="stage", value=name)


def _names(
    the_run: Run, config: StageConfig, student: str | None, teacher: str | None
) -> tuple[str, str]:
    """Student and teacher: those that are named, or the stage's own."""
    own = config.teacher if isinstance(config, TrainStage) else None
    names = {"student": student or reader(the_run, config), "teacher": teacher or own}
    for key, name in names.items():
        if name is None:
            remedy = f"stage {config.name} has no {key} of its own; name a train stage or a model"
            raise ConfigError(remedy, key=key, value=None)
    return str(names["student"]), str(names["teacher"])


def _loaded(the_run: Run, names: tuple[str, str]) -> tuple[Loaded, Loaded]:
    """The two models, which must read the same ids."""
    first, second = (the_run.model(name) for name in names)
    if first.renderer.fingerprint != second.renderer.fingerprint:
        remedy = "reads other token ids than the student, so they cannot be compared (K1)"
        raise ConfigError(remedy, key="teacher", value=second.name)
    return first, second


def _episodes(
    the_run: Run, config: StageConfig, span: tuple[int | None, int | None], last: int | None
) -> _Episodes:
    """The committed episodes of a stage, or those that it learns from; only some iterations."""
    source, drawn_by = config.name, reader(the_run, config) or ""
    if isinstance(config, TrainStage):
        played = _axes(config).actor in ("student", "mixed")
        recorded = config.data is not None and not _commits(the_run, source)
        source = str(config.data) if recorded else source
        drawn_by = drawn_by if played and not recorded else ""
    commits = _commits(the_run, source)
    numbers = range(1 + max((c.iteration for c in commits), default=-1))[slice(*span)]
    chosen = [c for c in commits if c.iteration in numbers]
    chosen = chosen[-last:] if last is not None else chosen
    if not chosen:
        known = f"has iterations 0 to {commits[-1].iteration}" if commits else "has no episodes yet"
        raise ConfigError(f"stage {source} {known}", key="iterations", value=list(span))
    with Store(the_run.folder(source), readonly=True) as store:
        found = [t for commit in chosen for ref in commit.shards for t in store.read(ref)]
    limit = config.limit if isinstance(config, TrainStage) and source != config.name else None
    return _Episodes(found[:limit], (chosen[0].iteration, chosen[-1].iteration), drawn_by)


def _commits(the_run: Run, stage: str) -> list[Commit]:
    """The iterations of a stage that count, in order; none where it has not begun."""
    folder = the_run.folder(stage)
    if not folder.is_dir():
        return []
    with Store(folder, readonly=True) as store:
        return sorted(store.commits(stage), key=lambda commit: commit.iteration)
