"""Trajectories come back from bytes exactly as they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agentdistill import codec
from agentdistill.errors import StoreError
from agentdistill.records import (
    ENDS,
    Actor,
    Alternative,
    Author,
    Fault,
    Span,
    Start,
    StepResult,
    Stream,
    Task,
    Trajectory,
    Turn,
    Usage,
    Verdict,
)
from agentdistill.store import Store
from tests.store_worker import batch, image

ODD = ["\ud83d", "\ude00", "\udcff", "\x00", "\n", "\r", "\u2028", "√", "😀", "\\", '"']
hostile = st.lists(st.characters() | st.sampled_from(ODD), max_size=12).map("".join)
numbers = st.floats()
counts = st.integers(0, 2**40)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
mappings = st.dictionaries(st.text(max_size=5), json_values, max_size=3)


def tuples(elements: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(elements, max_size=2).map(tuple)


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    length = draw(st.integers(0, 6))
    return Stream(
        draw(hnp.arrays(np.int32, length)),
        draw(hnp.arrays(np.uint8, length)),
        draw(hnp.arrays(np.uint8, length)),
        draw(hnp.arrays(np.float32, length)),
    )


usages = st.builds(Usage, counts, counts, counts, counts)
results = st.builds(StepResult, hostile, numbers, score=numbers, optimal=st.none() | st.booleans())
turns = st.builds(
    Turn,
    index=counts,
    observation=hostile,
    actor=st.builds(Actor, hostile, counts, mappings),
    author=st.sampled_from(Author),
    text=hostile,
    reasoning=hostile,
    tool_calls=tuples(mappings),
    actions=tuples(hostile),
    results=tuples(results),
    verdict=st.sampled_from(Verdict),
    stop=st.sampled_from(["stop", "length", "none"]),
    reward=numbers,
    usage=usages,
    span=st.none() | st.builds(Span, counts, counts, counts),
    alternatives=tuples(st.builds(Alternative, hostile, tuples(hostile), usages)),
    admissible=tuples(hostile),
    cut=tuples(hostile),
)
trajectories = st.builds(
    Trajectory,
    task=st.builds(Task, st.text(), st.text(), mappings, st.text(), st.none() | counts),
    group=st.text(),
    sample=counts,
    turns=tuples(turns),
    streams=tuples(streams()),
    end=st.sampled_from(ENDS) | st.just("fault:timeout"),
    success=st.booleans(),
    score=numbers,
    start=st.builds(Start, tuples(hostile), st.text()),
    horizon=st.none() | counts,
    counter=counts,
    faults=tuples(st.builds(Fault, st.text(), hostile, counts)),
    provenance=mappings,
    derived_from=st.none() | st.text(),
    goal=hostile,
)


@settings(max_examples=80, deadline=None)
@given(st.lists(trajectories, max_size=3))
def test_round_trip_is_exact(items: list[Trajectory]) -> None:
    data = codec.pack(items)
    back = codec.unpack(data)
    assert image(back) == image(items)
    assert [item.id for item in back] == [item.id for item in items]
    assert codec.count(data) == len(items)
    assert codec.pack(back) == data


@pytest.mark.parametrize("text", [*ODD, "".join(ODD), "\ud83d\ude00"])
def test_hostile_text_is_kept(text: str) -> None:
    item = replace(batch(0)[0], turns=(Turn(0, text, Actor("student"), text=text),))
    back = codec.unpack(codec.pack([item]))[0]
    assert back.turns == item.turns


def test_what_cannot_be_kept_is_refused() -> None:
    item = batch(0)[0]
    stream = item.streams[0]
    wide = replace(item, streams=(replace(stream, ids=stream.ids.astype(np.int64)),))
    with pytest.raises(TypeError, match="int64"):
        codec.pack([wide])
    with pytest.raises(TypeError, match=r"int64\(3\)"):
        codec.pack([replace(item, provenance={"seed": np.int64(3)})])


def test_shards_of_earlier_versions_are_read() -> None:
    """Written before turns had ``admissible`` and ``cut`` and trajectories a ``goal``."""
    data = (Path(__file__).parent / "data" / "shard-1.npz").read_bytes()
    assert b"admissible" not in data and b"goal" not in data
    assert image(codec.unpack(data)) == image(batch(0, size=1))


def test_unknown_layout_says_so(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(run_dir) as store:
        with monkeypatch.context() as patch:
            patch.setattr(codec, "FORMAT", 99)
            ref = store.write("train", 0, batch(0))
        with pytest.raises(StoreError, match=r"layout 99.*version"):
            store.read(ref)
