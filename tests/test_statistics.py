"""Claims about policies and about methods: they are right, do not cry wolf, and find what is there.

Simulated policies have a success rate for every task; simulated methods give every run rates of its
own, which is why a test over tasks says nothing about them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from agentdistill import statistics
from agentdistill.statistics import (
    by_task,
    crossed,
    fault_bounds,
    over_tasks,
    sign_flip,
    t_quantile,
    t_tails,
    t_test,
    tolerance,
    welch,
)

Draw = np.random.Generator


def policies(
    generator: Draw, tasks: int = 60, samples: int = 1, effect: float = 0.0, number: int = 2
) -> list[np.ndarray]:
    """Success by task of policies on tasks of different difficulty; the last is better."""
    rates = generator.beta(1.0, 1.0, tasks)
    more = [0.0] * (number - 1) + [effect]
    chances = [np.clip(rates + extra, 0.0, 1.0) for extra in more]
    return [generator.binomial(samples, chance) / samples for chance in chances]


def method(generator: Draw, rates: np.ndarray, runs: int, effect: float = 0.0) -> np.ndarray:
    """Success of ``runs`` on tasks whose usual rates are ``rates``, shape (runs, tasks)."""
    luck = generator.normal(effect, 0.12, (runs, 1)) + generator.normal(0, 0.1, (runs, len(rates)))
    return (generator.random((runs, len(rates))) < np.clip(rates + luck, 0, 1)).astype(float)


def alarms(trials: int, p: Callable[[Draw], float]) -> float:
    """Share of ``trials`` with p < 0.05."""
    generator = np.random.default_rng(0)
    return sum(p(generator) < 0.05 for _ in range(trials)) / trials


def most(trials: int) -> float:
    """What a rate of 5% may look like in ``trials``: two standard errors more."""
    return 0.05 + 2 * (0.05 * 0.95 / trials) ** 0.5


# -- A/A: nothing is there -------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "trials"), [(1, 2000), (4, 300)])
def test_a_policy_is_no_better_than_itself(samples: int, trials: int) -> None:
    def p(generator: Draw) -> float:
        one, two = policies(generator, samples=samples)
        return sign_flip(one - two)

    assert 0.01 < alarms(trials, p) <= (0.05 if samples == 1 else most(trials))


@pytest.mark.parametrize("runs", [3, 5, 10])
@pytest.mark.parametrize("paired", [True, False])
def test_a_method_is_no_better_than_itself(runs: int, paired: bool) -> None:
    def p(generator: Draw) -> float:
        rates = generator.beta(1.0, 1.0, 50)
        one, two = (method(generator, rates, runs).mean(axis=1) for _ in range(2))
        return (t_test(one - two) if paired else welch(one, two)).p

    assert 0.01 < alarms(2000, p) <= most(2000)


def test_one_run_each_would_cry_wolf_about_methods() -> None:
    """Why no p-value over tasks is given for methods: the same method twice looks different."""

    def p(generator: Draw) -> float:
        rates = generator.beta(1.0, 1.0, 200)
        one, two = (method(generator, rates, 1)[0] for _ in range(2))
        return sign_flip(one - two)

    assert alarms(300, p) > 0.25


def test_a_play_is_within_two_standard_errors_of_another() -> None:
    generator = np.random.default_rng(0)
    outside = 0
    for _ in range(2000):
        rates = generator.beta(1.0, 1.0, 100)
        one, two = ((generator.random(100) < rates).mean() for _ in range(2))
        outside += abs(one - two) > tolerance(one, 100, two, 100)
    assert outside / 2000 <= 0.05
    assert tolerance(0.5, 200, 0.38, 200) < 0.5 - 0.38, "12 points in 200 episodes are seen"
    assert 0 < tolerance(0.0, 5, 0.0, 5) < 1


# -- power: something is there ---------------------------------------------------------------------


def test_a_better_policy_is_found() -> None:
    def p(generator: Draw) -> float:
        one, two = policies(generator, tasks=200, effect=0.2)
        return sign_flip(two - one)

    assert alarms(200, p) > 0.9


@pytest.mark.parametrize("paired", [True, False])
def test_a_better_method_is_found_with_replicates(paired: bool) -> None:
    def p(generator: Draw) -> float:
        rates = generator.beta(2.0, 3.0, 100)
        one = method(generator, rates, 8).mean(axis=1)
        two = method(generator, rates, 8, effect=0.3).mean(axis=1)
        return (t_test(two - one) if paired else welch(two, one)).p

    assert alarms(200, p) > 0.9


# -- intervals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 4])
def test_the_interval_over_tasks_holds_the_truth(
    samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 1000)
    generator, held, truth, trials = np.random.default_rng(1), 0, 0.1, 300
    for _ in range(trials):
        chances = generator.uniform(0.0, 0.8, 40)
        shift = generator.choice([0.0, 0.2], 40)
        one = generator.binomial(samples, chances + shift) / samples
        two = generator.binomial(samples, chances) / samples
        low, high = over_tasks(one, two, samples)
        held += low <= truth <= high
    assert 0.95 - 2 * (0.05 * 0.95 / trials) ** 0.5 <= held / trials < 0.99


def test_agreement_on_few_tasks_is_no_certainty() -> None:
    low, high = over_tasks(np.ones(5), np.ones(5))
    assert low == -high and 0.2 < high < 0.6
    low, high = over_tasks(np.ones(500), np.ones(500))
    assert 0 < high < 0.01
    low, high = over_tasks(np.ones(6), np.zeros(6))
    assert 0 < low < high == 1.0


def test_replicates_and_tasks_are_both_of_chance() -> None:
    zeros = np.zeros((8, 100))
    tasks = np.tile([0.0, 1.0], (8, 50))
    low, high = crossed(tasks, zeros, paired=True)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 100**0.5, rel=0.1), "one panel for all"
    runs = np.tile([[0.0], [1.0]], (4, 100))
    for paired in (True, False):
        low, high = crossed(runs, zeros, paired=paired)
        assert high - low == pytest.approx(2 * 1.96 * 0.5 / 8**0.5, rel=0.15)
    low, high = crossed(runs, runs, paired=True)
    assert low == high == 0.0, "pairs are drawn together"
    low, high = crossed(runs, runs, paired=False)
    assert high - low == pytest.approx(2 * 1.96 * (2 * 0.25 / 8) ** 0.5, rel=0.15)


def test_faults_are_missing_in_the_bootstrap_and_not_failures() -> None:
    one = np.ones((3, 50))
    one[1, :40] = np.nan
    low, high = crossed(one, np.zeros((3, 50)), paired=True)
    assert low == high == 1.0


# -- exact values ----------------------------------------------------------------------------------


def test_signs_are_mcnemar_s_where_a_task_is_one_episode() -> None:
    differences = np.array([1.0] * 8 + [-1.0] * 2 + [0.0] * 90)
    assert sign_flip(differences) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert sign_flip(-differences) == sign_flip(differences)
    assert sign_flip(0.25 * differences) == sign_flip(differences)
    assert sign_flip(np.array([1.0, -1.0])) == sign_flip(np.zeros(9)) == 1.0


def test_random_flips_agree_with_all_flips() -> None:
    values = np.array([0.5, 1.0, 1.0, 0.25, -0.5, 0.75, 1.0, -0.25])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1)
    exact = (np.abs(values @ signs) >= values.sum() - 1e-9).mean()
    assert sign_flip(values) == pytest.approx(exact, abs=0.012)


def test_student_s_t() -> None:
    for freedom, quantile in ((1, 12.7062), (2, 4.30265), (5, 2.57058), (30, 2.04227)):
        assert t_quantile(0.05, freedom) == pytest.approx(quantile, abs=1e-4)
        assert t_tails(-quantile, freedom) == pytest.approx(0.05, abs=1e-5)
    assert t_tails(0.0, 3) == 1.0
    assert t_tails(1.959964, 1e5) == pytest.approx(0.05, abs=1e-4)


def test_t_tests_are_scipy_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(3)
    for size in (2, 3, 4, 9, 40):
        one, two = generator.normal(0.3, 0.2, size), generator.normal(0.2, 0.5, size + 3)
        found, theirs = t_test(one), stats.ttest_1samp(one, 0.0)
        assert found.p == pytest.approx(theirs.pvalue, rel=1e-6)
        assert found[2:4] == pytest.approx(theirs.confidence_interval(), rel=1e-6)
        found, theirs = welch(one, two), stats.ttest_ind(one, two, equal_var=False)
        assert found.p == pytest.approx(theirs.pvalue, abs=1e-6)
        assert found[2:4] == pytest.approx(theirs.confidence_interval(), rel=1e-4)


def test_too_few_replicates_or_none_that_vary() -> None:
    for found in (t_test([0.4]), welch([0.4], [0.1, 0.2])):
        assert found.p == 1.0 and math.isnan(found.low) and math.isnan(found.high)
    assert t_test([0.5, 0.5, 0.5]) == (3, 0.5, 0.5, 0.5, 1.0)
    assert welch([0.5, 0.5], [0.25, 0.25]).p == 1.0


# -- faults ----------------------------------------------------------------------------------------


def test_rates_by_task_leave_faults_out() -> None:
    found = by_task([True, False, None, True, None, None], 3)
    assert found[:2].tolist() == [0.5, 1.0] and math.isnan(found[2])
    assert by_task([True, None], 2)[0] == 1.0


def test_bounds_say_what_faults_might_have_been() -> None:
    assert fault_bounds([True, False, None, None]) == (0.25, 0.75)
    assert fault_bounds([True, False]) == (0.5, 0.5)
    assert fault_bounds([None, None]) == fault_bounds([]) == (0.0, 1.0)
