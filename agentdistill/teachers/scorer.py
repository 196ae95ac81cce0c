"""In-process scoring: what a set of weights says about the rows of a table.

On one machine a teacher is scored here, as hidden states and a chunked head; scoring over HTTP is
for teachers elsewhere. A scorer reads a *view* of each stream, so a teacher with privileged
context, a second copy or the student's own past (``old``) are the same thing with another view.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agentdistill.engines.forward import hidden_states, log_probs_at, logits
from agentdistill.optimise import gather
from agentdistill.table import Table, column
from agentdistill.views import PLAIN

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LocalScorer:
    """Weights in this process that score tables."""

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        """``name`` is what columns call this scorer."""
        self.name, self.model = name, model

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, H] → logits [n, V]."""
        return logits(self.model, hidden)

    @torch.no_grad()
    def score(
        self,
        table: Table,
        want: Iterable[str] = ("logp",),
        *,
        view: str = PLAIN,
        rows: Tensor | None = None,
        micro_tokens: int = 16384,
    ) -> int:
        """Add the columns ``what/name@view`` for every ``what`` in ``want``; return scored ids.

        Args:
            table: to be scored; rows outside ``rows`` or without the view get NaN (0 for hidden).
            want: of ``logp``, ``entropy`` (nats, temperature 1) and ``hidden`` [N, H].
            view: what the scorer reads.
            rows: bool [N]; None scores every row.
            micro_tokens: ids per forward pass.
        """
        wanted = set(want)
        needed = table.valid(view) if rows is None else rows & table.valid(view)
        found: dict[str, Tensor] = {}
        tokens = 0
        training = self.model.training
        self.model.train(False)
        for part in table.micro_batches(view, micro_tokens):
            ids, positions, chosen = gather(table, view, part, needed)
            if not len(chosen):
                continue
            tokens += sum(int(where[-1]) for where in positions)
            hidden = hidden_states(self.model, ids, positions)
            values = {"hidden": hidden}
            if wanted & {"logp", "entropy"}:
                token = table.index["token"][chosen].to(hidden.device)
                values["logp"], values["entropy"] = log_probs_at(self.model, hidden, token)
            for what in wanted:
                found.setdefault(what, _empty(values[what], len(table)))
                found[what][chosen.to(found[what].device)] = _place(values[what], what)
        self.model.train(training)
        for what, values_N in found.items():
            table[column(what, self.name, view)] = values_N
        return tokens


def _empty(like: Tensor, size: int) -> Tensor:
    """Zeros on the device for hidden states (they stay there), NaN on the CPU for numbers."""
    if like.dim() > 1:
        return torch.zeros(size, like.shape[1], dtype=like.dtype, device=like.device)
    return torch.full((size,), float("nan"))


def _place(values: Tensor, what: str) -> Tensor:
    return values if what == "hidden" else values.float().cpu()
