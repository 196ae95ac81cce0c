"""Privileged text: what notes say, when there are none, and that they change no compared token."""

from __future__ import annotations

import dataclasses
import random
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentdistill.config import PROMPTS, PromptConfig
from agentdistill.contexts import TEXTS, notes, with_notes
from agentdistill.methods.space import ContextAxis
from agentdistill.records import (
    Actor,
    Author,
    Fault,
    Start,
    StepResult,
    Task,
    Trajectory,
    Turn,
    Verdict,
)
from agentdistill.render import Renderer, materialise
from agentdistill.table import build
from agentdistill.views import rows_of
from tests.templates import TEMPLATES, tokenizer

# -- tokens ---------------------------------------------------------------------------------------

PRESETS = {
    "full": PROMPTS["react"],
    "window": PROMPTS["react"].model_copy(update={"window": 1}),
    "react-drop": PROMPTS["react-drop"],
    "tcod": PROMPTS["tcod"],
    "bare": PROMPTS["bare"],
}


def joining() -> Any:
    """A tokenizer that joins across lines, so that an opening may end inside of a token."""
    from tokenizers import pre_tokenizers, trainers

    found = tokenizer("no system")
    backend = found.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = [token.content for token in found.added_tokens_decoder.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["a\n\nb", "c\n\n\nd", "e\n\n\nf", "g\n\nh"] * 9, trainer)
    return found


@cache
def reader(preset: str, template: str, instruction: str = "Walk to the goal.") -> Renderer:
    words = joining() if template == "joining" else tokenizer(template)
    return Renderer(words, PRESETS[preset], instruction)


texts = st.text(max_size=12) | st.lists(
    st.sampled_from(["\n", "\n\n", "<|end|>", "<|user|>", "<think>", "{note}", "P..G", " ", "右"]),
    max_size=5,
).map("".join)
turns = st.lists(
    st.tuples(texts, st.sampled_from(["left", "right"]), texts), min_size=1, max_size=4
)


def told(seen: Any, goal: str = "", **changes: Any) -> Trajectory:
    """An episode of texts; each turn is an observation, an action and a thought."""
    said = [f"<think>{thought}</think><action>{action}</action>" for _, action, thought in seen]
    found = tuple(
        Turn(n, observation, Actor("student"), text=text, actions=(action,))
        for n, ((observation, action, _), text) in enumerate(zip(seen, said, strict=True))
    )
    task = Task("tests/told", "train", {})
    whole = Trajectory(task, "g", 0, found, (), "success", True, 1.0, goal=goal)
    return dataclasses.replace(whole, **changes)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(sorted(PRESETS)),
    st.sampled_from([*TEMPLATES, "joining"]),
    st.sampled_from(["", "Walk to the goal."]),
    turns,
    texts,
    texts.filter(bool),
)
@example("full", "joining", "Walk to the goal.", [("\nP", "left", "")], "", "\n\nP")
def test_a_context_changes_nothing_that_is_compared(
    preset: str, template: str, instruction: str, seen: Any, goal: str, note: str
) -> None:
    mine = reader(preset, template, instruction)
    plain = materialise(told(seen, goal), mine)
    informed = materialise(told(seen, goal, provenance={"note": note}), mine)
    extra = mine.note(note)
    assert mine.text(extra).endswith("\n") and mine.end not in extra
    before = build([plain])
    table = build([plain], {"context": with_notes(mine, {plain.id: note})})
    assert [v.ids.tolist() for v in table.views["plain"]] == [
        v.ids.tolist() for v in before.views["plain"]
    ]
    assert bool(table.valid("context").all())
    opening = mine.encode(mine.frames.opening(mine.instruction))
    for number, stream in enumerate(plain.streams):
        ids, view = stream.ids.tolist(), table.views["context"][number]
        at = mine.note_at(ids)
        assert ids[:at] == list(opening[:at])
        assert ids[: at + 1] != list(opening[: at + 1]) or at == len(opening)
        assert view.ids.tolist() == [*ids[:at], *extra, *ids[at:]]
        assert view.ids[view.positions].tolist() == stream.ids[rows_of(stream)].tolist()
        assert (view.positions - rows_of(stream) == len(extra)).all()
        assert informed.streams[number].ids.tolist() == view.ids.tolist()
        assert mine.noted_at(view.ids.tolist(), extra) == at


def test_a_note_may_begin_like_the_joined_end_of_the_opening() -> None:
    mine = reader("full", "joining")
    (stream,) = materialise(told([("\nP", "left", "")]), mine).streams
    ids, opening = stream.ids.tolist(), mine.encode(mine.frames.opening(mine.instruction))
    at, note = mine.note_at(ids), mine.note("\n\nP")
    assert at < len(opening) and note[0] == opening[at]
    noted = [*ids[:at], *note, *ids[at:]]
    assert mine.note_at(noted) > at == mine.noted_at(noted, note)
    assert mine.noted_at(ids, note) is None


def test_views_without_a_note_are_left_out_and_counted() -> None:
    mine = reader("window", "qwen")
    seen = [("a", "left", "hm"), ("b", "right", ""), ("c", "left", "")]
    many = [materialise(told(seen, sample=n), mine) for n in range(3)]
    table = build(many)
    wanted = {many[1].id: "note", many[2].id: ""}
    missing = table.add_view("context", with_notes(mine, wanted))
    assert missing == len(many[0].streams) + len(many[2].streams) == 4
    assert table.valid("context").tolist() == (table["trajectory"] == 1).tolist()


def test_another_readers_streams_are_refused() -> None:
    mine, other = reader("full", "tiny"), reader("full", "qwen")
    trajectory = materialise(told([("a", "left", "")]), mine)
    with pytest.raises(ValueError, match="materialise"):
        build([trajectory], {"context": with_notes(other, {trajectory.id: "x"})})
    text_only = told([("a", "left", "")])
    assert len(build([text_only], {"context": with_notes(other, {text_only.id: "x"})})) == 0


# -- texts ----------------------------------------------------------------------------------------

THOUGHT = "secret thought"


def episode(
    task: int = 0,
    sample: int = 0,
    actions: Any = ("left", "right"),
    end: str = "success",
    **changes: Any,
) -> Trajectory:
    """An episode whose observations say who saw them: task, sample and number of the turn."""
    found = []
    for n, action in enumerate(actions):
        verdict = Verdict.OK if action in ("left", "right") else Verdict.INADMISSIBLE
        result = StepResult(f"t{task}s{sample}o{n + 1}", 0.0, valid=verdict is Verdict.OK)
        text = f"<think>{THOUGHT}</think><action>{action}</action>"
        found.append(
            Turn(
                n,
                f"t{task}s{sample}o{n}",
                Actor("student"),
                text=text,
                reasoning=THOUGHT,
                actions=(action,),
                results=(result,),
                verdict=verdict,
            )
        )
    success = end == "success"
    whole = Trajectory(
        Task("tests/notes", "train", {"task": task}),
        f"g{task}",
        sample,
        tuple(found),
        (),
        end,
        success,
        float(success),
        goal=f"goal {task}",
    )
    return dataclasses.replace(whole, **changes)


def key(task: int) -> str:
    return Task("tests/notes", "train", {"task": task}).key


def guide(*tasks: int) -> dict[str, list[Trajectory]]:
    """Three demonstrations a task: a long success, a short one, and a shorter failure."""
    return {
        key(n): [
            episode(n, 91, ("left", "right", "left")),
            episode(n, 92, ("right", "left")),
            episode(n, 93, ("left",), "failure"),
        ]
        for n in tasks
    }


def make(kind: str, trajectories: Any, seed: int = 0, **more: Any) -> list[str | None]:
    sources = {"guide": more.pop("guide", {}), "skills": more.pop("skills", {})}
    axis = ContextAxis(kind=kind, **more)  # type: ignore[arg-type]
    return notes(axis, trajectories, seed=seed, **sources)


def test_gold_is_the_shortest_success_of_the_task() -> None:
    mine = [episode(0), episode(1), episode(2)]
    failed = {key(2): [episode(2, 93, ("left",), "failure")]}
    gold, other, none = make("gold", mine, guide={**guide(0, 1), **failed}, text="[{note}]")
    assert gold == "[Seen:\nt0s92o0\nDone: right\nSeen:\nt0s92o1\nDone: left]"
    assert other is not None and "t1s92o0" in other and none is None


def test_actions_are_those_of_the_same_demonstration() -> None:
    found = make("actions", [episode(0), episode(5)], guide=guide(0, 1), text="{note}")
    assert found == ["1. right\n2. left", None]


def test_actions_that_were_not_executed_are_no_demonstration() -> None:
    result = StepResult("end", 1.0, terminated=True, success=True)
    turn = Turn(0, "o", Actor("x"), actions=("right", "left"), results=(result,))
    unread = Turn(1, "p", Actor("x"), actions=("",), results=(result,))
    done = episode(0, 1, turns=(turn, unread))
    sources = {"guide": {key(0): [done]}, "text": "{note}"}
    assert make("actions", [episode(0)], **sources) == ["1. right"]
    assert make("gold", [episode(0)], **sources) == ["Seen:\no\nDone: right"]


GROUP = [
    episode(0, 0, ("left", "right")),
    episode(0, 1, ("right",)),
    episode(0, 2, ("left",), "failure"),
    episode(1, 0, ("left",)),
    episode(1, 1, ("left", "jump"), "failure"),
    episode(2, 0, ("jump",), "failure"),
]


def test_a_sibling_is_another_success_of_the_group() -> None:
    for seed in range(8):
        found = make("sibling", GROUP, seed, text="{note}")
        assert found[0] == "Seen:\nt0s1o0\nDone: right"
        assert found[1] == "Seen:\nt0s0o0\nDone: left\nSeen:\nt0s0o1\nDone: right"
        assert found[2] in (found[0], found[1])
        assert (found[3], found[5]) == (None, None)
        assert found[4] == "Seen:\nt1s0o0\nDone: left"
    drawn = {make("sibling", GROUP, seed)[2] for seed in range(8)}
    assert len(drawn) == 2


def test_no_note_holds_the_episodes_own_attempt_or_a_thought() -> None:
    for feedback in ("never", "fallback", "always"):
        for kind in ("sibling", "feedback"):
            for trajectory, note in zip(GROUP, make(kind, GROUP, feedback=feedback), strict=True):
                own = [turn.observation for turn in trajectory.turns]
                assert not any(observation in (note or "") for observation in own)
                assert THOUGHT not in (note or "")


def test_an_edit_is_no_sibling_of_what_it_came_from() -> None:
    parent = episode(0, 0)
    child = dataclasses.replace(parent, derived_from=parent.id)
    assert make("sibling", [parent, child]) == [None, None]


def test_a_faulty_success_shows_nothing() -> None:
    broken = episode(0, 1, faults=(Fault("environment", "it broke", 1),))
    assert make("sibling", [episode(0, 0), broken])[0] is None
    assert make("gold", [episode(0, 0)], guide={key(0): [broken]}) == [None]


def test_feedback_says_how_the_episode_ended() -> None:
    (note,) = make("feedback", [GROUP[4]], text="{note}")
    assert note is not None
    for part in ("failed", "the score is 0.", "Of 2 responses 1 ", "t1s1o2"):
        assert part in note
    replayed = (dataclasses.replace(GROUP[4].turns[1], author=Author.REPLAY), GROUP[4].turns[0])
    (note,) = make("feedback", [episode(0, turns=replayed, end="step_limit", score=0.25)])
    assert note is not None and "Of 1 responses 0 " in note and "0.25" in note


@pytest.mark.parametrize("end", ["horizon", "budget", "fault:environment"])
def test_an_end_that_is_not_the_agents_is_no_feedback(end: str) -> None:
    assert make("feedback", [episode(0, end=end)]) == [None]
    assert make("feedback", [episode(0, actions=(), end="failure")]) == [None]


def test_feedback_beside_a_sibling() -> None:
    never, fallback, always = (
        make("sibling", GROUP, feedback=f) for f in ("never", "fallback", "always")
    )
    alone = make("feedback", GROUP)
    for n in range(len(GROUP)):
        assert fallback[n] == (never[n] or alone[n])
    assert always[5] == alone[5] == fallback[5] is not None
    for n in (0, 1, 2, 4):
        assert always[n] is not None and "Another attempt" in always[n]
        assert f"t{GROUP[n].task.payload['task']}s{GROUP[n].sample}o" in always[n]
        assert "score" in always[n] and "score" not in never[n]


def test_a_skill_is_its_trajectorys() -> None:
    skills = {GROUP[0].id: "look first {note}", GROUP[1].id: " \n", "someone": "else"}
    assert make("skill", GROUP[:3], skills=skills, text="<{note}>") == [
        "<look first {note}>",
        None,
        None,
    ]


def test_demonstrations_are_of_other_tasks() -> None:
    sources = {"guide": guide(0, 1, 2, 3), "text": "{note}"}
    for k in (1, 2, 3, 9):
        found = make(
            "demonstrations", [episode(n, s) for n in (0, 7) for s in (0, 1)], k=k, **sources
        )
        assert found[0] == found[1] and "t0s" not in found[0]
        for note, others in ((found[0], 3), (found[2], 4)):
            assert note.count("Task ") == note.count("goal ") == min(k, others)
            assert "s92o" in note and "s91o" not in note and "s93o" not in note
    drawn = {make("demonstrations", [episode(0)], seed, **sources)[0] for seed in range(12)}
    assert len(drawn) == 3
    assert make("demonstrations", [episode(0)], guide=guide(0)) == [None]


@pytest.mark.parametrize("kind", TEXTS)
def test_order_changes_nothing(kind: str) -> None:
    many = [*GROUP, *(episode(n, s) for n in (3, 4) for s in (5, 6, 7))]
    known = guide(0, 1, 2, 3)
    skills = {trajectory.id: f"skill {n}" for n, trajectory in enumerate(many)}
    settings = {"feedback": "always", "k": 2}
    wanted = make(kind, many, 3, guide=known, skills=skills, **settings)
    assert make(kind, many, 3, guide=known, skills=skills, **settings) == wanted
    random.seed(1)
    np.random.seed(1)
    order = random.Random(5).sample(range(len(many)), len(many))
    shuffled = {name: list(reversed(known[name])) for name in reversed(list(known))}
    turned = dict(reversed(list(skills.items())))
    found = make(kind, [many[n] for n in order], 3, guide=shuffled, skills=turned, **settings)
    assert found == [wanted[n] for n in order]
    assert any(wanted)


def test_the_words_around_a_note() -> None:
    hostile = {GROUP[0].id: "{note} {observation} <|end|>"}
    (note,) = make("skill", GROUP[:1], skills=hostile)
    assert note is not None and note.count(hostile[GROUP[0].id]) == 1
    for text in TEXTS.values():
        assert text.count("{note}") == 1
        assert "for your eyes only" in text and "answer in the usual way" in text
    with pytest.raises(ValueError, match="no notes"):
        make("same", GROUP)


def test_replayed_steps_belong_to_the_path_of_a_sibling() -> None:
    sibling = episode(0, 1, start=Start(("left",), "expert"))
    first = dataclasses.replace(sibling.turns[0], author=Author.REPLAY)
    sibling = dataclasses.replace(sibling, turns=(first, *sibling.turns[1:]))
    (note, _) = make("sibling", [GROUP[2], sibling], text="{note}")
    assert note == "Seen:\nt0s1o0\nDone: left\nSeen:\nt0s1o1\nDone: right"


def test_a_prompt_without_any_instruction_still_has_a_place() -> None:
    mine = Renderer(tokenizer(), PromptConfig(instruction=""), "")
    trajectory = materialise(told([("", "left", "")]), mine)
    view = with_notes(mine, {trajectory.id: "n"})(trajectory, 0)
    assert view is not None and mine.note_at(view.ids.tolist()) == 1
    assert mine.tokenizer.decode(view.ids.tolist()).startswith("<|user|>n\n<|assistant|>")
