"""What a stage learns from: the episodes of one iteration, played, drawn or both.

Invariants
----------
* The episodes of iteration n depend on the run's seed, n and the weights only.
* What is on disk is what was trained on: groups are edited before they are written.
* Environment steps count what the actor caused; replayed steps are counted beside them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from agentdistill import contexts
from agentdistill.config import TrainStage
from agentdistill.methods.space import Axes
from agentdistill.policy import Policy, derive_seed
from agentdistill.records import Start, Task, Trajectory
from agentdistill.render import materialise
from agentdistill.rollout import Request, rollout, run, sound
from agentdistill.store import ShardRef, Store
from agentdistill.tasks import TaskStream, recorded

if TYPE_CHECKING:
    from agentdistill.run import Loaded, Run, Voice

Notes = Callable[[Sequence[Trajectory], int], list[str | None]]
"""(trajectories, iteration) → the note about each, None where none can be written."""


class Experience:
    """Gives a stage its episodes, iteration by iteration."""

    def __init__(
        self,
        the_run: Run,
        stage: TrainStage,
        axes: Axes,
        student: Loaded,
        teacher: Voice | None,
        store: Store,
        notes: Notes,
    ) -> None:
        """Load the recorded episodes that the stage names."""
        self.context, self.stage, self.axes, self.store = the_run, stage, axes, store
        self.seed = derive_seed(the_run.config.seed, "stage", stage.name)
        self.student, self.teacher, self._notes = student, teacher, notes
        self.data = self._data()
        replays = axes.start.kind == "b2f"
        guide = the_run.episodes(stage.guide) if stage.guide and replays else []
        self.guide = {t.task.key: t for t in guide}
        self.tasks = self._tasks()
        self.last: list[Trajectory] = []
        """The episodes of the last iteration."""
        self.totals = {"env_steps": 0, "replayed_steps": 0, "episodes": 0, "scored_tokens": 0}

    def _data(self) -> list[Trajectory]:
        """The recorded episodes, as the student reads them."""
        if self.stage.data is None:
            return []
        episodes = self.context.episodes(self.stage.data)[: self.stage.limit]
        if self.stage.hints == "drop":
            episodes = [contexts.forget_hints(trajectory) for trajectory in episodes]
        if self.axes.actor == "data" and self.axes.context.reader == "actor":
            notes = self._notes(episodes, 0)
            episodes = [self._informed(*pair) for pair in zip(episodes, notes, strict=True)]
        return [self._readable(trajectory) for trajectory in episodes]

    def _informed(self, trajectory: Trajectory, note: str | None) -> Trajectory:
        """``trajectory`` as if its actor had read ``note``; only a share of all are."""
        chance = random.Random(derive_seed(self.seed, "informed", trajectory.id)).random()
        if note is None or chance >= self.axes.informed_share:
            return trajectory
        provenance = {**trajectory.provenance, "note": note}
        return replace(trajectory, provenance=provenance, streams=())

    def _readable(self, trajectory: Trajectory) -> Trajectory:
        mine = self.student.renderer
        if trajectory.streams and trajectory.provenance.get("renderer") == mine.fingerprint:
            return trajectory
        return materialise(trajectory, mine)

    def _tasks(self) -> TaskStream:
        """Tasks that have a demonstration, where one is replayed or read; else of the split."""
        shown = self.axes.start.kind == "b2f" or self.axes.context.kind in ("gold", "actions")
        if self.stage.guide is None or not shown:
            return TaskStream.of_split(self.context.env, self.stage.split, self.seed)
        tasks = {t.task.key: t.task for t in self.context.episodes(self.stage.guide)}
        return TaskStream.of_list(list(tasks.values()), self.seed)

    def follow(self, axes: Axes) -> None:
        """Go on at ``axes``, whose schedules may have moved any number."""
        self.axes = axes

    # -- one iteration ----------------------------------------------------------------------------

    def plays(self, n: int) -> bool:
        """Whether somebody plays iteration ``n``, and it is not drawn from what is recorded."""
        if self.axes.actor != "mixed":
            return self.axes.actor not in ("data", "cached")
        draw = random.Random(derive_seed(self.seed, "mixed", n)).random()
        return draw < self.axes.student_share

    def of(self, n: int) -> tuple[list[Trajectory], list[ShardRef]]:
        """The episodes of iteration ``n``, and where they were written."""
        self.last, shards = self._of(n)
        return self.last, shards

    def _of(self, n: int) -> tuple[list[Trajectory], list[ShardRef]]:
        if not self.plays(n):
            indices = recorded(len(self.data), self.stage.tasks, n, self.seed)
            return [self.data[i] for i in indices], []
        shard = self.store.shard(self.stage.name, n)
        if shard is not None:  # written before a crash: the same rollouts need no second play
            trajectories = list(self.store.read(shard))
            self._retold(self.tasks.take(len(trajectories) // self.stage.samples), trajectories, n)
        else:
            trajectories = self._edited(self._collect(n), n)
            shard = self.store.write(self.stage.name, n, trajectories)
        return [self._readable(t) for t in trajectories], [shard]

    def count(self, trajectories: Sequence[Trajectory], scored: int, n: int) -> None:
        """Add an iteration to the totals."""
        self.totals["episodes"] += len(trajectories)
        self.totals["scored_tokens"] += scored
        if self.plays(n):
            spent = sum(t.provenance.get("edit_steps", 0) for t in trajectories)
            self.totals["env_steps"] += spent + sum(t.env_steps for t in trajectories)
            self.totals["replayed_steps"] += sum(len(t.start.actions) for t in trajectories)

    def _collect(self, n: int) -> list[Trajectory]:
        """The episodes of iteration n: of so many tasks, or until so many turns were acted."""
        if self.stage.turns is None:
            return sound(self._play(self._requests(n, self.stage.tasks)), self.stage.max_fault_rate)
        each = self.stage.samples * self._longest(n)
        played: list[Trajectory] = []
        left = self.stage.turns
        while left > 0:  # never more tasks at once than must fit
            wave = self._play(self._requests(n, max(1, left // each), len(played)))
            played += wave
            acted = sum(len(t.acted) for t in wave)
            left -= acted
            if not acted:
                break
        return sound(played, self.stage.max_fault_rate)

    def _longest(self, n: int) -> int:
        """Turns that an episode of iteration n can have at most."""
        most = self.context.max_turns
        lengths = {len(guide.turns) for guide in self.guide.values()}
        known = {min(lengths), max(lengths)} if lengths else {None}
        curriculum = self.axes.start.curriculum()
        return max(curriculum.plan(n, length, most).horizon or most for length in known)

    def _requests(self, n: int, tasks: int, before: int = 0) -> list[Request]:
        """Episodes of the next ``tasks`` tasks, after ``before`` others of this iteration."""
        requests: list[Request] = []
        chosen = self.tasks.take(tasks)
        notes = self._told(chosen, n) if self.axes.actor == "informed" else [""] * len(chosen)
        for task, note in zip(chosen, notes, strict=True):
            start, expected, horizon = self._start(task, n)
            for sample in range(self.stage.samples):
                place = before + len(requests)
                requests.append(
                    Request(
                        task,
                        derive_seed(self.seed, n, task.key, sample, place),
                        group=f"{self.stage.name}/{n}/{place // self.stage.samples}",
                        sample=sample,
                        start=start,
                        expected=expected,
                        horizon=horizon,
                        counter=n,
                        note=note,
                        provenance=self._provenance(n),
                    )
                )
        return requests

    def _told(self, tasks: Sequence[Task], n: int) -> list[str]:
        """The note of each task for an actor that reads it; "" where none can be written."""
        nobody = [Trajectory(t, "", 0, (), (), "failure", False, 0.0) for t in tasks]
        return [text or "" for text in self._notes(nobody, n)]

    def _retold(self, tasks: Sequence[Task], played: Sequence[Trajectory], n: int) -> None:
        """Ask again for the notes that iteration ``n`` was played with: choices are counted."""
        if self.axes.actor == "informed":
            self._told(tasks, n)
        if self.axes.group.edit == "hint":
            self._told([played[places[0]].task for places in _failed(played)], n)

    def _start(self, task: Task, n: int) -> tuple[Start, tuple[str, ...] | None, int | None]:
        """Where the curriculum lets an episode of ``task`` begin, and for how long."""
        guide = self.guide.get(task.key)
        turns = guide.turns if guide else ()
        curriculum = self.axes.start.curriculum()
        found = curriculum.plan(n, len(turns) or None, self.context.max_turns)
        if guide is None or not found.start:
            return Start(), None, found.horizon
        replayed = turns[: found.start]
        chosen = tuple(action for turn in replayed for action in turn.actions)
        expected = tuple(result.observation for turn in replayed for result in turn.results)
        return Start(chosen, f"{self.stage.guide}/{guide.id}"), expected, found.horizon

    @property
    def _actor(self) -> Voice:
        taught = self.axes.actor == "teacher" and self.teacher is not None
        return self.teacher if taught and self.teacher else self.student

    def _provenance(self, n: int) -> dict[str, Any]:
        return {
            "run": self.context.config.name,
            "stage": self.stage.name,
            "iteration": n,
            "policy": self._actor.name,
            "seed": self.context.config.seed,
            "env": self.context.env.card.to_json(),
            "renderer": self._actor.renderer.fingerprint,
            "instruction": self._actor.renderer.instruction,
        }

    def _play(self, requests: Sequence[Request], policy: Policy | None = None) -> list[Trajectory]:
        config = self.context.config
        return run(
            rollout(
                policy or self.context.acting(self._actor, self.stage.sampling),
                self.context.make_env,
                requests,
                concurrency=config.concurrency,
                max_turns=config.env.max_turns,
                limits=config.limits,
                pool=self.context.pool,
                grammar=config.prompt.grammar,
            )
        )

    # -- group edits ------------------------------------------------------------------------------

    def _edited(self, played: list[Trajectory], n: int) -> list[Trajectory]:
        """``played``, with better samples in the groups where nobody succeeded."""
        axis = self.axes.group
        if axis.edit == "none":
            return played
        failed = _failed(played)
        left = [(places, "") for places in failed]
        if axis.edit == "hint":
            hints = self._told([played[places[0]].task for places in failed], n)
            left = [(places, note) for places, note in zip(failed, hints, strict=True) if note]
        spent = 0
        for attempt in range(axis.attempts):
            if not left:
                break
            left, steps = self._attempt(played, left, n, attempt)
            spent += steps
        if spent:  # counted with the batch, also when it is read back after a crash
            provenance = {**played[0].provenance, "edit_steps": spent}
            played[0] = replace(played[0], provenance=provenance)
        return played

    def _attempt(
        self, played: list[Trajectory], groups: list[tuple[list[int], str]], n: int, attempt: int
    ) -> tuple[list[tuple[list[int], str]], int]:
        """Try once for every group; return those that still fail, and the steps it took.

        What succeeds takes the places of some failed ones in ``played``; with hints only where all
        of them do.
        """
        size, taught = self.axes.group.replace, self.axes.group.edit == "teacher"
        policy = self._lender if taught else None
        wanted = [r for at, note in groups for r in self._again(played[at[0]], note, n, attempt)]
        tried = self._play(wanted, policy)
        left = []
        for number, (places, note) in enumerate(groups):
            mine = tried[number * size : (number + 1) * size]
            won = [t for t in mine if t.success and not t.faults]
            if len(won) < (1 if taught else size):
                left.append((places, note))
                continue
            chance = random.Random(derive_seed(self.seed, "edit", n, played[places[0]].group))
            chosen = chance.sample(places, min(len(won), len(places)))
            for place, better in zip(chosen, won, strict=False):
                edited = contexts.lent if taught else contexts.forget_note
                told = edited(better, self.student.renderer)
                played[place] = replace(told, sample=played[place].sample)
        return left, sum(t.env_steps for t in tried)

    @cached_property
    def _lender(self) -> Policy:
        """The teacher, by its text."""
        return self.context.policy(str(self.stage.teacher), self.stage.sampling, "teacher")

    def _again(self, failed: Trajectory, note: str, n: int, attempt: int) -> list[Request]:
        """More samples of one task, with a note in the prompt where there is one."""
        return [
            Request(
                failed.task,
                derive_seed(self.seed, "hint", n, failed.group, attempt, sample),
                group=failed.group,
                sample=self.stage.samples * (attempt + 1) + sample,
                counter=n,
                note=note,
                provenance=self._provenance(n),
            )
            for sample in range(self.axes.group.replace)
        ]


def _failed(played: Sequence[Trajectory]) -> list[list[int]]:
    """Places of the groups in which nobody succeeded without help, and nothing broke."""
    groups: dict[str, list[int]] = {}
    for place, trajectory in enumerate(played):
        groups.setdefault(trajectory.group, []).append(place)

    def spoils(t: Trajectory) -> bool:
        return bool(t.faults) or (t.success and "edit" not in t.provenance)

    return [places for places in groups.values() if not any(spoils(played[i]) for i in places)]
