"""The cascade over messages: who answers, what is compared, and what is shown to whom."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agentdistill import actions
from agentdistill.agreement import Rule
from agentdistill.cascade import AFTER, BEFORE
from agentdistill.config import load
from agentdistill.demos import Demos
from agentdistill.engines.base import Message, Sample, Sampling
from agentdistill.engines.templated import TemplatedEngine
from agentdistill.errors import ConfigError, EngineError
from agentdistill.importing import read_log
from agentdistill.records import Usage
from agentdistill.run import Run
from agentdistill.serving.cascade import Decided, MessageCascade, Shown, heard, opening
from agentdistill.serving.policies import engine_of
from tests.servers import Scripted, said
from tests.test_demos import episode
from tests.tools_template import Spoken, tokenizer

DRAFTS = Sampling(0.7, 0.9, 0, 5)
COOL = Sampling(0.0, 1.0, 0, 99)


def call(
    name: str = "find", arguments: str = '{"order": 9}', identity: str = "c1"
) -> dict[str, Any]:
    return {
        "id": identity,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def drafts(*texts: str) -> Scripted:
    """A student whose samples are these."""
    return Scripted(lambda messages, number: said(texts[number % len(texts)]), name="small")


def cascade(student: Scripted, rule: Rule | None = None, **options: Any) -> MessageCascade:
    teacher = options.pop("teacher", Scripted("best", name="big"))
    return MessageCascade("mine", student, teacher, rule or Rule(), **options)


def ask(one: MessageCascade, *contents: str, **options: Any) -> Decided:
    found = asks(one, *contents, **options)
    assert len(found) == 1
    return found[0]


def asks(one: MessageCascade, *contents: str, **options: Any) -> list[Decided]:
    roles = ("user", "assistant")
    messages = [Message(roles[n % 2], text) for n, text in enumerate(contents or ("hi",))]
    found = asyncio.run(one.chat(messages, COOL, **options))
    assert all(isinstance(each, Decided) for each in found)
    return found  # type: ignore[return-value]


def teacher_of(one: MessageCascade) -> Scripted:
    assert isinstance(one.teacher, Scripted)
    return one.teacher


# -- who answers -----------------------------------------------------------------------------------


def test_students_that_agree_answer_and_nobody_else_is_asked() -> None:
    one = cascade(drafts("yes", " yes\n", "yes"))
    found = ask(one, seed=4)
    assert found.text == "yes" and teacher_of(one).asked == []
    assert found.usage == Usage(30, 15, 0, 9)  # all that was drawn
    assert found.told == {
        "by": "student",
        "model": "small",
        "agreement": 1.0,
        "drafts": 3,
        "demonstrations": 0,
        "usage": {"student": {"input": 30, "cache_read": 15, "cache_write": 0, "output": 9}},
    }


def test_one_that_does_not_agree_costs_a_call_of_the_teacher() -> None:
    """2 of 3 are not all: unanimity, not majority."""
    student = drafts("yes", "no", "yes")
    one = cascade(student, drafts=DRAFTS)
    found = ask(one, seed=4)
    assert found.text == "best" and found.usage == Usage(40, 20, 0, 12)
    assert (found.told["by"], found.told["model"]) == ("teacher", "big")
    assert (found.told["agreement"], found.told["drafts"]) == (0.6667, 3)
    assert found.told["usage"]["teacher"]["output"] == 3
    (drawn,), (asked,) = student.asked, teacher_of(one).asked
    assert drawn["n"] == 3 and drawn["seed"] == asked["seed"] == 4  # one request for all drafts
    assert drawn["sampling"] == Sampling(0.7, 0.9, 0, 99)
    assert asked["sampling"] == COOL and asked["n"] == 1
    assert ask(cascade(student, Rule("majority"))).text == "yes"


def test_rules_without_drafts_and_without_a_teacher() -> None:
    student = drafts("yes", "no", "no")
    assert ask(cascade(student, Rule("always"))).told["drafts"] == 0
    assert student.asked == []
    found = ask(cascade(student, teacher=None))
    assert (found.text, found.told["by"], found.told["agreement"]) == ("no", "student", 0.6667)


def test_a_local_student_can_be_sure() -> None:
    words = tokenizer()
    local = TemplatedEngine(Spoken(words, "right"), words)  # -0.5 for each token
    for threshold, by in ((-0.6, "student"), (-0.4, "teacher")):
        rule = Rule("confidence", threshold=threshold)
        found = ask(MessageCascade("mine", local, Scripted("best"), rule))
        assert (found.told["by"], found.told["confidence"]) == (by, -0.5)
    with pytest.raises(ConfigError, match="log-probabilities"):
        ask(cascade(drafts("yes"), Rule("confidence", threshold=-1.0)))


def test_each_of_several_answers_is_decided() -> None:
    found = asks(cascade(drafts("yes")), n=3, seed=9)
    assert [each.text for each in found] == ["yes"] * 3
    student = drafts("yes")
    asks(cascade(student), n=3, seed=9)
    seeds = [asked["seed"] for asked in student.asked]
    assert seeds[0] == 9 and len(set(seeds)) == 3


def test_what_fails_is_heard() -> None:
    def broken(messages: Sequence[Message], number: int) -> Sample:
        raise EngineError("gone")

    with pytest.raises(EngineError, match="gone"):
        ask(cascade(Scripted(broken)))
    with pytest.raises(EngineError, match="gone"):
        ask(cascade(drafts("a", "b"), teacher=Scripted(broken)))
    with pytest.raises(EngineError, match="takes messages"):
        asyncio.run(cascade(drafts("a")).generate([1], COOL))
    with pytest.raises(ConfigError, match="takes no messages"):
        MessageCascade("mine", Spoken(tokenizer(), "a"), None, Rule())


# -- what is the same ------------------------------------------------------------------------------


def same(one: Sample, other: Sample, **options: Any) -> bool:
    found = cascade(drafts("a"), **options)
    first, second = found.same(one), found.same(other)
    return first is not None and first == second


def test_calls_are_compared_by_what_they_ask_for() -> None:
    plain = said("so", tool_calls=(call(),))
    assert same(plain, said("other words", tool_calls=(call("find", '{ "order":9}', "c2"),)))
    two = '{"a": 1, "b": [2]}', '{"b": [2], "a": 1}'
    assert same(*(said("", tool_calls=(call("f", each),)) for each in two))
    for other in (call("look"), call("find", '{"order": "9"}'), call("find", "{}")):
        assert not same(plain, said("so", tool_calls=(other,)))
    assert not same(plain, said("so", tool_calls=(call(), call())))
    assert not same(plain, said("so"))
    torn = said("", tool_calls=(call("find", "{torn"),))
    assert not same(torn, torn)  # what cannot be read agrees with nothing


def test_texts_are_compared_by_what_they_do() -> None:
    assert same(said("<think>a</think>yes"), said("<think>b</think>\nyes"))
    assert not same(said("yes"), said("Yes"))
    assert not same(said(" "), said(" "))
    acts = actions.grammar("action")
    east = said("<think>a</think><action>right</action>"), said("hm <action> right </action>")
    assert same(*east, grammar=acts) and not same(*east)
    assert same(said("no action"), said("no action"), grammar=acts)
    code = said("x = f( 1 )  # one"), said("x = f(1)")
    assert same(*code, code=True) and not same(*code)


# -- demonstrations --------------------------------------------------------------------------------

KITCHEN = episode("k", ["a kitchen with a fridge", "a cold apple"], goal="wash an apple")
STUDY = episode("s", ["a study with a desk", "a red pen"], goal="light a pen")
OFFICE = episode("o", ["an office with a desk", "a blue pen"], goal="find a pen")


@pytest.fixture
def demos(tmp_path: Path) -> Demos:
    return Demos.build([KITCHEN, STUDY, OFFICE], tmp_path)


def test_they_are_in_the_last_message_and_the_teacher_reads_none(demos: Demos) -> None:
    student = drafts("a", "b")
    one = cascade(student, shown=Shown(demos, k=1))
    found = ask(one, "light a lamp", "look", "a red pen and a lamp")
    *before, last = student.asked[0]["messages"]
    assert before == [Message("user", "light a lamp"), Message("assistant", "look")]
    assert last.content.startswith(f"{BEFORE}\n\nDemonstration 1\nTask: light a pen\n")
    assert last.content.endswith(f"{AFTER}\n\na red pen and a lamp")
    assert found.told["demonstrations"] == 1
    assert teacher_of(one).asked[0]["messages"][-1].content == "a red pen and a lamp"
    both = cascade(student, shown=Shown(demos, k=1), teacher_demos=True)
    ask(both, "light a lamp", "look", "a red pen and a lamp")
    assert BEFORE in teacher_of(both).asked[0]["messages"][-1].content


def test_after_results_they_are_a_message_of_their_own(demos: Demos) -> None:
    chat = [
        Message("user", "light a lamp"),
        Message("assistant", "", (call(),)),
        Message("tool", "a red pen", (), "c1"),
    ]
    shown, number = Shown(demos, k=1, grammar="action").add(chat, tools=True)
    assert shown[:3] == chat and number == 1 and len(shown) == 4
    assert shown[3].role == "user" and "Done: do a red pen" in shown[3].content
    assert "is written as text" in shown[3].content
    told, _ = Shown(demos, k=1, grammar="action").add(chat)
    assert "<action>do a red pen</action>" in told[3].content


def test_a_prefix_is_the_same_in_every_call(demos: Demos) -> None:
    shown = Shown(demos, k=1, place="before")
    rules = Message("system", "Be brief.")
    first, _ = shown.add([rules, Message("user", "light a lamp in the study")])
    later = [Message("assistant", "look"), Message("user", "a cold apple")]
    second, number = shown.add([rules, Message("user", "light a lamp in the study"), *later])
    assert number == 1 and second[:2] == first and second[2:] == later
    assert first[1].content.endswith(f"{AFTER}\n\nlight a lamp in the study")


def test_nothing_is_shown_where_there_is_nothing(demos: Demos, tmp_path: Path) -> None:
    chat = [Message("user", "xyzzy")]
    empty = Demos.build([], tmp_path / "empty")
    for shown in (Shown(demos), Shown(demos, k=0), Shown(empty)):
        assert shown.add(chat) == (chat, 0)


def test_nothing_of_the_same_task_is_shown(demos: Demos, tmp_path: Path) -> None:
    """By the opening of a recorded chat, and by what an environment's episode began with."""
    asked = {"role": "user", "content": "Where is order 7?"}
    answer = {"role": "assistant", "content": "In Bremen."}
    line = {"messages": [asked, answer], "success": True, "goal": "find a parcel"}
    (tmp_path / "log").write_text(json.dumps(line))
    recorded = read_log(tmp_path / "log").trajectories
    chats = Shown(Demos.build([*recorded, KITCHEN], tmp_path / "chats"))
    rules = Message("system", "Other rules.")
    assert chats.add([rules, Message("user", "Where is order 7?")])[1] == 0
    assert chats.add([rules, Message("user", "Where is order 9?")])[1] == 1
    shown = Shown(demos, k=3)
    prompt = "Your task is to wash an apple.\na kitchen with a fridge\nWhat do you do?"
    for later in ([], [Message("assistant", "go"), Message("user", "a cold apple")]):
        found, _ = shown.add([Message("user", prompt), *later])
        assert "wash an apple\n" not in found[-1].content.partition(AFTER)[0]
    other = prompt.replace("a kitchen", "a big kitchen")  # another room, another task
    found, _ = shown.add([Message("user", other)])
    assert "Task: wash an apple" in found[-1].content


def test_a_conversation_in_turns() -> None:
    chat = [
        Message("system", "rules"),
        Message("user", "a"),
        Message("user", "b"),
        Message("assistant", "", (call(),)),
        Message("tool", "c", (), "c1"),
        Message("tool", "d", (), "c2"),
        Message("assistant", "e"),
    ]
    assert (opening(chat), heard(chat)) == ("a\nb", ["a\nb", "c\nd"])
    assert heard([*chat, Message("user", "f")]) == ["a\nb", "c\nd", "f"]
    assert (opening([]), heard([])) == ("", [])


# -- by name ---------------------------------------------------------------------------------------

TINY = {"hidden": 16, "heads": 1, "layers": 1, "tokenizer": {"vocabulary": 300, "episodes": 4}}


def configured(tmp_path: Path, **policy: Any) -> Run:
    said_ = {"student": "small", "teacher": "big", **policy}
    return Run(
        load(
            {
                "output": str(tmp_path),
                "env": {"id": "tests.toy:Corridor"},
                "prompt": "react",
                "sampling": {"temperature": 0.3, "max_tokens": 4},
                "models": {"small": TINY, "big": TINY},
                "policies": {"both": said_},
                "stages": [{"name": "seen", "do": "collect", "episodes": 4}],
            }
        )
    )


def test_names_of_a_configuration_answer(tmp_path: Path, demos: Demos) -> None:
    chat = [Message("user", "P..G\nstart")]
    with configured(tmp_path, demos=str(demos.folder), k=1, rule="majority") as run:
        both = engine_of(run, "both")
        assert isinstance(both, MessageCascade) and isinstance(both.student, TemplatedEngine)
        assert (both.name, both.rule, both.shown and both.shown.k) == ("both", Rule("majority"), 1)
        (found,) = asyncio.run(both.chat(chat, Sampling(max_tokens=3), seed=1))
        assert isinstance(found, Decided) and found.told["by"] in ("student", "teacher")
        (alone,) = asyncio.run(engine_of(run, "small").chat(chat, Sampling(max_tokens=3)))
        assert 0 < alone.usage.output <= 3
        with pytest.raises(ConfigError, match="known: both, small, big"):
            engine_of(run, "nobody")


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"teacher": "expert"}, "needs an environment"),
        ({"execute": True}, "no environment behind messages"),
        ({"demos": "/nowhere"}, "neither a collect stage"),
        ({"demos": "seen"}, "run that stage first"),
    ],
)
def test_what_needs_an_environment_is_refused(
    tmp_path: Path, policy: dict[str, Any], words: str
) -> None:
    with configured(tmp_path, **policy) as run, pytest.raises(ConfigError, match=words):
        engine_of(run, "both")
