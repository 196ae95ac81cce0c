"""Notes in prompts: the informed actor, what is left without a note, and forced first thoughts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentdistill.callbacks import Callback
from agentdistill.codec import pack, unpack
from agentdistill.collection import collect
from agentdistill.config import PROMPTS, PromptConfig, TinyModel, load
from agentdistill.contexts import forget_note, with_notes, without_note
from agentdistill.engines.base import Capabilities, Engine, Sample, Sampling
from agentdistill.engines.hf import HFEngine
from agentdistill.errors import ConfigError
from agentdistill.policy import FirstThought, ModelPolicy
from agentdistill.records import Author, Kind, Start, Trajectory, Usage
from agentdistill.render import Renderer, materialise
from agentdistill.rollout import Request, rollout, run
from agentdistill.run import Run
from agentdistill.students import tiny
from agentdistill.table import build
from agentdistill.views import rows_of
from tests.templates import TEMPLATES, tokenizer
from tests.toy import Corridor, micro

PRESETS = {
    "full": PROMPTS["react"],
    "window": PROMPTS["react"].model_copy(update={"window": 2}),
    "react-drop": PROMPTS["react-drop"],
    "tcod": PROMPTS["tcod"],
}
HINT = "The goal is on the right.\nGo there."
HINTS = [
    HINT,
    "<|end|><|user|>you may <|im_end|> stop",
    "\n\n  ü 右 {goal} {note}\n",
    " ",
    "\ud800",
]
ANSWER = "First I look.\nThen I walk right.\n \nAt last I stop."
COST = Usage(3, 2, 0, 5)


class Says(Engine):
    """Says what its seed says, whatever the prompt; to a question outside of episodes, `answer`."""

    name = "says"
    capabilities = Capabilities(ids=True)

    def __init__(self, tokenizer: Any, answer: str = ANSWER) -> None:
        self._tokenizer, self._answer = tokenizer, answer
        self.asked: list[list[int]] = []
        self.prompts: list[list[int]] = []

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int = 0, session: str | None = None
    ) -> Sample:
        source = random.Random(seed)
        (self.asked if session is None else self.prompts).append(list(ids))
        thought = source.choice(["", "<think>go on</think>\n"])
        text = f"{thought}<action>{source.choice(['left', 'right'])}</action>"
        text = self._answer if session is None else text
        said = (
            *self._tokenizer.encode(text, add_special_tokens=False),
            self._tokenizer.eos_token_id,
        )
        return Sample(said, tuple(-i / 64 for i in said), text, "stop", usage=COST)


@cache
def reader(preset: str, template: str = "tiny") -> Renderer:
    return Renderer(tokenizer(template), PRESETS[preset], "Walk to the goal.")


def play(
    mine: Renderer, note: str = "", kind: Any = ModelPolicy, answer: str = ANSWER, **more: Any
) -> tuple[list[Trajectory], Says]:
    """Four episodes of two groups, each the same with every note."""
    engine = Says(mine.tokenizer, answer)
    policy = kind("student", engine, mine, Sampling())
    tasks = list(Corridor().tasks("train"))[:2]
    facts = {"renderer": mine.fingerprint}
    requests = [
        Request(task, 10 * n + k, f"g{n}", k, provenance=facts, note=note, **more)
        for n, task in enumerate(tasks)
        for k in (0, 1)
    ]
    grammar = mine.prompt.grammar
    return run(rollout(policy, Corridor, requests, max_turns=6, grammar=grammar)), engine


def same(one: Trajectory, other: Trajectory, *columns: str) -> None:
    """Equal streams in ``columns``, and equal turns."""
    assert len(one.streams) == len(other.streams) > 0
    for mine, wanted in zip(one.streams, other.streams, strict=True):
        for column in columns:
            np.testing.assert_array_equal(getattr(mine, column), getattr(wanted, column))
    assert one.turns == other.turns


# -- the informed actor ---------------------------------------------------------------------------


@pytest.mark.parametrize("note", HINTS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("preset", PRESETS)
def test_without_its_note_a_stream_is_the_plain_one(preset: str, template: str, note: str) -> None:
    mine = reader(preset, template)
    (informed, heard), (plain, usual) = play(mine, note), play(mine)
    extra = list(mine.note(note))
    for long, short in zip(heard.prompts, usual.prompts, strict=True):
        at = mine.note_at(short)
        assert at == len(mine.encode(mine.frames.opening(mine.instruction)))
        assert long == [*short[:at], *extra, *short[at:]]
    view = without_note(mine)
    for one, other in zip(informed, plain, strict=True):
        assert one.provenance["note"] == note and "note" not in other.provenance
        for number, stream in enumerate(other.streams):
            found = view(one, number)
            assert found is not None and found.ids.tolist() == stream.ids.tolist()
            assert found.positions.tolist() == rows_of(stream).tolist()
        same(forget_note(one, mine), other, "ids", "author", "kind")


def test_the_presets_differ_in_their_streams() -> None:
    sizes = {preset: len(play(reader(preset), HINT)[0][0].streams) for preset in PRESETS}
    turns = len(play(reader("full"))[0][0].turns)
    assert sizes["full"] == 1 and sizes["tcod"] == turns
    assert 1 < sizes["window"] < turns and sizes["react-drop"] > 1


def test_no_note_is_no_change() -> None:
    mine = reader("window")
    one, other = (pack(play(mine, **options)[0]) for options in ({}, {"note": ""}))
    assert one == other
    assert mine.note("") == ()
    trajectory = play(mine)[0][0]
    for number, stream in enumerate(trajectory.streams):
        view = without_note(mine)(trajectory, number)
        assert view is not None and view.ids.tolist() == stream.ids.tolist()


def test_replayed_turns_do_not_move_the_note() -> None:
    mine, start = reader("window"), Start(("left", "left", "left"), "expert")
    found = [play(mine, note, start=start)[0] for note in (HINT, "")]
    for one, other in zip(*found, strict=True):
        if other.streams:
            same(forget_note(one, mine), other, "ids", "author", "kind")
    assert any(Author.REPLAY in stream.author for t in found[0] for stream in t.streams)


def test_keys_and_values_are_kept_between_informed_turns() -> None:
    mine = reader("full")
    model = tiny.build(TinyModel(hidden=16, heads=1, layers=1), mine.tokenizer, 0)
    engine = HFEngine(model, mine.tokenizer, name="student")
    policy = ModelPolicy("student", engine, mine, Sampling(max_tokens=4))
    task = next(Corridor().tasks("train"))
    wanted = [Request(task, 1, note=note) for note in (HINT, "")]
    informed, plain = run(rollout(policy, Corridor, wanted, max_turns=4))
    known = 0
    for turn in informed.turns:
        assert turn.span is not None
        assert turn.usage.cache_read == known
        assert turn.usage.cache_read + turn.usage.input == turn.span.start
        known = turn.span.end - 1
    size = len(mine.note(HINT))
    assert informed.turns[0].span.start == plain.turns[0].span.start + size


def test_the_note_survives_the_store() -> None:
    (trajectory, *_), _ = play(reader("full"), HINTS[-1])
    edited = forget_note(trajectory, reader("full"))
    for one, other in zip(unpack(pack([trajectory, edited])), (trajectory, edited), strict=True):
        same(one, other, "ids", "author", "kind", "logp")
        assert one.provenance == other.provenance and one.id == other.id
    assert edited.provenance["hint"] == HINTS[-1] and "note" not in edited.provenance


def test_another_reader_of_an_informed_episode_reads_the_note_too() -> None:
    (trajectory, *_), _ = play(reader("full"), HINT)
    again = materialise(trajectory, reader("full"))
    same(again, trajectory, "ids", "author", "kind")
    other = reader("tcod", "qwen")
    made = materialise(trajectory, other)
    plain = materialise(play(reader("full"))[0][0], other)
    same(forget_note(made, other), plain, "ids", "author", "kind")


# -- the edit of a group --------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_forgotten_note_leaves_the_rows_of_a_plain_episode(preset: str) -> None:
    mine = reader(preset)
    informed, plain = play(mine, HINT)[0], play(mine)[0]
    edited = [forget_note(trajectory, mine) for trajectory in informed]
    one, other = build(edited), build(plain)
    for name, values in other.index.items():
        assert one[name].tolist() == values.tolist(), name
    assert bool(one["logp/sampler"].isnan().all()) and not other["logp/sampler"].isnan().any()
    for before, after in zip(informed, edited, strict=True):
        assert after.derived_from == before.id != after.id
        assert after.provenance["edit"] == "hint"
        assert (after.success, after.reward, after.end) == (
            before.success,
            before.reward,
            before.end,
        )


def test_a_note_is_forgotten_where_it_was() -> None:
    mine = reader("full")
    (plain, *_), _ = play(mine)
    with pytest.raises(ValueError, match="no note"):
        forget_note(plain, mine)
    (informed, *_), _ = play(mine, HINT)
    for act in (forget_note, lambda t, r: without_note(r)(t, 0)):
        with pytest.raises(ValueError, match=r"stream 0 .*materialise"):
            act(informed, reader("window"))
    claimed = Trajectory(**{**_fields(plain), "provenance": {"note": HINT}})
    with pytest.raises(ValueError, match=r"stream 0 .*materialise"):
        forget_note(claimed, mine)


def test_text_alone_forgets_before_it_becomes_tokens() -> None:
    mine = reader("full")
    informed, plain = play(mine, HINT)[0][0], play(mine)[0][0]
    told = Trajectory(**{**_fields(informed), "streams": ()})
    same(materialise(forget_note(told, mine), mine), plain, "ids", "author", "kind")


def _fields(trajectory: Trajectory) -> dict[str, Any]:
    return {name: getattr(trajectory, name) for name in Trajectory.__dataclass_fields__}


def test_another_note_stands_in_the_place_of_the_actors_own() -> None:
    mine = reader("window")
    (informed, *_), (plain, *_) = play(mine, HINT)[0], play(mine)[0]
    own, other = (with_notes(mine, {informed.id: note}) for note in (HINT, "Something else."))
    reference = with_notes(mine, {plain.id: "Something else."})
    for number, stream in enumerate(informed.streams):
        assert own(informed, number).ids.tolist() == stream.ids.tolist()
        assert other(informed, number).ids.tolist() == reference(plain, number).ids.tolist()


# -- forced first thoughts ------------------------------------------------------------------------

FIRST = "First I look.\nThen I walk right."


@pytest.mark.parametrize("preset", PRESETS)
def test_the_first_response_begins_with_the_answer(preset: str) -> None:
    mine = reader(preset)
    found, engine = play(mine, kind=FirstThought)
    forced = mine.plain(f"<think>{FIRST}\n\n")
    assert len(engine.asked) == len(found)
    for trajectory, asked in zip(found, engine.asked, strict=True):
        first, *later = trajectory.turns
        assert first.observation in mine.tokenizer.decode(asked)
        stream, span = trajectory.streams[0], first.span
        ids = stream.ids[span.start : span.end].tolist()
        assert tuple(ids[: len(forced)]) == forced
        assert first.text == mine.text(ids) and first.text.startswith(f"<think>{FIRST}\n\n")
        authors = stream.author[span.start : span.end].tolist()
        assert authors == [Author.FORCED] * len(forced) + [Author.ACTOR] * (len(ids) - len(forced))
        logp = stream.logp[span.start : span.end]
        assert np.isnan(logp[: len(forced)]).all() and not np.isnan(logp[len(forced) :]).any()
        wanted = mine.kinds(ids, mine.grammar(first.text))
        assert tuple(stream.kind[span.start : span.end].tolist()) == wanted
        assert first.usage == Usage(6, 4, 0, 10)
        for turn in later:
            assert turn.usage == COST and FIRST not in turn.text
    assert any(t.turns[0].reasoning.startswith(FIRST) for t in found)


def test_forced_rows_are_rows_that_nobody_acted() -> None:
    mine = reader("full")
    found, _ = play(mine, kind=FirstThought)
    table = build(found)
    forced = table["author"] == Author.FORCED
    size = len(mine.plain(f"<think>{FIRST}\n\n"))
    assert int(forced.sum()) == size * len(found)
    assert not (forced & table.acted).any() and bool((forced | table.acted).all())
    assert set(table["turn"][forced].tolist()) == {0}
    assert bool(table["logp/sampler"][forced].isnan().all())
    for stream in (trajectory.streams[0] for trajectory in found):
        assert int((stream.author[rows_of(stream)] == Author.FORCED).sum()) == size
    assert all(len(trajectory.streams) == 1 for trajectory in found)


@pytest.mark.parametrize(
    ("grammar", "template", "begin", "end"),
    [
        ("plain", {}, "<think>", "</think>\n\n"),
        ("answer", {}, "<think>", "\n\n"),
        ("code", {}, "<think>", "\n\n"),
        ("action", {"open": True}, "", "\n\n"),
        ("plain", {"open": True}, "", "</think>\n\n"),
    ],
)
def test_the_thought_stands_where_the_format_has_thoughts(
    grammar: Any, template: dict[str, Any], begin: str, end: str
) -> None:
    words = tokenizer("qwen" if template else "tiny", **template)
    mine = Renderer(words, PromptConfig(grammar=grammar), "Walk.")
    answer = f"hm</think>\n\n{ANSWER}" if template else ANSWER
    first = play(mine, kind=FirstThought, answer=answer)[0][0].turns[0]
    assert first.text.startswith(begin + FIRST + end)
    if grammar == "plain":
        assert first.reasoning == FIRST
        assert first.actions == (first.text.removeprefix(begin + FIRST + end),)


def test_an_answer_speaks_but_does_not_act() -> None:
    mine = reader("full")
    answer = "</think><action>left</action> is <|end|> wise\n\nmore"
    (trajectory, *_), _ = play(mine, kind=FirstThought, answer=answer)
    first = trajectory.turns[0]
    assert first.text.startswith("<think>left is <|end|> wise\n\n")
    stream, span = trajectory.streams[0], first.span
    assert stream.ids[span.start : span.end].tolist().count(mine.end) == 1


def test_without_an_answer_nothing_is_forced() -> None:
    mine = reader("full")
    silent, plain = play(mine, kind=FirstThought, answer=" \n\n")[0], play(mine)[0]
    for one, other in zip(silent, plain, strict=True):
        assert one.turns[0].usage == Usage(6, 4, 0, 10)
        assert [turn.text for turn in one.turns] == [turn.text for turn in other.turns]
        for mine_, wanted in zip(one.streams, other.streams, strict=True):
            assert mine_.author.tolist() == wanted.author.tolist()


def test_the_first_thought_comes_after_what_was_replayed() -> None:
    mine = reader("full")
    found, engine = play(mine, kind=FirstThought, start=Start(("left",), "student"))
    played = [trajectory for trajectory in found if trajectory.acted]
    assert played and len(engine.asked) == len(played)
    for trajectory in played:
        (stream,) = trajectory.streams
        turn = trajectory.acted[0]
        assert stream.author[turn.span.start] == Author.FORCED and turn.index == 1


def _collecting(folder: Path, policy: str) -> tuple[Run, Any]:
    stage = {"do": "collect", "name": "demos", "policy": policy, "episodes": 3, "batch": 3}
    stage |= {"only_success": False, "avoid_held_out": False, "first_thought": True}
    config = load(micro(folder, stages=[stage], evaluate={}, prompt="react"))
    return Run(config), config.stages[0]


def test_a_collect_stage_asks_for_first_thoughts(tmp_path: Path) -> None:
    the_run, stage = _collecting(tmp_path, "student")
    collect(the_run, stage, Callback())
    episodes = the_run.episodes("demos")
    assert all(t.provenance["first_thought"] is True for t in episodes)
    forced = [Author.FORCED in t.streams[0].author for t in episodes]
    assert len(forced) == 3 and any(forced)
    for trajectory in episodes:
        for turn in trajectory.turns[1:]:
            stream = trajectory.streams[turn.span.stream]
            assert Author.FORCED not in stream.author[turn.span.start : turn.span.end]
        assert Kind.CONTEXT not in trajectory.streams[0].kind[rows_of(trajectory.streams[0])]


def test_scripts_have_no_first_thoughts(tmp_path: Path) -> None:
    the_run, stage = _collecting(tmp_path, "expert")
    with pytest.raises(ConfigError, match=r"stages\.demos\.first_thought"):
        collect(the_run, stage, Callback())
