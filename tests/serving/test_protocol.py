"""What a request says, what is wrong with it, and that nothing else can happen."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentdistill.engines.base import Message, Sampling
from agentdistill.serving.protocol import IGNORED, ApiError, Asked, completion, events, read
from tests.servers import chat, said


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"{torn", None, "not JSON"),
        (b'{"n": NaN}', None, "not JSON"),
        (b"[" * 5000, None, "not JSON"),
        (
            b'{"model": "cascade", "messages": [{"role": "user", "content": "\\ud800"}]}',
            None,
            "JSON",
        ),
        ([1], None, "not a JSON object"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "model", "required"),
        ({"model": "cascade"}, "messages", "required"),
        ({"model": "cascade", "messages": []}, "messages", "at least 1"),
        (chat("hi") | {"messages": [{"role": "bard"}]}, "messages.0", "bard"),
        (
            chat("hi") | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0",
            "only text",
        ),
        (
            chat("hi") | {"messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}]},
            "messages.0",
            "function",
        ),
        (chat("hi", n=0), "n", "greater than"),
        (chat("hi", n=True), "n", "valid integer"),
        (chat("hi", temperature=3), "temperature", "less than"),
        (chat("hi", max_tokens="9"), "max_tokens", "valid integer"),
        (chat("hi", stop=list("abcde")), "stop", "at most 4"),
        (chat("hi", stop=""), "stop.constrained-str", "at least 1"),
        (chat("hi", tools=[{"type": "retrieval"}]), "tools.0.type", "function"),
        (chat("hi", tool_choice="required"), "tool_choice", "only auto and none"),
        (chat("hi", logprobs=True), "logprobs", "not supported"),
        (chat("hi", response_format={"type": "json_object"}), "response_format", "not supported"),
        (chat("hi", logit_bias={"5": 1}), "logit_bias", "not supported"),
        (chat("hi", magic=1), "magic", "unknown parameter"),
    ],
)
def test_what_is_wrong_is_named(body: Any, param: str | None, words: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError, match=words) as caught:
        read(raw, Sampling())
    error = caught.value.body["error"]
    assert caught.value.status == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param or str(error["param"]).startswith(f"{param}.")


def test_parameters_that_change_nothing_are_taken() -> None:
    neutral = {"logprobs": False, "frequency_penalty": 0.0, "response_format": {"type": "text"}}
    body = chat("hi", parallel_tool_calls=True, **neutral, **dict.fromkeys(IGNORED, "x"))
    assert read(json.dumps(body).encode(), Sampling()).messages == (Message("user", "hi"),)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
NAMES = ["tools", "tool_choice", "n", "stop", "stream", "stream_options", "seed", "temperature"]
NAMES += ["max_tokens", "logprobs", "response_format", "user", "top_k", "messages", "model"]
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system"]), "content": JSON},
        optional={"tool_calls": JSON},
    ),
    max_size=3,
)


@given(MESSAGES, st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
def test_whatever_is_sent_it_is_read_or_refused(messages: Any, more: dict[str, Any]) -> None:
    body = json.dumps({"model": "cascade", "messages": messages, **more}).encode()
    try:
        asked = read(body, Sampling())
    except ApiError as error:
        assert error.status == 400 and error.body["error"]["message"]
        return
    assert asked.messages and asked.n >= 1 and asked.sampling.max_tokens >= 1
    answer = completion(asked, [said("a")] * asked.n, name="x", identity="1", created=1)
    assert list(events(answer, with_usage=True))[-1] == b"data: [DONE]\n\n"
    assert isinstance(asked, Asked) and json.dumps(asked.said)
