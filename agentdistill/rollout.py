"""Plays episodes: policy and environment in, trajectories out.

Invariants
----------
* A bad rollout is data: faults of environments and engines, time-outs and limits end the episode
  with their kind on record; they never lose the others. Programming errors still propagate.
* Whatever ends :func:`rollout`, no task of it is left running and every environment is closed.
* An episode's outcome depends on its request (task, start, seed) and the policy's weights only.
* How an environment runs is what its card asks for (:data:`~agentdistill.envs.base.ISOLATIONS`):
  ``inline`` in the event loop, ``thread`` in a worker thread so that a slow step stalls nobody.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar, cast

from agentdistill import actions
from agentdistill.config import LimitsConfig
from agentdistill.envs.base import TextEnv
from agentdistill.errors import ConfigError, EngineError, EnvError
from agentdistill.policy import Episode, Policy, Response
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


class _Stop(Exception):
    """Ends an episode from inside, with the name of the end and the fault that it was, if any."""

    def __init__(self, end: str, *faults: Fault) -> None:
        self.end, self.faults = end, faults


class Player:
    """Plays one episode; see :func:`rollout` for many."""

    def __init__(
        self,
        policy: Policy,
        env: TextEnv,
        request: Request,
        *,
        max_turns: int | None = None,
        limits: LimitsConfig = NO_LIMITS,
        grammar: str = "plain",
        threads: Executor | None = None,
    ) -> None:
        """See :func:`rollout`; ``threads`` run the calls of environments that are not inline."""
        self._policy, self._env, self._request, self._threads = policy, env, request, threads
        self._max_turns, self._limits, self._grammar = max_turns, limits, grammar
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
        observation, _ = await self._env_call(lambda: self._env.reset(options={"task": task}))
        identity = f"{request.group}/{request.sample}/{task.key}/{next(_NUMBERS)}"
        self._episode = Episode(identity, task, self._env, observation, request.seed)

    async def _replay(self) -> None:
        """Execute the start's actions; the task must survive them, and look the same."""
        request = self._request
        for number, action in enumerate(request.start.actions):
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
            )
            self._append(turn, None)

    async def _turn(self) -> None:
        self._check_limits()
        response = await self._ask()
        results, verdict, stop = await self._execute(response)
        turn = Turn(
            self._turns,
            self._now.observation,
            response.actor,
            text=response.text,
            reasoning=response.parsed.reasoning,
            actions=response.parsed.actions or ("",),
            results=results,
            verdict=verdict,
            stop=response.sample.stop if response.sample else "none",
            reward=sum(result.reward for result in results),
            usage=response.usage,
            span=self._tokens_of(response),
            alternatives=response.alternatives,
        )
        reply = None
        if response.sample is not None:
            reply = Reply(response.sample.ids, response.kinds, Author.CONTEXT)
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
    ) -> tuple[tuple[StepResult, ...], Verdict, _Stop | None]:
        """Step through the actions; an unreadable response is the empty action and costs a step.

        An environment that breaks is returned, not raised: what was sampled and executed until
        then belongs on record.
        """
        verdict, limit = response.parsed.verdict, self._limits.env_steps
        results: list[StepResult] = []
        for action in response.parsed.actions or ("",):
            try:
                result = await self._env_call(partial(self._env.act, action))
            except _Stop as stop:
                return tuple(results), verdict, stop
            results.append(result)
            if verdict is Verdict.OK and not result.valid:
                verdict = Verdict.INADMISSIBLE
            spent = limit is not None and self._steps + len(results) >= limit
            if result.terminated or result.truncated or spent:
                break
        return tuple(results), verdict, None

    def _tokens_of(self, response: Response) -> Span | None:
        self._tokens += response.usage.output
        if response.sample is None:
            return None
        sample, (ids, authors) = response.sample, response.prompt
        return self._builder.extend(
            ids, sample.ids, logp=sample.logp, kind=response.kinds, prompt_author=authors
        )

    async def _env_call(self, call: Callable[[], T]) -> T:
        """Run ``call`` as the card asks; whatever the environment raises is a fault."""
        guarded = partial(self._guarded, call)
        if self._env.card.isolation == "inline":
            return guarded()
        return await asyncio.get_running_loop().run_in_executor(self._threads, guarded)

    def _guarded(self, call: Callable[[], T]) -> T:
        """In the thread itself: a StopIteration could not leave it, and would hang the episode."""
        try:
            return call()
        except ConfigError:
            raise
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
            request.provenance,
        )


async def rollout(
    policy: Policy,
    make_env: Callable[[], TextEnv],
    requests: Iterable[Request],
    *,
    concurrency: int = 256,
    max_turns: int | None = None,
    limits: LimitsConfig = NO_LIMITS,
    grammar: str = "plain",
    on_end: Callable[[Trajectory], None] | None = None,
    pool: list[TextEnv] | None = None,
) -> list[Trajectory]:
    """Play all ``requests``; return their trajectories in the order of the requests.

    Args:
        policy: who acts.
        make_env: makes one environment; at most ``concurrency`` are made, and reused.
        requests: what is to be played.
        concurrency: episodes at once.
        max_turns: responses per episode; None leaves it to the environment.
        limits: hard limits per episode.
        grammar: how replayed actions are written.
        on_end: called with each trajectory as it ends (progress).
        pool: environments to use first; those that are still sound are left there, open, for the
            next call. Without a pool every environment is closed at the end.
    """
    wanted = list(requests)
    gate = asyncio.Semaphore(concurrency)
    threads = ThreadPoolExecutor(max(1, min(concurrency, len(wanted))), "agentdistill-env")
    player = partial(
        Player, policy, max_turns=max_turns, limits=limits, grammar=grammar, threads=threads
    )
    free = [] if pool is None else pool
    alive = list(free)

    async def one(request: Request) -> Trajectory:
        async with gate:
            if not free:
                alive.append(make_env())
                free.append(alive[-1])
            env = free.pop()
            trajectory = await player(env, request).play()
            if any(fault.kind == "environment" for fault in trajectory.faults):
                alive.remove(env)
                trajectory = _discard(env, trajectory)
            else:
                free.append(env)
            if on_end is not None:
                on_end(trajectory)
            return trajectory

    tasks = [asyncio.ensure_future(one(request)) for request in wanted]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        threads.shutdown()  # a step that is under way still uses its environment
        for env in alive:
            if pool is None or env not in pool:
                env.close()


def _discard(env: TextEnv, trajectory: Trajectory) -> Trajectory:
    """Close what broke once and is not trusted again; that it breaks here too is on record."""
    try:
        env.close()
    except Exception as error:
        message = f"when closed: {type(error).__name__}: {error}"
        fault = Fault("environment", message, len(trajectory.turns))
        return replace(trajectory, faults=(*trajectory.faults, fault))
    return trajectory


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run ``coroutine`` to its end from synchronous code, also inside a running event loop.

    Notebooks have a loop; there the work moves to a thread, and an interrupt cancels it.
    """
    stop: list[Callable[[], object]] = []
    results: list[T] = []

    async def main() -> None:
        cancel = cast("asyncio.Task[None]", asyncio.current_task()).cancel
        stop.append(partial(asyncio.get_running_loop().call_soon_threadsafe, cancel))
        results.append(await coroutine)  # asyncio.run would format what it returns, at a cost

    work = main()
    try:
        if asyncio._get_running_loop() is None:
            asyncio.run(work)
        else:
            with ThreadPoolExecutor(1) as pool:
                future = pool.submit(asyncio.run, work)
                try:
                    future.result()
                except BaseException:
                    for cancel in () if future.done() else stop:
                        cancel()
                    raise
    finally:
        for unfinished in (work, coroutine):
            unfinished.close()  # or Python complains of what an interrupt kept from beginning
    return results[0]
