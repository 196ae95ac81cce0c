"""The student as its own teacher: at its start, at present, at intervals, or as a running mean.

Invariants
----------
* What is kept are copies of the weights that are trained, and of nothing else: beside a student
  with adapters stand second adapters, not a second model. They are no parameters of any module, so
  no optimiser, no gradient and no saved model can get hold of them.
* To score, the student's parameters point to the copies for as long as that takes; afterwards they
  have their own storage again, also when scoring failed. Everything runs in one thread, like the
  engine that shares the module (:mod:`agentdistill.engines.hf`).
* A running mean is kept in float32 where weights are in half precision: a step of ``rate`` times a
  small difference is less than those can tell apart, and the mean would never move.
* From one scoring to the next the head belongs to the same weights as the hidden states, also
  while the student is updated in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from agentdistill.engines.forward import evaluating, head
from agentdistill.errors import ConfigError, EngineError
from agentdistill.table import Table
from agentdistill.teachers.scorer import LocalScorer, Scorer
from agentdistill.views import PLAIN, View

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Update = Literal["frozen", "live", "sync", "ema"]


class SelfScorer(LocalScorer):
    """The student's weights, past or present, as a scorer (section 1.8 of the methods).

    ``frozen`` keeps the weights of the moment when it is built, ``live`` reads the present ones,
    ``sync`` copies them before the rollout of every ``every``-th iteration (Skill-SD), and ``ema``
    moves towards them after each iteration (SDPO).
    """

    def __init__(
        self,
        name: str,
        student: PreTrainedModel,
        update: Update,
        *,
        every: int = 1,
        rate: float = 0.05,
    ) -> None:
        """Copy what ``update`` needs.

        Args:
            name: what columns call this scorer.
            student: shared; its parameters that require gradients are the ones that move.
            update: when the copies change.
            every: of ``sync``: iterations between copies.
            rate: of ``ema``: teacher ← (1 - rate) · teacher + rate · student.

        Raises:
            ConfigError: an unknown update, every < 1, or a rate outside (0, 1].
        """
        super().__init__(name, student)
        for key, value, fine in (
            ("update", update, update in get_args(Update)),
            ("every", every, every >= 1),
            ("rate", rate, 0 < rate <= 1),
        ):
            if not fine:
                remedy = "use one of " + ", ".join(get_args(Update)) + "; every >= 1; 0 < rate <= 1"
                raise ConfigError(remedy, key=f"scorer.{key}", value=value)
        self.update, self.every, self.rate = update, every, rate
        self._student = {n: p for n, p in student.named_parameters() if p.requires_grad}
        own = {id(parameter) for parameter in head(student).parameters()}
        self._in_head = [n for n, p in self._student.items() if id(p) in own]
        self._held = {} if update == "live" else self._copy(self._student)
        self._means = {}
        if update == "ema":
            self._means = {name: _wide(held) for name, held in self._held.items()}
        self._head = {n: self._held[n] for n in self._in_head if n in self._held}

    @property
    def present(self) -> bool:
        """Whether these are the student's weights of this moment (K12)."""
        return all(torch.equal(self._student[name], held) for name, held in self._held.items())

    @torch.no_grad()
    def before(self, n: int) -> None:
        """Called before the rollout of iteration ``n``."""
        if self.update == "sync" and n % self.every == 0:
            for name, held in self._held.items():
                held.copy_(self._student[name])

    @torch.no_grad()
    def after(self) -> None:
        """Called after the updates of an iteration."""
        if self.update == "live":
            self._head = {}
        for name, mean in self._means.items():
            mean.lerp_(self._student[name].to(mean.dtype), self.rate)
        self._round()

    def score(
        self,
        table: Table,
        want: Iterable[str] = ("logp",),
        *,
        view: str = PLAIN,
        rows: Tensor | None = None,
        micro_tokens: int = 16384,
    ) -> int:
        """As :meth:`LocalScorer.score`, by the copies."""
        want = tuple(want)
        if self.update == "live" and "hidden" in want:
            self._head = self._copy(self._in_head)
        with self._wearing(self._held):
            return super().score(table, want, view=view, rows=rows, micro_tokens=micro_tokens)

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, H] of the last scoring → logits [n, V], without gradients."""
        with self._wearing(self._head), evaluating(head(self.model).modules()):
            return super().head(hidden)

    def state_dict(self) -> dict[str, Any]:
        """The copies, or the means that they are rounded from; nothing for ``live``.

        Also for ``frozen``: its weights are those of the stage's start only for who builds it
        before a checkpoint is loaded, and nothing here can see that.
        """
        return {"weights": dict(self._means or self._held)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, on whatever device it was read to.

        Raises:
            EngineError: it is the state of another student or another update; nothing changed.
        """
        saved, mine = state["weights"], self._means or self._held
        if _shapes(saved) != _shapes(mine):
            raise EngineError(
                f"the checkpoint's copy for scorer {self.name} ({self.update}) is not of this "
                "student: go on with the configuration that it was saved with"
            )
        for name, values in mine.items():
            values.copy_(saved[name])
        self._round()

    def _copy(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._student[name].detach().clone() for name in names}

    def _round(self) -> None:
        """Give the copies the values of the means, where those are apart."""
        for name, mean in self._means.items():
            if mean is not self._held[name]:
                self._held[name].copy_(mean)

    @contextmanager
    def _wearing(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """The student's parameters of these names read ``values`` inside."""
        own = {name: self._student[name].data for name in values}
        try:
            for name, tensor in values.items():
                self._student[name].data = tensor
            yield
        finally:
            for name, tensor in own.items():
                self._student[name].data = tensor


def silent(scorer: Scorer, table: Table, view: str = PLAIN, own: str = PLAIN) -> Tensor:
    """Rows [N], bool, on which ``scorer`` can only say what the student says (K12).

    Those where it is the student's present weights and has read exactly what the student read. To
    be counted over the rows that are scored, after scoring and before the update.

    Args:
        scorer: any scorer.
        table: with both views.
        view: what the scorer reads.
        own: what the trained student reads.
    """
    same = np.zeros(len(table), bool)
    if scorer.present:
        pairs = zip(table.views[view], table.views[own], strict=True)
        for number, (read, mine) in enumerate(pairs):
            if read is not None and mine is not None:
                same[table.rows(number)] = _same_past(read, mine)
    return torch.from_numpy(same)


def _same_past(one: View, other: View) -> Any:
    """Per row, bool: whether both views show the same ids before it; row p is read from ids[:p]."""
    size = min(len(one.ids), len(other.ids))
    differs = np.flatnonzero(one.ids[:size] != other.ids[:size])
    until = differs[0] if len(differs) else size
    there = (one.positions > 0) & (one.positions <= until)
    return there & (one.positions == other.positions)


def _wide(values: Tensor) -> Tensor:
    """``values``, or a float32 copy of them in half precision."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _shapes(values: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in values.items()}
