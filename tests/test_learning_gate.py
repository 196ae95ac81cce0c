"""Learning happens: on-policy distillation improves a student, and only by its updates.

The starting student has begun to imitate random episodes, so it finds the format now and then and
acts no better than chance; the teacher imitates the expert. Rates are of optimal actions, over
corridors that nobody was trained to start in. Prompts hold one observation, which tiny models
learn to read soonest.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from agentdistill.config import load
from agentdistill.engines.base import Sampling
from agentdistill.policy import ModelPolicy, derive_seed
from agentdistill.recipe import execute
from agentdistill.rollout import Request, rollout
from agentdistill.rollout import run as wait
from agentdistill.run import Run
from tests.toy import micro

SAMPLES = 20
"""Episodes per task."""


def recipe(output: Path) -> dict[str, Any]:
    model = {"hidden": 32, "heads": 2, "layers": 1, "tokenizer": {"episodes": 100}}
    distil = {"init": "started", "teacher": "taught", "tasks": 16}
    stages = [
        {"name": "demos", "do": "collect", "episodes": 60},
        {"name": "noise", "do": "collect", "episodes": 60, "policy": "random",
         "only_success": False},
        {"name": "taught", "model": "teacher", "method": "sft", "data": "demos",
         "iterations": 40, "tasks": 16, "lr": 1e-2},
        {"name": "started", "model": "student", "method": "sft", "data": "noise",
         "axes": {"only_success": False}, "iterations": 10, "tasks": 16, "lr": 1e-2},
        {"name": "sampled", **distil, "method": "opd", "iterations": 20, "lr": 1e-2},
        {"name": "exact", **distil, "method": "opd-exact", "iterations": 20, "lr": 1e-2},
        {"name": "frozen", **distil, "method": "opd", "iterations": 4, "lr": 1e-12},
    ]  # fmt: skip
    models = {"teacher": model, "student": model}
    prompt = {"preset": "bare", "window": 0}
    return micro(output, models=models, prompt=prompt, stages=stages, evaluate={"policies": []})


def optimal_rates(run: Run, name: str) -> list[float]:
    """Share of optimal actions in each sampled episode on the report split."""
    loaded = run.model(name)
    policy = ModelPolicy(name, loaded.engine, loaded.renderer, Sampling(max_tokens=2))
    requests = [
        Request(task, derive_seed("gate", task.key, n), str(n), n)
        for task in run.env.tasks("report")
        for n in range(SAMPLES)
    ]
    episodes = wait(rollout(policy, run.make_env, requests))
    assert not any(episode.faults for episode in episodes)
    chosen = [[r.optimal for turn in t.turns for r in turn.results] for t in episodes]
    return [statistics.fmean(map(bool, episode)) for episode in chosen]


def gain(after: list[float], before: list[float]) -> float:
    """Difference of the means in standard errors."""
    error = sum(statistics.variance(rates) / len(rates) for rates in (after, before))
    return (statistics.fmean(after) - statistics.fmean(before)) / math.sqrt(error)


def test_distillation_improves_the_student(tmp_path: Path) -> None:
    config = load(recipe(tmp_path))
    outcome = execute(config)
    run = Run(config)
    names = ("started", "taught", "sampled", "exact", "frozen")
    rates = {name: optimal_rates(run, name) for name in names}
    assert gain(rates["taught"], rates["started"]) > 3, "the teacher has nothing to teach"
    assert gain(rates["sampled"], rates["started"]) > 3
    assert gain(rates["exact"], rates["started"]) > 3
    assert outcome.stages["frozen"]["scored_tokens"] > 0
    assert abs(gain(rates["frozen"], rates["started"])) < 1, "improved without learning"
