"""Generated ALFWorld games: distinct, the same everywhere, and won in the real engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentdistill.envs.alfworld import generate as generator
from agentdistill.envs.alfworld import generate_package
from agentdistill.envs.alfworld.generate import SPLITS, TYPES, generate
from agentdistill.envs.alfworld.rooms import HELD_OUT, ROOMS, SCENES, Entity, scene
from agentdistill.errors import ConfigError, MissingExtraError

packaged = pytest.mark.alfworld
leaky = pytest.mark.filterwarnings(
    # TextWorld leaves the game file that it reads open.
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:unclosed file:ResourceWarning",
)

ROOT = Path(__file__).parents[2]

GAMES = [(kind, seed, SPLITS[seed % 3]) for kind in TYPES for seed in range(100, 110)]
LARGE = 30
"""Beyond, two-object games cost the engine's planner minutes and gigabytes, official ones too."""

FEW = [(kind, 7 + index, SPLITS[index % 3]) for index, kind in enumerate(TYPES)]

TEMPLATES = {
    "look_at_obj_in_light": r"look at (\w+) under the (\w+)|examine the (\w+) with the (\w+)",
    "pick_and_place_simple": r"put a (\w+) in (\w+)|put some (\w+) on (\w+)",
    "pick_clean_then_place_in_recep": (
        r"put a clean (\w+) in (\w+)|clean some (\w+) and put it in (\w+)"
    ),
    "pick_heat_then_place_in_recep": (
        r"put a hot (\w+) in (\w+)|heat some (\w+) and put it in (\w+)"
    ),
    "pick_cool_then_place_in_recep": (
        r"put a cool (\w+) in (\w+)|cool some (\w+) and put it in (\w+)"
    ),
    "pick_two_obj_and_place": r"put two (\w+) in (\w+)|find two (\w+) and put them in (\w+)",
}


def instruction(game: dict[str, Any]) -> str:
    found = re.search(r"Your task is to: (.*?)\.\"", game["grammar"])
    assert found
    return found.group(1)


def asked(game: dict[str, Any]) -> tuple[str, str]:
    """The thing and the receptacle or lamp that the instruction names."""
    found = re.fullmatch(TEMPLATES[game["task_type"]], instruction(game))
    assert found, instruction(game)
    thing, end = (name for name in found.groups() if name)
    return thing, end


def facts(game: dict[str, Any], predicate: str) -> list[list[str]]:
    """The arguments of a predicate in the state at the start."""
    begin = game["pddl_problem"].split("(:init")[1].split("(:goal")[0]
    return [found.split() for found in re.findall(rf"\({predicate} ([^()]*)\)", begin)]


def scene_of(game: dict[str, Any]) -> tuple[str, int]:
    found = re.match(r"\(define \(problem (\w+)_(\d+)\)", game["pddl_problem"])
    assert found
    return found.group(1), int(found.group(2))


# -- rooms ----------------------------------------------------------------------------------------


def test_scenes_have_the_furniture_that_their_tasks_need() -> None:
    for number in range(SCENES):
        kitchen = scene("Kitchen", number)
        assert all(kitchen.of(kind) for kind in ("SinkBasin", "Microwave", "Fridge"))
        assert scene("Bathroom", number).of("SinkBasin")
        assert scene("Bedroom", number).of("Bed")


def test_scenes_differ_and_number_every_class_without_gaps() -> None:
    for room in ROOMS:
        layouts = [scene(room, number) for number in range(SCENES)]
        sets = {tuple(receptacle.name for receptacle in layout.receptacles) for layout in layouts}
        assert len(sets) == SCENES
        for layout in layouts:
            counts = Counter(receptacle.kind for receptacle in layout.receptacles)
            for kind, count in counts.items():
                assert [r.number for r in layout.of(kind)] == list(range(1, count + 1))
            assert all(item.at in layout.receptacles for item in layout.fixtures)


def test_ids_sort_against_their_numbers() -> None:
    ids = [Entity("Cabinet", number).id for number in range(1, 30)]
    assert ids == sorted(ids, reverse=True)
    assert Entity("SinkBasin", 1).id.split("_bar_")[::2] == ["Sink", "SinkBasin"]


# -- games without the engine ---------------------------------------------------------------------


@packaged
def test_shape_is_that_of_a_game_file() -> None:
    game = generate(TYPES[0], 0, "train")
    assert list(game) == [
        *("pddl_domain", "grammar", "pddl_problem", "solvable", "walkthrough", "task_type")
    ]
    assert json.loads(json.dumps(game)) == game and game["solvable"] is True
    assert "UNKNOWN GOAL" not in game["grammar"]


@packaged
@pytest.mark.parametrize("kind", TYPES)
def test_goal_is_open_at_the_start_and_within_reach(kind: str) -> None:
    for seed in range(60):
        game = generate(kind, seed, SPLITS[seed % 3])
        thing, end = asked(game)
        sort = dict(facts(game, "objectType") + facts(game, "receptacleType"))
        sort = {name: kind.removesuffix("Type").lower() for name, kind in sort.items()}
        places = [sort[home] for item, home in facts(game, "inReceptacle") if sort[item] == thing]
        assert (2 if kind == "pick_two_obj_and_place" else 1) <= len(places) <= 4
        assert end in sort.values()
        if kind in ("pick_two_obj_and_place", "pick_and_place_simple"):
            assert end not in places
        for word in ("isToggled", "isClean", "isHot", "isCool", "holds", "opened"):
            assert not facts(game, word)


@packaged
@pytest.mark.parametrize("kind", TYPES)
def test_everything_is_declared_and_lies_where_it_may(kind: str) -> None:
    for seed in range(20):
        game = generate(kind, seed, "train")
        declared = re.findall(r"^(\w+) - \w+$", game["pddl_problem"], re.MULTILINE)
        assert len(declared) == len(set(declared))
        used = {name for arguments in facts(game, r"\w+") for name in arguments}
        assert used <= set(declared)
        may = {tuple(pair) for pair in facts(game, "canContain")}
        item, home = dict(facts(game, "objectType")), dict(facts(game, "receptacleType"))
        movable = {name for (name,) in facts(game, "pickupable")}
        for name, place in facts(game, "inReceptacle"):
            assert name not in movable or (home[place], item[name]) in may


@packaged
def test_bad_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="kind='pick'"):
        generate("pick", 0, "train")
    with pytest.raises(ConfigError, match="split='test'"):
        generate(TYPES[0], 0, "test")


@packaged
def test_seeds_types_and_splits_give_other_problems() -> None:
    games = [
        generate(kind, seed, split) for kind in TYPES for seed in range(50) for split in SPLITS
    ]
    texts = [game["pddl_problem"] + game["grammar"] for game in games]
    assert len(set(texts)) == len(texts)


@packaged
def test_splits_share_scenes_or_goals_as_documented() -> None:
    goals: dict[str, set[object]] = {split: set() for split in SPLITS}
    scenes: dict[str, set[object]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for kind in TYPES:
            for seed in range(100):
                game = generate(kind, seed, split)
                goals[split].add((kind, scene_of(game), asked(game)))
                scenes[split].add(scene_of(game))
    assert not goals["train"] & goals["valid_seen"]
    assert {number for _, number in scenes["valid_unseen"]} == set(range(HELD_OUT))
    assert not scenes["train"] & scenes["valid_unseen"]
    assert len(scenes["valid_seen"] & scenes["train"]) > 0.8 * len(scenes["valid_seen"])


@packaged
def test_every_process_makes_the_same_games() -> None:
    code = (
        "import json, sys, zlib\n"
        "from agentdistill.envs.alfworld.generate import TYPES, generate\n"
        "games = [generate(kind, 5, 'train') for kind in TYPES]\n"
        "assert not {'alfworld', 'torch', 'textworld'} & set(sys.modules)\n"
        "print(zlib.crc32(json.dumps(games).encode()))\n"
    )
    prints = set()
    for salt in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": salt}
        command = [sys.executable, "-c", code]
        prints.add(subprocess.check_output(command, env=environment, cwd=ROOT, text=True))
    assert len(prints) == 1


@packaged
def test_wording_follows_the_installed_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    package = generate_package.package()
    older = package.grammar.replace('"move {o} to {r}"', '"put {o} in/on {r}"')
    worded = replace(package, grammar=older, commands=generate_package.commands(older))
    monkeypatch.setattr(generator, "installed", lambda: worded)
    last = generate("pick_and_place_simple", 0, "train")["walkthrough"][-1]
    assert re.fullmatch(r"put \w+ \d+ in/on \w+ \d+", last)


@packaged
def test_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (ROOT / "docs" / "environments" / "alfworld-generated.md").read_text(encoding="utf-8")
    found = re.search(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    assert found
    exec(found.group(1), {"__name__": "__guide__"})
    assert "go to" in capsys.readouterr().out


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_package, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"agentdistill\[alfworld\]"):
        generate_package.package.__wrapped__()


def test_incomplete_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(generate_package, "find_spec", lambda name: spec)
    with pytest.raises(ConfigError, match="alfworld is incomplete"):
        generate_package.package.__wrapped__()


# -- games in the engine --------------------------------------------------------------------------

OPENING = re.compile(
    r"-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room\. "
    r"Looking quickly around you, you see (.*)\.\n\nYour task is to: (.*)\."
)


class Play:
    """One game in TextWorld itself, with the package's own names."""

    def __init__(self, game: dict[str, Any], path: Path) -> None:
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler

        path.write_text(json.dumps(game), encoding="utf-8")
        wanted = textworld.EnvInfos(won=True, admissible_commands=True)
        argv = list(sys.argv)
        try:
            self.env = textworld.start(str(path), wanted, wrappers=[AlfredDemangler()])
            self.state = self.env.reset()
        finally:
            sys.argv[:] = argv  # the engine writes its own there

    def wins(self, commands: list[str]) -> bool:
        """Whether these commands are all admissible and the last one, not an earlier one, wins."""
        for command in commands:
            if self.state["won"] or command not in self.state["admissible_commands"]:
                return False
            self.state, _, _ = self.env.step(command)
        return bool(self.state["won"])

    def planned(self) -> list[str]:
        """Start again and ask the planner, once: it would plan anew at every step."""
        self.env.request_infos.policy_commands = True
        self.state = self.env.reset()
        self.env.request_infos.policy_commands = False
        return list(self.state["policy_commands"])


def check_game(kind: str, seed: int, split: str, path: Path) -> Play:
    """The opening reads as an official one, and the walkthrough wins."""
    game = generate(kind, seed, split)
    play = Play(game, path)
    opening = OPENING.fullmatch(play.state["feedback"].strip())
    assert opening and opening.group(2) == instruction(game)
    names = [name.removeprefix("and ").removeprefix("a ") for name in opening.group(1).split(", ")]
    expected = [receptacle.name for receptacle in scene(*scene_of(game)).receptacles]
    assert sorted(names) == sorted(expected)
    menu = ["help", "inventory", "look", *(f"go to {name}" for name in names)]
    assert sorted(play.state["admissible_commands"]) == sorted(menu)
    assert play.wins(game["walkthrough"])
    return play


@packaged
@leaky
@pytest.mark.parametrize(("kind", "seed", "split"), FEW)
def test_walkthrough_wins(kind: str, seed: int, split: str, tmp_path: Path) -> None:
    check_game(kind, seed, split, tmp_path / "game.tw-pddl")


@packaged
@leaky
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed", "split"), GAMES)
def test_walkthrough_and_planner_win(kind: str, seed: int, split: str, tmp_path: Path) -> None:
    play = check_game(kind, seed, split, tmp_path / "game.tw-pddl")
    game = generate(kind, seed, split)
    walkthrough = game["walkthrough"]
    size = len(facts(game, "receptacleAtLocation"))
    if kind == "pick_two_obj_and_place" and size > LARGE:
        pytest.skip(f"walkthrough wins; two things among {size} receptacles exhaust the planner")
    planned = play.planned()
    assert play.wins(planned)
    assert len(walkthrough) <= len(planned)
    print(f"{kind} {seed} {split}: walkthrough {len(walkthrough)}, planner {len(planned)}")
