"""Splices, and the flat table: index columns against loops over the records."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentdistill.records import (
    Actor,
    Author,
    Kind,
    Span,
    Stream,
    StreamBuilder,
    Task,
    Trajectory,
    Turn,
)
from agentdistill.table import Table, build, column
from agentdistill.views import PLAIN, Splice, View, plain, rows_of, splice, within
from tests.dense import SHAPES, episode, episodes, keys

CONTEXT, ACTOR, TEACHER, FORCED, REPLAY = (int(a) for a in Author)


def stream_of(authors: Sequence[int], ids: Sequence[int] | None = None) -> Stream:
    """A stream with these authors; ids 100, 101, … unless given."""
    size = len(authors)
    return Stream(
        np.arange(100, 100 + size, dtype=np.int32) if ids is None else np.asarray(ids, np.int32),
        np.asarray(authors, np.uint8),
        np.full(size, Kind.ACT, np.uint8),
        np.zeros(size, np.float32),
    )


SMALL = stream_of([0, 0, 1, 1, 0, 0, 1, 0])


def read(view: View) -> tuple[list[int], list[int]]:
    return view.ids.tolist(), view.positions.tolist()


# -- splices --------------------------------------------------------------------------------------


def test_rows_are_what_somebody_wrote_now() -> None:
    assert rows_of(stream_of([CONTEXT, ACTOR, TEACHER, FORCED, REPLAY])).tolist() == [1, 2, 3]


def test_inserting_moves_what_follows() -> None:
    view = splice(SMALL, [Splice(1, insert=(7, 8))])
    assert read(view) == ([100, 7, 8, 101, 102, 103, 104, 105, 106, 107], [4, 5, 8])


def test_inserting_at_a_row_comes_before_it_and_may_part_a_response() -> None:
    assert read(splice(SMALL, [Splice(2, insert=(7,))]))[1] == [3, 4, 7]
    assert read(splice(SMALL, [Splice(3, insert=(7,))]))[1] == [2, 4, 7]
    assert read(splice(SMALL, [Splice(8, insert=(7,))])) == ([*range(100, 108), 7], [2, 3, 6])


def test_dropping_moves_what_follows_back() -> None:
    view = splice(SMALL, [Splice(0, drop=1), Splice(4, drop=2)])
    assert read(view) == ([101, 102, 103, 106, 107], [1, 2, 3])


def test_replacing_and_adjacent_splices() -> None:
    view = splice(SMALL, [Splice(4, drop=1, insert=(7, 8)), Splice(5, drop=1), Splice(7, drop=1)])
    assert read(view) == ([100, 101, 102, 103, 7, 8, 106], [2, 3, 6])


def test_splices_may_be_given_in_any_order() -> None:
    parts = [Splice(4, drop=2), Splice(4, insert=(7,)), Splice(0, insert=(8,)), Splice(7, drop=1)]
    wanted = ([8, 100, 101, 102, 103, 7, 106], [3, 4, 6])
    assert read(splice(SMALL, parts)) == read(splice(SMALL, parts[::-1])) == wanted


@pytest.mark.parametrize(
    "parts",
    [
        [Splice(0, drop=2), Splice(1, drop=1)],
        [Splice(0, drop=2), Splice(1, insert=(7,))],
        [Splice(7, drop=2)],
        [Splice(9, insert=(7,))],
        [Splice(-1, insert=(7,))],
        [Splice(5, drop=-1)],
    ],
)
@pytest.mark.parametrize("forget", [False, True])
def test_splices_that_cannot_be_are_refused(parts: list[Splice], forget: bool) -> None:
    with pytest.raises(ValueError, match="overlaps another or leaves the stream"):
        splice(SMALL, parts, forget=forget)


@pytest.mark.parametrize("part", [Splice(2, drop=1), Splice(1, drop=2), Splice(0, drop=8)])
def test_compared_tokens_are_not_dropped_by_accident(part: Splice) -> None:
    with pytest.raises(ValueError, match="would drop tokens in question"):
        splice(SMALL, [part])


def test_forgotten_rows_have_no_position() -> None:
    view = splice(SMALL, [Splice(2, drop=4, insert=(7,))], forget=True)
    assert read(view) == ([100, 101, 7, 106, 107], [0, 0, 3])


@st.composite
def spliced(draw: st.DrawFn) -> tuple[Stream, list[Splice]]:
    """A stream, and splices that do not overlap, of any kind."""
    authors = [CONTEXT, *draw(st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 4]), max_size=20))]
    ids = draw(st.lists(st.integers(0, 5), min_size=len(authors), max_size=len(authors)))
    parts, at = [], draw(st.integers(1, 4))
    while at <= len(authors):
        drop = draw(st.integers(0, min(3, len(authors) - at)))
        insert = tuple(draw(st.lists(st.integers(6, 9), max_size=3)))
        parts.append(Splice(at, drop, insert))
        at += drop + draw(st.integers(0, 4)) + (drop == 0)
    return stream_of(authors, ids), draw(st.permutations(parts))


@settings(max_examples=200, deadline=None)
@given(spliced())
def test_spliced_views_show_the_same_tokens(case: tuple[Stream, list[Splice]]) -> None:
    stream, parts = case
    tokens: list[tuple[int, int | None]] = [(i, n) for n, i in enumerate(stream.ids.tolist())]
    for part in sorted(parts, key=lambda p: -p.at):  # from the end, so that places stay
        tokens[part.at : part.at + part.drop] = [(i, None) for i in part.insert]
    view = splice(stream, parts, forget=True)
    assert view.ids.tolist() == [i for i, _ in tokens]
    places = {source: place for place, (_, source) in enumerate(tokens) if source is not None}
    rows = rows_of(stream)
    assert view.positions.tolist() == [places.get(row, 0) for row in rows.tolist()]
    kept = view.positions > 0
    assert np.array_equal(view.ids[view.positions][kept], stream.ids[rows][kept])
    assert (np.diff(view.positions[kept]) > 0).all()
    if kept.all():
        assert read(splice(stream, parts)) == read(view)
    else:
        with pytest.raises(ValueError, match="tokens in question"):
            splice(stream, parts)


# -- the table ------------------------------------------------------------------------------------


def hinted(trajectory: Trajectory, stream: int) -> View:
    """The stream after a hint of three tokens, and without its first one."""
    return splice(trajectory.streams[stream], [Splice(0, 1, (9, 8, 7))])


@pytest.mark.parametrize("window", [None, 0, 1])
def test_index_columns_equal_loops_over_the_records(window: int | None) -> None:
    trajectories = episodes(window=window)
    table = build(trajectories)
    number = {group: n for n, group in enumerate(dict.fromkeys(t.group for t in trajectories))}
    wanted = {name: [] for name in table.index}
    streams = [(t, s) for t, whole in enumerate(trajectories) for s in range(len(whole.streams))]
    for which, (t, s) in enumerate(streams):
        stream = trajectories[t].streams[s]
        for position in np.flatnonzero(stream.author == ACTOR).tolist():
            wanted["trajectory"].append(t)
            wanted["group"].append(number[trajectories[t].group])
            wanted["stream"].append(which)
            wanted["position"].append(position)
            wanted["token"].append(int(stream.ids[position]))
            wanted["author"].append(int(stream.author[position]))
            wanted["kind"].append(int(stream.kind[position]))
    wanted["turn"] = [turn for _, turn in keys(table, "turn")]
    wanted["step"] = [step for _, step in keys(table, "step")]
    assert {name: values.tolist() for name, values in table.index.items()} == wanted
    assert table.streams == streams
    assert len(table) == sum(sampled for shape in SHAPES for _, sampled in shape)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 4]), max_size=15), max_size=4))
def test_steps_are_maximal_runs(authors: list[list[int]]) -> None:
    streams = tuple(stream_of([CONTEXT, *part]) for part in authors)
    turns = tuple(Turn(n, "", Actor("a"), span=Span(n, 0, len(s))) for n, s in enumerate(streams))
    whole = Trajectory(Task("e", "train", {}), "g", 0, turns, streams, "failure", False, 0.0)
    table = build([whole, whole])
    steps, step = [], -1
    for part in authors:
        before = False
        for author in part:
            now = author not in (CONTEXT, REPLAY)
            step += now and not before
            steps += [step] * now
            before = now
    assert table.index["step"].tolist() == steps * 2


def test_every_way_of_naming_units_tells_them_apart_as_the_records_do() -> None:
    table = build(episodes(window=0))
    for over in ("turn", "step", "stream", "trajectory", "group"):
        mine, plain_ = table.units(over).tolist(), keys(table, over)
        pairs = set(zip(mine, plain_, strict=True))
        assert len(pairs) == len(set(mine)) == len(set(plain_)), over


def test_a_forced_opening_belongs_to_the_turn_it_opens() -> None:
    builder, turns = StreamBuilder(), []
    history: list[int] = []
    for index in range(2):
        prompt = [*history, 50, 51, 60]
        authors = [CONTEXT] * (len(prompt) - 1) + [FORCED]
        span = builder.extend(
            prompt, [70, 71], logp=[-1.0, -2.0], kind=[2, 2], prompt_author=authors
        )
        turns.append(Turn(index + 5, "", Actor("a"), span=span))
        history = [*prompt, 70, 71]
    made = Trajectory(
        Task("e", "train", {}), "g", 0, tuple(turns), builder.finish(), "failure", False, 0.0
    )
    table = build([made])
    assert table["token"].tolist() == [60, 70, 71] * 2
    assert table["turn"].tolist() == [5] * 3 + [6] * 3
    assert table["step"].tolist() == [0] * 3 + [1] * 3
    assert table.acted.tolist() == [False, True, True] * 2
    assert table["logp/sampler"].isnan().tolist() == [True, False, False] * 2


def test_rows_outside_all_turns_are_refused() -> None:
    lost = Trajectory(Task("e", "train", {}), "g", 0, (), (SMALL,), "failure", False, 0.0)
    with pytest.raises(ValueError, match="outside its turns"):
        build([lost])


def test_text_only_and_empty_tables() -> None:
    text = Trajectory(Task("e", "train", {}), "g", 0, (), (), "failure", False, 0.0)
    for table in (build([]), build([text])):
        assert len(table) == len(table.units("turn")) == len(table.valid()) == 0
        assert table.micro_batches(PLAIN, 100) == []


def test_columns_need_one_value_per_row_and_no_gradient() -> None:
    table = build(episodes())
    table["x"] = torch.ones(len(table), 2, requires_grad=True)
    assert not table["x"].requires_grad
    with pytest.raises(ValueError, match="28 rows, the table has 29"):
        table["y"] = torch.ones(28)
    assert table.spread(torch.arange(5.0)).tolist() == table["trajectory"].tolist()


def test_names_of_columns() -> None:
    assert column("logp", "teacher") == "logp/teacher"
    assert column("logp", "teacher", "hint") == "logp/teacher@hint"


# -- views in the table ---------------------------------------------------------------------------


def test_views_that_do_not_fit_are_left_out_and_counted() -> None:
    table = build(episodes(), {"hint": hinted})
    lengths = [len(stream) for t in table.trajectories for stream in t.streams]
    assert lengths == [17, 7, 13, 16, 12]
    assert table.add_view("short", within(hinted, 15)) == 2
    whole = [n for n, length in enumerate(lengths) if length + 2 <= 15]
    assert table.valid("short").tolist() == [t in whole for t in table["trajectory"].tolist()]
    assert table.add_view(PLAIN, within(plain, 12)) == 3
    assert int(table.valid().sum()) == 2 + 5
    assert bool(table.valid("hint").all())


def test_views_that_forget_rows_are_left_out_row_by_row() -> None:
    def last(trajectory: Trajectory, stream: int) -> View | None:
        spans = [turn.span for turn in trajectory.turns if turn.span is not None]
        if len(spans) < 2:
            return None
        drop = spans[-2].end - spans[0].start
        return splice(trajectory.streams[stream], [Splice(spans[0].start, drop)], forget=True)

    table = build(episodes())
    assert table.add_view("last", last) == 1
    final = {t: len(whole.turns) - 1 for t, whole in enumerate(table.trajectories)}
    pairs = zip(table["trajectory"].tolist(), table["turn"].tolist(), strict=True)
    assert table.valid("last").tolist() == [t != 1 and turn == final[t] for t, turn in pairs]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda view: View(view.ids, view.positions[1:]),
        lambda view: View(view.ids, view.positions - 1),
        lambda view: View(np.where(view.ids == 7, 6, view.ids) + 1, view.positions),
    ],
)
def test_views_of_other_tokens_are_refused(wrong: object) -> None:
    table = build(episodes())
    with pytest.raises(ValueError, match="view bad shows other tokens than stream 0"):
        table.add_view("bad", lambda t, s: wrong(plain(t, s)))  # type: ignore[operator]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(1, 20), max_size=8), st.integers(0, 3))
@example(4, [1, 1, 1], 3)  # two streams that fill a part to the last token
def test_micro_batches_hold_every_stream_once_in_order(
    tokens: int, lengths: list[int], drop: int
) -> None:
    trajectories = [episode(n, [(length, 1)]) for n, length in enumerate(lengths)]
    table = build(trajectories)
    table.add_view("some", lambda t, s: plain(t, s) if t.sample % 4 != drop else None)
    parts = table.micro_batches("some", tokens)
    wanted = [n for n in range(len(lengths)) if n % 4 != drop]
    assert [number for part in parts for number in part] == wanted
    sizes = [[lengths[n] + 1 for n in part] for part in parts]
    for number, part in enumerate(sizes):
        assert part and (sum(part) <= tokens or len(part) == 1)
        if number:  # no part could have taken the stream that opens the next one
            assert sum(sizes[number - 1]) + part[0] > tokens


def test_streams_without_rows_are_in_no_micro_batch() -> None:
    silent = Trajectory(
        Task("e", "train", {}), "g", 0, (), (stream_of([0, 0, 4]),), "failure", False, 0.0
    )
    table = build([silent, episode(1, [(2, 1)])])
    assert isinstance(table, Table)
    assert table.micro_batches(PLAIN, 1) == [[1]]
