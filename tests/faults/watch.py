"""Numbers that show whether something between sampling and the gradient is broken.

Every number here is 0 when all is well, up to rounding. Each plays, renders, scores or trains with
the library as it is at the moment of the call, and compares with records, with the tokenizer's own
template, or with plain sums over whole sequences.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agentdistill import views
from agentdistill.config import PromptConfig, TinyModel
from agentdistill.engines.base import Sampling
from agentdistill.engines.hf import HFEngine
from agentdistill.methods import compile as plan
from agentdistill.methods.index import get
from agentdistill.methods.space import Axes
from agentdistill.metrics import of_table
from agentdistill.optimise import Batch, backward
from agentdistill.policy import ModelPolicy
from agentdistill.records import Actor, Author, Task, Trajectory, Turn
from agentdistill.render import Conversation, Renderer, materialise
from agentdistill.rollout import Request, rollout, run
from agentdistill.students import tiny
from agentdistill.table import Table, build
from agentdistill.teachers.scorer import LocalScorer
from agentdistill.views import Splice, View
from tests.dense import gap, gradient, keys, logits_at, mean_over
from tests.templates import TEMPLATES, rendered, renderer, tokenizer
from tests.toy import Corridor

MICRO = 100
"""Tokens of a micro-batch: about two of the six streams here."""


@cache
def model(name: str) -> Any:
    """Student or teacher over the usual tokenizer; never changed by a watch."""
    config = TinyModel(hidden=16, heads=1, layers=2, init_std=0.3)
    return tiny.build(config, tokenizer(), {"student": 1, "teacher": 2}[name]).double()


def play(**prompt: Any) -> list[Trajectory]:
    """Six episodes in groups of two, of one to four turns of one to five tokens.

    So that lengths differ, every fifth id ends a response and the horizon grows.
    """
    mine = Renderer(tokenizer(), PromptConfig(**prompt), Corridor().instruction)
    ends = [*range(0, len(tokenizer()), 5), mine.end]
    engine = HFEngine(model("student"), tokenizer(), stop_ids=ends)
    policy = ModelPolicy("student", engine, mine, Sampling(max_tokens=5))
    tasks = list(Corridor().tasks("train"))[:3]
    pairs = [(n, k, task) for n, task in enumerate(tasks) for k in (0, 1)]
    requests = [Request(task, 7 * n + k, f"g{n}", k, horizon=1 + n + k) for n, k, task in pairs]
    return run(rollout(policy, Corridor, requests, max_turns=4))


@cache
def recorded() -> tuple[Trajectory, ...]:
    """Episodes with full history, for numbers about what is made of them afterwards.

    The second of each group is called a success, so that rewards differ.
    """
    return tuple(
        replace(t, success=bool(t.sample), end="success" if t.sample else "failure") for t in play()
    )


# -- tokens ---------------------------------------------------------------------------------------


def template_gap() -> float:
    """Share of prompts that differ from what the tokenizer's own template renders."""
    said, seen = ["left", "right"], ["P..G", ".P.G", "..PG"]
    wrong = 0
    for template in TEMPLATES:
        mine = renderer(template, "Walk.")
        conversation = Conversation(mine)
        for observation, text in zip(seen, said, strict=False):
            conversation.add(observation, mine.written(text))
        wrong += conversation.ask(seen[-1])[0] != rendered(mine, seen, said)
    return wrong / len(TEMPLATES)


def forgotten() -> float:
    """Share of the responses due in a later prompt that are not in it, token by token."""
    due = missing = 0
    for window in (None, 2):
        for trajectory in play(window=window):
            said = []
            for turn in trajectory.turns:
                assert turn.span is not None
                ids = trajectory.streams[turn.span.stream].ids.tolist()
                prompt = ids[: turn.span.start]
                wanted = said if window is None else said[-window:]
                due += len(wanted)
                missing += sum(not _holds(prompt, part) for part in wanted)
                said.append(ids[turn.span.start : turn.span.end])
    return missing / due


def _holds(ids: list[int], part: list[int]) -> bool:
    return any(ids[i : i + len(part)] == part for i in range(len(ids)))


def trained_gap() -> float:
    """Tokens trained too often, too rarely or not as they were said, per token said."""
    texts = ["<think>go</think>left", "right", "<think>on</think>left"]
    said = wrong = 0
    for prompt in ({}, {"window": 1}, {"drop_reasoning": True}):
        mine = renderer(**prompt)
        turns = tuple(Turn(n, f"seen {n}", Actor("e"), text=text) for n, text in enumerate(texts))
        told = Trajectory(Task("e", "train", {}), "g", 0, turns, (), "success", True, 1.0)
        got = build([materialise(told, mine)])["token"].tolist()
        wanted = [i for text in texts for i in mine.written(text).ids]
        said += len(wanted)
        wrong += abs(len(got) - len(wanted)) + sum(
            a != b for a, b in zip(got, wanted, strict=False)
        )
    return wrong / said


# -- log-probabilities ----------------------------------------------------------------------------


def sampler_gap() -> float:
    """Largest difference between the sampler's log-probabilities and the same weights' scores."""
    table = build(play())
    LocalScorer("old", model("student")).score(table, micro_tokens=MICRO)
    return float((table["logp/old"] - table["logp/sampler"]).abs().max())


def stale_gap() -> float:
    """The same across an update of the weights, plus 1 where the version on record is old."""
    weights = tiny.build(TinyModel(hidden=16, heads=1, layers=2, init_std=0.3), tokenizer(), 1)
    engine = HFEngine(weights, tokenizer())
    prompt, worst = list(range(20, 40)), 0.0
    for version in (0, 1):
        if version:
            with torch.no_grad():
                for parameter in weights.parameters():
                    parameter.mul_(1.2)
            engine.publish(version)
        ask = engine.generate(prompt, Sampling(max_tokens=4), seed=version, session="s")
        sample = asyncio.run(ask)
        ids = [*prompt, *sample.ids]
        with torch.no_grad():
            log_p = logits_at(weights, ids, range(len(prompt), len(ids))).log_softmax(-1)
        wanted = log_p[range(len(sample.ids)), list(sample.ids)]
        worst = max(worst, float((wanted - torch.tensor(sample.logp)).abs().max()))
        worst += sample.version != version
        prompt = ids
    return worst


def hint_silence() -> float:
    """Share of rows whose teacher says the same with a hint and without: it read none."""
    table = build(recorded(), {"hint": _hinted})
    scorer = LocalScorer("teacher", model("teacher"))
    for view in ("plain", "hint"):
        scorer.score(table, view=view, micro_tokens=MICRO)
    same = table["logp/teacher"] == table["logp/teacher@hint"]
    return float(same.float().mean())


def hinted_gap() -> float:
    """Largest difference between the hinted teacher's scores and whole hinted sequences."""
    table = build(recorded(), {"hint": _hinted})
    LocalScorer("teacher", model("teacher")).score(table, view="hint", micro_tokens=MICRO)
    wanted = []
    for trajectory in table.trajectories:
        for stream in trajectory.streams:
            ids = [*stream.ids[:1].tolist(), *HINT, *stream.ids[1:].tolist()]
            where = np.flatnonzero(stream.author == Author.ACTOR) + len(HINT)
            with torch.no_grad():
                log_p = logits_at(model("teacher"), ids, where).log_softmax(-1)
            wanted.append(log_p[range(len(where)), [ids[w] for w in where]])
    return float((table["logp/teacher@hint"] - torch.cat(wanted)).abs().max())


HINT = (30, 31, 32, 33)


def _hinted(trajectory: Trajectory, stream: int) -> View:
    return views.splice(trajectory.streams[stream], [Splice(1, insert=HINT)])


# -- the gradient ---------------------------------------------------------------------------------


def update(axes: Axes, table: Table) -> tuple[Batch, Tensor]:
    """Score, fill and train as an iteration does; the batch and the student's gradient."""
    scorer = LocalScorer(plan.TEACHER, model("teacher"))
    want = plan.wanted(axes)
    if want:
        scorer.score(table, want, rows=table.acted, micro_tokens=MICRO)
    if plan.wanted(axes, plan.OLD) and "logp/old" not in table.columns:
        old = LocalScorer(plan.OLD, model("student"))
        old.score(table, rows=table.acted, micro_tokens=MICRO)
    plan.fill(table, axes)
    heads = {plan.TEACHER: scorer.head}
    student = model("student")
    batch = backward(student, table, plan.terms(axes), heads, micro_tokens=MICRO, chunk_rows=7)
    return batch, gradient(student)


def gradient_gap() -> float:
    """Worst relative difference between the gradient of five methods and plain sums."""
    worst = 0.0
    for name in ("opd", "opd-exact", "kd", "tcod-f2b", "grpo"):
        axes = get(name).resolve({})
        _, mine = update(axes, build(recorded()))
        found = gap(mine, _wanted(name))
        worst = max(worst, found if np.isfinite(found) else 1e9)
    return worst


@cache
def _wanted(name: str) -> Tensor:
    return gradient(model("student"), _plain(get(name).resolve({}), recorded()))


def _plain(axes: Axes, trajectories: Sequence[Trajectory]) -> Tensor:
    """The objective from the records: each stream alone, whole distributions, no table column."""
    parts = []
    for trajectory in trajectories:
        for stream in trajectory.streams:
            where = np.flatnonzero(stream.author == Author.ACTOR)
            log_s = logits_at(model("student"), stream.ids, where).log_softmax(-1)
            log_t = logits_at(model("teacher"), stream.ids, where).log_softmax(-1).detach()
            at = (torch.arange(len(where)), torch.tensor(stream.ids[where]).long())
            parts.append(_losses(axes, trajectory, log_s, log_t, log_s[at], log_t[at]))
    values = torch.cat(parts)
    units = keys(Table(list(trajectories), [], torch.zeros(1), {}), axes.over)
    return mean_over(values, units, [True] * len(values))


def _losses(
    axes: Axes, trajectory: Trajectory, log_s: Tensor, log_t: Tensor, live: Tensor, target: Tensor
) -> Tensor:
    kind = axes.signal.divergence
    if kind == "reverse_kl":
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    if kind == "forward_kl":
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    ratio = (live - live.detach()).exp()
    if kind == "k1":
        return -ratio * (target - live.detach())
    # Groups of one success and one failure: mean 1/2, sample deviation 1/sqrt(2).
    return -ratio * (trajectory.success - 0.5) * 2**0.5


def turn_profile_gap() -> float:
    """Largest difference of the divergence by turn from a loop over the turns' spans."""
    axes = get("opd").resolve({})
    table = build(recorded())
    update(axes, table)
    found: dict[int, list[float]] = {}
    for trajectory in table.trajectories:
        for turn in trajectory.turns:
            assert turn.span is not None
            stream = trajectory.streams[turn.span.stream]
            where = range(turn.span.start, turn.span.end)
            at = (
                torch.arange(len(where)),
                torch.tensor(stream.ids[turn.span.start : turn.span.end]).long(),
            )
            with torch.no_grad():
                own, other = (
                    logits_at(model(name), stream.ids, where).log_softmax(-1)[at]
                    for name in ("student", "teacher")
                )
            found.setdefault(turn.index, []).extend((own - other).tolist())
    wanted = [sum(found[turn]) / len(found[turn]) for turn in sorted(found)]
    got = of_table(table, axes)["divergence_by_turn"]
    if len(got) != len(wanted):
        return 1.0
    return max(abs((a or 0.0) - b) for a, b in zip(got, wanted, strict=True))


def order_gap() -> float:
    """Relative change of the gradient when trajectories and micro-batches are in another order."""
    axes = get("tcod-f2b-exact").resolve({})
    trajectories = list(recorded())
    _, one = update(axes, build(trajectories))
    random.Random(1).shuffle(trajectories)
    return gap(update(axes, build(trajectories))[1], one)
