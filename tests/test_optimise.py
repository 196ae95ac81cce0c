"""The backward pass and the step: cuts that change nothing, memory, scorers, ranks."""

from __future__ import annotations

import random
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agentdistill import optimise
from agentdistill.config import TrainStage
from agentdistill.engines import forward
from agentdistill.errors import EngineError
from agentdistill.optimise import Optimiser, backward, learning_rate
from agentdistill.records import Trajectory
from agentdistill.table import build
from agentdistill.teachers.scorer import LocalScorer
from agentdistill.views import PLAIN, Splice, View, splice
from tests.dense import (
    episode,
    episodes,
    gap,
    gradient,
    make_model,
    sampled_by,
    scored_table,
    table_logits,
)
from tests.losses import CLOSE, LOSSES, bench, dense, models, run, term_of

# -- cuts that must change nothing ----------------------------------------------------------------


@pytest.mark.parametrize("over", ["token", "turn", "group"])
@pytest.mark.parametrize("name", ["forward_kl", "ppo"])
def test_micro_batches_change_nothing(name: str, over: Any) -> None:
    trajectories = [episode(n, [(2, 1 + n % 3), (3, 2)], group=f"g{n % 3}") for n in range(7)]
    table, _, _ = scored_table(trajectories, models)
    table["advantage"] = torch.linspace(-1, 1, len(table), dtype=torch.float64)
    found = {}
    for tokens in (1000, 40, 1):
        parts = table.micro_batches(PLAIN, tokens)
        found[len(parts)] = run(term_of(name, over=over), table=table, micro_tokens=tokens)
    assert sorted(found) == [1, 2, 7]
    for parts in (2, 7):
        assert gap(found[parts][1], found[1][1]) < CLOSE
        assert found[parts][0].losses[name] == pytest.approx(found[1][0].losses[name], rel=CLOSE)


@pytest.mark.parametrize("name", LOSSES)
def test_packed_and_padded_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for packed in (False, True):
        call = partial(forward.hidden_states, packed=packed)
        monkeypatch.setattr(optimise, "hidden_states", call)
        found.append(run(term_of(name))[1])
    assert gap(found[1], found[0]) < CLOSE


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_order_of_trajectories_changes_nothing(seed: int) -> None:
    shuffled = episodes(window=0)
    random.Random(seed).shuffle(shuffled)
    found = []
    for trajectories in (episodes(window=0), shuffled):
        table, _, _ = scored_table(trajectories, models)
        table["advantage"] = (table["token"] - 20).double() / 20
        terms = [term_of("reverse_kl", over="turn"), term_of("ppo", over="group")]
        found.append(run(*terms, table=table, micro_tokens=25))
    assert found[1][0].losses == pytest.approx(found[0][0].losses, rel=CLOSE)
    assert gap(found[1][1], found[0][1]) < CLOSE


def test_an_optimiser_batch_is_a_mean_of_its_own() -> None:
    table, student, _ = bench()
    part, rest = [0, 3], [1, 2, 4]
    found = {}
    for numbers in (part, rest):
        batch, mine = run(term_of("nll", over="turn"), trajectories=numbers)
        rows = torch.isin(table["trajectory"], torch.tensor(numbers))
        wanted = dense("nll", over="turn", rows=rows)
        assert batch.losses["nll"] == pytest.approx(wanted.item(), rel=CLOSE)
        assert gap(mine, gradient(student, wanted)) < CLOSE
        found[len(numbers)] = mine
    assert gap(found[2], found[3]) > 0.1


def test_an_empty_optimiser_batch_does_nothing() -> None:
    batch, mine = run(term_of("nll"), trajectories=[])
    assert (batch.rows, batch.tokens, batch.entropy, batch.losses) == (0, 0, 0.0, {"nll": 0.0})
    assert float(mine.norm()) == 0
    assert run(term_of("nll"), table=build([]))[0].rows == 0


# -- two ranks ------------------------------------------------------------------------------------

OVERS = ("token", "turn", "step", "stream", "trajectory", "group")


def _half(rank: int, folder: Path) -> None:
    """One of two ranks: whole groups, half of the trajectories."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'ranks'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=100),
    )
    torch.save(_ranked([t for t in episodes() if t.group == f"g{rank}"]), folder / f"{rank}.pt")
    dist.destroy_process_group()


def _ranked(trajectories: list[Trajectory]) -> list[Tensor]:
    """Gradients after the sum over ranks: one for each reduction, then one with an idle rank."""
    table, student, teacher = scored_table(trajectories, models)
    table["rows/idle"] = table.spread(torch.tensor([t.group == "g0" for t in trajectories]))
    optimiser = Optimiser(student, TrainStage(name="s", iterations=1, clip_norm=1e9, lr=1e-30))
    found: list[Tensor] = []
    optimiser.adam.step = lambda: found.append(gradient(student))  # type: ignore[method-assign]
    terms = [term_of("reverse_kl", over=over) for over in OVERS]  # type: ignore[arg-type]
    for term in [*terms, term_of("nll", rows="rows/idle")]:
        head = {"teacher": teacher.get_output_embeddings()}
        backward(student, table, [term], head, micro_tokens=20)
        optimiser.step(0.0)
    return found


def test_two_ranks_give_the_gradient_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_half, (tmp_path,), nprocs=2)
    alone = _ranked(episodes())
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for over, mine, wanted in zip((*OVERS, "idle"), found, alone, strict=True):
            assert gap(mine, wanted) < CLOSE, over
    # Turns and steps are one here, and so are streams and trajectories; the rest differs.
    assert len({round(float(each.norm()), 6) for each in alone}) == len(alone) - 2


# -- memory ---------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """The most rows of any tensor that has a dimension as long as the vocabulary."""

    def __init__(self, vocabulary: int, weights: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.vocabulary, self.weights, self.rows = vocabulary, weights, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            shape = tuple(part.shape) if isinstance(part, Tensor) else ()
            if self.vocabulary in shape and shape not in self.weights:
                self.rows = max(self.rows, part.numel() // self.vocabulary)
        return result


@pytest.mark.parametrize("name", LOSSES)
def test_no_tensor_holds_more_rows_of_logits_than_a_chunk(name: str) -> None:
    words, width = 97, 16
    student, teacher = make_model(0, vocab=words), make_model(1, vocab=words)
    table = build([sampled_by(student, t) for t in episodes(vocab=words)])
    scorer = LocalScorer("teacher", teacher)
    scorer.score(table, {"hidden", "logp"})
    table["logp/old"] = table["logp/sampler"]
    table["advantage"] = torch.ones(len(table))
    seen = {}
    for chunk in (3, 1000):
        with Watch(words, {(words, width), (width, words)}) as watch:
            backward(
                student, table, [term_of(name)], {"teacher": scorer.head},
                micro_tokens=1 << 20, chunk_rows=chunk,
            )  # fmt: skip
        seen[chunk] = watch.rows
    assert seen == {3: 3, 1000: len(table)}


# -- scorers --------------------------------------------------------------------------------------


def hinted(trajectory: Trajectory, stream: int) -> View | None:
    """The stream after a hint; trajectory 1 has none."""
    if trajectory.sample == 1:
        return None
    return splice(trajectory.streams[stream], [Splice(1, insert=(9, 8, 7))])


@pytest.mark.parametrize("micro", [1, 30, 1000])
@pytest.mark.parametrize("view", [PLAIN, "hint"])
def test_scores_are_those_of_whole_sequences(view: str, micro: int) -> None:
    teacher = make_model(1)
    table = build(episodes(), {"hint": hinted})
    scorer = LocalScorer("teacher", teacher)
    teacher.train()
    tokens = scorer.score(table, ("logp", "entropy", "hidden"), view=view, micro_tokens=micro)
    assert teacher.training
    with torch.no_grad():
        logits = table_logits(teacher, table, view)
    has = table.valid(view)
    end = "" if view == PLAIN else "@hint"
    log_p = logits.log_softmax(-1)
    at = table["token"][has]
    wanted = log_p[torch.arange(len(at)), at]
    assert torch.equal(table[f"logp/teacher{end}"].isnan(), ~has)
    assert torch.allclose(table[f"logp/teacher{end}"][has], wanted.float())
    entropy = -(log_p.exp() * log_p).sum(-1)
    assert torch.allclose(table[f"entropy/teacher{end}"][has], entropy.float())
    hidden = table[f"hidden/teacher{end}"]
    assert torch.allclose(scorer.head(hidden)[has], logits, atol=1e-6)
    assert torch.equal(hidden.isnan().all(-1), ~has)
    views = [v for v in table.views[view] if v is not None]
    assert tokens == sum(int(v.positions[-1]) for v in views)


def test_only_the_rows_that_are_asked_for_are_scored() -> None:
    table = build(episodes())
    rows = (table["trajectory"] == 2) & (table["turn"] == 0)
    tokens = LocalScorer("t", make_model(1)).score(table, rows=rows)
    assert torch.equal(~table["logp/t"].isnan(), rows)
    assert tokens == 7


@pytest.mark.parametrize("trajectories", [[], episodes()])
def test_columns_exist_also_where_nothing_was_scored(trajectories: list[Trajectory]) -> None:
    table = build(trajectories, {"none": lambda t, s: None})
    assert LocalScorer("t", make_model(1)).score(table, ("logp", "hidden"), view="none") == 0
    assert table["logp/t@none"].isnan().tolist() == [True] * len(table)
    assert table["hidden/t@none"].shape == (len(table), 16)


def test_a_target_that_was_not_scored_is_loud() -> None:
    table, teacher = build(episodes()), make_model(1)
    scorer = LocalScorer("teacher", teacher)
    scorer.score(table, ("hidden",), rows=table["trajectory"] > 0)
    student = make_model(0)
    for numbers, finite in (([1, 2], True), ([0, 1], False)):
        term = term_of("reverse_kl")
        backward(
            student, table, [term], {"teacher": scorer.head}, micro_tokens=99, trajectories=numbers
        )
        assert bool(gradient(student).isfinite().all()) == finite


def test_old_scores_equal_the_samplers() -> None:
    student = make_model(0)
    table = build([sampled_by(student, t) for t in episodes(window=0)])
    LocalScorer("old", student).score(table)
    assert torch.allclose(table["logp/old"], table["logp/sampler"], atol=1e-6)


# -- the step -------------------------------------------------------------------------------------


def stage(**options: Any) -> TrainStage:
    return TrainStage(name="s", iterations=1, **options)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_move() -> None:
    model = make_model(0)
    before = [weight.detach().clone() for weight in model.parameters()]
    optimiser = Optimiser(model, stage())
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, float("nan"))
    with pytest.raises(EngineError, match="not finite"):
        optimiser.step(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_model_without_trainable_weights_is_refused() -> None:
    with pytest.raises(EngineError, match="no trainable"):
        Optimiser(make_model(0).requires_grad_(False), stage())


def test_a_step_clips_applies_the_rate_and_clears() -> None:
    model = make_model(0)
    optimiser = Optimiser(model, stage(lr=1e-2, clip_norm=0.5))
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    size = sum(weight.numel() for weight in model.parameters())
    report = optimiser.step(0.0)
    assert report == {"lr": 1e-2, "grad_norm": pytest.approx(size**0.5, rel=1e-6)}
    assert all(weight.grad is None for weight in model.parameters())


def test_learning_rates() -> None:
    cosine = stage(lr=2.0, schedule="cosine", warmup=0.2)
    rates = [learning_rate(cosine, p) for p in (0.0, 0.1, 0.2, 0.6, 1.0, 1.5)]
    assert rates == pytest.approx([0.1, 1.0, 2.0, 1.05, 0.1, 0.1])
    assert learning_rate(stage(lr=2.0), 0.7) == 2.0
