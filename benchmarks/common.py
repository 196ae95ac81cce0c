"""What every benchmark shares: facts about the machine, worker processes, statistics, output.

Invariants: a contender runs in a process of its own, so that its imports and its peak memory are
its own; what a file of results says about commit, versions, machine and load was read in the run
that wrote it; nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import platform
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
from agentdistill.run import machine

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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


class Stopwatch:
    """Seconds of wall and of this process's CPU time since it was made or last read."""

    def __init__(self) -> None:
        """Start."""
        self._last = (time.perf_counter(), time.process_time())

    def lap(self) -> dict[str, float]:
        """``wall`` and ``cpu`` seconds of the lap that ends now."""
        now = (time.perf_counter(), time.process_time())
        wall, cpu = now[0] - self._last[0], now[1] - self._last[1]
        self._last = now
        return {"wall": wall, "cpu": cpu}


def work(script: str, job: Mapping[str, Any], result: Path) -> dict[str, Any]:
    """Run ``script --job JOB`` in a fresh process; return the JSON that it wrote to ``result``.

    Raises:
        RuntimeError: the process failed; the end of what it said is in the message.
    """
    result.unlink(missing_ok=True)
    command = [sys.executable, script, "--job", json.dumps({**job, "result": str(result)})]
    done = subprocess.run(
        command, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True, check=False
    )
    if done.returncode or not result.exists():
        said = (done.stdout + done.stderr)[-3000:]
        raise RuntimeError(f"worker ended with {done.returncode}: {json.dumps(job)}\n{said}")
    return dict(json.loads(result.read_text()))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of ``values``, and how many there are."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "n": len(values),
    }


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text; the first column is aligned left, the others right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Write ``results`` as JSON; an older file is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(results, indent=1) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    known = Path("/proc/cpuinfo")
    for line in known.read_text().splitlines() if known.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
