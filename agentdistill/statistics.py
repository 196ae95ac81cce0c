"""Statistics of comparisons: what may be claimed from outcomes by task, and how sure one is.

Two kinds of claims, which must not be confused. One about two *policies* (two sets of weights) is
over tasks: :func:`over_tasks`, :func:`sign_flip`. One about two *methods* is over replicates, runs
with seeds of their own: :func:`t_test`, :func:`welch`, with :func:`crossed` or :func:`nested`.

Invariants: numpy only; everything is a function of its arguments (resampling has a seed); a task
that was lost to a fault is NaN, and in no rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agentdistill.metrics import Interval

Floats = NDArray[np.float64]

DRAWS = 10_000
CHUNK = 1_000
"""Draws at once, which bounds the memory."""

LEAST = 3
"""Replicates without which nothing is claimed about a method."""


class Estimate(NamedTuple):
    """A mean, or a difference of means, over ``n`` replicates (or the smaller number of two)."""

    n: int
    mean: float
    low: float
    """Of the 95% interval; NaN where there are too few replicates."""
    high: float
    p: float
    """Two-sided, of no difference; 1 where nothing varies."""


# -- outcomes --------------------------------------------------------------------------------------


def by_task(outcomes: Sequence[bool | None], tasks: int) -> Floats:
    """Success rate of every task over its samples, shape (tasks,); NaN without a sound episode.

    Args:
        outcomes: task by task, sample by sample; None where a fault lost the episode.
        tasks: how many.
    """
    values = np.array([np.nan if won is None else float(won) for won in outcomes])
    values = values.reshape(tasks, -1)
    sound = (~np.isnan(values)).sum(axis=1)
    rates = np.full(tasks, np.nan)
    np.divide(np.nansum(values, axis=1), sound, out=rates, where=sound > 0)
    return rates


def fault_bounds(outcomes: Sequence[bool | None]) -> Interval:
    """The success rate if all episodes that faults lost had failed, and had succeeded."""
    wins, faults = sum(won is True for won in outcomes), sum(won is None for won in outcomes)
    if not outcomes:
        return Interval(0.0, 1.0)
    return Interval(wins / len(outcomes), (wins + faults) / len(outcomes))


def tolerance(first: float, n: int, second: float, m: int) -> float:
    """Two standard errors of the difference between two plays of the same policy.

    Both rates are of chance, so that both have an error. Two successes and two failures are added
    to each (Agresti and Coull, 1998): a rate of 0 or 1 in a few episodes is no certainty.

    Args:
        first: success rate of the one.
        n: its episodes.
        second: success rate of the other.
        m: its episodes.
    """
    rates = [((rate * size + 2) / (size + 4), size) for rate, size in ((first, n), (second, m))]
    return 2 * math.sqrt(sum(rate * (1 - rate) / size for rate, size in rates))


# -- policies: over tasks --------------------------------------------------------------------------


def over_tasks(first: Floats, second: Floats, samples: int = 1, seed: int = 0) -> Interval:
    """95% bootstrap interval of the mean difference of two policies over tasks.

    A task is drawn again with its samples: their noise is in its rate already, and drawing them
    again would count it twice. One task more where the first policy solves one episode more, and
    one where the second does, keep the interval open where all agree (Bonett and Price, 2012).

    Args:
        first: success of every task, shape (tasks,), without NaN.
        second: of the same tasks.
        samples: episodes of a task.
        seed: of the draws.
    """
    one, two = np.append(first, (1 / samples, 0)), np.append(second, (0, 1 / samples))
    return crossed(one[None], two[None], paired=True, seed=seed)


def sign_flip(differences: Floats, seed: int = 0) -> float:
    """Two-sided p of no difference between two policies: signs by task are as likely as not.

    Exact where all tasks that differ do so by the same amount (McNemar's test: one episode a
    task), otherwise from :data:`DRAWS` random flips.
    """
    apart = np.abs(differences[differences != 0])
    if not len(apart):
        return 1.0
    if np.ptp(apart) < 1e-12:
        return _binomial(int((differences > 0).sum()), len(apart))
    generator, seen, more = np.random.default_rng(seed), abs(float(differences.sum())), 0
    for _ in range(DRAWS // CHUNK):
        signs = generator.integers(0, 2, size=(CHUNK, len(apart))) * 2.0 - 1.0
        more += int((np.abs(signs @ apart) >= seen - 1e-9).sum())
    return (1 + more) / (1 + DRAWS)


def _binomial(wins: int, trials: int) -> float:
    """Two-sided p of ``wins`` in ``trials`` of a fair coin."""
    fewer = min(wins, trials - wins)
    ways = sum(math.comb(trials, k) for k in range(fewer + 1))
    return min(1.0, float(2 * ways / 2**trials))


# -- methods: over replicates ----------------------------------------------------------------------


def t_test(values: Sequence[float] | Floats) -> Estimate:
    """Student's t over replicates; with paired replicates ``values`` are their differences."""
    numbers = np.asarray(values, float)
    n, mean = len(numbers), float(numbers.mean())
    error = float(numbers.std(ddof=1)) / n**0.5 if n > 1 else math.nan
    return _estimate(n, mean, error, n - 1)


def welch(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Welch's t of two independent groups of replicates. Source: Welch (1947)."""
    one, two = np.asarray(first, float), np.asarray(second, float)
    n, mean = min(len(one), len(two)), float(one.mean() - two.mean())
    if n < 2:
        return _estimate(n, mean, math.nan, 0)
    squares = [float(group.var(ddof=1)) / len(group) for group in (one, two)]
    total = sum(squares)
    parts = sum(s**2 / (len(g) - 1) for s, g in zip(squares, (one, two), strict=True))
    return _estimate(n, mean, total**0.5, total**2 / parts if total > 0 else 1.0)


def _estimate(n: int, mean: float, error: float, freedom: float) -> Estimate:
    if math.isnan(error):
        return Estimate(n, mean, math.nan, math.nan, 1.0)
    reach = t_quantile(0.05, freedom) * error
    p = t_tails(mean / error, freedom) if error > 0 else 1.0
    return Estimate(n, mean, mean - reach, mean + reach, p)


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


def t_tails(t: float, freedom: float) -> float:
    """P(|T| > |t|) of Student's t with ``freedom`` degrees (at least 1).

    With t = sqrt(freedom) / tan(angle) the density is a power of a sine, which Gauss-Legendre
    integrates to 1e-6 and better; scipy, which gives the same, is not in the base install.
    """
    if t == 0:
        return 1.0
    half = math.atan(math.sqrt(freedom) / abs(t)) / 2
    sines = np.sin(half * (_NODES + 1))
    area = float(_WEIGHTS @ sines ** (freedom - 1)) * half
    log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    return min(1.0, 2 * math.exp(log) * area)


def t_quantile(tails: float, freedom: float) -> float:
    """The t beyond which, on both sides together, lies a share ``tails``."""
    low, high = 0.0, 1.0
    while t_tails(high, freedom) > tails:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tails(middle, freedom) > tails else (low, middle)
    return high


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given. Source: Holm (1979)."""
    order, adjusted, least = np.argsort(p), [0.0] * len(p), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = least
    return adjusted


# -- both levels of chance -------------------------------------------------------------------------


def crossed(first: Floats, second: Floats, *, paired: bool, seed: int = 0) -> Interval:
    """95% bootstrap interval of a difference where all replicates play the same tasks.

    Replicates and tasks are drawn again, each for themselves, and what is drawn of one is combined
    with all that is drawn of the other. Source: Owen (2007), the pigeonhole bootstrap.

    Args:
        first: success, shape (replicates, tasks); NaN for faults.
        second: the other group's, on the same tasks.
        paired: whether replicates belong together, and are drawn together.
        seed: of the draws.
    """
    generator, found = np.random.default_rng(seed), []
    for _ in range(DRAWS // CHUNK):
        tasks = _counts(generator, first.shape[1])
        one = _counts(generator, len(first))
        two = one if paired else _counts(generator, len(second))
        found.append(_redrawn(first, one, tasks) - _redrawn(second, two, tasks))
    return _middle(np.concatenate(found))


def _counts(generator: np.random.Generator, n: int) -> Floats:
    """How often each of ``n`` things is drawn when ``n`` are, shape (CHUNK, n)."""
    return generator.multinomial(n, np.full(n, 1 / n), size=CHUNK).astype(float)


def _redrawn(values: Floats, replicates: Floats, tasks: Floats) -> Floats:
    """Rates of redrawn replicates and tasks, shape (CHUNK,); NaN where only faults were drawn."""
    sound = (replicates @ ~np.isnan(values) * tasks).sum(axis=1)
    wins = (replicates @ np.nan_to_num(values) * tasks).sum(axis=1)
    rates: Floats = np.divide(wins, sound, out=np.full(len(wins), np.nan), where=sound > 0)
    return rates


def nested(differences: Sequence[NDArray[Any]], seed: int = 0) -> Interval:
    """95% bootstrap interval of a mean where every replicate has tasks of its own.

    Replicates are drawn again, and the tasks within each of them.

    Args:
        differences: by task, one array per replicate.
        seed: of the draws.
    """
    generator, n = np.random.default_rng(seed), len(differences)
    chosen = generator.integers(n, size=(DRAWS, n))
    # The mean over redrawn tasks of one replicate, as often as that replicate is drawn.
    means = np.empty((DRAWS, n))
    for number, values in enumerate(differences):
        where = chosen == number
        places = generator.integers(len(values), size=(int(where.sum()), len(values)))
        means[where] = values[places].mean(axis=1)
    return _middle(means.mean(axis=1))


def _middle(values: Floats) -> Interval:
    low, high = np.nanquantile(values, (0.025, 0.975))
    return Interval(float(low), float(high))
