"""What policies cost: by hand, with every kind of caching, and when demonstrations have paid."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentdistill.costs import KINDS, Prompt, break_even, calls, episodes, per_episode, tokens
from agentdistill.ledger import Price
from agentdistill.records import Actor, Alternative, Author, Task, Trajectory, Turn, Usage

DEAR = Price(10, 12, 1, 50)  # type: ignore[arg-type]
CHEAP = Price(1, 1, 0, 4)  # type: ignore[arg-type]
PRICES: dict[str, Price | None] = {"student": CHEAP, "teacher": DEAR}


def episode(*turns: Turn) -> Trajectory:
    task = Task("tests/Corridor-v0", "train", {})
    return Trajectory(task, "g", 0, turns, (), "success", True, 1.0)


def turn(index: int, actor: str, usage: Usage, *others: Alternative) -> Turn:
    return Turn(index, "", Actor(actor), usage=usage, alternatives=others)


def nothing(trajectory: Trajectory, number: int, informed: bool) -> Prompt:
    return ()


def test_the_papers_break_even() -> None:
    """500 demonstrations at $0.059, and $0.024 instead of $0.059 for every episode."""
    found = break_even(500 * 0.059, 0.059, 0.024)
    assert found == pytest.approx(842.857, abs=1e-3)
    assert episodes(found) == "843"


def test_a_dear_cascade_never_pays() -> None:
    for cost in (0.059, 0.06, 1.0):
        assert break_even(500 * 0.059, 0.059, cost) == math.inf
    assert episodes(math.inf) == "never" and episodes(1234.0) == "1,234"
    assert break_even(0.0, 0.059, 0.024) == 0


def test_a_teacher_that_reads_its_cache_is_harder_to_beat() -> None:
    assert break_even(29.5, 0.03, 0.024) > break_even(29.5, 0.059, 0.024)


def test_every_answer_is_somebodys() -> None:
    sample = Usage(input=100, cache_read=5, output=10)
    other = Alternative("x", (), sample, "student")
    own = Usage(input=200, cache_read=10, output=20)
    all_three = Usage(input=300, cache_read=15, output=30)
    found = episode(
        turn(0, "student", own, other),
        turn(1, "teacher", replace(all_three, input=1300, output=60), other, other, other),
        turn(2, "expert", all_three, other, other, other),
    )
    assert [(c.actor, c.usage, c.turn, c.again) for c in calls(found)] == [
        ("student", sample, 0, False),
        ("student", sample, 0, True),
        ("student", sample, 1, False),
        ("student", sample, 1, True),
        ("student", sample, 1, True),
        ("teacher", Usage(input=1000, output=30), 1, False),
        ("student", sample, 2, False),
        ("student", sample, 2, True),
        ("student", sample, 2, True),
    ]
    assert tokens([found, found])["student"] == {
        "calls": 16, "input": 1600, "cache_read": 80, "cache_write": 0, "output": 160,
    }  # fmt: skip
    assert tokens([found])["teacher"]["calls"] == 1 and "expert" not in tokens([found])
    replayed = replace(found.turns[0], author=Author.REPLAY)
    assert calls(episode(replayed)) == []


def test_three_prices_of_one_episode() -> None:
    """Two prompts of 1000 and 2000 tokens; the second begins with the first."""
    texts = (("a" * 500, "b" * 500), ("a" * 500, "b" * 500, "c" * 1000))
    first, second = Usage(input=900, cache_write=100, output=10), Usage(1500, 500, 0, 20)
    found = episode(turn(0, "teacher", first), turn(1, "teacher", second))
    cost = per_episode([found], PRICES, lambda t, number, informed: texts[number])
    assert cost is not None and set(cost) == set(KINDS)
    paid = 900 * 10 + 100 * 12 + 10 * 50 + 1500 * 10 + 500 * 1 + 20 * 50
    uncached = 3000 * 10 + 30 * 50
    cached = 1000 * 12 + 1000 * 1 + 1000 * 10 + 30 * 50
    wanted = {"paid": paid, "uncached": uncached, "cached": cached}
    assert cost == pytest.approx({kind: value / 1e6 for kind, value in wanted.items()})


def test_the_same_prompt_again_is_read() -> None:
    sample = Usage(input=1000, output=10)
    others = [Alternative("x", (), sample, "student")] * 2
    found = episode(turn(0, "student", Usage(input=3000, output=30), *others))
    cost = per_episode([found], PRICES, nothing)
    assert cost is not None
    assert cost["uncached"] == pytest.approx((3000 * 1 + 30 * 4) / 1e6)
    assert cost["cached"] == pytest.approx((1000 * 1 + 30 * 4) / 1e6)


def test_the_prompt_of_one_request_counts_once() -> None:
    first, rest = Usage(input=1000, output=10), Usage(output=10)
    others = [Alternative("x", (), usage, "student") for usage in (first, rest)]
    found = episode(turn(0, "student", Usage(input=1000, output=30), *others))
    cost = per_episode([found], PRICES, nothing)
    assert cost is not None
    assert cost["paid"] == cost["uncached"] == cost["cached"]
    assert [call.again for call in calls(found)] == [False, True, True]


def test_hints_that_change_are_no_common_beginning() -> None:
    def prompts(trajectory: Trajectory, number: int, informed: bool) -> Prompt:
        asked.append((number, informed))
        return ("s" * 100, f"{number}" * 100)

    asked: list[tuple[int, bool]] = []
    usage = Usage(input=200, output=0)
    told = replace(turn(1, "teacher", usage), informed=False)
    found = episode(turn(0, "teacher", usage), told)
    cost = per_episode([found], PRICES, prompts)
    assert cost is not None and asked == [(0, True), (1, False)]
    assert cost["cached"] == pytest.approx((100 * 12 + 100 * 10 + 100 * 1 + 100 * 10) / 1e6)


def test_an_unknown_price_is_no_sum() -> None:
    found = episode(turn(0, "teacher", Usage(1)), turn(1, "nobody", Usage(1)))
    assert per_episode([found], PRICES, nothing) is None
    assert per_episode([], PRICES, nothing) is None
    free = per_episode([episode()], PRICES, nothing)
    assert free == {"paid": 0.0, "uncached": 0.0, "cached": 0.0}


usages = st.builds(Usage, *[st.integers(0, 5000)] * 4)
prompt_texts = st.lists(st.text("ab", max_size=5), min_size=1, max_size=4).map(tuple)


@given(st.lists(st.tuples(usages, prompt_texts), min_size=1, max_size=6))
def test_ideal_caches_lose_no_token(drawn: list[tuple[Usage, Prompt]]) -> None:
    flat = Price(1, 1, 1, 1)  # type: ignore[arg-type]
    free = Price(1, 1, 0, 1)  # type: ignore[arg-type]
    found = episode(*(turn(n, "teacher", usage) for n, (usage, _) in enumerate(drawn)))

    def prompts(trajectory: Trajectory, number: int, informed: bool) -> Prompt:
        return drawn[number][1]

    same = per_episode([found], {"teacher": flat}, prompts)
    assert same is not None and same["paid"] == same["uncached"] == same["cached"]
    less = per_episode([found], {"teacher": free}, prompts)
    assert less is not None and less["cached"] <= less["uncached"]
