"""What a person sees while a run goes on.

Invariants: on a terminal progress is live; elsewhere it is one line at the start and one at the end
of a stage, so that a log can be searched. rich is imported when something is drawn.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from agentdistill.callbacks import Callback
from agentdistill.config import StageConfig

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

EVALUATION = "evaluation"


class Progress(Callback):
    """What a run is doing; a context manager, because a live display must be taken down."""

    def __init__(self, stream: TextIO, stages: Iterable[str], evaluation: bool) -> None:
        """``stages`` will run, and after the last of them perhaps the ``evaluation``."""
        self.stream, self.left, self.evaluation = stream, set(stages), evaluation

    def __enter__(self) -> Progress:
        """Nothing to put up."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing to take down."""

    def say(self, line: str) -> None:
        """One line, at once."""
        print(line, file=self.stream, flush=True)

    def ended(self, stage: StageConfig) -> bool:
        """Note the end of ``stage``; whether only the evaluation is left now."""
        self.left.discard(stage.name)
        return self.evaluation and not self.left

    def on_probe(self, lines: Sequence[str]) -> None:
        """One line each."""
        for line in lines:
            self.say(line)

    def on_stage_start(self, stage: StageConfig, folder: Path, iteration: int) -> None:
        """One line."""
        self.say(
            f"{stage.name}: " + (f"goes on at iteration {iteration}" if iteration else "start")
        )

    def on_stage_end(self, stage: StageConfig, summary: Mapping[str, Any]) -> None:
        """One line; after the last stage another one."""
        self.say(f"{stage.name}: done, {_summary(summary)}")
        if self.ended(stage):
            self.say(f"{EVALUATION}: start")

    def on_episode(self, name: str, done: int, total: int, metrics: Mapping[str, Any]) -> None:
        """One line at the end of all, where something was spent."""
        if done == total and metrics:
            self.say(f"{name}: {episodes(done, total, metrics)}")


class Bars(Progress):
    """One live line per stage."""

    def __init__(self, stream: TextIO, stages: Iterable[str], evaluation: bool) -> None:
        """Nothing is drawn before the first stage starts."""
        super().__init__(stream, stages, evaluation)
        self._bars: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the display down; its last state stays on the screen."""
        if self._bars is not None:
            if error is None and EVALUATION in self._tasks:
                self._bars.update(self._tasks[EVALUATION], total=1.0, completed=1.0)
            self._bars.stop()

    def on_stage_start(self, stage: StageConfig, folder: Path, iteration: int) -> None:
        """A line; the first one starts the display."""
        note = f"goes on at iteration {iteration}" if iteration else ""
        self._tasks[stage.name] = self._display().add_task(stage.name, total=1.0, detail=note)

    def on_iteration(
        self, stage: StageConfig, iteration: int, metrics: Mapping[str, Any], progress: float
    ) -> None:
        """The bar moves."""
        note = detail(iteration, metrics)
        self._display().update(self._tasks[stage.name], completed=progress, detail=note)

    def on_stage_end(self, stage: StageConfig, summary: Mapping[str, Any]) -> None:
        """The bar is full; after the last stage comes a line for the evaluation."""
        bars = self._display()
        bars.update(self._tasks[stage.name], completed=1.0, detail=_summary(summary))
        bars.stop_task(self._tasks[stage.name])
        if self.ended(stage):
            self._tasks[EVALUATION] = bars.add_task(EVALUATION, total=None, detail="")

    def on_episode(self, name: str, done: int, total: int, metrics: Mapping[str, Any]) -> None:
        """The line of a stage, or of an evaluation, whose bar moves."""
        if name in self._tasks:  # a stage, whose bar stands for its batches
            self._display().update(self._tasks[name], detail=episodes(done, total, metrics))
            return
        if EVALUATION not in self._tasks:
            self._tasks[EVALUATION] = self._display().add_task(EVALUATION, total=None)
        note = f"{name}: {episodes(done, total, metrics)}"
        self._display().update(self._tasks[EVALUATION], total=total, completed=done, detail=note)

    def say(self, line: str) -> None:
        """One line, above the bars."""
        self._display().console.print(line, markup=False, highlight=False)

    def _display(self) -> RichProgress:
        """Started late: its thread must not exist when stages are forked into processes."""
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            self._bars = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TimeElapsedColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                console=Console(file=self.stream),
                refresh_per_second=4,
            )
            self._bars.start()
        return self._bars


def watch(stages: Iterable[str], *, evaluation: bool = False, stderr: bool = False) -> Progress:
    """Live bars on a terminal, lines elsewhere.

    Args:
        stages: names of those that will run.
        evaluation: whether one follows the last of them.
        stderr: leave standard output alone.
    """
    stream = sys.stderr if stderr else sys.stdout
    return (Bars if stream.isatty() else Progress)(stream, stages, evaluation)


def detail(iteration: int, metrics: Mapping[str, Any]) -> str:
    """The numbers of one iteration that are worth watching, where there are any."""
    parts = [f"iteration {iteration + 1}"]
    parts += [
        f"{key} {metrics[key]:.0%}"
        for key in ("success", "optimal")
        if metrics.get(key) is not None
    ]
    loss = next((key for key in metrics if key.startswith("loss/")), None)
    numbers = {"loss": metrics.get(loss or ""), "divergence": metrics.get("divergence")}
    parts += [f"{key} {value:.3f}" for key, value in numbers.items() if value is not None]
    return ", ".join([*parts, *_spent(metrics)])


def episodes(done: int, total: int, metrics: Mapping[str, Any]) -> str:
    """How far a batch or a panel is, and what was spent."""
    return ", ".join([f"{done:,} of {total:,} episodes", *_spent(metrics)])


def _spent(metrics: Mapping[str, Any]) -> list[str]:
    """Calls, tokens and money of providers; nothing where none was called."""
    spent = {name: metrics.get(f"spent/{name}") for name in ("calls", "tokens", "money")}
    parts = [f"{spent[name]:,} {name}" for name in ("calls", "tokens") if spent[name] is not None]
    return parts + ([f"money {spent['money']:.4f}"] if spent["money"] is not None else [])


def _summary(summary: Mapping[str, Any]) -> str:
    counts = {
        "iterations": "iterations",
        "env_steps": "environment steps",
        "episodes": "episodes",
    }
    parts = [f"{summary[key]:,} {words}" for key, words in counts.items() if summary.get(key)]
    return ", ".join([*parts, f"{summary['seconds']:.1f} s"])
