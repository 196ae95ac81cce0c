"""The Sokoban environment: rules, expert, judge, gymnasium."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentdistill.envs.sokoban import SokobanEnv, parse, search, table
from agentdistill.envs.sokoban.engine import ACTIONS
from agentdistill.envs.sokoban.env import ID
from agentdistill.envs.sokoban.levels import read_boxoban
from agentdistill.records import Task

BOXOBAN = Path(__file__).parents[1] / "data" / "boxoban_sample.txt"
CORRIDOR = "#######\n#P_X_O#\n#######"
TWO = "#######\n#_____#\n#PXO__#\n#_XO__#\n#_____#\n#######"
OPEN = "#######\n#P____#\n#_____#\n#__X__#\n#_____#\n#____O#\n#######"


def task(level: str) -> Task:
    return Task(ID, "train", {"level": level})


def started(level: str, **kwargs: Any) -> SokobanEnv:
    env = SokobanEnv(**kwargs)
    assert env.reset(options={"task": task(level)})[0] == level
    return env


# -- rules ----------------------------------------------------------------------------------------


def test_a_solution_pays_as_in_gym_sokoban() -> None:
    env = started(CORRIDOR)
    results = env.replay(["Right", "right", " RIGHT\n"])
    assert [r.reward for r in results] == [-0.1, -0.1, 10.9]
    assert [r.observation.split("\n")[1] for r in results] == ["#_PX_O#", "#__PXO#", "#___P√#"]
    assert [(r.terminated, r.success, r.score) for r in results] == [
        (False, False, 0.0),
        (False, False, 0.0),
        (True, True, 1.0),
    ]
    assert all(r.valid and r.optimal for r in results)


def test_a_box_pushed_off_its_target_costs_one() -> None:
    env = started(TWO)
    on, off = env.replay(["Right", "Right"])
    assert (on.reward, on.score, on.observation.split("\n")[2]) == (0.9, 0.5, "#_P√__#")
    assert (off.reward, off.score, off.observation.split("\n")[2]) == (-1.1, 0.0, "#__SX_#")
    assert not on.terminated and not off.terminated


@pytest.mark.parametrize(
    ("level", "action"),
    [
        (CORRIDOR, "Up"),
        (CORRIDOR, "Left"),
        ("######\n#XP_O#\n######", "Left"),
        ("#######\n#PXX__#\n#_OO__#\n#######", "Right"),
    ],
)
def test_a_blocked_move_is_legal_and_pointless(level: str, action: str) -> None:
    env = started(level)
    result = env.act(action)
    assert result.observation == level
    assert (result.reward, result.valid, result.terminated) == (-0.1, True, False)
    assert result.optimal is not True
    assert action not in env.admissible()


@pytest.mark.parametrize("action", ["", "Jump", "Right Right", "push right", "Up\x00", "1"])
def test_an_unknown_action_is_invalid_and_costs_a_step(action: str) -> None:
    result = started(CORRIDOR).act(action)
    assert result.observation == CORRIDOR
    assert (result.reward, result.valid, result.optimal) == (-0.1, False, False)


def test_the_step_limit_truncates() -> None:
    env = SokobanEnv()
    assert (env.step_limit, env.card.step_limit) == (56, 56)
    assert SokobanEnv(height=10, width=10, boxes=4).step_limit == 200
    short = started(CORRIDOR, max_steps=3)
    assert short.card.step_limit == 3
    assert [r.truncated for r in short.replay(["Left"] * 5)] == [False, False, True]
    last = started(CORRIDOR, max_steps=3).replay(["Right"] * 3)[-1]
    assert last.terminated and not last.truncated


def test_the_facts_for_agents() -> None:
    env = started(CORRIDOR, render_mode="ansi")
    assert env.render() == CORRIDOR
    for symbol in "#_OX√PS":
        assert f"{symbol} " in env.instruction
    tool = json.loads(json.dumps(env.tools))[0]["function"]
    assert tool["parameters"]["properties"]["direction"]["enum"] == list(ACTIONS)
    assert env.card.licence == "Apache-2.0" and env.card.isolation == "inline"
    assert env.card.metrics == ("success", "score", "optimal")


def length_of(text: str) -> int:
    level = parse(text)
    return len(search(level.board, level.start).actions or ())


# -- expert and judge -----------------------------------------------------------------------------


def expert_run(env: SokobanEnv, level: Task) -> list[str]:
    env.reset(options={"task": level})
    taken: list[str] = []
    while (action := env.expert_action()) is not None:
        assert action in (env.optimal_actions() or ())
        result = env.act(action)
        taken.append(action)
        if result.terminated or result.truncated:
            assert result.success
            break
    return taken


@pytest.mark.parametrize("ties", ["first", "random"])
@pytest.mark.parametrize("boxes", [1, 2])
def test_the_expert_is_optimal_in_small_rooms(ties: str, boxes: int) -> None:
    env = SokobanEnv(boxes=boxes, walls=2, expert_ties=ties)
    for level in islice(env.tasks("train"), 15):
        taken = expert_run(env, level)
        assert len(taken) == length_of(level.payload["level"])
        assert taken == expert_run(env, level)


@pytest.mark.parametrize("ties", ["first", "random"])
def test_the_expert_is_optimal_in_large_rooms(ties: str) -> None:
    env = SokobanEnv(levels=BOXOBAN, expert_ties=ties)
    level = next(iter(env.tasks("train")))
    assert len(expert_run(env, level)) == length_of(level.payload["level"])


def test_ties_are_first_or_spread() -> None:
    counts: Counter[str] = Counter()
    env = SokobanEnv(expert_ties="random")
    for level in islice(env.tasks("train", seed=4), 300):
        env.reset(options={"task": level})
        best = env.optimal_actions() or frozenset()
        if best == {"Down", "Left"}:
            counts[str(env.expert_action())] += 1
    assert counts["Down"] > 5 and counts["Left"] > 5
    first = started(OPEN)
    assert first.optimal_actions() == {"Down", "Right"}
    assert first.expert_action() == "Down"


def test_a_weighted_expert_still_solves() -> None:
    env = SokobanEnv(levels=BOXOBAN, expert_weight=3.0)
    for level in env.tasks("train"):
        env.reset(options={"task": level})
        results = []
        while not results or not (results[-1].terminated or results[-1].truncated):
            action = env.expert_action()
            assert action is not None
            results.append(env.act(action))
        assert results[-1].success
        assert len(results) >= length_of(level.payload["level"])


def test_the_expert_plans_anew_when_the_agent_leaves_the_plan() -> None:
    env = SokobanEnv(levels=BOXOBAN)
    level = task(read_boxoban(BOXOBAN)[0])
    env.reset(options={"task": level})
    assert env.expert_action() == "Down"
    results = env.replay(["Down", "Up"])
    while (action := env.expert_action()) is not None:
        results.append(env.act(action))
    assert results[-1].success
    assert len(results) == length_of(level.payload["level"]) + 2


WIDE = "\n".join(
    ["#" * 21, f"#{'_' * 19}#", f"#PX{'_' * 17}#", f"#{'_' * 19}#", f"#{'_' * 15}XO_O#", "#" * 21]
)


NARROW = "#######\n#_____#\n#PX___#\n#_____#\n#____O#\n#######"


@pytest.mark.parametrize("level", [NARROW, WIDE])
def test_a_dead_state_has_no_advice_and_no_verdict(level: str) -> None:
    """The box is pushed against the upper wall, where no target is."""
    env = started(level, judge=True)
    assert (table(parse(level).board) is None) is (level == WIDE)
    *_, last = env.replay(["Down", "Right", "Up"])
    assert last.optimal is False
    assert env.act("Left").optimal is None
    assert env.expert_action() is None and env.optimal_actions() is None


def test_verdicts_are_those_of_exact_distances() -> None:
    env = SokobanEnv(boxes=2)
    checked = 0
    for level in islice(env.tasks("train", seed=9), 6):
        env.reset(options={"task": level})
        env.action_space.seed(1)
        for _ in range(25):
            before = parse(env._observation)
            action = env.action_space.sample()
            result = env.act(action)
            here = search(before.board, before.start).bound
            after = parse(result.observation)
            there = search(after.board, after.start).bound
            if here == float("inf"):
                assert result.optimal is None
            else:
                assert result.optimal is (there == here - 1)
                checked += 1
            if result.terminated or result.truncated:
                break
    assert checked > 30


def test_judging_can_be_forced_and_forbidden() -> None:
    large = {"height": 9, "width": 9, "boxes": 3, "layout": "walk"}
    assert started(CORRIDOR).act("Right").optimal is True
    assert started(CORRIDOR, judge=False).act("Right").optimal is None
    level = next(SokobanEnv(**large).tasks("train"))
    for judge, verdicts in (("auto", {None}), (True, {True})):
        env = SokobanEnv(**large, judge=judge)
        env.reset(options={"task": level})
        assert {env.act(env.expert_action() or "").optimal for _ in range(4)} == verdicts


def test_a_search_that_gives_up_claims_nothing() -> None:
    env = SokobanEnv(levels=BOXOBAN, judge=True, node_limit=1)
    env.reset(seed=1)
    assert env.optimal_actions() is None and env.expert_action() is None
    assert env.act("Up").optimal is None


# -- gymnasium ------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(ACTIONS), max_size=12), st.lists(st.sampled_from(ACTIONS)))
@settings(max_examples=60)
def test_snapshots_return_to_the_same_future(before: list[str], after: list[str]) -> None:
    env, other = started(TWO), SokobanEnv()
    env.replay(before)
    saved, advice = env.snapshot(), env.expert_action()
    expected = env.replay(after)
    other.restore(saved)
    env.restore(saved)
    assert env.expert_action() == other.expert_action() == advice
    assert env.replay(after) == other.replay(after) == expected


def test_admissible_moves_are_those_that_change_something() -> None:
    env = started("#######\n#_____#\n#XP_O_#\n#_____#\n#######")
    assert env.admissible() == ["Up", "Down", "Right"]


def test_make_works_by_id_and_vectorised() -> None:
    import agentdistill.envs

    assert ID in agentdistill.envs.ENTRY_POINTS
    env = gymnasium.make("agentdistill.envs:agentdistill/Sokoban-v0", boxes=2)
    assert env.reset(seed=7)[0] == env.reset(seed=7)[0] != env.reset(seed=8)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vector = gymnasium.make_vec(ID, num_envs=2, vectorization_mode="sync")
    observations, infos = vector.reset(seed=3)
    assert len(observations) == 2 and all(text.count("\n") == 6 for text in observations)
    assert not infos["success"].any()
    observations, rewards, *_ = vector.step(("Up", "nonsense"))
    assert rewards.shape == (2,) and len(observations) == 2
    vector.close()


def test_importing_the_environments_loads_none() -> None:
    code = (
        "import sys, agentdistill.envs, gymnasium; "
        "bad = [m for m in sys.modules if 'sokoban' in m or m in ('torch', 'scipy')]; "
        "assert not bad, bad; "
        "env = gymnasium.make('agentdistill/Sokoban-v0'); env.reset(seed=1); "
        "assert not {'torch', 'scipy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
