"""Whoever listens hears everything, once, in order, and in whatever process it happened."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agentdistill.callbacks import Callback, Callbacks, JsonLines, TensorBoard
from agentdistill.config import CollectStage, StageConfig, load
from agentdistill.errors import StoreError
from agentdistill.recipe import execute
from tests.toy import micro

STAGE = CollectStage(name="one")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log(folder: Path, start: int, stop: int, **more: Any) -> None:
    """A process that logs these iterations and ends, complete or not."""
    callback = JsonLines()
    callback.on_stage_start(STAGE, folder, start)
    for n in range(start, stop):
        callback.on_iteration(STAGE, n, {"loss": n / 10, **more}, 0.5)


# -- metrics.jsonl ---------------------------------------------------------------------------------


def test_lines_are_there_at_once(tmp_path: Path) -> None:
    callback = JsonLines()
    callback.on_stage_start(STAGE, tmp_path, 0)
    assert lines(tmp_path) == []
    callback.on_iteration(STAGE, 0, {"loss": 0.5, "by_turn": [0.1, None]}, 0.5)
    assert lines(tmp_path) == [{"iteration": 0, "loss": 0.5, "by_turn": [0.1, None]}]


def test_iterations_that_run_again_replace_their_lines(tmp_path: Path) -> None:
    log(tmp_path, 0, 5)
    log(tmp_path, 3, 6, again=True)
    assert [(line["iteration"], line.get("again")) for line in lines(tmp_path)] == [
        *((n, None) for n in range(3)),
        *((n, True) for n in range(3, 6)),
    ]
    log(tmp_path, 6, 6)
    assert len(lines(tmp_path)) == 6


@pytest.mark.parametrize("torn", ['{"iteration": 2, "lo', '{"iteration": 2}\n{"iter', "\n\n", "{"])
def test_torn_lines_are_dropped(tmp_path: Path, torn: str) -> None:
    log(tmp_path, 0, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    log(tmp_path, 2, 4)
    assert [line["iteration"] for line in lines(tmp_path)] == [0, 1, 2, 3]


def test_lines_survive_a_death_while_they_are_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log(tmp_path, 0, 5)

    def dies(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            log(tmp_path, 3, 6)
    assert len(lines(tmp_path)) == 5


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StoreError, match=r"metrics\.jsonl"):
        log(tmp_path, 0, 1)


# -- TensorBoard -----------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, round(e.value, 5)) for e in events.Scalars(tag)] for tag in tags}


def test_tensorboard_has_the_scalars(tmp_path: Path) -> None:
    callback = TensorBoard()
    callback.on_stage_start(STAGE, tmp_path, 0)
    for n in range(3):
        metrics = {"loss": n / 10, "rows": n, "none": None, "by_turn": [1.0], "text": "x"}
        callback.on_iteration(STAGE, n, metrics, n / 3)
    callback.on_stage_end(STAGE, {})
    assert scalars(tmp_path) == {
        "loss": [(0, 0.0), (1, 0.1), (2, 0.2)],
        "rows": [(0, 0.0), (1, 1.0), (2, 2.0)],
    }


def test_tensorboard_after_a_resume(tmp_path: Path) -> None:
    """What ran again is shown once, as it ran the last time."""
    for start, stop, value in ((0, 4, 1.0), (2, 5, 2.0)):
        callback = TensorBoard()
        callback.on_stage_start(STAGE, tmp_path, start)
        for n in range(start, stop):
            callback.on_iteration(STAGE, n, {"loss": value}, 0.5)
        callback.on_stage_end(STAGE, {})
    assert scalars(tmp_path) == {"loss": [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]}


# -- the protocol ----------------------------------------------------------------------------------


class Recorder(Callback):
    """Third-party code: remembers everything."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_stage_start(self, stage: StageConfig, folder: Path, iteration: int) -> None:
        self.events.append(("start", stage.name, folder, iteration))

    def on_iteration(
        self, stage: StageConfig, iteration: int, metrics: Any, progress: float
    ) -> None:
        kept = {k: v for k, v in metrics.items() if not k.startswith("seconds")}
        self.events.append(("iteration", stage.name, iteration, kept, progress))

    def on_stage_end(self, stage: StageConfig, summary: Any) -> None:
        kept = {k: v for k, v in summary.items() if k != "seconds"}
        self.events.append(("end", stage.name, kept))

    def of(self, stage: str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[1] == stage]


def recipe(output: Path, **changes: Any) -> dict[str, Any]:
    """Two stages at a time, and a third that needs one of them."""
    small = {"hidden": 16, "heads": 1, "layers": 1, "tokenizer": {"vocabulary": 300, "episodes": 8}}
    stages = [
        {"name": "demos", "do": "collect", "episodes": 6, "batch": 3},
        {"name": "noise", "do": "collect", "episodes": 4, "batch": 2, "policy": "random",
         "only_success": False},
        {"name": "taught", "model": "student", "method": "sft", "data": "demos", "iterations": 3,
         "tasks": 2, "checkpoint_every": 2},
    ]  # fmt: skip
    values = {"models": {"student": small}, "stages": stages, "evaluate": {"policies": []}}
    return micro(output, **{**values, **changes})


def test_everybody_hears_everything(tmp_path: Path) -> None:
    heard = {}
    for workers in (1, 2):
        output = tmp_path / str(workers)
        first, second = Recorder(), Recorder()
        execute(load(recipe(output, workers=workers)), [first, second])
        assert first.events == second.events
        heard[workers] = first
        for stage in ("demos", "noise", "taught"):
            folder = output / "micro" / "stages" / stage
            begin, *middle, end = first.of(stage)
            assert begin == ("start", stage, folder, 0)
            assert [event[2] for event in middle] == list(range(len(middle)))
            assert [event[4] for event in middle][-1] == 1.0
            assert end[0] == "end" and end[2]["stage"] == stage
            written = [
                {k: v for k, v in line.items() if k[:7] != "seconds"} for line in lines(folder)
            ]
            assert written == [{"iteration": n, **event[3]} for n, event in enumerate(middle)]
    for stage in ("demos", "noise", "taught"):
        mine, theirs = ([e for e in heard[w].of(stage) if e[0] != "start"] for w in (1, 2))
        assert mine == theirs
    assert Counter(e[0] for e in heard[1].events) == {"start": 3, "iteration": 7, "end": 3}


def test_callbacks_run_in_the_process_of_their_owner(tmp_path: Path) -> None:
    """So that they may hold connections, progress bars, or lists as here."""

    class Where(Callback):
        threads: set[str] = set()  # noqa: RUF012

        def on_iteration(self, *_: Any) -> None:
            self.threads.add(threading.current_thread().name)

    execute(load(recipe(tmp_path)), [Where()])
    assert Where.threads == {"MainThread"}
    Where.threads.clear()
    execute(load(recipe(tmp_path, workers=2, name="two")), [Where()])
    assert Where.threads, "events of workers arrive here"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_callback_that_fails_stops_the_run_which_then_goes_on(
    tmp_path: Path, workers: int
) -> None:
    class Fails(Callback):
        def on_iteration(self, stage: StageConfig, iteration: int, *_: Any) -> None:
            if (stage.name, iteration) == ("taught", 1):
                raise ZeroDivisionError("of a tracker")

    values = recipe(tmp_path, workers=workers)
    with pytest.raises(ZeroDivisionError, match="of a tracker"):
        execute(load(values), [Fails()])
    recorder = Recorder()
    execute(load(values), [recorder])
    folder = tmp_path / "micro" / "stages" / "taught"
    assert [line["iteration"] for line in lines(folder)] == [0, 1, 2]
    if workers == 1:  # a worker may have been done before its event was heard
        assert recorder.of("taught")[0] == ("start", "taught", folder, 0)


def test_resumed_stages_say_where_they_begin(tmp_path: Path) -> None:
    class Stops(Callback):
        def on_iteration(self, stage: StageConfig, iteration: int, *_: Any) -> None:
            if (stage.name, iteration) == ("taught", 2):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(load(recipe(tmp_path)), [Stops()])
    recorder = Recorder()
    execute(load(recipe(tmp_path)), [recorder])
    assert recorder.events[0] == ("start", "taught", tmp_path / "micro" / "stages" / "taught", 2)
    assert [event[2] for event in recorder.events if event[0] == "iteration"] == [2]


def test_several_callbacks_are_one() -> None:
    first, second = Recorder(), Recorder()
    both = Callbacks([first, second])
    both.on_stage_start(STAGE, Path("x"), 3)
    both.on_iteration(STAGE, 3, {"a": 1}, 0.5)
    both.on_stage_end(STAGE, {"b": 2})
    assert first.events == second.events
    assert [event[0] for event in first.events] == ["start", "iteration", "end"]


def test_doing_nothing_is_a_callback() -> None:
    Callback().on_stage_start(STAGE, Path("x"), 0)
    Callback().on_iteration(STAGE, 0, {}, 0.0)
    Callback().on_stage_end(STAGE, {})
