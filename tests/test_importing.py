"""Chat logs as trajectories: what a line says, what is refused, what is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agentdistill.envs  # noqa: F401  (registers the ids)
from agentdistill.demos import Demos
from agentdistill.envs.make import make
from agentdistill.errors import ConfigError, StoreError
from agentdistill.export import export
from agentdistill.importing import CHAT, STAGE, chat_task, import_log, read_log
from agentdistill.records import StepResult, Task, Usage, Verdict
from agentdistill.store import Store
from tests.cli_calls import call as command
from tests.store_worker import batch

SECRET = "sk-not-for-anybody"


def call(name: str, arguments: Any, id: str = "c1") -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": id, "type": "function", "function": {"name": name, "arguments": text}}


SYSTEM = {"role": "system", "content": "You help with orders."}
ASK = {"role": "user", "content": "Where is order 7?"}
LOOK = {"role": "assistant", "content": None, "tool_calls": [call("find", {"order": 7})]}
FOUND = {"role": "tool", "tool_call_id": "c1", "content": "in Bremen"}
SAY = {"role": "assistant", "content": "It is in Bremen."}
WHOLE = [SYSTEM, ASK, LOOK, FOUND, SAY]


def write(path: Path, *lines: Any) -> Path:
    """``lines`` as a file; bytes and texts as they are, everything else as JSON."""
    with path.open("wb") as file:
        for line in lines:
            if not isinstance(line, bytes):
                line = line if isinstance(line, str) else json.dumps(line)
                line = line.encode(errors="surrogatepass")
            file.write(line + b"\n")
    return path


def recorded(messages: list[Any], answer: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A request with its answer, as a proxy writes it down."""
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 60},
    }
    response = {"model": "big-1", "choices": [{"index": 0, "message": answer}], "usage": usage}
    headers = {"authorization": f"Bearer {SECRET}"}
    request = {"model": "big-1", "messages": messages, "api_key": SECRET}
    return {"headers": headers, "request": request, "response": response, **more}


# -- what a line says ------------------------------------------------------------------------------


def test_a_conversation_by_hand(tmp_path: Path) -> None:
    log = read_log(write(tmp_path / "log", {"messages": WHOLE, "success": True}))
    (found,) = log.trajectories
    assert (log.lines, log.refused, log.joined, log.repeated) == (1, [], 0, 0)
    assert found.task == chat_task(WHOLE) == Task(CHAT, "train", {"opening": "Where is order 7?"})
    assert (found.end, found.success, found.score) == ("success", True, 1.0)
    assert (found.goal, found.streams) == ("Where is order 7?", ())
    assert found.provenance["instruction"] == "You help with orders."
    first, last = found.turns
    assert (first.observation, last.observation) == ("Where is order 7?", "in Bremen")
    assert first.actions == ('find({"order": 7})',)
    assert first.tool_calls == tuple(LOOK["tool_calls"])
    assert first.results == (StepResult("in Bremen", 0.0),)
    assert (last.text, last.actions) == ("It is in Bremen.", ("It is in Bremen.",))
    assert last.results == (StepResult("", 1.0, terminated=True, success=True, score=1.0),)
    assert [turn.index for turn in found.turns] == [0, 1]
    assert found.reward == 1.0


def test_an_environment_says_what_a_call_means(tmp_path: Path) -> None:
    env = make("agentdistill/Sokoban-v0")
    task = next(iter(env.tasks("train")))
    push = {"role": "assistant", "tool_calls": [call("move", {"direction": "Up"})]}
    line = {
        "messages": [{"role": "user", "content": "#####"}, push],
        "task": {"payload": dict(task.payload)},
        "success": True,
    }
    (found,) = read_log(write(tmp_path / "log", line), env=env).trajectories
    assert found.task.key == task.key
    assert found.turns[0].actions == ("Up",)


def test_text_actions_are_read_by_their_grammar(tmp_path: Path) -> None:
    said = ["<think>to the right</think><action>right</action>", "<action>left", "nothing"]
    messages = [ASK]
    for text in said:
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "seen"}]
    file = write(tmp_path / "log", {"messages": messages, "score": 0.25})
    (found,) = read_log(file, grammar="action", split="tune").trajectories
    assert [turn.verdict for turn in found.turns] == [
        Verdict.OK,
        Verdict.MALFORMED,
        Verdict.MISSING,
    ]
    assert (found.turns[0].actions, found.turns[0].reasoning) == (("right",), "to the right")
    assert (found.end, found.success, found.score) == ("failure", False, 0.25)
    assert found.task.split == "tune"
    with pytest.raises(ConfigError, match="grammar"):
        read_log(file, grammar="poem")


def test_several_calls_have_a_result_each(tmp_path: Path) -> None:
    two = {"role": "assistant", "tool_calls": [call("a", {}, "x"), call("b", {"n": 1}, "y")]}
    answers = [{"role": "tool", "tool_call_id": i, "content": f"from {i}"} for i in ("y", "x")]
    line = {"messages": [ASK, two, *answers, SAY]}
    (found,) = read_log(write(tmp_path / "log", line)).trajectories
    assert found.turns[0].actions == ("a({})", 'b({"n": 1})')
    assert [result.observation for result in found.turns[0].results] == ["from x", "from y"]
    assert found.turns[1].observation == "from y\nfrom x"


def test_a_call_that_nobody_can_read_is_the_models_mistake(tmp_path: Path) -> None:
    bad = {"role": "assistant", "tool_calls": [call("find", "{order")]}
    log = read_log(write(tmp_path / "log", {"messages": [ASK, bad, FOUND, SAY]}))
    assert not log.refused
    assert log.trajectories[0].turns[0].verdict is Verdict.MALFORMED
    assert log.trajectories[0].turns[0].results == ()


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, ("horizon", False, 0.0, False)),
        ({"success": True}, ("success", True, 1.0, True)),
        ({"success": False}, ("failure", False, 0.0, True)),
        ({"score": 0.5}, ("failure", False, 0.5, True)),
        ({"reward": 1}, ("success", True, 1.0, True)),
        ({"reward": -3.5}, ("failure", False, 0.0, True)),
        ({"success": True, "score": 0.5}, ("success", True, 0.5, True)),
        ({"metadata": {"success": True}}, ("success", True, 1.0, True)),
    ],
)
def test_outcomes(tmp_path: Path, facts: dict[str, Any], expected: Any) -> None:
    file = write(tmp_path / "log", {"messages": WHOLE, **facts})
    (found,) = read_log(file).trajectories
    assert (found.end, found.success, found.score, found.reward_valid) == expected
    (assumed,) = read_log(file, assume_success=True).trajectories
    assert assumed.success == (expected[1] or not expected[3])
    assert ("outcome" in found.provenance) == (not expected[3])


def test_what_we_export_comes_back(tmp_path: Path) -> None:
    source = batch(0, size=3)
    export(source, tmp_path / "rows.jsonl", tokens=False)
    log = read_log(tmp_path / "rows.jsonl", grammar="action")
    assert not log.refused
    assert log.repeated == 2 and len(log.trajectories) == 1  # they differ in tokens only
    (found,) = log.trajectories
    assert [turn.actions for turn in found.turns] == [turn.actions for turn in source[0].turns]
    assert [turn.observation for turn in found.turns] == [t.observation for t in source[0].turns]
    assert (found.success, found.score) == (True, 1.0)
    assert found.task.env == source[0].task.env
    assert found.provenance["task_id"] == source[0].task.key
    assert found.turns[0].actor.name == "student"


# -- conversations over several lines --------------------------------------------------------------


def test_requests_of_one_conversation_are_one_trajectory(tmp_path: Path) -> None:
    thinking = {**LOOK, "reasoning_content": "look it up"}
    echo = {**LOOK, "refusal": None, "content": ""}
    echo["tool_calls"] = [call("find", '{ "order":7 }')]  # as clients write it again
    lines = [
        recorded([SYSTEM, ASK], thinking),
        recorded([SYSTEM, ASK, echo, FOUND], {**SAY, "content": "<think>so</think>Bremen."}),
        recorded([SYSTEM, {"role": "user", "content": "Hello"}], SAY),
    ]
    for order in (lines, lines[::-1]):
        log = read_log(write(tmp_path / "log", *order))
        assert (log.joined, log.repeated, len(log.trajectories)) == (1, 0, 2)
        found = next(each for each in log.trajectories if len(each.turns) == 2)
        assert found.turns[0].reasoning == "look it up"
        assert found.turns[0].text.startswith("<think>look it up</think>")
        assert found.turns[0].usage == Usage(input=40, cache_read=60, output=9)
        assert found.turns[1].reasoning == "so"
        assert [turn.actor.name for turn in found.turns] == ["big-1", "big-1"]


def test_an_outcome_keeps_a_short_conversation(tmp_path: Path) -> None:
    short = {"messages": WHOLE[:3], "success": False}
    log = read_log(write(tmp_path / "log", short, {"messages": WHOLE, "success": True}))
    assert [each.success for each in log.trajectories] == [False, True]
    assert log.joined == 0


def test_of_two_that_are_equal_the_one_with_an_outcome_is_kept(tmp_path: Path) -> None:
    told = {"messages": WHOLE, "success": True}
    for order in ([told, {"messages": WHOLE}], [{"messages": WHOLE}, told]):
        log = read_log(write(tmp_path / "log", *order))
        assert log.repeated == 1
        assert [each.success for each in log.trajectories] == [True]


def test_importing_again_adds_nothing(tmp_path: Path) -> None:
    first = write(tmp_path / "monday", {"messages": WHOLE, "success": True})
    other = {"messages": [ASK, SAY], "success": True}
    second = write(tmp_path / "tuesday", {"messages": WHOLE, "success": True}, other)
    with Store(tmp_path / "run") as store:
        assert [import_log(first, store).added for _ in range(2)] == [1, 0]
        done = import_log(second, store)
        assert (done.added, done.known) == (1, 1)
        assert len(list(store.trajectories(STAGE))) == 2
        assert [commit.iteration for commit in store.commits(STAGE)] == [0, 1]


# -- what is refused -------------------------------------------------------------------------------

IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "…"}}]}
REFUSED = [
    (b"\xff\xfe", "not UTF-8"),
    ("{torn", "not JSON"),
    ("[1]", "not a JSON object"),
    ("[" * 100_000, "recursion"),
    ({}, "no messages"),
    ({"messages": []}, "no messages"),
    ({"messages": "hello"}, "no messages"),
    ({"messages": [ASK]}, "assistant"),
    ({"messages": ["hello"]}, "message 1: a message is not an object"),
    ({"messages": [ASK, {"role": "robot", "content": "x"}]}, "message 2: role 'robot'"),
    ({"messages": [IMAGE, SAY]}, "message 1: a part of type 'image_url'"),
    ({"messages": [{"role": "user", "content": 5}, SAY]}, "message 1: its content"),
    ({"messages": [ASK, {**LOOK, "tool_calls": ["x"]}]}, "message 2: tool_calls"),
    ({"messages": WHOLE, "success": "yes"}, "success"),
    ({"messages": WHOLE, "score": True}, "score is not a number"),
    ('{"messages": [{"role": "assistant", "content": "x"}], "score": NaN}', "score"),
    ({"messages": WHOLE, "goal": 5}, "goal is not a text"),
    ({"messages": WHOLE, "task": 5}, "task"),
    ({"request": 5}, "request is not an object"),
    (recorded([ASK], SAY) | {"response": {"error": {"code": 500}}}, "is an error"),
    (recorded([ASK], SAY) | {"response": {"choices": []}}, "no choices"),
    (recorded([ASK], SAY) | {"response": {"choices": [{"delta": {}}]}}, "a message"),
    (recorded([ASK], ASK), "not the assistant's"),
]


def test_bad_lines_are_refused_one_by_one(tmp_path: Path) -> None:
    good = {"messages": WHOLE}
    bad = [line for line, _ in REFUSED]
    log = read_log(write(tmp_path / "log", good, "", *bad, "  ", {"messages": [ASK, SAY]}))
    assert log.lines == len(bad) + 2
    assert [each.line for each in log.refused] == list(range(3, 3 + len(bad)))
    for (_, why), each in zip(REFUSED, log.refused, strict=True):
        assert why in each.reason and "\n" not in each.reason
    assert len(log.trajectories) == 2


def test_lines_of_another_environment_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "log", {"messages": WHOLE, "env": "other/Rooms-v0"})
    assert read_log(file).trajectories[0].task.env == "other/Rooms-v0"
    (refusal,) = read_log(file, env=make("agentdistill/Sokoban-v0")).refused
    assert "other/Rooms-v0" in refusal.reason


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="check the path"):
        read_log(tmp_path / "nothing")


NAMES = [
    *("messages", "role", "content", "tool_calls", "function", "name", "arguments", "type"),
    *("text", "request", "response", "choices", "message", "usage", "success", "task"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=8,
)
CALL = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": st.text(max_size=3), "arguments": JSON}) | JSON}
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "tool", "system"]),
            "content": st.text() | JSON,
        },
        optional={"tool_calls": st.lists(CALL, max_size=2) | JSON, "reasoning": JSON},
    ),
    max_size=4,
)


@settings(max_examples=100)
@given(st.lists(JSON | st.fixed_dictionaries({"messages": MESSAGES}), min_size=1, max_size=4))
def test_whatever_a_line_is_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, lines: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = read_log(write(folder / "log", *map(json.dumps, lines)))
    counted = len(log.trajectories) + len(log.refused) + log.joined + log.repeated
    assert counted == log.lines == len(lines)
    with Store(folder / "run") as store:
        import_log(folder / "log", store)
        assert len(list(store.trajectories())) == len(log.trajectories)


# -- what it is for --------------------------------------------------------------------------------


def test_a_log_becomes_demonstrations(tmp_path: Path) -> None:
    log = read_log(write(tmp_path / "log", {"messages": WHOLE}), assume_success=True)
    demos = Demos.build(log.trajectories, tmp_path / "demos")
    query = {"goal": "Where is order 9?", "observation": "Where is order 9?"}
    again = [{"role": "system", "content": "Other words."}, ASK]
    assert demos.search(**query, task=chat_task(again)) == []
    (match,) = demos.search(**query, task=chat_task([{"role": "user", "content": "order 9?"}]))
    assert match.steps[0].actions == ('find({"order": 7})',)


def test_nothing_of_a_request_but_its_messages_is_kept(tmp_path: Path) -> None:
    file = write(tmp_path / "log", recorded([SYSTEM, ASK], SAY, success=True, api_key=SECRET))
    with Store(tmp_path / "run") as store:
        assert import_log(file, store).added == 1
        Demos.build(store.trajectories(), tmp_path / "run" / "demos")
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) >= 3
    assert not any(SECRET.encode() in path.read_bytes() for path in written)


def test_the_verbs(tmp_path: Path) -> None:
    chats = [{"messages": WHOLE, "success": True}, "{torn", {"messages": [ASK, SAY]}]
    log = str(write(tmp_path / "log", *chats))
    run, shown = str(tmp_path / "run"), str(tmp_path / "shown")
    told = command("import", log, "--to", run)
    assert told.exit_code == 0
    assert told.stderr.startswith(f"{log}:2: it is not JSON")
    assert "3 lines: 0 continued by others, 0 repeated, 1 refused; 2 trajectories" in told.stdout
    counts = json.loads(command("import", log, "--to", run, "--json").stdout)
    assert (counts["added"], counts["known"], counts["refusals"][0]["line"]) == (0, 2, 2)
    facts = json.loads(command("demos", run, "--to", shown, "--json").stdout)
    assert (facts["steps"], facts["episodes"], facts["skipped"]["failed"]) == (2, 1, 1)
    assert Demos.open(shown).version == facts["version"]
    assert f"version {facts['version']}" in command("demos", run, "--to", shown).stdout
    bad = str(write(tmp_path / "bad", "{torn"))
    assert command("import", bad, "--to", run).exit_code == 1
    assert command("import", log, "--to", run, "--env", "none/None-v0").exit_code == 2
