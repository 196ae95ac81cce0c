"""Scoring: what a set of weights says about the rows of a table.

On one machine a teacher is scored here, as hidden states and a chunked head; scoring over HTTP
(:mod:`agentdistill.teachers.remote`) is for teachers elsewhere. A scorer reads a *view* of each
stream, so a teacher with privileged context, a second copy or the student's own past (``old``) are
the same thing with another view.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agentdistill.engines.forward import (
    device_of,
    evaluating,
    hidden_states,
    log_probs_at,
    logits,
)
from agentdistill.table import Table, column, gather
from agentdistill.views import PLAIN

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Scorer(ABC):
    """Whoever scores tables: weights in this process, or a server."""

    name: str

    @property
    def present(self) -> bool:
        """Whether these are the student's weights of this moment (K12); another model never is."""
        return False

    def before(self, n: int) -> None:  # noqa: B027  (optional)
        """Called before the rollout of iteration ``n``; these weights stay as they are."""

    def after(self) -> None:  # noqa: B027  (optional)
        """Called after the updates of an iteration; these weights stay as they are."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, for the training loop: nothing of weights that stay."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  (optional)
        """Go on from :meth:`state_dict`."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """What the column ``hidden`` holds of some rows → logits [n, V]."""

    @abstractmethod
    def score(
        self,
        table: Table,
        want: Iterable[str] = ("logp",),
        *,
        view: str = PLAIN,
        rows: Tensor | None = None,
        micro_tokens: int = 16384,
    ) -> int:
        """Add the columns ``what/name@view`` for every ``what`` in ``want``; return scored ids."""


class LocalScorer(Scorer):
    """Weights in this process that score tables."""

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        """``name`` is what columns call this scorer."""
        self.name, self.model = name, model

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, H] → logits [n, V], where the hidden states are.

        The student's may be on another device than this model.
        """
        return logits(self.model, hidden.to(device_of(self.model))).to(hidden.device)

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
            table: to be scored; rows outside ``rows`` or without the view get NaN.
            want: of ``logp``, ``entropy`` (nats, temperature 1) and ``hidden`` [N, H].
            view: what the scorer reads.
            rows: bool [N]; None scores every row.
            micro_tokens: ids per forward pass.
        """
        needed = table.valid(view) if rows is None else rows & table.valid(view)
        found = {what: self._empty(what, len(table)) for what in want}
        tokens = 0
        with evaluating(self.model.modules()):
            for part in table.micro_batches(view, micro_tokens):
                ids, positions, chosen = gather(table, view, part, needed)
                if not len(chosen):
                    continue
                tokens += sum(int(where[-1]) for where in positions)
                values = self._read(table, found, ids, positions, chosen)
                for what, column_N in found.items():
                    column_N[chosen.to(column_N.device)] = values[what].to(column_N)
        for what, column_N in found.items():
            table[column(what, self.name, view)] = column_N
        return tokens

    def _read(
        self, table: Table, want: Iterable[str], ids: list[Any], where: list[Any], rows: Tensor
    ) -> dict[str, Tensor]:
        """Everything in ``want`` of one micro-batch."""
        hidden = hidden_states(self.model, ids, where)
        values = {"hidden": hidden}
        if {"logp", "entropy"} & set(want):
            token = table.index["token"][rows].to(hidden.device)
            values["logp"], values["entropy"] = log_probs_at(self.model, hidden, token)
        return values

    def _empty(self, what: str, size: int) -> Tensor:
        """NaN: on the model's device for hidden states (they stay there), else on the CPU."""
        if what != "hidden":
            return torch.full((size,), float("nan"))
        none = hidden_states(self.model, [], [])
        return none.new_full((size, none.shape[1]), float("nan"))
