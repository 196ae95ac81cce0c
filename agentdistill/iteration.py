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

import torch
from torch import Tensor

from agentdistill.callbacks import Callback
from agentdistill.checkpoint import Checkpoints, load_state, save_state
from agentdistill.config import TrainStage
from agentdistill.crash import crash_point
from agentdistill.errors import ConfigError
from agentdistill.evaluation import play
from agentdistill.experience import Experience
from agentdistill.files import sync, write_text
from agentdistill.judging import Judges
from agentdistill.methods import compile as plan
from agentdistill.methods import needs
from agentdistill.methods.constraints import check
from agentdistill.methods.index import get
from agentdistill.methods.schedule import Controller
from agentdistill.methods.space import Axes
from agentdistill.metrics import of_table, of_trajectories
from agentdistill.optimise import Optimiser, backward
from agentdistill.panel import for_tuning
from agentdistill.policy import derive_seed
from agentdistill.records import Trajectory
from agentdistill.run import Loaded, Run, seeded
from agentdistill.store import Store
from agentdistill.students import local
from agentdistill.table import Table, build
from agentdistill.views import PLAIN, plain, within


class Training:
    """Trains one model by one method; see :meth:`run`."""

    def __init__(self, the_run: Run, stage: TrainStage, callback: Callback) -> None:
        """Check the stage, load the models, and go back to the last checkpoint if there is one."""
        self.context, self.stage, self.callback = the_run, stage, callback
        self.axes = get(stage.method).resolve(stage.axes)
        check(the_run.config, stage, self.axes)
        self.controllers = {k: Controller(s) for k, s in self.axes.schedules.items()}
        self.folder = the_run.folder(stage.name)
        self.seed = derive_seed(the_run.config.seed, "stage", stage.name)
        self.student = the_run.model(stage.init or stage.model)
        self.student.name = self.student.engine.name = stage.name
        self.teacher = the_run.voice(str(stage.teacher)) if needs.by_ids(stage, self.axes) else None
        guide = by_task(the_run.episodes(stage.guide)) if stage.guide else {}
        self.judges = Judges(the_run, stage, self.axes, self.student, self.teacher, guide)
        if self.judges.skills is not None and stage.data is not None:
            past = stage.guide or stage.data  # skills about the recorded tasks are there at once
            self.judges.skills.learn(the_run.episodes(past), -1)
        self.optimiser = Optimiser(self.student.model, stage)
        self.store = Store(self.folder)
        try:
            self.experience = Experience(
                the_run, stage, self.axes, self.student, self.teacher, self.store, self.judges.notes
            )
            self.pass_rates = PassRates()
            self.checkpoints = Checkpoints(self.folder / "checkpoints")
            self.iteration = self._resume()
        except BaseException:
            self.store.close()
            raise

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
            self.experience.tasks.load_state_dict(state["tasks"])
            self.experience.totals = dict(state["totals"])
            self.judges.load_state_dict(state["judges"])
            self.pass_rates.load_state_dict(state["pass_rates"])
            for key, controller in self.controllers.items():
                controller.load_state_dict(state["schedules"][key])
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
            **self.experience.totals,
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
            shares.append(self.experience.totals["env_steps"] / self.stage.env_steps)
        return min(1.0, max(shares))

    def _iterate(self, n: int) -> dict[str, Any]:
        """Generate, score, update, commit."""
        clock = _Clock()
        values = {key: c.value(self._progress()) for key, c in self.controllers.items()}
        axes = self.axes.at(values)
        self.experience.follow(axes)
        self.judges.follow(axes)
        self.judges.before(n)
        trajectories, shards = self.experience.of(n)
        clock.lap("generate")
        crash_point("iteration:after-generate")
        metrics: dict[str, Any] = {f"schedule/{key}": value for key, value in values.items()}
        table, scored = self._scored(trajectories, axes, n, metrics)
        clock.lap("score")
        metrics.update(self._update(table, axes, n))
        clock.lap("update")
        crash_point("iteration:after-update")
        metrics.update(self.judges.after(trajectories, n))
        self.experience.count(trajectories, scored, n)
        metrics.update(of_trajectories(trajectories), **of_table(table, axes))
        for controller in self.controllers.values():
            controller.observe(sum(v for k, v in metrics.items() if k.startswith("loss/")))
        metrics.update({f"total/{k}": value for k, value in self.experience.totals.items()})
        metrics.update(self.context.providers.spent(), **clock.seconds)
        if shards:  # an iteration on recorded episodes leaves nothing but weights: its checkpoint
            self.store.commit(self.stage.name, n, shards, {"totals": self.experience.totals})
        return metrics

    # -- score and update -------------------------------------------------------------------------

    def _scored(
        self, trajectories: Sequence[Trajectory], axes: Axes, n: int, metrics: dict[str, Any]
    ) -> tuple[Table, int]:
        """The rows with every column of the method, and how many ids were scored for it."""
        table = build([t for t in trajectories if t.streams])
        limit = self.stage.max_length or context_length(self.student)
        dropped = table.add_view(PLAIN, within(plain, limit))
        if table.streams and dropped == len(table.streams):
            raise ConfigError(
                f"every stream is longer than {limit} tokens; raise it or shorten the prompt",
                key=f"stages.{self.stage.name}.max_length",
                value=self.stage.max_length,
            )
        metrics.update(self.judges.add_views(table, n, limit), dropped_streams=dropped)
        scored = self.judges.score(table)
        metrics.update(self.judges.silence(table))
        if axes.actor == "cached" or (axes.on_policy and self.experience.plays(n)):
            self.pass_rates.add(trajectories)
        rates = self.pass_rates.of(table.trajectories)
        metrics.update(plan.fill(table, axes, pass_rates=rates, heads=self.judges.heads))
        return table, scored

    def _update(self, table: Table, axes: Axes, n: int) -> dict[str, float]:
        """``updates`` optimiser steps, each over its share of the trajectories."""
        terms, heads = plan.terms(axes), self.judges.heads
        numbers = list(range(len(table.trajectories)))
        random.Random(derive_seed(self.seed, "update", n)).shuffle(numbers)
        metrics: dict[str, float] = {}
        self.student.model.train()
        with seeded(derive_seed(self.seed, "dropout", n), self.student.model.device):
            for step in range(self.stage.updates):
                batch = backward(
                    self.student.model,
                    table,
                    terms,
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
        state = {
            "tasks": self.experience.tasks.state_dict(),
            "totals": self.experience.totals,
            "judges": self.judges.state_dict(),
            "pass_rates": self.pass_rates.state_dict(),
            "schedules": {key: c.state_dict() for key, c in self.controllers.items()},
        }

        def write(folder: Path) -> None:
            local.save(self.student.model, self.student.tokenizer, folder / "model")
            save_state(folder / "state.pt", self.optimiser, state=state)

        return self.checkpoints.save(self.iteration, write=write)


def context_length(student: Loaded) -> int:
    """Tokens that fit into the student's context."""
    return int(getattr(student.model.config, "max_position_embeddings", None) or 1 << 30)


class PassRates:
    """The student's share of successes on every task, over all that it played so far."""

    def __init__(self) -> None:
        """Nothing is known."""
        self._known: dict[str, list[int]] = {}

    def add(self, trajectories: Sequence[Trajectory]) -> None:
        """Count episodes that say something about the agent."""
        for trajectory in trajectories:
            if trajectory.reward_valid:
                counts = self._known.setdefault(trajectory.task.key, [0, 0])
                counts[0] += trajectory.success
                counts[1] += 1

    def of(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """The share on each trajectory's task [B]; a half where nothing is known."""
        counts = [self._known.get(t.task.key, [1, 2]) for t in trajectories]
        return torch.tensor([won / played for won, played in counts])

    def state_dict(self) -> dict[str, list[int]]:
        """Successes and episodes by task."""
        return {key: list(counts) for key, counts in self._known.items()}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Go on from :meth:`state_dict`."""
        self._known = {key: list(counts) for key, counts in state.items()}


def by_task(trajectories: Sequence[Trajectory]) -> dict[str, list[Trajectory]]:
    """Demonstrations by task key, in order."""
    found: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        found.setdefault(trajectory.task.key, []).append(trajectory)
    return found


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[f"seconds/{phase}"] = round(now - self._last, 6)
        self._last = now
