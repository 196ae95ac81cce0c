"""Student and teacher as one engine that takes messages: the cascade in front of any agent.

Invariants
----------
* Nothing is kept between calls: what the cascade knows of a conversation is its messages.
* Demonstrations are of other tasks. The task of a conversation is what users said before the first
  answer. A recording with the same opening is never shown for it, and neither is an episode of an
  environment whose first observation stands in that opening, line by line, with its goal.
* The drafts are one request of ``n`` samples. They are drawn as the cascade is told, not as the
  caller says: greedy drafts would always agree.
* The teacher reads the conversation as it came; demonstrations only where that is asked for.
* An answer's usage is everything that was spent on it, drafts that nobody sees included.

Source: in-context distillation, arXiv 2512.02543.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from typing import Any

from agentdistill import actions, equivalence
from agentdistill.actions import Grammar
from agentdistill.agreement import Decision, Rule, decide
from agentdistill.cascade import AFTER, BEFORE, Place
from agentdistill.demos import Demos, block
from agentdistill.engines.base import Capabilities, Engine, Message, Sample, Sampling
from agentdistill.errors import ConfigError, EngineError
from agentdistill.importing import chat_task
from agentdistill.policy import derive_seed, total
from agentdistill.records import Json, Verdict

_AS_TEXT = "What was done is written as text; answer in the way that you were told to."


@dataclass(frozen=True, slots=True)
class Decided(Sample):
    """A sample, and how it came about; ``told`` is for the client."""

    told: Mapping[str, Json] = field(default_factory=dict)


class Shown:
    """Which demonstrations are shown, and where."""

    def __init__(
        self,
        demos: Demos,
        *,
        k: int = 6,
        window: int = 2,
        place: Place = "after",
        grammar: str | None = None,
    ) -> None:
        """``demos`` is the collection.

        Args:
            demos: see above.
            k: at most so many windows.
            window: steps to each side of the one that matched.
            place: ``after`` the history, chosen for what was heard last; or ``before`` it, chosen
                for what was heard first, and so the same in every call of a conversation, as caches
                of prompts want it.
            grammar: in whose format they are written where the agent has no tools.
        """
        self.demos, self.k, self.window, self.place = demos, k, window, place
        self.grammar = grammar
        self._openings = list(demos.openings())
        self._own = lru_cache(maxsize=1024)(self._of_the_same_task)

    def add(self, messages: Sequence[Message], *, tools: bool = False) -> tuple[list[Message], int]:
        """``messages`` with what was found for them, and how many windows that are."""
        seen, goal = heard(messages), opening(messages)
        if not seen or not self.k:
            return list(messages), 0
        own = self._own(goal)
        found = self.demos.search(
            goal=goal,
            observation=seen[0] if self.place == "before" else seen[-1],
            task=_task(messages),
            k=self.k + len(own),
            window=self.window,
        )
        found = [match for match in found if match.trajectory not in own][: self.k]
        if not found:
            return list(messages), 0
        text = block(found, grammar=None if tools else self.grammar)
        told = (BEFORE, text, _AS_TEXT, AFTER) if tools else (BEFORE, text, AFTER)
        return _with(messages, "\n\n".join(told), self.place), len(found)

    def _of_the_same_task(self, goal: str) -> frozenset[str]:
        """Episodes that began with what this conversation began with, line by line."""
        ours = f"\n{goal}\n"
        return frozenset(
            identity
            for identity, theirs, first in self._openings
            if first.strip() and f"\n{first}\n" in ours and theirs in goal
        )


class MessageCascade(Engine):
    """A student that is asked first, and a teacher for what it is not sure of."""

    def __init__(
        self,
        name: str,
        student: Engine,
        teacher: Engine | None,
        rule: Rule,
        *,
        shown: Shown | None = None,
        drafts: Sampling | None = None,
        grammar: Grammar = actions.parse_plain,
        code: bool = False,
        teacher_demos: bool = False,
    ) -> None:
        """``name`` is what answers say of who gave them.

        Args:
            name: see above.
            student: answers messages; draws the drafts.
            teacher: answers messages; None leaves everything to the student.
            rule: when the student's answer stands.
            shown: demonstrations for the student; None for none.
            drafts: how they are drawn; the caller's ``max_tokens`` holds. None: as the caller says.
            grammar: what of a text is compared.
            code: texts are Python, and equal if their syntax trees are.
            teacher_demos: show them to the teacher, too.

        Raises:
            ConfigError: student or teacher takes no messages.
        """
        for role, engine in (("student", student), ("teacher", teacher)):
            if engine is not None and not engine.capabilities.text:
                raise ConfigError("this engine takes no messages", key=role, value=engine.name)
        self.name, self.student, self.teacher, self.rule = name, student, teacher, rule
        self.shown, self.teacher_demos = shown, teacher_demos
        self._drafts, self._grammar, self._code = drafts, grammar, code

    @property
    def capabilities(self) -> Capabilities:
        """Text only."""
        engines = [self.student, *([self.teacher] if self.teacher else [])]
        notes = tuple(
            f"{each.name}: {note}" for each in engines for note in each.capabilities.notes
        )
        return Capabilities(text=True, notes=notes)

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int = 0, session: str | None = None
    ) -> Sample:
        """Not possible: student and teacher may have different tokens."""
        raise EngineError(f"{self.name} is a cascade: it takes messages, and no token ids")

    async def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        n: int = 1,
        tools: Sequence[Mapping[str, Any]] = (),
        seed: int = 0,
    ) -> list[Sample]:
        """See :meth:`Engine.chat`; each of ``n`` answers is a decision of its own.

        Raises:
            EngineError: student or teacher failed.
            BudgetError: there is no room for one of the calls.
        """
        if n < 1:
            raise ValueError(f"n={n}: at least 1")
        informed, windows = self._informed(messages, bool(tools))
        told = informed if self.teacher_demos else messages
        one = partial(self._decided, informed, told, sampling, tools, windows)
        seeds = [seed if number == 0 else derive_seed(seed, number) for number in range(n)]
        tasks = [asyncio.ensure_future(one(each)) for each in seeds]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    def _informed(self, messages: Sequence[Message], tools: bool) -> tuple[Sequence[Message], int]:
        return self.shown.add(messages, tools=tools) if self.shown else (messages, 0)

    async def _decided(
        self,
        informed: Sequence[Message],
        told: Sequence[Message],
        sampling: Sampling,
        tools: Sequence[Mapping[str, Any]],
        windows: int,
        seed: int,
    ) -> Decided:
        """One answer."""
        drafts = sampling
        if self._drafts is not None:
            drafts = replace(self._drafts, max_tokens=sampling.max_tokens)
        teacher = self.teacher

        async def draw(n: int) -> list[Sample]:
            return await self.student.chat(informed, drafts, n=n, tools=tools, seed=seed)

        async def ask() -> Sample:
            assert teacher is not None
            return (await teacher.chat(told, sampling, tools=tools, seed=seed))[0]

        decision = await decide(
            self.rule,
            draw,
            ask if teacher is not None else None,
            self.same,
            confidence=lambda sample: sample.confidence,
            seed=seed,
        )
        return self._told(decision, windows)

    def same(self, sample: Sample) -> Hashable | None:
        """What equal answers have in common; None for one that says nothing that can be read."""
        if sample.tool_calls:
            calls = tuple(equivalence.call(call) for call in sample.tool_calls)
            return None if None in calls else ("calls", *calls)
        parsed = self._grammar(sample.text)
        done = parsed.actions if parsed.verdict is Verdict.OK else ()
        if not done and not sample.text.strip():
            return None
        said = done or (sample.text.strip(),)
        return (
            ("text", *(equivalence.code(each) for each in said)) if self._code else ("text", *said)
        )

    def _told(self, decision: Decision[Sample], windows: int) -> Decided:
        chosen, drawn = decision.chosen, [sample.usage for sample in decision.drawn]
        by = "teacher" if decision.by_teacher else "student"
        spent = {"student": drawn} if drawn else {}
        spent |= {"teacher": [chosen.usage]} if decision.by_teacher else {}
        engine = self.teacher if decision.by_teacher else self.student
        told: dict[str, Json] = {
            "by": by,
            "model": engine.name if engine else "",
            "agreement": round(decision.share, 4),
            "drafts": len(drawn),
            "demonstrations": windows,
            "usage": {role: asdict(total(*parts)) for role, parts in spent.items()},
        }
        if decision.confidence is not None:
            told["confidence"] = round(decision.confidence, 4)
        values = {each.name: getattr(chosen, each.name) for each in fields(Sample)}
        whole = [usage for parts in spent.values() for usage in parts]
        return Decided(**{**values, "usage": total(*whole)}, told=told)

    async def close(self) -> None:
        """Close both."""
        await self.student.close()
        if self.teacher is not None:
            await self.teacher.close()


# -- what a conversation is ------------------------------------------------------------------------


def opening(messages: Sequence[Message]) -> str:
    """What users said before the first answer: the task in words."""
    said = []
    for message in messages:
        if message.role == "assistant":
            break
        said += [message.content] if message.role == "user" else []
    return "\n".join(said)


def heard(messages: Sequence[Message]) -> list[str]:
    """What users and tools said before each answer and, last, since the last one.

    As a recorded conversation has it; without anything said since, the last is left out.
    """
    found, now = list[str](), list[str]()
    for message in messages:
        if message.role in ("user", "tool"):
            now.append(message.content)
        elif message.role == "assistant":
            found.append("\n".join(now))
            now = []
    return [*found, "\n".join(now)] if now else found


def _task(messages: Sequence[Message]) -> str:
    """Key of the task that a recording of this conversation has."""
    said = [{"role": message.role, "content": message.content} for message in messages]
    return chat_task(said).key


def _with(messages: Sequence[Message], text: str, place: Place) -> list[Message]:
    """``messages`` with ``text`` at the head of the last user message, or of the first one.

    After what tools said it is a message of its own; beside another one of the user it is not, as
    some templates refuse that.
    """
    users = [number for number, message in enumerate(messages) if message.role == "user"]
    at = users[0] if place == "before" and users else len(messages) - 1
    if messages[at].role != "user":
        return [*messages, Message("user", text)]
    changed = replace(messages[at], content=f"{text}\n\n{messages[at].content}")
    return [*messages[:at], changed, *messages[at + 1 :]]
