"""Messages to token streams: frames, token in and token out, kinds, texts made into streams."""

from __future__ import annotations

import random
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from agentdistill import actions
from agentdistill.config import PromptConfig
from agentdistill.errors import ConfigError
from agentdistill.frames import Frames
from agentdistill.records import Actor, Author, Kind, Task, Trajectory, Turn
from agentdistill.render import Conversation, Renderer, Reply, materialise
from tests.templates import BROKEN, TEMPLATES, rendered, renderer, tokenizer

# -- frames ---------------------------------------------------------------------------------------


def test_frames_of_the_tiny_template() -> None:
    assert Frames.probe(tokenizer()) == Frames(
        "<|system|>", "<|user|>", "<|user|>", "<|assistant|>", "<|user|>"
    )


def test_frames_of_a_template_like_qwens() -> None:
    user, answer = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    frames = Frames.probe(tokenizer("qwen"))
    assert frames == Frames(
        "<|im_start|>system\n", "<|im_end|>\n" + user, user, answer, "\n" + user
    )


def test_a_generation_prompt_that_history_lacks_is_kept_and_noted() -> None:
    frames = Frames.probe(tokenizer("qwen", think=True))
    assert frames.reply.endswith("assistant\n<think>\n\n</think>\n\n")
    assert len(frames.notes) == 1


def test_without_a_system_role_the_instruction_opens_the_first_message() -> None:
    frames = Frames.probe(tokenizer("no system"))
    assert (frames.system, frames.head) == (None, "<|pad|><|user|>")
    assert frames.opening("Rules.") == "<|pad|><|user|>Rules.\n\n"
    assert frames.opening("") == frames.head


@pytest.mark.parametrize("case", BROKEN)
def test_templates_that_cannot_work_are_refused(case: str) -> None:
    broken = tokenizer()
    broken.chat_template = BROKEN[case]
    with pytest.raises(ConfigError, match="chat template") as caught:
        Renderer(broken, PromptConfig())
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_of_turn_is_refused() -> None:
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(ConfigError, match="eos_token"):
        Frames.probe(endless)


@pytest.mark.parametrize("instruction", ["", "Walk to the goal."])
@pytest.mark.parametrize("template", TEMPLATES)
def test_joined_pieces_are_the_templates_own_rendering(template: str, instruction: str) -> None:
    mine = renderer(template, instruction)
    said = ["left", "<action>right</action>", "right"]
    seen = ["P..G\nstart", ".P.G", "..PG", "on"]
    conversation = Conversation(mine)
    for observation, text in zip(seen, said, strict=False):
        conversation.add(observation, mine.written(text))
    ids, authors = conversation.ask(seen[-1])
    assert ids == rendered(mine, seen, said)
    assert len(authors) == len(ids)
    assert mine.frames.notes == ()
    if template == "no system":  # the beginning of the sequence is there once
        assert ids.count(mine.tokenizer.pad_token_id) == 1


# -- token in, token out --------------------------------------------------------------------------


def holds(ids: list[int], part: list[int]) -> list[int]:
    """Where ``part`` begins in ``ids``."""
    return [i for i in range(len(ids) - len(part) + 1) if ids[i : i + len(part)] == part]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_prompts_hold_the_sampled_ids_verbatim(data: st.DataObject) -> None:
    mine = renderer(
        data.draw(st.sampled_from(TEMPLATES)),
        data.draw(st.sampled_from(["", "Walk."])),
        window=data.draw(st.sampled_from([None, 0, 1, 2])),
    )
    size = len(mine.tokenizer)
    token = st.integers(0, size - 1).filter(lambda i: i != mine.end)
    replies = data.draw(st.lists(st.lists(token, max_size=6), max_size=4))
    ended = data.draw(st.lists(st.booleans(), min_size=4, max_size=4))
    conversation = Conversation(mine)
    for ids, end in zip(replies, ended, strict=False):
        whole = (*ids, mine.end) if end else tuple(ids)
        kinds = mine.kinds(whole, mine.grammar("left"))
        assert len(kinds) == len(whole)
        conversation.add("P..G", Reply(whole, kinds, Author.ACTOR))
    ids, authors = conversation.ask("now")
    window = mine.prompt.window
    shown = replies if window is None else replies[max(0, len(replies) - window) :]
    spoken = [[i for i, a in zip(ids, authors, strict=True) if a == Author.ACTOR]]
    closed = ended[len(replies) - len(shown) : len(replies)]
    wanted = [r + [mine.end] * e for r, e in zip(shown, closed, strict=True)]
    assert spoken == [[i for part in wanted for i in part]]
    for reply in shown:  # each in one piece and with the end of its turn, whoever wrote that
        assert holds(ids, [*mine.encode(mine.frames.reply), *reply, mine.end])


def test_ids_that_would_not_survive_their_text_do() -> None:
    mine = renderer()
    whole = mine.encode("right")
    split = tuple(mine.encode(c)[0] for c in "right")
    assert mine.tokenizer.decode(list(split)) == mine.tokenizer.decode(list(whole)) == "right"
    assert split != whole
    conversation = Conversation(mine)
    conversation.add("P..G", Reply((*split, mine.end), (Kind.ACT,) * 6, Author.CONTEXT))
    assert holds(conversation.ask("on")[0], [*split, mine.end])


def test_a_response_cut_by_length_gets_its_end_as_context() -> None:
    mine = renderer()
    conversation = Conversation(mine)
    conversation.add("a", Reply((7, 8), (Kind.ACT,) * 2, Author.TEACHER))
    conversation.add("b", Reply((7, mine.end), (Kind.ACT,) * 2, Author.TEACHER))
    ids, authors = conversation.ask("c")
    pairs = list(zip(ids, authors, strict=True))
    start = holds(ids, [7, 8, mine.end])[0]
    assert [a for _, a in pairs[start : start + 3]] == [2, 2, 0]
    assert [a for i, a in pairs if i == mine.end] == [Author.CONTEXT, Author.TEACHER]


def test_the_window_counts_turns_and_keeps_the_instruction() -> None:
    mine = renderer(instruction="Walk.", window=1)
    conversation = Conversation(mine)
    for number in range(3):
        conversation.add(f"seen {number}", mine.written(f"said {number}"))
    text = mine.tokenizer.decode(conversation.ask("seen 3")[0])
    assert (
        text == "<|system|>Walk.<|user|>seen 2<|assistant|>said 2<|end|><|user|>seen 3<|assistant|>"
    )


def test_dropping_reasoning_deletes_its_tokens_and_nothing_else() -> None:
    mine = renderer(grammar="action", drop_reasoning=True)
    said = "<think>hm, right</think><action>right</action>"
    reply = mine.written(said)
    conversation = Conversation(mine)
    conversation.add("P..G", reply)
    rest = [i for i, k in zip(reply.ids, reply.kinds, strict=True) if k != Kind.REASON]
    frame = [*mine.context("P..G", first=True), *rest, *mine.context("on", first=False)]
    assert conversation.ask("on")[0] == frame
    assert mine.tokenizer.decode(rest) == "<action>right</action><|end|>"


# -- kinds ----------------------------------------------------------------------------------------


def split(mine: Renderer, text: str, cuts: list[int]) -> tuple[int, ...]:
    """``text`` as a model might sample it: between even cuts in its usual ids, else in bytes."""
    borders = [0, *sorted(c for c in cuts if 0 < c < len(text)), len(text)]
    ids: list[int] = []
    for number, (begin, end) in enumerate(pairwise(borders)):
        usual = mine.encode(text[begin:end])
        letters = "".join(mine.tokenizer.convert_ids_to_tokens(list(usual)))
        ids += mine.tokenizer.convert_tokens_to_ids(list(letters)) if number % 2 else usual
    return tuple(ids)


def labels(mine: Renderer, ids: tuple[int, ...], text: str) -> list[int]:
    """Kind of each token by its bytes: a token belongs to a span if it has a byte of it."""
    parsed = mine.grammar(text)
    kinds, at = [], 0
    for token in mine.tokenizer.convert_ids_to_tokens(list(ids)):
        kind, begin, end = Kind.FORMAT, at, at + len(token)
        for span, name in ((parsed.reason_span, Kind.REASON), (parsed.act_span, Kind.ACT)):
            if span is not None:
                first, last = (len(text[:char].encode()) for char in span)
                kind = name if begin < last and end > first else kind
        kinds.append(int(kind))
        at = end
    return kinds


words = st.text(st.sampled_from("ab 右ü🚪<>\n"), max_size=8) | st.sampled_from(
    ["right", "the goal"]
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["plain", "action", "answer"]),
    st.builds(
        "{}<think>{}</think>{}<action>{}</action>{}".format, words, words, words, words, words
    )
    | st.builds("<answer>{} || {}</answer>{}".format, words, words, words)
    | words,
    st.lists(st.integers(0, 60), max_size=8),
)
@example("action", "<action>right</action>", [])  # "right</action>" is one token
@example("plain", "右", [])  # one character in three tokens
def test_kinds_equal_a_count_of_bytes(grammar: str, text: str, cuts: list[int]) -> None:
    assume(text)
    mine = _of_grammar(grammar)
    ids = split(mine, text, cuts)
    assert mine.tokenizer.decode(list(ids)) == text
    wanted = labels(mine, ids, text)
    assert list(mine.kinds(ids, mine.grammar(text))) == wanted
    ended = mine.kinds((*ids, mine.end), mine.grammar(text))
    assert list(ended) == [*wanted, Kind.FORMAT]


@cache
def _of_grammar(grammar: str) -> Renderer:
    return renderer(grammar=grammar)


def test_kinds_of_a_usual_response() -> None:
    mine = renderer(grammar="action")
    text = "<think>go</think>\n<action>left</action>"
    ids = split(mine, text, [6, 8, 17, 18, 26, 30])
    kinds = mine.kinds((*ids, mine.end), mine.grammar(text))
    spoken = {k: "" for k in Kind}
    for token, kind in zip(ids, kinds, strict=False):
        spoken[Kind(kind)] += mine.tokenizer.decode([token])
    assert spoken == {
        Kind.CONTEXT: "",
        Kind.REASON: "<think>go</think>\n",
        Kind.ACT: "left",
        Kind.FORMAT: "<action></action>",
    }


# -- texts made into streams ----------------------------------------------------------------------


def told(*texts: str, replayed: int = 0, stops: tuple[str, ...] = ()) -> Trajectory:
    """A trajectory of texts alone."""
    turns = tuple(
        Turn(
            n,
            f"seen {n}",
            Actor("expert"),
            Author.REPLAY if n < replayed else Author.ACTOR,
            text=text,
            stop=stops[n] if stops else "none",
        )
        for n, text in enumerate(texts)
    )
    return Trajectory(Task("tests/told", "train", {}), "g", 0, turns, (), "success", True, 1.0)


@pytest.mark.parametrize("prompt", [{}, {"window": 0}, {"window": 1}, {"drop_reasoning": True}])
@pytest.mark.parametrize("replayed", [0, 1])
def test_materialised_responses_are_rows_once(prompt: dict[str, Any], replayed: int) -> None:
    mine = renderer(grammar="action", **prompt)
    texts = [f"<think>{w}</think><action>{w}</action>" for w in ("left", "right", "on")]
    made = materialise(told(*texts, replayed=replayed), mine)
    spoken = []
    for stream in made.streams:
        assert np.isnan(stream.logp).all()
        spoken += stream.ids[stream.author == Author.ACTOR].tolist()
        assert (stream.kind[stream.author != Author.ACTOR] == Kind.CONTEXT).all()
    assert spoken == [i for text in texts[replayed:] for i in mine.written(text).ids]
    for turn in made.turns[:replayed]:
        assert turn.span is None
    for turn, text in zip(made.turns[replayed:], texts[replayed:], strict=True):
        assert turn.span is not None
        ids = made.streams[turn.span.stream].ids[turn.span.start : turn.span.end]
        assert tuple(ids.tolist()) == mine.written(text).ids
    assert made.provenance["renderer"] == mine.fingerprint


def test_replayed_turns_keep_their_author_in_the_stream() -> None:
    mine = renderer()
    stream = materialise(told("left", "right", replayed=1), mine).streams[0]
    assert stream.ids[stream.author == Author.REPLAY].tolist() == [*mine.encode("left"), mine.end]


def test_a_told_response_that_was_cut_teaches_no_end() -> None:
    mine = renderer()
    made = materialise(told("left", "right", stops=("length", "stop")), mine)
    (stream,) = made.streams
    spoken = stream.ids[stream.author == Author.ACTOR].tolist()
    assert spoken == [*mine.encode("left"), *mine.encode("right"), mine.end]
    assert stream.ids.tolist().count(mine.end) == 2


def test_materialising_again_changes_nothing() -> None:
    mine = renderer(grammar="action", drop_reasoning=True)
    once = materialise(told("<think>a</think><action>left</action>", "right"), mine)
    twice = materialise(once, mine)
    assert once.turns == twice.turns
    for one, two in zip(once.streams, twice.streams, strict=True):
        assert all(
            np.array_equal(getattr(one, c), getattr(two, c)) for c in ("ids", "author", "kind")
        )


def test_the_fingerprint_names_what_changes_the_ids() -> None:
    prints = {
        renderer().fingerprint,
        renderer("qwen").fingerprint,
        renderer(instruction="Walk.").fingerprint,
        renderer(window=1).fingerprint,
        renderer(grammar="action").fingerprint,
    }
    assert len(prints) == 5
    assert renderer().fingerprint == renderer().fingerprint


def test_what_a_grammar_writes_it_labels_as_an_action() -> None:
    for grammar in actions.GRAMMARS:
        mine = _of_grammar(grammar)
        reply = mine.written(actions.write(grammar, ("left",)))
        spoken = [i for i, k in zip(reply.ids, reply.kinds, strict=True) if k == Kind.ACT]
        assert "left" in mine.tokenizer.decode(spoken)
        assert Kind.REASON not in reply.kinds


def test_random_ids_never_break_the_labels() -> None:
    mine = _of_grammar("action")
    source = random.Random(0)
    for _ in range(200):
        ids = tuple(source.randrange(len(mine.tokenizer)) for _ in range(source.randrange(12)))
        text = mine.tokenizer.decode(list(ids), skip_special_tokens=True)
        assert len(mine.kinds(ids, mine.grammar(text))) == len(ids)
