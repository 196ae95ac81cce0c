"""ALFWorld without its engine: options, index of games, expert, words, plans as texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from agentdistill.envs.alfworld import env as module
from agentdistill.envs.alfworld import games, words
from agentdistill.envs.alfworld.env import ALFWorldEnv
from agentdistill.envs.alfworld.expert import Follower
from agentdistill.envs.alfworld.games import MOVE, PUT
from agentdistill.envs.alfworld.goals import COOL, HEAT, LOOK, SIMPLE, TWO, TYPES, kind, parameters
from agentdistill.envs.alfworld.planner import CHOICE, problem, relevant
from agentdistill.errors import ConfigError, EnvError, MissingExtraError
from agentdistill.records import Task

GOALS = {
    LOOK: """(and (exists (?ot - object ?r - receptacle ?a - agent ?l - location) (and
        (objectType ?ot DeskLampType) (toggleable ?ot) (isToggled ?ot) (inReceptacle ?ot ?r)))
        (exists (?o - object ?a - agent) (and (objectType ?o MugType) (holds ?a ?o))))""",
    HEAT: """(exists (?r - receptacle) (exists (?o - object) (and (heatable ?o)
        (objectType ?o MugType) (receptacleType ?r ShelfType) (isHot ?o) (inReceptacle ?o ?r))))""",
    TWO: """(exists (?r - receptacle) (exists (?o1 - object) (and (objectType ?o1 MugType)
        (receptacleType ?r ShelfType) (inReceptacle ?o1 ?r) (exists (?o2 - object) (and
        (not (= ?o1 ?o2)) (objectType ?o2 MugType) (inReceptacle ?o2 ?r))))))""",
    SIMPLE: """(exists (?r - receptacle) (exists (?o - object) (and (inReceptacle ?o ?r)
        (objectType ?o MugType) (receptacleType ?r ShelfType))))""",
}


def content(goal: str, put: str = "move {o} to {r}", solvable: bool = True, note: int = 0) -> str:
    game = {
        "pddl_domain": "(define (domain alfred) (:action CleanObject :effect (isClean ?o)))",
        "pddl_problem": f"(define (problem p) (:init)\n\t(:goal {goal}))",
        "grammar": f'action PutObject {{ template :: "{put}"; }} isclean(o:object)',
        "solvable": solvable,
        "walkthrough": [],
        "note": note,
    }
    return json.dumps(game)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("AGENTDISTILL_HOME", str(folder))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(module, "version", lambda name: "0.4.2")
    games.index.cache_clear()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data" / "json_2.1.1"
    for number, (name, goal) in enumerate(GOALS.items()):
        for split in ("train", "valid_seen"):
            path = root / split / f"{name}-{number}" / "trial" / "game.tw-pddl"
            path.parent.mkdir(parents=True)
            path.write_text(content(goal, note=number))
    return tmp_path / "data"


# -- goals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOALS)
def test_the_type_of_a_task_follows_from_its_goal(name: str) -> None:
    found = parameters(f"(:init (isHot x)) (:goal {GOALS[name]})")
    assert found["task_type"] == name == kind(f"(:goal {GOALS[name]})")
    assert found["object_target"] == "mug"
    assert found["parent_target"] == ("" if name == LOOK else "shelf")
    assert found["toggle_target"] == ("desklamp" if name == LOOK else "")
    assert kind("(:goal (isSliced ?o))") == ""


# -- the index ------------------------------------------------------------------------------------


def test_official_games_are_listed_by_split_with_their_content(folder: Path) -> None:
    env = ALFWorldEnv(games=str(folder))
    assert env.card.splits == ("train", "valid_seen")
    assert "wording: move X to Y" in env.card.notes
    listed = list(env.tasks("train"))
    assert len({task.key for task in listed}) == len(GOALS) == len(listed)
    assert {task.payload["game"].split("/")[0] for task in listed} == {"train"}
    assert all(len(task.payload["sha"]) == games.HASH_LENGTH for task in listed)
    again = [task.key for task in env.tasks("train")]
    assert [task.key for task in listed] == again
    orders = {tuple(task.key for task in env.tasks("train", seed=seed)) for seed in range(9)}
    assert len(orders) > 1 and {frozenset(order) for order in orders} == {frozenset(again)}
    assert sorted(task.index or 0 for task in listed) == [0, 1, 2, 3]


def test_types_and_splits_are_checked(folder: Path) -> None:
    env = ALFWorldEnv(games=folder, types=[HEAT])
    assert [task.payload["game"].split("/")[1] for task in env.tasks("train")] == [f"{HEAT}-1"]
    with pytest.raises(ConfigError, match="agentdistill data alfworld"):
        env.tasks("valid_unseen")
    with pytest.raises(ConfigError, match="train, valid_seen"):
        env.tasks("test")
    with pytest.raises(ConfigError, match="no game of these types"):
        ALFWorldEnv(games=folder, types=[COOL]).tasks("train")


def test_an_index_is_made_once_and_follows_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    original = Path.read_bytes
    games_only = lambda path: read.append(path) if path.suffix == ".tw-pddl" else None  # noqa: E731
    monkeypatch.setattr(Path, "read_bytes", lambda path: (games_only(path), original(path))[1])
    root = games.dataset(folder)

    def look() -> tuple[int, games.Index]:
        games.index.cache_clear()
        read.clear()
        found = games.index(root)
        return len(read), found

    assert look()[0] == 8
    count, first = look()
    assert count == 0
    changed = sorted(root.rglob("*.tw-pddl"))[0]
    changed.write_text(content(GOALS[SIMPLE], note=99))
    count, second = look()
    assert count == 1 and second.data != first.data
    changed.unlink()
    count, third = look()
    assert count == 0 and len(third.entries["train"]) == 3
    (memory,) = (games.cache_folder() or Path()).glob("index-*.json")
    for damaged in ("", "{}", '{"format": 1, "games": [[1]]}', '{"format": 0, "games": []}'):
        memory.write_text(damaged)
        count, fourth = look()
        assert (count, fourth.data) == (7, third.data)


def test_the_hash_of_the_data_does_not_depend_on_the_place(folder: Path, tmp_path: Path) -> None:
    before = ALFWorldEnv(games=folder).card.data
    folder.rename(tmp_path / "elsewhere")
    assert ALFWorldEnv(games=tmp_path / "elsewhere").card.data == before
    own = tmp_path / "elsewhere" / "json_2.1.1" / "train"
    assert ALFWorldEnv(games=own).card.splits == ("train",)


def test_what_upstream_leaves_out_is_left_out(folder: Path) -> None:
    root = folder / "json_2.1.1" / "train"
    for name, solvable in (("movable-1", True), ("x-Sliced-2", True), ("hopeless-3", False)):
        (root / name).mkdir()
        (root / name / "game.tw-pddl").write_text(content(GOALS[TWO], solvable=solvable))
    assert len(list(ALFWorldEnv(games=folder).tasks("train"))) == len(GOALS)


def test_the_older_wording_is_noticed(folder: Path) -> None:
    for note, path in enumerate(folder.rglob("*.tw-pddl")):
        path.write_text(content(GOALS[SIMPLE], put="put {o} in/on {r}", note=note))
    env = ALFWorldEnv(games=folder)
    assert "wording: put X in/on Y" in env.card.notes
    assert "put {object} in/on {place}" in env.instruction
    called = env.tool_action("put", {"object": "mug 1", "place": "shelf 2"})
    assert called == "put mug 1 in/on shelf 2"
    some = next(iter(folder.rglob("*.tw-pddl")))
    some.write_text(content(GOALS[SIMPLE]))
    games.index.cache_clear()
    mixed = ALFWorldEnv(games=folder)
    assert f"wording: {PUT} and {MOVE}" in mixed.card.notes
    assert "put {object} in/on {place} or move {object} to {place}" in mixed.instruction


def test_listing_4000_games_is_quick(tmp_path: Path) -> None:
    for number in range(4000):
        split = "train" if number % 10 else "valid_seen"
        path = tmp_path / "many" / split / f"{TYPES[number % 6]}-{number // 3}" / f"trial_{number}"
        path.mkdir(parents=True)
        (path / "game.tw-pddl").write_text(content(GOALS[SIMPLE], note=number))
    games.index(tmp_path / "many")
    games.index.cache_clear()
    env = ALFWorldEnv(games=tmp_path / "many")
    begun = time.process_time()
    number = len(list(env.tasks("train"))) + len(list(env.tasks("valid_seen")))
    assert number == 4000
    assert time.process_time() - begun < 0.5


def test_a_read_only_cache_is_no_obstacle(folder: Path, tmp_path: Path, own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    assert games.cache_folder() is None
    assert len(list(ALFWorldEnv(games=folder).tasks("train"))) == len(GOALS)


# -- options, availability, cards -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"expert": "nobody"}, "expert"),
        ({"types": ["cook"]}, "types"),
        ({"types": []}, "types"),
        ({"deadline": 0}, "deadline"),
        ({"max_steps": 0}, "max_steps"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ALFWorldEnv(**options)
    assert caught.value.key == key


def test_missing_games(tmp_path: Path) -> None:
    for choice in ("official", str(tmp_path)):
        env = ALFWorldEnv(games=choice)
        with pytest.raises(ConfigError, match="agentdistill data alfworld"):
            env.tasks("train")
    status = ALFWorldEnv.availability()
    assert status.data == "generated games" and "agentdistill data alfworld" in status.missing[0]
    assert not status.needs
    assert ALFWorldEnv().card.data.startswith("generated-")


def test_a_missing_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", absent)
    env = ALFWorldEnv(games=folder)
    assert env.card.version == "" and env.instruction
    assert "pip install" in ALFWorldEnv.availability().needs[0]
    task = Task(module.ID, "train", {"game": "train/x", "sha": "0"})
    for attempt in (lambda: env.tasks("train"), lambda: env.reset(options={"task": task})):
        with pytest.raises(MissingExtraError, match=r"agentdistill\[alfworld\]"):
            attempt()


def test_availability_names_what_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALFWORLD_DATA", str(folder))
    status = ALFWorldEnv.availability()
    assert status.data.startswith("train, valid_seen in")
    assert len(status.missing) == 1 and "valid_unseen" in status.missing[0]
    assert ALFWorldEnv().card.data == ALFWorldEnv(games="official").card.data
    assert ALFWorldEnv(games="generated").card.data.startswith("generated-")


def test_generated_tasks_are_distinct_and_take_the_types_in_turn() -> None:
    env = ALFWorldEnv(games="generated")
    found = [task for s in games.SPLITS for task in islice(env.tasks(s, seed=3), 12)]
    assert len({task.key for task in found}) == 36
    assert [task.payload["kind"] for task in found[:12]] == [*TYPES, *TYPES]
    again = [task.key for s in games.SPLITS for task in islice(env.tasks(s, seed=3), 12)]
    assert again == [task.key for task in found]
    assert all(task.data == env.card.data for task in found)
    only = ALFWorldEnv(games="generated", types=TWO)
    assert {task.payload["kind"] for task in islice(only.tasks("train"), 5)} == {TWO}
    assert env.card.split("report") == "valid_unseen" and env.card.split("tune") == "valid_seen"


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "train/../../x"])
def test_tasks_cannot_name_files_elsewhere(folder: Path, path: str) -> None:
    env = ALFWorldEnv(games=folder)
    with pytest.raises(ConfigError, match="must lie in"):
        env.reset(options={"task": Task(module.ID, "train", {"game": path, "sha": "0"})})
    env.close()


def test_a_generated_task_of_another_version_is_refused(folder: Path) -> None:
    env = ALFWorldEnv(games=folder)
    payload = {"kind": TWO, "seed": 1, "split": "train"}
    with pytest.raises(ConfigError, match="these games are generated-"):
        env.reset(options={"task": Task(module.ID, "train", payload, "generated-0")})
    env.close()


def test_before_the_first_reset_there_is_no_engine() -> None:
    env = ALFWorldEnv()
    assert env.expert_action() is None and env.goal == ""
    with pytest.raises(EnvError, match="reset"):
        env.admissible()
    env.close()
    env.close()


def test_construction_and_card_import_nothing_heavy(folder: Path) -> None:
    code = (
        "import sys; from agentdistill.envs.alfworld.env import ALFWorldEnv\n"
        f"env = ALFWorldEnv(games={str(folder)!r}); env.card; env.availability(); env.tools\n"
        "heavy = {'torch', 'textworld', 'alfworld', 'fast_downward', 'transformers'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environ = {**os.environ, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True, timeout=60)


# -- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wording", [MOVE, PUT])
def test_tools_say_what_the_instruction_says(wording: str) -> None:
    text = words.instruction([wording])
    for tool in words.tools(wording):
        function = tool["function"]
        names = function["parameters"]["required"]
        spoken = words.spoken(wording, function["name"], {name: f"<{name}>" for name in names})
        assert spoken is not None and spoken.startswith(function["name"])
        assert spoken.replace("<", "{").replace(">", "}") in text
        assert names == list(function["parameters"]["properties"])


def test_tool_calls_become_actions() -> None:
    env = ALFWorldEnv(games="generated")
    assert env.tool_action("go", {"place": "cabinet 3"}) == "go to cabinet 3"
    assert env.tool_action("look", {}) == "look"
    held = {"object": "mug 1", "place": "{x}"}
    assert env.tool_action("move", held) == "move mug 1 to {x}"
    commands = ("go to", "look", "move")
    for name, arguments in (
        ("go", {}),
        ("go", {"place": 3}),
        ("go", {"place": "cabinet 1", "speed": "high"}),
        ("fly", {"place": "cabinet 1"}),
        ("look", {"at": "mug 1"}),
        ("look", {"look": "look"}),
    ):
        assert not env.tool_action(name, arguments).startswith(commands)


# -- the expert -----------------------------------------------------------------------------------


def test_the_expert_follows_until_the_agent_leaves() -> None:
    asked: list[int] = []
    expert = Follower(["a", "b", "c"], lambda: asked.append(1) or ["x", "y"])  # type: ignore[func-returns-value]
    for action, valid in (("look", True), ("nonsense", False), ("examine mug 1", True)):
        assert expert.action() == "a"
        expert.saw(action, valid)
    expert.saw("a", True)
    assert expert.action() == "b" and not asked
    expert.saw("z", True)
    assert expert.action() == "x" and len(asked) == 1
    expert.saw("x", True)
    assert expert.action() == "y" and len(asked) == 1
    expert.saw("y", False)
    assert expert.action() == "x" and len(asked) == 2


def test_an_expert_without_a_way_does_not_plan_at_every_step() -> None:
    asked: list[int] = []
    expert = Follower([], lambda: asked.append(1) or [])  # type: ignore[func-returns-value]
    assert expert.action() is None and expert.action() is None
    expert.saw("nonsense", False)
    assert expert.action() is None and len(asked) == 1
    expert.saw("go to shelf 1", True)
    assert expert.action() is None and len(asked) == 2


# -- plans ----------------------------------------------------------------------------------------


def _room() -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """Mug on shelf 0, ten shelves and a microwave, a fork held, a spoon nobody wants."""
    places = {f"shelf{n}": "shelftype" for n in range(10)}
    places |= {"oven": "microwavetype", "tub": "sinkbasintype", "bin": "bintype"}
    things = {"mug": "mugtype", "fork": "forktype", "spoon": "spoontype"}
    facts = [("receptacletype", *pair) for pair in places.items()]
    facts += [("receptacleatlocation", place, f"at_{place}") for place in places]
    facts += [("objecttype", *pair) for pair in things.items()]
    facts += [("inreceptacle", "mug", "shelf9"), ("inreceptacle", "spoon", "shelf3")]
    facts += [("holds", "agent1", "fork"), ("atlocation", "agent1", "at_tub")]
    facts += [("cancontain", "bintype", "forktype"), ("new-axiom@0", "agent1")]
    types = dict.fromkeys(places, "receptacle") | dict.fromkeys(things, "object")
    types |= {f"at_{place}": "location" for place in places} | {"agent1": "agent"}
    types |= dict.fromkeys(things.values(), "otype") | dict.fromkeys(places.values(), "rtype")
    return facts, types


def test_a_plan_is_about_little() -> None:
    facts, types = _room()
    kept = relevant(facts, GOALS[HEAT], "agent1")
    assert {"mug", "fork", "oven", "bin", "shelf9", "at_tub"} <= kept
    assert not {"spoon", "tub"} & kept
    assert len([name for name in kept & types.keys() if name.startswith("shelf")]) <= CHOICE + 2
    assert "oven" not in relevant(facts, GOALS[SIMPLE], "agent1")


def test_the_problem_declares_all_that_it_names() -> None:
    facts, types = _room()
    text = problem(facts, f"(:goal {GOALS[HEAT]}))", types, "(receptacleType ?r SinkBasinType)")
    head, init = text.split("(:init")
    declared = {line.split(" - ")[0] for line in head.splitlines() if " - " in line}
    assert "sinkbasintype" in declared and "spoontype" not in declared
    named = {
        word
        for line in init.split("(:goal")[0].splitlines()
        for word in line.strip("()").split()[1:]
    }
    assert named <= declared and "@" not in text
