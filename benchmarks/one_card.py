"""One GPU: whole iterations at real sizes, with random weights, beside trl on the same token ids.

A 1.7B student and an 8B teacher (the shapes of Qwen3, written below; nothing is downloaded) play an
environment that only has ALFWorld's lengths, through the library's own run and training. Random
weights cost what trained ones cost, and almost never end a response early: every iteration has the
same number of tokens.

Invariants
----------
* Each contender runs in a process of its own. trl trains on the ids that ours played, from the same
  weights, by the same objective (reverse KL over the vocabulary) and the same AdamW; its step has
  the teacher's forward pass in it, so it is compared with our score and update together.
* Times are of the second iteration, with the device waited for at the end of each phase. Busy time
  is what kernels took in the first one (the profiler would slow the second), less overlaps.
* Without a GPU, tiny sizes go through the same code, and the results say that they are no GPU's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import ONE_THREAD, command, facts, finished, results_file, save, show
from one_card_runs import worker
from one_card_setup import SETTINGS, Shape, Size, device

CONTENDERS = ("ours", "trl", "trl, no checkpointing")
GOALS = {"peak_gb": 80.0, "idle": 0.10, "ratio": 3.0}
"""Fits into so much, idles at most that share, updates at least so many times as fast as trl."""
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
}
"""Dense bfloat16 FLOP/s by a part of the device's name, the first that fits (NVIDIA's data
sheets, without sparsity)."""


# Qwen3-1.7B and Qwen3-8B as their config.json says. 30 turns is TCOD's limit on ALFWorld (arXiv
# 2604.24005); 120 and 80 tokens are round numbers for an observation with its admissible actions
# and a short thought with its action: 6,000 tokens an episode, below TCOD's limit of 10,240. An
# episode a forward pass and eight at once are what fits into 80 GB (`agentdistill plan`).
FULL = Size(
    "alfworld lengths",
    student=Shape(2048, 28, 16, 8, 6144, True),
    teacher=Shape(4096, 36, 32, 8, 12288, False),
    vocabulary=151_936,
    turns=30,
    observation=120,
    response=80,
    episodes=16,
    slots=8,
    micro_tokens=6144,
)
SMALL = Size(
    "tiny",
    student=Shape(32, 2, 2, 1, 96, True, 16),
    teacher=Shape(48, 3, 3, 1, 144, False, 16),
    vocabulary=1024,
    turns=4,
    observation=12,
    response=8,
    episodes=4,
    slots=4,
    micro_tokens=256,
)


# -- numbers ---------------------------------------------------------------------------------------


def forward_flops(shape: Shape, vocabulary: int, lengths: Sequence[int], rows: int) -> float:
    """FLOPs of one forward pass: two per weight and token, causal attention, the head on rows."""
    inner, groups = shape.heads * shape.dim, shape.groups * shape.dim
    layer = shape.hidden * (2 * inner + 2 * groups + 3 * shape.feed_forward)
    attention = 2 * inner * sum(length * length for length in lengths)
    body = shape.layers * (2 * layer * sum(lengths) + attention)
    return float(body + 2 * shape.hidden * vocabulary * rows)


def flops(size: Size, lengths: Sequence[int], rows: int) -> dict[str, float]:
    """FLOPs by phase; an update is three forward passes and the teacher's head."""
    student = forward_flops(size.student, size.vocabulary, lengths, rows)
    body = forward_flops(size.teacher, size.vocabulary, lengths, 0)
    head = forward_flops(size.teacher, size.vocabulary, [], rows)
    return {"generate": student, "score": body, "update": 3 * student + head}


def peak_flops(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its name; None where the table has none."""
    return next((value for part, value in PEAKS.items() if part in name), None)


def compare(size: Size, folder: Path, contenders: Sequence[str] = CONTENDERS) -> dict[str, Any]:
    """Run the contenders; ``ours`` comes first, since it makes the ids.

    Raises:
        RuntimeError: ours failed. Another one that does (for want of memory) is noted.
    """
    runs: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(contenders, 1):
        print(f"{size.name}: {number}/{len(contenders)} {name}", flush=True)
        runs[name] = _process(size, folder, name)
        if "failed" in runs["ours"]:
            raise RuntimeError(f"ours failed\n{runs['ours']['failed']}")
    (*_, last) = json.loads((folder / "rows.json").read_text())
    lengths, acted = [len(row["ids"]) for row in last], sum(sum(row["acted"]) for row in last)
    return results(size, runs, lengths, acted)


def _process(size: Size, folder: Path, name: str) -> dict[str, Any]:
    """What one contender noted in a process of its own, or the end of what it said."""
    result = folder / "result.json"
    job = {"size": asdict(size), "folder": str(folder), "result": str(result), "contender": name}
    given = {key: value for key, value in ONE_THREAD.items() if key != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job)],
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"failed": (done.stdout + done.stderr)[-2000:]}
    return dict(json.loads(result.read_text()))


def results(
    size: Size, runs: Mapping[str, Any], lengths: Sequence[int], acted: int
) -> dict[str, Any]:
    """What the notes of the contenders amount to."""
    mine = runs["ours"]
    last, peak = mine["steps"][-1], peak_flops(mine["device"])
    seconds = {phase: last[f"seconds/{phase}"] for phase in ("generate", "score", "update")}
    tokens = {"generate": acted, "score": sum(lengths), "update": sum(lengths)}
    work = flops(size, lengths, acted)
    gpu = mine["device"] != "cpu"
    idle = max(0.0, 1 - mine["busy"] / last["wall"]) if mine["busy"] else None
    found: dict[str, Any] = {
        "size": asdict(size),
        "device": mine["device"],
        "gpu": gpu,
        "tokens": {"all": sum(lengths), "trained": acted},
        "ours": {
            "peak_gb": mine["peak_gb"],
            "seconds": {**seconds, "sync": last["sync"], "iteration": last["wall"]},
            "idle": idle,
            "tokens_per_s": {phase: tokens[phase] / seconds[phase] for phase in seconds},
            "flops": work,
            "share_of_peak": peak and {p: work[p] / seconds[p] / peak for p in seconds},
            "losses": [step["loss"] for step in mine["steps"]],
        },
    }
    for name, run in runs.items():
        if name != "ours":
            found[name] = run if "failed" in run else _theirs(run, seconds, mine["steps"])
    ratios = [found[n]["ratio"] for n in runs if n != "ours" and "ratio" in found[n]]
    found["goals"] = _goals(mine["peak_gb"], idle, min(ratios, default=None)) if gpu else None
    return found


def _theirs(run: Mapping[str, Any], seconds: Mapping[str, float], steps: Any) -> dict[str, Any]:
    """The step of trl, how many times ours it takes, and how far the losses are apart."""
    step = run["steps"][-1]["wall"]
    losses = [other["loss"] for other in run["steps"]]
    return {
        "step_s": step,
        "ratio": step / (seconds["score"] + seconds["update"]),
        "peak_gb": run["peak_gb"],
        "losses": losses,
        "apart": max(abs(a["loss"] - b) / abs(b) for a, b in zip(steps, losses, strict=True)),
    }


def _goals(peak: float, idle: float | None, ratio: float | None) -> dict[str, bool | None]:
    return {
        "fits in 80 GB": peak <= GOALS["peak_gb"],
        "idle at most 10%": None if idle is None else idle <= GOALS["idle"],
        "3 times trl's fastest": None if ratio is None else ratio >= GOALS["ratio"],
    }


def report(found: Mapping[str, Any]) -> str:
    """The tables."""
    mine = found["ours"]
    share = mine["share_of_peak"] or {}
    rows = [
        [
            phase,
            f"{value:.3f}",
            f"{mine['tokens_per_s'][phase]:.0f}" if phase in mine["tokens_per_s"] else "",
            f"{share[phase]:.1%}"
            if phase in share
            else "unknown"
            if phase in mine["flops"]
            else "",
        ]
        for phase, value in mine["seconds"].items()
    ]
    lines = [show(("ours", "seconds", "tokens/s", "of peak"), rows)]
    idle = "unknown" if mine["idle"] is None else f"{mine['idle']:.1%}"
    lines.append(f"peak {mine['peak_gb']:.2f} GB, idle {idle}")
    for name in CONTENDERS[1:]:
        other = found.get(name)
        if other and "failed" in other:
            lines.append(f"{name}: failed: {other['failed'].strip().splitlines()[-1]}")
        elif other:
            lines.append(
                f"{name}: {other['step_s']:.3f} s a step, {other['ratio']:.2f} times our score and "
                f"update, peak {other['peak_gb']:.2f} GB, losses apart {other['apart']:.1e}"
            )
    for goal, met in (found["goals"] or {}).items():
        lines.append(f"goal: {goal}: {'unknown' if met is None else 'yes' if met else 'no'}")
    if not found["gpu"]:
        lines.append(NO_GPU)
    return "\n".join(lines)


NO_GPU = "no GPU here: tiny sizes on the CPU, through the same code; no goal is judged"


def main() -> None:
    """Read the command line, run, print, write."""
    parser = command("one_card", __doc__, "tiny sizes: shows that it works")
    given = parser.parse_args()
    if given.job:
        worker(json.loads(given.job))
        return
    known = facts("trl", "accelerate", "datasets")
    size = SMALL if given.small or device() == "cpu" else FULL
    with tempfile.TemporaryDirectory() as folder:
        found = compare(size, Path(folder))
    print(f"\n{report(found)}")
    note = "" if found["gpu"] else NO_GPU
    file = results_file(given)
    if file is not None:
        save(file, {"machine": finished(known), "note": note, "settings": SETTINGS, **found})


if __name__ == "__main__":
    main()
