"""Demonstrations: what is found, how it is shown, and what must never be found."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentdistill.demos import Demos, Match, Skipped, Step, block
from agentdistill.demos.index import Lexical, terms
from agentdistill.errors import ConfigError
from agentdistill.records import Fault, StepResult, Task, Trajectory, Verdict
from tests.rooms import KITCHEN, STUDY, episode, observations

ROOT = Path(__file__).resolve().parents[1]


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
