"""Results side by side: one row per policy, its modes and its costs in columns.

Invariants: what was not measured is shown as a dash, never as zero; columns about teachers and
money are there where some row has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentdistill.config import RunConfig

if TYPE_CHECKING:
    from agentdistill.evaluation import Result

NOTHING = "–"  # noqa: RUF001  (a dash, as in printed tables)

MEASURES = ("success (95%)", "greedy", "optimal", "turns", "invalid", "env steps", "seconds")
COLUMNS = ("policy", *MEASURES)


@dataclass(frozen=True, slots=True)
class Row:
    """One policy with its modes side by side; None where nothing was measured.

    Attributes:
        policy: its name.
        label: what a reader sees.
        success: rate of the sampled episodes (of the only ones, for a policy without modes).
        low: lower bound of its 95% interval.
        high: upper bound.
        greedy: rate of the greedy episodes.
        optimal: share of optimal actions.
        turns: mean turns of an episode.
        invalid: share of turns that could not be read or were not valid.
        faults: episodes lost to faults, in no rate.
        env_steps: steps that its stage took in the environment.
        seconds: wall time of its stage.
        asked: share of the turns that a cascade's teacher answered.
        cost: money per episode, as it was paid.
        uncached: the same without any cache.
        cached: the same with an ideal prefix cache.
    """

    policy: str
    label: str
    success: float | None
    low: float | None
    high: float | None
    greedy: float | None
    optimal: float | None
    turns: float | None
    invalid: float | None
    faults: int
    env_steps: int | None
    seconds: float | None
    asked: float | None = None
    cost: float | None = None
    uncached: float | None = None
    cached: float | None = None

    def cells(self, columns: Sequence[str] = ()) -> list[str]:
        """As text, in the order of :data:`COLUMNS`; after them what ``columns`` has besides."""
        more = {
            "teacher": percent(self.asked),
            "cost": money(self.cost),
            "uncached": money(self.uncached),
            "cached": money(self.cached),
        }
        return [
            self.label,
            _interval(self.success, self.low, self.high),
            percent(self.greedy),
            percent(self.optimal),
            NOTHING if self.turns is None else f"{self.turns:.1f}",
            percent(self.invalid),
            NOTHING if self.env_steps is None else f"{self.env_steps:,}",
            NOTHING if self.seconds is None else f"{self.seconds:.1f}",
            *(more[name] for name in columns if name in more),
        ]


def columns(table: Sequence[Row]) -> tuple[str, ...]:
    """:data:`COLUMNS`, and those about teachers and money where some row has them."""
    costs = ("cost", "uncached", "cached")
    asked = ("teacher",) if any(row.asked is not None for row in table) else ()
    return (*COLUMNS, *asked, *(costs if any(row.cost is not None for row in table) else ()))


def money(amount: float | None) -> str:
    """An amount for people, to three digits."""
    return NOTHING if amount is None else f"{amount:.3g}"


def percent(rate: float | None) -> str:
    """A rate for people."""
    return NOTHING if rate is None else f"{rate:.1%}"


def _interval(rate: float | None, low: float | None, high: float | None) -> str:
    bounds = "" if low is None or high is None else f" ({100 * low:.0f} to {100 * high:.0f})"
    return percent(rate) + bounds


def rows(
    results: Sequence[Result],
    stages: Mapping[str, Mapping[str, Any]] | None = None,
    labels: Mapping[str, str] | None = None,
) -> list[Row]:
    """One row per policy, in the order of ``results``.

    Success, optimal, turns and invalid are of the sampled episodes where there are some. What is
    measured without a single sound episode is no measurement.
    """
    by_policy: dict[str, dict[str, Result]] = {}
    for result in results:
        by_policy.setdefault(result.policy, {})[result.mode] = result
    return [
        _row(name, modes, (stages or {}).get(name, {}), (labels or {}).get(name, name))
        for name, modes in by_policy.items()
    ]


def _row(name: str, modes: Mapping[str, Result], stage: Mapping[str, Any], label: str) -> Row:
    greedy = _sound(modes.get("greedy"))
    sampled = _sound(modes.get("sampled") or modes.get("-"))
    behaviour = sampled or greedy
    cost = (behaviour.cost if behaviour else None) or {}
    costs = [cost.get(kind) for kind in ("paid", "uncached", "cached")]
    return Row(
        policy=name,
        label=label,
        success=sampled.success if sampled else None,
        low=sampled.interval.low if sampled else None,
        high=sampled.interval.high if sampled else None,
        greedy=greedy.success if greedy else None,
        optimal=behaviour.optimal if behaviour else None,
        turns=behaviour.turns if behaviour else None,
        invalid=behaviour.invalid if behaviour else None,
        faults=sum(result.faults for result in modes.values()),
        env_steps=stage.get("env_steps"),
        seconds=stage.get("seconds"),
        asked=behaviour.asked if behaviour else None,
        cost=costs[0],
        uncached=costs[1],
        cached=costs[2],
    )


def _sound(result: Result | None) -> Result | None:
    return result if result and result.episodes else None


def notes(table: Sequence[Row], results: Sequence[Result], config: RunConfig) -> list[str]:
    """What a reader of the table has to know."""
    said = [result.setting.get("panel", {}) for result in results]
    named = zip(said, results, strict=True)
    panels = ", ".join(sorted({f"{p.get('name', '')} {r.panel[:12]}".strip() for p, r in named}))
    split = said[0].get("split", config.evaluate.split)
    found = [
        f"{len(results[0].keys)} tasks of split {split} of {config.env.id} (panel {panels}). "
        "success: sampled episodes with their 95% Wilson interval; greedy: the likeliest token; "
        "optimal, turns and invalid as sampled, where sampled."
    ]
    if any(row.asked is not None for row in table):
        found.append("teacher: share of the turns that the teacher of a cascade answered.")
    if any(row.cost is not None for row in table):
        found.append(
            "cost: money per episode as paid; uncached: the same calls without any prompt cache; "
            "cached: with an ideal one (estimated)."
        )
    faults = sum(row.faults for row in table)
    if faults:
        found.append(f"{faults} episodes were lost to faults and are in no rate.")
    if apart := {line for panel in said for line in panel.get("deviations", ())}:
        found.append(f"Not as the panel says: {'; '.join(sorted(apart))}.")
    return found
