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

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, facts, finished, save, show
from contrasts import compare
from replicates import COUNTS, Bench, arguments, run_all, stage_name, work

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


def bench(scale: Scale) -> Bench:
    """What is replicated."""
    return Bench(
        Path(__file__),
        scale is SMALL,
        list(SETTINGS),
        scale.replicates,
        lambda name, number, output: recipe(name, number, scale, output),
        lambda name: list(methods(SETTINGS[name], scale)),
        levels=scale.levels // 2,
    )


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
    words = arguments(__doc__.splitlines()[0], "runs/curricula")
    scale = SMALL if words.small else FULL
    if words.job:
        return work(bench(scale), words.job, words.output)
    file = words.output / "curricula.json" if words.small else FILE
    about = facts("scipy")
    rows = run_all(bench(scale), file, words.output, words.processes, words.minutes)
    for setting in words.settings or SETTINGS:
        if mine := [row for row in rows if row["setting"] == setting]:
            print(f"\n{table(rows, setting)}\n\n{compare(mine, contrasts(setting))}")
    save(file, {"facts": finished(about), "scale": asdict(scale), "rows": rows})


if __name__ == "__main__":
    main()
