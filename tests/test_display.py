"""Tables and progress."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agentdistill import display
from agentdistill.config import RunConfig, TrainStage
from agentdistill.evaluation import Result
from agentdistill.metrics import Interval
from agentdistill.progress import watch

MEASURED = Result(
    policy="p",
    mode="sampled",
    episodes=10,
    success=0.5,
    interval=Interval(0.237, 0.763),
    optimal=None,
    turns=3.25,
    invalid=0.125,
    score=0.5,
    faults=1,
    panel="0123456789abcdef",
    keys=(),
    outcomes=(),
)


def test_modes_share_a_row() -> None:
    greedy = replace(MEASURED, mode="greedy", success=0.75, turns=9.0, faults=2)
    (row,) = display.rows(
        [greedy, MEASURED], {"p": {"env_steps": 12345, "seconds": 6.25}}, {"p": "P"}
    )
    assert row.cells() == ["P", "50.0% (24 to 76)", "75.0%", "–", "3.2", "12.5%", "12,345", "6.2"]  # noqa: RUF001
    assert row.faults == 3
    (note, lost) = display.notes([row], [greedy, MEASURED], RunConfig())
    assert "panel 0123456789ab" in note and lost.startswith("3 episodes were lost")


def test_nothing_measured_is_no_zero() -> None:
    nothing = replace(MEASURED, episodes=0, success=0.0)
    (row,) = display.rows([nothing])
    assert set(row.cells()[1:]) == {display.NOTHING}


def test_markdown_is_aligned_and_keeps_its_columns() -> None:
    text = display.markdown(("name", "n"), [["a|b", "1"], ["longer", "100"]])
    assert text.splitlines() == [
        "| name   |   n |",
        "| ------ | --: |",
        r"| a\|b   |   1 |",
        "| longer | 100 |",
    ]


class Terminal(io.StringIO):
    """A terminal that remembers what it showed."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_bars_and_drawn_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(key, value)
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    stage = TrainStage(name="distilled", iterations=4)
    metrics = {"success": 0.25, "optimal": None, "loss/k1": 0.5, "divergence": 0.125}
    with watch(["distilled"], evaluation=True) as progress:
        progress.on_stage_start(stage, Path(), 2)
        progress.on_iteration(stage, 2, metrics, 0.75)
        progress._bars.refresh()
        progress.on_stage_end(stage, {"iterations": 4, "env_steps": 1000, "seconds": 1.5})
    shown = screen.getvalue()
    assert "iteration 3, success 25%, loss 0.500, divergence 0.125" in shown
    assert "4 iterations, 1,000 environment steps, 1.5 s" in shown and "evaluation" in shown
    display.show(("name", "n"), [["[red]", "1"]])
    assert "[red]" in screen.getvalue() and "|" not in screen.getvalue()


def test_elsewhere_progress_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    stage = TrainStage(name="distilled", iterations=4)
    with watch(["distilled"], evaluation=True, stderr=True) as progress:
        progress.on_stage_start(stage, Path(), 2)
        progress.on_iteration(stage, 2, {}, 0.75)
        progress.on_stage_end(stage, {"iterations": 4, "seconds": 1.5})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "distilled: goes on at iteration 2",
        "distilled: done, 4 iterations, 1.5 s",
        "evaluation: start",
    ]
