"""ScienceWorld with the real simulator: episodes, the expert, determinism, processes that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest

from agentdistill.envs.check import check_env
from agentdistill.envs.scienceworld.env import ID, ScienceWorldEnv
from agentdistill.envs.scienceworld.problems import VARIATIONS
from agentdistill.errors import ConfigError, EnvError
from agentdistill.records import StepResult, Task
from tests.processes import gone

pytestmark = [
    pytest.mark.java,
    pytest.mark.skipif(find_spec("scienceworld") is None, reason="needs the package scienceworld"),
]


def _task(name: str, variation: int, simplifications: str = "easy") -> Task:
    payload = {"task": name, "variation": variation, "simplifications": simplifications}
    return Task(ID, "train", payload)


LIVING = _task("find-living-thing", 0)
PLAIN = _task("find-living-thing", 0, "")


@pytest.fixture(scope="module")
def env() -> Iterator[ScienceWorldEnv]:
    made = ScienceWorldEnv(max_steps=1000)
    yield made
    made.close()


def _start(env: ScienceWorldEnv, task: Task) -> str:
    return env.reset(options={"task": task})[0]


def _gold(env: ScienceWorldEnv, task: Task) -> list[tuple[str, StepResult]]:
    """The expert's episode."""
    _start(env, task)
    taken = []
    while (action := env.expert_action()) is not None:
        taken.append((action, env.act(action)))
    return taken


def _pid(env: ScienceWorldEnv) -> int:
    return env._held[0].child.process.pid


# -- episodes --------------------------------------------------------------------------------------


def test_the_first_observation_is_the_task_and_the_room(env: ScienceWorldEnv) -> None:
    text = _start(env, LIVING)
    assert text.startswith(env.goal + "\n\nThis room is called the ")
    assert env.goal.startswith("Your task is to find a(n) living thing.")


@pytest.mark.parametrize("name", ["find-living-thing", "power-component", "identify-life-stages-2"])
def test_the_expert_reaches_100(env: ScienceWorldEnv, name: str) -> None:
    _start(env, _task(name, 1))
    given = env._score  # some tasks begin with a few points
    taken = _gold(env, _task(name, 1))
    last = taken[-1][1]
    assert last.success and last.terminated and last.score == 1.0
    assert sum(result.reward for _, result in taken) == pytest.approx(1.0 - given / 100)
    assert all(result.valid for _, result in taken)
    assert not any(result.terminated or result.success for _, result in taken[:-1])
    assert env.expert_action() is None


def test_focus_on_a_wrong_thing_fails_at_once_and_costs_what_was_gained(
    env: ScienceWorldEnv,
) -> None:
    _start(env, LIVING)
    env.act("open door to hallway")
    env.act("go to hallway")
    *_, gained = [env.step(action)[4]["official_score"] for action in ("look around", "wait1")]
    assert gained > 0
    wrong = next(a for a in env.admissible() if a.startswith("focus on") and "door" not in a)
    _, reward, terminated, _, info = env.step(wrong)
    assert terminated and not info["success"]
    assert (info["score"], info["official_score"]) == (0.0, -100)
    assert info["best_score"] == gained
    assert reward == pytest.approx(-1 - gained / 100)
    assert env.expert_action() is None


def test_the_best_score_is_an_option(env: ScienceWorldEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_best_counts", ScienceWorldEnv(score="best")._best_counts)
    _start(env, LIVING)
    env.act("open door to hallway")
    gained = env.act("go to hallway").score
    wrong = next(a for a in env.admissible() if a.startswith("focus on") and "door" not in a)
    result = env.act(wrong)
    assert result.terminated and not result.success
    assert result.score == gained > 0 and result.reward == 0


def test_what_the_parser_does_not_know_is_invalid_and_takes_no_time(env: ScienceWorldEnv) -> None:
    _start(env, LIVING)
    clock = env.step("look around")[4]["clock"]
    for action in (
        "",
        "xyzzy",
        "open",
        "pick up the",
        "go\nto hallway",
        "look\x00",
        "\ud800",
        "a" * 301,
    ):
        text, reward, *_, info = env.step(action)
        assert (text, reward, info["valid"]) == ("No known action matches that input.", 0, False)
        assert info["clock"] == clock
    assert env.act("  Look   Around \n").valid
    assert env.act("take door").valid  # known, and of no use


def test_the_parser_knows_every_command_of_the_instruction(env: ScienceWorldEnv) -> None:
    """Each form, with things that are in that room or carried."""
    ones = (
        "look at,pick up,put down,mix,disconnect,open,close,look in,activate,deactivate,read,flush"
    )
    twos = "move to,pour into,dunk into,connect to,use on"
    commands = ["look around", "inventory", "task", "wait1", "wait", "reset task", "open door"]
    commands += [f"{verb} table" for verb in ones.split(",")] + ["eat orange", "focus on door"]
    commands += [f"{verb} bowl {word} table" for verb, word in map(str.split, twos.split(","))]
    _start(env, _task("power-component", 1, ""))
    unknown = [command for command in commands if not env.act(command).valid]
    assert unknown == [] and env.act("go to hallway").valid
    _start(env, LIVING)
    assert env.act("teleport to kitchen").valid
    assert not env.act("connect door to door").valid  # no wires in easy tasks without circuits


def test_a_question_is_answered_with_a_number(env: ScienceWorldEnv) -> None:
    _start(env, _task("power-component", 1, ""))
    asked = env.act("look at wood cup")
    assert asked.valid and asked.observation.startswith("Ambiguous request")
    assert env.admissible() == ["0", "1", "2"]
    clock = env._clock
    answered = env.act("1")
    assert answered.valid and "wood cup" in answered.observation and env._clock > clock
    assert not env.act("1").valid  # nobody asks any more
    env.act("look at wood cup")
    assert not env.act("seven").valid
    assert len(env.admissible()) > 50  # the question is gone


def test_admissible_actions_are_sorted_and_known_to_the_parser(env: ScienceWorldEnv) -> None:
    _start(env, LIVING)
    listed = env.admissible()
    assert listed == sorted(set(listed)) and len(listed) > 50
    for action in listed[:: len(listed) // 6]:
        assert env.act(action).valid, action
        _start(env, LIVING)


def test_payloads_that_are_no_problem_are_refused_and_the_next_one_plays(
    env: ScienceWorldEnv,
) -> None:
    for payload in (
        {"task": "boil", "variation": 30},
        {"task": "fry", "variation": 0},
        {"task": "boil"},
        {"variation": 0},
        {"task": "boil", "variation": 0, "simplifications": "hard"},
    ):
        with pytest.raises(ConfigError):
            _start(env, Task(ID, "train", payload))
    assert _start(env, LIVING).startswith("Your task is")


# -- the expert ------------------------------------------------------------------------------------


def test_the_expert_forgives_what_took_no_time_and_nothing_else(env: ScienceWorldEnv) -> None:
    path = [action for action, _ in _gold(env, LIVING)]
    _start(env, LIVING)
    for action in (path[0], "xyzzy", "inventory", "", "look around"):
        env.act(action)
    assert env.expert_action() == path[1]
    env.act(path[1].upper())
    assert env.expert_action() == path[2]
    env.act("wait1")
    assert env.expert_action() is None


def test_the_expert_can_be_asked_late(env: ScienceWorldEnv) -> None:
    from agentdistill.envs.scienceworld import env as module

    taken = _gold(env, LIVING)
    module._gold_paths.clear()
    _start(env, LIVING)
    results = [env.act("nonsense")] + [env.act(action) for action, _ in taken[:4]]
    assert results[1:] == [result for _, result in taken[:4]]
    assert env.expert_action() == taken[4][0]  # computed now; the world is where it was
    assert [env.act(action) for action, _ in taken[4:]] == [result for _, result in taken[4:]]


# -- the same in every process ---------------------------------------------------------------------

WALK = textwrap.dedent(
    """
    import sys
    from random import Random
    from agentdistill.envs.scienceworld.env import ID, ScienceWorldEnv
    from agentdistill.records import Task, digest

    def walk(env, listing):
        seen = []
        for name, variation in (("find-animal", 3), ("boil", 0)):
            payload = {"task": name, "variation": variation, "simplifications": "easy"}
            seen.append(env.reset(options={"task": Task(ID, "train", payload)})[0])
            chance = Random(name)
            actions = ["teleport to outside", "teleport to kitchen", "pour counter into sink",
                       "activate sink", "use lighter on drawer", "teleport to outside"]
            for step in range(12):
                if step < len(actions):
                    action = actions[step]
                else:
                    action = chance.choice(["wait1", "look around", "go to greenhouse", "wait",
                                            "go to outside", "inventory", "open door"])
                if listing:
                    env.admissible()
                result = env.act(action)
                seen.append([result.observation, result.score])
        return digest(seen)

    if __name__ == "__main__":
        env = ScienceWorldEnv()
        print(walk(env, False))
        env.close()
    """
)


def test_other_processes_used_processes_and_listings_see_the_same(
    env: ScienceWorldEnv, tmp_path: Path
) -> None:
    """Upstream, these episodes differ: by the order of sets, and by who looked at the listing."""
    script = tmp_path / "walk.py"
    script.write_text(WALK)
    other = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=True
    )
    space: dict[str, object] = {"__name__": "here"}
    exec(WALK, space)
    walk = space["walk"]
    assert callable(walk)
    _gold(env, LIVING)
    assert walk(env, True) == other.stdout.strip()
    assert walk(env, False) == other.stdout.strip()


def test_listing_actions_does_not_change_the_random_numbers_of_the_world(
    env: ScienceWorldEnv,
) -> None:
    drawn = []
    for listings in (0, 0, 2):
        _start(env, LIVING)
        world = env._held[0]
        for _ in range(listings):
            env.admissible()
        env.act("wait1")
        drawn.append(world._call(world._random, "nextInt"))
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_snapshot_comes_back(env: ScienceWorldEnv) -> None:
    taken = _gold(env, LIVING)
    _start(env, LIVING)
    for action, _ in taken[:3]:
        env.act(action)
    saved = env.snapshot()
    env.act("wait")
    assert env.restore(saved) == taken[2][1].observation
    assert env.act(taken[3][0]) == taken[3][1]


# -- the simulator and its process -----------------------------------------------------------------


def test_the_simulator_agrees_on_the_numbers_of_variations(env: ScienceWorldEnv) -> None:
    _start(env, LIVING)
    world = env._held[0]
    assert {name: world.variations(name) for name in VARIATIONS} == VARIATIONS


def test_the_simulator_prints_nothing_into_our_log(env: ScienceWorldEnv) -> None:
    _start(env, LIVING)
    for _ in range(20):
        env.act("look around")
    assert len(env._held[0].child.last_words(10_000)) < 300


def test_a_killed_simulator_is_an_error_the_next_reset_plays_and_close_ends_it(
    env: ScienceWorldEnv,
) -> None:
    first = _start(env, LIVING)
    os.kill(_pid(env), signal.SIGKILL)
    token = env._held[0]._token
    with pytest.raises(EnvError, match=r"Java process failed.*status -9") as caught:
        env.act("look around")
    assert len(token) > 20 and token not in str(caught.value)
    for call in (lambda: env.act("look around"), env.admissible):
        with pytest.raises(EnvError, match="reset the environment"):
            call()
    assert _start(env, LIVING) == first
    assert env.act("look around").valid

    process = _pid(env)
    env.close()
    env.close()
    assert gone(process)
    with pytest.raises(EnvError, match="reset the environment"):
        env.step("look around")


def test_hung_simulators_are_killed_at_the_deadline_and_forgotten_ones_end() -> None:
    env = ScienceWorldEnv()
    _start(env, LIVING)
    process = _pid(env)
    env._held[0]._gateway._socket.settimeout(0.5)  # type: ignore[union-attr]
    os.kill(process, signal.SIGSTOP)
    with pytest.raises(EnvError, match=r"no answer within 0\.5 s"):
        env.act("look around")
    assert gone(process)
    _start(env, LIVING)
    process = _pid(env)
    del env
    assert gone(process)


@pytest.mark.slow
def test_a_heap_that_is_too_small_is_an_error_that_says_so() -> None:
    env = ScienceWorldEnv()
    env._heap_mb = 8
    with pytest.raises(EnvError, match="Java process failed"):
        _start(env, LIVING)
        for _ in range(50):
            env.admissible()
    env.close()


HOLDER = textwrap.dedent(
    """
    import sys, time
    from agentdistill.envs.scienceworld.env import ID, ScienceWorldEnv
    from agentdistill.records import Task

    env = ScienceWorldEnv()
    payload = {"task": "boil", "variation": 0, "simplifications": "easy"}
    env.reset(options={"task": Task(ID, "train", payload)})
    print(env._held[0].child.process.pid, flush=True)
    time.sleep(600)
    """
)


@pytest.mark.parametrize(
    "death", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_no_simulator_outlives_python(death: signal.Signals) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert holder.stdout is not None
    process = int(holder.stdout.readline())
    holder.send_signal(death)
    holder.wait(30)
    holder.stdout.close()
    assert gone(process)


# -- against the package itself, and long ----------------------------------------------------------


ORIGINAL = textwrap.dedent(
    """
    import json, sys, warnings
    warnings.simplefilter("ignore")
    import scienceworld

    env = scienceworld.ScienceWorldEnv("", envStepLimit=1000)
    env.load("find-living-thing", 0, "easy", generateGoldPath=False)
    room, _ = env.reset()
    seen = [env.get_task_description() + "\\n\\n" + room]
    for action in json.load(sys.stdin):
        text, reward, done, info = env.step(action)
        seen.append([text.strip(), reward, done, info["score"]])
    print(json.dumps(seen))
    env.close()
    """
)


@pytest.mark.slow
def test_the_original_package_sees_the_same_along_a_gold_path(env: ScienceWorldEnv) -> None:
    """Observations (but for the order of things in a room), scores and ends."""
    taken = _gold(env, LIVING)
    theirs = subprocess.run(
        [sys.executable, "-c", ORIGINAL],
        input=json.dumps([action for action, _ in taken]),
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    first, *steps = json.loads(theirs.stdout.splitlines()[-1])
    assert sorted(_start(env, LIVING).split("\n")) == sorted(first.split("\n"))
    for (_, result), (text, reward, done, score) in zip(taken, steps, strict=True):
        assert sorted(result.observation.split("\n")) == sorted(text.split("\n"))
        assert result.reward == pytest.approx(reward / 100)
        assert (result.score, result.terminated) == (score / 100, done)


@pytest.mark.slow
def test_the_expert_solves_a_variation_of_every_task(env: ScienceWorldEnv) -> None:
    failed = []
    for task in islice(env.tasks("test", seed=1), 30):
        taken = _gold(env, task)
        if not taken or not taken[-1][1].success:
            failed.append(dict(task.payload))
    assert failed == []


@pytest.mark.slow
def test_the_checker_finds_nothing() -> None:
    report = check_env(ID, episodes=3)
    assert report.ok, str(report)
