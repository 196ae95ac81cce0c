"""Scoring by a server: sampled tokens, and the teacher's likeliest ones; never whole distributions.

Invariants
----------
* A stream is one request, whatever its number of turns.
* Where a divergence needs the scorer's ``top_k`` likeliest tokens alone, the column ``hidden``
  holds their ids and log-probabilities side by side [N, 2K], and :meth:`RemoteScorer.head` makes
  logits of them that are exact at those tokens and spread the rest evenly. What would read the rest
  is refused before anything runs (:mod:`agentdistill.methods.needs`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from agentdistill.engines.base import Engine, ScoreRequest, Scores
from agentdistill.errors import EngineError
from agentdistill.rollout import run
from agentdistill.table import Table, column, gather
from agentdistill.teachers.scorer import Scorer
from agentdistill.views import PLAIN


class RemoteScorer(Scorer):
    """An engine elsewhere that scores tables."""

    def __init__(self, name: str, engine: Engine, vocabulary: int, top_k: int = 0) -> None:
        """Nothing is asked yet.

        Args:
            name: what columns call this scorer.
            engine: scores token ids.
            vocabulary: V of the student, with which distributions are compared.
            top_k: how many of the likeliest tokens :meth:`score` asks for where it wants
                ``hidden``.
        """
        self.name, self.engine, self.vocabulary, self.top_k = name, engine, vocabulary, top_k

    def score(
        self,
        table: Table,
        want: Iterable[str] = ("logp",),
        *,
        view: str = PLAIN,
        rows: Tensor | None = None,
        micro_tokens: int = 16384,
    ) -> int:
        """As :meth:`LocalScorer.score`; ``micro_tokens`` is the server's business.

        Raises:
            EngineError: ``want`` needs more than a server says, or no answer came.

        Returns:
            The number of ids that were read there.
        """
        want = tuple(want)
        gives = {"logp", "hidden"} if self.top_k else {"logp"}
        if unknown := sorted(set(want) - gives):
            missing = ", ".join(unknown)
            raise EngineError(f"scorer {self.name} is on a server, which cannot give {missing}")
        needed = table.valid(view) if rows is None else rows & table.valid(view)
        streams = range(len(table.streams))
        ids, positions, chosen = gather(table, view, streams, needed)
        requests = [ScoreRequest(*pair) for pair in zip(ids, positions, strict=True)]
        top_k = self.top_k if "hidden" in want else 0
        scored = run(self.engine.score(requests, top_k=top_k)) if requests else []
        for what in want:
            empty = torch.full((len(table),), math.nan)
            values = torch.cat([_values(what, each) for each in scored]) if scored else empty[:0]
            full = empty if values.dim() == 1 else empty[:, None].repeat(1, values.shape[1])
            full[chosen] = values
            table[column(what, self.name, view)] = full
        return sum(int(where[-1]) for where in positions)

    def head(self, hidden: Tensor) -> Tensor:
        """Ids and log-probabilities [n, 2K] → log-probabilities [n, V]; see the module."""
        ids, logp = hidden.chunk(2, -1)
        size = self.vocabulary
        if len(ids):  # a padded head has ids that no tokenizer knows
            size = max(size, int(ids.max()) + 1)
        rest = size - ids.shape[-1]
        left = (-torch.expm1(logp.logsumexp(-1, keepdim=True).clamp_max(-1e-6))).log()
        logits = (left - math.log(max(rest, 1))).repeat(1, size)
        return logits.scatter(-1, ids.long(), logp)


def _values(what: str, scores: Scores) -> Tensor:
    """A column's part of one stream."""
    if what == "logp":
        return torch.from_numpy(scores.logp)
    assert scores.top_ids is not None and scores.top_logp is not None
    pair: list[Any] = [scores.top_ids.astype("float32"), scores.top_logp]
    return torch.cat([torch.from_numpy(values) for values in pair], -1)
