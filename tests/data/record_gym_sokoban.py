"""Record rooms and steps of the real gym-sokoban into gym_sokoban.json.gz, next to this file.

gym-sokoban needs the unmaintained gym, so it is no dependency of this project: run this in an
environment of its own, from the repository root::

    python -m venv /some/where && /some/where/bin/pip install gym-sokoban==0.0.6 gymnasium
    PYTHONPATH=. /some/where/bin/python tests/data/record_gym_sokoban.py

Recorded with gym-sokoban 0.0.6, gym 0.26.2, numpy 2.4.6, Python 3.11. The rooms are gym-sokoban's
own where its generator is fast enough (up to two boxes) and otherwise ours, put into its engine.
Actions are a mixture of our solver's, random pushes and ``no operation`` (0); numbers are its own.
"""

from __future__ import annotations

import gzip
import json
import random
import warnings
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from agentdistill.envs.sokoban import Board, Rooms, State, generate, search
from agentdistill.envs.sokoban.engine import ACTIONS

warnings.simplefilter("ignore")

OWN = [(6, 6, 1), (7, 7, 1), (6, 8, 1), (7, 7, 2)]
OURS = [(6, 7, 1), (8, 8, 2), (8, 10, 3), (10, 10, 3), (10, 10, 4), (13, 9, 4)]
EACH = 8
LONGEST = 70


def cells(array: np.ndarray, *codes: int) -> int:
    """The cells of ``array`` that hold one of ``codes``, as a set of bits."""
    return sum(1 << cell for cell, code in enumerate(array.flatten()) if int(code) in codes)


def text(array: np.ndarray) -> str:
    """The room as digits, row by row."""
    return "".join(str(int(code)) for code in array.flatten())


def own_room(height: int, width: int, boxes: int) -> Any:
    """A room from gym-sokoban's generator."""
    from gym_sokoban.envs import SokobanEnv

    return SokobanEnv(dim_room=(height, width), num_boxes=boxes, max_steps=10_000)


def our_room(height: int, width: int, boxes: int, level: str) -> Any:
    """One of our levels inside gym-sokoban's engine."""
    from gym_sokoban.envs import SokobanEnv

    env = SokobanEnv(dim_room=(height, width), num_boxes=boxes, max_steps=10_000, reset=False)
    rows = [list(row) for row in level.split("\n")]
    fixed = {"#": 0, "O": 2, "S": 2, "√": 2}
    state = {"#": 0, "_": 1, "O": 2, "√": 3, "X": 4, "P": 5, "S": 5}
    env.room_fixed = np.array([[fixed.get(symbol, 1) for symbol in row] for row in rows])
    env.room_state = np.array([[state[symbol] for symbol in row] for row in rows])
    env.player_position = np.argwhere(env.room_state == 5)[0]
    env.num_env_steps = env.reward_last = env.boxes_on_target = 0
    return env


def advice(env: Any) -> int | None:
    """The number of the solver's next action, None when it sees no way."""
    height, width = env.room_fixed.shape
    board = Board(height, width, cells(env.room_fixed, 0), cells(env.room_fixed, 2))
    player = cells(env.room_state, 5).bit_length() - 1
    found = search(board, State(player, cells(env.room_state, 3, 4)), node_limit=3000)
    return 1 + ACTIONS.index(found.actions[0]) if found.actions else None


def record(env: Any, rng: random.Random) -> dict[str, Any]:
    """One episode: the room, then per step the action, the state, the reward and the end."""
    room = {"shape": env.room_fixed.shape, "fixed": text(env.room_fixed)}
    room["start"] = text(env.room_state)
    steps = []
    noise = rng.choice([0.0, 0.2, 0.5, 1.0])
    for _ in range(LONGEST):
        action = None if rng.random() < noise else advice(env)
        if action is None:
            action = rng.randrange(5)
        _, reward, done, _ = env.step(action, observation_mode="tiny_rgb_array")
        steps.append([action, text(env.room_state), float(reward), bool(done)])
        if done:
            break
    return {**room, "steps": steps}


def main() -> None:
    """Record all rooms."""
    random.seed(1)
    np.random.seed(1)
    rng, rooms = random.Random(1), []
    for size in OWN:
        rooms += [record(own_room(*size), rng) for _ in range(EACH)]
    for height, width, boxes in OURS:
        levels = generate(Rooms(height, width, boxes, "walk"), "train", seed=1)
        for level in islice(levels, EACH):
            rooms.append(record(our_room(height, width, boxes, level), rng))
    versions = {name: version(name) for name in ("gym-sokoban", "gym", "numpy")}
    content = json.dumps({"versions": versions, "rooms": rooms}, separators=(",", ":"))
    path = Path(__file__).with_name("gym_sokoban.json.gz")
    path.write_bytes(gzip.compress(content.encode(), mtime=0))
    solved = sum(room["steps"][-1][3] for room in rooms)
    print(f"{len(rooms)} rooms, {solved} solved, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
