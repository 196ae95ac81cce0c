"""What is minimised: a list of terms over views of one table.

    L = Σ_terms coef · Σ_i a_i · w_i · loss_i

``w`` is detached, one number per row; ``a`` is the reduction (mean over tokens, turns, steps,
streams, trajectories or groups). Invariants: ``a`` is computed over the whole optimiser batch (and
all ranks) before the first backward, so that splitting into micro-batches or ranks changes nothing;
a term never sees more of the student than the live log-probability of the row's token, or one
chunk of rows of its distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from agentdistill.config import Over
from agentdistill.table import Table, column
from agentdistill.views import PLAIN
from agentdistill.weighting import count_units, reduce_weights, tokens_per_unit

LIVE = "live"
"""In place of a scorer: the student's own logits at that moment, detached."""


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """A loss on the live log-probability of each row's token.

    Attributes:
        needs: names of the columns that ``function`` reads.
        function: (live log-probability [n], columns [n]) → loss [n].
    """

    needs: tuple[str, ...]
    function: Callable[[Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class Divergence:
    """A loss on the whole distributions of student and teacher.

    Attributes:
        scorer: whose distribution is the target.
        function: (student logits [n, V], teacher logits [n, V]) → loss [n].
        scorer_view: the view that the scorer read.
        share: the scorer's share in the target's logits; the target is
            softmax(share · scorer + (1 - share) · rest).
        rest: scorer (of the stream itself) that has the other share, or :data:`LIVE`.
    """

    scorer: str
    function: Callable[[Tensor, Tensor], Tensor]
    scorer_view: str = PLAIN
    share: float = 1.0
    rest: str = ""

    @property
    def hidden(self) -> str:
        """The column with the scorer's hidden states [N, H]."""
        return column("hidden", self.scorer, self.scorer_view)


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of the objective.

    Attributes:
        name: of the term, for metrics.
        loss: what is summed.
        rows: boolean column that selects rows; None selects what the actor wrote.
        view: the view in which the student is trained.
        coef: the term's coefficient.
        weight: column of detached row weights, or None for ones.
        over: the index set of the mean: every unit counts the same, and within a unit every row.
        clip: largest loss of one row, with no gradient beyond.
        ratio: (column, cap): multiply by min(exp(live log-probability - column), cap), detached.
        shared: boolean column whose rows define the denominators in place of the term's own
            (SRPO's shared denominator), and which holds all of the term's; None takes the term's
            own.
    """

    name: str
    loss: TokenLoss | Divergence
    rows: str | None = None
    view: str = PLAIN
    coef: float = 1.0
    weight: str | None = None
    over: Over = "token"
    clip: float | None = None
    ratio: tuple[str, float] | None = None
    shared: str | None = None

    def mask(self, table: Table) -> Tensor:
        """The term's rows [N], bool: selected, and with every view that it reads."""
        mask = (table.acted if self.rows is None else table[self.rows]) & table.valid(self.view)
        if isinstance(self.loss, Divergence):
            mask = mask & table.valid(self.loss.scorer_view)
        return mask

    def row_weights(
        self, table: Table, batch: Tensor, total: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Tensor:
        """Coef · a · w for every row [N]; 0 outside the term.

        Args:
            table: the table.
            batch: rows of this optimiser batch [N], bool.
            total: sums a number over all ranks. All rows of a unit must be on one rank: give
                whole groups to a rank where ``over`` is group.

        Raises:
            ValueError: the rows of ``shared`` do not hold those of the term.
        """
        mask = self.mask(table) & batch
        base = mask if self.shared is None else table[self.shared] & batch
        if bool((mask & ~base).any()):
            raise ValueError(f"term {self.name}: column {self.shared} lacks rows of the term")
        unit = None if self.over == "token" else table.units(self.over)
        units = int(total(torch.tensor(count_units(unit, base))))
        inner = None if unit is None else tokens_per_unit(unit, base)
        weights = reduce_weights(unit, mask, units=units, unit_tokens=inner)
        if self.weight is not None:
            weights = torch.where(mask, weights * table[self.weight], 0.0)
        return self.coef * weights


def needed_columns(terms: list[Term]) -> set[str]:
    """Names of all columns that the terms read besides their row selections."""
    needs: set[str] = set()
    for term in terms:
        if isinstance(term.loss, Divergence):
            needs.add(term.loss.hidden)
            if term.loss.rest not in ("", LIVE):
                needs.add(column("hidden", term.loss.rest))
        else:
            needs.update(term.loss.needs)
        if term.ratio is not None:
            needs.add(term.ratio[0])
        needs.update(name for name in (term.weight,) if name)
    return needs
