"""Does an environment keep the promises of :mod:`agentdistill.envs.base`? For our own and yours.

Invariants: a broken environment never makes :func:`check_env` raise, it makes a check ``failed``;
only a target that cannot be made at all is a ConfigError. What is checked is in checks.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from agentdistill.envs.base import TextEnv
from agentdistill.envs.checks import CHECKS, FailedError, Probe, SkippedError, trace
from agentdistill.envs.make import make
from agentdistill.errors import ConfigError
from agentdistill.records import digest


@dataclass(frozen=True, slots=True)
class Check:
    """One result: ``status`` is ok, failed or skipped; ``message`` says what was seen."""

    name: str
    status: str
    message: str


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
        lines = [f"{c.status:8}{c.name:12}{c.message}" for c in self.checks]
        return "\n".join([f"{self.target}: {'ok' if self.ok else 'FAILED'}", *lines])


def trace_digest(target: str, kwargs: Mapping[str, Any], episodes: int, seed: int) -> str:
    """Hash of seeded random episodes; equal in every process for a deterministic environment."""
    return digest(trace(Probe(make(target, kwargs), target, kwargs, episodes, seed, 0.0)))


def _run(name: str, probe: Probe) -> Check:
    try:
        return Check(name, "ok", CHECKS[name](probe))
    except SkippedError as reason:
        return Check(name, "skipped", str(reason))
    except FailedError as reason:
        return Check(name, "failed", str(reason))
    except Exception as error:
        return Check(name, "failed", f"{type(error).__name__}: {error}")


def check_env(
    target: str | TextEnv,
    *,
    episodes: int = 5,
    seed: int = 0,
    seconds: float = 0.5,
    kwargs: Mapping[str, Any] | None = None,
) -> Report:
    """Run all checks on an environment.

    Args:
        target: a gymnasium id, ``module:Class``, or an instance (which is left open).
        episodes: tasks per check; slow environments take fewer.
        seed: seeds the tasks and the random policy.
        seconds: how long to measure the speed.
        kwargs: arguments for the constructor, where ``target`` is a string.
    """
    if episodes < 1:
        raise ConfigError("must be at least 1", key="episodes", value=episodes)
    named = target if isinstance(target, str) else None
    env = make(target, kwargs)
    probe = Probe(env, named, kwargs or {}, episodes, seed, seconds)
    checks = tuple(_run(name, probe) for name in CHECKS)
    try:
        card = env.card.to_json()
    except Exception:  # the check "card" has already failed and says why
        card = {}
    if named:
        env.close()
    return Report(named or type(env).__name__, card, checks)
