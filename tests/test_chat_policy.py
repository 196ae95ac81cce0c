"""A policy that is only text: its prompts, its thoughts and calls, and whole episodes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from agentdistill.actions import Parsed
from agentdistill.chat import ChatPolicy
from agentdistill.config import PROMPTS, ApiModel, RunConfig, load
from agentdistill.engines.base import Capabilities, Engine, Message, Sample, Sampling
from agentdistill.errors import ConfigError
from agentdistill.ledger import Price
from agentdistill.policy import Episode, Policy, Response
from agentdistill.records import Actor, Task, Trajectory, Usage, Verdict
from agentdistill.render import Renderer, materialise
from agentdistill.rollout import Request, rollout, run
from agentdistill.run import Run
from agentdistill.wording import Wording
from tests.doubles import Offered, TextEngine
from tests.provider import Move, Provider
from tests.templates import tokenizer
from tests.test_tool_calls import TOOL, Tools, walk
from tests.toy import Corridor

INSTRUCTION = "Walk to the goal with left and right."
TASK = Task("tests/Corridor-v0", "train", {"at": 0, "goal": 3})


class Scripted(TextEngine):
    """Gives the samples of a script, and keeps what it was asked."""

    name = "scripted"

    def __init__(self, *script: Sample) -> None:
        self._script = script
        self.asked: list[tuple[list[Message], tuple[Any, ...], int]] = []

    async def draw(
        self, messages: Sequence[Message], sampling: Sampling, n: int, tools: Offered, seed: int
    ) -> list[Sample]:
        self.asked.append((list(messages), tuple(tools), seed))
        return [self._script[min(len(self.asked), len(self._script)) - 1]] * n


def said(text: str, **options: Any) -> Sample:
    return Sample((), (), text, "stop", usage=Usage(input=5, output=2), **options)


def play(
    engine: Engine, preset: str = "chat", env: Any = Corridor, turns: int = 6, **options: Any
) -> Trajectory:
    note = options.pop("note", "")
    wording = Wording(PROMPTS[preset], INSTRUCTION)
    policy = ChatPolicy("api", engine, wording, Sampling(), **options)
    (found,) = run(rollout(policy, env, [Request(TASK, 0, note=note)], max_turns=turns))
    return found


ANSWERS = {
    "plain": "right",
    "action": "<think>on</think><action>right</action>",
    "answer": "<think>on</think><answer>right</answer>",
    "code": "<code>\nright\n</code>",
}


@pytest.mark.parametrize("preset", PROMPTS)
def test_it_reads_what_a_model_with_tokens_reads(preset: str) -> None:
    engine = Scripted(said(ANSWERS[PROMPTS[preset].grammar]))
    found = play(engine, preset)
    reader = Renderer(tokenizer("tiny"), PROMPTS[preset], INSTRUCTION)
    tokens = materialise(found, reader)
    assert found.success and len(engine.asked) == 3
    for (messages, _, _), turn in zip(engine.asked, tokens.turns, strict=True):
        assert turn.span is not None
        ids = tokens.streams[turn.span.stream].ids[: turn.span.start]
        prompt = reader.text(ids.tolist())
        assert len(messages) > 0
        for message in messages:
            assert message.content.strip() in prompt


def test_turns_have_no_tokens_and_all_facts() -> None:
    found = play(Scripted(said("right")))
    assert (found.end, found.env_steps, found.streams) == ("success", 3, ())
    assert all(turn.span is None for turn in found.turns)
    assert found.turns[0].usage == Usage(input=5, output=2)
    assert found.turns[0].actor == Actor("api", 0, found.turns[0].actor.sampling)
    assert found.turns[0].actor.sampling["temperature"] == 1.0


def test_each_turn_draws_with_its_own_seed() -> None:
    engine = Scripted(said("right"))
    play(engine)
    assert len({seed for _, _, seed in engine.asked}) == 3


def test_reasoning_is_on_record_and_neither_acted_on_nor_sent_back() -> None:
    thought = "eastward </think> then <action>left</action>"
    engine = Scripted(said("<action>right</action>", reasoning=thought))
    found = play(engine, "react")
    first = found.turns[0]
    assert found.success and first.actions == ("right",)
    assert "eastward" in first.reasoning and first.text.startswith("<think>eastward")
    last, _, _ = engine.asked[-1]
    assert [m.content for m in last if m.role == "assistant"] == ["<action>right</action>"] * 2
    assert not any("eastward" in message.content for message in last)


def test_a_thought_that_the_model_wrote_itself_stays_or_goes_with_the_preset() -> None:
    text = "<think>east</think><action>right</action>"
    for preset, kept in (("react", True), ("react-drop", False)):
        engine = Scripted(said(text))
        play(engine, preset)
        past = [m.content for m in engine.asked[-1][0] if m.role == "assistant"]
        assert all(("east" in content) is kept for content in past) and len(past) == 2


def test_windows_and_rebuilt_prompts_show_what_the_preset_says() -> None:
    engine = Scripted(said("left"))
    play(engine, "window")
    sizes = [len(messages) for messages, _, _ in engine.asked]
    assert sizes == [2, 4, 6, 6, 6, 6]
    engine = Scripted(said("<action>left</action>"))
    play(engine, "tcod")
    assert all([m.role for m in messages] == ["user"] for messages, _, _ in engine.asked)
    assert "left" in engine.asked[-1][0][0].content


def test_a_note_stands_before_the_first_user_message_only() -> None:
    engine = Scripted(said("right"))
    found = play(engine, note="The goal is far.")
    for messages, _, _ in engine.asked:
        assert messages[0].role == "system" and "far" not in messages[0].content
        assert messages[1].content.startswith("The goal is far.\n")
        assert not any("far" in message.content for message in messages[2:])
    assert found.provenance["note"] == "The goal is far."


# -- native tools ---------------------------------------------------------------------------------


def test_tools_are_offered_only_when_asked_for() -> None:
    for native in (False, True):
        engine = Scripted(said("right"))
        play(engine, env=Tools, native_tools=native)
        assert engine.asked[0][1] == ((TOOL,) if native else ())


def test_calls_go_through_the_environment_and_back_as_calls() -> None:
    two = said("I go", tool_calls=(walk("right"), {**walk("right"), "id": ""}))
    engine = Scripted(two, said("", tool_calls=(walk("right"),)))
    found = play(engine, env=Tools, native_tools=True)
    assert (found.end, found.env_steps) == ("success", 3)
    system, first, call, *results = engine.asked[1][0]
    assert (system.role, first.role, call.role) == ("system", "user", "assistant")
    assert call.content == "I go" and [m.role for m in results] == ["tool", "tool"]
    identities = [str(one["id"]) for one in call.tool_calls]
    assert identities == [m.tool_call_id for m in results] and len(set(identities)) == 2
    shown = [result.observation for result in found.turns[0].results]
    assert [m.content for m in results] == shown


def test_every_call_is_answered_and_every_argument_readable() -> None:
    torn = {"id": "t", "function": {"name": "walk", "arguments": '{"way": "ri'}}
    engine = Scripted(said("", tool_calls=(walk("right"), torn)), said("right"))
    found = play(engine, env=Tools, native_tools=True, turns=2)
    assert found.turns[0].verdict is Verdict.MALFORMED
    _, _, call, *results = engine.asked[1][0]
    assert [m.tool_call_id for m in results] == ["right", "t"]
    assert results[1].content == "Not executed."
    for one in call.tool_calls:
        assert isinstance(json.loads(one["function"]["arguments"]), dict)  # type: ignore


@pytest.mark.parametrize("preset", ["window", "tcod", "react"])
def test_native_calls_in_every_history(preset: str) -> None:
    engine = Scripted(said("", tool_calls=(walk("left"),)))
    play(engine, preset, env=Tools, native_tools=True)
    for messages, _, _ in engine.asked:
        open_calls: list[str] = []
        for message in messages:
            if message.role == "tool":
                assert message.tool_call_id == open_calls.pop(0)
            else:
                assert not open_calls  # providers refuse a call without its result
            open_calls += [str(call["id"]) for call in message.tool_calls]
        assert not open_calls
        assert next(m for m in messages if m.role != "system").role == "user"
    assert any(m.role == "tool" for m in engine.asked[-1][0]) is (preset != "tcod")


def test_text_only_models_read_calls_of_others_as_text() -> None:
    engine = Scripted(said("<action>right</action>"))
    policy = ChatPolicy("api", engine, Wording(PROMPTS["react"], INSTRUCTION), Sampling())

    class Both(Policy):
        name = "both"

        async def act(self, episode: Episode) -> Response:
            if episode.turns:
                return await policy.act(episode)
            parsed = Parsed((), Verdict.MISSING)
            return Response("", parsed, Actor("other"), tool_calls=(walk("right"),))

    run(rollout(Both(), Tools, [Request(TASK, 0)], max_turns=2))
    assert engine.asked[0][0][2] == Message("assistant", "<action>right</action>")


# -- faults, configuration, runs ------------------------------------------------------------------


def test_engines_without_messages_are_refused() -> None:
    class Deaf(Scripted):
        @property
        def capabilities(self) -> Capabilities:
            return Capabilities(ids=True)

    with pytest.raises(ConfigError, match="no messages"):
        ChatPolicy("api", Deaf(), Wording(PROMPTS["chat"]), Sampling())


def test_a_response_says_why_it_ended() -> None:
    policy = ChatPolicy("api", Scripted(), Wording(PROMPTS["chat"]), Sampling())
    cut = replace(said("rig"), stop="length")
    assert policy.response(cut).stop == "length" and policy.response(said("x")).stop == "stop"


def config(**model: Any) -> str:
    return json.dumps({"models": {"teacher": {"kind": "api", "model": "openai/small", **model}}})


def test_a_model_behind_an_api_is_configured(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    price = {"input": "0.15", "output": 0.6}
    path.write_text(config(base_url="http://127.0.0.1:1/v1", key_env="MY_KEY", price=price))
    model = load(path).models["teacher"]
    assert isinstance(model, ApiModel) and model.price is not None
    assert str(model.price.input) == "0.15" and model.concurrency == 32
    with Run(load(path)) as the_run:
        exact = Decimal("0.15")
        assert the_run.providers.prices() == {
            "openai/small": Price(exact, exact, exact, Decimal("0.6"))
        }


@pytest.mark.parametrize(
    "wrong",
    [
        {"key_env": "sk-0123456789"},
        {"key_env": "Sk0123456789abcdef"},
        {"api_key": "sk-0123456789"},
        {"headers": {"x": "sk-0123456789"}},
        {"base_url": "https://me:sk-0123456789@there/v1"},
        {"base_url": "https://there/v1?key=sk-0123456789"},
    ],
)
def test_a_key_in_a_configuration_is_refused_and_not_repeated(
    wrong: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(config(**wrong))
    with pytest.raises(ConfigError, match="key_env") as caught:
        load(path)
    assert "0123456789" not in str(caught.value)


def test_only_weights_can_be_trained() -> None:
    stage = {"name": "s", "do": "train", "model": "teacher", "method": "sft", "iterations": 1}
    model = {"kind": "api", "model": "openai/small"}
    with pytest.raises(ValueError, match="no weights here"):
        RunConfig(models={"teacher": model}, stages=[stage])  # type: ignore


@pytest.mark.litellm
@pytest.mark.filterwarnings("ignore:.*`ReadOnly` qualifier.*:UserWarning")
def test_episodes_through_faults_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-0123456789abcdef")

    def moves(number: int, _: Any) -> Move:
        faults = ("drop", "tear", "cut", "refuse")
        return Move(fault=faults[number % 4], status=503) if number % 3 == 2 else Move()

    with Provider(moves) as provider:
        model = {"kind": "api", "model": "openai/small", "base_url": provider.url}
        model |= {"key_env": "TEST_KEY", "concurrency": 8}
        settings = RunConfig(output=str(tmp_path), models={"teacher": model})  # type: ignore
        with Run(settings) as the_run:
            the_run.providers.engine("teacher")._patience.base = 0.01
            policy = the_run.policy("teacher")
            assert the_run.providers.engine("teacher") is the_run.providers.engine("teacher")
            wanted = [Request(TASK, seed) for seed in range(12)]
            found = run(rollout(policy, Corridor, wanted))
            with pytest.raises(ConfigError, match="has no weights here"):
                the_run.model("teacher")
    assert [one.end for one in found] == ["success"] * 12
    assert not any(one.faults for one in found) and all(one.env_steps == 3 for one in found)


@pytest.mark.litellm
@pytest.mark.filterwarnings("ignore:.*`ReadOnly` qualifier.*:UserWarning")
def test_a_provider_that_is_gone_is_a_fault_of_the_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-0123456789abcdef")
    refused = Move(fault="refuse", status=401, message="bad sk-0123456789abcdef")
    with Provider([Move(), refused]) as provider:
        model = {"kind": "api", "model": "openai/small", "base_url": provider.url}
        settings = RunConfig(
            output=str(tmp_path), models={"teacher": {**model, "key_env": "TEST_KEY"}}
        )  # type: ignore
        with Run(settings) as the_run:
            (found,) = run(rollout(the_run.policy("teacher"), Corridor, [Request(TASK, 0)]))
    (fault,) = found.faults
    assert (found.end, fault.kind, len(found.turns)) == ("fault:engine", "engine", 1)
    assert "TEST_KEY" in fault.message and "sk-0123" not in fault.message
