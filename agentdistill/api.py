"""The Python interface: the same functions that the command line calls.

import agentdistill as ad

outcome = ad.distill("recipe.yaml", overrides=["seed=1"])
episodes = ad.collect(env="agentdistill/Sokoban-v0", policy="expert", episodes=100)
result = ad.evaluate("recipe.yaml", policy="distilled", mode="greedy")
found = ad.compare("runs/a", "runs/b", policy="distilled")
again = ad.reproduce("runs/a/results.json")
why = ad.diagnose("runs/a", "distilled", teacher="taught")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentdistill.callbacks import Callback
from agentdistill.comparison import Comparison, Paths
from agentdistill.config import CollectStage, RunConfig, TrainStage, load
from agentdistill.errors import ConfigError
from agentdistill.evaluation import Result
from agentdistill.recipe import Outcome, execute
from agentdistill.records import Trajectory
from agentdistill.reproduction import Reproduction

if TYPE_CHECKING:
    from agentdistill.diagnostics import Diagnosis

Source = str | Path | Mapping[str, Any] | RunConfig


def distill(
    config: Source, overrides: Sequence[str] = (), callbacks: Sequence[Callback] = ()
) -> Outcome:
    """Run every stage of ``config`` and its evaluation; repeat the call to resume.

    Args:
        config: YAML file, mapping or RunConfig.
        overrides: ``key.path=value`` strings.
        callbacks: are told of the progress.
    """
    return execute(load(config, overrides), callbacks)


def train(
    config: Source,
    stage: str,
    overrides: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
) -> Outcome:
    """Run one stage of ``config`` and the stages that it needs, without the evaluation."""
    loaded = load(config, overrides)
    if not isinstance(loaded.stage(stage), (TrainStage, CollectStage)):
        raise ConfigError("is not a stage", key="stage", value=stage)
    return execute(loaded, callbacks, only=[stage])


def collect(
    env: str = "agentdistill/Sokoban-v0",
    policy: str = "expert",
    episodes: int = 100,
    *,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    split: str = "train",
    only_success: bool = True,
    output: str = "runs",
    name: str = "collect",
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> list[Trajectory]:
    """Play ``episodes`` episodes, keep them in ``output/name``, and return them.

    Args:
        env: environment id.
        policy: ``expert``, ``random``, or a model of ``settings["models"]``.
        episodes: how many to keep.
        options: the environment's own keyword arguments.
        seed: of the run.
        split: where tasks come from.
        only_success: keep successful episodes only.
        output: folder of runs.
        name: folder of this run.
        callbacks: are told of the progress.
        settings: any other key of the configuration.
    """
    stage = {
        "do": "collect",
        "name": "episodes",
        "policy": policy,
        "episodes": episodes,
        "split": split,
        "only_success": only_success,
        "avoid_held_out": split == "train",
        "batch": min(64, episodes),
    }
    config = load(
        {
            **settings,
            "name": name,
            "output": output,
            "seed": seed,
            "env": {"id": env, "options": dict(options or {})},
            "stages": [stage],
        }
    )
    execute(config, callbacks, only=["episodes"])
    from agentdistill.run import Run

    return Run(config).episodes("episodes")


def evaluate(
    config: Source,
    policy: str,
    mode: str = "sampled",
    overrides: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Let one policy of ``config`` (a stage, model, ``expert`` or ``random``) play the panel."""
    from agentdistill.callbacks import Callbacks
    from agentdistill.evaluation import evaluate as play
    from agentdistill.evaluation import modes
    from agentdistill.recipe import validate

    loaded = load(config, overrides)
    section = loaded.evaluate.model_copy(update={"policies": [policy]})
    known = modes(policy, loaded)
    how = known[0] if known == ["-"] or policy in loaded.policies else mode
    with validate(loaded.model_copy(update={"evaluate": section})) as the_run:
        return play(the_run, policy, how, section, Callbacks(callbacks))


def compare(
    first: Paths,
    second: Paths | None = None,
    policy: str | Sequence[str] | None = None,
    mode: str | None = None,
) -> Comparison:
    """Compare two policies on the same tasks, or with replicates on both sides two methods.

    Args:
        first: a run folder or file of results, several (replicates), or a folder of run folders.
        second: the other side; None is the first again, for two policies of the same runs.
        policy: its name, or the names on the two sides; None where each side trained just one.
        mode: ``sampled`` or ``greedy``; None takes the sampled one where there is one.
    """
    from agentdistill.comparison import compare as work

    return work(first, second, policy, mode)


def reproduce(
    result: str | Path,
    policy: str | Sequence[str] | None = None,
    mode: str | None = None,
    overrides: Sequence[str] = (),
) -> list[Reproduction]:
    """Play results again: identical, within two standard errors, or outside.

    Args:
        result: results.json of a run, its folder, or a file of ``agentdistill eval --output``.
        policy: only this one, or these.
        mode: ``sampled`` or ``greedy`` only.
        overrides: ``key.path=value`` strings, for places on this machine.
    """
    from agentdistill.reproduction import reproduce as work

    return work(result, policy, mode, overrides)


def diagnose(
    run: str | Path,
    stage: str | None = None,
    *,
    iterations: tuple[int | None, int | None] = (None, None),
    last: int | None = None,
    student: str | None = None,
    teacher: str | None = None,
) -> Diagnosis:
    """Hold the episodes of a stage against two models of its run: divergence, steps, agreement.

    Args:
        run: its folder.
        stage: a train or collect stage; None is the last train stage that has begun.
        iterations: from the first to before the second, as in a slice.
        last: only so many iterations, the latest.
        student: a train stage or model; None is the stage's own.
        teacher: a train stage or model; None is the stage's own.
    """
    from agentdistill.run import need_torch

    need_torch("diagnose")
    from agentdistill.diagnostics import of_run

    return of_run(run, stage, iterations=iterations, last=last, student=student, teacher=teacher)
