"""Plays many episodes at once; :mod:`~agentdistill.player` plays each.

Invariants
----------
* A bad rollout is data: an episode that ends in a fault never loses the others. Programming errors
  still propagate.
* Whatever ends :func:`rollout`, no task of it is left running and every environment is closed.
* Where the budget ends, requests that are under way are still answered, and kept, before that is
  raised: they are paid for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

from agentdistill.config import LimitsConfig
from agentdistill.envs.base import TextEnv
from agentdistill.errors import BudgetError, EngineError, EnvError
from agentdistill.player import NO_LIMITS, Player, Request
from agentdistill.policy import Policy
from agentdistill.records import Fault, Trajectory

__all__ = ["NO_LIMITS", "Player", "Request", "rollout", "run", "sound"]

T = TypeVar("T")


async def rollout(
    policy: Policy,
    make_env: Callable[[], TextEnv],
    requests: Iterable[Request],
    *,
    concurrency: int = 256,
    max_turns: int | None = None,
    limits: LimitsConfig = NO_LIMITS,
    grammar: str = "plain",
    admissible: bool = False,
    on_end: Callable[[Trajectory], None] | None = None,
    pool: list[TextEnv] | None = None,
) -> list[Trajectory]:
    """Play all ``requests``; return their trajectories in the order of the requests.

    Args:
        policy: who acts.
        make_env: makes one environment; at most as many are made as episodes are played at once,
            and they are reused.
        requests: what is to be played.
        concurrency: episodes at once; fewer where the environment's card says that one machine has
            slots for fewer. The others wait.
        max_turns: responses per episode; None leaves it to the environment.
        limits: hard limits per episode.
        grammar: how replayed actions are written.
        admissible: whether the actions that the environment lists go on record at every turn, for
            those who learn from these episodes by a prompt that shows them.
        on_end: called with each trajectory as it ends (progress).
        pool: environments to use first; those that are still sound are left there, open, for the
            next call. Without a pool every environment is closed at the end.

    Raises:
        BudgetError: the budget ended; no episode is returned, and what was answered is in the
            request cache, where there is one.
    """
    wanted = list(requests)
    envs = _Envs(make_env, pool)
    slots = (envs.slots if wanted else None) or concurrency
    at_once = max(1, min(concurrency, slots, len(wanted)))
    gate = asyncio.Semaphore(at_once)
    threads = ThreadPoolExecutor(at_once, "agentdistill-env")
    player = partial(
        Player,
        policy,
        max_turns=max_turns,
        limits=limits,
        grammar=grammar,
        admissible=admissible,
        threads=threads,
    )
    broke: list[BudgetError] = []

    async def one(request: Request) -> Trajectory | None:
        async with gate:
            if broke:
                return None
            env = envs.take()
            try:
                trajectory = await player(env, request).play()
            except BudgetError as error:
                envs.free.append(env)
                broke.append(error)
                return None
            trajectory = envs.give(env, trajectory)
            if on_end is not None:
                on_end(trajectory)
            return trajectory

    tasks = [asyncio.ensure_future(one(request)) for request in wanted]
    try:
        played = await asyncio.gather(*tasks)
        if broke:  # half of a batch would say nothing
            raise broke[0]
        return [trajectory for trajectory in played if trajectory is not None]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        threads.shutdown()  # a step that is under way still uses its environment
        envs.close()


class _Envs:
    """The environments of one rollout: made when they are needed, and used again."""

    def __init__(self, make: Callable[[], TextEnv], pool: list[TextEnv] | None) -> None:
        self._make, self._pool = make, pool
        self.free = [] if pool is None else pool
        self._alive = list(self.free)

    @property
    def slots(self) -> int | None:
        """How many one machine has room for; made for this, since construction is light."""
        if not self.free:
            self.free.append(self._new())
        return self.free[0].card.slots

    def _new(self) -> TextEnv:
        self._alive.append(self._make())
        return self._alive[-1]

    def take(self) -> TextEnv:
        return self.free.pop() if self.free else self._new()

    def give(self, env: TextEnv, played: Trajectory) -> Trajectory:
        """Take ``env`` back after an episode, or discard what broke; the episode's record."""
        if any(fault.kind == "environment" for fault in played.faults):
            self._alive.remove(env)
            return _discard(env, played)
        self.free.append(env)
        return played

    def close(self) -> None:
        """Close all but those that stay in the pool."""
        for env in self._alive:
            if self._pool is None or env not in self._pool:
                env.close()


def sound(trajectories: list[Trajectory], most: float) -> list[Trajectory]:
    """``trajectories``, unless a larger share than ``most`` of them ended in a fault.

    Raises:
        EnvError: the first fault was not one of an engine.
        EngineError: it was.
    """
    faulty = [t for t in trajectories if t.faults]
    if len(faulty) <= most * len(trajectories):
        return trajectories
    first = faulty[0].faults[0]
    raise (EngineError if first.kind == "engine" else EnvError)(
        f"{len(faulty)} of {len(trajectories)} episodes ended in a fault, more than "
        f"max_fault_rate={most}; first: {first.kind}: {first.message}"
    )


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
