"""Settings of a cascade side by side on the tune split: samples, demonstrations, rules.

Invariants
----------
* Decisions are made on the tune split; no task of it is in the evaluation's panel.
* What one setting did is never read off the episodes of another: a different rule takes a different
  way through an episode. Settings that *are* the same policy (one sample under any rule of
  agreement, the teacher alone with any number of samples) are played once.
* Each setting is a file below ``tuning/`` in the run's folder; a repeated command plays what is
  missing. The files name everything they depend on.
* Random escalation is played, not assumed to be a straight line: at the chances that are asked for,
  with the same demonstrations and one sample.

Source: the baselines of in-context distillation, arXiv 2512.02543.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from agentdistill import costs
from agentdistill.agreement import AGREEMENT, Rule
from agentdistill.cascade import CascadePolicy
from agentdistill.config import CascadeConfig, RunConfig
from agentdistill.errors import ConfigError
from agentdistill.evaluation import Result, play
from agentdistill.files import write_text
from agentdistill.panel import Panel, for_tuning
from agentdistill.records import digest
from agentdistill.run import Run

CHANCES = (0.25, 0.5, 0.75)
"""Of the teacher, at which random escalation is played."""

KINDS = ("uncached", "cached")
"""Of the costs against which a cascade has to break even."""


@dataclass(frozen=True, slots=True)
class Point:
    """One setting and what it did.

    Attributes:
        said: the setting.
        result: on the tune split.
        even: episodes after which the demonstrations have paid for themselves, by kind of cost (inf
            for never); None where costs are not known.
    """

    said: CascadeConfig
    result: Result
    even: dict[str, float] | None = None

    @property
    def share(self) -> float:
        """Share of the turns that the teacher answered."""
        return self.result.asked or 0.0

    @property
    def label(self) -> str:
        """The setting in a few words."""
        least = "" if self.said.threshold is None else f" {self.said.threshold:g}"
        return f"{self.said.rule}{least}"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON, infinity as None."""
        result = {k: v for k, v in asdict(self.result).items() if k not in ("keys", "outcomes")}
        even = {k: None if math.isinf(v) else v for k, v in (self.even or {}).items()} or None
        said = self.said.model_dump(mode="json", exclude={"student", "teacher", "demos"})
        return {"setting": said, "share": self.share, "break_even": even, "result": result}


@dataclass(frozen=True, slots=True)
class Curve:
    """Success against share of teacher calls, for one rule and one number of demonstrations.

    Attributes:
        label: what it is.
        k: demonstrations.
        points: (share, success), by share.
        area: between this curve and random escalation with the same demonstrations, from no teacher
            calls to the curve's last point; None for random escalation itself.
        gain: that area over its width: mean difference in success at equal share.
    """

    label: str
    k: int
    points: tuple[tuple[float, float], ...]
    area: float | None = None
    gain: float | None = None


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep found.

    Attributes:
        policy: its name.
        panel: hash of the tasks.
        tasks: how many.
        demonstrations: episodes in the collection.
        points: the settings.
        curves: random escalation and the rules.
    """

    policy: str
    panel: str
    tasks: int
    demonstrations: int
    points: tuple[Point, ...]
    curves: tuple[Curve, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "policy": self.policy,
            "panel": self.panel,
            "tasks": self.tasks,
            "demonstrations": self.demonstrations,
            "points": [point.to_json() for point in self.points],
            "curves": [asdict(curve) for curve in self.curves],
        }


def settings(
    base: CascadeConfig,
    samples: Sequence[int],
    ks: Sequence[int],
    rules: Sequence[tuple[str, float | None]],
    chances: Sequence[float] = CHANCES,
) -> list[CascadeConfig]:
    """All settings of a sweep, each distinct policy once.

    For each k: the student alone, every rule with every number of samples, and random escalation;
    the teacher alone.
    """
    found: list[CascadeConfig] = []
    for k in ks:
        wanted: list[tuple[str, float | None, int]] = [("never", None, 1)]
        wanted += [(rule, least, n) for rule, least in rules for n in samples]
        wanted += [("random", chance, 1) for chance in chances]
        wanted.append(("always", None, 1))
        for rule, threshold, n in wanted:
            Rule(rule, n, threshold)  # refuses what is no rule
            change = {"rule": rule, "threshold": threshold, "samples": n, "k": k}
            found.append(effective(_changed(base, change)))
    return [said for place, said in enumerate(found) if said not in found[:place]]


def effective(said: CascadeConfig) -> CascadeConfig:
    """The plainest setting that is the same policy."""
    alone = said.samples == 1 and said.rule in AGREEMENT
    rule = "never" if alone or (said.rule == "random" and not said.threshold) else said.rule
    rule = "always" if rule == "random" and said.threshold == 1 else rule
    change: dict[str, Any] = {"rule": rule}
    if rule in ("never", "always"):
        change["threshold"] = None
    if rule in ("always", "confidence"):
        change["samples"] = 1
    if change.get("samples", said.samples) == 1:
        change |= {"execute": False, "equivalence": "auto"}
    if rule == "always" and not said.teacher_demos:
        change |= {"k": 0, "plan": False}
    return _changed(said, change)


def _changed(said: CascadeConfig, change: dict[str, Any]) -> CascadeConfig:
    return CascadeConfig.model_validate({**said.model_dump(), **change})


def sweep(
    config: RunConfig,
    policy: str,
    *,
    samples: Sequence[int] = (1, 2, 3, 5),
    ks: Sequence[int] = (0, 3, 6),
    rules: Sequence[tuple[str, float | None]] = (("unanimous", None),),
    chances: Sequence[float] = CHANCES,
    say: Callable[[str], None] = lambda line: None,
) -> Sweep:
    """Play settings of the cascade called ``policy`` on the tune split; repeat it to go on.

    Args:
        config: of a run whose stages are done.
        policy: a key of ``policies``, with a teacher; the rest of its settings is kept.
        samples: numbers of samples.
        ks: numbers of demonstrations.
        rules: names with their thresholds.
        chances: of the teacher in random escalation.
        say: is told of each setting.

    Raises:
        ConfigError: no such cascade, one without a teacher, or a setting that is none.
    """
    base = config.policies.get(policy)
    if base is None or base.teacher is None:
        known = ", ".join(n for n, said in config.policies.items() if said.teacher) or "none"
        raise ConfigError(f"name a cascade with a teacher: {known}", key="policy", value=policy)
    if not base.demos:
        ks = [0]
    wanted = settings(base, samples, ks, rules, chances)
    with Run(config) as the_run:
        panel = for_tuning(config, the_run.env)
        made = the_run.cascade(policy, said=_changed(base, {"k": max(ks)}))
        folder = the_run.path / "tuning" / policy
        results = []
        for place, said in enumerate(wanted, 1):
            found, line = _result(the_run, made, said, panel, folder)
            results.append(found)
            say(f"{place}/{len(wanted)}: {line}")
        shown = made.shown.demos.episodes if made.shown.demos else 0
    teacher = next(r for said, r in zip(wanted, results, strict=True) if said.rule == "always")
    points = tuple(
        Point(said, result, _even(said, result, teacher, shown))
        for said, result in zip(wanted, results, strict=True)
    )
    return Sweep(policy, panel.hash, len(panel.tasks), shown, points, tuple(curves(points)))


def _result(
    the_run: Run,
    made: CascadePolicy,
    said: CascadeConfig,
    panel: Panel,
    folder: Path,
) -> tuple[Result, str]:
    """Of one setting: read, or played and written; and a line about it."""
    demos = made.shown.demos.version if made.shown.demos and said.k else ""
    config = the_run.config
    facts = [config.fingerprint, said.model_dump(mode="json"), panel.hash, demos]
    file = folder / f"{digest(facts)}.json"
    least = "" if said.threshold is None else f" {said.threshold:g}"
    words = f"{said.rule}{least}, N={said.samples}, k={said.k}"
    if file.exists():
        return Result.of_json(json.loads(file.read_text())), f"{words}: known"
    policy = CascadePolicy(
        made.name,
        made.student,
        made.teacher,
        said.decides(),
        replace(made.shown, k=said.k),
        equivalence=said.equivalence,
        execute=said.execute,
    )
    found = play(the_run, policy, "sampled", config.evaluate, panel)
    found = replace(found, setting={**found.setting, "made of": said.model_dump(mode="json")})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(found.to_json()))
    return found, f"{words}: {found.success:.1%}"


def _even(
    said: CascadeConfig, result: Result, teacher: Result, shown: int
) -> dict[str, float] | None:
    """Episodes to break even against the teacher, whose episodes the demonstrations were."""
    if result.cost is None or teacher.cost is None or said.rule == "always":
        return None
    number = shown if said.k else 0
    return {
        kind: costs.break_even(number * teacher.cost[kind], teacher.cost[kind], result.cost[kind])
        for kind in KINDS
    }


# -- curves ----------------------------------------------------------------------------------------


def curves(points: Iterable[Point]) -> Iterator[Curve]:
    """For each k random escalation, then each rule; all begin with the student alone."""
    points = tuple(points)
    whole = [p for p in points if p.said.rule == "always"]
    for k in dict.fromkeys(p.said.k for p in points if p.said.rule != "always"):
        mine = [p for p in points if p.said.k == k and p.said.rule != "always"]
        start = [p for p in mine if p.said.rule == "never" and p.said.samples == 1]
        teacher = [p for p in whole if p.said.k == k] or whole
        chance = [p for p in mine if p.said.rule == "random"]
        line = _line([*start, *chance, *teacher])
        yield Curve(f"random, k={k}", k, line)
        asking = [p for p in mine if p.said.rule not in ("random", "never")]
        for rule in dict.fromkeys(map(_series, asking)):
            own = _line([*start, *(p for p in asking if _series(p) == rule)])
            area = between(own, line)
            width = own[-1][0] - own[0][0]
            yield Curve(f"{rule}, k={k}", k, own, area, area / width if width else None)


def _series(point: Point) -> str:
    """What one curve goes along: numbers of samples, or the thresholds of ``confidence``."""
    return point.said.rule if point.said.rule == "confidence" else point.label


def _line(points: Iterable[Point]) -> tuple[tuple[float, float], ...]:
    """By share; where two have the same share, the mean of what they did."""
    found: dict[float, list[float]] = {}
    for point in points:
        found.setdefault(point.share, []).append(point.result.success)
    return tuple((share, sum(some) / len(some)) for share, some in sorted(found.items()))


def between(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float:
    """The signed area between two broken lines, over the shares that both have.

    Exact: between the corners of both each is straight.
    """
    low, high = max(one[0][0], other[0][0]), min(one[-1][0], other[-1][0])
    corners = sorted({low, high, *(x for x, _ in (*one, *other) if low < x < high)})
    gaps = [_at(one, x) - _at(other, x) for x in corners]
    steps = zip(pairwise(corners), pairwise(gaps), strict=True)
    return sum((x1 - x0) * (a + b) / 2 for (x0, x1), (a, b) in steps) if high > low else 0.0


def _at(line: Sequence[tuple[float, float]], x: float) -> float:
    """The height of a broken line at ``x``."""
    for (x0, y0), (x1, y1) in pairwise(line):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return line[0][1] if x <= line[0][0] else line[-1][1]
