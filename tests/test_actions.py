"""Grammars: what is read, where it stands, and that nothing makes them raise."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentdistill import actions
from agentdistill.actions import GRAMMARS, Parsed, explain, grammar, parse_calls, write
from agentdistill.errors import ConfigError
from agentdistill.records import Verdict

OK, MISSING, MALFORMED = Verdict.OK, Verdict.MISSING, Verdict.MALFORMED


def read(name: str, text: str, **options: Any) -> tuple[tuple[str, ...], Verdict, str, str, str]:
    """Actions, verdict, thought, and the texts of the two spans."""
    found = grammar(name, **options)(text)
    reason = "" if found.reason_span is None else text[slice(*found.reason_span)]
    act = "" if found.act_span is None else text[slice(*found.act_span)]
    return found.actions, found.verdict, found.reasoning, reason, act


# -- thoughts --------------------------------------------------------------------------------------


def test_a_thought_and_an_action() -> None:
    text = "<think> go on </think>\n\n<action> left </action>"
    wanted = (("left",), OK, "go on", "<think> go on </think>\n\n", " left ")
    assert read("action", text) == wanted
    assert read("plain", "<think>go</think>left\n") == (
        ("left",), OK, "go", "<think>go</think>", "left",
    )  # fmt: skip


def test_a_thought_that_the_prompt_opened_has_no_opening_tag() -> None:
    text = "go <action>right</action>?</think>\n<action>left</action>"
    thought = "go <action>right</action>?"
    for opened in (False, True):
        found = read("action", text, opened=opened)
        assert found == (("left",), OK, thought, thought + "</think>\n", "left")
    assert read("plain", "hm</think> left", opened=True)[:3] == (("left",), OK, "hm")
    assert read("answer", "hm</think><answer>a||b</answer>", opened=True)[0] == ("a", "b")
    assert read("code", "hm</think>\n```\nx\n```")[:3] == (("x",), OK, "hm")


def test_a_thought_that_never_ends_is_no_action() -> None:
    """Where the prompt opened it; otherwise nobody began to think."""
    text = "I could <action>left</action>"
    assert read("action", text) == (("left",), OK, "", "", "left")
    wanted = ((), MALFORMED, text, text, "")
    assert read("action", text, opened=True) == wanted
    assert read("plain", "hm", opened=True) == ((), MISSING, "hm", "hm", "")
    assert read("plain", "", opened=True) == ((), MISSING, "", "", "")


def test_words_before_a_thought_are_part_of_it_only_if_it_was_open() -> None:
    text = "so <think>go</think><action>left</action>"
    assert read("action", text)[2:4] == ("go", "<think>go</think>")
    assert read("action", text, opened=True)[2:4] == ("go", "so <think>go</think>")


# -- several actions -------------------------------------------------------------------------------


def test_actions_beyond_the_limit_are_cut_and_kept_apart() -> None:
    parse = grammar("answer", most=2)
    found = parse("<answer>a || b ||  || c || d</answer>")
    assert (found.actions, found.cut, found.verdict) == (("a", "b"), ("c", "d"), OK)
    assert parse("<answer>a || b</answer>").cut == ()
    assert grammar("answer")("<answer>a||b||c</answer>").actions == ("a", "b", "c")


def test_how_to_answer_is_said_with_the_number_of_actions() -> None:
    assert "one to 5 actions" in explain("answer", 5)
    assert "one action or more" in explain("answer")
    assert "exactly one action" in explain("action", 5)
    for name in GRAMMARS:
        tag = write(name, ("X",)).partition("X")[0].strip()
        assert tag in explain(name)


# -- code ------------------------------------------------------------------------------------------

PROGRAM = "for n in range(2):\n    if n:\n        print(n)"


@pytest.mark.parametrize(
    "text",
    [
        f"<code>{PROGRAM}</code>",
        f"<code>\n{PROGRAM}\n</code>",
        f"<code>\n```python\n{PROGRAM}\n```\n</code>",
        f"```python\n{PROGRAM}\n```",
        f"Now:\n```py\n\n{PROGRAM}\n\n```\nthat is it",
        f"  ```\n{PROGRAM}\n  ```",
        f"```Python \n{PROGRAM}\n```\n```python\nprint('second')\n```",
        f"<think>```python\nno\n```</think>```python\n{PROGRAM}\n```",
        f"<code>```python\n{PROGRAM}\n```</code>",
    ],
)
def test_code_is_one_action_without_its_fence(text: str) -> None:
    found = grammar("code")(text)
    assert (found.actions, found.verdict) == ((PROGRAM,), OK)
    assert found.act_span is not None and text[slice(*found.act_span)] == PROGRAM


def test_the_first_line_of_code_keeps_its_indentation() -> None:
    assert read("code", "<code>\n\n    x = 1\n    y\n</code>")[0] == ("    x = 1\n    y",)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("print(1)", MISSING),
        ("<code>  \n </code>", MISSING),
        ("```python\n```", MISSING),
        ("<code>print(1)", MALFORMED),
        ("```python\nprint(1)", MALFORMED),
        ("```bash\nls\n```", MALFORMED),
    ],
)
def test_code_that_cannot_be_read(text: str, verdict: Verdict) -> None:
    assert read("code", text)[:2] == ((), verdict)


# -- all of them -----------------------------------------------------------------------------------

TAGS = [f"<{end}{name}>" for name in ("think", "action", "answer", "code") for end in ("", "/")]
WORDS = ["```", "```python\n", "\n", " ", "||", "left", "ü", "\ud800", "{}"]
pieces = st.sampled_from([*TAGS, *WORDS])


@given(
    st.sampled_from(sorted(GRAMMARS)),
    st.lists(pieces, max_size=14).map("".join),
    st.booleans(),
    st.none() | st.integers(1, 2),
)
def test_spans_say_where_it_is(name: str, text: str, opened: bool, most: int | None) -> None:
    found = grammar(name, opened=opened, most=most)(text)
    assert (found.verdict is OK) == bool(found.actions) == (found.act_span is not None)
    assert not found.cut or (most is not None and len(found.actions) == most)
    if found.reason_span is not None:
        start, end = found.reason_span
        assert 0 <= start < end <= len(text) and found.reasoning in text[start:end]
        assert opened or text[start:end].rstrip().endswith("</think>")
    if found.act_span is not None:
        first = found.reason_span[1] if found.reason_span else 0
        start, end = found.act_span
        assert first <= start < end <= len(text)
        assert all(action in text[start:end] for action in found.actions)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("name", sorted(GRAMMARS))
def test_what_is_written_is_read_back(name: str, opened: bool) -> None:
    closed = "</think>\n" if opened else ""
    for action in ("left", "put a pan on shelf 1", "{x} 100% 'ü'"):
        assert grammar(name, opened=opened)(closed + write(name, (action,))).actions == (action,)


def test_megabytes_of_tags_take_no_time() -> None:
    """Linear in the text: anything quadratic would take minutes."""
    began = time.monotonic()
    for name in GRAMMARS:
        for tag in ("<action>", "<answer>", "<code>", "<think>", "</think>", "```\n", "```x\n"):
            grammar(name)(tag * 100_000)
    assert time.monotonic() - began < 10


def test_unknown_grammars_are_refused() -> None:
    for call in (lambda: grammar("json"), lambda: write("json", ()), lambda: explain("json")):
        with pytest.raises(ConfigError, match="grammar='json': unknown grammar; one of plain, "):
            call()


# -- native tool calls -----------------------------------------------------------------------------


def go(name: str, arguments: Mapping[str, Any]) -> str:
    return f"{name} {json.dumps(dict(arguments))}"


def call(name: str, arguments: Any) -> dict[str, Any]:
    """As OpenAI's format has it."""
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_tool_calls_are_actions_in_order() -> None:
    calls = [
        call("go", '{"to": "shelf 1"}'),
        call("look", ""),
        call("look", None),
        {"name": "take", "arguments": {"what": "pan"}},
        {"function": {"name": "wait"}},
    ]
    found = parse_calls(calls, go, "hm")
    wanted = ('go {"to": "shelf 1"}', "look {}", "look {}", 'take {"what": "pan"}', "wait {}")
    assert found == Parsed(wanted, OK, "hm")


@pytest.mark.parametrize(
    "bad",
    [
        call("go", "{"),
        call("go", "[1]"),
        call("go", "3"),
        call("go", [1]),
        call("go", "[" * 100_000),
        call("go", '{"n": ' + "9" * 10_000 + "}"),
        {"function": {"arguments": "{}"}},
        {"function": {"name": 3}},
        {"function": None},
        {},
        "go",
        None,
    ],
    ids=str,
)
def test_a_call_that_cannot_be_read_spoils_the_response(bad: Any) -> None:
    assert parse_calls([bad], go).verdict is MALFORMED
    found = parse_calls([call("look", "{}"), bad], go, "hm")
    assert (found.actions, found.verdict, found.reasoning) == ((), MALFORMED, "hm")


def test_no_call_is_no_action() -> None:
    assert parse_calls([], go) == Parsed((), MISSING)
    assert actions.parse_calls([call("look", {})], go).actions == ("look {}",)
