"""A cheap student with demonstrations, and a teacher for the steps on which it is not sure.

Invariants
----------
* At each step the student draws its samples; the rule decides whether the first of the largest
  class is executed or the teacher is asked, for that step only. Both go on from the same turns.
* The turn's actor is who answered; its usage is all that was drawn for it, and what was drawn and
  not executed is on record with its own. What the prompts said besides is on record, too.
* Nothing of the episode's own task is ever shown. Where nothing is found (an empty collection, k=0)
  the prompt is, character by character, the one without demonstrations.
* With ``execute`` samples are compared by what they lead to. The environment tries them and is then
  where it was (:meth:`~agentdistill.envs.base.TextEnv.attempt`); nothing of it enters the episode.

Sources: in-context distillation with cascades, arXiv 2512.02543; voting on what actions lead to:
self-consistent action generation, arXiv 2505.17612.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from agentdistill import actions, equivalence
from agentdistill.agreement import Decision, Rule, decide
from agentdistill.config import CascadeConfig
from agentdistill.demos import Demos, Match, block
from agentdistill.envs.base import Card
from agentdistill.errors import ConfigError
from agentdistill.policy import (
    TAG,
    Episode,
    ModelPolicy,
    Policy,
    Proposer,
    Response,
    ScriptedPolicy,
    answer,
    derive_seed,
    total,
)
from agentdistill.records import Alternative, StepResult, Usage, Verdict

QUESTION = (
    "Do not act yet. Say in a few plain sentences what has to happen, and in which order, to do "
    "this task."
)

BEFORE, AFTER = "Steps from tasks that were solved:", "Now to the task at hand."

Place = Literal["after", "before"]


@dataclass(frozen=True, slots=True)
class Shown:
    """Which demonstrations the student sees, and where.

    Attributes:
        demos: the collection; None for none.
        k: windows at most.
        window: steps to each side of the one that matched.
        place: ``after`` the history: found anew at each step, in the last message only, so that the
            rest of the prompt stays in the provider's cache. ``before`` it: found once, at the
            first step, and part of every prompt of the episode.
        grammar: in whose format they are written.
        teacher: whether the teacher sees them, too.
        plan: ask the student once what it means to do, shown the plans of similar tasks, and find
            demonstrations by its plan as well.
    """

    demos: Demos | None = None
    k: int = 6
    window: int = 2
    place: Place = "after"
    grammar: str = "plain"
    teacher: bool = False
    plan: bool = False

    def text(self, episode: Episode) -> str:
        """Demonstrations for what is seen now, "" where there are none."""
        text = block(self._found(episode), grammar=self.grammar)
        return f"{BEFORE}\n\n{text}\n\n{AFTER}" if text else ""

    def question(self, episode: Episode) -> str:
        """What asks for a plan."""
        plans = dict.fromkeys(match.plan for match in self._found(episode) if match.plan)
        similar = "".join(f"A plan that solved a similar task: {plan}\n\n" for plan in plans)
        goal = "" if episode.goal in episode.observation else f"The task: {episode.goal}\n"
        return f"{similar}{goal}{episode.observation}\n\n{QUESTION}"

    def _found(self, episode: Episode) -> list[Match]:
        if self.demos is None or not self.k:
            return []
        return self.demos.search(
            goal=episode.goal,
            plan=episode.plan,
            observation=episode.observation,
            task=episode.task,
            k=self.k,
            window=self.window,
        )


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A response, and what equal ones have in common; None where it cannot be read."""

    response: Response
    key: Hashable | None = None

    @property
    def confidence(self) -> float | None:
        sample = self.response.sample
        return sample.confidence if sample else None


class CascadePolicy(Policy):
    """See the module docstring."""

    def __init__(
        self,
        name: str,
        student: Proposer,
        teacher: Policy | None = None,
        rule: Rule = Rule(),  # noqa: B008  (frozen)
        shown: Shown = Shown(),
        *,
        equivalence: str = "auto",
        execute: bool = False,
    ) -> None:
        """Nothing is asked.

        Args:
            name: of the policy; trajectories call its actors by theirs.
            student: draws samples.
            teacher: answers where they do not agree; None: the largest class of samples does.
            rule: when they agree enough.
            shown: the demonstrations.
            equivalence: ``auto`` asks the environment what an action means
                (:meth:`~agentdistill.envs.base.TextEnv.meaning`); else one of
                :data:`~agentdistill.equivalence.KINDS`. Tool calls are always compared by their
                names and arguments.
            execute: compare what the samples lead to instead.

        Raises:
            ConfigError: these do not go together.
        """
        self.name, self.student, self.teacher, self.rule = name, student, teacher, rule
        self.shown, self.equivalence, self.execute = shown, equivalence, execute
        self._check()
        asked = (student, teacher) if teacher else (student,)
        self.wants_admissible = any(policy.wants_admissible for policy in asked)
        self._begun: set[str] = set()
        self._planned: set[str] = set()

    def _check(self) -> None:
        def refuse(key: str, value: object, remedy: str) -> ConfigError:
            return ConfigError(remedy, key=f"policies.{self.name}.{key}", value=value)

        if self.equivalence not in ("auto", *equivalence.KINDS):
            known = ", ".join(("auto", *equivalence.KINDS))
            raise refuse("equivalence", self.equivalence, f"one of {known}")
        if self.teacher is None and self.rule.name in ("always", "random"):
            raise refuse("rule", self.rule.name, "needs a teacher to be asked; name one")
        if self.teacher is not None and self.teacher.name == self.student.name:
            raise refuse("teacher", self.teacher.name, "is the student itself; name another one")
        if self.rule.name == "confidence" and not isinstance(self.student, ModelPolicy):
            remedy = "this student answers in text, without log-probabilities; use unanimous"
            raise refuse("rule", "confidence", remedy)

    @property
    def fingerprint(self) -> str | None:
        """The student's, where the teacher's tokens are the same."""
        if self.teacher is None or self.teacher.fingerprint == self.student.fingerprint:
            return self.student.fingerprint
        return None

    async def act(self, episode: Episode) -> Response:
        """The student's answer, or the teacher's."""
        skip = self.teacher is not None and self.rule.skips(self._seed(episode))
        hint, aside = "", None
        if self.shown.teacher or not skip:
            aside = await self._plan(episode)
            hint = self._hint(episode)
        decision = await decide(
            self.rule,
            partial(self._draw, episode, hint),
            None if self.teacher is None else partial(self._ask, episode, hint),
            lambda candidate: candidate.key,
            confidence=lambda candidate: candidate.confidence,
            seed=self._seed(episode),
        )
        return self._recorded(decision, hint, aside)

    def finish(self, episode: Episode) -> None:
        """Forget the episode, as the actors do."""
        self._begun.discard(episode.id)
        self._planned.discard(episode.id)
        self.student.finish(episode)
        if self.teacher is not None:
            self.teacher.finish(episode)

    def _seed(self, episode: Episode) -> int:
        return derive_seed(episode.turn_seed, "cascade")

    async def _plan(self, episode: Episode) -> Alternative | None:
        """Ask once for the episode's plan; what was said, and what it cost."""
        if not self.shown.plan or episode.id in self._planned:
            return None
        self._planned.add(episode.id)
        text, spent = await self.student.say(self.shown.question(episode), episode)
        episode.plan = TAG.sub("", text).strip()
        return Alternative(text, (), spent, self.student.name)

    def _hint(self, episode: Episode) -> str:
        """What this step's prompts say besides; writes the episode's note at its first step."""
        if self.shown.place == "after":
            return self.shown.text(episode)
        if episode.id not in self._begun:
            self._begun.add(episode.id)
            text = self.shown.text(episode)
            if text and episode.note:
                raise ConfigError(
                    "this episode has a note of its own in front; use place: after",
                    key=f"policies.{self.name}.place",
                    value=self.shown.place,
                )
            episode.note = text or episode.note
        return ""

    # -- the student ------------------------------------------------------------------------------

    async def _draw(self, episode: Episode, hint: str, n: int) -> list[_Candidate]:
        responses = await self.student.propose(episode, n, hint)
        if n == 1:  # there is nothing to compare; whether it can be read is known
            return [_Candidate(one, _said(one)) for one in responses]
        if self.execute:
            keys: Sequence[Hashable | None] = await self._outcomes(episode, responses)
        else:
            keys = [self._meaning(episode, one) for one in responses]
        return [_Candidate(*pair) for pair in zip(responses, keys, strict=True)]

    def _meaning(self, episode: Episode, response: Response) -> Hashable | None:
        said = _said(response)
        if said is None or response.tool_calls:
            return said
        means = equivalence.KINDS.get(self.equivalence) or episode.env.meaning
        return answer(lambda: tuple(map(means, response.parsed.actions)))

    async def _outcomes(
        self, episode: Episode, responses: Sequence[Response]
    ) -> list[Hashable | None]:
        """What each response leads to; None for one that is unreadable or not valid."""
        env = episode.env
        known: dict[tuple[str, ...], Hashable | None] = {}
        found: list[Hashable | None] = []
        for response in responses:
            parsed, calls = response.parsed, response.tool_calls
            if calls:
                read = partial(actions.parse_calls, calls, env.tool_action)
                parsed = await episode.ask(read)
            if parsed.verdict is not Verdict.OK:
                found.append(None)
                continue
            if parsed.actions not in known:
                results = await episode.ask(partial(env.attempt, parsed.actions))
                known[parsed.actions] = _outcome(results)
            found.append(known[parsed.actions])
        return found

    # -- the teacher ------------------------------------------------------------------------------

    async def _ask(self, episode: Episode, hint: str) -> _Candidate:
        """The teacher's answer; it goes on from the same turns, and reads what it is to read."""
        teacher, informed = self.teacher, self.shown.teacher
        assert teacher is not None
        seen = episode if informed else replace(episode, note="")
        if isinstance(teacher, ScriptedPolicy):
            response = await episode.ask(partial(teacher.respond, seen))
        elif informed and isinstance(teacher, Proposer):
            (response,) = await teacher.propose(seen, 1, hint)
        else:
            response = await teacher.act(seen)
        if teacher.fingerprint != self.student.fingerprint and response.sample is not None:
            # Tokens of two vocabularies must not meet in one stream.
            stop = response.sample.stop
            response = replace(
                response, sample=None, kinds=(), prompt=((), ()), forced=(), stop=stop
            )
        return _Candidate(replace(response, informed=informed))

    # -- the record -------------------------------------------------------------------------------

    def _recorded(
        self, decision: Decision[_Candidate], hint: str, aside: Alternative | None
    ) -> Response:
        chosen, drawn = decision.chosen.response, [one.response for one in decision.drawn]
        spent = [*(one.usage for one in drawn), aside.usage if aside else Usage()]
        if decision.by_teacher:
            spent.append(chosen.usage)
        others = tuple(
            Alternative(one.text, one.parsed.actions, one.usage, self.student.name)
            for one in (candidate.response for candidate in decision.others)
        )
        others = others if aside is None else (*others, aside)
        return replace(chosen, alternatives=others, usage=total(*spent), hint=hint)


def _said(response: Response) -> Hashable | None:
    """What a response asks for, as it says it: its calls, else its actions."""
    if response.tool_calls:
        calls = tuple(map(equivalence.call, response.tool_calls))
        return None if None in calls else ("calls", *calls)
    return response.parsed.actions if response.parsed.verdict is Verdict.OK else None


def _outcome(results: Sequence[StepResult]) -> Hashable | None:
    """Observations, rewards and ends; None where an action was not valid."""
    if not all(result.valid for result in results):
        return None
    return tuple((r.observation, r.reward, r.terminated, r.truncated) for r in results)


def possible(name: str, said: CascadeConfig, card: Card) -> None:
    """Refuse a cascade that the environment with this card cannot have.

    Raises:
        ConfigError: samples are to be tried out, and it cannot restore its states.
    """
    if said.execute and not card.restores:
        remedy = f"{card.id} cannot restore its states, so nothing can be tried in it"
        raise ConfigError(remedy, key=f"policies.{name}.execute", value=True)


def of_config(
    name: str,
    said: CascadeConfig,
    student: Policy,
    teacher: Policy | None,
    demos: Demos | None,
    card: Card,
    grammar: str,
) -> CascadePolicy:
    """What a configuration says, of actors that are there.

    Args:
        name: of the policy.
        said: its entry.
        student: the actor of that name.
        teacher: the same, None for none.
        demos: what is shown, None for nothing.
        card: of the environment.
        grammar: of the prompt.

    Raises:
        ConfigError: the student is no model, or the environment cannot restore its states.
    """
    possible(name, said, card)
    if not isinstance(student, Proposer):
        raise ConfigError("name a model", key=f"policies.{name}.student", value=said.student)
    teacher_reads, planned = said.teacher_demos, said.plan
    shown = Shown(demos, said.k, said.window, said.place, grammar, teacher_reads, planned)
    rule, same = said.decides(), said.equivalence
    return CascadePolicy(
        name, student, teacher, rule, shown, equivalence=same, execute=said.execute
    )
