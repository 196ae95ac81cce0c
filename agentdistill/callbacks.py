"""Who hears of a run's progress: one protocol for logs, trackers and progress bars.

Implement :class:`Callback` and pass it to :func:`agentdistill.distill` (``callbacks=[...]``).
Callbacks observe: nothing they do changes a result. An iteration is reported before what it did
becomes final, so that after a crash it is reported again rather than never. ``metrics.jsonl`` is
always written, by the process that runs the stage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentdistill.config import StageConfig
from agentdistill.files import refusing, write_text


class Callback:
    """Override what you need; everything does nothing by default."""

    def on_probe(self, lines: Sequence[str]) -> None:
        """What models on servers and behind APIs were found to give, a line each."""

    def on_stage_start(self, stage: StageConfig, folder: Path, iteration: int) -> None:
        """``stage`` begins (or goes on) at ``iteration``; its files are in ``folder``."""

    def on_iteration(
        self, stage: StageConfig, iteration: int, metrics: Mapping[str, Any], progress: float
    ) -> None:
        """One iteration ended; ``progress`` is the share of the stage that is done."""

    def on_stage_end(self, stage: StageConfig, summary: Mapping[str, Any]) -> None:
        """``stage`` is complete."""


class Says(Callback):
    """One that can say a line says what was found out."""

    def say(self, line: str) -> None:
        """One line; nowhere by default."""

    def on_probe(self, lines: Sequence[str]) -> None:
        """A line each."""
        for line in lines:
            self.say(line)


class Callbacks(Callback):
    """Several callbacks as one."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        """Call all of ``callbacks``, in order."""
        self._callbacks = callbacks

    def on_probe(self, lines: Sequence[str]) -> None:
        """Tell everybody."""
        for callback in self._callbacks:
            callback.on_probe(lines)

    def on_stage_start(self, stage: StageConfig, folder: Path, iteration: int) -> None:
        """Tell everybody."""
        for callback in self._callbacks:
            callback.on_stage_start(stage, folder, iteration)

    def on_iteration(
        self, stage: StageConfig, iteration: int, metrics: Mapping[str, Any], progress: float
    ) -> None:
        """Tell everybody."""
        for callback in self._callbacks:
            callback.on_iteration(stage, iteration, metrics, progress)

    def on_stage_end(self, stage: StageConfig, summary: Mapping[str, Any]) -> None:
        """Tell everybody."""
        for callback in self._callbacks:
            callback.on_stage_end(stage, summary)


class JsonLines(Callback):
    """``metrics.jsonl`` in the stage's folder; lines of iterations that run again are replaced."""

    def __init__(self) -> None:
        """Nothing is open yet."""
        self._files: dict[str, Path] = {}

    def on_stage_start(self, stage: StageConfig, folder: Path, iteration: int) -> None:
        """Keep the lines before ``iteration``, drop torn ones, and append from there."""
        path = self._files[stage.name] = folder / "metrics.jsonl"
        with refusing(path):
            kept = [line for line in _lines(path) if line["iteration"] < iteration]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_iteration(
        self, stage: StageConfig, iteration: int, metrics: Mapping[str, Any], progress: float
    ) -> None:
        """One line."""
        path = self._files[stage.name]
        with refusing(path), path.open("a") as file:
            file.write(json.dumps({"iteration": iteration, **metrics}) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(dict(json.loads(line)))
        except ValueError:  # torn by a crash: that iteration runs again
            continue
    return lines


class TensorBoard(Callback):
    """Scalars for TensorBoard, one event file per stage."""

    def __init__(self) -> None:
        """Nothing is open yet."""
        self._writers: dict[str, Any] = {}

    def on_stage_start(self, stage: StageConfig, folder: Path, iteration: int) -> None:
        """Open the writer; events after ``iteration`` are superseded."""
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration)
        self._writers[stage.name] = writer

    def on_iteration(
        self, stage: StageConfig, iteration: int, metrics: Mapping[str, Any], progress: float
    ) -> None:
        """Every number as a scalar."""
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self._writers[stage.name].add_scalar(name, value, iteration)

    def on_stage_end(self, stage: StageConfig, summary: Mapping[str, Any]) -> None:
        """Close the writer."""
        self._writers.pop(stage.name).close()
