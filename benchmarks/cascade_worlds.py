"""Where ``cascade.py`` plays, and how much of everything goes with it.

Household games are generated: put one thing somewhere, in bathrooms, which are the smallest rooms
with the fewest kinds of things.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class World:
    """One environment and the sizes that go with it.

    Attributes:
        env: section of the configuration.
        evaluate: the same.
        prompt: the same.
        tokens: of a response.
        temperature: of everybody's answers.
        models: sizes of teacher and student.
        k: demonstrations.
        window: steps to each side of the one that matched.
        warm: expert episodes that the student sees without demonstrations.
        lessons: expert episodes in the collection of the meta-training.
        shown: expert episodes with demonstrations beside them.
        demos: expert episodes that the teacher learns from.
        library: successful episodes of the teacher in the collection that is searched.
        steps: iterations of teacher, student's warm-up, meta-training.
        batch: episodes of an iteration.
        lr: their learning rate.
        samples: of the sweep.
        sure: thresholds of confidence in it.
        chances: of random escalation in it.
        games: household games to generate for training, and a tenth of it for each other split.
    """

    env: Mapping[str, Any]
    evaluate: Mapping[str, Any]
    prompt: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    tokens: int = 1
    temperature: float = 1.0
    k: int = 2
    window: int = 0
    warm: int = 100
    lessons: int = 800
    shown: int = 1500
    demos: int = 4000
    library: int = 800
    steps: tuple[int, int, int] = (600, 110, 500)
    batch: int = 32
    lr: float = 3e-3
    samples: tuple[int, ...] = (1, 2, 3, 5)
    sure: tuple[float, ...] = (-0.01, -0.03, -0.1, -0.2, -0.4, -0.7, -1.2)
    chances: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75)
    games: int = 0


_WORDS = {"pieces": "words", "vocabulary": 700, "episodes": 100}

WORLDS = {
    "sokoban": World(
        {
            "id": "agentdistill/Sokoban-v0",
            "options": {"height": 7, "width": 7, "min_moves": 3, "max_moves": 15, "max_steps": 20,
                        "expert_ties": "random"},
        },
        {"panel": "sokoban"},
        {"preset": "bare", "window": 0},  # a room is all there is to know: no history
        {
            "teacher": {"hidden": 96, "heads": 3, "feed_forward": 256},
            "student": {"hidden": 64, "heads": 2, "feed_forward": 192},
        },
    ),
    "household": World(
        {
            "id": "agentdistill/ALFWorld-v0",
            "options": {"expert": "handcoded", "max_steps": 20},
        },
        {"tasks": 120},
        {"preset": "bare", "observation": "{observation}\n{goal}"},  # the goal beside what is seen
        {
            "teacher": {"hidden": 128, "heads": 4, "layers": 3, "feed_forward": 384,
                        "tokenizer": _WORDS},
            "student": {"hidden": 96, "heads": 3, "feed_forward": 256, "tokenizer": _WORDS},
        },
        tokens=12,
        temperature=0.7,
        lessons=400,
        shown=1000,
        demos=2500,
        library=400,
        steps=(800, 110, 240),
        batch=16,
        samples=(1, 3, 5),
        sure=(-0.03, -0.1, -0.3, -0.7),
        chances=(0.25, 0.5),
        games=4000,
    ),
}  # fmt: skip


def small(world: World) -> World:
    """The same in seconds or, with household games, minutes; shows that it works."""
    rest = {key: value for key, value in world.evaluate.items() if key != "panel"}
    some = replace(
        world,
        evaluate={**rest, "tasks": 10},
        lessons=30,
        shown=30,
        demos=60,
        library=10,
        warm=20,
        steps=(30, 10, 10),
        batch=8,
    )
    if not world.games:
        return some
    # A teacher that never wins would look for its first success for ever.
    return replace(some, games=600, demos=400, library=3, steps=(300, 10, 10))


# -- household games -------------------------------------------------------------------------------

KIND, ROOM = "pick_and_place_simple", "Bathroom"


def furnished(world: World, folder: Path) -> World:
    """``world`` with its household games, which lie in ``folder`` afterwards, if it wants any."""
    if not world.games:
        return world
    from agentdistill.envs.alfworld.generate import SPLITS, generate

    for split in SPLITS:
        number = world.games if split == "train" else max(20, world.games // 10)
        made = (generate(KIND, seed, split) for seed in count())
        wanted = (game for game in made if f"(problem {ROOM}_" in game["pddl_problem"])
        (folder / split).mkdir(parents=True, exist_ok=True)
        for index, game in enumerate(islice(wanted, number)):
            (folder / split / f"{index:05d}.tw-pddl").write_text(json.dumps(game))
    options = {**world.env["options"], "games": str(folder)}
    return replace(world, env={**world.env, "options": options})


def playable() -> list[str]:
    """The worlds whose packages are installed."""
    here = importlib.util.find_spec("alfworld") is not None
    return [name for name, world in WORLDS.items() if here or not world.games]
