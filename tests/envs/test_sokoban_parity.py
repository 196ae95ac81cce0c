"""Every state and reward of the real gym-sokoban, replayed (see data/record_gym_sokoban.py)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from agentdistill.envs.sokoban import SokobanEnv
from agentdistill.envs.sokoban.engine import ACTIONS
from agentdistill.records import Task

RECORD = Path(__file__).parents[1] / "data" / "gym_sokoban.json.gz"
STATE = "#_O√XP"
"""gym-sokoban's codes 0 to 5 in RAGEN's symbols."""


@pytest.fixture(scope="module")
def rooms() -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(RECORD.read_bytes()))["rooms"]


def grid(room: dict[str, Any], state: str) -> str:
    """A recorded state as the text of an observation."""
    width = room["shape"][1]
    symbols = [
        "S" if code == "5" and fixed == "2" else STATE[int(code)]
        for code, fixed in zip(state, room["fixed"], strict=True)
    ]
    rows = ["".join(symbols[i : i + width]) for i in range(0, len(symbols), width)]
    return "\n".join(rows)


def test_every_state_and_reward_is_the_same(rooms: list[dict[str, Any]]) -> None:
    env = SokobanEnv(judge=False, max_steps=1000)
    for number, room in enumerate(rooms):
        level = grid(room, room["start"])
        task = Task(env.card.id, "train", {"level": level})
        assert env.reset(options={"task": task})[0] == level
        for action, state, reward, done in room["steps"]:
            name = ACTIONS[action - 1] if action else "no operation"
            observation, paid, terminated, truncated, info = env.step(name)
            assert observation == grid(room, state), number
            assert (paid, terminated, truncated) == (reward, done, False), number
            assert info["success"] is done
            assert info["valid"] is (action != 0)


def test_the_recording_covers_what_matters(rooms: list[dict[str, Any]]) -> None:
    rewards = {reward for room in rooms for _, _, reward, _ in room["steps"]}
    assert rewards == {-0.1, 0.9, -1.1, 10.9}
    assert len(rooms) == 80
    assert {room["fixed"].count("2") for room in rooms} == {1, 2, 3, 4}
    assert len({tuple(room["shape"]) for room in rooms}) >= 7
    assert sum(room["steps"][-1][3] for room in rooms) >= 40
    blocked = 0
    for room in rooms:
        states = [room["start"], *(state for _, state, _, _ in room["steps"])]
        actions = [action for action, *_ in room["steps"]]
        blocked += sum(
            action > 0 and before == after
            for action, before, after in zip(actions, states, states[1:], strict=False)
        )
    assert blocked > 100
