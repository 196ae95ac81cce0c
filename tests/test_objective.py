"""Terms, reductions and the chunked gradient against plain sums on a two-layer model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agentdistill.objective import Term, TokenLoss, needed_columns
from agentdistill.optimise import backward
from agentdistill.table import build
from agentdistill.views import PLAIN, plain, within
from tests.dense import chosen, episode, episodes, gap, gradient, scored_table, table_logits
from tests.losses import CLOSE, LOSSES, bench, dense, heads, models, run, term_of


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
