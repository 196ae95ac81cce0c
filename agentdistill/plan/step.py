"""How long an iteration takes and how much it plays: measured, or estimated from one episode.

Invariants
----------
* A measured step is the trainer's own iteration (:class:`agentdistill.iteration.Training`) on this
  machine, on a few tasks of the same configuration, in a folder that is removed; the first of two
  warms up and is not counted. Nothing of the run itself is touched.
* Train stages are measured on the weights that their models begin with: untrained ones, where the
  run will have trained some. Episodes may then be longer or shorter than they will be.
* A curriculum is measured at its last iteration, where episodes are longest.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from agentdistill.callbacks import Callback
from agentdistill.collection import collect
from agentdistill.config import CollectStage, RunConfig, TrainStage, load
from agentdistill.iteration import Training
from agentdistill.plan.memory import Lengths
from agentdistill.policy import RandomPolicy
from agentdistill.records import Trajectory
from agentdistill.rollout import Request, rollout, run
from agentdistill.run import Run

EPISODES = 4
"""Episodes of a measured iteration, or one group where that is more."""
CHARACTERS = 4
"""Characters of a token, where no tokenizer was asked."""
FRAME = 8
"""Tokens that a chat template adds to a turn, where none was asked."""
PHASES = ("generate", "score", "update")


@dataclass(frozen=True, slots=True)
class Step:
    """What was measured.

    Attributes:
        seconds: by phase; of a collect stage only ``generate``.
        lengths: of what was played.
        kept: share of the episodes that a collect stage would keep.
    """

    seconds: dict[str, float]
    lengths: Lengths
    kept: float = 1.0


def measure(config: RunConfig) -> dict[str, Step]:
    """Run every stage of ``config`` in small, and time it; name of the stage → what was found.

    Raises:
        AgentDistillError: a model, the environment or a stage cannot run here.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        small = _small(config, folder)
        with Run(small) as the_run:
            return {
                stage.name: _train(the_run, stage)
                if isinstance(stage, TrainStage)
                else _collect(the_run, stage)
                for stage in small.stages
            }


def _small(config: RunConfig, folder: str) -> RunConfig:
    """The same stages on a few episodes; a train stage that is named stands for its model."""
    model = {s.name: s.model for s in config.stages if isinstance(s, TrainStage)}
    stages: list[dict[str, Any]] = []
    for stage in config.stages:
        values = stage.model_dump(mode="json")
        if isinstance(stage, CollectStage):
            few = min(stage.episodes, EPISODES)
            values.update(policy=model.get(stage.policy, stage.policy), episodes=few, batch=few)
            values.update(only_success=False, avoid_held_out=False)
        else:
            tasks = max(1, min(stage.tasks, EPISODES // stage.samples))
            values.update(tasks=tasks, turns=None, init=None, evaluate_every=None, limit=None)
            for key in ("teacher", "base", "analyser"):
                name = getattr(stage, key)
                values[key] = model.get(name or "", name)
        stages.append(values)
    whole = config.model_dump(mode="json")
    for made in whole["policies"].values():
        student, teacher = (model.get(made[key] or "", made[key]) for key in ("student", "teacher"))
        alone = {"rule": "never", "threshold": None} if teacher == student else {}
        made.update(student=student, teacher=None if alone else teacher, **alone)
    whole.update(name="plan", output=folder, stages=stages, evaluate={})
    return load(whole)


def _collect(the_run: Run, stage: CollectStage) -> Step:
    began = time.perf_counter()
    collect(the_run, stage, Callback())
    seconds = time.perf_counter() - began
    played = the_run.episodes(stage.name)
    kept = sum(t.success for t in played) / len(played)
    return Step({"generate": seconds}, _lengths(played), kept)


def _train(the_run: Run, stage: TrainStage) -> Step:
    """Two iterations, the second one timed; no checkpoint and no model is written."""
    last = (stage.iterations or 10_000) - 1
    probe = Training(the_run, stage, Callback())
    with probe.store:
        probe._iterate(last + 1)
        metrics = probe._iterate(last)
    seconds = {phase: float(metrics[f"seconds/{phase}"]) for phase in PHASES}
    return Step(seconds, _lengths(probe.experience.last))


def _lengths(played: Sequence[Trajectory]) -> Lengths:
    """What ``played`` amounts to, in ids of its streams."""
    from agentdistill.records import Author

    streams = [stream for t in played for stream in t.streams]
    return Lengths(
        episodes=len(played),
        context=max((len(s.ids) for s in streams), default=0),
        tokens=sum(len(s.ids) for s in streams),
        rows=sum(int((s.author == Author.ACTOR).sum()) for s in streams),
        turns=sum(len(t.acted) for t in played),
        env_steps=sum(t.env_steps for t in played),
        source=f"a measured step of {len(played)} episodes",
    )


def guess(the_run: Run, stage: TrainStage) -> Lengths:
    """Lengths of one episode of ``stage`` at most, from the texts of one random episode.

    Four characters make a token; every response is as long as it may be, every episode has as many
    turns as it may have.
    """
    config, turns = the_run.config, the_run.max_turns
    with closing(the_run.make_env()) as env:
        (task,) = (t for t, _ in zip(env.tasks(env.card.split(stage.split)), [0], strict=False))
        fixed = len(env.instruction)
    played = run(
        rollout(
            RandomPolicy(config.prompt.grammar),
            the_run.make_env,
            [Request(task, 0, "plan")],
            max_turns=turns,
            grammar=config.prompt.grammar,
        )
    )[0]
    seen = [len(turn.observation) for turn in played.turns] or [0]
    says = (stage.sampling or config.sampling).max_tokens
    turn = math.ceil(sum(seen) / len(seen) / CHARACTERS) + FRAME + says
    window, opening = config.prompt.window, fixed // CHARACTERS
    context = opening + turn * (turns if window is None else min(turns, window + 1))
    tokens = context if window is None else context * turns
    source = f"one random episode, {CHARACTERS} characters a token, {turns} turns of {says} tokens"
    return Lengths(1, context, tokens, turns * says, turns, turns, source)


def scaled(one: Lengths, stage: TrainStage, limit: int) -> Lengths:
    """``one`` or a few episodes as a whole iteration of ``stage``; no view exceeds ``limit``."""
    episodes = stage.tasks * stage.samples
    if stage.turns is not None:
        episodes = max(1, math.ceil(stage.turns * one.episodes / max(1, one.turns)))
    factor = episodes / one.episodes
    return Lengths(
        episodes,
        min(one.context, stage.max_length or limit, limit),
        math.ceil(one.tokens * factor),
        math.ceil(one.rows * factor),
        math.ceil(one.turns * factor),
        math.ceil(one.env_steps * factor),
        one.source,
    )
