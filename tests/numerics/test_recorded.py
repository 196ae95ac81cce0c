"""The same numbers as public implementations, from outputs recorded by recorded/record.py.

Compared: SOD's step boundaries, weights and total advantage; TCOD's advantage of a turn; SDPO's
loss with its tail, cap and both reductions, and its gradient; the group advantage and clipped loss
of the verl shipped with SDPO; G-OPD's advantage with a base. All four repositories could be had.
Rows outside the masks are NaN here, which their code could not take.
"""

from __future__ import annotations

import gzip
import json
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agentdistill import advantage as adv
from agentdistill import divergence as dv
from agentdistill import weights as ws
from agentdistill.records import Actor, Kind, StreamBuilder, Task, Trajectory, Turn
from agentdistill.table import Table, build
from agentdistill.weighting import reduce_weights, segment_mean, segment_sum

FILE = Path(__file__).parent / "recorded" / "public.json.gz"
RECORD: dict[str, Any] = json.loads(gzip.decompress(FILE.read_bytes()))
NAN = float("nan")
close = partial(torch.testing.assert_close, atol=2e-6, rtol=2e-6)


def outputs(name: str) -> Any:
    return pytest.mark.parametrize("want", RECORD[name]["outputs"])


def mask(name: str) -> Tensor:
    return torch.tensor(RECORD[name]["mask"]).flatten().bool()


def column(name: str, key: str, kept: Tensor | None = None) -> Tensor:
    """A recorded column, flat, NaN outside the mask."""
    kept = mask(name) if kept is None else kept
    values = torch.tensor(RECORD[name][key])
    return values.flatten(0, 1).where(kept.view(-1, *[1] * (values.dim() - 2)), NAN)


def rows(name: str) -> Tensor:
    """Number of the row of their batch that each place is in, flat."""
    shape = torch.tensor(RECORD[name]["mask"]).shape
    return torch.arange(shape[0]).repeat_interleave(shape[1])


def at(values: Any, kept: Tensor) -> Tensor:
    """Recorded outputs, flat, in the mask."""
    return torch.tensor(values).flatten(0, 1)[kept]


def episode(number: int, pattern: list[int]) -> Trajectory:
    """One of their rows as a trajectory: ones are the actor's, zeros are what it was told."""
    builder, turns, told = StreamBuilder(), [], [9]
    for one, run in groupby(pattern):
        size = len(list(run))
        if not one:
            told += [8] * size
            continue
        said = {"logp": [0.0] * size, "kind": [Kind.ACT] * size}
        span = builder.extend([*builder.tail, *told], [7] * size, **said)
        turns.append(Turn(len(turns), "", Actor("student"), span=span))
        told = []
    task = Task("tests/rows", "train", {})
    return Trajectory(task, "g", number, tuple(turns), builder.finish(), "success", True, 1.0)


def as_table() -> Table:
    """SOD's masks as a table; its rows are the ones of the masks, in order."""
    return build([episode(n, pattern) for n, pattern in enumerate(RECORD["SOD"]["mask"])])


def test_where_the_numbers_are_from() -> None:
    assert RECORD["sources"].keys() == {"SOD", "TCOD", "SDPO", "G-OPD"}
    assert all(len(source["commit"]) == 40 for source in RECORD["sources"].values())


@outputs("SOD")
def test_sod_steps_are_the_tables(want: dict[str, Any]) -> None:
    table = as_table()
    bounds = [[end - begin for begin, end in row] for row in want["steps"]]
    for number, sizes in enumerate(bounds):
        mine = table["step"][table["trajectory"] == number]
        assert mine.bincount().tolist() == sizes


@outputs("SOD")
def test_sod_weights(want: dict[str, Any]) -> None:
    table, kept = as_table(), mask("SOD")
    old, teacher = column("SOD", "old")[kept], column("SOD", "teacher")[kept]
    steps = table.units("step")
    distance = ws.step_divergence(old, teacher, steps, table.acted)
    of_step = segment_mean(distance, steps.unique(return_inverse=True)[1], table.acted, 11)
    theirs = [d for row in want["divergences"] for d in row]
    close(of_step[: len(theirs)], torch.tensor(theirs))
    place = distance, table["trajectory"], steps, table.acted
    close(ws.sod(*place, delta=want["delta"]), at(want["weights"], kept))
    report = ws.sod_report(*place, delta=want["delta"])
    later = [(n, d) for n, row in enumerate(want["divergences"]) for d in row[1:]]
    capped = sum(want["divergences"][n][0] > (1 + want["delta"]) * d for n, d in later)
    assert report["steps"] == len(theirs)
    assert report["at_cap"] == pytest.approx(capped / len(later))
    assert report["zero_first"] == sum(row[0] == 0 for row in want["divergences"])


@outputs("SOD")
def test_sod_adds_the_weighted_signal_to_the_rewards_advantage(want: dict[str, Any]) -> None:
    kept = mask("SOD")
    old, teacher = column("SOD", "old"), column("SOD", "teacher")
    step = torch.full_like(kept, 0, dtype=torch.long)
    step[kept] = as_table()["step"]
    trajectory = rows("SOD")
    unit = trajectory * 100 + step
    distance = ws.step_divergence(old, teacher, unit, kept)
    weight = ws.sod(distance, trajectory, step, kept, delta=want["delta"])
    total = column("SOD", "task") + weight * adv.opd(old, teacher, kept, want["coef"])
    close(total[kept], at(want["advantages"], kept))
    assert torch.equal(weight[~kept], torch.zeros(int((~kept).sum())))


@outputs("TCOD")
def test_tcod_advantage(want: dict[str, Any]) -> None:
    kept = mask("TCOD") & torch.tensor(RECORD["TCOD"]["scored"]).flatten().bool()
    old, teacher = column("TCOD", "old", kept), column("TCOD", "teacher", kept)
    got = adv.opd(old, teacher, kept, want["coef"])
    close(got, torch.tensor(want["advantages"]).flatten())
    turn = rows("TCOD")
    of_turn = segment_sum(-got / want["coef"], turn, kept, int(turn.max()) + 1)
    assert of_turn.mean().item() == pytest.approx(want["kl"], rel=1e-5)


@outputs("SDPO")
def test_sdpo_loss_and_gradient(want: dict[str, Any]) -> None:
    told = torch.tensor(RECORD["SDPO"]["told"]).bool()[rows("SDPO")]
    kept = mask("SDPO") & told
    everywhere = torch.ones_like(kept)
    student = column("SDPO", "student", everywhere).double().requires_grad_()
    teacher = column("SDPO", "teacher", everywhere).double()
    token = column("SDPO", "token", everywhere).long()
    loss = dv.divergence("jsd", beta=want["alpha"], top_k=want["k"])(student, teacher)
    if want["cap"]:
        live = student.detach().log_softmax(-1).gather(-1, token[:, None])[:, 0]
        loss = loss * adv.truncated_is(live, column("SDPO", "old", kept), want["cap"])
    unit = rows("SDPO") if want["mode"] == "seq-mean-token-mean" else None
    total = (reduce_weights(unit, kept) * loss).sum()
    (gradient,) = torch.autograd.grad(total, student)
    assert total.item() == pytest.approx(want["loss"], rel=1e-5)
    close(gradient.float(), at(want["gradient"], everywhere), atol=1e-7, rtol=1e-4)


@outputs("verl")
def test_verl_clipped_loss_and_gradient(want: dict[str, Any]) -> None:
    kept = mask("verl")
    live = column("verl", "live", torch.ones_like(kept)).requires_grad_()
    old, advantage = column("verl", "old"), column("verl", "advantages")
    loss = adv.ppo_loss(live[kept], old[kept], advantage[kept], clip_low=0.2, clip_high=0.28)
    unit = rows("verl")[kept] if want["mode"] == "seq-mean-token-mean" else None
    total = (reduce_weights(unit, kept[kept]) * loss).sum()
    (gradient,) = torch.autograd.grad(total, live)
    assert total.item() == pytest.approx(want["loss"], rel=1e-5)
    close(gradient, at(want["gradient"], torch.ones_like(kept)))


@pytest.mark.parametrize("normalise", ["std", "none"])
def test_verl_group_advantage(normalise: str) -> None:
    case = RECORD["verl"]
    reward, group = torch.tensor(case["reward"]), torch.tensor(case["group"])
    valid = torch.ones(len(reward), dtype=torch.bool)
    want = torch.tensor(case["grpo"][normalise])
    want[group == 2] = 0  # a group of one: they keep its raw reward, we say it teaches nothing
    close(adv.grpo(reward, group, valid, normalise=normalise), want)


@outputs("G-OPD")
def test_g_opd_advantage(want: dict[str, Any]) -> None:
    case = RECORD["G-OPD"]
    old, teacher, base = (torch.tensor(case[key]).flatten() for key in ("old", "teacher", "base"))
    every = torch.ones_like(old, dtype=torch.bool)
    got = adv.extrapolated(old, teacher, base, every, want["share"])
    close(got, torch.tensor(want["advantages"]).flatten())
