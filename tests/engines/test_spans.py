"""Attention by spans against attention of each row alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentdistill.engines import spans

HEADS, DIM, CAPACITY = 2, 4, 48
CONFIG = SimpleNamespace(_attn_implementation="sdpa")
MODULE = SimpleNamespace(is_causal=True, training=False)
ROWS = st.dictionaries(
    st.integers(0, 30), st.tuples(st.integers(0, 24), st.integers(1, 24)), min_size=1, max_size=9
)


def eager(
    module: object, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object
) -> tuple[torch.Tensor, None]:
    """A kernel that adds its masks, as transformers' eager ones do."""
    scores = query @ key.transpose(-1, -2) / DIM**0.5
    if isinstance(mask, torch.Tensor):
        scores = scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Outputs [t, N, D] of a row's last t tokens, with a query each, over all of its [N, E, D]."""
    first = key.shape[1] - len(query)
    outputs = []
    for place, one in enumerate(query, first):
        scores = (one[:, None] * key[:, : place + 1]).sum(-1) / DIM**0.5
        outputs.append((scores.softmax(-1)[..., None] * value[:, : place + 1]).sum(1))
    return torch.stack(outputs)


@pytest.mark.parametrize("call", [0, 3000, 1 << 40])
@pytest.mark.parametrize("additive", [None, torch.float32])
@given(rows=ROWS, order=st.randoms(use_true_random=False))
def test_every_row_attends_to_its_own_past(
    additive: torch.dtype | None, call: int, rows: dict[int, tuple[int, int]], order: object
) -> None:
    """Slots apart, lengths unlike, in any order: each row has what it would have alone."""
    names = list(rows)
    order.shuffle(names)  # type: ignore[attr-defined]
    index = np.array(names)
    start, counts = np.array([rows[name] for name in names]).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(spans.CALL_BYTES, "cpu", call)
        kept = spans.Kept(torch.device("cpu"), 2 * HEADS * DIM * 4, additive)
        places, groups = spans.arrange(index, start, counts, kept)
    generator = torch.Generator().manual_seed(len(names))
    key, value = torch.randn(2, 31, HEADS, CAPACITY, DIM, generator=generator)
    query = torch.randn(1, HEADS, int(counts.sum()), DIM, generator=generator)
    kernel = eager if additive else spans.kernel_of(SimpleNamespace(config=CONFIG))[0]
    with spans.attention(CONFIG, kernel, groups):
        assert CONFIG._attn_implementation == spans.NAME
        found, _ = spans._attend(MODULE, query, key, value, None)
    assert CONFIG._attn_implementation == "sdpa"
    assert sorted(places.tolist()) == list(range(len(names)))
    first = 0
    for row in places:
        mine, past = slice(first, first + counts[row]), slice(0, start[row] + counts[row])
        slot = index[row]
        wanted = alone(query[0, :, mine].transpose(0, 1), key[slot, :, past], value[slot, :, past])
        torch.testing.assert_close(found[0, mine], wanted)
        first = mine.stop
    assert found.shape == (1, first, HEADS, DIM)


def test_neighbours_share_a_call_and_far_ones_do_not() -> None:
    """Two slots between cost more than a call, one does not; an answer and a prompt are unlike."""
    index, start = np.array([3, 0, 2, 6, 9]), np.array([10, 10, 10, 10, 0])
    kept = spans.Kept(torch.device("cpu"), int(0.8 * spans.CALL_BYTES["cpu"] / 11), None)
    counts = np.array([1, 1, 1, 1, 64])
    order, (prompt, answers) = spans.arrange(index, start, counts, kept)
    assert order.tolist() == [4, 1, 2, 0, 3]
    assert [part[1] for part in prompt.spans] == [slice(9, 10)]
    assert prompt.spans[0][2] is None and prompt.grid is None
    assert [part[1] for part in answers.spans] == [slice(0, 4), slice(6, 7)]
    assert answers.shape == (5, 1) and answers.extent == 11
