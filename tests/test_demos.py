"""Demonstrations: what is found, what must never be found, and a file that many read at once."""

from __future__ import annotations

import math
import os
import pickle
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentdistill.crash import VARIABLE
from agentdistill.demos import Demos, Match, SentenceEmbedder, Skipped, Step, block
from agentdistill.demos.index import Lexical, Texts, terms
from agentdistill.errors import ConfigError, MissingExtraError, StoreError
from agentdistill.records import Actor, Fault, StepResult, Task, Trajectory, Turn, Verdict

ROOT = Path(__file__).resolve().parents[1]
TEACHER = Actor("teacher")


def episode(
    task: int | str,
    seen: Sequence[str],
    *,
    goal: str = "",
    plan: str = "",
    sample: int = 0,
    done: Sequence[str] | None = None,
    **changes: Any,
) -> Trajectory:
    """A successful episode that saw ``seen`` and did ``done`` ("do <what it saw>")."""
    did = done or [f"do {text}" for text in seen]
    turns = tuple(
        Turn(index, text, TEACHER, text=action, reasoning=f"so {text}", actions=(action,))
        for index, (text, action) in enumerate(zip(seen, did, strict=True))
    )
    made = Trajectory(
        Task("tests/Rooms-v0", "train", {"task": task}),
        f"g{task}",
        sample,
        turns,
        (),
        "success",
        True,
        1.0,
        goal=goal,
        provenance={"plan": plan} if plan else {},
    )
    return replace(made, **changes)


KITCHEN = episode("k", ["a kitchen with a fridge", "a cold apple", "a sink"], goal="wash an apple")
STUDY = episode("s", ["a study with a desk", "a red pen", "a lamp"], goal="light a pen")


def observations(match: Match) -> list[str]:
    return [step.observation for step in match.steps]


# -- search ----------------------------------------------------------------------------------------


def test_a_match_by_hand(tmp_path: Path) -> None:
    demos = Demos.build([STUDY, KITCHEN], tmp_path)
    (match,) = demos.search(observation="the apple is cold", task=None, k=1, window=1)
    assert (match.trajectory, match.task, match.step) == (KITCHEN.id, KITCHEN.task.key, 1)
    assert (match.at, match.before, match.after) == (1, 0, 0)
    assert match.steps[1] == Step(1, "a cold apple", ("do a cold apple",), "so a cold apple")
    assert match.goal == "wash an apple"
    assert match.scores == {"observation": match.score}
    assert (len(demos), demos.episodes, demos.skipped) == (6, 2, Skipped())


def test_bm25_is_what_others_compute() -> None:
    """Scores of bm25s 0.3.16, method ``lucene`` with k1 1.5 and b 0.75, of the terms that it knows.

    Lucene's formula lacks the constant factor k1 + 1, which cancels in a share.
    """
    texts = ["a cat sat", "a dog sat on a mat", "birds fly", "a cat and a cat"]
    index = Lexical(Lexical.pack(texts))
    tokens = [terms(text) for text in texts]
    assert tokens[2] == ["birds", "fly", "\nbirds fly"]
    found = index.similarity("cat on mat")
    assert found is not None
    assert found / found.max() == pytest.approx(BM25S / BM25S.max(), rel=1e-5)


BM25S = np.array([0.30468007922172546, 0.8162527680397034, 0.0, 0.37215957045555115])


def test_bm25_by_its_formula() -> None:
    """Common terms and rare ones (words of one text in a hundred) against a plain loop."""
    generator = random.Random(3)
    words = [f"w{int(generator.paretovariate(0.6)) % 900}" for _ in range(2000)]
    texts = [" ".join(generator.sample(words, generator.randint(1, 12))) for _ in range(200)]
    tokens = [terms(text) for text in texts]
    mean = sum(map(len, tokens)) / len(tokens)

    def score(query: str, text: int | None) -> float:
        bag, total = (terms(query) if text is None else tokens[text]), 0.0
        for term in set(terms(query)):
            holding = sum(term in each for each in tokens)
            idf = math.log(1 + (len(tokens) - holding + 0.5) / (holding + 0.5))
            count = bag.count(term)
            total += idf * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * len(bag) / mean))
        return total

    index = Lexical(Lexical.pack(texts))
    for query in (texts[0], texts[50], " ".join(words[:15]) + " unknown"):
        by_hand = [score(query, number) / score(query, None) for number in range(len(texts))]
        assert index.similarity(query) == pytest.approx(by_hand, rel=1e-4, abs=1e-6)


def test_a_text_like_the_query_scores_one() -> None:
    texts = [f"room {n} with a box and a key {n % 7}" for n in range(40)]
    index = Lexical(Lexical.pack(texts))
    for n in (0, 13, 39):
        found = index.similarity(texts[n])
        assert found is not None
        assert found[n] == pytest.approx(1, abs=1e-5)
        assert np.flatnonzero(found >= found[n] - 1e-6).tolist() == [n]
    assert index.similarity(" \n ") is None
    assert not index.similarity("nothing shared whatsoever").any()  # type: ignore[union-attr]


def test_maps_of_symbols_are_known_by_their_rows(tmp_path: Path) -> None:
    maps = ["#####\n#@$.#\n#####", "#####\n#.$@#\n#####", "#####\n#_@_#\n#_$.#\n#####"]
    demos = Demos.build([episode(n, [text]) for n, text in enumerate(maps)], tmp_path)
    for text in maps:
        (match,) = demos.search(observation=text, task=None, k=1)
        assert observations(match) == [text]


def test_keys_are_averaged_by_weight(tmp_path: Path) -> None:
    both = [
        episode(0, ["a lamp"], goal="heat the egg", plan="find egg, then stove"),
        episode(1, ["an egg"], goal="read the book", plan="find a lamp"),
    ]
    demos = Demos.build(both, tmp_path)
    query = {"goal": "heat the egg", "plan": "find egg, then stove", "observation": "an egg"}
    alone = {
        key: {m.task: m.score for m in demos.search(**{key: text}, task=None)}  # type: ignore[arg-type]
        for key, text in query.items()
    }
    weights = {"goal": 3.0, "plan": 1.0, "observation": 0.5}
    for some in (weights, dict.fromkeys(weights, 1.0), {"goal": 1.0, "observation": 2.0}):
        for match in demos.search(**query, task=None, weights=some):
            by_hand = sum(w * alone[key].get(match.task, 0) for key, w in some.items())
            assert match.score == pytest.approx(by_hand / sum(some.values()), rel=1e-5)
            shown = sum(some[key] * share for key, share in match.scores.items())
            assert match.score == pytest.approx(shown / sum(some.values()), rel=1e-5)
            assert set(match.scores) == set(some)
    first = demos.search(**query, task=None)[0]
    assert first.task == both[0].task.key
    only = demos.search(**query, task=None, weights={"observation": 1.0})[0]
    assert only.task == both[1].task.key


def test_a_key_that_nothing_has_is_not_counted(tmp_path: Path) -> None:
    demos = Demos.build([KITCHEN, STUDY], tmp_path)  # no plans
    with_plan = demos.search(observation="a sink", plan="wash it", task=None)
    assert with_plan == demos.search(observation="a sink", task=None)
    assert demos.search(plan="wash it", task=None) == []


def test_nothing_from_nothing(tmp_path: Path) -> None:
    empty = Demos.build([], tmp_path)
    assert (len(empty), empty.episodes) == (0, 0)
    found = empty.search(goal="wash", observation="a sink", plan="go", task=KITCHEN.task)
    assert found == [] and block(found) == ""
    full = Demos.build([KITCHEN], tmp_path)
    assert full.search(observation="zebra", task=None) == []
    assert full.search(task=None) == []
    assert full.search(observation="a sink", task=None, k=0) == []


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"k": -1}, "k"),
        ({"window": -1}, "window"),
        ({"per_trajectory": 0}, "per_trajectory"),
        ({"weights": {"goals": 1.0}}, "weights.goals"),
        ({"weights": {"goal": -1.0}}, "weights.goal"),
        ({"weights": {"goal": float("nan")}}, "weights.goal"),
    ],
)
def test_wrong_numbers_are_refused(tmp_path: Path, wrong: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Demos.build([KITCHEN], tmp_path).search(goal="wash", task=None, **wrong)
    assert caught.value.key == key


def test_windows_that_say_the_same_are_one(tmp_path: Path) -> None:
    up, down = (episode(end, ["a hall", "a stair", f"the {end}"]) for end in ("attic", "cellar"))
    demos = Demos.build([up, down], tmp_path)
    for window, number in ((0, 1), (1, 1), (2, 2)):
        assert len(demos.search(observation="hall", task=None, k=9, window=window)) == number
    # The place of a window that says the same goes to the next best of its episode.
    first, second = demos.search(observation="a hall", task=None, window=0)
    assert (observations(first), observations(second)) == (["a hall"], ["a stair"])
    assert first.trajectory != second.trajectory
    goals = Demos.build([replace(up, goal="go up"), replace(up, goal="go far up")], tmp_path)
    assert len(goals.search(observation="hall", task=None, window=0)) == 2


def test_windows_of_one_episode(tmp_path: Path) -> None:
    demos = Demos.build([episode(0, [f"a box {n}" for n in range(9)])], tmp_path)

    def steps(**numbers: int) -> list[int]:
        return sorted(m.step for m in demos.search(observation="box", task=None, k=99, **numbers))

    assert steps(window=0) == [0]  # all alike: the first
    assert steps(window=0, per_trajectory=3) == [0, 1, 2]
    assert steps(window=0, per_trajectory=99) == list(range(9))
    assert steps(window=1, per_trajectory=99) == [0, 3, 6]
    assert steps(window=2, per_trajectory=99) == [0, 5]


# -- what is kept ----------------------------------------------------------------------------------


def test_only_what_worked_is_kept(tmp_path: Path) -> None:
    seen = ["a hall", "a wall", "a door", "a key", "a lock"]
    whole = episode(0, seen)
    ok = StepResult("then", 0.0)
    turns = list(whole.turns)
    turns[1] = replace(turns[1], verdict=Verdict.INADMISSIBLE)
    turns[2] = replace(turns[2], actions=(), verdict=Verdict.MISSING)
    turns[3] = replace(turns[3], actions=("take", "drop", "sing"), results=(ok, ok))
    kept = replace(whole, turns=tuple(turns))
    others = [
        replace(KITCHEN, success=False, end="failure"),
        replace(KITCHEN, faults=(Fault("env", "broke", 1),)),
        replace(KITCHEN, turns=()),
        STUDY,
    ]
    demos = Demos.build([kept, *others], tmp_path, exclude={STUDY.task.key})
    assert demos.skipped == Skipped(failed=1, faulty=1, excluded=1, empty=1)
    (match,) = demos.search(observation="a key", task=None, window=9)
    assert [(step.index, step.actions) for step in match.steps] == [
        (0, ("do a hall",)),
        (3, ("take", "drop")),
        (4, ("do a lock",)),
    ]


def test_the_plan_is_chosen_by_whoever_builds(tmp_path: Path) -> None:
    demos = Demos.build([KITCHEN], tmp_path, plan=lambda one: one.turns[0].reasoning)
    (match,) = demos.search(plan="so a fridge", task=None)
    assert match.plan == "so a kitchen with a fridge"


# -- properties ------------------------------------------------------------------------------------

WORDS = st.sampled_from(["red", "blue", "key", "box", "door", "#@#", "Küche", "\ud800"])
TEXT = st.lists(WORDS, min_size=1, max_size=3).map(" ".join)
EPISODES = st.lists(
    st.builds(
        episode,
        st.integers(0, 3),
        st.lists(TEXT, min_size=1, max_size=6),
        goal=TEXT | st.just(""),
        plan=TEXT | st.just(""),
        sample=st.integers(0, 5),
    ),
    min_size=2,
    max_size=8,
)
QUERIES = st.fixed_dictionaries({"goal": TEXT | st.just(""), "observation": TEXT, "plan": TEXT})
NUMBERS = st.fixed_dictionaries(
    {"k": st.integers(1, 20), "window": st.integers(0, 3), "per_trajectory": st.integers(1, 3)}
)


def content(trajectory: Trajectory) -> Any:
    steps = tuple((turn.observation, turn.actions) for turn in trajectory.turns)
    return trajectory.goal, trajectory.provenance.get("plan", ""), steps


@settings(max_examples=60)
@given(EPISODES, QUERIES, NUMBERS, st.integers(0, 3))
def test_what_always_holds(
    tmp_path_factory: pytest.TempPathFactory,
    episodes: list[Trajectory],
    query: dict[str, str],
    numbers: dict[str, int],
    mine: int,
) -> None:
    demos = Demos.build(episodes, tmp_path_factory.mktemp("demos"))
    own = Task("tests/Rooms-v0", "report", {"task": mine})
    found = demos.search(**query, task=own, **numbers)  # type: ignore[arg-type]
    by_id = {one.id: one for one in episodes}
    forbidden = {content(one) for one in episodes if one.task.key == own.key}
    w = numbers["window"]
    assert len(found) <= numbers["k"]
    for match in found:
        source = next(o for o in episodes if o.id == match.trajectory and _shows(o, match))
        assert match.task != own.key and content(source) not in forbidden
        # Clipped at the ends of its episode, and only there.
        place, length = match.step, len(source.turns)
        indices = [step.index for step in match.steps]
        assert indices == list(range(max(0, place - w), min(length, place + w + 1)))
        assert match.steps[match.at].index == place
        assert (match.before, match.after) == (indices[0], length - 1 - indices[-1])
        assert match.score > 0
    texts = [(match.goal, observations(match)) for match in found]
    assert all(text not in texts[:n] for n, text in enumerate(texts))
    for name in by_id:
        steps = [m.step for m in found if m.trajectory == name]
        if len([one for one in episodes if one.id == name]) == 1:
            assert len(steps) <= numbers["per_trajectory"]
            assert all(abs(a - b) > 2 * w for n, a in enumerate(steps) for b in steps[:n])
    assert [m.score for m in found] == sorted((m.score for m in found), reverse=True)


def _shows(source: Trajectory, match: Match) -> bool:
    mine = {turn.index: (turn.observation, turn.actions) for turn in source.turns}
    shown = all(mine.get(s.index) == (s.observation, s.actions) for s in match.steps)
    length = match.before + len(match.steps) + match.after
    return shown and source.goal == match.goal and length == len(source.turns)


SHORT = st.lists(st.sampled_from(["key", "red key"]), min_size=1, max_size=4)
ALIKE = st.lists(
    st.builds(
        lambda task, seen, done, goal: episode(task, seen, done=done[: len(seen)], goal=goal),
        st.integers(0, 9),
        SHORT,
        st.sampled_from([["go"] * 4, ["go", "take", "go", "go"]]),
        st.sampled_from(["find", "find key"]),
    ),
    min_size=2,
    max_size=8,
)


@settings(max_examples=150)
@given(ALIKE, st.integers(0, 2), st.integers(1, 3))
def test_the_choice_is_that_of_a_plain_loop(
    tmp_path_factory: pytest.TempPathFactory, episodes: list[Trajectory], window: int, most: int
) -> None:
    """Episodes with much in common; going through all steps by score, one after the other."""
    demos = Demos.build(episodes, tmp_path_factory.mktemp("demos"))
    query = {"goal": "key", "observation": "key"}
    numbers = {"k": 99, "window": window, "per_trajectory": most}
    found = demos.search(**query, task=None, **numbers)  # type: ignore[arg-type]
    parts = demos._similarities(query, dict.fromkeys(query, 1.0))
    scores = demos._scores(parts, dict.fromkeys(query, 1.0), None)
    chosen: list[Match] = []
    steps: dict[int, list[int]] = {}
    for step in np.argsort(-scores, kind="stable").tolist():
        match = demos._match(step, window, float(scores[step]), parts)
        mine = steps.setdefault(int(demos._episode[step]), [])
        told = [(each.goal, _seen_and_done(each)) for each in chosen]
        near = any(abs(step - other) <= 2 * window for other in mine)
        if len(mine) < most and not near and (match.goal, _seen_and_done(match)) not in told:
            mine.append(step)
            chosen.append(match)
    assert found == [match for match in chosen if match.score > 0]


def _seen_and_done(match: Match) -> list[tuple[str, tuple[str, ...]]]:
    return [(step.observation, step.actions) for step in match.steps]


@settings(max_examples=30)
@given(EPISODES, QUERIES, st.randoms(use_true_random=False))
def test_the_order_of_building_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    episodes: list[Trajectory],
    query: dict[str, str],
    generator: random.Random,
) -> None:
    folder = tmp_path_factory.mktemp("demos")
    first = Demos.build(episodes, folder)
    data, found = (folder / "demos.bin").read_bytes(), first.search(**query, task=None)
    shuffled = [*episodes, *episodes]  # twice the same is once
    generator.shuffle(shuffled)
    again = Demos.build(shuffled, folder)
    assert (folder / "demos.bin").read_bytes() == data
    assert again.version == first.version
    assert again.search(**query, task=None) == found == first.search(**query, task=None)


@settings(max_examples=40)
@given(EPISODES, QUERIES, st.integers(1, 6))
def test_the_best_come_first(
    tmp_path_factory: pytest.TempPathFactory,
    episodes: list[Trajectory],
    query: dict[str, str],
    k: int,
) -> None:
    """The first k of all are the k best; the highest score of all is the first one's."""
    demos = Demos.build(episodes, tmp_path_factory.mktemp("demos"))
    everything = demos.search(**query, task=None, k=10_000, window=1)
    assert demos.search(**query, task=None, k=k, window=1) == everything[:k]


# -- leaks -----------------------------------------------------------------------------------------


def test_a_task_never_finds_its_own(tmp_path: Path) -> None:
    mine = [episode(7, ["a lone tower"], sample=n, done=[f"climb {n}"]) for n in range(3)]
    edited = replace(mine[0], derived_from=mine[0].id)
    demos = Demos.build([*mine, edited, episode(8, ["a lone tower and a moat"])], tmp_path)
    for task in (mine[0].task, mine[0].task.key):
        (match,) = demos.search(observation="a lone tower", task=task)
        assert observations(match) == ["a lone tower and a moat"]
    assert len(demos.search(observation="a lone tower", task=None)) == 4


def test_an_equal_episode_of_another_task_is_its_own_as_well(tmp_path: Path) -> None:
    twins = [episode(n, ["a lone tower"]) for n in (1, 2)]
    versions = {Demos.build(order, tmp_path).version for order in (twins, twins[::-1])}
    assert len(versions) == 1
    demos = Demos.build([*twins, episode(3, ["a tower"])], tmp_path)
    assert demos.skipped == Skipped(repeated=1)
    for twin in twins:
        (match,) = demos.search(observation="a lone tower", task=twin.task)
        assert observations(match) == ["a tower"]


def test_held_out_tasks_are_never_found(tmp_path: Path) -> None:
    Demos.build([KITCHEN, STUDY], tmp_path)
    demos = Demos.open(tmp_path, exclude=[KITCHEN.task.key])
    assert demos.search(goal="wash an apple", observation="a sink", task=None)[0].task == (
        STUDY.task.key
    )
    other = Demos.open(tmp_path, exclude=[KITCHEN.task.key, STUDY.task.key])
    assert other.search(observation="a sink", task=None) == []


def test_an_imported_task_is_known_by_the_name_that_the_log_gave_it(tmp_path: Path) -> None:
    real = Task("tests/Rooms-v0", "report", {"level": 5})
    imported = replace(KITCHEN, provenance={"task_id": real.key})
    demos = Demos.build([imported], tmp_path)
    assert demos.search(observation="a sink", task=real) == []
    assert demos.search(observation="a sink", task=KITCHEN.task) == []
    assert demos.search(observation="a sink", task=STUDY.task)[0].task == real.key


# -- windows as text -------------------------------------------------------------------------------


def test_a_block_by_hand(tmp_path: Path) -> None:
    long = episode(
        "l",
        ["one", "two", "three"],
        goal="count",
        plan="go on",
        done=["say 1", "x = 2\nsay(x)", "c"],
    )
    demos = Demos.build([long, KITCHEN], tmp_path)
    found = demos.search(observation="one", task=None, window=1)
    assert block(found) == (
        "Demonstration 1\nTask: count\nPlan: go on\n"
        "Seen:\none\nThought: so one\nDone: say 1\n"
        "Seen:\ntwo\nThought: so two\nDone:\nx = 2\nsay(x)\n…"
    )
    assert "Thought" not in block(found, reasoning=False)
    assert "Plan" not in block(found, plan=False)
    first = demos.search(observation="a sink", task=None, window=0, k=1)
    assert block(first, grammar="action") == (
        "Demonstration 1\nTask: wash an apple\n…\nSeen:\na sink\nAnswered:\n"
        "<think>so a sink</think><action>do a sink</action>"
    )
    with pytest.raises(ConfigError):
        block(first, grammar="poem")


def test_a_goal_that_is_seen_is_not_said_twice(tmp_path: Path) -> None:
    demos = Demos.build([episode(0, ["A kitchen. Task: wash"], goal="Task: wash")], tmp_path)
    (match,) = demos.search(observation="kitchen", task=None)
    assert match.text().startswith("Seen:\nA kitchen. Task: wash\n")


# -- on the disk -----------------------------------------------------------------------------------


def test_a_new_build_leaves_readers_alone(tmp_path: Path) -> None:
    old = Demos.build([KITCHEN], tmp_path)
    new = Demos.build([STUDY], tmp_path)
    assert old.search(observation="a sink", task=None)[0].goal == "wash an apple"
    assert new.search(observation="a lamp", task=None)[0].goal == "light a pen"
    assert old.version != new.version == Demos.open(tmp_path, verify=True).version
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demos.bin", "lock"]


def test_another_process_maps_the_file_itself(tmp_path: Path) -> None:
    rooms = [episode(n, [f"room {n}", "a very long hall " * 200]) for n in range(50)]
    Demos.build(rooms, tmp_path)
    demos = Demos.open(tmp_path, exclude=[rooms[3].task.key])
    data = pickle.dumps(demos)
    assert len(data) < 1000
    again = pickle.loads(data)
    found = again.search(observation="room 3", task=None)
    assert found == demos.search(observation="room 3", task=None)
    assert rooms[3].task.key not in {match.task for match in found}


READER = """
import sys
from agentdistill.demos import Demos
for _ in range(40):
    demos = Demos.open(sys.argv[1], verify=True)
    (match,) = demos.search(observation="a room", task=None, k=1)
    steps = {step.observation.split()[2] for step in match.steps}
    assert len(steps) == 1 and len(demos) == 3 * int(steps.pop()), match
print("fine")
"""


def rooms(number: int) -> list[Trajectory]:
    """As many episodes as their name says, so that a mixture of two builds is seen."""
    return [episode(n, [f"a room {number} {n} {i}" for i in range(3)]) for n in range(number)]


def test_many_read_while_one_builds(tmp_path: Path) -> None:
    Demos.build(rooms(1), tmp_path)
    command = [sys.executable, "-c", READER, str(tmp_path)]
    readers = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    built = 0
    while any(reader.poll() is None for reader in readers):
        built += 1
        Demos.build(rooms(1 + built % 5), tmp_path)
        time.sleep(0.02)
    assert [reader.communicate()[0] for reader in readers] == ["fine\n"] * 3
    assert built > 3


@pytest.mark.parametrize("point", ["before-write", "before-rename", "after-rename"])
def test_a_build_that_is_killed_leaves_the_old_or_the_new(tmp_path: Path, point: str) -> None:
    old = Demos.build(rooms(2), tmp_path).version
    code = (
        "import sys; from pathlib import Path; from agentdistill.demos import Demos; "
        "from tests.test_demos import rooms; Demos.build(rooms(3), Path(sys.argv[1]))"
    )
    environ = {**os.environ, VARIABLE: f"file:{point}:1"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environ)
    assert done.returncode == -signal.SIGKILL
    now = Demos.open(tmp_path, verify=True)
    assert (now.version == old) == (point != "after-rename")
    assert len(now) == (9 if point == "after-rename" else 6)
    assert len(Demos.build(rooms(4), tmp_path)) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demos.bin", "lock"]


def test_damage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="check the path"):
        Demos.open(tmp_path)
    file = tmp_path / "demos.bin"
    Demos.build([KITCHEN, STUDY], tmp_path)
    data = file.read_bytes()
    for torn in (b"", data[:20], data[:100], data[: len(data) // 2], data[:-1]):
        file.write_bytes(torn)
        with pytest.raises(StoreError, match="build"):
            Demos.open(tmp_path)
    changed = bytearray(data)
    changed[-64] ^= 1
    file.write_bytes(changed)
    with pytest.raises(StoreError, match="not what was written"):
        Demos.open(tmp_path, verify=True)


def test_texts_of_any_kind_come_back(tmp_path: Path) -> None:
    texts = ["", "Küche 厨房", "\ud800", "line\nline", "\0"]
    table = Texts(Texts.pack(texts))
    assert [table[n] for n in range(len(texts))] == texts


# -- embeddings ------------------------------------------------------------------------------------


class Letters:
    """A stand-in for a model: the letters of a text as a vector."""

    name = "letters"

    def __call__(self, texts: Sequence[str]) -> Any:
        vectors = np.zeros((len(texts), 26), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for letter in text.lower():
                if "a" <= letter <= "z":
                    row[ord(letter) - 97] += 1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def test_embeddings_take_the_place_of_words(tmp_path: Path) -> None:
    demos = Demos.build([KITCHEN, STUDY], tmp_path, embedder=Letters())
    (match,) = demos.search(observation="knis a", task=None, k=1)  # the letters of "a sink"
    assert match.steps[match.at].observation == "a sink"
    assert match.score == pytest.approx(1, abs=1e-5)
    assert demos.search(observation="knis a", task=KITCHEN.task, k=1)[0].task == STUDY.task.key
    again = Demos.open(tmp_path, embedder=Letters())
    assert again.search(observation="knis a", task=None, k=1) == [match]
    with pytest.raises(ConfigError, match="letters"):
        Demos.open(tmp_path)
    Demos.build([KITCHEN], tmp_path)
    with pytest.raises(ConfigError, match="without"):
        Demos.open(tmp_path, embedder=Letters())


def test_sentence_transformers_are_loaded_when_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    class Model:
        def __init__(self, name: str) -> None:
            loaded.append(name)

        def encode(self, texts: list[str], **options: bool) -> Any:
            assert options == {"normalize_embeddings": True, "show_progress_bar": False}
            return Letters()(texts)

    monkeypatch.setitem(
        sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Model)
    )
    Demos.build([KITCHEN, STUDY], tmp_path, embedder=SentenceEmbedder("small"))
    demos = Demos.open(tmp_path)
    assert loaded == ["small"]  # once, for the build
    assert demos.search(observation="a sink", task=None, k=1)[0].goal == "wash an apple"
    assert loaded == ["small", "small"]
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match="embeddings"):
        Demos.open(tmp_path).search(observation="a sink", task=None)


# -- speed -----------------------------------------------------------------------------------------


def different(generator: random.Random) -> tuple[list[Trajectory], list[dict[str, str]]]:
    """4000 episodes of 25 observations of 66 words, all different."""
    things = [f"{a}{b}" for a in ("bread", "soap", "book", "desk") for b in range(25)]

    def text(size: int) -> str:
        return " ".join(
            f"a {generator.choice(things)} {generator.randint(1, 30)}," for _ in range(size)
        )

    made = [
        episode(n, [text(22) for _ in range(25)], goal=f"put {text(2)}", plan=text(8))
        for n in range(4000)
    ]
    asked = [
        {"goal": f"put {text(2)}", "observation": text(22), "plan": text(8)} for _ in range(30)
    ]
    return made, asked


def alike(generator: random.Random) -> tuple[list[Trajectory], list[dict[str, str]]]:
    """4000 episodes through one of four mazes, the same but for their ends."""
    made = [
        episode(n, [*(f"maze {n % 4} place {i}" for i in range(24)), f"exit {n}"], goal="go out")
        for n in range(4000)
    ]
    places = [generator.randrange(24) for _ in range(30)]
    return made, [{"goal": "go out", "observation": f"maze 2 place {n}"} for n in places]


@pytest.mark.slow
@pytest.mark.parametrize("corpus", [different, alike])
def test_a_hundred_thousand_steps_are_searched_in_twenty_milliseconds(
    tmp_path: Path,
    corpus: Callable[[random.Random], tuple[list[Trajectory], list[dict[str, str]]]],
) -> None:
    """Median over 30 queries on one core, by words, all keys that there are, six windows each."""
    made, asked = corpus(random.Random(0))
    demos = Demos.build(made, tmp_path)
    assert len(demos) == 100_000
    times = []
    for query in asked:
        begin = time.perf_counter()
        found = demos.search(**query, task=made[0].task)  # type: ignore[arg-type]
        times.append(time.perf_counter() - begin)
        assert len(found) == 6
    assert statistics.median(times) < 0.020
