"""The server itself: what it answers, what it refuses, whom, and how it goes down."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agentdistill.engines.base import Message, Sample, Sampling
from agentdistill.errors import BudgetError, ConfigError, EngineError, UnfitError
from tests.servers import Running, Scripted, chat, exchange, said

pytestmark = pytest.mark.serve

CALL = {"id": "c1", "type": "function", "function": {"name": "walk", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "walk", "parameters": {"type": "object"}}}


def limits(**options: Any) -> Any:
    from agentdistill.serving.app import Limits

    return Limits(**options)


def echo(messages: Sequence[Message], number: int) -> Sample:
    return said(f"{messages[-1].content} {number}")


def until(true: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- answers ---------------------------------------------------------------------------------------


def test_an_answer_in_openais_words() -> None:
    engine = Scripted(echo)
    with Running(engine, sampling=Sampling(0.5, 0.9, 0, 77)) as server:
        status, answer, headers = server.ask(chat("hi", "hello", "how?", seed=5))
    assert status == 200 and headers["content-type"] == "application/json"
    assert answer["object"] == "chat.completion" and answer["model"] == "cascade"
    assert answer["id"].startswith("chatcmpl-") and abs(answer["created"] - time.time()) < 60
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "how? 0"}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert answer["usage"] == {
        "prompt_tokens": 15,
        "completion_tokens": 3,
        "total_tokens": 18,
        "prompt_tokens_details": {"cached_tokens": 5},
    }
    assert answer["agentdistill"] == {"policy": "cascade", "answers": [{"by": "model"}]}
    assert headers["x-agentdistill-policy"] == "cascade"
    (asked,) = engine.asked
    assert asked["messages"][1] == Message("assistant", "hello")
    assert (asked["sampling"], asked["n"], asked["seed"]) == (Sampling(0.5, 0.9, 0, 77), 1, 5)
    assert engine.closed


def test_parameters_reach_the_engine() -> None:
    engine = Scripted(echo)
    body = chat("hi", n=3, temperature=0, top_p=0.5, max_tokens=9, tools=[TOOL])
    with Running(engine) as server:
        _, answer, _ = server.ask(body)
        server.ask({**body, "tool_choice": "none", "max_completion_tokens": 4})
        server.ask(chat("hi"))
        server.ask(chat("hi"))
    first, second, *free = engine.asked
    assert [choice["message"]["content"] for choice in answer["choices"]] == [
        "hi 0",
        "hi 1",
        "hi 2",
    ]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 9
    assert first["sampling"] == Sampling(0, 0.5, 0, 9) and first["n"] == 3
    assert first["tools"] == (TOOL,) and second["tools"] == ()
    assert second["sampling"].max_tokens == 4
    assert first["seed"] == second["seed"] == 0  # greedy answers can be repeated
    assert free[0]["seed"] != free[1]["seed"]


def test_parts_null_and_developers_are_read() -> None:
    engine = Scripted()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]
    with Running(engine) as server:
        body = {"model": "cascade", "messages": messages, "stop": None, "user": "u", "n": None}
        assert server.ask(body)[0] == 200
    assert engine.asked[0]["messages"] == [
        Message("system", "Be brief."),
        Message("user", "ab"),
        Message("assistant", "", (CALL,)),
        Message("tool", "done", (), "c1"),
    ]


def test_calls_thoughts_and_why_an_answer_ended() -> None:
    script = [
        said("", tool_calls=(CALL,), reasoning="so"),
        said("one two three"),
        said("cut", stop="length"),
        said("no", tool_calls=(CALL,)),
    ]
    engine = Scripted(lambda messages, number: script[int(messages[-1].content)])
    with Running(engine) as server:
        choices = [
            server.ask(chat(str(n), **options))[1]["choices"][0]
            for n, options in enumerate([{}, {"stop": [" th", " tw"]}, {}, {"tool_choice": "none"}])
        ]
    assert choices[0]["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [CALL],
        "reasoning_content": "so",
    }
    assert [choice["finish_reason"] for choice in choices] == [
        "tool_calls",
        "stop",
        "length",
        "stop",
    ]
    assert choices[1]["message"]["content"] == "one"
    assert "tool_calls" not in choices[3]["message"]


def test_a_stream_says_the_same() -> None:
    both = said("text", tool_calls=(CALL,), reasoning="so")
    with Running(Scripted(lambda messages, number: both)) as server:
        body = chat("hi", stream=True, n=2, stream_options={"include_usage": True})
        status, text, headers = server.ask(body)
        _, without, _ = server.ask(chat("hi", stream=True))
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert headers["x-agentdistill-by"] == "model,model"
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    parts = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    assert parts[-1]["choices"] == [] and parts[-1]["usage"]["completion_tokens"] == 6
    assert all(part["usage"] is None for part in parts[:-1])
    for number in (0, 1):
        mine = [p["choices"][0] for p in parts[:-1] if p["choices"][0]["index"] == number]
        whole: dict[str, Any] = {}
        for part in mine:
            for name, value in part["delta"].items():
                whole[name] = whole.get(name, type(value)()) + value
        assert (whole["role"], whole["content"]) == ("assistant", "text")
        assert whole["reasoning_content"] == "so"
        assert whole["tool_calls"] == [{"index": 0, **CALL}]
        assert [p["finish_reason"] for p in mine] == [None] * (len(mine) - 1) + ["tool_calls"]
    assert "usage" not in without


def test_models_and_health() -> None:
    with Running(Scripted()) as server:
        status, models, _ = server.ask(path="/v1/models")
        assert status == 200 and [model["id"] for model in models["data"]] == ["cascade"]
        assert server.ask(path="/v1/models/cascade")[1] == models["data"][0]
        assert server.ask(path="/v1/models/other")[0] == 404
        assert server.ask(path="/health")[:2] == (200, {"status": "ok", "busy": 0})


# -- refusals --------------------------------------------------------------------------------------


def test_statuses_and_bodies() -> None:
    def fail(messages: Sequence[Message], number: int) -> Sample:
        raise ERRORS[messages[-1].content]

    with Running(Scripted(fail)) as server:
        for name, (status, code) in STATUSES.items():
            found, body, headers = server.ask(chat(name))
            assert (found, body["error"]["code"]) == (status, code), name
            assert set(body["error"]) == {"message", "type", "param", "code"}
            assert ("retry-after" in headers) == (status == 429)
            assert "secret" not in body["error"]["message"]
        assert server.ask(chat("x", model="gpt-9"))[1]["error"]["code"] == "model_not_found"
        assert server.ask(path="/v2/chat")[0] == 404
        status, body, headers = server.ask(path="/v1/chat/completions")
        assert (status, body["error"]["code"], headers["allow"]) == (405, "unknown_url", "POST")
        assert server.ask(chat("x"), headers={"Content-Type": "text/plain"})[0] == 415
        assert server.ask(path="/health")[1]["busy"] == 0


class Refused(EngineError):
    """As the engine of litellm raises it."""

    def __init__(self, status: int | None) -> None:
        super().__init__(f"provider says {status}")
        self.status = status


ERRORS: dict[str, Exception] = {
    "budget": BudgetError("budget.money", 5, "no room"),
    "unfit": UnfitError("too long"),
    "provider 400": Refused(400),
    "provider 401": Refused(401),
    "provider 429": Refused(429),
    "provider down": Refused(None),
    "engine": EngineError("broken"),
    "config": ConfigError("nobody priced it", key="models.big"),
    "bug": RuntimeError("a secret"),
    "slow": TimeoutError(),
}
STATUSES = {
    "budget": (402, "insufficient_quota"),
    "unfit": (400, "unfit_request"),
    "provider 400": (400, "refused_by_provider"),
    "provider 401": (502, "provider_failed"),
    "provider 429": (429, "provider_busy"),
    "provider down": (502, "provider_failed"),
    "engine": (502, "provider_failed"),
    "config": (500, "ConfigError"),
    "bug": (500, None),
    "slow": (504, "timeout"),
}


def test_long_bodies_are_refused_and_the_connection_lives() -> None:
    with Running(Scripted(), limits=limits(body=1000)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        for _ in range(2):
            status, body, _ = exchange(connection, chat("x" * 200_000))
            assert (status, body["error"]["code"]) == (413, "body_too_long")
            assert exchange(connection, chat("x"))[0] == 200
        parts = iter([b'{"model": "', b"c" * 2000, b'"}'])  # without a length
        kind = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", parts, kind, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()


def test_a_key_is_asked_for_and_compared() -> None:
    key = "k-0123456789-ä"
    with Running(Scripted(), key=key) as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic k-0123456789"},
        ):
            for path, body in (("/v1/chat/completions", chat("hi")), ("/v1/models", None)):
                status, said_, sent = server.ask(body, path=path, headers=headers)
                assert (status, said_["error"]["code"]) == (401, "invalid_api_key")
                assert sent["www-authenticate"] == "Bearer"
        right: Any = {"Authorization": f"Bearer {key}".encode(), "Host": "models.example"}
        assert server.ask(chat("hi"), headers=right)[0] == 200
        assert server.ask(path="/health")[0] == 200


def test_without_a_key_only_this_machine_is_answered() -> None:
    from agentdistill.serving.server import check_host, listen, read_key

    with Running(Scripted()) as server:
        for host in ("evil.example:80", "127.0.0.1.evil.example", "evil_host.example", "[::1", ""):
            status, body, _ = server.ask(chat("hi"), headers={"Host": host})
            assert (status, body["error"]["code"]) == (403, "foreign_host")
        for host in (f"localhost:{server.port}", "[::1]:80", "127.0.0.1"):
            assert server.ask(chat("hi"), headers={"Host": host})[0] == 200
        with pytest.raises(ConfigError, match="cannot listen"):
            listen("127.0.0.1", server.port)
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        check_host(host, None)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        check_host(host, "key")
        with pytest.raises(ConfigError, match="--key-env"):
            check_host(host, None)
    with pytest.raises(ConfigError, match="not set"):
        read_key("A_VARIABLE_THAT_NOBODY_SET")


# -- under load, and going down --------------------------------------------------------------------


def test_the_full_server_says_when_to_come_again() -> None:
    engine = Scripted(after=0.6)
    with Running(engine, limits=limits(concurrency=2)) as server:
        found: list[int] = []
        waiting = [
            threading.Thread(target=lambda: found.append(server.ask(chat("hi"))[0]))
            for _ in range(2)
        ]
        for thread in waiting:
            thread.start()
        until(lambda: server.serving.busy == 2)
        status, body, headers = server.ask(chat("hi"))
        assert (status, body["error"]["code"], headers["retry-after"]) == (429, "server_full", "1")
        for thread in waiting:
            thread.join()
        assert found == [200, 200] and server.ask(chat("hi"))[0] == 200


def test_time_is_limited() -> None:
    engine = Scripted(after=30)
    with Running(engine, limits=limits(seconds=0.2)) as server:
        began = time.monotonic()
        status, body, _ = server.ask(chat("hi"))
        assert (status, body["error"]["type"]) == (504, "timeout")
        assert time.monotonic() - began < 5
        until(lambda: engine.cancelled == 1)
        # A body that never ends is no reason to wait longer.
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as slow:
            slow.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            assert slow.recv(100).startswith(b"HTTP/1.1 504")
        assert server.serving.busy == 0


def test_a_client_that_leaves_ends_the_work() -> None:
    engine = Scripted(after=30)
    with Running(engine) as server:
        leaving = socket.create_connection(("127.0.0.1", server.port))
        body = json.dumps(chat("hi")).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        leaving.sendall(head.encode() + body)
        until(lambda: server.serving.busy == 1)
        leaving.close()
        until(lambda: engine.cancelled == 1)
        until(lambda: server.serving.busy == 0)


def test_what_has_begun_ends_and_what_is_new_is_refused() -> None:
    engine = Scripted(after=1.0)
    with Running(engine) as server:
        kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        assert exchange(kept, path="/health")[0] == 200
        found: list[int] = []
        begun = threading.Thread(target=lambda: found.append(server.ask(chat("hi"))[0]))
        begun.start()
        until(lambda: server.serving.busy == 1)
        server.serving.drain()
        for ask in (lambda: server.ask(chat("hi")), lambda: exchange(kept, chat("hi"))):
            status, body, headers = ask()
            assert (status, body["error"]["code"]) == (503, "draining")
            assert headers["retry-after"] == "1"
        assert server.ask(path="/health")[:2] == (503, {"status": "draining", "busy": 1})
        begun.join()
        server.thread.join(10)
        assert found == [200] and len(engine.asked) == 1 and not server.thread.is_alive()
        kept.close()


def test_work_can_be_abandoned() -> None:
    engine = Scripted(after=30)
    with Running(engine) as server:
        found: list[tuple[int, str]] = []

        def ask() -> None:
            status, body, _ = server.ask(chat("hi"))
            found.append((status, body["error"]["code"]))

        begun = threading.Thread(target=ask)
        begun.start()
        until(lambda: server.serving.busy == 1)
        server.serving.drain()
        server.thread.join(0.3)
        assert server.thread.is_alive()
        server.call(server.serving.abandon)
        begun.join(10)
        assert found == [(503, "draining")] and engine.cancelled == 1


def test_no_answer_waits_for_an_acknowledgement() -> None:
    """40 ms of the kernel's, where a connection has Nagle's algorithm."""
    with Running(Scripted()) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        seconds = []
        for _ in range(15):
            began = time.monotonic()
            assert exchange(connection, path="/health")[0] == 200
            seconds.append(time.monotonic() - began)
        connection.close()
    assert sorted(seconds)[5] < 0.03  # the first ones are acknowledged at once


# -- recordings ------------------------------------------------------------------------------------


def test_a_recording_that_fails_costs_no_answer() -> None:
    from agentdistill.serving.recording import Recording

    recording = Recording(Path("/dev/full"))
    with Running(Scripted(), recording=recording) as server:
        assert server.ask(chat("hi"))[0] == 200
        assert server.ask(path="/health")[1]["not_recorded"] == 1
