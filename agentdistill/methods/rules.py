"""Weights and routes by name: what a paper adds on one axis is one small function here.

A rule reads columns of one table and gives one detached number per row. Invariants: rules see rows,
never models or environments; they run after the pre-pass and before the first backward, so what
they say is fixed for the whole update; what a rule needs scored is declared, and is scored for it.

A paper's own rule is registered in its own file in ``methods/``, with :func:`rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentdistill.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from agentdistill.methods.space import Axes, Choice
    from agentdistill.table import Table

LEVELS = ("token", "step", "trajectory", "shift", "route")
"""Where a rule stands: three factors of the signal, an additive calibration of the advantage, and
the choice of rows."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What a rule sees.

    Attributes:
        table: all rows.
        mask: rows of the signal in question [N], bool.
        column: scorer's column by short name (``logp/teacher``) in the view it was read in.
    """

    table: Table
    mask: Tensor
    column: Callable[[str], Tensor]

    @property
    def rewards(self) -> Tensor:
        """Whether each trajectory was a success [B], as 0 and 1."""
        import torch

        return torch.tensor([float(t.success) for t in self.table.trajectories])

    def spread(self, values: Sequence[float] | Tensor) -> Tensor:
        """One number per trajectory → the same on all its rows [N]."""
        import torch

        return self.table.spread(torch.as_tensor(values))


@dataclass(frozen=True, slots=True)
class Rule:
    """One registered function.

    Attributes:
        level: of :data:`LEVELS`.
        name: what configurations call it.
        compute: (rows, **parameters) → factor [N], shift [N] or choice of rows [N] (bool).
        defaults: its parameters.
        needs: of ``logp/old``, ``entropy/old``, ``logp/teacher``, ``entropy/teacher``.
        source: where it was published.
        report: (rows, **parameters) → what is worth logging, or None.
    """

    level: str
    name: str
    compute: Callable[..., Tensor]
    defaults: Mapping[str, float]
    needs: frozenset[str] = frozenset()
    source: str = ""
    report: Callable[..., dict[str, float]] | None = None


RULES: dict[tuple[str, str], Rule] = {}
"""Every rule by level and name."""


def rule(
    level: str,
    name: str,
    *,
    needs: Sequence[str] = (),
    source: str = "",
    report: Callable[..., dict[str, float]] | None = None,
    **defaults: float,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register the decorated function as the rule ``name`` of ``level``.

    Raises:
        ValueError: the level is unknown, or the name is taken.
    """
    if level not in LEVELS:
        raise ValueError(f"level {level!r}: one of {', '.join(LEVELS)}")

    def register(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if (level, name) in RULES and RULES[level, name].compute is not compute:
            raise ValueError(f"{level} rule {name!r} exists already")
        columns = frozenset(needs)
        RULES[level, name] = Rule(level, name, compute, defaults, columns, source, report)
        return compute

    return register


def find(level: str, choice: Choice, axes: str = "axes") -> Rule:
    """The rule that ``choice`` names.

    Raises:
        ConfigError: with the known names or parameters; ``axes`` is where they stand.
    """
    key = f"{axes}.signal.route" if level == "route" else f"{axes}.weight.{level}"
    found = RULES.get((level, choice.name))
    if found is None:
        known = ", ".join(name for where, name in RULES if where == level)
        raise ConfigError(f"one of none, {known}", key=key, value=choice.name)
    for name in sorted(choice.parameters.keys() - found.defaults.keys()):
        known = ", ".join(found.defaults) or "none"
        message = f"no parameter of {choice.name}; known: {known}"
        raise ConfigError(message, key=f"{key}.{name}", value=choice.parameters[name])
    return found


def apply(level: str, choice: Choice, rows: Rows) -> Tensor:
    """What the chosen rule says of ``rows`` [N], detached."""
    found = find(level, choice)
    return found.compute(rows, **{**found.defaults, **choice.parameters}).detach()


def report(level: str, choice: Choice, rows: Rows) -> dict[str, float]:
    """What the chosen rule finds worth logging."""
    found = find(level, choice)
    if found.report is None or not bool(rows.mask.any()):
        return {}
    return found.report(rows, **{**found.defaults, **choice.parameters})


def chosen(axes: Axes) -> list[tuple[str, Choice]]:
    """(level, choice) of every rule of a point."""
    weight = axes.weight
    found: list[tuple[str, Any]] = [
        ("token", weight.token),
        ("step", weight.step),
        ("trajectory", weight.trajectory),
        ("shift", weight.shift),
        ("route", axes.reward.route),
        *(("route", signal.route) for signal in axes.signals),
    ]
    return [(level, choice) for level, choice in found if choice]


def needs(axes: Axes) -> frozenset[str]:
    """Columns that the rules of a point need."""
    return frozenset().union(*(find(level, choice).needs for level, choice in chosen(axes)))


# -- routes: which rows ---------------------------------------------------------------------------


@rule("route", "success")
def _success(rows: Rows) -> Tensor:
    """Rows of successful episodes."""
    return rows.spread(rows.rewards) > 0


@rule("route", "failure")
def _failure(rows: Rows) -> Tensor:
    """Rows of episodes that did not succeed."""
    return rows.spread(rows.rewards) == 0


@rule("route", "above", threshold=1.0)
def _above(rows: Rows, threshold: float) -> Tensor:
    """Rows of episodes whose score reaches the threshold."""
    return rows.spread([float(t.score) for t in rows.table.trajectories]) >= threshold


@rule("route", "rest")
def _rest(rows: Rows) -> Tensor:
    """Rows that carry no signal (of the reward's route only)."""
    return ~rows.mask
