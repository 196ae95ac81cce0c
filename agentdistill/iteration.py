"""One stage of training: iterations of generate, score and update, each a transaction.

Invariants
----------
* After a crash the same command goes on and ends with the same weights: an iteration that was not
  committed runs again from its seeds, on the rollouts that were already written, if any.
* Everything that is remembered between iterations (weights, optimiser, task stream, counters) is
  in the checkpoint; what lies after the last checkpoint is rolled back and runs again.
* The curriculum's n is the iteration (TCOD counts its explorer's batches), not the optimiser step.
* Environment steps count what the actor caused; replayed steps are counted beside them.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentdistill.callbacks import Callback
from agentdistill.checkpoint import Checkpoints, load_state, save_state
from agentdistill.config import TrainStage
from agentdistill.crash import crash_point
from agentdistill.errors import ConfigError, EnvError
from agentdistill.evaluation import play
from agentdistill.files import sync, write_text
from agentdistill.methods import compile as plan
from agentdistill.methods.constraints import check
from agentdistill.methods.index import get
from agentdistill.metrics import of_table, of_trajectories
from agentdistill.optimise import Optimiser, backward
from agentdistill.panel import for_tuning
from agentdistill.policy import derive_seed
from agentdistill.records import Start, Task, Trajectory
from agentdistill.render import materialise
from agentdistill.rollout import Request, rollout, run
from agentdistill.run import Loaded, Run, seeded
from agentdistill.store import ShardRef, Store
from agentdistill.students import local
from agentdistill.table import Table, build
from agentdistill.tasks import TaskStream, recorded
from agentdistill.teachers.scorer import LocalScorer
from agentdistill.views import PLAIN, plain, within


class Training:
    """Trains one model by one method; see :meth:`run`."""

    def __init__(self, the_run: Run, stage: TrainStage, callback: Callback) -> None:
        """Check the stage, load the models, and go back to the last checkpoint if there is one."""
        self.context, self.stage, self.callback = the_run, stage, callback
        self.axes = get(stage.method).resolve(stage.axes)
        check(the_run.config, stage, self.axes)
        self.terms = plan.terms(self.axes)
        self.curriculum = self.axes.start.curriculum()
        self.folder = the_run.folder(stage.name)
        self.seed = derive_seed(the_run.config.seed, "stage", stage.name)
        self.student = the_run.model(stage.init or stage.model)
        self.student.name = self.student.engine.name = stage.name
        self.teacher = the_run.model(stage.teacher) if stage.teacher else None
        self.scorer = LocalScorer(plan.TEACHER, self.teacher.model) if self.teacher else None
        self._same_language()
        self.optimiser = Optimiser(self.student.model, stage)
        self.data = self._data()
        self.guide = {t.task.key: t for t in the_run.episodes(stage.guide)} if stage.guide else {}
        self.tasks = self._tasks()
        self.totals = {"env_steps": 0, "replayed_steps": 0, "episodes": 0, "scored_tokens": 0}
        self.store = Store(self.folder)
        try:
            self.checkpoints = Checkpoints(self.folder / "checkpoints")
            self.iteration = self._resume()
        except BaseException:
            self.store.close()
            raise

    # -- set-up -----------------------------------------------------------------------------------

    def _same_language(self) -> None:
        """Teacher and student must read the same ids (K1), or the comparison means nothing."""
        if self.teacher is None or not self.axes.scores:
            return
        if self.teacher.renderer.fingerprint != self.student.renderer.fingerprint:
            raise ConfigError(
                "teacher and student have different vocabularies or chat templates, so their "
                "token probabilities cannot be compared (K1); use method kd-sft, or models with "
                "one tokenizer",
                key=f"stages.{self.stage.name}.teacher",
                value=self.stage.teacher,
            )

    def _data(self) -> list[Trajectory]:
        """The recorded episodes, as the student reads them."""
        if self.stage.data is None:
            return []
        episodes = self.context.episodes(self.stage.data)[: self.stage.limit]
        return [self._readable(trajectory) for trajectory in episodes]

    def _readable(self, trajectory: Trajectory) -> Trajectory:
        mine = self.student.renderer
        if trajectory.streams and trajectory.provenance.get("renderer") == mine.fingerprint:
            return trajectory
        return materialise(trajectory, mine)

    def _tasks(self) -> TaskStream:
        if self.guide:
            return TaskStream.of_list([t.task for t in self.guide.values()], self.seed)
        return TaskStream.of_split(self.context.env, self.stage.split, self.seed)

    def _resume(self) -> int:
        """First iteration that has to run."""
        found = self.checkpoints.latest()
        done = found[0] if found else 0
        if self.store.commits(self.stage.name):
            self.store.rollback(self.stage.name, done - 1)
        if found:
            folder = found[1]
            local.load_weights(self.student.model, folder / "model")
            state = load_state(folder / "state.pt", self.optimiser)
            self.tasks.load_state_dict(state["tasks"])
            self.totals = dict(state["totals"])
        self.student.engine.publish(done)
        return done

    # -- the loop ---------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Run to the end; save the model; return the summary of the stage.

        However it ends, somebody else may write to the stage's folder afterwards.
        """
        with self.store:
            return self._run()

    def _run(self) -> dict[str, Any]:
        began = time.monotonic()
        self.callback.on_stage_start(self.stage, self.folder, self.iteration)
        while self._progress() < 1.0:
            metrics = self._iterate(self.iteration)
            self.iteration += 1
            progress = self._progress()
            metrics.update(self._tune())
            self.callback.on_iteration(self.stage, self.iteration - 1, metrics, progress)
            if self.iteration % self.stage.checkpoint_every == 0 or progress >= 1.0:
                self._checkpoint()
        summary = {
            "stage": self.stage.name,
            "method": self.stage.method,
            "iterations": self.iteration,
            **self.totals,
            "seconds": round(time.monotonic() - began, 3),
        }
        local.save(self.student.model, self.student.tokenizer, self.folder / "model")
        for file in (self.folder / "model").iterdir():
            sync(file)
        write_text(self.folder / "done.json", json.dumps(summary))
        self.callback.on_stage_end(self.stage, summary)
        return summary

    def _progress(self) -> float:
        """Share of the stage that is done: by iterations or by environment steps."""
        shares = [0.0]
        if self.stage.iterations:
            shares.append(self.iteration / self.stage.iterations)
        if self.stage.env_steps:
            shares.append(self.totals["env_steps"] / self.stage.env_steps)
        return min(1.0, max(shares))

    def _iterate(self, n: int) -> dict[str, Any]:
        """Generate, score, update, commit."""
        clock = _Clock()
        trajectories, shards = self._generate(n)
        clock.lap("generate")
        crash_point("iteration:after-generate")
        table, dropped = self._table(trajectories)
        scored = self._score(table)
        metrics = {**plan.fill(table, self.axes), "dropped_streams": dropped}
        clock.lap("score")
        metrics.update(self._update(table, n))
        clock.lap("update")
        crash_point("iteration:after-update")
        self._count(trajectories, scored)
        metrics.update(of_trajectories(trajectories), **of_table(table, self.axes))
        metrics.update({f"total/{name}": value for name, value in self.totals.items()})
        metrics.update(clock.seconds)
        if shards:  # an iteration on recorded episodes leaves nothing but weights: its checkpoint
            self.store.commit(self.stage.name, n, shards, {"totals": self.totals})
        return metrics

    def _count(self, trajectories: Sequence[Trajectory], scored: int) -> None:
        self.totals["episodes"] += len(trajectories)
        self.totals["scored_tokens"] += scored
        if self.axes.actor != "data":
            self.totals["env_steps"] += sum(t.env_steps for t in trajectories)
            self.totals["replayed_steps"] += sum(len(t.start.actions) for t in trajectories)

    # -- generate ---------------------------------------------------------------------------------

    def _generate(self, n: int) -> tuple[list[Trajectory], list[ShardRef]]:
        if self.axes.actor == "data":
            return self._draw(n), []
        shard = self.store.shard(self.stage.name, n)
        if shard is not None:  # written before a crash: the same rollouts need no second play
            trajectories = list(self.store.read(shard))
            self.tasks.take(len(trajectories) // self.stage.samples)
        else:
            trajectories = self._collect(n)
            shard = self.store.write(self.stage.name, n, trajectories)
        return [self._readable(t) for t in trajectories], [shard]

    def _collect(self, n: int) -> list[Trajectory]:
        """The episodes of iteration n: of so many tasks, or until so many turns were acted."""
        if self.stage.turns is None:
            return self._checked(self._play(self._requests(n, self.stage.tasks)))
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
        return self._checked(played)

    def _longest(self, n: int) -> int:
        """Turns that an episode of iteration n can have at most."""
        most = self.context.max_turns
        lengths = {len(guide.turns) for guide in self.guide.values()}
        known = {min(lengths), max(lengths)} if lengths else {None}
        return max(self.curriculum.plan(n, length, most).horizon or most for length in known)

    def _draw(self, n: int) -> list[Trajectory]:
        """The n-th batch of the recorded episodes."""
        return [self.data[i] for i in recorded(len(self.data), self.stage.tasks, n, self.seed)]

    def _requests(self, n: int, tasks: int, before: int = 0) -> list[Request]:
        """Episodes of the next ``tasks`` tasks, after ``before`` others of this iteration."""
        requests: list[Request] = []
        for task in self.tasks.take(tasks):
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
                        provenance=self._provenance(n),
                    )
                )
        return requests

    def _start(self, task: Task, n: int) -> tuple[Start, tuple[str, ...] | None, int | None]:
        """Where the curriculum lets an episode of ``task`` begin, and for how long."""
        guide = self.guide.get(task.key)
        turns = guide.turns if guide else ()
        found = self.curriculum.plan(n, len(turns) or None, self.context.max_turns)
        if guide is None or not found.start:
            return Start(), None, found.horizon
        replayed = turns[: found.start]
        chosen = tuple(action for turn in replayed for action in turn.actions)
        expected = tuple(result.observation for turn in replayed for result in turn.results)
        return Start(chosen, f"{self.stage.guide}/{guide.id}"), expected, found.horizon

    def _provenance(self, n: int) -> dict[str, Any]:
        actor = self.teacher if self.axes.actor == "teacher" and self.teacher else self.student
        return {
            "run": self.context.config.name,
            "stage": self.stage.name,
            "iteration": n,
            "policy": actor.name,
            "seed": self.context.config.seed,
            "env": self.context.env.card.to_json(),
            "renderer": actor.renderer.fingerprint,
            "instruction": actor.renderer.instruction,
        }

    def _play(self, requests: Sequence[Request]) -> list[Trajectory]:
        actor = self.teacher if self.axes.actor == "teacher" and self.teacher else self.student
        config = self.context.config
        return run(
            rollout(
                self.context.acting(actor, self.stage.sampling),
                self.context.make_env,
                requests,
                concurrency=config.concurrency,
                max_turns=config.env.max_turns,
                limits=config.limits,
                pool=self.context.pool,
                grammar=config.prompt.grammar,
            )
        )

    def _checked(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """``trajectories``, unless too many of them ended in a fault."""
        faulty = [t for t in trajectories if t.faults]
        if len(faulty) > self.stage.max_fault_rate * len(trajectories):
            first = faulty[0].faults[0]
            raise EnvError(
                f"{len(faulty)} of {len(trajectories)} episodes ended in a fault, more than "
                f"max_fault_rate={self.stage.max_fault_rate}; first: {first.kind}: {first.message}"
            )
        return trajectories

    # -- score and update -------------------------------------------------------------------------

    def _table(self, trajectories: Sequence[Trajectory]) -> tuple[Table, int]:
        """The rows, and how many streams are too long to have any."""
        table = build([t for t in trajectories if t.streams])
        limit = self.stage.max_length or context_length(self.student)
        dropped = table.add_view(PLAIN, within(plain, limit))
        if table.streams and dropped == len(table.streams):
            raise ConfigError(
                f"every stream is longer than {limit} tokens; raise it or shorten the prompt",
                key=f"stages.{self.stage.name}.max_length",
                value=self.stage.max_length,
            )
        return table, dropped

    def _score(self, table: Table) -> int:
        """The teacher's columns, then the student's own; return the teacher's scored tokens."""
        tokens, micro = 0, self.stage.micro_tokens
        want = plan.wanted(self.axes)
        if want and self.scorer is not None:
            tokens = self.scorer.score(table, want, rows=table.acted, micro_tokens=micro)
        if plan.needs_old(self.axes):
            own = LocalScorer(plan.OLD, self.student.model)
            own.score(table, rows=table.acted, micro_tokens=micro)
        return tokens

    def _update(self, table: Table, n: int) -> dict[str, float]:
        """``updates`` optimiser steps, each over its share of the trajectories."""
        heads = {} if self.scorer is None else {plan.TEACHER: self.scorer.head}
        numbers = list(range(len(table.trajectories)))
        random.Random(derive_seed(self.seed, "update", n)).shuffle(numbers)
        metrics: dict[str, float] = {}
        self.student.model.train()
        with seeded(derive_seed(self.seed, "dropout", n), self.student.model.device):
            for step in range(self.stage.updates):
                batch = backward(
                    self.student.model,
                    table,
                    self.terms,
                    heads,
                    micro_tokens=self.stage.micro_tokens,
                    trajectories=numbers[step :: self.stage.updates],
                )
                if batch.rows:
                    metrics = {**batch.as_metrics(), **self.optimiser.step(self._progress())}
        self.student.engine.publish(n + 1)
        return metrics

    def _tune(self) -> dict[str, Any]:
        """What the student does on the tune split, where the stage asks for it now."""
        every = self.stage.evaluate_every
        if not every or self.iteration % every:
            return {}
        config = self.context.config.evaluate
        panel = for_tuning(self.context.config, self.context.env)
        found: dict[str, Any] = {}
        for mode in config.modes:
            result = play(self.context, self.student, mode, config, panel)
            for name in ("success", "optimal", "invalid"):
                found[f"tune/{mode}/{name}"] = getattr(result, name)
        return found

    def _checkpoint(self) -> Path:
        state = {"tasks": self.tasks.state_dict(), "totals": self.totals}

        def write(folder: Path) -> None:
            local.save(self.student.model, self.student.tokenizer, folder / "model")
            save_state(folder / "state.pt", self.optimiser, state=state)

        return self.checkpoints.save(self.iteration, write=write)


def context_length(student: Loaded) -> int:
    """Tokens that fit into the student's context."""
    return int(getattr(student.model.config, "max_position_embeddings", None) or 1 << 30)


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[f"seconds/{phase}"] = round(now - self._last, 6)
        self._last = now
