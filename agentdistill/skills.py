"""Skills: what an episode taught, as one text that only a teacher reads (Skill-SD).

Invariants
----------
* A skill belongs to one task and comes from one whole episode; nothing in it is about a turn of the
  episode that it will be read beside.
* A skill written in iteration n is seen from iteration n + 1 on.
* An analyser reads what an agent could know: observations, its own actions, scores, the end. It
  never looks at ``StepResult.optimal``, asks no environment, and passes over episodes that began
  with somebody else's actions.
* Choices are deterministic; ties go to the skill whose episode scored higher, then to the older.

Source: Skill-SD (arXiv 2604.10674). The paper gives the three parts of an analysis and the UCB1
rule; the words, the grounded analyser, the rule for ties and the capacity are ours.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import NamedTuple, Protocol

from agentdistill.engines.base import Engine, Message, Sampling
from agentdistill.errors import ConfigError, EngineError
from agentdistill.policy import derive_seed
from agentdistill.records import Json, StepResult, Trajectory, digest


def ucb(counts: Sequence[int], means: Sequence[float], c: float = math.sqrt(2)) -> list[float]:
    """UCB1: mean + c sqrt(ln N / n) of each arm, with N the sum of ``counts``.

    An arm that was never tried (n = 0) scores infinity. Source: arXiv 2604.10674.
    """
    total = sum(counts)
    pairs = zip(counts, means, strict=True)
    return [r + c * math.sqrt(math.log(total) / n) if n else math.inf for n, r in pairs]


@dataclass(frozen=True, slots=True)
class Skill:
    """One text and what became of using it.

    Attributes:
        id: identity of the text.
        text: what a teacher reads.
        iteration: when it was written; it is seen later than that.
        score: of the episode it came from, in [0, 1].
        selected: how often it was selected.
        rated: how many of these selections have a reward.
        mean: mean reward of the iterations in which it was used.
    """

    id: str
    text: str
    iteration: int
    score: float = 0.0
    selected: int = 0
    rated: int = 0
    mean: float = 0.0

    @property
    def worth(self) -> float:
        """What is known of it: its mean reward, or its episode's score before it has one."""
        return self.mean if self.rated else self.score


class SkillBank:
    """Skills by task; its state is all of them with their counts."""

    def __init__(self, exploration: float = math.sqrt(2), capacity: int | None = None) -> None:
        """Start empty; ``exploration`` is c of :func:`ucb`.

        Of more than ``capacity`` skills of a task (None: of any number) the one worth least goes.
        """
        if capacity is not None and capacity < 1:
            raise ConfigError("must be at least 1", key="capacity", value=capacity)
        self.exploration, self._capacity = exploration, capacity
        self._skills: dict[str, dict[str, Skill]] = {}

    def __len__(self) -> int:
        """Skills of all tasks."""
        return sum(map(len, self._skills.values()))

    def skills(self, task_key: str) -> tuple[Skill, ...]:
        """All skills of a task, the oldest first."""
        return tuple(self._skills.get(task_key, {}).values())

    def add(self, task_key: str, text: str, iteration: int, score: float = 0.0) -> Skill:
        """Keep a skill; one with the same text is the same, and keeps age and counts.

        ``iteration`` is the current one, ``score`` that of the episode it comes from.
        """
        kept = self._skills.setdefault(task_key, {})
        new = Skill(digest(text), text, iteration, score)
        known = kept.get(new.id, new)
        kept[new.id] = found = replace(known, score=max(known.score, score))
        if self._capacity is not None and len(kept) > self._capacity:
            del kept[min(kept.values(), key=lambda skill: skill.worth).id]
        return found

    def select(self, task_key: str, iteration: int) -> Skill | None:
        """The skill of this task to be used in ``iteration``, counted; None where none is seen."""
        seen = [skill for skill in self.skills(task_key) if skill.iteration < iteration]
        if not seen:
            return None
        scores = ucb([s.selected for s in seen], [s.mean for s in seen], self.exploration)
        _, chosen = max(zip(scores, seen, strict=True), key=lambda pair: (pair[0], pair[1].score))
        counted = replace(chosen, selected=chosen.selected + 1)
        self._skills[task_key][chosen.id] = counted
        return counted

    def reward(self, task_key: str, skill: str, rewards: Iterable[float]) -> None:
        """Take the mean of an iteration's ``rewards`` into the running mean of a skill, by its id.

        Nothing changes for a skill that had to leave meanwhile, or without any reward.
        """
        known, given = self._skills.get(task_key, {}).get(skill), list(rewards)
        if known is None or not given:
            return
        rated = known.rated + 1
        mean = known.mean + (fmean(given) - known.mean) / rated
        self._skills[task_key][skill] = replace(known, rated=rated, mean=mean)

    def state_dict(self) -> dict[str, Json]:
        """Everything as JSON."""
        return {"skills": {key: [asdict(s) for s in self.skills(key)] for key in self._skills}}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Become the bank that ``state`` was taken from."""
        self._skills = {
            key: {skill["id"]: Skill(**skill) for skill in skills}
            for key, skills in state["skills"].items()
        }


class Analysis(NamedTuple):
    """What an episode taught, in the three parts of the paper; "" for an empty one."""

    success_analysis: str = ""
    mistake_analysis: str = ""
    golden_workflow: str = ""


def wording(analysis: Analysis) -> str:
    """The text that a teacher reads: each part that is not empty under its heading."""
    headings = ("What helped:", "What did not help:", "Do this:")
    parts = zip(headings, map(str.strip, analysis), strict=True)
    return "\n".join(f"{heading}\n{text}" for heading, text in parts if text)


class Analyser(Protocol):
    """Turns a finished episode into the text of a skill."""

    async def write(self, trajectory: Trajectory) -> str | None:
        """The text, or None where the episode teaches nothing."""


def teaches(trajectory: Trajectory) -> bool:
    """Whether a skill may come from it: the agent alone acted from the reset on; nothing broke."""
    whole = not (trajectory.end.startswith("fault") or trajectory.start.actions)
    return whole and any(turn.results for turn in trajectory.turns)


State = tuple[str, float]
"""Observation and score: what an agent can tell states apart by."""


class Move(NamedTuple):
    """One executed action."""

    before: State
    action: str
    after: State
    result: StepResult


def moves(trajectory: Trajectory) -> list[Move]:
    """What was executed, in order; an invalid action leaves the state as it was."""
    found: list[Move] = []
    now = (trajectory.turns[0].observation, 0.0) if trajectory.turns else ("", 0.0)
    for turn in trajectory.turns:
        for action, result in zip(turn.actions, turn.results, strict=False):
            after = (result.observation, result.score) if result.valid else now
            found.append(Move(now, action.strip(), after, result))
            now = after
    return found


def ways(steps: Sequence[Move]) -> dict[State, tuple[str, ...]]:
    """The shortest list of executed actions from the first state to every state seen.

    States that look alike count as one, so that detours and what was undone again drop out. Where
    an environment shows different states alike, a way may lack a step.
    """
    leaving: dict[State, list[Move]] = {}
    for step in steps:
        leaving.setdefault(step.before, []).append(step)
    found: dict[State, tuple[str, ...]] = {steps[0].before: ()}
    queue = deque(found)
    while queue:
        state = queue.popleft()
        for step in leaving.get(state, ()):
            if step.after not in found:
                found[step.after] = (*found[state], step.action)
                queue.append(step.after)
    return found


class Grounded:
    """An analyser without a model: what moved the score, what did not, and the shortest way.

    Helped: what raised the score. Did not help: what was invalid, changed nothing, lowered the
    score or ended the episode in failure, with the action that had led there. The workflow is the
    shortest way to the best score of the episode.
    """

    def __init__(self, lines: int = 8) -> None:
        """``lines``: of both analyses together, shared by the score; 0 writes workflows only."""
        if lines < 0:
            raise ConfigError("must be at least 0", key="lines", value=lines)
        self._lines = lines

    async def write(self, trajectory: Trajectory) -> str | None:
        """The text, or None where the episode teaches nothing."""
        return wording(self.analyse(trajectory)) or None

    def analyse(self, trajectory: Trajectory) -> Analysis:
        """The three parts; a share ``trajectory.score`` of the lines is for what helped."""
        if not teaches(trajectory):
            return Analysis()
        steps = moves(trajectory)
        known = ways(steps)
        best = max(steps, key=lambda step: (step.result.success, step.after[1]))
        reached = best.result.success or best.after[1] > 0
        share = math.floor(self._lines * trajectory.score + 0.5)
        return Analysis(
            _lines(_helped(steps), share),
            _lines(_failed(steps, known, trajectory.end), self._lines - share),
            "\n".join(known[best.after]) if reached else "",
        )


def _lines(found: Iterable[str], most: int) -> str:
    """The first distinct ``most`` of them."""
    return "\n".join(list(dict.fromkeys(found))[:most])


def _helped(steps: Sequence[Move]) -> Iterator[str]:
    for step in steps:
        if step.after[1] > step.before[1]:
            yield f"{_named(step.action)}: {step.before[1]:.0%} to {step.after[1]:.0%}"


def _failed(
    steps: Sequence[Move], known: Mapping[State, tuple[str, ...]], end: str
) -> Iterator[str]:
    if end == "step_limit":
        yield f"{len(steps)} steps were too many"
    for step in steps:
        why = _why(step)
        if why:
            way = known[step.before]
            where = f"after {_named(way[-1])}" if way else "at the start"
            yield f"{_named(step.action)} {where}: {why}"


def _why(step: Move) -> str:
    """What was wrong with a step, "" for nothing."""
    if not step.result.valid:
        return "not possible"
    if step.result.terminated and not step.result.success:
        return "the end without success"
    if step.after[1] < step.before[1]:
        return f"back from {step.before[1]:.0%} to {step.after[1]:.0%}"
    return "no change" if step.after == step.before else ""


def _named(action: str, most: int = 80) -> str:
    """An action inside a sentence: one line, not endless."""
    line = " ".join(action.split()) or "no action"
    return line if len(line) <= most else f"{line[: most - 1]}…"


QUESTION = """\
Below is one finished episode of an agent. Write down what the next attempt at it should know.
Task: {goal}

{episode}

It ended with: {end}. Share of the conditions met: {score:.0%}.

Answer with one JSON object and nothing else. It has three keys, each with a text:
"success_analysis": what helped, and why;
"mistake_analysis": what cost steps or lost what was gained, and what to do in its place;
"golden_workflow": the shortest list of actions, one a line, that reaches what this episode reached.
Of the two analyses, about {score:.0%} of the words are for what helped and the rest for mistakes.
Name the facts about this task that the episode revealed, such as places and orders, and claim
nothing that it does not show."""

AGAIN = "\n\nAn earlier attempt failed: {error}. Give the JSON object alone."


def question(trajectory: Trajectory, most: int = 2000) -> str:
    """What a model is asked: the episode in words, observations cut after ``most`` characters."""
    told = []
    for number, step in enumerate(moves(trajectory), 1):
        seen = step.before[0]
        seen = seen if len(seen) <= most else f"{seen[:most]}…"
        became = f"{step.after[1]:.0%}" if step.result.valid else "not possible"
        told.append(f"{number}. Saw:\n{seen}\nDid: {step.action or 'no action'} ({became})")
    return QUESTION.format(
        goal=trajectory.goal or "as the observations say",
        episode="\n".join(told),
        end=trajectory.end.replace("_", " "),
        score=trajectory.score,
    )


def read(answer: str) -> Analysis:
    """The analysis in a model's answer: the last JSON object in it that is one.

    Text around it, fences, other keys, capitals in keys and lists in place of texts are let pass.

    Raises:
        ValueError: there is none, or nothing but garbage; and why.
    """
    decoder, place = json.JSONDecoder(strict=False), answer.find("{")
    problem, found = "there is no JSON object", None
    while place >= 0:
        end = place + 1
        try:
            value, end = decoder.raw_decode(answer, place)
            found = _analysis(value)
        except (ValueError, RecursionError) as error:
            problem = str(error)
        place = answer.find("{", end)
    if found is None:
        raise ValueError(problem)
    return found


def _analysis(value: Mapping[str, Json]) -> Analysis:
    named = {key.strip().lower().replace(" ", "_"): text for key, text in value.items()}
    missing = [part for part in Analysis._fields if part not in named]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    found = Analysis(*(_flat(named[part]) for part in Analysis._fields))
    if not any(found):
        raise ValueError("all of its texts are empty")
    return found


def _flat(value: Json) -> str:
    """A text, or a list of texts as lines."""
    if isinstance(value, list):
        return "\n".join(filter(None, map(_flat, value)))
    return "" if value is None else str(value).strip()


class ChatAnalyser:
    """Asks a model, once more where it fails or its answer cannot be read.

    Attributes:
        asked: questions that were put.
        failed: episodes without a skill because of it.
        problem: what was wrong the last time, "" for nothing yet.
    """

    def __init__(
        self, engine: Engine, instruction: str = "", sampling: Sampling | None = None
    ) -> None:
        """``engine`` takes messages; ``instruction`` is the environment's."""
        self._engine = engine
        self._system = [Message("system", instruction)] if instruction else []
        self._sampling = sampling or Sampling(temperature=0.0, max_tokens=1024)
        self.asked = self.failed = 0
        self.problem = ""

    async def write(self, trajectory: Trajectory) -> str | None:
        """The text, or None where the episode teaches nothing or the model cannot say it."""
        if not teaches(trajectory):
            return None
        message = question(trajectory)
        for attempt in range(2):
            self.asked += 1
            asked = [*self._system, Message("user", message)]
            seed = derive_seed(trajectory.id, "skill", attempt)
            try:
                (sample,) = await self._engine.chat(asked, self._sampling, seed=seed)
                return wording(read(sample.text))
            except (ValueError, EngineError) as error:
                self.problem = str(error)
                message = question(trajectory) + AGAIN.format(error=error)
        self.failed += 1
        return None
