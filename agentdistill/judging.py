"""Who judges a batch, and what each judge reads: teacher, base, and the student before the update.

Invariants
----------
* Judges score the very tokens that were acted; what else they read is a note that is spliced in.
* A note that cannot be written, or a view that does not fit, masks its rows and is counted.
* Whatever moves between iterations (copies of the student, skills, their counts) is state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agentdistill import contexts
from agentdistill.config import TrainStage
from agentdistill.engines.forward import vocabulary
from agentdistill.errors import ConfigError
from agentdistill.methods import compile as plan
from agentdistill.methods import needs
from agentdistill.methods.space import Axes, ContextAxis
from agentdistill.policy import derive_seed
from agentdistill.records import Trajectory
from agentdistill.rollout import run as wait
from agentdistill.run import Loaded, Voice
from agentdistill.skills import Analyser, ChatAnalyser, Grounded, SkillBank
from agentdistill.table import Table
from agentdistill.teachers.remote import RemoteScorer
from agentdistill.teachers.scorer import LocalScorer, Scorer
from agentdistill.teachers.selves import SelfScorer, silent
from agentdistill.teachers.stored import StoredScorer, weights_identity
from agentdistill.views import within

if TYPE_CHECKING:
    from agentdistill.run import Run

Guide = Mapping[str, Sequence[Trajectory]]
"""Demonstrations by task key."""


class Judges:
    """Scores tables for one stage."""

    def __init__(
        self,
        the_run: Run,
        stage: TrainStage,
        axes: Axes,
        student: Loaded,
        teacher: Voice | None,
        guide: Guide,
    ) -> None:
        """Build the judges; copies of the student are taken now, at its start."""
        self.stage, self.axes, self.student, self._guide = stage, axes, student, guide
        self.seed = derive_seed(the_run.config.seed, "stage", stage.name)
        self.old = LocalScorer(plan.OLD, student.model)
        self.teacher = self._teacher(the_run, teacher)
        self.base = self._base(the_run)
        self.skills = _skills(the_run, stage, axes)

    def _teacher(self, the_run: Run, teacher: Voice | None) -> Scorer | None:
        axis = self.axes.scorer
        if not self.axes.scores:
            return None
        if axis.source == "self":
            model = self.student.model
            return SelfScorer(plan.TEACHER, model, axis.update, every=axis.every, rate=axis.rate)
        assert teacher is not None  # a constraint, checked when the configuration was read
        self._same_language(teacher, "teacher")
        if not isinstance(teacher, Loaded):
            size, top_k = vocabulary(self.student.model), needs.top_k(self.axes)
            return RemoteScorer(plan.TEACHER, teacher.engine, size, top_k)
        scorer = LocalScorer(plan.TEACHER, teacher.model)
        if not axis.stored:
            return scorer
        folder = the_run.folder(self.stage.name) / "scores"
        return StoredScorer(scorer, folder, weights_identity(teacher.model))

    def _base(self, the_run: Run) -> LocalScorer | None:
        if not self.axes.needs_base:
            return None
        if self.stage.base is None:
            return SelfScorer(plan.BASE, self.student.model, "frozen")
        loaded = the_run.model(self.stage.base)
        self._same_language(loaded, "base")
        return LocalScorer(plan.BASE, loaded.model)

    def _same_language(self, other: Voice, key: str) -> None:
        """Judge and student must read the same ids (K1), or the comparison means nothing."""
        if other.renderer.fingerprint != self.student.renderer.fingerprint:
            raise ConfigError(
                "teacher and student have different vocabularies or chat templates, so their "
                "token probabilities cannot be compared (K1); use method kd-sft, or models with "
                "one tokenizer",
                key=f"stages.{self.stage.name}.{key}",
                value=getattr(self.stage, key),
            )

    @property
    def _moving(self) -> dict[str, Any]:
        parts = {"teacher": self.teacher, "base": self.base, "skills": self.skills}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def heads(self) -> plan.Heads:
        """Output head of every judge."""
        judges = {plan.OLD: self.old, plan.TEACHER: self.teacher, plan.BASE: self.base}
        return {name: judge.head for name, judge in judges.items() if judge is not None}

    def follow(self, axes: Axes) -> None:
        """Go on at ``axes``, whose schedules may have moved any number."""
        self.axes = axes
        if isinstance(self.teacher, SelfScorer):
            self.teacher.every, self.teacher.rate = axes.scorer.every, axes.scorer.rate
        if self.skills is not None:
            self.skills.bank.exploration = axes.context.exploration

    def before(self, n: int) -> None:
        """Before the rollout of iteration ``n``: copies are made anew where they are due."""
        if self.teacher is not None:
            self.teacher.before(n)

    def after(self, trajectories: Sequence[Trajectory], n: int) -> dict[str, Any]:
        """After the update: running means move, and what was played becomes skills."""
        if self.teacher is not None:
            self.teacher.after()
        return self.skills.learn(trajectories, n) if self.skills is not None else {}

    # -- what is read -----------------------------------------------------------------------------

    def notes(self, trajectories: Sequence[Trajectory], n: int) -> list[str | None]:
        """The note about each trajectory, None where none can be written."""
        chosen = self.skills.choose(trajectories, n) if self.skills is not None else {}
        axis, seed = self.axes.context, derive_seed(self.seed, "context", n)
        written = contexts.notes(axis, trajectories, guide=self._guide, skills=chosen, seed=seed)
        return _controlled(axis, trajectories, written)

    def add_views(self, table: Table, n: int, limit: int) -> dict[str, Any]:
        """Add the views that the judges and the terms read besides the streams themselves."""
        renderer, metrics = self.student.renderer, dict[str, Any]()
        if plan.student_view(self.axes) == plan.STUDENT:
            table.add_view(plan.STUDENT, within(contexts.without_note(renderer), limit))
        if plan.scorer_view(self.axes) == plan.CONTEXT:
            written = self.notes(table.trajectories, n)
            pairs = zip(table.trajectories, written, strict=True)
            notes = {t.id: text for t, text in pairs if text is not None}
            builder = within(contexts.with_notes(renderer, notes), limit)
            metrics["masked_contexts"] = table.add_view(plan.CONTEXT, builder)
            metrics["without_note"] = sum(text is None for text in written)
        return metrics

    def score(self, table: Table) -> int:
        """Every column that the method needs; return the ids that teacher and base read."""
        micro, tokens = self.stage.micro_tokens, 0
        view = plan.scorer_view(self.axes)
        rows = table.acted
        if self.teacher is not None and (want := plan.wanted(self.axes)):
            tokens += self.teacher.score(table, want, view=view, rows=rows, micro_tokens=micro)
        if self.base is not None and (want := plan.wanted(self.axes, plan.BASE)):
            tokens += self.base.score(table, want, rows=rows, micro_tokens=micro)
        if want := plan.wanted(self.axes, plan.OLD):
            self.old.score(table, want, rows=rows, micro_tokens=micro)
        return tokens

    def silence(self, table: Table) -> dict[str, float]:
        """The share of the scored rows on which a self scorer can say nothing new (K12)."""
        view = plan.scorer_view(self.axes)
        rows = table.acted & table.valid(view)
        if self.teacher is None or not self.teacher.present or not bool(rows.any()):
            return {}
        mute = silent(self.teacher, table, view, plan.student_view(self.axes))
        return {"silent": float(mute[rows].float().mean())}

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What moves between iterations."""
        return {name: part.state_dict() for name, part in self._moving.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        for name, part in self._moving.items():
            part.load_state_dict(state[name])


def _controlled(
    axis: ContextAxis, trajectories: Sequence[Trajectory], notes: list[str | None]
) -> list[str | None]:
    """``notes`` as they are, of another task each, or without what they say."""
    if axis.control == "none":
        return notes
    if axis.control == "empty":
        empty = (axis.text or contexts.TEXTS[axis.kind]).replace("{note}", "")
        return [None if note is None else empty for note in notes]
    of_task = {t.task.key: note for t, note in zip(trajectories, notes, strict=True) if note}
    keys = sorted(of_task)
    following = dict(zip(keys, [*keys[1:], *keys[:1]], strict=True))
    return [
        of_task[following[t.task.key]] if t.task.key in following else None for t in trajectories
    ]


class Skills:
    """The bank of skills of one stage, and who writes them."""

    def __init__(self, bank: SkillBank, analyser: Analyser, reward: str) -> None:
        """``reward`` is the trajectory's attribute that a skill is judged by."""
        self.bank, self._analyser, self._reward = bank, analyser, reward
        self._chosen: dict[str, Any] = {}

    def choose(self, trajectories: Sequence[Trajectory], n: int) -> dict[str, str]:
        """One skill for every task, by trajectory; tasks without any have none.

        A task keeps its skill until :meth:`learn`, and is counted once, however often it is asked
        for: by several waves of rollouts, or again after a crash.
        """
        for key in sorted({t.task.key for t in trajectories} - self._chosen.keys()):
            self._chosen[key] = self.bank.select(key, n)
        found = {key: skill for key, skill in self._chosen.items() if skill is not None}
        return {t.id: found[t.task.key].text for t in trajectories if t.task.key in found}

    def learn(self, trajectories: Sequence[Trajectory], n: int) -> dict[str, Any]:
        """Judge the skills that were used, and write new ones; they are seen from n + 1 on."""
        used = {key: skill for key, skill in self._chosen.items() if skill is not None}
        self._chosen = {}
        for key, skill in used.items():
            rewards = [float(getattr(t, self._reward)) for t in trajectories if t.task.key == key]
            self.bank.reward(key, skill.id, rewards)
        sound = [t for t in trajectories if not t.faults]
        written = wait(self._write(sound))
        for trajectory, text in zip(sound, written, strict=True):
            if text is not None:
                self.bank.add(trajectory.task.key, text, n, trajectory.score)
        missing = sum(text is None for text in written)
        return {"skills": len(self.bank), "used_skills": len(used), "unwritten_skills": missing}

    async def _write(self, trajectories: Sequence[Trajectory]) -> list[str | None]:
        import asyncio

        return list(await asyncio.gather(*map(self._analyser.write, trajectories)))

    def state_dict(self) -> dict[str, Any]:
        """The bank."""
        return self.bank.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, between two iterations."""
        self._chosen = {}
        self.bank.load_state_dict(dict(state))


def _skills(the_run: Run, stage: TrainStage, axes: Axes) -> Skills | None:
    if axes.context.kind != "skill":
        return None
    analyser: Analyser = Grounded()
    if stage.analyser not in (None, "grounded"):
        engine = the_run.answering(str(stage.analyser), "analyser")
        analyser = ChatAnalyser(engine, the_run.env.instruction)
    source = axes.reward.source if axes.reward.kind != "none" else "score"
    return Skills(SkillBank(axes.context.exploration), analyser, source)
