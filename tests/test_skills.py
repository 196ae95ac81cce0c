"""Skills: the bank's choices and its state, and what analysers make of an episode."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentdistill.engines.base import Capabilities, Engine, Message, Sample, Sampling
from agentdistill.envs.lockroom import LockroomEnv
from agentdistill.errors import ConfigError, EngineError
from agentdistill.policy import RandomPolicy
from agentdistill.records import Actor, Start, StepResult, Task, Trajectory, Turn
from agentdistill.rollout import Request, rollout, run
from agentdistill.skills import (
    Analysis,
    ChatAnalyser,
    Grounded,
    SkillBank,
    moves,
    question,
    read,
    teaches,
    ucb,
    wording,
)

# -- UCB and the bank -----------------------------------------------------------------------------


def test_ucb_is_the_published_vector() -> None:
    """V9 of the notes on the paper."""
    assert ucb([3, 1], [0.6, 0.5]) == pytest.approx([1.561351, 2.165109], abs=1e-6)
    assert ucb([3, 1], [0.6, 0.5], 0.0) == [0.6, 0.5]
    assert ucb([2, 0], [0.9, 0.0]) == [pytest.approx(0.9 + math.sqrt(math.log(2))), math.inf]
    assert ucb([], []) == []


def bank_of(*texts: str, task: str = "t", iteration: int = 0, **options: Any) -> SkillBank:
    bank = SkillBank(**options)
    for text in texts:
        bank.add(task, text, iteration)
    return bank


def chosen(bank: SkillBank, iteration: int, task: str = "t") -> str | None:
    skill = bank.select(task, iteration)
    return None if skill is None else skill.text


def test_a_skill_is_seen_from_the_next_iteration_on() -> None:
    bank = bank_of("old", iteration=3)
    assert [chosen(bank, n) for n in (2, 3, 4)] == [None, None, "old"]
    bank.add("t", "new", 4)
    assert chosen(bank, 4) == "old"
    assert chosen(bank, 5) == "new"
    assert chosen(bank, 5, task="another") is None


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abcd"), st.booleans()), max_size=40))
def test_nothing_is_ever_seen_too_early(events: list[tuple[int, str, bool]]) -> None:
    bank, written = SkillBank(), dict[str, int]()
    for iteration, text, adds in events:
        if adds:
            bank.add("t", text, iteration)
            written.setdefault(text, iteration)
        else:
            text_seen = chosen(bank, iteration)
            visible = [t for t, n in written.items() if n < iteration]
            assert text_seen in visible if visible else text_seen is None


def test_the_unseen_come_first_then_the_best_bound() -> None:
    bank = bank_of("a", "b")
    assert [chosen(bank, 1), chosen(bank, 1)] == ["a", "b"]
    for text, reward, times in (("a", 0.6, 3), ("b", 0.5, 1)):
        skill = next(s for s in bank.skills("t") if s.text == text)
        for _ in range(times):
            bank.reward("t", skill.id, [reward])
    assert chosen(bank, 1) == "a"  # counts 1 and 1: the better mean
    assert chosen(bank, 1) == "b"  # counts 2 and 1
    assert [s.selected for s in bank.skills("t")] == [2, 2]


def test_selection_is_that_of_the_published_vector() -> None:
    bank = SkillBank()
    first = {"id": "x", "text": "x", "iteration": 0, "selected": 3, "rated": 3, "mean": 0.6}
    second = {"id": "y", "text": "y", "iteration": 0, "selected": 1, "rated": 1, "mean": 0.5}
    bank.load_state_dict({"skills": {"t": [first, second]}})
    assert chosen(bank, 1) == "y"
    greedy = SkillBank(exploration=0.0)
    greedy.load_state_dict({"skills": {"t": [first, second]}})
    assert chosen(greedy, 1) == "x"


def test_ties_go_to_the_higher_score_then_to_the_older() -> None:
    bank = SkillBank()
    for text, score in (("poor", 0.2), ("good", 1.0), ("as good", 1.0)):
        bank.add("t", text, 0, score)
    assert [chosen(bank, 1) for _ in range(3)] == ["good", "as good", "poor"]


def test_equal_texts_are_one_skill() -> None:
    bank = bank_of("a")
    used = bank.select("t", 1)
    assert used is not None
    again = bank.add("t", "a", 5, score=0.5)
    assert (again.id, again.iteration, again.selected, again.score) == (used.id, 0, 1, 0.5)
    assert bank.add("t", "a", 6, score=0.1).score == 0.5
    assert len(bank) == 1
    bank.add("u", "a", 5)
    assert len(bank) == 2 and chosen(bank, 5, task="u") is None


def test_the_mean_is_over_iterations() -> None:
    bank = bank_of("a")
    skill = bank.skills("t")[0]
    for rewards in ([1.0, 0.0, 0.0, 0.0], [], [0.75, 0.75], [0.5]):
        bank.reward("t", skill.id, rewards)
    bank.reward("t", "unknown", [9.0])
    bank.reward("u", skill.id, [9.0])
    assert bank.skills("t")[0].mean == pytest.approx(0.5)
    assert bank.skills("t")[0].rated == 3 and len(bank) == 1


def test_the_one_worth_least_leaves_a_full_bank() -> None:
    bank = SkillBank(capacity=2)
    bank.add("t", "half", 0, 0.5)
    bank.add("t", "full", 0, 1.0)
    bank.reward("t", bank.skills("t")[1].id, [0.1])  # its reward says more than its origin
    bank.add("t", "more", 1, 0.6)
    assert [s.text for s in bank.skills("t")] == ["half", "more"]
    bank.add("u", "other", 1, 0.0)
    assert len(bank) == 3
    with pytest.raises(ConfigError, match="capacity=0"):
        SkillBank(capacity=0)


def test_the_state_survives_json_and_the_choices_after_it_are_the_same() -> None:
    bank = bank_of("a", "b", "c")
    for number in range(5):
        skill = bank.select("t", 1)
        assert skill is not None
        bank.reward("t", skill.id, [number / 5, 0.5])
    state = json.loads(json.dumps(bank.state_dict()))
    other = bank_of("gone", task="elsewhere")
    other.load_state_dict(state)
    assert other.state_dict() == bank.state_dict() and len(other) == 3
    assert [chosen(bank, 2) for _ in range(9)] == [chosen(other, 2) for _ in range(9)]


# -- analysers ------------------------------------------------------------------------------------

WAY = ("open jar", "pull red", "pull blue")
Told = tuple[str, str, float]


def episode(
    *steps: Told, end: str = "step_limit", start: Start | None = None, goal: str = ""
) -> Trajectory:
    """An episode that begins at "0"; each step is an action, what is seen after it, the score.

    A step that sees "!" is invalid and leaves what was seen.
    """
    turns, seen, score = [], "0", 0.0
    for number, (action, after, scored) in enumerate(steps):
        valid, last = after != "!", number == len(steps) - 1
        now = after if valid else seen
        ended = last and end in ("success", "failure")
        result = StepResult(
            now, scored - score, ended, success=ended and end == "success", score=scored
        )
        result = replace(result, valid=valid)
        turns.append(
            Turn(number, seen, Actor("a"), text=action, actions=(action,), results=(result,))
        )
        seen, score = now, scored
    task = Task("tests/None-v0", "train", {"n": 1})
    won = end == "success"
    return Trajectory(task, "g", 0, tuple(turns), (), end, won, score, start or Start(), goal=goal)


SUCCESS = episode(
    ("open chest", "0", 0.0),
    ("open jar", "key", 0.25),
    ("pull blue", "key", 0.25),
    ("pull red", "key red", 0.5),
    ("pull green", "key", 0.25),
    ("jump", "!", 0.25),
    ("pull red", "key red", 0.5),
    ("pull blue", "open", 1.0),
    end="success",
)
PARTIAL = episode(("open chest", "0", 0.0), ("open jar", "key", 0.25), ("pull blue", "key", 0.25))
FAILING = episode(("open chest", "0", 0.0), ("pull red", "0", 0.0), ("", "!", 0.0))
CUT = episode(("open jar", "key", 0.25), ("pull red", "key red", 0.5), end="horizon")


def grounded(trajectory: Trajectory, lines: int = 8) -> Analysis:
    return Grounded(lines).analyse(trajectory)


def test_the_workflow_is_the_shortest_that_reached_what_was_reached() -> None:
    assert grounded(SUCCESS).golden_workflow == "\n".join(WAY)
    assert grounded(PARTIAL).golden_workflow == "open jar"
    assert grounded(CUT).golden_workflow == "open jar\npull red"
    assert grounded(FAILING).golden_workflow == ""
    lost = episode(("open jar", "key", 0.25), ("pull red", "key red", 0.5), ("x", "key", 0.25))
    assert grounded(lost).golden_workflow == "open jar\npull red"


def test_a_workflow_needs_no_score_on_its_way() -> None:
    """Sparse rewards: every step that led on is kept, loops are not."""
    found = episode(
        ("go to desk", "desk", 0.0),
        ("go to bed", "bed", 0.0),
        ("go to desk", "desk", 0.0),
        ("take pen", "pen", 0.0),
        ("look", "pen", 0.0),
        ("put pen", "done", 1.0),
        end="success",
    )
    assert grounded(found).golden_workflow == "go to desk\ntake pen\nput pen"


def test_without_any_score_there_is_no_workflow() -> None:
    lost = episode(("go to desk", "desk", 0.0), ("go to bed", "bed", 0.0), ("look", "bed", 0.0))
    assert grounded(lost) == Analysis("", "3 steps were too many\nlook after go to bed: no change")


def test_an_invalid_action_leaves_the_state_whatever_is_shown() -> None:
    found = episode(("go to desk", "desk", 0.0), ("jump", "?", 0.0), ("take pen", "pen", 1.0))
    turns = list(found.turns)
    turns[1] = replace(turns[1], results=(replace(turns[1].results[0], valid=False),))
    assert [step.before[0] for step in moves(replace(found, turns=tuple(turns)))][2] == "desk"
    assert grounded(replace(found, turns=tuple(turns))).golden_workflow == "go to desk\ntake pen"


def test_what_helped_and_what_did_not() -> None:
    found = grounded(replace(SUCCESS, score=0.5), lines=100)
    assert found.success_analysis.splitlines() == [
        "open jar: 0% to 25%",
        "pull red: 25% to 50%",
        "pull blue: 50% to 100%",
    ]
    assert found.mistake_analysis.splitlines() == [
        "open chest at the start: no change",
        "pull blue after open jar: no change",
        "pull green after pull red: back from 50% to 25%",
        "jump after open jar: not possible",
    ]
    assert grounded(FAILING).mistake_analysis.splitlines() == [
        "3 steps were too many",
        "open chest at the start: no change",
        "pull red at the start: no change",
        "no action at the start: not possible",
    ]
    dead = episode(("open trap", "dark", 0.0), end="failure")
    assert "open trap at the start: the end without success" in grounded(dead).mistake_analysis


def test_the_share_of_the_text_follows_the_score() -> None:
    shares = []
    for score in (0.0, 0.25, 0.5, 0.75, 1.0):
        found = grounded(replace(SUCCESS, score=score), lines=4)
        helped, failed = (len(text.splitlines()) for text in found[:2])
        shares.append((helped, failed))
    assert shares == [(0, 4), (1, 3), (2, 2), (3, 1), (3, 0)]
    assert grounded(SUCCESS, lines=0)[:2] == ("", "")
    with pytest.raises(ConfigError, match="lines=-1"):
        Grounded(-1)


def test_the_text_has_a_part_for_all_that_there_is() -> None:
    assert wording(Analysis("a\n", " b", "c")) == (
        "What helped:\na\nWhat did not help:\nb\nDo this:\nc"
    )
    assert wording(Analysis(golden_workflow="c\nd")) == "Do this:\nc\nd"
    assert wording(Analysis(" ", "", "\n")) == ""


@pytest.mark.parametrize(
    "trajectory",
    [
        episode(),
        replace(SUCCESS, end="fault:environment"),
        replace(SUCCESS, start=Start(("open jar",), "expert")),
        replace(CUT, turns=tuple(replace(turn, results=()) for turn in CUT.turns)),
    ],
)
def test_some_episodes_teach_nothing(trajectory: Trajectory) -> None:
    assert not teaches(trajectory)
    assert run(Grounded().write(trajectory)) is None
    scripted = Scripted([])
    assert run(analyser(scripted).write(trajectory)) is None and not scripted.asked


def test_a_text_without_any_part_is_none() -> None:
    assert run(Grounded(lines=0).write(FAILING)) is None
    assert run(Grounded(lines=0).write(PARTIAL)) == "Do this:\nopen jar"


def test_long_actions_are_named_in_short_and_done_in_full() -> None:
    code = "for x in y:\n    " + "print(x)\n    " * 30
    found = grounded(replace(episode((code, "1", 0.5), (code, "1", 0.5)), score=0.5))
    assert found.golden_workflow == code.strip()
    assert all(len(line) < 200 for line in (found[0] + "\n" + found[1]).splitlines())
    assert len(found.success_analysis.splitlines()) == 1


class Oracleless(LockroomEnv):
    """A room whose expert may not be asked."""

    def expert_action(self) -> NoReturn:
        raise AssertionError("the expert was asked")

    def optimal_actions(self) -> NoReturn:
        raise AssertionError("the best actions were asked for")


def test_a_skill_is_one_text_per_episode_and_asks_no_oracle() -> None:
    tasks = list(LockroomEnv().tasks("train"))
    requests = [Request(task, seed=number) for number, task in enumerate(tasks)]
    played = run(rollout(RandomPolicy(), Oracleless, requests))
    answer = json.dumps(dict(zip(Analysis._fields, "abc", strict=True)))
    for trajectory in played:
        scripted = Scripted([answer])
        for write in (Grounded().write, analyser(scripted).write):
            text = run(write(trajectory))
            blind = run(write(without_verdicts(trajectory)))
            assert isinstance(text, str) and text == blind
        assert len(scripted.asked) == 2  # one question an episode, whatever its length
        assert question(trajectory) == question(without_verdicts(trajectory))


def without_verdicts(trajectory: Trajectory) -> Trajectory:
    """The same episode with the environment's judgements turned over."""
    turns = [
        replace(t, results=tuple(replace(r, optimal=not r.optimal) for r in t.results))
        for t in trajectory.turns
    ]
    return replace(trajectory, turns=tuple(turns))


def test_several_actions_of_one_response_are_several_moves() -> None:
    results = (StepResult("1", 0.0), StepResult("2", 0.5, score=0.5))
    turn = Turn(0, "0", Actor("a"), actions=("a", "b", "c"), results=results)
    assert [m.action for m in moves(replace(CUT, turns=(turn,)))] == ["a", "b"]


# -- asking a model -------------------------------------------------------------------------------


class Scripted(Engine):
    """Answers what it was given, in order; an error among the answers is raised."""

    name = "scripted"

    def __init__(self, answers: Sequence[str | Exception]) -> None:
        self.answers, self.asked, self.seeds = list(answers), [], []

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(text=True)

    async def generate(self, ids: Sequence[int], *_: Any, **options: Any) -> Sample:
        raise AssertionError("an analyser is asked by messages")

    async def chat(
        self, messages: Sequence[Message], sampling: Sampling, *, seed: int = 0, **options: Any
    ) -> list[Sample]:
        self.asked.append("\n".join(f"<|{one.role}|>{one.content}" for one in messages))
        self.seeds.append(seed)
        answer = self.answers[(len(self.asked) - 1) % len(self.answers)]
        if isinstance(answer, Exception):
            raise answer
        return [Sample((1,), (0.0,), answer, "stop")]


def analyser(engine: Scripted) -> ChatAnalyser:
    return ChatAnalyser(engine, "Open the door.")


GOOD = json.dumps(
    {"success_analysis": "keys", "mistake_analysis": ["x", "y"], "golden_workflow": ["a", "b"]}
)
TEXT = "What helped:\nkeys\nWhat did not help:\nx\ny\nDo this:\na\nb"


def test_the_question_tells_the_episode_and_its_share() -> None:
    engine = Scripted([GOOD])
    assert run(analyser(engine).write(replace(PARTIAL, goal="open the door"))) == TEXT
    (asked,) = engine.asked
    for part in (*Analysis._fields, "open the door", "Did: open jar (25%)", "step limit", "25%"):
        assert part in asked
    assert "Open the door." in asked  # the instruction
    long = question(episode(("look", "x" * 5000, 0.0), ("look", "!", 0.0)))
    assert "x" * 2000 + "…" in long and len(long) < 4000 and "(not possible)" in long


def test_garbage_is_asked_for_once_more_with_the_reason() -> None:
    engine = Scripted(["no idea", GOOD])
    writer = analyser(engine)
    assert run(writer.write(PARTIAL)) == TEXT
    assert "there is no JSON object" in engine.asked[1]
    assert engine.asked[1].startswith(engine.asked[0].partition("<|assistant|>")[0])
    assert engine.seeds[0] != engine.seeds[1]
    assert (writer.asked, writer.failed) == (2, 0)


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        (["nothing", '{"success_analysis": "a"}'], "it lacks mistake_analysis, golden_workflow"),
        ([EngineError("the line is dead")], "the line is dead"),
    ],
)
def test_what_stays_unreadable_is_counted(answers: list[Any], problem: str) -> None:
    engine = Scripted(answers)
    writer = analyser(engine)
    assert run(writer.write(PARTIAL)) is None
    assert (writer.asked, writer.failed, writer.problem) == (2, 1, problem)


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        f"Sure!\n```json\n{GOOD}\n```\nAnything else?",
        f'<think>maybe {{"a": 1}} or {{ or {GOOD.replace("keys", "wrong")}</think>\n{GOOD}',
        GOOD.replace("success_analysis", "Success Analysis"),
        GOOD[:-1] + ', "more": 3}',
        GOOD.replace('"keys"', '" keys\n"'),
    ],
)
def test_answers_are_read_leniently(answer: str) -> None:
    assert wording(read(answer)) == TEXT


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("", "no JSON object"),
        ("[1, 2]", "no JSON object"),
        (GOOD[:-1], "delimiter"),
        ('{"success_analysis": "", "mistake_analysis": null, "golden_workflow": []}', "empty"),
        (f'{{"success_analysis": {"[" * 10_000}', "recursion"),
        ('{"a": ' * 5_000, "expecting value"),
    ],
)
def test_what_cannot_be_read_says_why(answer: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"(?i){why}"):
        read(answer)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*Analysis._fields, "x"]), inner, max_size=4)
    ),
    max_leaves=10,
)


@given(st.text() | JSON.map(json.dumps) | st.tuples(st.text(), JSON).map(str) | st.just(GOOD[:30]))
def test_whatever_a_model_says_is_an_analysis_or_a_value_error(answer: str) -> None:
    try:
        found = read(answer)
    except ValueError as error:
        assert str(error)
    else:
        assert any(found) and all(isinstance(text, str) for text in found)


def test_importing_skills_needs_no_torch() -> None:
    code = (
        "import sys, agentdistill.skills; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
