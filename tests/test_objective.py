"""Terms, reductions and the chunked backward pass against plain sums on a two-layer model.

The reference runs each sequence alone, keeps all logits, writes the loss as its formula and takes
means by dictionary. Row weights and the norms inside the model are float32 by design, so numbers
agree to about 1e-7.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agentdistill import advantage, divergence, optimise
from agentdistill.config import TrainStage
from agentdistill.engines import forward
from agentdistill.errors import EngineError
from agentdistill.objective import Divergence, Term, TokenLoss, needed_columns
from agentdistill.optimise import Batch, Head, Optimiser, backward, learning_rate
from agentdistill.records import Trajectory
from agentdistill.table import Table, build
from agentdistill.teachers.scorer import LocalScorer
from agentdistill.views import PLAIN, Splice, View, plain, splice, within
from tests.dense import (
    chosen,
    episode,
    episodes,
    gap,
    gradient,
    keys,
    make_model,
    mean_over,
    sampled_by,
    scored_table,
    table_logits,
)

CLOSE = 1e-6  # relative


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


def run(term: Term, *more: Term, table: Table | None = None, **options: Any) -> tuple[Batch, Tensor]:
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


@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize("name", LOSSES)
def test_chunked_gradients_equal_dense_ones(name: str, chunk: int | None) -> None:
    batch, mine = run(term_of(name), chunk_rows=chunk)
    wanted = dense(name)
    assert batch.losses[name] == pytest.approx(wanted.item(), rel=CLOSE)
    assert gap(mine, gradient(bench()[1], wanted)) < CLOSE


@pytest.mark.parametrize("over", ["token", "step", "turn", "stream", "trajectory", "group"])
@pytest.mark.parametrize("name", ["reverse_kl", "ppo"])
def test_every_reduction_weight_and_selection(name: str, over: Any) -> None:
    options = {"over": over, "coef": -0.7, "weight": "weight/w"}
    batch, mine = run(term_of(name, rows="rows/some", **options))
    wanted = dense(name, rows=bench()[0]["rows/some"], **options)
    assert batch.losses[name] == pytest.approx(wanted.item(), rel=CLOSE)
    assert gap(mine, gradient(bench()[1], wanted)) < CLOSE


def test_the_clip_of_the_dense_reference_acts() -> None:
    table, student, _ = bench()
    with torch.no_grad():
        ratio = (chosen(table_logits(student, table), table) - table["logp/old"]).exp()
    assert 4 < int(((ratio - 1).abs() > 0.1).sum()) < len(table) - 4


def test_terms_add_up() -> None:
    table, student, _ = bench()
    terms = [
        term_of("reverse_kl", rows="rows/some", over="turn", coef=0.5),
        term_of("nll", weight="weight/w"),
        term_of("ppo", over="trajectory", coef=2.0),
    ]
    batch, mine = run(*terms, chunk_rows=5, micro_tokens=20)
    parts = [
        dense("reverse_kl", rows=table["rows/some"], over="turn", coef=0.5),
        dense("nll", weight="weight/w"),
        dense("ppo", over="trajectory", coef=2.0),
    ]
    assert list(batch.losses.values()) == pytest.approx([p.item() for p in parts], rel=CLOSE)
    assert gap(mine, gradient(student, sum(parts))) < CLOSE


def test_gradients_accumulate_over_calls() -> None:
    table, student, _ = bench()
    once = run(term_of("nll"))[1]
    for _ in range(2):
        backward(student, table, [term_of("nll")], heads(), micro_tokens=30)
    assert gap(gradient(student), 2 * once) < CLOSE


def test_what_a_batch_reports() -> None:
    table, student, _ = bench()
    table.columns.pop("loss/nll", None)
    batch, _ = run(term_of("nll", rows="rows/some"), micro_tokens=1)
    with torch.no_grad():
        log_s = table_logits(student, table).log_softmax(-1)
    rows = table["rows/some"]
    entropy = -(log_s.exp() * log_s).sum(-1)[rows].mean()
    assert batch.rows == int(rows.sum())
    assert batch.entropy == pytest.approx(entropy.item(), rel=CLOSE)
    last = [int(table["position"][rows & (table["stream"] == s)].max()) for s in range(5)]
    assert batch.tokens == sum(last)
    assert batch.as_metrics()["loss/nll"] == batch.losses["nll"]
    left = table["loss/nll"]
    assert torch.equal(left.isnan(), ~rows)
    assert torch.allclose(left[rows], -chosen(log_s, table)[rows].float())


def test_columns_that_terms_need() -> None:
    terms = [term_of("ppo", weight="weight/w"), term_of("jsd"), term_of("nll")]
    assert needed_columns(terms) == {"logp/old", "advantage", "weight/w", "hidden/teacher"}


# -- cuts that must change nothing ----------------------------------------------------------------


@pytest.mark.parametrize("over", ["token", "turn", "group"])
@pytest.mark.parametrize("name", ["forward_kl", "ppo"])
def test_micro_batches_change_nothing(name: str, over: Any) -> None:
    trajectories = [
        episode(n, [(2, 1 + n % 3), (3, 2)], group=f"g{n % 3}") for n in range(7)
    ]
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
    def shuffled(source: random.Random) -> Iterator[Trajectory]:
        yield from source.sample(episodes(window=0), len(episodes()))

    found = []
    for trajectories in (episodes(window=0), list(shuffled(random.Random(seed)))):
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


def _half(rank: int, file: str, queue: Any) -> None:
    """One of two ranks: whole groups, half of the trajectories."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mine = [t for t in episodes() if t.group == f"g{rank}"]
    queue.put((rank, [g.numpy() for g in _ranked(mine)]))
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
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    ranks = [context.Process(target=_half, args=(r, str(tmp_path / "ranks"), queue)) for r in (0, 1)]
    for process in ranks:
        process.start()
    alone = _ranked(episodes())
    found = dict(queue.get() for _ in ranks)
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    for number, over in enumerate((*OVERS, "idle")):
        for rank in (0, 1):
            assert gap(torch.from_numpy(found[rank][number]), alone[number]) < CLOSE, over
    for one, two in pairwise(alone):
        assert gap(one, two) > 1e-3


# -- reductions by hand ---------------------------------------------------------------------------

# Two groups. a: turns of 2 and 1 rows; b: one of 1; c: one of 2. The turns of a are two streams.
BY_HAND = [
    episode(0, [(2, 2), (1, 1)], window=0, group="x"),
    episode(1, [(2, 1)], group="x"),
    episode(2, [(2, 2)], group="y"),
]
X = [1.0, 3.0, 8.0, 5.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("over", "wanted"),
    [
        ("token", 23 / 6),
        ("turn", (2 + 8 + 5 + 3) / 4),
        ("step", (2 + 8 + 5 + 3) / 4),
        ("stream", (2 + 8 + 5 + 3) / 4),
        ("trajectory", (4 + 5 + 3) / 3),
        ("group", (17 / 4 + 3) / 2),
    ],
)
def test_means_by_hand(over: Any, wanted: float) -> None:
    assert _value(over=over) == pytest.approx(wanted, rel=CLOSE)


@pytest.mark.parametrize(
    ("over", "own", "shared"),
    [
        ("token", (1 + 5 + 2) / 3, (1 + 5 + 2) / 6),
        ("turn", (1 + 5 + 2) / 3, (1 / 2 + 5 + 2 / 2) / 4),
        ("trajectory", (1 + 5 + 2) / 3, (1 / 3 + 5 + 2 / 2) / 3),
        ("group", (6 / 2 + 2) / 2, (6 / 4 + 2 / 2) / 2),
    ],
)
def test_shared_denominators_by_hand(over: Any, own: float, shared: float) -> None:
    some = {"rows/some": [True, False, False, True, True, False], "rows/all": [True] * 6}
    assert _value(some, over=over, rows="rows/some") == pytest.approx(own, rel=CLOSE)
    value = _value(some, over=over, rows="rows/some", shared="rows/all")
    assert value == pytest.approx(shared, rel=CLOSE)


def test_a_shared_column_must_hold_the_terms_rows() -> None:
    some = {"rows/some": [True, False, False, True, True, False]}
    with pytest.raises(ValueError, match="rows/some lacks rows of the term"):
        _value(some, shared="rows/some")


def _value(columns: dict[str, list[bool]] | None = None, **options: Any) -> float:
    """Value of a term whose loss of row i is X[i]."""
    table = build(BY_HAND)
    table["x"] = torch.tensor(X)
    for name, values in (columns or {}).items():
        table[name] = torch.tensor(values)
    loss = TokenLoss(("x",), lambda logp, c: c["x"] + 0 * logp)
    return run(Term("x", loss, **options), table=table)[0].losses["x"]


def test_rows_that_a_term_does_not_have_cannot_spoil_it() -> None:
    """NaN and infinity outside a term's rows: unscored, not sampled, or in no view."""
    table, _, _ = scored_table(episodes(), models)
    rows = torch.arange(len(table)) % 2 == 0
    table["rows/even"], table["rows/odd"] = rows, ~rows
    table["advantage"] = torch.where(rows, 1.0, float("nan")).double()
    table["weight/w"] = torch.where(rows, 2.0, float("inf")).double()
    terms = [term_of("ppo", rows="rows/even", weight="weight/w"), term_of("nll", rows="rows/odd")]
    whole = run(*terms, table=table)
    apart = [run(term, table=table) for term in terms]
    assert bool(whole[1].isfinite().all())
    assert gap(whole[1], apart[0][1] + apart[1][1]) < CLOSE
    table["advantage"] = torch.full((len(table),), float("nan"))
    assert not bool(run(terms[0], table=table)[1].isfinite().all())  # what it has, it must spoil


def test_two_terms_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="different names: nll, nll"):
        run(term_of("nll"), term_of("nll", rows="rows/some"))


def test_streams_without_a_view_are_outside_all_means() -> None:
    table, _, _ = scored_table(episodes(), models)
    table.add_view(PLAIN, within(plain, 13))
    kept = [1, 2, 4]
    short, _, _ = scored_table([episodes()[n] for n in kept], models)
    for over in ("token", "trajectory"):
        mine = run(term_of("forward_kl", over=over), table=table)  # type: ignore[arg-type]
        wanted = run(term_of("forward_kl", over=over), table=short)  # type: ignore[arg-type]
        assert mine[0].losses == pytest.approx(wanted[0].losses, rel=CLOSE)
        assert gap(mine[1], wanted[1]) < CLOSE


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
    assert not hidden[~has].any()
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
