"""The Sokoban environment: rules, levels, splits, generator, expert, judge."""

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

from agentdistill.envs.sokoban import Rooms, SokobanEnv, generate, parse, search, split_of, table
from agentdistill.envs.sokoban.engine import ACTIONS
from agentdistill.envs.sokoban.env import ID
from agentdistill.envs.sokoban.levels import SPLITS, boxoban_files, read_boxoban
from agentdistill.errors import ConfigError
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


# -- levels and splits ----------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.sampled_from(["room", "walk"]), st.integers(1, 3))
@settings(max_examples=40)
def test_texts_and_levels_are_inverses(seed: int, layout: str, boxes: int) -> None:
    for text in islice(generate(Rooms(7, 6, boxes, layout), "train", seed), 2):
        assert parse(text).text == text


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "at least 3 rows"),
        ("#####\n#PXO#\n####", "same length"),
        ("#####\n#P$O#\n#####", "unknown symbols"),
        ("#####\n#PXO_\n#####", "enclosed"),
        ("#####\n#_XO#\n#####", "one player"),
        ("#####\n#PX_#\n#####", "has 1 and 0"),
        ("#####\n#P__#\n#####", "has 0 and 0"),
        ("#####\n#PXO#\n#####\n", "same length"),
    ],
)
def test_a_broken_level_says_what_is_wrong(text: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        parse(text)
    with pytest.raises(ConfigError, match=fault):
        SokobanEnv().reset(options={"task": task(text)})


def test_a_task_without_a_level_is_refused() -> None:
    with pytest.raises(ConfigError, match="text of a level"):
        SokobanEnv().reset(options={"task": Task(ID, "train", {"seed": 3})})


PINNED = {
    "#####\n#PXO#\n#####": "tune",
    "#####\n#OXP#\n#####": "train",
    "#######\n#___O_#\n#_____#\n#_P_X_#\n#_____#\n#_____#\n#######": "report",
    "#######\n#_____#\n#___X_#\n#_____#\n#_S___#\n#_____#\n#######": "tune",
}


def test_splits_never_change() -> None:
    assert {text: split_of(text) for text in PINNED} == PINNED
    counts = Counter(split_of(str(number)) for number in range(20_000))
    assert abs(counts["report"] / 20_000 - 0.06) < 0.007
    assert abs(counts["tune"] / 20_000 - 0.06) < 0.007


def test_boxoban_files_are_read() -> None:
    texts = read_boxoban(BOXOBAN)
    assert len(texts) == 4
    assert texts[0].split("\n")[2:4] == ["####P#####", "##__X#####"]
    assert all((parse(t).board.height, parse(t).board.width) == (10, 10) for t in texts)


def test_ragged_files_are_enclosed(tmp_path: Path) -> None:
    file = tmp_path / "xsb.txt"
    file.write_text("Title: one\n\n  ####\n###  #\n#@$. #\n######  \n\n; 1\n#####\n#+$ #\n#####\n")
    assert read_boxoban(file) == ("######\n###__#\n#PXO_#\n######", "#####\n#SX_#\n#####")
    assert boxoban_files(tmp_path) == (file,)


@pytest.mark.parametrize("content", ["", "hello\n", "#####\n#@$ #\n#####\n"])
def test_a_file_without_good_levels_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "bad.txt"
    file.write_text(content)
    with pytest.raises(ConfigError, match="levels="):
        next(SokobanEnv(levels=file).tasks("train"))


def test_levels_from_files_are_split_by_content(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(BOXOBAN.read_text())
    env = SokobanEnv(levels=tmp_path)
    texts = set(read_boxoban(BOXOBAN))
    found = {split_of(text): 0 for text in texts}
    for split in found:
        tasks = list(env.tasks(split, seed=5))
        assert [t.key for t in tasks] == [t.key for t in env.tasks(split, seed=5)]
        assert len({t.key for t in tasks}) == len(tasks)
        assert {t.payload["level"] for t in tasks} == {t for t in texts if split_of(t) == split}
    assert env.step_limit == 200
    data = env.card.data
    (tmp_path / "b.txt").write_text("#####\n#@$.#\n#####\n")
    assert len(data) == 16 and SokobanEnv(levels=tmp_path).card.data != data


def test_levels_from_files_are_bounded_by_length() -> None:
    def lengths(**bounds: int) -> list[int]:
        env = SokobanEnv(levels=BOXOBAN, **bounds)
        texts = [t.payload["level"] for t in env.tasks("train")]
        return sorted(len(search(parse(t).board, parse(t).start).actions or ()) for t in texts)

    assert lengths() == [27, 29, 30, 34]
    assert lengths(min_moves=29, max_moves=30) == [29, 30]
    assert lengths(min_moves=30) == [30, 34]


# -- generator ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"boxes": 2, "walls": 3},
        {"layout": "walk", "height": 8, "width": 9, "boxes": 2},
        {"layout": "walk", "height": 9, "width": 9, "boxes": 3},
        {"height": 4, "width": 12, "boxes": 3},
    ],
)
def test_tasks_are_distinct_solvable_and_in_their_split(kwargs: dict[str, Any]) -> None:
    env, seen = SokobanEnv(**kwargs), set[str]()
    for split in SPLITS:
        tasks = list(islice(env.tasks(split, seed=1), 4))
        assert [t.key for t in tasks] == [t.key for t in islice(env.tasks(split, seed=1), 4)]
        assert [t.index for t in tasks] == list(range(4))
        for found in tasks:
            text = found.payload["level"]
            level = parse(text)
            assert found.split == split == split_of(text) and found.key not in seen
            seen.add(found.key)
            shape = env.reset(options={"task": found})[0].split("\n")
            assert (len(shape), len(shape[0])) == (kwargs.get("height", 7), kwargs.get("width", 7))
            assert text.count("X") == kwargs.get("boxes", 1) and "√" not in text
            assert search(level.board, level.start, weight=3.0).actions
    one, other = ([t.key for t in islice(env.tasks("train", seed=n), 4)] for n in (1, 2))
    assert one != other


def test_inner_walls_are_counted_and_the_floor_is_connected() -> None:
    for text in islice(generate(Rooms(7, 7, walls=6), "train", 3), 30):
        board = parse(text).board
        assert text.count("#") == 24 + 6
        floor, reached = board.floor, board.floor & -board.floor
        for _ in range(board.cells):
            spread = reached << 1 | reached >> 1 | reached << 7 | reached >> 7
            reached |= spread & floor
        assert reached == floor


def length_of(text: str) -> int:
    level = parse(text)
    return len(search(level.board, level.start).actions or ())


def test_small_rooms_draw_lengths_uniformly() -> None:
    rooms = Rooms(7, 7, min_moves=4, max_moves=9)
    counts = Counter(length_of(t) for t in islice(generate(rooms, "train", 0), 600))
    assert sorted(counts) == [4, 5, 6, 7, 8, 9]
    assert sum((n - 100) ** 2 / 100 for n in counts.values()) < 20.5  # chi², 5 d.f., p = 0.001


def test_large_rooms_keep_their_bounds() -> None:
    rooms = Rooms(9, 9, 3, "walk", min_moves=10, max_moves=20)
    lengths = [length_of(t) for t in islice(generate(rooms, "train", 0), 12)]
    assert len(lengths) == 12 and all(10 <= n <= 20 for n in lengths)
    assert len(set(lengths)) > 3
    least = [length_of(t) for t in islice(generate(Rooms(9, 9, 3, "walk", 0, 25), "train", 0), 4)]
    assert min(least) >= 25


def test_a_finite_supply_ends() -> None:
    """A corridor of 4 cells: player, box, target on 3 of them, in either direction."""
    every = [list(generate(Rooms(3, 6), split, 0)) for split in SPLITS]
    assert sum(map(len, every)) == len({text for texts in every for text in texts}) == 8


def test_a_split_without_levels_is_an_error() -> None:
    with pytest.raises(ConfigError, match="min_moves"):
        next(SokobanEnv(min_moves=50, max_moves=60).tasks("train"))
    with pytest.raises(ConfigError, match="train, tune, report"):
        SokobanEnv().tasks("test")


@pytest.mark.parametrize(
    ("key", "kwargs"),
    [
        ("height", {"height": 2}),
        ("height", {"height": "7"}),
        ("min_moves", {"min_moves": None}),
        ("width", {"width": 0}),
        ("boxes", {"boxes": 0}),
        ("boxes", {"height": 4, "width": 4, "boxes": 2}),
        ("layout", {"layout": "maze"}),
        ("walls", {"walls": -1}),
        ("walls", {"walls": 23}),
        ("walls", {"walls": 1, "layout": "walk"}),
        ("min_moves", {"min_moves": 0}),
        ("max_moves", {"min_moves": 5, "max_moves": 4}),
        ("levels", {"levels": "nowhere/at/all"}),
        ("boxes", {"levels": str(BOXOBAN), "boxes": 4}),
        ("judge", {"judge": "sometimes"}),
        ("expert_ties", {"expert_ties": "last"}),
        ("expert_weight", {"expert_weight": 0.5}),
        ("node_limit", {"node_limit": 0}),
        ("max_steps", {"max_steps": 0}),
    ],
)
def test_a_bad_setting_names_key_and_value(key: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        SokobanEnv(**kwargs)
    assert caught.value.key == key
    assert repr(caught.value.value) in str(caught.value)


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
