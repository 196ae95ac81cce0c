"""Two sides that played the same tasks: the difference in success, and what it is a claim about.

Invariants: outcomes are paired by task key; what was played otherwise (tasks, prompt, sampling,
environment, data) is refused and named, never corrected for; a p-value with one run on each side
speaks about these two *policies*, and one about the *methods* needs replicates on both sides;
episodes lost to faults are in no rate, and every rate has its bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agentdistill import statistics
from agentdistill.errors import ConfigError
from agentdistill.evaluation import Result
from agentdistill.metrics import Interval
from agentdistill.recorded import SCRIPTED, Recorded, differences, read
from agentdistill.statistics import LEAST, Floats

# -- claims ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison.

    Attributes:
        runs: where its results are.
        policy: name of the policy.
        mode: in which it played.
        success: rate of every run.
        episodes: without faults, of all runs together.
        faults: episodes lost to faults.
        bounds: success if all episodes lost to faults had failed, and had succeeded.
    """

    runs: tuple[str, ...]
    policy: str
    mode: str
    success: tuple[float, ...]
    episodes: int
    faults: int
    bounds: Interval

    @property
    def mean(self) -> float:
        """Success, the mean of the runs."""
        return sum(self.success) / len(self.success)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The first side minus the second.

    Attributes:
        about: ``policies`` (one run on each side) or ``methods``.
        first: a side.
        second: the other one.
        tasks: how many both have a sound episode of, in the first pair of runs.
        paired: whether replicates belong together (the same seeds on both sides).
        difference: of success.
        interval: 95%: over tasks for policies, Student's t over replicates for methods; None where
            nothing can be claimed.
        bootstrap: 95%, of redrawn replicates and tasks, for methods; else None.
        p: two-sided, of no difference; None where nothing can be claimed.
        test: what gave ``p``; "" without one.
        bounds: of the difference, if all faults of one side had failed and all of the other had
            succeeded, and the other way round.
        notes: what a reader has to know.
    """

    about: Literal["policies", "methods"]
    first: Side
    second: Side
    tasks: int
    paired: bool
    difference: float
    interval: Interval | None
    bootstrap: Interval | None
    p: float | None
    test: str
    bounds: Interval
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


Paths = str | Path | Sequence[str | Path]


def compare(
    first: Paths,
    second: Paths | None = None,
    policy: str | Sequence[str] | None = None,
    mode: str | None = None,
) -> Comparison:
    """Compare what two sides did on the same tasks.

    Args:
        first: a run folder or file of results, several (replicates), or a folder of run folders.
        second: the other side; None is the first again, for two policies of the same runs.
        policy: its name, or the names on the two sides; None where each side trained just one.
        mode: ``sampled`` or ``greedy``; None takes the sampled one where there is one.

    Raises:
        ConfigError: what was played differs, is not there, or is the same run twice.
    """
    sides = [_side(first), _side(first if second is None else second)]
    names = [policy] * 2 if isinstance(policy, str) else list(policy or (None, None))
    if len(names) == 1:
        names *= 2
    if len(names) != 2:
        raise ConfigError("name one, or one for each side", key="policy", value=names)
    chosen = [name or _only(side) for name, side in zip(names, sides, strict=True)]
    if second is None and chosen[0] == chosen[1]:
        raise ConfigError("name a second side, or two policies", key="policy", value=chosen[0])
    seeds = [[each.seed for each in side] for side in sides]
    paired = len(sides[0]) > 1 and None not in seeds[0] and set(seeds[0]) == set(seeds[1])
    if paired:
        sides[1] = [sides[1][seeds[1].index(seed)] for seed in seeds[0]]
    pairs = zip(sides, chosen, strict=True)
    results = [[each.result(name, mode) for each in side] for side, name in pairs]
    _refuse_differences(results, paired)
    one, two = (_summary(side, found) for side, found in zip(sides, results, strict=True))
    return _claim(one, two, results, paired)


def _side(paths: Paths) -> list[Recorded]:
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    found = [read(path) for each in given for path in _expanded(Path(each).expanduser())]
    seen: dict[Any, Path] = {}
    for each in found:
        for mark in {each.file.resolve(), each.seed} - {None}:
            if mark in seen:
                remedy = f"is the run of {seen[mark]} again (its seed); replicates need their own"
                raise ConfigError(remedy, key="replicate", value=str(each.file))
            seen[mark] = each.file
    return found


def _expanded(path: Path) -> list[Path]:
    """The run folders in a folder that is none itself."""
    if not path.is_dir() or any((path / name).exists() for name in ("results.json", "evaluation")):
        return [path]
    return sorted(each.parent for each in path.glob("*/evaluation")) or [path]


def _only(side: Sequence[Recorded]) -> str:
    names = list(dict.fromkeys(r.policy for r in side[0].results if r.policy not in SCRIPTED))
    if len(names) != 1:
        known = ", ".join(names or [r.policy for r in side[0].results])
        raise ConfigError(f"name one of {known}", key="policy", value=None)
    return names[0]


OWN = ("tasks: ", "seed: ")
"""What replicates that belong together may have for themselves."""


def _refuse_differences(results: Sequence[Sequence[Result]], paired: bool) -> None:
    base, *others = (
        (f"{name}{number}" if len(side) > 1 else name, each)
        for name, side in zip("AB", results, strict=True)
        for number, each in enumerate(side, start=1)
    )
    for other in others:
        _refuse(base, other, OWN if paired else ())
    for number, (one, two) in enumerate(zip(*results, strict=False) if paired else (), start=1):
        _refuse((f"A{number}", one), (f"B{number}", two))


def _refuse(
    first: tuple[str, Result], second: tuple[str, Result], but: tuple[str, ...] = ()
) -> None:
    names = first[0], second[0]
    lines = differences(first[1], second[1], names)
    if found := "; ".join(line for line in lines if not line.startswith(but)):
        raise ConfigError(f"{names[0]} and {names[1]} did not play the same: {found}")


def _summary(side: Sequence[Recorded], results: Sequence[Result]) -> Side:
    for each, result in zip(side, results, strict=False):
        if not result.episodes:
            remedy = "every episode was lost to faults"
            raise ConfigError(remedy, key="results", value=str(each.file))
    outcomes = [won for result in results for won in result.outcomes]
    return Side(
        tuple(str(each.folder or each.file) for each in side),
        results[0].policy,
        results[0].mode,
        tuple(result.success for result in results),
        sum(result.episodes for result in results),
        sum(result.faults for result in results),
        statistics.fault_bounds(outcomes),
    )


def _claim(one: Side, two: Side, results: Sequence[Sequence[Result]], paired: bool) -> Comparison:
    base = results[0][0]
    shared = all(set(each.keys) == set(base.keys) for side in results for each in side)
    bounds = Interval(one.bounds.low - two.bounds.high, one.bounds.high - two.bounds.low)
    apart = _apart(base, results[1][0])
    if len(results[0]) == len(results[1]) == 1:
        samples = [len(side[0].outcomes) // len(base.keys) for side in results]
        said = _of_policies(*apart, min(samples))
    else:
        said = _of_pairs(results, shared) if paired else _of_groups(results)
    return Comparison(
        first=one, second=two, tasks=len(apart[0]), paired=paired, bounds=bounds, **said
    )


def _of_policies(first: Floats, second: Floats, samples: int) -> dict[str, Any]:
    return {
        "about": "policies",
        "difference": float((first - second).mean()),
        "interval": statistics.over_tasks(first, second, samples),
        "bootstrap": None,
        "p": statistics.sign_flip(first - second),
        "test": "signs by task",
        "notes": (
            "a claim about these two policies as they are, on tasks like these",
            "no p-value about the methods: with one run each nobody knows how much the runs of one "
            f"method differ; a claim about methods needs {LEAST} runs of each, with their own "
            "seeds",
        ),
    }


def _of_pairs(results: Sequence[Sequence[Result]], shared: bool) -> dict[str, Any]:
    """Replicates that belong together: Student's t of their differences."""
    pairs = [_apart(one, two) for one, two in zip(*results, strict=True)]
    estimate = statistics.t_test([float((one - two).mean()) for one, two in pairs])
    if shared:
        spread = statistics.crossed(*_matrices(results), paired=True)
    else:
        spread = statistics.nested([one - two for one, two in pairs])
    return _of_methods(estimate, spread, "paired t over replicates")


def _of_groups(results: Sequence[Sequence[Result]]) -> dict[str, Any]:
    """Replicates that do not belong together: Welch's t of their rates."""
    estimate = statistics.welch(*([each.success for each in side] for side in results))
    spread = statistics.crossed(*_matrices(results), paired=False)
    return _of_methods(estimate, spread, "Welch's t over replicates")


def _of_methods(estimate: statistics.Estimate, spread: Interval, test: str) -> dict[str, Any]:
    enough = estimate.n >= LEAST
    said = "a claim about the two methods with the seeds that they might have had"
    few = (
        f"no p-value about the methods: {estimate.n} run{'s' * (estimate.n > 1)} on a side say too "
        f"little of how much the runs of one method differ; that needs {LEAST} of each, with their "
        "own seeds"
    )
    return {
        "about": "methods",
        "difference": estimate.mean,
        "interval": Interval(estimate.low, estimate.high) if enough else None,
        "bootstrap": spread if enough else None,
        "p": estimate.p if enough else None,
        "test": test if enough else "",
        "notes": (said if enough else few,),
    }


def _rates(result: Result, keys: Sequence[str]) -> Floats:
    """Success by task, in the order of ``keys``."""
    rates = statistics.by_task(result.outcomes, len(result.keys))
    by_key = dict(zip(result.keys, rates, strict=True))
    return np.array([by_key[key] for key in keys])


def _apart(first: Result, second: Result) -> tuple[Floats, Floats]:
    """Both by task, without the tasks that faults cost one of them."""
    one, two = _rates(first, first.keys), _rates(second, first.keys)
    both = ~(np.isnan(one) | np.isnan(two))
    if not both.any():
        raise ConfigError("there is no task of which both have an episode without faults")
    return one[both], two[both]


def _matrices(results: Sequence[Sequence[Result]]) -> tuple[Floats, Floats]:
    """Both sides, shape (replicates, tasks); NaN for faults."""
    keys = results[0][0].keys
    one, two = (np.array([_rates(each, keys) for each in side]) for side in results)
    return one, two
