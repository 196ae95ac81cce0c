"""What tests of the numeric core share: a two-layer model, trajectories by hand, plain sums.

Everything here is the slow and obvious way: one sequence per forward pass, whole distributions, a
dictionary where the library has an index column. Nothing is taken from the modules under test but
their records.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from agentdistill.records import Actor, Author, Kind, StreamBuilder, Task, Trajectory, Turn
from agentdistill.table import Table, build
from agentdistill.views import PLAIN

VOCAB, HIDDEN = 41, 16


def make_model(seed: int = 0, *, dtype: torch.dtype = torch.float64, vocab: int = VOCAB) -> Any:
    """Two layers with weights large enough that distributions are far from uniform."""
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=seed % 2 == 0,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).to(dtype)


def episode(
    seed: int,
    shape: Sequence[tuple[int, int]],
    *,
    window: int | None = None,
    vocab: int = VOCAB,
    **facts: Any,
) -> Trajectory:
    """Random tokens: per turn (context tokens, sampled tokens); the same ids for every window."""
    source, builder = random.Random(seed), StreamBuilder()
    history: list[tuple[list[int], list[int]]] = []
    turns = []
    for index, (context, sampled) in enumerate(shape):
        observation = [source.randrange(vocab) for _ in range(context)]
        response = [source.randrange(vocab) for _ in range(sampled)]
        shown = history if window is None else history[max(0, index - window) :]
        prompt = [token for pair in shown for part in pair for token in part] + observation
        span = builder.extend(
            prompt, response, logp=[float("nan")] * sampled, kind=[Kind.ACT] * sampled
        )
        turns.append(Turn(index, str(observation), Actor("student"), span=span))
        history.append((observation, response))
    known = {"group": f"g{seed}", "sample": seed, "end": "failure", "success": False, "score": 0.0}
    return Trajectory(
        Task("tests/dense", "train", {"seed": seed}),
        turns=tuple(turns),
        streams=builder.finish(),
        **{**known, **facts},
    )


def sampled_by(model: Any, trajectory: Trajectory) -> Trajectory:
    """``trajectory`` with the log-probabilities that ``model`` gives its tokens."""
    streams = []
    for stream in trajectory.streams:
        where = np.flatnonzero(stream.author == Author.ACTOR)
        logp = np.full(len(stream), np.nan, np.float32)
        with torch.no_grad():
            rows = logits_at(model, stream.ids, where).log_softmax(-1)
        logp[where] = rows[range(len(where)), torch.tensor(stream.ids[where]).long()].numpy()
        streams.append(replace(stream, logp=logp))
    return replace(trajectory, streams=tuple(streams))


SHAPES = ([(3, 4), (2, 1), (4, 3)], [(5, 2)], [(2, 6), (3, 2)], [(9, 1), (1, 5)], [(1, 3), (6, 2)])


def episodes(*, window: int | None = None, vocab: int = VOCAB) -> list[Trajectory]:
    """Five trajectories in two groups, from one to three turns."""
    return [
        episode(n, shape, window=window, vocab=vocab, group=f"g{n % 2}", success=n % 3 == 0)
        for n, shape in enumerate(SHAPES)
    ]


def logits_at(model: Any, ids: Any, positions: Any) -> Tensor:
    """Logits [R, V] that predict the tokens at ``positions`` of one sequence."""
    whole = model(input_ids=torch.tensor(np.asarray(ids)).long()[None], use_cache=False).logits[0]
    return whole[torch.tensor(np.asarray(positions)).long() - 1]


def table_logits(model: Any, table: Table, view: str = PLAIN) -> Tensor:
    """Logits [N, V] of all rows of ``table``, one stream at a time."""
    parts = [logits_at(model, v.ids, v.positions) for v in table.views[view] if v is not None]
    return torch.cat(parts)


def chosen(logits: Tensor, table: Table) -> Tensor:
    """Log-probability [N] of each row's token."""
    token = table.index["token"]
    return logits.log_softmax(-1)[torch.arange(len(token)), token]


def keys(table: Table, over: str) -> list[Hashable]:
    """The unit of each row, from the records alone (steps: see ``runs``)."""
    names: list[Hashable] = []
    for t, trajectory in enumerate(table.trajectories):
        step = -1
        for s, stream in enumerate(trajectory.streams):
            before = -2
            for position in np.flatnonzero(stream.author != Author.CONTEXT).tolist():
                step += position != before + 1
                before = position
                turn = next(
                    u.index
                    for u in trajectory.turns
                    if u.span and u.span.stream == s and u.span.start <= position < u.span.end
                )
                names.append(
                    {
                        "token": len(names),
                        "turn": (t, turn),
                        "step": (t, step),
                        "stream": (t, s),
                        "trajectory": t,
                        "group": trajectory.group,
                    }[over]
                )
    return names


def mean_over(values: Tensor, units: Sequence[Hashable], rows: Sequence[bool]) -> Tensor:
    """Mean over units of the mean over the chosen rows of each."""
    found = defaultdict(list)
    for value, unit, kept in zip(values, units, rows, strict=True):
        if kept:
            found[unit].append(value)
    return torch.stack([torch.stack(part).mean() for part in found.values()]).mean()


def gradient(model: Any, loss: Tensor | None = None) -> Tensor:
    """Gradient of ``loss`` by all parameters, flat; of what has accumulated, for None (cleared)."""
    parameters = list(model.parameters())
    if loss is not None:
        parts = torch.autograd.grad(loss, parameters, allow_unused=True)
    else:
        parts = tuple(p.grad for p in parameters)
        model.zero_grad(set_to_none=True)
    pairs = zip(parts, parameters, strict=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs]
    )


def gap(got: Tensor, wanted: Tensor) -> float:
    """Length of the difference relative to the length of ``wanted``."""
    return float((got - wanted).norm() / wanted.norm())


def scored_table(
    trajectories: Sequence[Trajectory], make: Callable[[], tuple[Any, Any, Any]], **views: Any
) -> tuple[Table, Any, Any]:
    """A table with exact columns ``logp/old``, ``logp/teacher``, ``hidden/teacher``; the models.

    ``make`` gives student, old student and teacher. The columns are computed densely, in the
    models' own precision.
    """
    student, old, teacher = make()
    table = build([sampled_by(old, t) for t in trajectories], views)
    with torch.no_grad():
        table["logp/old"] = chosen(table_logits(old, table), table)
        table["logp/teacher"] = chosen(table_logits(teacher, table), table)
        hidden = [
            teacher.model(input_ids=torch.tensor(v.ids).long()[None]).last_hidden_state[0][
                torch.tensor(v.positions).long() - 1
            ]
            for v in table.views[PLAIN]
            if v is not None
        ]
        table["hidden/teacher"] = torch.cat(hidden)
    return table, student, teacher
