"""Do temporal curricula help? Paired replicates of every method in four regimes.

One replicate is a fresh teacher, a fresh starting student and a fresh stream of levels; all methods
of a replicate start from that pair, so that differences are paired. Iterations are counted in turns
that are trained on, the same number for every method (less than one episode more, 3% on average):
equal updates are equal environment steps. What the teacher replays is a column of its own.

Invariants
----------
* Sizes, rates and contrasts are declared here, before anything runs; nothing is chosen afterwards.
* Every replicate is a run that goes on where it stopped; a finished one is a row of the results and
  is not run again as long as its configuration is the same.
* Success is that of sampled episodes on the replicate's own panel of distinct held-out levels.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import ONE_THREAD, RESULTS, facts, finished, save, show
from contrasts import compare

from agentdistill.config import RunConfig, load

FILE = RESULTS / "curricula.json"
SUPPORT = 12
"""Moves of the teacher's longest demonstration."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of it; ``--small`` shows that the script works, and nothing else."""

    replicates: int = 10
    demos: int = 4000
    teacher: int = 500
    student: int = 110
    iterations: int = 60
    turns: int = 320
    levels: int = 150
    every: int = 10


FULL = Scale()
SMALL = Scale(2, 300, 40, 10, 6, 60, 20, 3)


@dataclass(frozen=True, slots=True)
class Setting:
    """An environment and the estimators that are tried in it.

    Attributes:
        horizon: step limit.
        estimators: ``exact`` (reverse KL over the vocabulary, a loss) or ``k1`` (of the sampled
            token, an advantage with PPO's clipping).
        tokens: of an answer.
        env: id of the environment.
    """

    horizon: int
    estimators: tuple[str, ...]
    tokens: int = 1
    env: str = "agentdistill/Sokoban-v0"


SETTINGS = {
    "long": Setting(2 * SUPPORT, ("exact", "k1")),
    "thoughts": Setting(2 * SUPPORT, ("k1",), 3, "thinking:ThinkingSokoban"),
    "support": Setting(SUPPORT, ("k1",)),
}
"""Regimes i and ii, iii, and iv (the negative control: the horizon is inside the support)."""

CONTRASTS = (
    ("truncated", "opd"),
    ("f2b", "opd"),
    ("f2b", "truncated"),
    ("b2f-k", "opd"),
    ("b2f-remaining", "opd"),
)
"""Of each estimator; besides these, ``opd`` against every method without a student's rollouts."""

OFF_POLICY = ("sft", "kd", "grpo")

COUNTS = ("env_steps", "replayed_steps", "scored_tokens", "seconds")
"""What a stage's summary says of its cost."""


def methods(setting: Setting, scale: Scale) -> dict[str, dict[str, Any]]:
    """Name → the stage of every method in ``setting``."""
    growth = 0.6 * scale.iterations  # the curricula are over after 60% of the run
    forward = max(1, round(growth / (setting.horizon - 2)))
    backward = max(1, round(growth / (SUPPORT - 1)))
    starts = {
        "opd": {"kind": "full"},
        "truncated": {"kind": "fixed", "turns": SUPPORT},
        "f2b": {"kind": "f2b", "eta": forward, "k_start": 2},
        "b2f-k": {"kind": "b2f", "eta": backward, "horizon": "k"},
        "b2f-remaining": {"kind": "b2f", "eta": backward, "horizon": "remaining"},
    }
    found: dict[str, dict[str, Any]] = {
        "sft": {"method": "kd-sft", "teacher": "taught"},
        "kd": {"method": "kd", "teacher": "taught"},
        "grpo": {"method": "grpo", "samples": 4, "lr": 3e-4},
    }
    for estimator in setting.estimators:
        for name, start in starts.items():
            stage = {
                "method": "opd-exact" if estimator == "exact" else "opd",
                "teacher": "taught",
                "axes": {"start": start},
            }
            if start["kind"] == "b2f":
                stage["guide"] = "shown"
            if start["kind"] != "fixed" or setting.horizon > SUPPORT:
                found[f"{name} {estimator}"] = stage
    return found


def stage_name(method: str) -> str:
    """The stage that trains ``method``."""
    return method.replace("-", "_").replace(" ", "_")


def recipe(name: str, number: int, scale: Scale, output: Path) -> RunConfig:
    """The run of replicate ``number`` of the setting called ``name``."""
    setting = SETTINGS[name]
    demos = {"do": "collect", "policy": "expert", "episodes": scale.demos, "batch": 256}
    taught = {"method": "sft", "data": "demos", "lr": 3e-3, "schedule": "cosine", "warmup": 0.05}
    shared = {"model": "student", "init": "before", "iterations": scale.iterations,
              "turns": scale.turns, "updates": 4, "lr": 1e-3, "warmup": 0.05,
              "evaluate_every": scale.every, "checkpoint_every": scale.iterations}  # fmt: skip
    stages: list[dict[str, Any]] = [
        {"name": "demos", **demos},
        {"name": "taught", "model": "teacher", **taught, "iterations": scale.teacher},
        {"name": "before", "model": "student", **taught, "limit": 100, "iterations": scale.student},
        {"name": "shown", "do": "collect", "policy": "taught", "episodes": scale.demos // 8,
         "batch": 256},
    ]  # fmt: skip
    chosen = methods(setting, scale)
    stages += [{"name": stage_name(key), **shared, **stage} for key, stage in chosen.items()]
    options = {"height": 7, "width": 7, "min_moves": 3, "max_moves": SUPPORT,
               "max_steps": setting.horizon, "expert_ties": "first"}  # fmt: skip
    return load(
        {
            "name": f"{name}-{number}",
            "output": str(output),
            "seed": 1000 + number,
            "env": {"id": setting.env, "options": options},
            "prompt": "bare",
            "sampling": {"max_tokens": setting.tokens},
            "models": {
                "teacher": {"hidden": 96, "heads": 3, "feed_forward": 256},
                "student": {"hidden": 64, "heads": 2, "feed_forward": 192},
            },
            "stages": stages,
            "evaluate": {
                "policies": ["expert", "taught", "before", *map(stage_name, chosen)],
                "tasks": scale.levels,
                "modes": ["sampled"],
                "seed": 1000 + number,
            },
        }
    )


# -- one replicate, in a process of its own --------------------------------------------------------


def replicate(name: str, number: int, scale: Scale, output: Path) -> dict[str, Any]:
    """Train and measure all methods; what the results keep of it."""
    import agentdistill as ad

    config = recipe(name, number, scale, output)
    began = time.monotonic()
    outcome = ad.distill(config)
    rows = {result.policy: result for result in outcome.results}
    goal = rows["taught"].success / 2
    found: dict[str, Any] = {
        policy: {"success": rows[policy].success, "outcomes": _bits(rows[policy].outcomes)}
        for policy in ("expert", "taught", "before")
    }
    for method in methods(SETTINGS[name], scale):
        stage = stage_name(method)
        result, log = rows[stage], list(_metrics(config, stage))
        done = json.loads((config.path / "stages" / stage / "done.json").read_text())
        found[method] = {
            "success": result.success,
            "optimal": result.optimal,
            "outcomes": _bits(result.outcomes),
            "steps_to_half": _steps_to(log, goal),
            "curve": [[line["total/env_steps"], line["tune/sampled/success"]] for line in log
                      if "tune/sampled/success" in line],
            "kl_by_turn": kl_by_turn(config, stage, scale.levels // 2),
            **{key: done[key] for key in COUNTS},
        }  # fmt: skip
    return {
        "setting": name,
        "replicate": number,
        "fingerprint": config.fingerprint,
        "seconds": time.monotonic() - began,
        "facts": facts(),
        "policies": found,
    }


def _bits(outcomes: Sequence[bool | None]) -> str:
    """Outcomes by level: 1, 0, and - for a fault."""
    return "".join("-" if won is None else str(int(won)) for won in outcomes)


def _metrics(config: RunConfig, stage: str) -> Iterator[dict[str, Any]]:
    path = config.path / "stages" / stage / "metrics.jsonl"
    return map(json.loads, path.read_text().splitlines())


def _steps_to(log: Sequence[Mapping[str, Any]], goal: float) -> int | None:
    """Environment steps when the tune split's success first reached ``goal``; None if never.

    None as well where the teacher never succeeds: half of nothing is no goal.
    """
    for line in log:
        if goal > 0 and line.get("tune/sampled/success", -1.0) >= goal:
            return int(line["total/env_steps"])
    return None


def kl_by_turn(config: RunConfig, stage: str, levels: int) -> list[float]:
    """KL(student || teacher) over the vocabulary, nats, by turn of the student's own episodes.

    The mean over the episodes that still run at that turn (late turns hold unsolved ones only).
    """
    import torch

    from agentdistill.policy import derive_seed
    from agentdistill.rollout import Request, rollout, run
    from agentdistill.run import Run
    from agentdistill.table import build
    from agentdistill.tasks import draw
    from agentdistill.teachers.scorer import LocalScorer
    from agentdistill.views import PLAIN, plain

    with Run(config) as the_run, torch.no_grad():
        tasks = draw(the_run.env, "report", levels, config.evaluate.seed)
        student, teacher = the_run.model(stage), the_run.model("taught")
        requests = [Request(task, derive_seed("kl", task.key)) for task in tasks]
        played = run(
            rollout(the_run.acting(student), the_run.make_env, requests, pool=the_run.pool)
        )
        table = build(played)
        table.add_view(PLAIN, plain)
        logs = []
        for name, loaded in (("student", student), ("teacher", teacher)):
            scorer = LocalScorer(name, loaded.model)
            scorer.score(table, {"hidden"}, rows=table.acted)
            logs.append(scorer.head(table[f"hidden/{name}"][table.acted]).log_softmax(-1))
        divergence = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
        turn = table.index["turn"][table.acted]
        return [float(divergence[turn == t].mean()) for t in range(int(turn.max()) + 1)]


# -- all replicates --------------------------------------------------------------------------------


def known(scale: Scale, file: Path, output: Path) -> dict[str, dict[str, Any]]:
    """Rows that need not run again, by the name of their run."""
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    rows += [json.loads(path.read_text()) for path in sorted(output.glob("*.row.json"))]
    found = {}
    for row in rows:
        name, number = row["setting"], row["replicate"]
        if row["fingerprint"] == recipe(name, number, scale, output).fingerprint:
            found[f"{name}-{number}"] = row
    return found


def run_all(scale: Scale, file: Path, output: Path, processes: int, minutes: float) -> list[Any]:
    """Run what is missing in ``processes`` at once; start nothing after ``minutes``."""
    rows = known(scale, file, output)
    # Replicates go round the settings, so that whatever stops early has all of them.
    jobs = [f"{name}-{n}" for n in range(scale.replicates) for name in SETTINGS]
    jobs = [job for job in jobs if job not in rows]
    deadline = time.monotonic() + 60 * minutes
    alive: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while alive or (jobs and time.monotonic() < deadline):
            while jobs and len(alive) < processes and time.monotonic() < deadline:
                job = jobs.pop(0)
                print(f"{job}: begins ({len(rows)} done, {len(jobs)} to come)", flush=True)
                alive[job] = _start(job, scale, output)
            time.sleep(0.5)
            for job, process in list(alive.items()):
                if process.poll() is None:
                    continue
                del alive[job]
                if process.returncode:
                    log = (output / f"{job}.log").read_text()[-2000:]
                    raise RuntimeError(f"{job} ended with {process.returncode}\n{log}")
                rows[job] = json.loads((output / f"{job}.row.json").read_text())
                print(f"{job}: {rows[job]['seconds']:.0f} s", flush=True)
    finally:
        for process in alive.values():
            process.terminate()
    return list(rows.values())


def _start(job: str, scale: Scale, output: Path) -> subprocess.Popen[bytes]:
    words = ["--job", job, "--output", str(output), *(["--small"] if scale is SMALL else [])]
    with (output / f"{job}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, __file__, *words],
            env={**os.environ, **ONE_THREAD},
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parent,  # where thinking.py is
        )


def work(job: str, scale: Scale, output: Path) -> None:
    """One replicate; its row is written beside its folder, which is then removed."""
    name, _, number = job.rpartition("-")
    row = replicate(name, int(number), scale, output)
    save(output / f"{job}.row.json", row)
    shutil.rmtree(output / job)


def table(rows: Sequence[Mapping[str, Any]], setting: str) -> str:
    """Means over the replicates of one setting, a policy a line."""
    chosen = [row["policies"] for row in rows if row["setting"] == setting]
    header = ("success", "sd", "optimal", "steps to half", "KL first", "KL last", "env steps",
              "replayed", "scored tokens", "seconds")  # fmt: skip
    lines = []
    for policy in chosen[0]:
        mine = [policies[policy] for policies in chosen]
        lines.append([policy, *_line(mine)])
    return show((f"{setting} (n = {len(chosen)})", *header), lines)


def _line(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    import numpy as np

    def mean(key: str, style: str) -> str:
        values = [row[key] for row in rows if row.get(key) is not None]
        return format(float(np.mean(values)), style) if values else "-"

    success = [row["success"] for row in rows]
    spread = f"{np.std(success, ddof=1):.3f}" if len(success) > 1 else "-"
    kl = [row["kl_by_turn"] for row in rows if "kl_by_turn" in row]
    reached = [row["steps_to_half"] for row in rows if row.get("steps_to_half") is not None]
    half = f"{np.mean(reached):,.0f} ({len(reached)}/{len(kl)})" if reached else "-"
    ends = [f"{np.mean([k[place] for k in kl]):.2f}" if kl else "-" for place in (0, -1)]
    sizes = [mean(key, ",.0f") for key in COUNTS]
    return [f"{np.mean(success):.3f}", spread, mean("optimal", ".3f"), half, *ends, *sizes]


def contrasts(setting: str) -> list[tuple[str, str]]:
    """The declared comparisons of one setting."""
    available = methods(SETTINGS[setting], FULL)
    found = []
    for estimator in SETTINGS[setting].estimators:
        found += [(f"{a} {estimator}", f"{b} {estimator}") for a, b in CONTRASTS]
        found += [(f"opd {estimator}", other) for other in OFF_POLICY]
    if len(SETTINGS[setting].estimators) == 2:
        found.append(("opd exact", "opd k1"))
    return [pair for pair in found if set(pair) <= set(available)]


def main() -> None:
    """Run what is missing, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="ten minutes; claims nothing")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing after that")
    parser.add_argument("--output", type=Path, default=Path("runs/curricula"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    words = parser.parse_args()
    scale, output = (SMALL if words.small else FULL), words.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if words.job:
        return work(words.job, scale, output)
    file = output / "curricula.json" if words.small else FILE
    about = facts("scipy")
    rows = run_all(scale, file, output, words.processes, words.minutes)
    for setting in SETTINGS:
        if mine := [row for row in rows if row["setting"] == setting]:
            print(f"\n{table(rows, setting)}\n\n{compare(mine, contrasts(setting))}")
    save(file, {"facts": finished(about), "scale": asdict(scale), "rows": rows})


if __name__ == "__main__":
    main()
