"""A conversation as a trajectory without tokens.

Invariants: a turn's observation is what users and tools said since the answer before; an action's
result is known where something came after it, and the outcome belongs to the last one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from agentdistill import actions
from agentdistill.actions import THINK, THOUGHT, Parsed
from agentdistill.envs.base import TextEnv
from agentdistill.importing.lines import Line, Message
from agentdistill.records import Actor, Json, StepResult, Task, Trajectory, Turn

CHAT = "chat"
"""Environment of a conversation that had none."""

LOG = "log"
"""Who answered, where a log does not say."""


@dataclass(frozen=True, slots=True)
class How:
    """How conversations are read; see :func:`agentdistill.importing.read_log`."""

    env: TextEnv | None
    split: str
    grammar: str
    assume_success: bool

    def action(self, name: str, arguments: Mapping[str, Json]) -> str:
        """A tool call as an action."""
        if self.env is not None:
            return self.env.tool_action(name, arguments)
        return f"{name}({json.dumps(dict(arguments), ensure_ascii=False)})"


def trajectory(line: Line, messages: Sequence[Message], how: How) -> Trajectory:
    """The conversation of ``line``, whose answers may be told more fully by ``messages``."""
    facts = line.facts
    known = line.finished or how.assume_success
    success, score = _outcome(facts, how)
    turns = turns_of(messages, how, str(facts.get("policy", "")))
    if known and turns:
        turns[-1] = _ended(turns[-1], success, score)
    task = _task(facts, messages, how)
    provenance: dict[str, Json] = {
        "run": "import",
        "policy": turns[-1].actor.name if turns else "",
        "source": {"line": line.number},
        **{name: facts[name] for name in ("task_id", "plan") if name in facts},
    }
    system = [m.text for m in messages if m.role in ("system", "developer")]
    if system:
        provenance["instruction"] = "\n".join(system)
    if not line.finished:
        provenance["outcome"] = "assumed" if how.assume_success else "unknown"
    end = ("success" if success else "failure") if known else "horizon"
    goal = str(facts.get("goal", "")) or _opening(messages)
    group = line.prefixes[-1][:16]
    return Trajectory(
        task, group, 0, tuple(turns), (), end, success, score, provenance=provenance, goal=goal
    )


def _outcome(facts: Mapping[str, Json], how: How) -> tuple[bool, float]:
    """Success, and the score within [0, 1]; one of the two is enough."""
    given = facts.get("score", facts.get("reward"))
    success = facts.get("success")
    if given is None and success is None:
        success = how.assume_success
    score = float(bool(success)) if given is None else min(max(float(given), 0.0), 1.0)
    return (score >= 1 if success is None else bool(success)), score


def _task(facts: Mapping[str, Json], messages: Sequence[Message], how: How) -> Task:
    """What the line says of it, or its opening."""
    card = None if how.env is None else how.env.card
    env = card.id if card else str(facts.get("env", CHAT))
    split, given = str(facts.get("split", how.split)), facts.get("task")
    if given is None:
        return opening_task(messages, env, split)
    payload = given if isinstance(given, dict) else {"task": given}
    if isinstance(payload.get("payload"), dict):
        payload = payload["payload"]
    return Task(env, split, payload, card.data if card else "")


def opening_task(messages: Sequence[Message], env: str, split: str) -> Task:
    """The task that is known by its opening only."""
    return Task(env, split, {"opening": _opening(messages)})


def _opening(messages: Sequence[Message]) -> str:
    """What users said before the first answer."""
    said = []
    for message in messages:
        if message.role == "assistant":
            break
        said += [message.text] if message.role == "user" else []
    return "\n".join(said)


def turns_of(messages: Sequence[Message], how: How, policy: str) -> list[Turn]:
    """One turn per answer."""
    found: list[Turn] = []
    heard: list[Message] = []
    for message in messages:
        if message.role in ("user", "tool"):
            heard.append(message)
        elif message.role == "assistant":
            if found and heard:
                found[-1] = _answered(found[-1], heard)
            seen = "\n".join(one.text for one in heard)
            found.append(_turn(len(found), seen, message, how, policy))
            heard = []
    if found and heard:
        found[-1] = _answered(found[-1], heard)
    return found


def _turn(index: int, seen: str, message: Message, how: How, policy: str) -> Turn:
    parsed = _parsed(message, how)
    text = f"{THINK}{message.thought}{THOUGHT}{message.text}" if message.thought else message.text
    return Turn(
        index,
        seen,
        Actor(policy or message.model or LOG),
        text=text,
        reasoning=message.thought or parsed.reasoning,
        tool_calls=message.calls,
        actions=parsed.actions,
        verdict=parsed.verdict,
        stop="stop",
        usage=message.usage,
        cut=parsed.cut,
    )


def _parsed(message: Message, how: How) -> Parsed:
    """What an answer asks for: its tool calls, or what its text says."""
    read = actions.grammar(how.grammar)(message.text)
    if message.calls:
        # What a model says beside its calls is its thought.
        beside = message.thought or read.reasoning or message.text.strip()
        return actions.parse_calls(message.calls, how.action, beside)
    return read


def _answered(turn: Turn, heard: Sequence[Message]) -> Turn:
    """``turn`` with what its actions led to: each tool's own answer, or all that was heard."""
    whole = "\n".join(message.text for message in heard)
    by_id = {message.answers: message.text for message in heard if message.answers}
    ids = [str(call.get("id", "")) for call in turn.tool_calls]
    own = [by_id.get(each, whole) for each in ids] or [whole]
    results = [
        StepResult(own[min(number, len(own) - 1)], 0.0) for number in range(len(turn.actions))
    ]
    return replace(turn, results=tuple(results))


def _ended(turn: Turn, success: bool, score: float) -> Turn:
    """The last turn with the outcome on its last action; its reward is the score."""
    if not turn.actions:
        return turn
    before = turn.results or tuple(StepResult("", 0.0) for _ in turn.actions)
    last = replace(before[-1], reward=score, terminated=True, success=success, score=score)
    return replace(turn, results=(*before[:-1], last), reward=score)
