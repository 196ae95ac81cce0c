"""Sokoban's levels: texts, splits, files, generator, and what is refused."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentdistill.envs.sokoban import Rooms, SokobanEnv, generate, parse, search, split_of
from agentdistill.envs.sokoban.env import ID
from agentdistill.envs.sokoban.levels import SPLITS, boxoban_files, read_boxoban
from agentdistill.errors import ConfigError
from agentdistill.records import Task

BOXOBAN = Path(__file__).parents[1] / "data" / "boxoban_sample.txt"


def task(level: str) -> Task:
    return Task(ID, "train", {"level": level})


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
