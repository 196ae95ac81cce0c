"""Curricula: TCOD's schedules by golden values, the paper against its code, and the bounds."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentdistill.curriculum import (
    BackwardToForward,
    Curriculum,
    Fixed,
    ForwardToBackward,
    Full,
    Plan,
    b2f_start,
    f2b_window,
)
from agentdistill.errors import ConfigError

counter, small = st.integers(0, 400), st.integers(1, 40)


@pytest.mark.parametrize(
    ("n", "window"), [(0, 1), (5, 1), (6, 2), (29, 5), (173, 29), (174, 30), (1000, 30)]
)
def test_f2b_golden(n: int, window: int) -> None:
    assert f2b_window(n, 6, max_turns=30) == window


@pytest.mark.parametrize(
    ("n", "start"), [(0, 6), (4, 6), (5, 5), (14, 4), (29, 1), (30, 0), (100, 0)]
)
def test_b2f_golden(n: int, start: int) -> None:
    assert b2f_start(n, 7, 5) == start


@pytest.mark.parametrize("n", [0, 5, 100])
@pytest.mark.parametrize("length", [0, 1])
def test_b2f_of_trivial_demonstrations_starts_at_the_reset(n: int, length: int) -> None:
    assert b2f_start(n, length, 5) == 0


@settings(max_examples=200, deadline=None)
@given(counter, small, small, small)
def test_paper_and_code_count_the_same_turns(n: int, length: int, eta: int, k_start: int) -> None:
    assert length - b2f_start(n, length, eta, k_start) == min(k_start + n // eta, length)


def test_f2b_plans_open_up_to_an_ordinary_episode() -> None:
    plan = ForwardToBackward(eta=6).plan
    assert plan(0, None, 30) == Plan(0, 1)
    assert plan(173, 12, 30) == Plan(0, 29)
    assert plan(174, 12, 30) == plan(10_000, None, 30) == Full().plan(0, None, 30) == Plan(0, None)


def test_f2b_can_stop_growing_below_the_step_limit() -> None:
    capped = ForwardToBackward(eta=1, k_start=3, max_turns=5)
    assert [capped.plan(n, None, 30).horizon for n in (0, 1, 2, 9)] == [3, 4, 5, 5]
    assert capped.plan(9, None, 4) == Plan(0, None)


def test_b2f_horizons_of_code_and_paper() -> None:
    code, paper = BackwardToForward(eta=5), BackwardToForward(eta=5, horizon="k")
    assert [code.plan(n, 7, 30) for n in (0, 14, 30)] == [Plan(6, 24), Plan(4, 26), Plan(0, None)]
    assert [paper.plan(n, 7, 30) for n in (0, 14, 30)] == [Plan(6, 1), Plan(4, 3), Plan(0, 7)]


@pytest.mark.parametrize("horizon", ["remaining", "k"])
@pytest.mark.parametrize("length", [None, 0])
def test_b2f_without_a_demonstration_is_an_ordinary_episode(
    horizon: str, length: int | None
) -> None:
    assert BackwardToForward(horizon=horizon).plan(0, length, 30) == Plan(0, None)


def test_demonstrations_longer_than_the_step_limit_leave_a_turn() -> None:
    assert BackwardToForward().plan(0, 50, 30) == Plan(29, 1)


def test_fixed() -> None:
    assert Fixed(4).plan(0, 7, 30) == Fixed(4).plan(999, None, 30) == Plan(0, 4)
    assert Fixed(30).plan(0, 7, 30) == Plan(0, None)


curricula = st.one_of(
    st.just(Full()),
    st.builds(Fixed, small),
    st.builds(ForwardToBackward, small, small, st.none() | small),
    st.builds(BackwardToForward, small, small, st.sampled_from(["remaining", "k"])),
)


@settings(max_examples=300, deadline=None)
@given(curricula, counter, st.none() | st.integers(0, 60), small)
def test_plans_stay_within_the_episode_and_never_shrink(
    curriculum: Curriculum, n: int, length: int | None, max_turns: int
) -> None:
    plan, later = (curriculum.plan(m, length, max_turns) for m in (n, n + 1))
    assert 0 <= plan.start < max_turns
    assert plan.horizon is None or 1 <= plan.horizon <= max_turns - plan.start
    assert (plan.horizon is None) == (plan.start == 0 and turns(plan, max_turns) == max_turns)
    assert later.start <= plan.start
    assert turns(later, max_turns) >= turns(plan, max_turns)


def turns(plan: Plan, max_turns: int) -> int:
    return max_turns if plan.horizon is None else plan.horizon


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: ForwardToBackward(eta=0), "eta"),
        (lambda: ForwardToBackward(max_turns=0), "max_turns"),
        (lambda: BackwardToForward(k_start=0), "k_start"),
        (lambda: BackwardToForward(horizon="all"), "horizon"),
        (lambda: Fixed(0), "horizon"),
        (lambda: Full().plan(0, None, 0), "max_turns"),
        (lambda: f2b_window(-1, 2, max_turns=3), "n"),
        (lambda: b2f_start(0, -1, 2), "length"),
    ],
)
def test_impossible_numbers_are_refused(make: object, key: str) -> None:
    with pytest.raises(ConfigError, match=f"curriculum.{key}="):
        make()  # type: ignore[operator]


def test_torch_is_not_imported() -> None:
    code = "import sys, agentdistill.curriculum; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
