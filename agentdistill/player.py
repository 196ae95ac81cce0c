"""Plays one episode: policy and environment in, one trajectory out.

Invariants
----------
* A bad rollout is data: faults of environments and engines, time-outs and limits end the episode
  with their kind on record. Programming errors still propagate.
* An episode's outcome depends on its request (task, start, seed) and the policy's weights only.
* How an environment runs is what its card asks for (:data:`~agentdistill.envs.base.ISOLATIONS`):
  ``inline`` in the event loop, ``thread`` in a worker thread so that a slow step stalls nobody.
* What the actor was shown is on record: whoever reads the turns with their hints (and
  ``provenance["note"]``, where it was shown a note) can make its prompts again.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from agentdistill import actions
from agentdistill.actions import Parsed
from agentdistill.config import LimitsConfig
from agentdistill.envs.base import TextEnv
from agentdistill.errors import ConfigError, EngineError, EnvError
from agentdistill.policy import Episode, Policy, Response, ScriptedPolicy
from agentdistill.records import (
    Actor,
    Author,
    Fault,
    Span,
    Start,
    StepResult,
    StreamBuilder,
    Task,
    Trajectory,
    Turn,
    Verdict,
)
from agentdistill.render import Reply

T = TypeVar("T")

_NUMBERS = itertools.count()
"""Of the episodes of this process: equal requests that run side by side must not share a name."""

NO_LIMITS = LimitsConfig()


@dataclass(frozen=True, slots=True)
class Request:
    """One episode to be played.

    Attributes:
        task: what is to be done.
        seed: of the episode.
        group: id of the group it belongs to.
        sample: its number within the group.
        start: actions to be replayed first.
        expected: observations the replay must show (after each action); None skips the check.
        horizon: turns after the hand-over; None leaves it to the limits.
        counter: the curriculum's n.
        provenance: copied into the trajectory.
        note: what the actor reads besides (privileged text); "" for nothing.
    """

    task: Task
    seed: int
    group: str = ""
    sample: int = 0
    start: Start = Start()
    expected: tuple[str, ...] | None = None
    horizon: int | None = None
    counter: int = 0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


class _Stop(Exception):
    """Ends an episode from inside, with the name of the end and the fault that it was, if any."""

    def __init__(self, end: str, *faults: Fault) -> None:
        self.end, self.faults = end, faults


class Player:
    """Plays one episode; :func:`~agentdistill.rollout.rollout` plays many."""

    def __init__(
        self,
        policy: Policy,
        env: TextEnv,
        request: Request,
        *,
        max_turns: int | None = None,
        limits: LimitsConfig = NO_LIMITS,
        grammar: str = "plain",
        admissible: bool = False,
        threads: Executor | None = None,
    ) -> None:
        """See ``rollout``; ``threads`` run the calls of environments that are not inline."""
        self._policy, self._env, self._request, self._threads = policy, env, request, threads
        self._max_turns, self._limits, self._grammar = max_turns, limits, grammar
        self._lists = admissible or policy.wants_admissible
        self._builder = StreamBuilder()
        self._began = time.monotonic()
        self._steps = self._tokens = 0
        self._episode: Episode | None = None
        self._last = StepResult("", 0.0)

    async def play(self) -> Trajectory:
        """Play to the end."""
        try:
            await self._begin()
            await self._replay()
            while True:
                await self._turn()
        except _Stop as stop:
            end, faults = stop.end, stop.faults
        finally:
            if self._episode is not None:
                self._policy.finish(self._episode)
        return self._record(end, faults)

    @property
    def _turns(self) -> int:
        return len(self._episode.turns) if self._episode else 0

    async def _begin(self) -> None:
        request = self._request
        task = request.task
        observation, goal = await self._env_call(self._reset)
        identity = f"{request.group}/{request.sample}/{task.key}/{next(_NUMBERS)}"
        self._episode = Episode(
            identity,
            task,
            self._env,
            observation,
            request.seed,
            goal,
            note=request.note,
            ask=self._env_call,
        )

    def _reset(self) -> tuple[str, str]:
        observation, _ = self._env.reset(options={"task": self._request.task})
        return observation, self._env.goal

    def _choices(self) -> tuple[str, ...]:
        return tuple(self._env.admissible() or ())

    async def _look(self) -> None:
        """Ask once a turn for the admissible actions, where somebody is shown them."""
        if self._lists:
            self._now.admissible = await self._env_call(self._choices)

    async def _replay(self) -> None:
        """Execute the start's actions; the task must survive them, and look the same."""
        request = self._request
        for number, action in enumerate(request.start.actions):
            await self._look()
            result = await self._env_call(partial(self._env.act, action))
            if result.terminated or result.truncated:
                raise self._fault("replay", "the replayed actions ended the episode")
            if request.expected is not None and request.expected[number] != result.observation:
                raise self._fault("replay", f"observation {number} differs from the recorded one")
            turn = Turn(
                number,
                self._now.observation,
                Actor(request.start.source),
                Author.REPLAY,
                text=actions.write(self._grammar, (action,)),
                actions=(action,),
                results=(result,),
                reward=result.reward,
                admissible=self._now.admissible,
            )
            self._append(turn, None)

    async def _turn(self) -> None:
        self._check_limits()
        await self._look()
        response = await self._ask()
        parsed, results, verdict, stop = await self._execute(response)
        turn = Turn(
            self._turns,
            self._now.observation,
            response.actor,
            text=response.text,
            reasoning=parsed.reasoning,
            tool_calls=response.tool_calls,
            actions=parsed.actions or ("",),
            results=results,
            verdict=verdict,
            stop=response.sample.stop if response.sample else response.stop,
            reward=sum(result.reward for result in results),
            usage=response.usage,
            span=self._tokens_of(response),
            alternatives=response.alternatives,
            admissible=self._now.admissible,
            cut=parsed.cut,
            hint=response.hint,
            informed=response.informed,
        )
        reply = None
        if response.sample is not None:
            ids = (*response.forced, *response.sample.ids)
            reply = Reply(ids, response.kinds, Author.CONTEXT)
        self._append(turn, reply)
        if stop is not None:
            raise stop
        if self._last.terminated:
            raise _Stop("success" if self._last.success else "failure")
        if self._last.truncated:
            raise _Stop("step_limit")

    def _check_limits(self) -> None:
        acted = self._turns - len(self._request.start.actions)
        limits = self._limits
        if self._max_turns is not None and self._turns >= self._max_turns:
            raise _Stop("step_limit")
        if self._request.horizon is not None and acted >= self._request.horizon:
            raise _Stop("horizon")
        used = (self._steps, self._tokens, time.monotonic() - self._began)
        allowed = (limits.env_steps, limits.tokens, limits.seconds)
        if any(most is not None and is_ >= most for is_, most in zip(used, allowed, strict=True)):
            raise _Stop("budget")

    def _fault(self, kind: str, message: str) -> _Stop:
        return _Stop(f"fault:{kind}", Fault(kind, message, self._turns))

    async def _ask(self) -> Response:
        """The policy's response; one that does not come in time ends the episode."""
        limit = self._limits.seconds
        left = None if limit is None else self._began + limit - time.monotonic()
        if isinstance(self._policy, ScriptedPolicy) and self._env.card.isolation != "inline":
            return await self._env_call(partial(self._policy.respond, self._now))  # it may block
        try:
            async with asyncio.timeout(left) as clock:
                return await self._policy.act(self._now)
        except TimeoutError as error:
            if clock.expired():
                raise _Stop("budget") from error
            raise self._fault("timeout", str(error)) from error
        except (EngineError, EnvError) as error:
            kind = "engine" if isinstance(error, EngineError) else "environment"
            raise self._fault(kind, str(error)) from error

    async def _execute(
        self, response: Response
    ) -> tuple[Parsed, tuple[StepResult, ...], Verdict, _Stop | None]:
        """Step through the actions; an unreadable response is the empty action and costs a step.

        An environment that breaks is returned, not raised: what was sampled and executed until
        then belongs on record.
        """
        parsed, verdict = response.parsed, response.parsed.verdict
        limit, results = self._limits.env_steps, list[StepResult]()
        try:
            if response.tool_calls:
                parsed = await self._env_call(partial(self._calls, response))
                verdict = parsed.verdict
            for action in parsed.actions or ("",):
                result = await self._env_call(partial(self._env.act, action))
                results.append(result)
                if verdict is Verdict.OK and not result.valid:
                    verdict = Verdict.INADMISSIBLE
                spent = limit is not None and self._steps + len(results) >= limit
                if result.terminated or result.truncated or spent:
                    break
        except _Stop as stop:
            return parsed, tuple(results), verdict, stop
        return parsed, tuple(results), verdict, None

    def _calls(self, response: Response) -> Parsed:
        thought = response.parsed.reasoning
        return actions.parse_calls(response.tool_calls, self._env.tool_action, thought)

    def _tokens_of(self, response: Response) -> Span | None:
        self._tokens += response.usage.output
        if response.sample is None:
            return None
        sample, forced, (ids, authors) = response.sample, response.forced, response.prompt
        return self._builder.extend(
            ids,
            (*forced, *sample.ids),
            logp=(*[float("nan")] * len(forced), *sample.logp),
            kind=response.kinds,
            prompt_author=authors,
            forced=len(forced),
        )

    async def _env_call(self, call: Callable[[], T]) -> T:
        """Run ``call`` as the card asks; whatever the environment raises is a fault."""
        guarded = partial(self._guarded, call)
        if self._env.card.isolation == "inline":
            return guarded()
        work = asyncio.get_running_loop().run_in_executor(self._threads, guarded)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])  # nobody else may have the environment before
            work.exception()
            raise

    def _guarded(self, call: Callable[[], T]) -> T:
        """In the thread itself: a StopIteration could not leave it, and would hang the episode."""
        try:
            return call()
        except ConfigError:
            raise
        except EnvError as error:
            raise self._fault("environment", str(error)) from error
        except Exception as error:
            raise self._fault("environment", f"{type(error).__name__}: {error}") from error

    @property
    def _now(self) -> Episode:
        assert self._episode is not None
        return self._episode

    def _append(self, turn: Turn, reply: Reply | None) -> None:
        self._now.turns.append(turn)
        self._now.replies.append(reply)
        self._steps += len(turn.results)
        if turn.results:
            self._last = turn.results[-1]
            self._now.observation = self._last.observation

    def _record(self, end: str, faults: tuple[Fault, ...]) -> Trajectory:
        request, episode = self._request, self._episode
        read = episode.note if episode else request.note
        note = {"note": read} if read else {}
        plan = {"plan": episode.plan} if episode and episode.plan else {}
        return Trajectory(
            request.task,
            request.group or request.task.key,
            request.sample,
            tuple(episode.turns) if episode else (),
            self._builder.finish(),
            end,
            self._last.success,
            self._last.score,
            request.start,
            request.horizon,
            request.counter,
            faults,
            {**request.provenance, **note, **plan},
            goal=episode.goal if episode else "",
        )
