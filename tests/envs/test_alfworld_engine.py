"""ALFWorld for real: what players see, experts, faults. Needs the package and some games.

Games come from ``$ALFWORLD_DATA`` or from ``shared/data/alfworld`` next to the project; generated
games need the package only.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from agentdistill.envs.alfworld import games
from agentdistill.envs.alfworld.env import ID, ALFWorldEnv
from agentdistill.envs.alfworld.goals import LOOK, TYPES
from agentdistill.envs.check import check_env
from agentdistill.envs.worker import Worker, scrubbed
from agentdistill.errors import EnvError
from agentdistill.records import Task

pytestmark = pytest.mark.alfworld

STEPS = 14


def _folder() -> Path | None:
    beside = Path(__file__).parents[3] / "shared" / "data" / "alfworld"
    for folder in (games.data_folder(), beside):
        if (folder / games.DATASET / "valid_seen").is_dir():
            return folder
    return None


FOLDER = _folder()
official = pytest.mark.skipif(
    FOLDER is None,
    reason="needs official ALFWorld games in $ALFWORLD_DATA: agentdistill data alfworld",
)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("AGENTDISTILL_HOME", str(folder))
        games.index.cache_clear()
        yield folder
    games.index.cache_clear()


@pytest.fixture(scope="module")
def env() -> Iterator[ALFWorldEnv]:
    """Official games where there are any, otherwise generated ones."""
    made = ALFWorldEnv(games=FOLDER or "generated")
    yield made
    made.close()


@pytest.fixture(scope="module")
def generated() -> Iterator[ALFWorldEnv]:
    made = ALFWorldEnv(games="generated")
    yield made
    made.close()


def first(env: ALFWorldEnv, split: str = "train", seed: int = 0) -> Task:
    return next(iter(env.tasks(split, seed=seed)))


def choose(rng: random.Random, admissible: list[str]) -> str:
    """A random command, mostly one that changes something; sometimes none at all."""
    moving = [text for text in admissible if text.split()[0] not in ("look", "inventory", "help")]
    return rng.choice([*moving, *moving, rng.choice(admissible), "fly to the moon"])


class Plain:
    """TextWorld as upstream plays it, in a process of its own."""

    def play(self, path: str, seed: int, plans: int) -> list[Any]:
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler

        rng = random.Random(seed)
        infos = textworld.EnvInfos(won=True, admissible_commands=True)
        game = textworld.start(path, infos, [AlfredDemangler()])
        state = game.reset()
        seen: list[Any] = [[state.feedback, state.admissible_commands]]
        for _ in range(STEPS):
            state, _, _ = game.step(choose(rng, state.admissible_commands))
            seen.append([state.feedback, state.won, state.admissible_commands])
        inner = game._wrapped_env
        return [seen, [inner._pddl_state.replan(inner._entity_infos) for _ in range(plans)]]


# -- the same as upstream -------------------------------------------------------------------------


@official
def test_players_see_what_upstream_shows() -> None:
    """Every text and every list of commands, byte for byte; plans of the same cost."""
    assert FOLDER is not None
    root = FOLDER / games.DATASET
    entries = games.index(root).entries["valid_seen"]
    # Ordered by size: a small room, whose plans upstream finds soon, and a kitchen.
    entries = sorted(entries, key=lambda entry: (entry.size, entry.path))
    chosen = [(entries[0], 1), (entries[2 * len(entries) // 3], 0)]
    environ = {**scrubbed(PYTHONHASHSEED="1"), "ALFWORLD_DATA": str(FOLDER)}
    plain = Worker("tests.envs.test_alfworld_engine:Plain", environ=environ)
    folder = games.cache_folder()
    assert folder is not None
    other = {**environ, "PYTHONHASHSEED": "2"}
    quick = Worker("agentdistill.envs.alfworld.engine:Engine", environ=other, cache=str(folder))
    try:
        for seed, (entry, plans) in enumerate(chosen):
            expected, planned = plain.call("play", str(root / entry.path), seed, plans)
            for _ in ("grounded now", "again from memory"):
                rng = random.Random(seed)
                source = {"path": str(root / entry.path), "sha": entry.sha}
                text, _ = quick.call("begin", source)
                admissible = quick.call("admissible")
                seen = [[text, admissible]]
                for _ in range(STEPS):
                    command = choose(rng, admissible)
                    text, won, valid = quick.call("step", command)
                    assert valid == (text != "Nothing happens.") == (command in admissible)
                    admissible = quick.call("admissible")
                    seen.append([text, won, admissible])
                assert seen == expected
            for plan in planned:
                assert len(quick.call("plan")) == len(plan)
    finally:
        plain.close()
        quick.close()


@official
def test_a_grounded_problem_from_the_disk_is_the_same(env: ALFWorldEnv, own_cache: Path) -> None:
    """Another process finds the first one's work; damaged files are made again."""
    task = first(env, "valid_seen", seed=5)

    def look() -> tuple[str, list[str]]:
        env.close()
        text, _ = env.reset(options={"task": task})
        return text, env.admissible()

    expected = look()
    kept = sorted(own_cache.rglob("*.sas.z"))
    assert kept and look() == expected
    for path in kept:
        path.write_bytes(path.read_bytes()[:50])
    assert look() == expected


# -- episodes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_checker_is_content() -> None:
    options = {"games": "generated", "types": [LOOK], "max_steps": 12}  # bedrooms are quick
    report = check_env(ID, episodes=1, seconds=0.1, budget=1.0, kwargs=options)
    wrong = [check for check in report.checks if check.status == "failed"]
    assert not wrong


def test_the_first_observation_and_the_goal(env: ALFWorldEnv) -> None:
    text, info = env.reset(options={"task": first(env)})
    assert text.startswith("You are in the middle of a room.") and "Welcome" not in text
    assert text.endswith(f"Your task is to: {env.goal}") and env.goal
    assert info["valid"] and "help" not in env.admissible()
    assert {"look", "inventory"} <= set(env.admissible())
    assert env.act("look").valid and env.act("help").valid
    assert env.act(" inventory\n").observation == "You are not carrying anything."


@pytest.mark.parametrize(
    "text", ["", "go to\x00bed 1", "x" * 10**6, "\ud800", "Look", "look\nlook"]
)
def test_what_is_no_command_changes_nothing(env: ALFWorldEnv, text: str) -> None:
    env.reset(options={"task": first(env)})
    before = env.admissible()
    result = env.act(text)
    assert (result.valid, result.observation, result.reward) == (False, "Nothing happens.", 0.0)
    assert env.admissible() == before


def play(env: ALFWorldEnv, task: Task, detour: int = 0) -> Any:
    """An episode of the expert, after ``detour`` random steps."""
    env.reset(options={"task": task})
    rng, result = random.Random(task.key), None
    for _ in range(detour):
        result = env.act(choose(rng, env.admissible()))
    while result is None or not (result.terminated or result.truncated):
        action = env.expert_action()
        if action is None:
            break
        assert action in env.admissible() or action == "look"
        result = env.act(action)
    return result


@pytest.mark.parametrize("detour", [0, 5])
@pytest.mark.parametrize("expert", ["walkthrough", "planner"])
def test_the_expert_wins_from_anywhere(
    env: ALFWorldEnv, generated: ALFWorldEnv, expert: str, detour: int
) -> None:
    for source in {id(env): env, id(generated): generated}.values():
        source._expert = expert
        try:
            tasks = islice(source.tasks("valid_seen", seed=7), 3)
            results = [play(source, task, detour) for task in tasks]
        finally:
            source._expert = "walkthrough"
        assert [result.success for result in results] == [True] * 3
        assert (
            {result.reward for result in results} == {result.score for result in results} == {1.0}
        )


def test_generated_games_of_all_types_are_won(generated: ALFWorldEnv) -> None:
    tasks = list(islice(generated.tasks("valid_unseen", seed=1), len(TYPES)))
    assert {task.payload["kind"] for task in tasks} == set(TYPES)
    assert all(play(generated, task).success for task in tasks)


def test_the_handcoded_expert_repeats_itself() -> None:
    made = ALFWorldEnv(games=FOLDER or "generated", expert="handcoded", max_steps=30)
    traces = []
    try:
        task = first(made, "valid_seen", seed=1)
        for _ in range(2):
            made.reset(options={"task": task})
            actions: list[str | None] = []
            while len(actions) < 30 and (action := made.expert_action()) is not None:
                actions.append(action)
                if made.act(action).terminated:
                    break
            traces.append(actions)
    finally:
        made.close()
    assert traces[0] == traces[1] and len(traces[0]) > 3 and traces[0][0] == "look"


# -- faults ---------------------------------------------------------------------------------------


def test_a_killed_worker_is_a_fault_and_then_replaced(env: ALFWorldEnv) -> None:
    task = first(env)
    text, _ = env.reset(options={"task": task})
    worker = env._worker
    assert worker is not None
    os.kill(worker.child.process.pid, signal.SIGKILL)
    with pytest.raises(EnvError, match="signal 9"):
        env.step("look")
    with pytest.raises(EnvError, match="has ended"):
        env.step("look")
    assert env.reset(options={"task": task})[0] == text
    assert env.step("look")[4]["valid"]


def test_a_deadline_is_a_fault(generated: ALFWorldEnv) -> None:
    hasty = ALFWorldEnv(games="generated", deadline=0.01)
    with pytest.raises(EnvError, match="no answer within"):
        hasty.reset(options={"task": first(generated)})
    hasty.close()


def test_a_forgotten_environment_leaves_no_process(generated: ALFWorldEnv) -> None:
    forgotten = ALFWorldEnv(games="generated")
    forgotten.reset(options={"task": first(generated)})
    worker = forgotten._worker
    assert worker is not None and worker.child.alive
    del forgotten
    assert worker.broken and not worker.child.alive


@official
def test_damaged_changed_and_missing_files(tmp_path: Path) -> None:
    assert FOLDER is not None
    root = tmp_path / "games" / games.DATASET / "train"
    source = sorted((FOLDER / games.DATASET / "valid_seen").rglob("game.tw-pddl"))[0]
    names = ("truncated", "partial", "broken", "gone", "changed", "good")
    for name in names:
        (root / name).mkdir(parents=True)
        shutil.copyfile(source, root / name / "game.tw-pddl")
    whole = source.read_bytes()
    files = {name: root / name / "game.tw-pddl" for name in names}
    files["truncated"].write_bytes(whole[: len(whole) // 2])
    files["partial"].write_bytes(b'{"pddl_domain": "", "grammar": ""}')
    files["broken"].write_bytes(whole.replace(b"(:init", b"(:inti"))
    made = ALFWorldEnv(games=tmp_path / "games")
    tasks = {task.payload["game"].split("/")[1]: task for task in made.tasks("train")}
    assert set(tasks) == set(names)
    files["gone"].unlink()
    files["changed"].write_bytes(whole.replace(b"Your task", b"My task"))
    reasons = {
        "truncated": "damaged: no JSON",
        "partial": "it has no pddl_problem",
        "broken": "cannot be played",
        "gone": "cannot read",
        "changed": "its content has changed",
    }
    try:
        for name, reason in reasons.items():
            with pytest.raises(EnvError, match=reason) as caught:
                made.reset(options={"task": tasks[name]})
            assert f"train/{name}/" in str(caught.value) and "\n" not in str(caught.value)
            assert made.reset(options={"task": tasks["good"]})[0]
    finally:
        made.close()


@official
def test_a_walkthrough_that_is_missing_or_wrong_is_replaced(tmp_path: Path) -> None:
    assert FOLDER is not None
    source = sorted((FOLDER / games.DATASET / "valid_seen").rglob("game.tw-pddl"))[0]
    for name, way in (("none", []), ("older wording", ["put mug 1 in/on desk 1"])):
        content = {**json.loads(source.read_bytes()), "walkthrough": way}
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "game.tw-pddl").write_text(json.dumps(content))
    made = ALFWorldEnv(games=tmp_path)
    try:
        for task in made.tasks("train"):
            made.reset(options={"task": task})
            results = []
            while not results or not results[-1].terminated:
                action = made.expert_action()
                assert action is not None
                results.append(made.act(action))
            assert sum(not result.valid for result in results) == ("older" in task.payload["game"])
            assert made.expert_action() is None
    finally:
        made.close()


@official
def test_an_engine_in_this_process_leaves_the_arguments_alone() -> None:
    code = (
        "import json, sys\n"
        "from agentdistill.envs.alfworld.engine import Engine\n"
        "engine = Engine(); engine.begin(json.loads(sys.argv[1]))\n"
        "engine.step('look'); assert engine.plan(); engine.begin(json.loads(sys.argv[1]))\n"
        "assert len(sys.argv) == 2 and sys.argv[1].startswith('{'), sys.argv"
    )
    assert FOLDER is not None
    path = sorted((FOLDER / games.DATASET / "valid_seen").rglob("game.tw-pddl"))[0]
    sha = hashlib.sha256(path.read_bytes()).hexdigest()[: games.HASH_LENGTH]
    source = json.dumps({"path": str(path), "sha": sha})
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, source], check=True, env=environ, timeout=120)
