"""What every benchmark shares: facts about the machine, worker processes, statistics, output.

Invariants: a contender runs in a process of its own, so that its imports and its peak memory are
its own; what a file of results says about commit, versions, machine and load was read in the run
that wrote it; nothing here imports torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from agentdistill.files import write_text
from agentdistill.machine import machine

RESULTS = Path(__file__).parent / "results"
"""Where full runs leave their numbers."""

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Environment of a worker: one thread, no GPU, no network."""


def command(script: str, about: str, small: str = "seconds: shows that it works") -> Any:
    """A parser of ``--small``, ``--output`` and (from ourselves) ``--job``.

    Args:
        script: name of its file of results, without ``.json``.
        about: its docstring, of which the first line is shown.
        small: what ``--small`` means.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--small", action="store_true", help=small)
    text = f"JSON file; by default results/{script}.json, with --small none"
    parser.add_argument("--output", type=Path, help=text)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.set_defaults(script=script)
    return parser


def results_file(given: argparse.Namespace) -> Path | None:
    """Where the results of a :func:`command` go; None with ``--small``, unless a file is named."""
    usual = None if given.small else RESULTS / f"{given.script}.json"
    return given.output or usual


def trl_arguments(settings: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Of any trainer of trl's: our optimiser ``settings``, and nothing on that only costs time."""
    return {
        "learning_rate": settings["lr"],
        "lr_scheduler_type": "constant",
        "adam_beta1": settings["betas"][0],
        "adam_beta2": settings["betas"][1],
        "max_grad_norm": settings["clip_norm"],
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "output_dir": folder,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def facts(*packages: str) -> dict[str, Any]:
    """Commit, versions (those of ``packages`` too), machine, time and load."""
    found = machine()
    for name in packages:
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            found["versions"][name] = "absent"
    return {**found, "cpu_model": _cpu_model(), "began": _now(), "load_began": load()}


def finished(known: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`facts` of the beginning, with the time and the load of the end."""
    return {**known, "ended": _now(), "load_ended": load()}


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def peak_mib() -> float:
    """Highest resident memory of this process so far, MiB."""
    known = Path("/proc/self/status")
    for line in known.read_text().splitlines() if known.exists() else ():
        if line.startswith("VmHWM:"):  # getrusage would begin with the peak of the parent process
            return int(line.split()[1]) / (1 << 10)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


class Log:
    """What a worker notes about itself: seconds (wall, and CPU time of the process) and memory."""

    def __init__(self) -> None:
        """Start the clock."""
        self.notes: dict[str, Any] = {"steps": []}
        self._last = (time.perf_counter(), time.process_time())

    def lap(self, name: str) -> None:
        """The part called ``name`` ends now, and the next one begins."""
        self.notes[name] = self._lap()
        self.notes[f"{name}_mib"] = peak_mib()

    def step(self) -> None:
        """One of many equal steps ends now."""
        self.notes["steps"].append(self._lap())

    def _lap(self) -> dict[str, float]:
        now = (time.perf_counter(), time.process_time())
        wall, cpu = now[0] - self._last[0], now[1] - self._last[1]
        self._last = now
        return {"wall": wall, "cpu": cpu}


def in_turns(
    script: str, job: Mapping[str, Any], order: Sequence[str], folder: Path, title: str
) -> dict[str, list[dict[str, Any]]]:
    """Run ``script --job JOB`` for the contenders in ``order``, one process after the other.

    Args:
        script: reads the job as JSON, leaves its notes (JSON) in the file ``result`` and its model
            in the file ``weights``.
        job: what all of them are told besides ``contender``, ``result`` and ``weights``.
        order: names of contenders, each as often as it shall run.
        folder: where the files go.
        title: printed with the progress.

    Returns:
        The notes of each contender's processes, in order.

    Raises:
        RuntimeError: a process failed; the end of what it said is in the message.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in order}
    for number, name in enumerate(order, 1):
        print(f"{title}: {number}/{len(order)} {name}", flush=True)
        files = {"result": f"{folder}/{number}.json", "weights": f"{folder}/{number}.safetensors"}
        full = json.dumps({**job, **files, "contender": name})
        done = subprocess.run(
            [sys.executable, script, "--job", full],
            env={**os.environ, **ONE_THREAD},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = (done.stdout + done.stderr)[-3000:]
            raise RuntimeError(f"{title}, {name}: ended with {done.returncode}\n{said}")
        runs[name].append({**json.loads(Path(files["result"]).read_text()), **files})
    return runs


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of ``values``, and how many there are."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "n": len(values),
    }


def cost(
    runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], tokens: float, warm: int
) -> dict[str, Any]:
    """Seconds, memory, and the ratios to ``base``, run by run, over the repeats.

    Args:
        runs: notes of the processes of one contender, in order; see :class:`Log`.
        base: those of the contender that it is compared with.
        tokens: mean number of tokens per step.
        warm: first steps of each process that do not count.

    Returns:
        A :func:`spread` for each; of a process the median step counts.
    """
    found: dict[str, Any] = {
        "peak_mib": spread([run["end_mib"] for run in runs]),
        "import_mib": spread([run["import_mib"] for run in runs]),
    }
    for kind in ("wall", "cpu"):
        mine, theirs = (
            [statistics.median(step[kind] for step in run["steps"][warm:]) for run in group]
            for group in (runs, base)
        )
        found[f"step_{kind}_s"] = spread(mine)
        found[f"tokens_per_{kind}_s"] = spread([tokens / seconds for seconds in mine])
        found[f"ratio_{kind}"] = spread([a / b for a, b in zip(mine, theirs, strict=True)])
        for part in ("import", "set_up"):
            found[f"{part}_{kind}_s"] = spread([run[part][kind] for run in runs])
    return found


def agreement(
    mine: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], start: Path, steps: int
) -> dict[str, Any]:
    """How far two contenders are apart in their last processes.

    Args:
        mine: notes of one contender's processes, with ``losses``, ``digest`` and ``weights``.
        theirs: those of the other.
        start: the weights before training.
        steps: so many losses are compared.

    Returns:
        ``loss``: greatest difference over the first ``steps``; ``weights``: norm of the difference
        of all final weights over the norm of ``theirs``; ``update``: the same over the norm of what
        training changed; ``repeats``: whether each of them always ended with the same weights.
    """
    import numpy as np
    from safetensors.numpy import load_file

    pairs = list(zip(mine[-1]["losses"], theirs[-1]["losses"], strict=True))[:steps]
    a, b, origin = (
        np.concatenate([part.ravel() for _, part in sorted(load_file(file).items())])
        for file in (mine[-1]["weights"], theirs[-1]["weights"], start)
    )
    distance = float(np.linalg.norm(a - b))
    return {
        "steps": len(pairs),
        "loss": max(abs(one - other) for one, other in pairs),
        "weights": distance / float(np.linalg.norm(b)),
        "update": distance / float(np.linalg.norm(b - origin)),
        "repeats": all(len({run["digest"] for run in runs}) == 1 for runs in (mine, theirs)),
    }


def digest(file: Path) -> str:
    """First half of the hexadecimal SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:32]


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text; the first column is aligned left, the others right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def tables(costs: Mapping[str, Any], pairs: Mapping[str, Any]) -> str:
    """Medians of :func:`cost`, a contender a row, and :func:`agreement`, a pair a row."""
    columns = {
        "s/step": ("step_wall_s", ".3f"),
        "CPU s/step": ("step_cpu_s", ".3f"),
        "tokens/CPU s": ("tokens_per_cpu_s", ".0f"),
        "x s": ("ratio_wall", ".2f"),
        "x CPU s": ("ratio_cpu", ".2f"),
        "import CPU s": ("import_cpu_s", ".1f"),
        "peak MiB": ("peak_mib", ".0f"),
    }
    rows = [
        [name, *(format(found[key]["median"], style) for key, style in columns.values())]
        for name, found in costs.items()
    ]
    kinds = ("loss", "weights", "update")
    apart = [[name, *(f"{found[kind]:.1e}" for kind in kinds)] for name, found in pairs.items()]
    return show(("", *columns), rows) + "\n\n" + show(("difference", *kinds), apart)


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Write ``results`` as JSON, innermost lists on one line; an older file is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_short(results), indent=1)
    flat = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda found: re.sub(r"\n\s*", " ", found[0]), text)
    write_text(path, flat + "\n")


def _short(value: Any) -> Any:
    """``value`` with every float at seven significant digits, as many as float32 has."""
    if isinstance(value, Mapping):
        return {key: _short(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(part) for part in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    known = Path("/proc/cpuinfo")
    for line in known.read_text().splitlines() if known.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
