"""Native tool calls: from what a provider returned to steps, records, and a text student's data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from agentdistill.actions import Parsed
from agentdistill.config import PROMPTS
from agentdistill.engines.base import Capabilities, Engine, Sample, Sampling
from agentdistill.export import messages
from agentdistill.policy import Episode, ModelPolicy, Policy, Response
from agentdistill.records import Actor, Author, Kind, Task, Trajectory, Verdict
from agentdistill.render import Renderer, materialise
from agentdistill.rollout import Request, rollout, run
from tests.templates import tokenizer
from tests.toy import Corridor

TOOL = {
    "type": "function",
    "function": {
        "name": "walk",
        "description": "Walk one cell.",
        "parameters": {"type": "object", "properties": {"way": {"type": "string"}}},
    },
}


class Tools(Corridor):
    """A corridor that is walked by calls; ``jam`` is a tool that breaks."""

    @property
    def tools(self) -> list[dict[str, Any]]:
        return [TOOL]

    def tool_action(self, name: str, arguments: Mapping[str, Any]) -> str:
        if name == "jam":
            raise RuntimeError("jammed")
        return super().tool_action(name, arguments)


def walk(way: str) -> dict[str, Any]:
    return {"id": way, "function": {"name": "walk", "arguments": json.dumps({"way": way})}}


class Calls(Policy):
    """A script: for each turn its calls and the text beside them."""

    name = "caller"

    def __init__(self, *script: tuple[str, list[Any]]) -> None:
        self._script = script

    async def act(self, episode: Episode) -> Response:
        text, calls = self._script[len(episode.turns)]
        parsed = Parsed((), Verdict.MISSING, reasoning="hm" if text else "")
        return Response(text, parsed, Actor(self.name), tool_calls=tuple(calls))


def play(*script: tuple[str, list[Any]], goal: int = 4) -> Trajectory:
    task = Task("tests/Corridor-v0", "train", {"at": 0, "goal": goal})
    policy = Calls(*script)
    (found,) = run(rollout(policy, Tools, [Request(task, 0)], max_turns=len(script)))
    return found


def test_calls_are_steps_and_on_record() -> None:
    found = play(("I go", [walk("right"), walk("right")]), ("", [walk("right"), walk("right")]))
    assert (found.end, found.env_steps) == ("success", 4)
    first = found.turns[0]
    assert first.actions == ("right", "right") and len(first.results) == 2
    assert first.tool_calls == (walk("right"), walk("right"))
    assert (first.text, first.reasoning, first.verdict) == ("I go", "hm", Verdict.OK)


def test_calls_that_cannot_be_read_or_done_are_verdicts() -> None:
    torn = {"function": {"name": "walk", "arguments": '{"way": "ri'}}
    unknown = {"function": {"name": "fly", "arguments": "{}"}}
    found = play(("", [walk("right"), torn]), ("", [unknown]), ("", [walk("up")]), ("", []))
    verdicts = [Verdict.MALFORMED, Verdict.INADMISSIBLE, Verdict.INADMISSIBLE, Verdict.MISSING]
    assert [turn.verdict for turn in found.turns] == verdicts
    assert [turn.actions for turn in found.turns] == [("",), ("fly({})",), ("up",), ("",)]
    assert found.turns[0].tool_calls == (walk("right"), torn)
    assert found.env_steps == 4 and found.faults == ()
    mine = Renderer(tokenizer(), PROMPTS["bare"])
    said = [mine.wording.answer(turn) for turn in found.turns]
    assert said == ["", "fly({})", "up", ""], "nobody learns to say nothing in tags"


def test_an_environment_that_cannot_name_a_call_is_at_fault() -> None:
    found = play(("", [walk("right")]), ("", [{"function": {"name": "jam"}}]), ("", []))
    assert (found.end, found.faults[0].turn) == ("fault:environment", 1)
    assert "jammed" in found.faults[0].message
    assert len(found.turns) == 2 and found.turns[1].results == (), "what was sampled is kept"


def test_a_text_student_learns_the_actions_of_the_calls() -> None:
    found = play(("", [walk("right")]), ("I go", [walk("left")]))
    mine = Renderer(tokenizer(), PROMPTS["react"])
    (stream,) = materialise(found, mine).streams
    spoken = stream.author == Author.ACTOR
    text = mine.tokenizer.decode(stream.ids[spoken].tolist())
    assert text == "<action>right</action><|end|>I go\n<action>left</action><|end|>"
    acted = stream.ids[spoken & (stream.kind == Kind.ACT)].tolist()
    assert mine.tokenizer.decode(acted).replace("</action>", "") == "rightleft"
    said = [m["content"] for m in messages(found) if m["role"] == "assistant"]
    assert said == ["right", "I go\nleft"]


def test_an_engine_that_returns_calls_is_heard() -> None:
    class Provider(Engine):
        name = "provider"
        capabilities = Capabilities(ids=True)

        async def generate(
            self, ids: Sequence[int], sampling: Sampling, *, seed: int = 0, session: Any = None
        ) -> Sample:
            return Sample((mine.end,), (-0.1,), "", "stop", tool_calls=(walk("right"),))

    mine = Renderer(tokenizer(), PROMPTS["react"])
    policy = ModelPolicy("student", Provider(), mine, Sampling())
    task = Task("tests/Corridor-v0", "train", {"at": 0, "goal": 3})
    (found,) = run(rollout(policy, Tools, [Request(task, 0)]))
    assert (found.end, found.env_steps) == ("success", 3)
    assert found.turns[0].tool_calls == (walk("right"),)
