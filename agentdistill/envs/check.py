"""Does an environment keep the promises of :mod:`agentdistill.envs.base`? For our own and yours.

Invariants: a broken environment never makes :func:`check_env` raise, it makes a check ``failed``;
only a target that cannot be made at all is a ConfigError; every check ends within its budget of
seconds and the episode that is under way then. What is checked is in checks.py and strain.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from agentdistill.envs import footprint
from agentdistill.envs.base import TextEnv
from agentdistill.envs.checks import CHECKS
from agentdistill.envs.make import make
from agentdistill.envs.probe import MAX_STEPS, FailedError, Probe, SkippedError, trace
from agentdistill.errors import ConfigError
from agentdistill.records import digest


@dataclass(frozen=True, slots=True)
class Check:
    """One result.

    Attributes:
        name: of the check.
        status: ok, failed or skipped.
        message: what was seen.
        episodes: how many were really played; 0 for checks that play none.
        seconds: what the check took.
    """

    name: str
    status: str
    message: str
    episodes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """All results for one environment.

    Attributes:
        target: what was checked.
        card: the environment's card as JSON, empty when it has none.
        checks: in the order in which they ran.
    """

    target: str
    card: Mapping[str, Any]
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(check.status != "failed" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        """A line per check."""
        lines = [
            f"{c.status:8}{c.name:11}{c.episodes:4} episodes {c.seconds:6.1f} s  {c.message}"
            for c in self.checks
        ]
        return "\n".join([f"{self.target}: {'ok' if self.ok else 'FAILED'}", *lines])


def trace_digest(
    target: str, kwargs: Mapping[str, Any], episodes: int, seed: int, steps: int = MAX_STEPS
) -> str:
    """Hash of seeded random episodes; equal in every process for a deterministic environment."""
    with closing(make(target, kwargs)) as env:
        probe = Probe(env, target, kwargs, episodes, seed)
        return digest([trace(env, task, seed, steps) for task in probe.tasks])


def _run(name: str, probe: Probe) -> Check:
    probe.begin()
    try:
        status, message = "ok", CHECKS[name](probe)
    except SkippedError as reason:
        status, message = "skipped", str(reason)
    except FailedError as reason:
        status, message = "failed", str(reason)
    except Exception as error:
        status, message = "failed", f"{type(error).__name__}: {error}"
    return Check(name, status, message, probe.played, round(probe.spent, 3))


def check_env(
    target: str | TextEnv,
    *,
    episodes: int = 5,
    seed: int = 0,
    seconds: float = 0.5,
    budget: float = 30.0,
    expert_rate: float | None = None,
    kwargs: Mapping[str, Any] | None = None,
    on_check: Callable[[Check], None] | None = None,
) -> Report:
    """Run all checks on an environment.

    Args:
        target: a gymnasium id, ``module:Class``, or an instance (which is left open).
        episodes: tasks per check; slow environments take fewer.
        seed: seeds the tasks and the random policy.
        seconds: how long to measure the speed.
        budget: seconds after which a check begins no further episode.
        expert_rate: success rate that the expert is known to have; None takes the card's, and
            without one the expert must solve one task.
        kwargs: arguments for the constructor, where ``target`` is a string.
        on_check: called with each result as it comes (progress).
    """
    if episodes < 1:
        raise ConfigError("must be at least 1", key="episodes", value=episodes)
    if expert_rate is not None and not 0 <= expert_rate <= 1:
        raise ConfigError("must be from 0 to 1", key="expert_rate", value=expert_rate)
    named = target if isinstance(target, str) else None
    before = footprint.descendants()
    env = make(target, kwargs)
    probe = Probe(env, named, kwargs or {}, episodes, seed, seconds, budget, expert_rate, before)
    try:
        card, probe.expert_rate = env.card.to_json(), _rate(env, expert_rate)
    except Exception:  # the check "card" fails and says why
        card = {}
    checks = []
    try:
        for name in CHECKS:
            checks.append(_run(name, probe))
            if on_check is not None:
                on_check(checks[-1])
    finally:
        if named:
            probe.close()
    return Report(named or type(env).__name__, card, tuple(checks))


def _rate(env: TextEnv, given: float | None) -> float | None:
    return env.card.expert_rate if given is None else given
