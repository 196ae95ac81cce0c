"""Losses by their formulas, and one scored table to try them on.

The reference runs each sequence alone, keeps all logits, writes the loss as its formula and takes
means by dictionary. Row weights and the norms inside the model are float32 by design, so numbers
agree to about 1e-7.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from agentdistill import advantage, divergence
from agentdistill.objective import Divergence, Term, TokenLoss
from agentdistill.optimise import Batch, Head, backward
from agentdistill.table import Table
from tests.dense import episodes, gradient, keys, make_model, mean_over, scored_table, table_logits

CLOSE = 1e-6
"""Relative difference of what is equal up to rounding."""


def models() -> tuple[Any, Any, Any]:
    """Student, the student before an update, teacher."""
    student, old = make_model(0), make_model(0)
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in old.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=source, dtype=weight.dtype)
    return student, old, make_model(1)


@cache
def bench() -> tuple[Table, Any, Any]:
    """The usual table with teacher's columns, weights and advantages, and the two models."""
    table, student, teacher = scored_table(episodes(), models)
    source = torch.Generator().manual_seed(6)
    table["advantage"] = torch.randn(len(table), generator=source, dtype=torch.float64)
    table["weight/w"] = torch.rand(len(table), generator=source, dtype=torch.float64)
    table["rows/some"] = torch.rand(len(table), generator=source) < 0.6
    return table, student, teacher


def heads() -> dict[str, Head]:
    return {"teacher": bench()[2].get_output_embeddings()}


def run(
    term: Term, *more: Term, table: Table | None = None, **options: Any
) -> tuple[Batch, Tensor]:
    """Batch and gradient of the student."""
    own, student, _ = bench()
    options = {"micro_tokens": 1 << 20, **options}
    batch = backward(student, own if table is None else table, [term, *more], heads(), **options)
    return batch, gradient(student)


# -- losses, each by its formula ------------------------------------------------------------------

Formula = Callable[[Tensor, Tensor, Table], Tensor]


def _rkl(log_s: Tensor, log_t: Tensor, table: Table) -> Tensor:
    return (log_s.exp() * (log_s - log_t)).sum(-1)


def _fkl(log_s: Tensor, log_t: Tensor, table: Table) -> Tensor:
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def _jsd(log_s: Tensor, log_t: Tensor, table: Table) -> Tensor:
    mixed = (0.7 * log_s.exp() + 0.3 * log_t.exp()).log()
    return 0.3 * (log_t.exp() * (log_t - mixed)).sum(-1) + 0.7 * (
        log_s.exp() * (log_s - mixed)
    ).sum(-1)


def _nll(log_s: Tensor, log_t: Tensor, table: Table) -> Tensor:
    return -log_s[torch.arange(len(table)), table["token"]]


def _ppo(log_s: Tensor, log_t: Tensor, table: Table) -> Tensor:
    ratio = (-_nll(log_s, log_t, table) - table["logp/old"]).exp()
    gain = table["advantage"]
    return -torch.minimum(ratio * gain, ratio.clamp(0.9, 1.1) * gain)


def _rho_k3(log_s: Tensor, log_t: Tensor, table: Table) -> Tensor:
    live = -_nll(log_s, log_t, table)
    ell = live - table["logp/teacher"]
    return (live - table["logp/old"]).exp() * ((-ell).exp() - 1 + ell)


TIGHT = {"clip_low": 0.1, "clip_high": 0.1, "dual_clip": None}
LOSSES: dict[str, tuple[Any, Formula]] = {
    "reverse_kl": (Divergence("teacher", divergence.reverse_kl), _rkl),
    "forward_kl": (Divergence("teacher", divergence.forward_kl), _fkl),
    "jsd": (Divergence("teacher", partial(divergence.jsd, beta=0.3)), _jsd),
    "nll": (TokenLoss((), lambda logp, _: -logp), _nll),
    "ppo": (
        TokenLoss(
            ("logp/old", "advantage"),
            lambda logp, c: advantage.ppo_loss(logp, c["logp/old"], c["advantage"], **TIGHT),
        ),
        _ppo,
    ),
    "rho_k3": (
        TokenLoss(
            ("logp/old", "logp/teacher"),
            lambda logp, c: divergence.rho_k3(logp, c["logp/teacher"], c["logp/old"]),
        ),
        _rho_k3,
    ),
}


def term_of(name: str, **options: Any) -> Term:
    return Term(name, LOSSES[name][0], **options)


def dense(name: str, *, over: str = "token", rows: Tensor | None = None, coef: float = 1.0,
          weight: str | None = None) -> Tensor:  # fmt: skip
    """The same objective as one sum over all logits."""
    table, student, teacher = bench()
    log_s = table_logits(student, table).log_softmax(-1)
    log_t = table_logits(teacher, table).log_softmax(-1).detach()
    values = LOSSES[name][1](log_s, log_t, table)
    values = values if weight is None else values * table[weight]
    kept = [True] * len(table) if rows is None else rows.tolist()
    return coef * mean_over(values, keys(table, over), kept)
