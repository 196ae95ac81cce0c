"""In-context distillation and the cascade, beside what else the same teacher calls could buy.

Local models stand in for API models, priced by a table. A model of this size cannot use
demonstrations that it never learnt to use, so the student is *meta-trained*: on an expert's
episodes with demonstrations in the prompt, of other tasks and out of a collection that is not used
again. The collection that is searched afterwards is of the teacher's own successful episodes.

Who plays the report panel, everybody the same tasks once, sampled:

* ``teacher``; the student ``before`` its meta-training; ``student``, after it, without
  demonstrations; ``+ retrieval`` (one sample); ``+ cascade`` (three, unanimous, else the teacher
  for that step); ``cascade alone`` (without demonstrations);
* at the cascade's share of teacher calls: ``random`` escalation, and a ``confidence`` threshold on
  the sample's log-probability, both with demonstrations.

Invariants
----------
* Settings are declared here; the share and the threshold of the two controls are read off a sweep
  on the tune split, and the report panel is played once.
* Claims are about these policies on these tasks: intervals are over tasks. One training is no
  replicate, and nothing is claimed about methods.
* Costs come from recorded tokens and the table; ``cached`` is an ideal prefix cache.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cascade_worlds import WORLDS, World, furnished, playable, small
from common import command, facts, finished, results_file, save, show

PRICES = {
    "teacher": {"input": "3", "cache_write": "3.75", "cache_read": "0.30", "output": "15"},
    "student": {"input": "0.40", "cache_read": "0.10", "output": "1.60"},
}
"""Money per million tokens: what a large and a small model cost in the autumn of 2025."""

RULES = [("unanimous", None), ("majority", None)]


def recipe(world: World, name: str, output: str) -> dict[str, Any]:
    """The run: teacher, meta-trained student, the teacher's collection, and the policies."""
    sft = {"method": "sft", "lr": world.lr, "schedule": "cosine", "warmup": 0.05,
           "weight_decay": 0.01, "tasks": world.batch}  # fmt: skip

    def collect(name: str, episodes: int, policy: str = "expert") -> dict[str, Any]:
        batch = min(256, episodes)
        return {"do": "collect", "name": name, "policy": policy, "episodes": episodes,
                "batch": batch}  # fmt: skip

    teacher, warm, meta = world.steps
    shows = {"k": world.k, "window": world.window}
    return {
        "name": name,
        "output": output,
        "workers": 2,
        "env": world.env,
        "prompt": world.prompt,
        "sampling": {"max_tokens": world.tokens, "temperature": world.temperature},
        "models": {key: {**size, "price": PRICES[key]} for key, size in world.models.items()},
        "stages": [
            collect("demos", world.demos),
            collect("lessons", world.lessons),
            collect("shown", world.shown, "showing"),
            {**sft, "name": "taught", "model": "teacher", "data": "demos", "iterations": teacher},
            {**sft, "name": "warm", "model": "student", "data": "demos", "limit": world.warm,
             "iterations": warm},
            {**sft, "name": "reader", "model": "student", "init": "warm", "data": "shown",
             "iterations": meta},
            collect("library", world.library, "taught"),
        ],
        "policies": {
            "showing": {"student": "student", "teacher": "expert", "rule": "always",
                        "demos": "lessons", "teacher_demos": True, **shows},
            "cascade": {"student": "reader", "teacher": "taught", "demos": "library", **shows},
        },
        "evaluate": {"policies": [], "modes": ["sampled"], **world.evaluate},
    }  # fmt: skip


def players(k: int, share: float, threshold: float) -> dict[str, dict[str, Any]]:
    """Everybody's changes of the cascade, by name."""
    return {
        "teacher": {"rule": "always", "k": 0},
        "before": {"student": "warm", "rule": "never", "samples": 1, "k": 0},
        "student": {"rule": "never", "samples": 1, "k": 0},
        "+ retrieval": {"rule": "never", "samples": 1},
        "+ cascade": {},
        "cascade alone": {"k": 0},
        "random": {"rule": "random", "threshold": share, "samples": 1},
        "confidence": {"rule": "confidence", "threshold": threshold, "samples": 1},
    }


# -- tuning ----------------------------------------------------------------------------------------


def controls(points: Sequence[Any], k: int) -> tuple[float, float]:
    """The cascade's share of teacher calls, and the confidence threshold that comes nearest to it.

    Args:
        points: of a sweep (:class:`agentdistill.tuning.Point`).
        k: demonstrations of the cascade.
    """
    mine = [point for point in points if point.said.k == k]
    (cascade,) = [p for p in mine if p.said.rule == "unanimous" and p.said.samples == 3]
    sure = [p for p in mine if p.said.rule == "confidence"]
    nearest = min(sure, key=lambda p: abs(p.share - cascade.share))
    return cascade.share, float(nearest.said.threshold)


def run(world: World, name: str, output: Path) -> dict[str, Any]:
    """Train, sweep on the tune split, play the report panel."""
    import agentdistill as ad
    from agentdistill.config import load
    from agentdistill.tuning import sweep

    config = load(recipe(furnished(world, output / f"{name}-games"), name, str(output)))
    outcome = ad.distill(config)
    rules = [*RULES, *(("confidence", least) for least in world.sure)]
    found = sweep(
        config,
        "cascade",
        samples=world.samples,
        ks=(0, world.k),
        rules=rules,
        chances=world.chances,
        say=lambda line: print(f"tune {line}", flush=True),
    )
    share, threshold = controls(found.points, world.k)
    results = played(config, players(world.k, share, threshold), output / f"{name}-report")
    return {
        "world": asdict(world),
        "seconds": {stage: said["seconds"] for stage, said in outcome.stages.items()},
        "sweep": found.to_json(),
        "share": share,
        "threshold": threshold,
        "results": results,
    }


# -- the report panel ------------------------------------------------------------------------------


def played(
    config: Any, changes: Mapping[str, Mapping[str, Any]], folder: Path
) -> dict[str, dict[str, Any]]:
    """What everybody did on the report panel; who has played before is read."""
    from agentdistill.config import CascadeConfig
    from agentdistill.evaluation import play
    from agentdistill.files import write_text
    from agentdistill.run import Run

    folder.mkdir(parents=True, exist_ok=True)
    base, found = config.policies["cascade"].model_dump(), {}
    with Run(config) as the_run:
        for name, change in changes.items():
            file = folder / f"{name.strip('+ ').replace(' ', '-')}.json"
            said = CascadeConfig.model_validate({**base, **change})
            if not file.exists():
                policy = the_run.cascade("cascade", said=said)
                result = play(the_run, policy, "sampled", config.evaluate)
                setting = {**result.setting, "made of": said.model_dump(mode="json")}
                write_text(file, json.dumps({**result.to_json(), "setting": setting}))
                print(f"report {name}: {result.success:.1%}", flush=True)
            found[name] = json.loads(file.read_text())
    return found


def even(results: Mapping[str, Any], demonstrations: int, name: str, kind: str) -> str:
    """Episodes until the demonstrations have paid for themselves, for people."""
    from agentdistill import costs

    teacher, mine = results["teacher"]["cost"][kind], results[name]["cost"][kind]
    return costs.episodes(costs.break_even(demonstrations * teacher, teacher, mine))


def table(found: Mapping[str, Any]) -> str:
    """The report panel, a policy a line."""
    results = found["results"]
    number = found["sweep"]["demonstrations"]
    header = ("report panel", "success", "95%", "teacher calls", "turns",
              "cost uncached", "cached", "break-even", "against cached")  # fmt: skip
    lines = []
    for name, result in results.items():
        low, high = (100 * bound for bound in result["interval"])
        base = results["teacher"]["cost"]
        pays = name in ("+ retrieval", "+ cascade", "random", "confidence")
        lines.append(
            [
                name,
                f"{result['success']:.1%}",
                f"{low:.0f} to {high:.0f}",
                f"{result['asked'] or 0:.1%}",
                f"{result['turns']:.1f}",
                *(f"{result['cost'][kind] / base[kind]:.2f}" for kind in ("uncached", "cached")),
                *(even(results, number, name, kind) if pays else "-"
                  for kind in ("uncached", "cached")),
            ]
        )  # fmt: skip
    return show(header, lines)


PAIRS = (
    ("+ retrieval", "student"),
    ("+ retrieval", "before"),
    ("+ cascade", "+ retrieval"),
    ("+ cascade", "teacher"),
    ("+ cascade", "cascade alone"),
    ("+ cascade", "random"),
    ("+ cascade", "confidence"),
)
"""Declared before the report panel was played: the shape of the paper, and the controls."""


def differences(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Paired differences in success over tasks, with 95% intervals and adjusted p-values."""
    from agentdistill.statistics import by_task, holm, over_tasks, sign_flip

    found = []
    for first, second in PAIRS:
        pair = [by_task(results[n]["outcomes"], len(results[n]["keys"])) for n in (first, second)]
        gap = pair[0] - pair[1]
        interval = over_tasks(*pair)
        found.append(
            {"first": first, "second": second, "difference": float(gap.mean()),
             "low": interval.low, "high": interval.high, "p": sign_flip(gap)}
        )  # fmt: skip
    adjusted = holm([one["p"] for one in found])
    return [{**one, "holm": p} for one, p in zip(found, adjusted, strict=True)]


def compared(rows: Sequence[Mapping[str, Any]]) -> str:
    """The declared pairs as a table."""
    header = ("paired difference", "mean", "95%", "p", "Holm")
    return show(
        header,
        [
            [f"{r['first']} - {r['second']}", f"{r['difference']:+.3f}",
             f"{r['low']:+.3f} to {r['high']:+.3f}", f"{r['p']:.3f}", f"{r['holm']:.3f}"]
            for r in rows
        ],
    )  # fmt: skip


def curves(found: Mapping[str, Any]) -> str:
    """Areas between each rule's curve and random escalation, on the tune split."""
    lines = [
        [curve["label"], " ".join(f"{x:.2f}:{y:.2f}" for x, y in curve["points"]),
         "-" if curve["gain"] is None else f"{curve['gain']:+.3f}"]
        for curve in found["sweep"]["curves"]
    ]  # fmt: skip
    return show(("tune split", "share of teacher calls: success", "gain over random"), lines)


def shape(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether the paper's shape is there, in one line."""
    by = {(r["first"], r["second"]): r for r in rows}
    steps = {
        "retrieval helps": by["+ retrieval", "student"]["low"] > 0,
        "the cascade helps more": by["+ cascade", "+ retrieval"]["low"] > 0,
        "the cascade is behind the teacher": by["+ cascade", "teacher"]["high"] < 0,
    }
    said = "; ".join(f"{name}: {'yes' if holds else 'not shown'}" for name, holds in steps.items())
    return f"student < + retrieval < + cascade ~ teacher: {said}"


def main() -> None:
    """Read the command line, run, print, write."""
    parser = command("cascade", __doc__)
    text = "by default those that are installed; the results of others are kept"
    parser.add_argument("--worlds", nargs="*", choices=tuple(WORLDS), default=playable(), help=text)
    parser.add_argument("--runs", type=Path, help="folder of the runs, which go on there")
    given = parser.parse_args()
    file = results_file(given)
    with tempfile.TemporaryDirectory() as folder:
        for name in given.worlds:
            known, world = facts(), small(WORLDS[name]) if given.small else WORLDS[name]
            one = run(world, f"cascade-{name}", given.runs or Path(folder))
            one["differences"] = differences(one["results"])
            print(f"\n{name}\n{table(one)}\n\n{compared(one['differences'])}\n")
            print(f"{shape(one['differences'])}\n\n{curves(one)}\n")
            if file is not None:
                keep(file, name, {"machine": finished(known), "prices": PRICES, **one})


def keep(file: Path, name: str, one: Mapping[str, Any]) -> None:
    """Put the results of a world in place of its earlier ones."""
    earlier = json.loads(file.read_text())["worlds"] if file.exists() else {}
    save(file, {"worlds": {**earlier, name: one}})


if __name__ == "__main__":
    main()
