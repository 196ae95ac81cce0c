"""A tiny run that others kill: ``python -m tests.store_worker DIRECTORY ITERATIONS``.

Its "weights" are a hash over everything that it was trained on, so they are the same as those of
an uninterrupted run only if no iteration was lost, done twice or done on other data.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from agentdistill.checkpoint import Checkpoints
from agentdistill.crash import VARIABLE
from agentdistill.records import (
    Actor,
    Author,
    Kind,
    Span,
    StepResult,
    Stream,
    Task,
    Trajectory,
    Turn,
    Usage,
)
from agentdistill.store import Store

ROOT = Path(__file__).resolve().parents[1]


def batch(iteration: int, weights: str = "", size: int = 2, turns: int = 2) -> list[Trajectory]:
    """``size`` trajectories that depend on the arguments only."""
    return [_trajectory(iteration, number, weights, turns) for number in range(size)]


def _trajectory(iteration: int, number: int, weights: str, turns: int) -> Trajectory:
    rng = np.random.default_rng([iteration, number, *weights.encode()])
    length = 96 * turns
    stream = Stream(
        rng.integers(0, 150_000, length, np.int32),
        np.tile(np.repeat(np.array([Author.CONTEXT, Author.ACTOR], np.uint8), 48), turns),
        np.tile(np.repeat(np.array([Kind.CONTEXT, Kind.ACT], np.uint8), 48), turns),
        np.tile(np.repeat(np.array([np.nan, -0.1], np.float32), 48), turns),
    )
    return Trajectory(
        task=Task("agentdistill/Sokoban-v0", "train", {"seed": number}),
        group=f"g{iteration}",
        sample=number,
        turns=tuple(_turn(index) for index in range(turns)),
        streams=(stream,),
        end="success",
        success=True,
        score=1.0,
        provenance={"run": "r", "iteration": iteration, "instruction": "Push the boxes."},
    )


def _turn(index: int) -> Turn:
    return Turn(
        index,
        f"#####\n#@$.#\n#####\nturn {index}",
        Actor("student", 3, {"temperature": 1.0}),
        text="<think>right</think><action>right</action>",
        reasoning="right",
        actions=("right",),
        results=(StepResult("#####\n# @*#\n#####", -0.1, optimal=True),),
        stop="stop",
        reward=-0.1,
        usage=Usage(48, 0, 0, 48),
        span=Span(0, 96 * index + 48, 96 * index + 96),
    )


def run(path: Path, iterations: int) -> str:
    """Do what is missing of ``iterations`` iterations; return the weights at the end."""
    with Store(path) as store:
        checkpoints = Checkpoints(path / "checkpoints")
        step, weights = -1, ""
        if (latest := checkpoints.latest()) is not None:
            step, weights = latest[0], (latest[1] / "weights").read_text()
        if len(store.commits("train")) > step + 1:
            store.rollback("train", step)
        for iteration in range(step + 1, iterations):
            ref = store.write("train", iteration, batch(iteration, weights))
            weights = hashlib.sha256((weights + ref.sha256).encode()).hexdigest()
            store.commit("train", iteration, [ref], {"weights": weights})
            checkpoints.save(iteration, write=_writer(weights))
    return weights


def image(items: Iterable[Trajectory]) -> list[object]:
    """Everything about trajectories, comparable: 0, 0.0, -0.0 and False differ, NaN equals NaN."""
    return [(repr(replace(item, streams=())), list(map(_bytes, item.streams))) for item in items]


def _bytes(stream: Stream) -> list[tuple[np.dtype, bytes]]:
    columns = (stream.ids, stream.author, stream.kind, stream.logp)
    return [(column.dtype, column.tobytes()) for column in columns]


def _writer(weights: str) -> Callable[[Path], object]:
    return lambda directory: (directory / "weights").write_text(weights)


def start(path: Path, iterations: int, crash_at: str = "") -> subprocess.Popen[bytes]:
    """The run in a process of its own; it says so on stdout when it begins."""
    command = [sys.executable, "-m", "tests.store_worker", str(path), str(iterations)]
    environment = {**os.environ, VARIABLE: crash_at}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)


if __name__ == "__main__":
    print("begin", flush=True)
    run(Path(sys.argv[1]), int(sys.argv[2]))
