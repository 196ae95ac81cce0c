"""Planted faults: each breaks one thing, and a number that is otherwise 0 must say so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agentdistill import advantage, divergence, optimise, views
from agentdistill import table as tables
from agentdistill.engines.base import Engine
from agentdistill.engines.hf import HFEngine
from agentdistill.frames import Frames
from agentdistill.methods import steps
from agentdistill.objective import Term
from agentdistill.policy import ModelPolicy
from agentdistill.records import Author, StreamBuilder
from agentdistill.render import Conversation, Reply
from agentdistill.table import Table
from agentdistill.teachers import scorer
from agentdistill.views import View
from tests.faults import watch

HEALTHY, BROKEN = 2e-5, 1e-2
"""What a number is at most when all is well, and at least with a fault planted."""

Plant = Callable[[pytest.MonkeyPatch], None]
PLANTS: list[tuple[str, Plant, Callable[[], float]]] = []


def fault(name: str, number: Callable[[], float]) -> Callable[[Plant], Plant]:
    """Register a fault under ``name``, with the number that must move."""

    def add(plant: Plant) -> Plant:
        PLANTS.append((name, plant, number))
        return plant

    return add


# -- positions and tokens -------------------------------------------------------------------------


@fault("mask shifted by one in the update", watch.gradient_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    true = optimise.hidden_states

    def shifted(model: Any, ids: Any, where: Any, **options: Any) -> Tensor:
        return true(model, ids, [np.maximum(w - 1, 1) for w in where], **options)

    patch.setattr(optimise, "hidden_states", shifted)


@fault("mask shifted by one in the scorer", watch.sampler_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    true = scorer.hidden_states
    later = lambda ids, where: [np.minimum(w + 1, len(i)) for i, w in zip(ids, where, strict=True)]  # noqa: E731
    patch.setattr(
        scorer, "hidden_states", lambda m, ids, where, **o: true(m, ids, later(ids, where), **o)
    )


@fault("rows shifted by one", watch.trained_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    true = tables.rows_of
    view = lambda t, s: View(t.streams[s].ids, true(t.streams[s]) - 1)  # noqa: E731
    patch.setattr(tables, "rows_of", lambda stream: true(stream) - 1)
    patch.setattr(tables, "plain", view)


@fault("teacher scored with other tokens", watch.gradient_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    true = scorer.log_probs_at
    patch.setattr(scorer, "log_probs_at", lambda m, hidden, token: true(m, hidden, token.roll(1)))


@fault("log-probabilities filed under other rows", watch.sampler_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    true = scorer.gather

    def gather(*args: Any) -> Any:
        ids, where, rows = true(*args)
        return ids, where, rows.flip(0)

    patch.setattr(scorer, "gather", gather)


@fault("shown responses trained again", watch.trained_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    true = StreamBuilder.extend

    def extend(self: StreamBuilder, prompt: Any, response: Any, **options: Any) -> Any:
        shown = [Author.ACTOR if a == Author.CONTEXT else a for a in options["prompt_author"]]
        return true(self, prompt, response, **{**options, "prompt_author": shown})

    patch.setattr(StreamBuilder, "extend", extend)


# -- templates ------------------------------------------------------------------------------------


@fault("beginning of the sequence twice", watch.template_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    true = Frames.opening
    patch.setattr(Frames, "opening", lambda self, text: self.head[:1] + true(self, text))


@fault("end of a turn missing", watch.template_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    def reply(self: Conversation, ids: list[int], authors: list[int], said: Reply) -> None:
        ids += said.ids[:-1]
        authors += [0] * (len(said.ids) - 1)

    patch.setattr(Conversation, "_reply", reply)


@fault("end of a turn twice", watch.template_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    true = Frames.probe.__func__  # type: ignore[attr-defined]

    def probe(cls: type[Frames], tokenizer: Any) -> Frames:
        found = true(cls, tokenizer)
        return dataclasses.replace(found, between=tokenizer.eos_token + found.between)

    patch.setattr(Frames, "probe", classmethod(probe))


@fault("instruction left out", watch.template_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Frames, "opening", lambda self, text: self.head)


@fault("window forgets a turn too many", watch.forgotten)
def _(patch: pytest.MonkeyPatch) -> None:
    true = Conversation.ask

    def ask(self: Conversation, observation: str, admissible: Any = (), **more: Any) -> Any:
        kept = self._shown, self._replies
        self._shown, self._replies = kept[0][1:], kept[1][1:]
        try:
            return true(self, observation, admissible, **more)
        finally:
            self._shown, self._replies = kept

    patch.setattr(Conversation, "ask", ask)


@fault("sampled ids decoded and encoded again", watch.forgotten)
def _(patch: pytest.MonkeyPatch) -> None:
    true = ModelPolicy._catch_up

    def catch_up(self: ModelPolicy, conversation: Conversation, episode: Any) -> None:
        episode.replies[:] = [None] * len(episode.replies)
        true(self, conversation, episode)

    patch.setattr(ModelPolicy, "_catch_up", catch_up)


# -- weights and contexts -------------------------------------------------------------------------


@fault("keys and values of old weights kept", watch.stale_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HFEngine, "publish", Engine.publish)


@fault("new weights not published", watch.stale_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HFEngine, "publish", lambda self, version: self._kv.clear())


@fault("student scored in place of the teacher", watch.gradient_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    true = scorer.LocalScorer.__init__
    other = lambda self, name, model: true(self, name, watch.model("student"))  # noqa: E731
    patch.setattr(scorer.LocalScorer, "__init__", other)


@fault("hint not injected", watch.hint_silence)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(views, "splice", lambda stream, _: View(stream.ids, views.rows_of(stream)))


@fault("hint built, but every view is the plain one", watch.hint_silence)
def _(patch: pytest.MonkeyPatch) -> None:
    true = Table.add_view
    patch.setattr(Table, "add_view", lambda self, name, _: true(self, name, views.plain))


@fault("hint read at a shifted position", watch.hinted_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    true = scorer.gather

    def gather(table: Table, view: str, streams: Any, needed: Tensor) -> Any:
        ids, where, rows = true(table, view, streams, needed)
        return ids, [w - 1 for w in where], rows

    patch.setattr(scorer, "gather", gather)


# -- numbers --------------------------------------------------------------------------------------


@fault("KL in the other direction", watch.gradient_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(divergence.DIVERGENCES, "reverse_kl", divergence.forward_kl)


@fault("forward KL in the other direction", watch.gradient_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(divergence.DIVERGENCES, "forward_kl", divergence.reverse_kl)


@fault("advantage with the wrong sign", watch.gradient_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    true = steps.signal

    def turned(work: steps.Work) -> None:
        true(work)
        for name in [name for name in work.table.columns if name.startswith("signal/")]:
            work.table[name] = -work.table[name]

    patch.setitem(steps.STEPS, "signal", turned)


@fault("reward not centred", watch.gradient_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(advantage, "grpo", lambda reward, group, valid, **_: reward)


def _dropped(value: float, share: slice) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        true = Table.__setitem__

        def put(self: Table, name: str, values: Tensor) -> None:
            if name in ("logp/teacher", "hidden/teacher"):
                values[share] = value
            true(self, name, values)

        patch.setattr(Table, "__setitem__", put)

    return plant


fault("teacher's column all zeros", watch.gradient_gap)(_dropped(0.0, slice(None)))
fault("one row of the teacher's column zero", watch.gradient_gap)(_dropped(0.0, slice(3, 4)))
fault("one row of the teacher's column lost", watch.gradient_gap)(
    _dropped(float("nan"), slice(3, 4))
)


@fault("turn column off by one", watch.turn_profile_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    true = tables._turns
    patch.setattr(tables, "_turns", lambda t, s, rows: true(t, s, rows) + 1)


@fault("turn column moved by a row", watch.turn_profile_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    true = tables._turns
    patch.setattr(tables, "_turns", lambda t, s, rows: np.roll(true(t, s, rows), 1))


@fault("turn column moved by a row, in the loss", watch.gradient_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    true = tables._turns
    patch.setattr(tables, "_turns", lambda t, s, rows: np.roll(true(t, s, rows), 1))


@fault("turns of different episodes in one unit", watch.gradient_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Table, "units", lambda self, over: self.index[over])


def _per_part(patch: pytest.MonkeyPatch) -> None:
    true = optimise._micro

    def micro(
        model: Any, table: Table, view: str, terms: list[Term], weights: Mapping[str, Tensor],
        heads: Any, needed: Tensor, streams: list[int], *rest: Any,
    ) -> None:  # fmt: skip
        part = torch.isin(table["stream"], torch.tensor(streams))
        own = {term.name: term.row_weights(table, part) for term in terms}
        true(model, table, view, terms, own, heads, needed, streams, *rest)

    patch.setattr(optimise, "_micro", micro)


fault("denominators of each micro-batch", watch.gradient_gap)(_per_part)
fault("denominators of each micro-batch, by order", watch.order_gap)(_per_part)


@fault("a chunk lost", watch.gradient_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    true = optimise._chunk

    def chunk(*args: Any) -> None:
        if args[6] == 0:
            true(*args)

    patch.setattr(optimise, "_chunk", chunk)


@fault("gradient stops at the head", watch.gradient_gap)
def _(patch: pytest.MonkeyPatch) -> None:
    true = optimise.hidden_states
    cut = lambda *args, **options: true(*args, **options).detach().requires_grad_()  # noqa: E731
    patch.setattr(optimise, "hidden_states", cut)


# -------------------------------------------------------------------------------------------------

NUMBERS = list(dict.fromkeys(number for _, _, number in PLANTS))


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: n.__name__)
def test_healthy_numbers_are_zero(number: Callable[[], float]) -> None:
    assert number() <= HEALTHY


@pytest.mark.parametrize(("plant", "number"), [p[1:] for p in PLANTS], ids=[p[0] for p in PLANTS])
def test_faults_are_seen(
    plant: Plant, number: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch.recorded()  # before anything is broken
    plant(monkeypatch)
    assert number() > BROKEN
