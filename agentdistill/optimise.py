"""From a table and a list of terms to one optimiser step.

Invariants
----------
* Memory: hidden states of the rows, and one chunk of rows times the vocabulary; never the whole
  tokens times vocabulary. The head is differentiated chunk by chunk down to the hidden states,
  whose gradient then runs through the body once.
* The result does not depend on how the batch is cut into micro-batches, chunks or ranks (up to
  floating-point order): all denominators are known before the first backward.
* Gradients are summed over ranks, never averaged, for the same reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agentdistill.config import TrainStage
from agentdistill.divergence import entropy
from agentdistill.engines.forward import hidden_states, logits, vocabulary
from agentdistill.errors import EngineError
from agentdistill.objective import LIVE, Divergence, Term, TokenLoss
from agentdistill.table import Table, column, gather

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Head = Callable[[Tensor], Tensor]
"""Hidden states [n, H] → logits [n, V]."""

CHUNK_BYTES = 1 << 26
"""Size of one float32 chunk of rows times vocabulary."""


@dataclass(slots=True)
class Batch:
    """What one optimiser batch did.

    Attributes:
        losses: value of every term, coefficient included.
        rows: number of rows with weight.
        tokens: ids that went through the student's body.
        entropy: mean entropy of the student over those rows, nats.
    """

    losses: dict[str, float] = field(default_factory=dict)
    rows: int = 0
    tokens: int = 0
    entropy: float = 0.0

    def as_metrics(self) -> dict[str, float]:
        """Flat, for logging."""
        losses = {f"loss/{name}": value for name, value in self.losses.items()}
        return {**losses, "entropy": self.entropy, "rows": self.rows, "trained_tokens": self.tokens}


def _distributed() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def all_sum(value: Tensor) -> Tensor:
    """``value`` summed over ranks where torch.distributed runs, else itself."""
    if _distributed():
        import torch.distributed as dist

        value = value.clone()
        dist.all_reduce(value)
    return value


def backward(
    model: PreTrainedModel,
    table: Table,
    terms: Sequence[Term],
    heads: Mapping[str, Head],
    *,
    micro_tokens: int,
    trajectories: Sequence[int] | None = None,
    chunk_rows: int | None = None,
) -> Batch:
    """Add the gradient of the objective over one optimiser batch to ``model``'s parameters.

    Args:
        model: the student.
        table: with every column that the terms need.
        terms: the objective.
        heads: output head of each scorer that a divergence names.
        micro_tokens: ids per forward pass.
        trajectories: numbers of the trajectories in this optimiser batch; None takes all.
        chunk_rows: rows per chunk of the head; None follows :data:`CHUNK_BYTES`.

    The loss of every row with weight, before weighting, is left in the columns ``loss/<term>``.

    Raises:
        ValueError: two terms have one name.
    """
    batch = torch.ones(len(table), dtype=torch.bool)
    if trajectories is not None:
        chosen = torch.zeros(len(table.trajectories), dtype=torch.bool)
        chosen[list(trajectories)] = True
        batch = chosen[table.index["trajectory"]]
    if len({term.name for term in terms}) < len(terms):
        raise ValueError(f"terms need different names: {', '.join(term.name for term in terms)}")
    weights = {term.name: term.row_weights(table, batch, all_sum) for term in terms}
    result = Batch({term.name: 0.0 for term in terms})
    for term in terms:
        table.columns.setdefault(f"loss/{term.name}", torch.full((len(table),), float("nan")))
    for view in dict.fromkeys(term.view for term in terms):
        mine = [term for term in terms if term.view == view]
        needed = torch.stack([weights[term.name] != 0 for term in mine]).any(0)
        for part in table.micro_batches(view, micro_tokens):
            _micro(model, table, view, mine, weights, heads, needed, part, chunk_rows, result)
    result.entropy /= max(result.rows, 1)
    return result


def _micro(
    model: PreTrainedModel,
    table: Table,
    view: str,
    terms: Sequence[Term],
    weights: Mapping[str, Tensor],
    heads: Mapping[str, Head],
    needed: Tensor,
    streams: Sequence[int],
    chunk_rows: int | None,
    result: Batch,
) -> None:
    """Forward and backward of one micro-batch of streams."""
    ids, positions, rows = gather(table, view, streams, needed)
    if not len(rows):
        return
    hidden = hidden_states(model, ids, positions)
    leaf = hidden.detach().requires_grad_(True)
    size = chunk_rows or max(16, CHUNK_BYTES // (4 * vocabulary(model)))
    for start in range(0, len(rows), size):
        _chunk(model, table, terms, weights, heads, leaf, start, rows[start : start + size], result)
    hidden.backward(leaf.grad)  # type: ignore[no-untyped-call]
    result.tokens += sum(int(where[-1]) for where in positions)
    result.rows += len(rows)


def _chunk(
    model: PreTrainedModel,
    table: Table,
    terms: Sequence[Term],
    weights: Mapping[str, Tensor],
    heads: Mapping[str, Head],
    leaf: Tensor,
    start: int,
    rows: Tensor,
    result: Batch,
) -> None:
    """Loss and gradient, down to the hidden states, of one chunk of rows."""
    device = leaf.device
    hidden = leaf[start : start + len(rows)]
    student_NV = logits(model, hidden)
    student_NV = student_NV.to(torch.promote_types(student_NV.dtype, torch.float32))
    logp = None
    if any(isinstance(term.loss, TokenLoss) or term.ratio for term in terms):
        token = table.index["token"][rows].to(device)
        logp = student_NV.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    total = torch.zeros((), device=device)
    for term in terms:
        weight = weights[term.name][rows]
        # Rows without weight must not be computed: what the term reads there may be NaN, and a
        # gradient of 0 · NaN is NaN, whatever is masked afterwards.
        mine = weight.nonzero().squeeze(1)
        if not len(mine):
            continue
        live = (logp, student_NV)
        if len(mine) < len(rows):
            some = mine.to(device)
            live = (None if logp is None else logp[some], student_NV[some])
        values = _values(term, table, rows[mine], *live, heads)
        loss = (weight[mine].to(device) * values).sum()
        total = total + loss
        result.losses[term.name] += float(loss.detach())
        table.columns[f"loss/{term.name}"][rows[mine]] = values.detach().float().cpu()
    result.entropy += float(entropy(student_NV.detach()).sum())
    total.backward()  # type: ignore[no-untyped-call]


def _values(
    term: Term,
    table: Table,
    rows: Tensor,
    logp: Tensor | None,
    student_NV: Tensor,
    heads: Mapping[str, Head],
) -> Tensor:
    """The term's loss of each row [n]; ``logp`` is there if any term reads it."""
    loss = term.loss
    if isinstance(loss, TokenLoss):
        assert logp is not None
        values = loss.function(logp, {name: _at(table, name, rows, logp) for name in loss.needs})
    else:
        target_NV = _target(loss, table, rows, student_NV, heads)
        # Heads of one tokenizer may be padded to different sizes; no token is beyond the smaller.
        size = min(student_NV.shape[-1], target_NV.shape[-1])
        values = loss.function(student_NV[..., :size], target_NV[..., :size])
    if term.clip is not None:
        values = values.clamp_max(term.clip)
    if term.ratio is not None:
        assert logp is not None
        name, cap = term.ratio
        gap = logp.detach() - _at(table, name, rows, logp)
        values = values * gap.clamp_max(math.log(cap)).exp()
    return values


def _at(table: Table, name: str, rows: Tensor, like: Tensor) -> Tensor:
    """Column ``name`` of ``rows``, on the device of ``like``."""
    values = table[name]
    return values[rows.to(values.device)].to(like.device)


@torch.no_grad()
def _target(
    loss: Divergence, table: Table, rows: Tensor, student_NV: Tensor, heads: Mapping[str, Head]
) -> Tensor:
    """Logits of the target [n, V]: the scorer's, or a mixture with another's."""
    target_NV = heads[loss.scorer](_at(table, loss.hidden, rows, student_NV))
    if not loss.rest:
        return target_NV
    if loss.rest == LIVE:
        rest_NV = student_NV.detach()
    else:
        hidden = _at(table, column("hidden", loss.rest), rows, student_NV)
        rest_NV = heads[loss.rest](hidden)
    wide, size = torch.promote_types(target_NV.dtype, torch.float32), target_NV.shape[-1]
    size = min(size, rest_NV.shape[-1])
    return torch.lerp(rest_NV[..., :size].to(wide), target_NV[..., :size].to(wide), loss.share)


def learning_rate(stage: TrainStage, progress: float) -> float:
    """Learning rate at ``progress`` in [0, 1] of the stage: warm-up, then the schedule."""
    if progress < stage.warmup:  # never 0: that would waste the first batch
        return stage.lr * max(progress / stage.warmup, 0.05)
    if stage.schedule == "constant":
        return stage.lr
    done = (progress - stage.warmup) / max(1e-9, 1 - stage.warmup)
    floor = 0.05
    return stage.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class Optimiser:
    """AdamW, the schedule, gradient clipping, and the sum over ranks.

    Weights in bfloat16 have float32 masters, on which AdamW works and of which they are the rounded
    copies: a step of ``lr`` is often smaller than what bfloat16 can tell apart, and would be lost.
    """

    def __init__(self, model: PreTrainedModel, stage: TrainStage) -> None:
        """Optimise the parameters of ``model`` that require gradients."""
        self.stage = stage
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise EngineError("the student has no trainable parameters")
        self.masters = [_master(parameter) for parameter in self.parameters]
        self.adam = torch.optim.AdamW(
            self.masters, lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay
        )

    def step(self, progress: float) -> dict[str, float]:
        """Apply the accumulated gradients and clear them; one that is not finite is an error.

        Args:
            progress: share of the stage that is done, for the learning rate.
        """
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.grad is None and _distributed():
                # Another rank may have one, and a sum needs all of them.
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                master.grad = all_sum(parameter.grad).to(master.dtype)
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self.stage.clip_norm))
        if not math.isfinite(norm):
            raise EngineError("the gradient is not finite; lower the learning rate or use float32")
        rate = learning_rate(self.stage, progress)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self._round()
        return {"lr": rate, "grad_norm": norm}

    @torch.no_grad()
    def _round(self) -> None:
        """Give the model its copies of the masters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state and the masters (None where a weight is its own)."""
        pairs = zip(self.parameters, self.masters, strict=True)
        return {
            "adam": self.adam.state_dict(),
            "masters": [None if p is m else m for p, m in pairs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; the model's own weights are loaded apart."""
        self.adam.load_state_dict(state["adam"])
        with torch.no_grad():
            for master, saved in zip(self.masters, state["masters"], strict=True):
                if saved is not None:
                    master.copy_(saved)


def _master(parameter: torch.nn.Parameter) -> Tensor:
    """What AdamW works on: the weight itself, or a float32 copy of one in half precision."""
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return parameter.detach().float().requires_grad_(True)
