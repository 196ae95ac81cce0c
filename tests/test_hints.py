"""Text for one prompt only: where it stands, what of it is on record, and streams without it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from agentdistill.codec import pack, unpack
from agentdistill.config import TinyModel
from agentdistill.contexts import forget_hints, forget_note, with_notes, without_note
from agentdistill.engines.base import Sample, Sampling
from agentdistill.engines.hf import HFEngine
from agentdistill.policy import Episode, ModelPolicy, Policy, Response
from agentdistill.records import Trajectory
from agentdistill.render import Renderer, materialise
from agentdistill.rollout import Request, rollout, run
from agentdistill.students import tiny
from agentdistill.views import rows_of
from tests.templates import TEMPLATES
from tests.test_informed import HINTS, PRESETS, Says, reader
from tests.toy import Corridor

HINT = "Before: go on, on and on.\nNow this."
NOTE = "The goal is on the right."


class Hinted(Policy):
    """A model with a hint on some turns, and perhaps a note that it writes itself."""

    name = "hinted"

    def __init__(self, model: ModelPolicy, hints: dict[int, str], note: str = "") -> None:
        self._model, self._hints, self._note = model, hints, note

    async def act(self, episode: Episode) -> Response:
        if not episode.turns:
            episode.note = self._note
        hint = self._hints.get(len(episode.turns), "")
        (response,) = await self._model.propose(episode, 1, hint)
        return response

    def finish(self, episode: Episode) -> None:
        self._model.finish(episode)


EVERY = dict.fromkeys(range(9), HINT)
SOME = {1: HINT, 2: "", 3: HINT + "!"}


def play(mine: Renderer, hints: dict[int, str], note: str = "") -> tuple[list[Trajectory], Says]:
    engine = Says(mine.tokenizer)
    policy = Hinted(ModelPolicy("student", engine, mine, Sampling()), hints, note)
    tasks = list(Corridor().tasks("train"))[:2]
    facts = {"renderer": mine.fingerprint}
    wanted = [Request(task, n, provenance=facts) for n, task in enumerate(tasks)]
    return run(rollout(policy, Corridor, wanted, max_turns=5)), engine


def prompt(trajectory: Trajectory, number: int) -> list[int]:
    span = trajectory.turns[number].span
    assert span is not None
    return trajectory.streams[span.stream].ids[: span.start].tolist()


def equal(one: Trajectory, other: Trajectory) -> None:
    assert len(one.streams) == len(other.streams) > 0
    for mine, wanted in zip(one.streams, other.streams, strict=True):
        for column in ("ids", "author", "kind"):
            np.testing.assert_array_equal(getattr(mine, column), getattr(wanted, column))


@pytest.mark.parametrize("preset", PRESETS)
def test_only_the_last_message_is_new(preset: str) -> None:
    mine = reader(preset)
    (hinted, heard), (plain, usual) = play(mine, EVERY), play(mine, {})
    assert len(heard.prompts) == len(usual.prompts)
    for one, other in zip(hinted, plain, strict=True):
        for number in range(len(one.turns)):
            long, short = prompt(one, number), prompt(other, number)
            first = next(n for n, (a, b) in enumerate(zip(long, short, strict=False)) if a != b)
            past = mine.text(short[:first])
            assert mine.text(long).count(HINT) == 1 and HINT not in past
            assert mine.text(long).replace(f"{HINT}\n\n", "") == mine.text(short)
        assert [t.text for t in one.turns] == [t.text for t in other.turns]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("note", ["", NOTE])
def test_without_hints_the_rows_are_those_of_plain_prompts(
    preset: str, template: str, note: str
) -> None:
    mine = reader(preset, template)
    plain = play(mine, {})[0]
    for hints in (EVERY, SOME):
        for one, other in zip(play(mine, hints, note)[0], plain, strict=True):
            view = without_note(mine)
            place = 0
            for number, stream in enumerate(one.streams):
                found = view(one, number)
                assert found is not None
                rows = rows_of(stream)
                assert found.ids[found.positions].tolist() == stream.ids[rows].tolist()
                mine_turns = [t for t in other.turns[place:]][: _turns(one, number)]
                for turn in mine_turns:
                    assert turn.span is not None
                    whole = other.streams[turn.span.stream].ids[: turn.span.end]
                    end = found.positions[_last_row(one, number, turn.index)] + 1
                    assert found.ids[:end].tolist() == whole.tolist()
                place += len(mine_turns)
            assert place == len(one.turns)


def _turns(trajectory: Trajectory, stream: int) -> int:
    return sum(t.span is not None and t.span.stream == stream for t in trajectory.turns)


def _last_row(trajectory: Trajectory, stream: int, turn: int) -> int:
    """Number of the row that ends turn ``turn`` of a stream."""
    spans = [t.span for t in trajectory.turns if t.span and t.index <= turn]
    return sum(span.end - span.start for span in spans if span.stream == stream) - 1


@pytest.mark.parametrize("preset", PRESETS)
def test_another_note_takes_the_place_of_note_and_hints(preset: str) -> None:
    mine = reader(preset)
    found = play(mine, SOME, NOTE)[0]
    for one, other in zip(found, play(mine, {}, "Another.")[0], strict=True):
        view = with_notes(mine, {one.id: "Another."})
        last = view(one, len(one.streams) - 1)
        turn = other.turns[-1]
        assert last is not None and turn.span is not None
        assert last.ids.tolist() == other.streams[turn.span.stream].ids.tolist()


@pytest.mark.parametrize("hints", [EVERY, SOME])
@pytest.mark.parametrize("preset", PRESETS)
def test_streams_can_be_made_again(preset: str, hints: dict[int, str]) -> None:
    mine, other = reader(preset), reader("tcod", "qwen")
    for one in play(mine, hints, NOTE)[0]:
        equal(materialise(one, mine), one)
        bare = forget_hints(one)
        assert not bare.streams and "renderer" not in bare.provenance
        assert all(turn.hint == "" and turn.span is None for turn in bare.turns)
        made = materialise(one, other)
        for turn in made.turns:
            assert turn.span is not None
            text = other.text(made.streams[turn.span.stream].ids[: turn.span.start].tolist())
            assert (HINT in text) is bool(turn.hint) and NOTE in text
    for one, plain in zip(play(mine, hints, NOTE)[0], play(mine, {})[0], strict=True):
        equal(materialise(forget_hints(one), mine), materialise(plain, mine))


def test_who_did_not_read_it_is_on_record() -> None:
    mine = reader("full")
    (one, _), _ = play(mine, EVERY, NOTE)
    turns = (one.turns[0], *(replace(turn, informed=False) for turn in one.turns[1:]))
    mixed = materialise(replace(one, turns=turns, streams=()), mine)
    texts = [mine.text(prompt(mixed, number)) for number in range(len(turns))]
    assert NOTE in texts[0] and HINT in texts[0]
    assert not any(NOTE in text or HINT in text for text in texts[1:])
    assert len(mixed.streams) == 2  # one with the note, one without
    view, plain = without_note(mine), play(mine, {})[0][0]
    found = view(mixed, 1)
    assert found is not None and found.ids.tolist() == plain.streams[0].ids.tolist()
    edited = forget_note(mixed, mine)
    assert edited.streams[1].ids.tolist() == plain.streams[0].ids.tolist()
    assert edited.turns[1].span == mixed.turns[1].span


@pytest.mark.parametrize("hint", HINTS)
def test_any_text_is_a_hint(hint: str) -> None:
    mine = reader("full")
    hints = {0: hint, 1: hint}
    found, plain = play(mine, hints)[0], play(mine, {})[0]
    for one, other in zip(unpack(pack(found)), found, strict=True):
        assert one.turns == other.turns and one.turns[1].hint == hint
    for one, other in zip(found, plain, strict=True):
        equal(materialise(forget_hints(one), mine), materialise(other, mine))
        last = without_note(mine)(one, len(one.streams) - 1)
        assert last is not None and last.ids.tolist() == other.streams[0].ids.tolist()


def test_a_stream_of_somebody_else_is_refused() -> None:
    (one, _), _ = play(reader("full"), EVERY)
    with pytest.raises(ValueError, match="materialise"):
        without_note(reader("window"))(one, 0)
    other = Renderer(reader("full").tokenizer, PRESETS["full"], "Another instruction.")
    lied = Trajectory(**{**_fields(one), "provenance": {"renderer": other.fingerprint}})
    with pytest.raises(ValueError, match="materialise"):
        without_note(other)(lied, 0)


def _fields(trajectory: Trajectory) -> dict[str, Any]:
    return {name: getattr(trajectory, name) for name in Trajectory.__dataclass_fields__}


# -- several samples ------------------------------------------------------------------------------


def model(n: int, hints: bool = False) -> tuple[list[Trajectory], HFEngine]:
    mine = reader("full")
    engine = HFEngine(
        tiny.build(TinyModel(hidden=16, heads=1, layers=1), mine.tokenizer, 0), mine.tokenizer
    )
    inner = ModelPolicy("student", engine, mine, Sampling(max_tokens=4))

    class Many(Policy):
        name = "many"

        async def act(self, episode: Episode) -> Response:
            drawn = await inner.propose(episode, n, HINT if hints else "")
            assert len(drawn) == n
            texts.append([response.text for response in drawn])
            return drawn[0]

        def finish(self, episode: Episode) -> None:
            inner.finish(episode)

    texts: list[list[str]] = []
    wanted = [Request(task, n) for n, task in enumerate(list(Corridor().tasks("train"))[:3])]
    found = run(rollout(Many() if n else inner, Corridor, wanted, max_turns=4))
    assert n < 2 or any(len(set(some)) > 1 for some in texts)
    return found, engine


def test_the_first_of_many_is_the_only_one() -> None:
    plain, _ = model(0)
    for n in (1, 3):
        found, engine = model(n)
        for one, other in zip(found, plain, strict=True):
            assert [t.text for t in one.turns] == [t.text for t in other.turns]
            for mine, wanted in zip(one.streams, other.streams, strict=True):
                np.testing.assert_array_equal(mine.ids, wanted.ids)
                np.testing.assert_allclose(mine.logp, wanted.logp, atol=1e-4, equal_nan=True)
        assert not engine._kv._sessions  # all of them were released


def test_keys_and_values_survive_hints() -> None:
    found, _ = model(2, hints=True)
    for trajectory in found:
        for before, turn in zip(trajectory.turns, trajectory.turns[1:], strict=False):
            assert before.span is not None and turn.span is not None
            # All up to the last message of the turn before is there still.
            assert 0 < turn.usage.cache_read <= before.span.start
            assert turn.usage.cache_read + turn.usage.input == turn.span.start


def test_one_failure_leaves_nobody_running() -> None:
    mine = reader("full")

    class Torn(Says):
        async def generate(self, ids: Any, sampling: Any, **options: Any) -> Sample:
            if str(options["session"]).endswith("/1"):
                raise OSError("torn")
            return await super().generate(ids, sampling, **options)

    policy = ModelPolicy("student", Torn(mine.tokenizer), mine, Sampling())

    class Two(Policy):
        name = "two"

        async def act(self, episode: Episode) -> Response:
            return (await policy.propose(episode, 2))[0]

    with pytest.raises(OSError, match="torn"):
        run(rollout(Two(), Corridor, [Request(next(Corridor().tasks("train")), 0)]))
