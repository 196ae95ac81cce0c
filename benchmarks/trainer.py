"""One update of distillation: this library, trl and the dense form, in one run.

All train the same student against the same teacher on the same token ids and positions, with the
same divergence over the whole vocabulary (the reverse KL, or a generalised Jensen-Shannon) and the
same optimiser settings (AdamW, constant rate, clip 1, fp32, one thread). An update is everything
from the records to the changed weights; the teacher's scores are part of it.

Invariants
----------
* Each contender runs in fresh processes, one at a time, in turns (A B C A B C …): the machine may
  be busy, and a slow minute then hits all of them. Ratios compare neighbours.
* That all started from the same weights, trained the same tokens after the same prefixes, and had
  the same losses (:data:`TOLERANCE`) is checked in every run, on what each of them really used.
* The floor is the arithmetic that no form can avoid, at the speed of a large matrix product that
  was measured in the same process.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import linear_regression
from typing import Any

from common import (
    Log,
    agreement,
    command,
    cost,
    digest,
    facts,
    finished,
    in_turns,
    results_file,
    save,
    show,
)
from common import spread as spread_of
from trainer_data import Job, Size, fingerprint
from trainer_runs import CONTENDERS, SETTINGS, WARM, ours

TOLERANCE = 1e-4
"""Losses of two contenders may differ by so many nats, in every update."""
PROFILE = "ours, profiled"
PROFILED = 3
"""Updates that a profile watches, after the warm ones."""
TOP = 14
"""Operations that a profile lists."""
PHASES = (
    "table",
    "teacher's body",
    "student's body, forward",
    "both heads and divergence",
    "optimiser",
)
UPDATE = "forward and backward"

LARGE = Size(
    "large head",
    vocabulary=32_000,
    student=(128, 4, 2, 384),
    teacher=(192, 6, 2, 576),
    batch=8,
    turns=(2, 8),
    prompt=40,
    observation=24,
    response=16,
    steps=4,
    contenders=("ours", "trl", "trl, GKD", "dense"),
)
TWO, THREE = ("ours", "trl"), ("ours", "trl", "dense")
CHECKED = ("ours", "trl", "trl, checkpointing", "dense")
ONE_TURN: dict[str, Any] = {"turns": (1, 1), "prompt": 32, "observation": 0, "response": 128}
BODY: dict[str, Any] = {"student": (256, 8, 4, 768), "teacher": (384, 12, 4, 1152)}
FULL = (
    Size("quickstart", steps=25),
    LARGE,
    dataclasses.replace(LARGE, name="large head, JSD", beta=0.5, batch=4, contenders=TWO),
    dataclasses.replace(LARGE, name="large head, one turn", contenders=THREE, **ONE_TURN),
    dataclasses.replace(LARGE, name="large body", vocabulary=2_000, contenders=CHECKED, **BODY),
)
SMALL = (Size("small", batch=4, turns=(2, 6), steps=4, repeats=1, contenders=TWO),)
FORMS = ("ours", "ours, per turn")
EPISODE = Size(
    "",
    vocabulary=2_000,
    student=(128, 4, 2, 384),
    teacher=(128, 4, 2, 384),
    batch=2,
    prompt=0,
    observation=24,
    response=8,
    steps=6,
    contenders=FORMS,
)
SWEEP = (2, 4, 8, 16, 32)
"""Turns of the episodes that are trained as one stream and as one sample per turn."""
TURNS = "turns"
"""What the command line calls that."""


def sweep(turns: Sequence[int]) -> list[Size]:
    """The same episode, longer and longer."""
    return [dataclasses.replace(EPISODE, name=f"{n} turns", turns=(n, n)) for n in turns]


# -- in a process of its own ----------------------------------------------------------------------


def worker(told: Mapping[str, Any]) -> None:
    """Run one contender; leave what it noted and its weights."""
    from safetensors.torch import save_file

    size = Size(**told["size"])
    job = Job(size, Path(told["folder"]), Log())
    if told["contender"] == PROFILE:
        job.log.notes.update(profiled(job))
    else:
        CONTENDERS[told["contender"]](job)
    save_file(dict(job.student.named_parameters()), told["weights"])
    job.log.notes.update(
        losses=job.losses,
        trained=fingerprint(job.used),
        digest=digest(Path(told["weights"])),
        processed=job.processed / len(job.used),
        sequence_tokens=sum(len(ids) for ids, _ in job.used[0]),
        floor=floor(job),
        flops_per_s=matmul_rate(),
    )
    Path(told["result"]).write_text(json.dumps(job.log.notes))


def floor(job: Job) -> dict[str, float]:
    """Floating-point operations of one update, if every sequence that was used is read once.

    A product of [n, a] and [a, b] takes 2nab. Each one of the student's comes three times (forward,
    gradient of its input, gradient of its weight), the teacher's once. Attention counts the causal
    half. Heads count for trained tokens only; element-wise work does not count at all.
    """
    found = {}
    used = job.used[0]
    tokens, rows = sum(len(ids) for ids, _ in used), sum(sum(trained) for _, trained in used)
    for name, model, times in (("student", job.student, 3), ("teacher", job.teacher, 1)):
        layers = model.model.layers
        body = sum(weight.numel() for weight in layers.parameters() if weight.dim() == 2)
        width = model.config.num_attention_heads * model.config.head_dim
        pairs = sum(len(ids) ** 2 for ids, _ in used) / 2
        found[f"{name}_body"] = 2.0 * times * body * tokens
        found[f"{name}_attention"] = 4.0 * times * len(layers) * width * pairs
        found[f"{name}_head"] = 2.0 * times * model.get_output_embeddings().weight.numel() * rows
    return found


def matmul_rate(seconds: float = 1.0) -> float:
    """Operations per CPU second of float32 products of two 1024 x 1024 matrices: the best seen."""
    import torch

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best, end = math.inf, time.process_time() + seconds
    while time.process_time() < end:
        began = time.process_time()
        torch.mm(a, b)
        best = min(best, time.process_time() - began)
    return 2 * 1024**3 / best


def profiled(job: Job) -> dict[str, Any]:
    """Run ours under torch's profiler: CPU seconds per update of each phase and operation."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from agentdistill import optimise, table
    from agentdistill.teachers.scorer import LocalScorer

    def name(owner: Any, attribute: str, phase: str) -> None:
        """Let the profiler see ``owner.attribute`` as ``phase``."""
        function: Callable[..., Any] = getattr(owner, attribute)

        def named(*args: Any, **kwargs: Any) -> Any:
            with record_function(phase):
                return function(*args, **kwargs)

        setattr(owner, attribute, named)

    name(table, "build", PHASES[0])
    name(LocalScorer, "score", PHASES[1])
    name(optimise, "backward", UPDATE)
    name(optimise, "hidden_states", PHASES[2])
    name(optimise, "_chunk", PHASES[3])
    name(optimise.Optimiser, "step", PHASES[4])
    tool = profile(activities=[ProfilerActivity.CPU])
    job.size = dataclasses.replace(job.size, steps=WARM + PROFILED)
    ours(job, profiler=tool)
    return _summary(tool.key_averages(), PROFILED)


def _summary(events: Sequence[Any], steps: int) -> dict[str, Any]:
    """Seconds per update: of each phase, and of the operations that took most, by themselves."""
    seconds = {event.key: event.cpu_time_total * 1e-6 / steps for event in events}
    phases = {key: seconds[key] for key in PHASES}
    phases["student's body, backward"] = seconds[UPDATE] - phases[PHASES[2]] - phases[PHASES[3]]
    alone = {
        event.key: (event.self_cpu_time_total * 1e-6 / steps, event.count / steps)
        for event in events
        if event.key not in (*PHASES, UPDATE)
    }
    whole = sum(spent for spent, _ in alone.values())
    top = sorted(alone.items(), key=lambda item: -item[1][0])[:TOP]
    operations = {k: {"share": s / whole, "s": s, "calls": calls} for k, (s, calls) in top}
    return {"phases": phases, "operations": operations}


# -- the comparison -------------------------------------------------------------------------------


def compare(size: Size, folder: Path, profile: bool = False) -> dict[str, Any]:
    """Everything about one size; with ``profile`` also where our time goes.

    Raises:
        RuntimeError: contenders did not train the same.
    """
    job = {"size": dataclasses.asdict(size), "folder": str(folder)}
    order = [*size.contenders] * size.repeats + [PROFILE] * profile
    runs = in_turns(str(Path(__file__)), job, order, folder, size.name)
    watched = runs.pop(PROFILE, [])
    check(size.name, runs)
    base = runs["ours"]
    new = base[0]["sequence_tokens"]
    start = folder / "start.safetensors"
    found: dict[str, Any] = {
        "size": job["size"],
        "new_tokens": new,
        "losses": base[0]["losses"],
        "floor": base[0]["floor"],
        "cost": {name: _cost(runs[name], base, new) for name in size.contenders},
        "agreement": {
            name: agreement(runs[name], base, start, size.steps) for name in size.contenders[1:]
        },
    }
    for run in watched:
        found["profile"] = {key: run[key] for key in ("phases", "operations")}
    return found


def check(name: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Refuse runs that did not train the same.

    Raises:
        RuntimeError: weights at the start, trained tokens or losses differ.
    """
    every = [run for found in runs.values() for run in found]
    for fact in ("start", "trained"):
        if len({run[fact] for run in every}) != 1:
            raise RuntimeError(f"{name}: contenders differ in {fact}; nothing to compare")
    for losses in zip(*(run["losses"] for run in every), strict=True):
        if max(losses) - min(losses) > TOLERANCE:
            raise RuntimeError(f"{name}: contenders differ in losses: {losses}")


def _cost(
    runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], new: int
) -> dict[str, Any]:
    """:func:`common.cost`, memory without imports, tokens processed per new one, and the floor."""
    found = cost(runs, base, new, WARM)
    mine, theirs = ([run["end_mib"] - run["import_mib"] for run in group] for group in (runs, base))
    found["memory_mib"] = spread_of(mine)
    found["ratio_memory"] = spread_of([a / b for a, b in zip(mine, theirs, strict=True)])
    found["processed_per_new"] = runs[0]["processed"] / new
    least = sum(base[0]["floor"].values())
    fastest = max(run["flops_per_s"] for run in (*runs, *base))
    found["floor_s"] = least / fastest
    found["share_of_floor"] = found["floor_s"] / found["step_cpu_s"]["median"]
    return found


def exponent(turns: Sequence[int], seconds: Sequence[float]) -> float:
    """The e of seconds = c * turns ** e that fits best on a logarithmic scale."""
    return linear_regression([*map(math.log, turns)], [*map(math.log, seconds)]).slope


def fitted(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How CPU seconds, processed tokens and memory grow with turns, for both forms."""
    turns = [one["size"]["turns"][0] for one in found]
    grown: dict[str, Any] = {"turns": turns}
    for form in FORMS:
        costs = [one["cost"][form] for one in found]
        seconds = [part["step_cpu_s"]["median"] for part in costs]
        grown[form] = {
            "cpu_s": seconds,
            "processed_per_new": [part["processed_per_new"] for part in costs],
            "memory_mib": [part["memory_mib"]["median"] for part in costs],
            "exponent": exponent(turns, seconds),
            "exponent_of_the_last_three": exponent(turns[-3:], seconds[-3:]),
        }
    grown["ratio_cpu"] = [one["cost"][FORMS[1]]["ratio_cpu"]["median"] for one in found]
    return grown


COLUMNS: Mapping[str, tuple[str, str]] = {
    "s/update": ("step_wall_s", ".3f"),
    "CPU s": ("step_cpu_s", ".3f"),
    "tokens/CPU s": ("tokens_per_cpu_s", ".0f"),
    "x s": ("ratio_wall", ".2f"),
    "x CPU s": ("ratio_cpu", ".2f"),
    "MiB": ("memory_mib", ".0f"),
    "x MiB": ("ratio_memory", ".2f"),
    "processed/new": ("processed_per_new", ".2f"),
    "of floor": ("share_of_floor", ".0%"),
}


def report(found: Mapping[str, Any]) -> str:
    """The tables of one size."""
    rows = []
    for name, part in found["cost"].items():
        values = [(part[key], style) for key, style in COLUMNS.values()]
        rows.append(
            [name, *(format(v["median"] if isinstance(v, dict) else v, s) for v, s in values)]
        )
    apart = max((a["loss"] for a in found["agreement"].values()), default=0.0)
    text = f"{found['size']['name']}: {found['new_tokens']} new tokens an update, losses within "
    text += f"{apart:.0e}\n{show(('', *COLUMNS), rows)}\n"
    if "profile" not in found:
        return text
    phases = found["profile"]["phases"]
    whole = sum(phases.values())
    text += "".join(f"\n  {s / whole:4.0%}  {name}" for name, s in phases.items()) + "\n"
    operations = found["profile"]["operations"].items()
    lines = [[k, f"{o['share']:.1%}", f"{o['s']:.4f}", f"{o['calls']:.0f}"] for k, o in operations]
    return text + "\n" + show(("operation", "share", "s/update", "calls"), lines) + "\n"


def report_turns(grown: Mapping[str, Any]) -> str:
    """The table of the sweep."""
    columns = [grown["turns"]]
    header = ["turns"]
    for form in FORMS:
        header += [f"{form}: CPU s", "processed/new", "MiB"]
        part = grown[form]
        columns.append([f"{s:.3f}" for s in part["cpu_s"]])
        columns.append([f"{r:.2f}" for r in part["processed_per_new"]])
        columns.append([f"{m:.0f}" for m in part["memory_mib"]])
    columns.append([f"{r:.2f}" for r in grown["ratio_cpu"]])
    rows = [list(map(str, row)) for row in zip(*columns, strict=True)]
    fits = ", ".join(
        f"{form} T^{grown[form]['exponent']:.2f} (last three: "
        f"{grown[form]['exponent_of_the_last_three']:.2f})"
        for form in FORMS
    )
    return f"{show((*header, 'x CPU s'), rows)}\nfitted: {fits}\n"


def main() -> None:
    """Read the command line, run, print, write."""
    parser = command("trainer", __doc__, "under two minutes: shows it works")
    parser.add_argument("--repeats", type=int, help="processes per contender (3; small: 1)")
    parser.add_argument("--only", action="append", help=f"a comparison by name, or {TURNS!r}")
    given = parser.parse_args()
    if given.job:
        worker(json.loads(given.job))
        return
    known = facts("trl", "accelerate", "datasets", "safetensors")

    def run(size: Size, profile: bool = False) -> dict[str, Any]:
        size = dataclasses.replace(size, repeats=given.repeats or (1 if given.small else 3))
        with tempfile.TemporaryDirectory() as folder:
            found = compare(size, Path(folder), profile)
        print(f"\n{report(found)}", flush=True)
        return found

    sizes, turns = (SMALL, SWEEP[:2]) if given.small else (FULL, SWEEP)
    wanted = given.only or [TURNS, *(size.name for size in sizes)]
    comparisons = [run(size, profile=size.beta == 1) for size in sizes if size.name in wanted]
    grown = fitted([run(size) for size in sweep(turns)]) if TURNS in wanted else None
    print(report_turns(grown) if grown else "")
    settings = {**SETTINGS, "warm_steps": WARM, "tolerance": TOLERANCE}
    results = {"settings": settings, "comparisons": comparisons, "turns": grown}
    file = results_file(given)
    if file is not None:
        save(file, {"machine": finished(known), **results})


if __name__ == "__main__":
    main()
