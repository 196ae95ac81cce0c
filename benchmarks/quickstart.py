"""Which method quickstart distils with by default, and what it then shows: on other replicates.

A replicate is quickstart's own recipe with another seed: another teacher, another student's start,
other levels; every method begins from that pair and takes the same number of environment steps.

Invariants
----------
* The default is the on-policy candidate with the highest mean success over the replicates of
  ``tune``, on levels of the tune split. What the README says of it comes from the replicates of
  ``report``: other seeds, the report split.
* Candidates are declared here, and are what ``agentdistill quickstart --method NAME`` trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, facts, finished, save, show
from contrasts import compare
from replicates import Bench, arguments, run_all, stage_name, work

from agentdistill import quickstart
from agentdistill.config import RunConfig, load

FILE = RESULTS / "quickstart.json"
SEEDS = {"tune": 100, "report": 0}
"""Of the first replicate on each split."""
ON_POLICY = ("opd-exact", "opd", "tcod-f2b-exact")
OFF_POLICY = ("kd", "kd-sft")
STARTS = ("taught", "before")


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of it; None is what quickstart says."""

    replicates: int = 5
    demos: int | None = None
    teacher: int | None = None
    env_steps: int | None = None
    levels: int = 200


FULL = Scale()
SMALL = Scale(1, 200, 20, 300, 10)


def recipe(split: str, number: int, scale: Scale, output: Path) -> RunConfig:
    """Quickstart with all candidates, from one teacher and one start."""
    values = quickstart.recipe()
    stages = {stage["name"]: dict(stage) for stage in values["stages"]}
    distilled = stages[quickstart.STUDENT]
    _set(stages["demos"], "episodes", scale.demos)
    _set(stages["taught"], "iterations", scale.teacher)
    _set(distilled, "env_steps", scale.env_steps)
    names = [*ON_POLICY, *OFF_POLICY]
    compared = [{**distilled, "name": stage_name(name), "method": name} for name in names]
    seed = SEEDS[split] + number
    return load(
        {
            **values,
            "name": f"{split}-{number}",
            "output": str(output),
            "seed": seed,
            "workers": 1,
            "stages": [stages[name] for name in ("demos", "taught", "before")] + compared,
            "evaluate": {
                "policies": [*STARTS, *map(stage_name, names)],
                "split": split,
                "tasks": scale.levels,
                "modes": ["sampled"],
                "seed": seed,
            },
        }
    )


def _set(stage: dict[str, Any], key: str, value: int | None) -> None:
    if value is not None:
        stage[key] = value


def bench(scale: Scale) -> Bench:
    """What is replicated."""
    return Bench(
        Path(__file__),
        scale is SMALL,
        list(SEEDS),
        scale.replicates,
        lambda name, number, output: recipe(name, number, scale, output),
        lambda name: [*ON_POLICY, *OFF_POLICY],
        starts=STARTS,
        teacher="",
    )


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean success over replicates, by policy."""
    return {
        policy: sum(row["policies"][policy]["success"] for row in rows) / len(rows)
        for policy in rows[0]["policies"]
    }


def choice(rows: Sequence[Mapping[str, Any]]) -> str:
    """The default: the best on-policy candidate of the tune replicates ``rows``."""
    found = means(rows)
    return max(ON_POLICY, key=lambda name: found[name])


def table(rows: Sequence[Mapping[str, Any]], split: str) -> str:
    """A policy a line: mean success, by replicate, and what it took."""
    found, lines = means(rows), []
    for policy, mean in found.items():
        mine = [row["policies"][policy] for row in rows]
        each = " ".join(f"{100 * one['success']:.0f}" for one in mine)
        seconds = [one["seconds"] for one in mine if "seconds" in one]
        spent = f"{sum(seconds) / len(seconds):.0f}" if seconds else "-"
        lines.append([policy, f"{mean:.1%}", each, spent])
    return show((f"{split} (n = {len(rows)})", "success", "by replicate, %", "seconds"), lines)


def main() -> None:
    """Run what is missing, print, save."""
    words = arguments(__doc__.splitlines()[0], "runs/quickstart")
    scale = SMALL if words.small else FULL
    if words.job:
        return work(bench(scale), words.job, words.output)
    file = words.output / "quickstart.json" if words.small else FILE
    about = facts("scipy")
    rows = run_all(bench(scale), file, words.output, words.processes, words.minutes)
    parts = {split: [row for row in rows if row["setting"] == split] for split in SEEDS}
    chosen = choice(parts["tune"]) if parts["tune"] else None
    print(f"\nchosen on tune: {chosen}")
    for split, mine in parts.items():
        if mine:
            pairs = [(chosen, "before"), (chosen, "kd"), ("opd-exact", "opd")]
            print(f"\n{table(mine, split)}\n\n{compare(mine, [p for p in pairs if all(p)])}")
    save(file, {"facts": finished(about), "scale": asdict(scale), "chosen": chosen, "rows": rows})


if __name__ == "__main__":
    main()
