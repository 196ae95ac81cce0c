"""Replicates of a run, in processes of their own: train, measure, keep a row, go on after a stop.

Invariants
----------
* A replicate is a run of the library; all its methods start from the same pair of models.
* A finished replicate is a row, and is not run again as long as its configuration is the same.
* Success is that of sampled episodes on the replicate's own panel of distinct held-out tasks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ONE_THREAD, facts, save

from agentdistill.config import RunConfig

COUNTS = ("env_steps", "replayed_steps", "scored_tokens", "seconds")
"""What a stage's summary says of its cost."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What is replicated.

    Attributes:
        script: the file that runs one replicate when called with ``--job``.
        small: whether this is its ``--small`` form.
        settings: names.
        replicates: of each setting.
        recipe: (setting, number, output) → the run; it evaluates ``starts`` and every method.
        methods: setting → names of what is compared; their stages are :func:`stage_name`.
        starts: policies that are measured besides.
        teacher: policy whose success is the goal, and that divergences are measured from; "" none.
        levels: episodes for the divergence by turn.
    """

    script: Path
    small: bool
    settings: Sequence[str]
    replicates: int
    recipe: Callable[[str, int, Path], RunConfig]
    methods: Callable[[str], Sequence[str]]
    starts: Sequence[str] = ("expert", "taught", "before")
    teacher: str = "taught"
    levels: int = 75


def stage_name(method: str) -> str:
    """The stage that trains ``method``."""
    return method.replace("-", "_").replace(" ", "_")


# -- one replicate, in a process of its own --------------------------------------------------------


def replicate(bench: Bench, name: str, number: int, output: Path) -> dict[str, Any]:
    """Train and measure all methods; what the results keep of it."""
    import agentdistill as ad

    config = bench.recipe(name, number, output)
    began = time.monotonic()
    outcome = ad.distill(config)
    rows = {result.policy: result for result in outcome.results}
    goal = rows[bench.teacher].success / 2 if bench.teacher else 0.0
    found: dict[str, Any] = {
        policy: {
            "success": rows[policy].success,
            "optimal": rows[policy].optimal,
            "outcomes": _bits(rows[policy].outcomes),
        }
        for policy in bench.starts
    }
    for method in bench.methods(name):
        stage = stage_name(method)
        result, log = rows[stage], list(_metrics(config, stage))
        done = json.loads((config.path / "stages" / stage / "done.json").read_text())
        kl = kl_by_turn(config, stage, bench.teacher, bench.levels) if bench.teacher else []
        found[method] = {
            "success": result.success,
            "optimal": result.optimal,
            "outcomes": _bits(result.outcomes),
            "steps_to_half": _steps_to(log, goal),
            "curve": [[line["total/env_steps"], line["tune/sampled/success"]] for line in log
                      if "tune/sampled/success" in line],
            "kl_by_turn": kl,
            "logged": _means(log),
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
    """Outcomes by task: 1, 0, and - for a fault."""
    return "".join("-" if won is None else str(int(won)) for won in outcomes)


def _metrics(config: RunConfig, stage: str) -> Iterator[dict[str, Any]]:
    path = config.path / "stages" / stage / "metrics.jsonl"
    return map(json.loads, path.read_text().splitlines())


def _means(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean over the iterations of weights, masks, skills and seconds by phase."""
    kept = ("weight/", "masked", "without_note", "skills", "used_skills", "zero_", "seconds/")
    names = {key for line in log for key in line if key.startswith(kept)}
    values = {name: [line[name] for line in log if name in line] for name in sorted(names)}
    return {name: sum(found) / len(found) for name, found in values.items()}


def _steps_to(log: Sequence[Mapping[str, Any]], goal: float) -> int | None:
    """Environment steps when the tune split's success first reached ``goal``; None if never.

    None as well where the teacher never succeeds: half of nothing is no goal.
    """
    for line in log:
        if goal > 0 and line.get("tune/sampled/success", -1.0) >= goal:
            return int(line["total/env_steps"])
    return None


def kl_by_turn(config: RunConfig, stage: str, teacher: str, levels: int) -> list[float]:
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
        tasks = draw(the_run.env, config.evaluate.split, levels, config.evaluate.seed)
        student, judge = the_run.model(stage), the_run.model(teacher)
        requests = [Request(task, derive_seed("kl", task.key)) for task in tasks]
        played = run(
            rollout(the_run.acting(student), the_run.make_env, requests, pool=the_run.pool)
        )
        table = build(played)
        table.add_view(PLAIN, plain)
        logs = []
        for name, loaded in (("student", student), ("teacher", judge)):
            scorer = LocalScorer(name, loaded.model)
            scorer.score(table, {"hidden"}, rows=table.acted)
            logs.append(scorer.head(table[f"hidden/{name}"][table.acted]).log_softmax(-1))
        divergence = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
        turn = table.index["turn"][table.acted]
        return [float(divergence[turn == t].mean()) for t in range(int(turn.max()) + 1)]


# -- all replicates --------------------------------------------------------------------------------


def known(bench: Bench, file: Path, output: Path) -> dict[str, dict[str, Any]]:
    """Rows that need not run again, by the name of their run."""
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    rows += [json.loads(path.read_text()) for path in sorted(output.glob("*.row.json"))]
    found = {}
    for row in rows:
        name, number = row["setting"], row["replicate"]
        if name not in bench.settings:
            continue
        if row["fingerprint"] == bench.recipe(name, number, output).fingerprint:
            found[f"{name}-{number}"] = row
    return found


def run_all(bench: Bench, file: Path, output: Path, processes: int, minutes: float) -> list[Any]:
    """Run what is missing in ``processes`` at once; start nothing after ``minutes``."""
    rows = known(bench, file, output)
    # Replicates go round the settings, so that whatever stops early has all of them.
    jobs = [f"{name}-{n}" for n in range(bench.replicates) for name in bench.settings]
    jobs = [job for job in jobs if job not in rows]
    deadline = time.monotonic() + 60 * minutes
    alive: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while alive or (jobs and time.monotonic() < deadline):
            while jobs and len(alive) < processes and time.monotonic() < deadline:
                job = jobs.pop(0)
                print(f"{job}: begins ({len(rows)} done, {len(jobs)} to come)", flush=True)
                alive[job] = _start(bench, job, output)
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


def _start(bench: Bench, job: str, output: Path) -> subprocess.Popen[bytes]:
    words = ["--job", job, "--output", str(output), *(["--small"] if bench.small else [])]
    with (output / f"{job}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, str(bench.script), *words],
            env={**os.environ, **ONE_THREAD},
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=bench.script.parent,  # where the environments of the benchmarks are
        )


def work(bench: Bench, job: str, output: Path) -> None:
    """One replicate; its row is written beside its folder, which is then removed."""
    name, _, number = job.rpartition("-")
    row = replicate(bench, name, int(number), output)
    save(output / f"{job}.row.json", row)
    shutil.rmtree(output / job)


def arguments(about: str, folder: str) -> argparse.Namespace:
    """What every benchmark of replicates is asked with."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--small", action="store_true", help="minutes; claims nothing")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing after that")
    parser.add_argument("--output", type=Path, default=Path(folder))
    parser.add_argument("--settings", nargs="*", help="only these")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    words = parser.parse_args()
    words.output = words.output.resolve()
    words.output.mkdir(parents=True, exist_ok=True)
    return words
