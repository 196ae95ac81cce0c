"""The real clients against a real server: openai and litellm, alone and 64 at once."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from agentdistill.agreement import Rule
from agentdistill.engines.base import Message, Sample, Sampling
from agentdistill.engines.patience import Patience
from agentdistill.errors import BudgetError
from agentdistill.ledger import Ledger, Price, SpendLimits
from agentdistill.records import Usage
from agentdistill.serving.cascade import MessageCascade
from tests.provider import Move, Provider
from tests.provider import call as called
from tests.servers import Running, Scripted, said

KEY = "k-0123456789"
HI: Any = [{"role": "user", "content": "hi"}]
TOOL: Any = {
    "type": "function",
    "function": {"name": "walk", "parameters": {"type": "object", "properties": {}}},
}
WALK = called("walk", '{"way": "left"}')
pytestmark = [
    pytest.mark.serve,
    pytest.mark.openai,
    pytest.mark.filterwarnings("ignore:.*`ReadOnly` qualifier.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the .* on the instance:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TEST_PROVIDER_KEY", "sk-0123456789abcdef-secret")


def client(server: Running, **options: Any) -> Any:
    import openai

    defaults = {"base_url": server.url, "api_key": KEY, "max_retries": 0, "timeout": 30}
    return openai.OpenAI(**{**defaults, **options})


def remote(provider: Provider, model: str, **options: Any) -> Any:
    from agentdistill.engines.litellm import LiteLLMEngine

    return LiteLLMEngine(
        f"openai/{model}",
        name=model,
        base_url=provider.url,
        key_env="TEST_PROVIDER_KEY",
        patience=Patience(base=0.01),
        timeout=20,
        **options,
    )


# -- openai ----------------------------------------------------------------------------------------


def test_openai_reads_text_calls_thoughts_and_who_answered() -> None:
    script = [said("I go", tool_calls=(WALK,), reasoning="so"), said("done")]
    engine = Scripted(lambda messages, number: script[len(messages) > 1])
    with Running(engine, key=KEY) as server, client(server) as openai:
        first = openai.chat.completions.create(model="cascade", messages=HI, tools=[TOOL])
        message = first.choices[0].message
        (walk,) = message.tool_calls
        assert (walk.function.name, json.loads(walk.function.arguments)) == (
            "walk",
            {"way": "left"},
        )
        assert (message.content, first.choices[0].finish_reason) == ("I go", "tool_calls")
        assert message.reasoning_content == "so"
        assert first.model_extra["agentdistill"]["policy"] == "cascade"
        chat = [*HI, message, {"role": "tool", "tool_call_id": walk.id, "content": "P..G"}]
        second = openai.chat.completions.create(
            model="cascade", messages=chat, tools=[TOOL], tool_choice="none", n=2, stop=["ne"],
            max_completion_tokens=7, temperature=0.5, top_p=0.5, seed=3, user="me",
        )  # fmt: skip
        assert [choice.message.content for choice in second.choices] == ["do", "do"]
        assert second.usage.completion_tokens == 6
        assert [model.id for model in openai.models.list()] == ["cascade"]
        raw = openai.chat.completions.with_raw_response.create(model="cascade", messages=HI)
        assert raw.headers["x-agentdistill-by"] == "model"
    asked = engine.asked[1]
    assert asked["sampling"] == Sampling(0.5, 0.5, 0, 7) and (asked["seed"], asked["n"]) == (3, 2)
    assert asked["messages"][1] == Message("assistant", "I go", (WALK,))


def test_openai_reads_streams() -> None:
    engine = Scripted(lambda messages, number: said(f"text {number}", tool_calls=(WALK,)))
    with Running(engine) as server, client(server) as openai:
        asked = {"model": "cascade", "messages": HI, "tools": [TOOL]}
        plain = [part for part in openai.chat.completions.create(stream=True, **asked)]
        with openai.chat.completions.stream(
            n=2, stream_options={"include_usage": True}, **asked
        ) as stream:
            whole = stream.get_final_completion()
    texts = "".join(part.choices[0].delta.content or "" for part in plain)
    assert texts == "text 0" and plain[-1].choices[0].finish_reason == "tool_calls"
    assert all(part.usage is None for part in plain)
    assert [choice.message.content for choice in whole.choices] == ["text 0", "text 1"]
    assert [c.message.tool_calls[0].function.name for c in whole.choices] == ["walk"] * 2
    assert whole.usage.prompt_tokens == 30


def test_openai_raises_what_fits() -> None:
    import openai as package

    def fail(messages: Sequence[Message], number: int) -> Sample:
        raise BudgetError("budget.money", 5, "no room")

    with Running(Scripted(fail), key=KEY) as server, client(server) as openai:
        create = openai.chat.completions.create
        with pytest.raises(package.BadRequestError, match="logprobs") as caught:
            create(model="cascade", messages=HI, logprobs=True)
        assert (caught.value.param, caught.value.code) == ("logprobs", "unsupported_parameter")
        with pytest.raises(package.NotFoundError, match="no model 'gpt-9'"):
            create(model="gpt-9", messages=HI)
        with pytest.raises(package.APIStatusError, match=r"budget\.money") as broke:
            create(model="cascade", messages=HI)
        assert (broke.value.status_code, broke.value.code) == (402, "insufficient_quota")
        with (
            client(server, api_key="wrong") as stranger,
            pytest.raises(package.AuthenticationError),
        ):
            stranger.models.list()
        server.serving.limits = type(server.serving.limits)(body=100)
        with pytest.raises(package.APIStatusError, match="longer than 100") as long:
            create(model="cascade", messages=[{"role": "user", "content": "x" * 10**6}])
        assert long.value.status_code == 413


def test_openai_comes_again_when_the_server_is_full() -> None:
    from agentdistill.serving.app import Limits

    engine = Scripted(after=0.3)
    found: list[str] = []
    with (
        Running(engine, limits=Limits(concurrency=1)) as server,
        client(server, max_retries=5) as openai,
    ):

        def ask() -> None:
            answer = openai.chat.completions.create(model="cascade", messages=HI)
            found.append(answer.choices[0].message.content)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == ["right"] * 3 and len(engine.asked) == 3


def test_openai_that_gives_up_ends_the_work() -> None:
    import openai as package

    engine = Scripted(after=30)
    with Running(engine) as server, client(server, timeout=0.5) as openai:
        with pytest.raises(package.APITimeoutError):
            openai.chat.completions.create(model="cascade", messages=HI)
        for _ in range(100):
            if engine.cancelled:
                break
            threading.Event().wait(0.05)
        assert engine.cancelled == 1 and server.serving.busy == 0


# -- litellm, on both sides ------------------------------------------------------------------------


async def _by_litellm(url: str) -> tuple[Any, list[Any]]:
    """An answer with tools, and the parts of a stream."""
    from agentdistill.engines.client import client, until_the_end

    keeper = until_the_end(asyncio.get_running_loop(), {})
    await anext(keeper)  # it closes litellm's connections when this loop ends
    asked: dict[str, Any] = {"model": "openai/cascade", "base_url": url, "api_key": "none"}
    asked["_skip_mcp_handler"] = True  # it imports a package that litellm does not need
    answer = await client().acompletion(messages=HI, tools=[TOOL], **asked)
    usage = {"include_usage": True}
    stream = await client().acompletion(messages=HI, stream=True, stream_options=usage, **asked)
    return answer, [part async for part in stream]


@pytest.mark.litellm
def test_litellm_before_and_behind() -> None:
    """A client's litellm asks the cascade, whose engines ask a provider by litellm."""
    script = [
        Move(text=["left", "left", "right"], bills=Usage(20, 80, 0, 6)),
        Move(text="up", calls=[WALK], reasoning="hm", bills=Usage(100, 0, 0, 40)),
    ]
    move = {"small": script[0], "big": script[1]}
    with Provider(lambda number, payload: move[payload["model"]]) as provider:
        one = MessageCascade("cascade", remote(provider, "small"), remote(provider, "big"), Rule())
        with Running(one) as server:
            answer, parts = asyncio.run(_by_litellm(server.url))
    message = answer.choices[0].message
    assert message.content == "up" and message.tool_calls[0].function.name == "walk"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (200, 46)
    assert [payload.get("n", 1) for payload in provider.asked] == [3, 1, 3, 1]
    assert "".join(part.choices[0].delta.content or "" for part in parts) == "up"


@pytest.mark.litellm
def test_the_budget_stops_before_the_call_that_breaks_it() -> None:
    prices = {"openai/small": Price(1, 1, 1, 1), "openai/big": Price(1, 1, 1, 10**6)}
    with (
        Provider([Move(text=["a", "b", "c"])]) as provider,
        Ledger(None, SpendLimits(money="1"), prices) as ledger,
    ):
        student = remote(provider, "small", ledger=ledger)
        teacher = remote(provider, "big", ledger=ledger, role="teacher")
        with Running(MessageCascade("cascade", student, teacher, Rule())) as server:
            status, body, _ = server.ask({"model": "cascade", "messages": HI})
        assert (status, body["error"]["code"]) == (402, "insufficient_quota")
        assert "money" in body["error"]["message"]
        assert len(provider.asked) == 1 and ledger.total.calls == 1


@pytest.mark.litellm
def test_64_clients_at_once_get_their_own_answers() -> None:
    def answer(number: int, payload: dict[str, Any]) -> Move:
        who = payload["messages"][-1]["content"]
        sure = int(who.split()[1]) % 2 == 0
        if payload["model"] == "big":
            return Move(text=f"teacher of {who}", after=0.05)
        return Move(text=f"{who}" if sure else [f"{who} a", f"{who} b", f"{who} c"], after=0.05)

    async def ask(openai: Any, number: int, turn: int) -> tuple[str, str]:
        who = f"client {number} turn {turn}"
        stream = number % 3 == 0
        found = await openai.chat.completions.create(
            model="cascade", messages=[{"role": "user", "content": who}], stream=stream
        )
        if stream:
            parts = [part async for part in found]
            told = parts[0].model_extra["agentdistill"]["answers"][0]["by"]
            return "".join(part.choices[0].delta.content or "" for part in parts), told
        return found.choices[0].message.content, found.model_extra["agentdistill"]["answers"][0][
            "by"
        ]

    async def everybody(url: str) -> list[tuple[str, str]]:
        import openai

        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as one:
            rounds = [
                await asyncio.gather(*(ask(one, number, turn) for number in range(64)))
                for turn in range(2)
            ]
        return [each for answers in rounds for each in answers]

    with Provider(answer) as provider:
        student, teacher = remote(provider, "small"), remote(provider, "big")
        with Running(MessageCascade("cascade", student, teacher, Rule())) as server:
            found = asyncio.run(everybody(server.url))
    wanted = [
        (f"client {n} turn {turn}", "student")
        if n % 2 == 0
        else (f"teacher of client {n} turn {turn}", "teacher")
        for turn in range(2)
        for n in range(64)
    ]
    assert found == wanted
    assert len(provider.asked) == 2 * (64 + 32) and provider.at_once > 16
