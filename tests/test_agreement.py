"""Rules of a cascade, and when two answers are the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Hashable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentdistill import equivalence
from agentdistill.agreement import RULES, Decision, Rule, decide
from agentdistill.envs.appworld.env import AppWorldEnv
from agentdistill.errors import ConfigError
from tests.toy import Corridor

TEACHER = "teacher"
UNREADABLE = "?"


def decided(rule: Rule, said: Sequence[str], teacher: bool = True, seed: int = 0) -> Decision[str]:
    """``said`` are the student's samples, as many as the rule asks for."""

    async def draw(n: int) -> Sequence[str]:
        assert n == rule.draws
        return said[:n]

    async def ask() -> str:
        return TEACHER

    def same(one: str) -> Hashable | None:
        return None if one == UNREADABLE else one

    def sure(one: str) -> float:
        return -float(len(one))

    asked = ask if teacher else None
    return asyncio.run(decide(rule, draw, asked, same, confidence=sure, seed=seed))


def test_three_that_agree_ask_nobody() -> None:
    found = decided(Rule(), ["a", "a", "a"])
    assert (found.chosen, found.by_teacher, found.place) == ("a", False, 0)
    assert found.votes == (0, 0, 0) and found.share == 1 and found.others == ("a", "a")


def test_two_of_three_are_no_unanimity() -> None:
    found = decided(Rule(), ["a", "b", "a"])
    assert found.by_teacher and found.chosen == TEACHER and found.place is None
    assert found.votes == (0, 1, 0) and found.others == ("a", "b", "a")
    assert found.share == pytest.approx(2 / 3)
    assert not decided(Rule("majority"), ["b", "a", "a"]).by_teacher
    assert decided(Rule("majority"), ["b", "a", "a"]).place == 1


def test_one_sample_has_nothing_to_disagree_with() -> None:
    for name in ("unanimous", "majority"):
        assert not decided(Rule(name, 1), ["a"]).by_teacher
        assert not decided(Rule(name, 1), [UNREADABLE]).by_teacher
    assert not decided(Rule("threshold", 1, 1.0), ["a"]).by_teacher


def test_what_cannot_be_read_agrees_with_nothing() -> None:
    for said in (["a", "a", UNREADABLE], [UNREADABLE] * 3):
        assert decided(Rule(), said).by_teacher
    assert decided(Rule("majority"), [UNREADABLE] * 3).by_teacher
    assert decided(Rule("threshold", 3, 0.0), [UNREADABLE] * 3).by_teacher
    assert not decided(Rule("majority"), ["a", "a", UNREADABLE]).by_teacher
    alone = decided(Rule("never"), [UNREADABLE, "b", "c"])
    assert (alone.chosen, alone.place) == ("b", 1)


@pytest.mark.parametrize("least", [0.0, 0.5, 0.6, 0.75, 1.0])
def test_thresholds_are_shares_of_all_samples(least: float) -> None:
    for said in (["a"] * 4, ["a", "a", "a", "b"], ["a", "a", "b", "b"], ["a", UNREADABLE] * 2):
        found = decided(Rule("threshold", 4, least), said)
        assert found.by_teacher is (max(said.count("a"), said.count("b")) / 4 < least)


def test_confidence_looks_at_one_sample() -> None:
    rule = Rule("confidence", 3, -2.0)
    assert rule.draws == 1
    assert not decided(rule, ["ab"]).by_teacher and decided(rule, ["abc"]).by_teacher
    assert decided(rule, [UNREADABLE]).by_teacher
    assert decided(rule, ["abc"]).confidence == -3.0


def test_confidence_needs_log_probabilities() -> None:
    async def draw(n: int) -> list[str]:
        return ["a"] * n

    async def ask() -> str:
        return TEACHER

    with pytest.raises(ConfigError, match="log-probabilities"):
        asyncio.run(decide(Rule("confidence", 1, -1.0), draw, ask, str))


def test_chance_has_its_probability_and_its_seed() -> None:
    rule = Rule("random", 1, 0.3)
    first = [decided(rule, ["a"], seed=seed).by_teacher for seed in range(2000)]
    again = [decided(rule, ["a"], seed=seed).by_teacher for seed in range(2000)]
    assert first == again and 0.26 < sum(first) / 2000 < 0.34
    assert decided(rule, ["a"], seed=first.index(True)).drawn == ()  # nothing drawn in vain


def test_always_and_never() -> None:
    assert decided(Rule("always"), ["a"] * 3) == Decision(TEACHER, True)
    found = decided(Rule("never"), ["a", "b", "b"])
    assert (found.chosen, found.by_teacher) == ("b", False)


def test_without_a_teacher_most_samples_win() -> None:
    for name in ("unanimous", "majority", "never"):
        found = decided(Rule(name), ["a", "b", "b"], teacher=False)
        assert (found.chosen, found.by_teacher) == ("b", False)


@pytest.mark.parametrize(
    ("rule", "key"),
    [
        ({"name": "most"}, "rule"),
        ({"samples": 0}, "samples"),
        ({"name": "threshold"}, "threshold"),
        ({"name": "threshold", "threshold": 1.5}, "threshold"),
        ({"name": "confidence", "threshold": 0.1}, "threshold"),
        ({"name": "random", "threshold": float("nan")}, "threshold"),
        ({"name": "unanimous", "threshold": 0.5}, "threshold"),
    ],
)
def test_what_is_no_rule_is_refused(rule: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Rule(**rule)  # type: ignore[arg-type]
    assert caught.value.key == key


samples = st.lists(st.sampled_from(["a", "b", "c", UNREADABLE]), min_size=1, max_size=6)


@given(samples, st.floats(0, 1))
def test_for_all_samples(said: list[str], least: float) -> None:
    n = len(said)
    readable = [one for one in said if one != UNREADABLE]
    most = max((said.count(one) for one in readable), default=0)
    asks = {
        "unanimous": n > 1 and most < n,
        "majority": n > 1 and 2 * most <= n,
        "threshold": n > 1 and (not most or most < least * n),
        "never": False,
        "always": True,
    }
    for name, asked in asks.items():
        rule = Rule(name, n, least if name == "threshold" else None)
        found = decided(rule, said)
        assert found.by_teacher is asked, name
        alone = decided(rule, said, teacher=False)
        assert not alone.by_teacher and alone.place is not None
        assert said.count(alone.chosen) == most or not readable
        assert said.index(alone.chosen) == alone.place  # the first of its class
        assert len(alone.others) == n - 1
    assert set(asks) | {"confidence", "random"} == set(RULES)


# -- the same answer ------------------------------------------------------------------------------

CODE = "print(apis.api_docs.show_app_descriptions())"


@pytest.mark.parametrize(
    "other",
    [
        "print( apis.api_docs.show_app_descriptions( ) )",
        CODE + "  # what is there",
        "# first look\n\n" + CODE + "\n",
        "(print)(apis.api_docs.show_app_descriptions())",
    ],
)
def test_code_is_its_syntax_tree(other: str) -> None:
    assert equivalence.code(other) == equivalence.code(CODE)
    assert equivalence.text(other) != equivalence.text(CODE)


@pytest.mark.parametrize(
    "other",
    ["print(apis.api_docs.show_app_description())", CODE + "\npass", f"x = {CODE}", "a = 1", ""],
)
def test_other_code_is_other_code(other: str) -> None:
    assert equivalence.code(other) != equivalence.code(CODE)


@pytest.mark.parametrize("broken", ["print(", "x = = 1", "\0", "(" * 5000, "if x:\nprint(1)", "é("])
def test_what_is_no_code_is_its_text(broken: str) -> None:
    assert equivalence.code(broken) == broken


def test_code_may_be_doubtful_without_a_warning() -> None:
    assert equivalence.code("x = '\\d'") == equivalence.code("x = '\\\\d'")
    assert equivalence.code("1 is 1") != equivalence.code("1 == 1")


@given(st.text())
def test_no_text_breaks_them(text: str) -> None:
    assert equivalence.code(text) == equivalence.code(text)
    assert equivalence.text(text) == text


def called(arguments: object, name: str = "walk") -> dict[str, object]:
    return {"id": "1", "function": {"name": name, "arguments": arguments}}


def test_calls_are_names_and_arguments() -> None:
    one = equivalence.call(called('{"way": "right", "far": 2}'))
    assert one == equivalence.call({**called('{"far":2,"way":"right"}'), "id": "other"})
    assert one == equivalence.call(called({"way": "right", "far": 2}))
    assert one != equivalence.call(called('{"way": "left", "far": 2}'))
    assert one != equivalence.call(called('{"way": "right", "far": 2}', "run"))
    assert equivalence.call(called('{"way": "ri')) is None
    assert equivalence.call(called(json.dumps(["right"]))) is None


def test_an_environment_says_what_its_actions_mean() -> None:
    assert Corridor().meaning(" left") == " left"
    world = AppWorldEnv.__new__(AppWorldEnv)  # what code means needs no data
    fenced = f"```python\n{CODE} # look\n```"
    assert world.meaning(fenced) == world.meaning(CODE) != world.meaning(f"{CODE}\n{CODE}")
