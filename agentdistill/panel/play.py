"""Policies on a panel: references, and playing them again.

Invariants: a reference says what a policy did, episode by episode (a digest of all that was seen
and done), so that a difference can be named; faults are counted apart and are in no rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

from agentdistill.envs.base import TextEnv
from agentdistill.errors import ConfigError, EnvError
from agentdistill.machine import machine
from agentdistill.metrics import of_trajectories, wilson
from agentdistill.panel.file import Panel, Reference
from agentdistill.panel.make import check, filled
from agentdistill.policy import ExpertPolicy, Policy, RandomPolicy
from agentdistill.records import Trajectory, digest
from agentdistill.rollout import rollout, run
from agentdistill.statistics import tolerance

POLICIES: dict[str, Callable[[], Policy]] = {"expert": ExpertPolicy, "random": RandomPolicy}
"""The scripted policies, which need no model."""

REPEATED = 5
"""Episodes that are played twice to see whether a policy is exact."""

Watch = Callable[[Trajectory], None]


def score(
    panel: Panel,
    policy: str | Policy,
    *,
    options: Mapping[str, Any] | None = None,
    tasks: int | None = None,
    repeat: int = REPEATED,
    concurrency: int = 256,
    on_end: Watch | None = None,
) -> Reference:
    """Let a policy play ``panel``.

    Args:
        panel: the panel.
        policy: ``expert`` or ``random``, or one that is at hand.
        options: places on this machine, for the environment.
        tasks: only the first so many; None plays all.
        repeat: so many are played twice, to see whether the policy is exact.
        concurrency: episodes at once, where the environment's slots allow it.
        on_end: told of every episode as it ends.

    Raises:
        ConfigError: unknown policy, or the environment is not the panel's.
        EnvError: the environment cannot run here.
    """
    player = _scripted(policy) if isinstance(policy, str) else policy
    began = time.monotonic()
    create = partial(panel.make_env, options)
    with closing(create()) as env:
        if needs := env.availability().needs:
            raise EnvError("; ".join(needs))
        if problems := check(panel, env):
            raise ConfigError("; ".join(problems), key="panel", value=panel.name)
        panel = filled(panel, env)
    wanted = panel.requests()[:tasks]
    pool: list[TextEnv] = []
    play = partial(rollout, player, create, concurrency=concurrency, pool=pool)
    try:
        played = run(play(wanted, max_turns=panel.max_turns, on_end=on_end))
        words = [_word(trajectory) for trajectory in played]
        again = run(play(wanted[:repeat], max_turns=panel.max_turns))
    finally:
        for env in pool:
            env.close()
    exact = bool(again) and [_word(trajectory) for trajectory in again] == words[: len(again)]
    return _summary(played, words, exact, time.monotonic() - began)


def _scripted(name: str) -> Policy:
    if name not in POLICIES:
        raise ConfigError(f"one of {', '.join(POLICIES)}", key="policy", value=name)
    return POLICIES[name]()


def _word(trajectory: Trajectory) -> str:
    """A digest of all that was seen and done; what a policy said about it is not in it."""
    if trajectory.faults:
        return "fault"
    turns = [
        [turn.observation, turn.actions, [asdict(result) for result in turn.results]]
        for turn in trajectory.turns
    ]
    return digest([trajectory.task.key, turns, trajectory.end], 8)


def _summary(
    played: Sequence[Trajectory], words: Sequence[str], exact: bool, seconds: float
) -> Reference:
    sound = [trajectory for trajectory in played if not trajectory.faults]
    wins, means, here = sum(t.success for t in sound), of_trajectories(played), machine()
    low, high = wilson(wins, len(sound))
    return Reference(
        episodes=len(sound),
        faults=len(played) - len(sound),
        success=round(wins / len(sound), 6) if sound else 0.0,
        interval=(round(low, 6), round(high, 6)),
        score=round(means["score"] or 0.0, 6),
        turns=round(means["turns"] or 0.0, 3),
        exact=exact,
        digests=" ".join(words),
        seconds=round(seconds, 1),
        commit=here["commit"],
        machine=f"{here['cores']} cores ({here['cpu']}, {here['system']})",
        date=datetime.now(UTC).date().isoformat(),
    )


@dataclass(frozen=True, slots=True)
class Replay:
    """One reference, played again.

    Attributes:
        policy: whose.
        status: ``identical`` (episode by episode), ``within`` (a policy that is not exact, whose
            rate is within the interval; one that was trained again, within two standard errors)
            or ``differs``.
        message: what was seen.
        found: the new numbers.
    """

    policy: str
    status: Literal["identical", "within", "differs"]
    message: str
    found: Reference


def reproduces(
    panel: Panel,
    policies: Sequence[str] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    tasks: int | None = None,
    on_end: Callable[[str], Watch] | None = None,
) -> list[Replay]:
    """Play the references of ``panel`` again.

    Args:
        panel: the panel.
        policies: whose; None plays all scripted ones that it has.
        options: places on this machine, for the environment.
        tasks: only the first so many.
        on_end: gives, for a policy, what is told of every episode as it ends.

    Raises:
        ConfigError: the panel has no such reference, or the environment is not the panel's.
    """
    found = []
    scripted = [name for name, known in panel.references.items() if not known.recipe]
    for policy in scripted if policies is None else policies:
        if policy not in panel.references:
            known = ", ".join(panel.references) or "none"
            raise ConfigError(f"no such reference; known: {known}", key="policy", value=policy)
        watch = None if on_end is None else on_end(policy)
        new = score(panel, policy, options=options, tasks=tasks, repeat=0, on_end=watch)
        found.append(judge(panel, policy, new))
    return found


def judge(panel: Panel, policy: str, new: Reference) -> Replay:
    """Whether ``new`` reproduces the reference of ``policy``, on the same first tasks."""
    known = panel.references[policy]
    words = new.digests.split()
    pairs = zip(known.digests.split(), words, panel.tasks, strict=False)
    other = [task.key for old, now, task in pairs if old != now]
    if not other:
        faults = f", {new.faults} of them faults, as before" if new.faults else ""
        return Replay(policy, "identical", f"all {len(words)} episodes are the same{faults}", new)
    said = f"{len(other)} of {len(words)} episodes differ, first that of task {other[0]}"
    if new.faults != known.faults:
        said += f" ({new.faults} faults, and {known.faults} in the panel)"
    whole = len(words) == len(panel.tasks)
    (low, high), rate = (known.interval, new.success) if whole else (new.interval, known.success)
    within = new.episodes > 0 and low <= rate <= high
    if known.recipe:
        chance = tolerance(known.success, known.episodes, new.success, new.episodes)
        allowed = max(chance, 2 * 2**0.5 * known.spread)  # both were trained, and played
        within = new.episodes > 0 and abs(known.success - new.success) <= allowed
    said += f"; success {new.success:.1%}, in the panel {known.success:.1%}"
    if not within or (known.exact and not known.recipe):
        return Replay(policy, "differs", said, new)
    what = "two standard errors" if known.recipe else "the interval"
    return Replay(policy, "within", f"{said}: within {what}", new)
