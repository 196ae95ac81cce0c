"""What is held out is not demonstrated."""

from __future__ import annotations

from pathlib import Path

from agentdistill.api import collect
from agentdistill.callbacks import Callback
from agentdistill.collection import collect as play
from agentdistill.config import load
from agentdistill.envs.sokoban import split_of
from agentdistill.run import Run

ROOM = {"height": 6, "width": 6, "min_moves": 4}


def shown(folder: Path, **settings: object) -> set[str]:
    """The splits of all states that 60 demonstrations pass through."""
    stage = {"do": "collect", "name": "demos", "episodes": 60, **settings}
    config = load({"output": str(folder), "env": {"options": ROOM}, "stages": [stage]})
    the_run = Run(config)
    play(the_run, config.stages[0], Callback())  # type: ignore[arg-type]
    episodes = the_run.episodes("demos")
    assert len(episodes) == 60
    return {split_of(turn.observation) for t in episodes for turn in t.turns}


def test_demonstrations_avoid_the_starts_of_held_out_tasks(tmp_path: Path) -> None:
    assert shown(tmp_path / "clear") == {"train"}
    assert shown(tmp_path / "blind", avoid_held_out=False) == {"train", "tune", "report"}


def test_the_python_interface_does_so_too(tmp_path: Path) -> None:
    episodes = collect(episodes=20, options=ROOM, output=str(tmp_path))
    assert {split_of(turn.observation) for t in episodes for turn in t.turns} == {"train"}
