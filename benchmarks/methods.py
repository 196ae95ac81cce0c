"""Every method on a small set-up, and the two papers' claims that such a set-up can speak about.

* ``all``: each preset from the same teacher and the same starting student, at equal student turns.
* ``steps``: SOD, where a step has seven tokens or more and the student starts in the middle: with
  and without the reward, against uniform weights; how its weights are distributed.
* ``skills``: Skill-SD, where a task has a rule that past episodes reveal and the prompt does not;
  against the reward alone, shuffled skills, empty ones, and skills in the student's own prompt.
* how much of a training step the computation of weights takes.

Invariants: sizes, rates and contrasts are declared here, before anything runs; nothing is chosen
afterwards. Success is of sampled episodes. A claim about a method needs three replicates.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, facts, finished, save, show
from contrasts import compare
from replicates import Bench, arguments, run_all, stage_name, work

from agentdistill.config import RunConfig, load
from agentdistill.methods import METHODS

FILE = RESULTS / "methods.json"
SETTINGS = ("all", "steps", "skills")
OVERHEAD_GOAL = 0.02


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of it; ``--small`` shows that the script works, and nothing else."""

    replicates: int = 3
    demos: int = 2500
    teacher: int = 350
    student: int = 60
    iterations: int = 30
    turns: int = 256
    levels: int = 60


FULL = Scale()
SMALL = Scale(1, 200, 20, 10, 2, 48, 8)

SOKOBAN = {"height": 6, "width": 6, "min_moves": 3, "max_moves": 12, "max_steps": 15}
SIZES = {
    "teacher": {"hidden": 96, "heads": 3, "feed_forward": 256},
    "student": {"hidden": 64, "heads": 2, "feed_forward": 192},
}
GROUP = 4

STEPS: dict[str, dict[str, Any]] = {
    "sod": {"method": "sod", "samples": GROUP},
    "uniform with reward": {
        "method": "sod", "samples": GROUP, "axes": {"weight": {"step": "none"}},
    },
    "sod without reward": {"method": "opd", "axes": {"weight": {"step": "sod"}}},
    "uniform without reward": {"method": "opd"},
    "grpo": {"method": "grpo", "samples": GROUP},
}  # fmt: skip

SKILLS: dict[str, dict[str, Any]] = {
    "skill-sd": {"method": "skill-sd"},
    "shuffled skills": {"method": "skill-sd", "axes": {"context": {"control": "shuffled"}}},
    "empty skills": {"method": "skill-sd", "axes": {"context": {"control": "empty"}}},
    "skills in the prompt": {
        "method": "grpo",
        "axes": {
            "actor": "informed",
            "informed_share": 1.0,
            "context": {"kind": "skill", "reader": "actor"},
            "reward": {"source": "score"},
        },
    },
    "reward alone": {"method": "grpo", "axes": {"reward": {"source": "score"}, "over": "token"}},
}

CONTRASTS = {
    "steps": (
        ("sod", "uniform with reward"),
        ("sod without reward", "uniform without reward"),
        ("sod", "sod without reward"),
        ("sod", "grpo"),
    ),
    "skills": tuple(("skill-sd", other) for other in SKILLS if other != "skill-sd"),
}


def methods(setting: str) -> list[str]:
    """What is compared."""
    return {"all": list(METHODS), "steps": list(STEPS), "skills": list(SKILLS)}[setting]


def contrasts(setting: str) -> Sequence[tuple[str, str]]:
    """The declared comparisons; in ``all``, each method with plain on-policy distillation."""
    if setting == "all":
        return [(name, "opd") for name in METHODS if name != "opd"]
    return CONTRASTS[setting]


def stage_of(name: str) -> dict[str, Any]:
    """What a preset needs besides the shared keys: teacher, data, guide, group, learning rate."""
    axes = METHODS[name].axes
    stage: dict[str, Any] = {"method": name}
    if axes.needs_teacher:
        stage["teacher"] = "taught"
    if axes.actor in ("data", "mixed"):
        stage["data"] = "tried" if name == "redi" else "shown"
    if axes.actor == "cached":
        stage["data"] = "tried"
    if axes.start.kind == "b2f" or axes.context.kind in ("gold", "actions", "demonstrations"):
        stage["guide"] = "shown"
    grouped = axes.reward.kind == "grpo" or axes.context.kind == "sibling"
    if grouped or axes.weight.shift or axes.task.weight != "none":
        stage["samples"] = GROUP
    if not axes.needs_teacher and axes.actor not in ("data", "cached"):
        stage["lr"] = 3e-4  # the rate that rewards bear, here and in the curricula benchmark
    if axes.actor in ("data", "cached"):
        stage.update(turns=None, tasks=0)
    return stage


def recipe(setting: str, number: int, scale: Scale, output: Path) -> RunConfig:
    """The run of replicate ``number`` of a setting."""
    shared = {"model": "student", "init": "before", "iterations": scale.iterations, "updates": 2,
              "turns": scale.turns, "lr": 1e-3, "warmup": 0.05,
              "checkpoint_every": scale.iterations}  # fmt: skip
    build = {"all": _all, "steps": _steps, "skills": _skills}[setting]
    values = build(scale, shared)
    trained = [stage_name(name) for name in methods(setting)]
    starts = [name for name in ("expert", "taught", "before") if name in STARTS[setting]]
    return load(
        {
            "name": f"{setting}-{number}",
            "output": str(output),
            "seed": 3000 + number,
            "prompt": "bare",
            **values,
            "evaluate": {
                "policies": [*starts, *trained],
                "tasks": scale.levels,
                "modes": ["sampled"],
                "seed": 3000 + number,
                **values.get("evaluate", {}),
            },
        }
    )


STARTS = {"all": ("expert", "taught", "before"), "steps": ("expert", "taught", "before"),
          "skills": ("expert", "before")}  # fmt: skip


def _taught(scale: Scale, student: int, limit: int) -> list[dict[str, Any]]:
    """Demonstrations, a teacher that learnt from all of them, a student that saw a few."""
    sft = {"method": "sft", "data": "demos", "lr": 3e-3, "schedule": "cosine", "warmup": 0.05}
    demos = {"do": "collect", "policy": "expert", "episodes": scale.demos, "batch": 256}
    return [
        {"name": "demos", **demos},
        {"name": "taught", "model": "teacher", **sft, "iterations": scale.teacher},
        {"name": "before", "model": "student", **sft, "limit": limit, "iterations": student},
    ]


def _all(scale: Scale, shared: Mapping[str, Any]) -> dict[str, Any]:
    own = {"do": "collect", "batch": 256, "episodes": scale.demos // 5}
    stages = _taught(scale, scale.student, 60)
    stages += [
        {"name": "shown", **own, "policy": "taught"},
        {"name": "tried", **own, "policy": "before", "only_success": False},
    ]
    for name in METHODS:
        stage = {**shared, **stage_of(name)}
        if stage["turns"] is None:  # episodes of 8 moves in the mean, as many turns
            stage["tasks"] = scale.turns // 8
        stages.append({"name": stage_name(name), **stage})
    env = {"id": "agentdistill/Sokoban-v0", "options": SOKOBAN}
    return {"env": env, "sampling": {"max_tokens": 1}, "models": SIZES, "stages": stages}


def _steps(scale: Scale, shared: Mapping[str, Any]) -> dict[str, Any]:
    words = {"vocabulary": 300}  # so few that an answer of three lines is seven tokens or more
    stages = _taught(scale, 4 * scale.student, 4 * scale.demos // 10)
    stages[1]["iterations"] = 2 * scale.teacher
    longer = {**shared, "iterations": 4 * scale.iterations // 3, "lr": 2e-4}
    for name, stage in STEPS.items():
        teacher = {} if stage["method"] == "grpo" else {"teacher": "taught"}
        stages.append({"name": stage_name(name), **longer, **stage, **teacher})
    sizes = {name: {**size, "tokenizer": words} for name, size in SIZES.items()}
    env = {"id": "thinking:ThinkingSokoban", "options": SOKOBAN}
    return {"env": env, "sampling": {"max_tokens": 14}, "models": sizes, "stages": stages}


def _skills(scale: Scale, shared: Mapping[str, Any]) -> dict[str, Any]:
    """The student can read: it learnt from demonstrations in rooms of other names.

    Half of them had a skill about the room beside them, written from an explorer's episode.
    """
    reading = {"context": {"kind": "skill", "reader": "actor"}, "informed_share": 0.5}
    rooms = {"do": "collect", "batch": 256, "episodes": min(800, scale.demos)}
    stages: list[dict[str, Any]] = [
        {"name": "demos", **rooms, "policy": "expert"},
        {"name": "tried", **rooms, "policy": "random", "only_success": False},
        {"name": "before", "model": "student", "method": "sft", "data": "demos", "guide": "tried",
         "axes": reading, "lr": 3e-3, "schedule": "cosine", "warmup": 0.05,
         "iterations": scale.teacher},
    ]  # fmt: skip
    for name, stage in SKILLS.items():
        group = {"samples": GROUP, "split": "tune", "lr": 3e-4,
                 "iterations": 2 * scale.iterations}  # fmt: skip
        stages.append({"name": stage_name(name), **shared, **group, **stage})
    env = {"id": "agentdistill/Lockroom-v0", "options": {"rooms": 800}}
    return {
        "env": env,
        "sampling": {"max_tokens": 2},
        "models": {"student": {"hidden": 96, "heads": 3, "feed_forward": 256}},
        "stages": stages,
        # The rooms that were trained on: what the bank knew must have gone into the weights.
        "evaluate": {"split": "tune", "tasks": min(56, scale.levels), "samples": 4},
    }


def bench(scale: Scale, settings: Sequence[str]) -> list[Bench]:
    """What is replicated, a bench per setting (they measure different things)."""
    return [
        Bench(
            Path(__file__),
            scale is SMALL,
            [setting],
            scale.replicates,
            lambda name, number, output: recipe(name, number, scale, output),
            methods,
            STARTS[setting],
            "" if setting == "skills" else "taught",
            scale.levels // 2,
        )
        for setting in settings
    ]


# -- overhead of weights ---------------------------------------------------------------------------


def overhead(scale: Scale, output: Path) -> dict[str, float]:
    """CPU seconds of SOD's and of SRPO's weights, as a share of the training steps they are in."""
    import agentdistill as ad
    from agentdistill.methods import steps

    found = {}
    plain, spent = steps.STEPS["weights"], [0.0]

    def timed(job: Any) -> None:
        began = time.process_time()
        plain(job)
        spent[0] += time.process_time() - began

    steps.STEPS["weights"] = timed
    try:
        for name in ("sod", "srpo"):
            folder = output / f"overhead-{name}"
            shutil.rmtree(folder, ignore_errors=True)
            values = recipe("all", 0, scale, folder).model_dump(mode="json")
            kept = ("demos", "taught", "before", name)
            stages = [stage for stage in values["stages"] if stage["name"] in kept]
            config = load({**values, "stages": stages, "evaluate": {"policies": []}})
            ad.distill(load({**values, "stages": stages[:-1], "evaluate": {"policies": []}}))
            shutil.move(config.path, folder / "first")
            shutil.copytree(folder / "first", config.path)
            (config.path / "config.yaml").unlink()
            spent[0], began = 0.0, time.process_time()
            ad.distill(config)
            found[name] = spent[0] / (time.process_time() - began)
            shutil.rmtree(folder)
    finally:
        steps.STEPS["weights"] = plain
    return found


# -- tables ----------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]], setting: str) -> str:
    """Means over the replicates of one setting, a policy a line."""
    chosen = [row["policies"] for row in rows if row["setting"] == setting]
    header = ("success", "sd", "optimal", "KL", "env steps", "scored tokens", "seconds")
    lines = [[policy, *_line([each[policy] for each in chosen])] for policy in chosen[0]]
    return show((f"{setting} (n = {len(chosen)})", *header), lines)


def _line(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    import numpy as np

    def mean(values: Sequence[Any], style: str) -> str:
        known = [value for value in values if value is not None]
        return format(float(np.mean(known)), style) if known else "-"

    success = [row["success"] for row in rows]
    spread = f"{np.std(success, ddof=1):.3f}" if len(success) > 1 else "-"
    kl = [float(np.mean(row["kl_by_turn"])) for row in rows if row.get("kl_by_turn")]
    counts = [mean([row.get(key) for row in rows], ",.0f")
              for key in ("env_steps", "scored_tokens", "seconds")]  # fmt: skip
    return [
        mean(success, ".3f"),
        spread,
        mean([row.get("optimal") for row in rows], ".3f"),
        mean(kl, ".2f"),
        *counts,
    ]


def weights(rows: Sequence[Mapping[str, Any]]) -> str:
    """How SOD's weights were distributed: means over iterations and replicates."""
    import numpy as np

    keys = ("mean", "min", "max", "later_mean", "at_cap", "zero_first", "steps")
    lines = []
    for name in ("sod", "sod without reward"):
        logs = [row["policies"][name]["logged"] for row in rows if row["setting"] == "steps"]
        means = [np.mean([log.get(f"weight/step/{key}", np.nan) for log in logs]) for key in keys]
        lines.append([name, *(f"{mean:.3f}" for mean in means)])
    return show(("weights", *keys), lines)


def main() -> None:
    """Run what is missing, print, save."""
    words = arguments(__doc__.splitlines()[0], "runs/methods")
    scale = SMALL if words.small else FULL
    settings = words.settings or SETTINGS
    benches = bench(scale, settings)
    if words.job:
        mine = words.job.rpartition("-")[0]
        return work(bench(scale, [mine])[0], words.job, words.output)
    file = words.output / "methods.json" if words.small else FILE
    about = facts("scipy")
    new = [
        row
        for each in benches
        for row in run_all(each, file, words.output, words.processes, words.minutes)
    ]
    # Read at the end: another call may have measured other settings meanwhile.
    known = json.loads(file.read_text()) if file.exists() else {"rows": []}
    rows = new + [row for row in known["rows"] if row["setting"] not in settings]
    for setting in settings:
        if mine := [row for row in rows if row["setting"] == setting]:
            print(f"\n{table(rows, setting)}\n\n{compare(mine, contrasts(setting))}")
    if any(row["setting"] == "steps" for row in rows):
        print(f"\n{weights(rows)}")
    cost = overhead(scale, words.output) if "all" in settings else known.get("overhead", {})
    for name, share in cost.items():
        print(f"weights of {name}: {share:.2%} of its training (goal below {OVERHEAD_GOAL:.0%})")
    save(file, {"facts": finished(about), "scale": asdict(scale), "rows": rows, "overhead": cost})


if __name__ == "__main__":
    main()
