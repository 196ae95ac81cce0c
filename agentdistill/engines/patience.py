"""When a provider is asked again: pauses, retries with jitter, and one budget of retries for all.

Invariants: a pause that the provider asks for holds for every request of its engine, also for those
that have not been sent; waiting is never shorter than it asked; retries of many requests draw on
one budget, so that a provider in trouble is not buried under them.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

LONGEST = 300.0
"""Seconds that a provider may ask to wait for; beyond that the request fails and says so."""

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")


@dataclass(frozen=True, slots=True)
class Failure:
    """One request that brought no answer.

    Attributes:
        status: HTTP status; None where none came.
        message: what was said, in one line and without secrets.
        again: whether another try can help.
        lost: it was sent and nobody knows whether it was answered, so that it may have cost.
        wait: seconds that the provider asks to wait; None where it does not say.
    """

    status: int | None
    message: str
    again: bool
    lost: bool = False
    wait: float | None = None


def asked_to_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that ``Retry-After`` asks for (a number or a date), None without one."""
    low = {name.lower(): value.strip() for name, value in headers.items()}
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        if name not in low:
            continue
        try:
            return max(0.0, float(low[name]) * unit)
        except ValueError:
            pass  # a date, or nothing that can be read
        try:
            then = parsedate_to_datetime(low[name])
        except ValueError:
            continue
        then = then if then.tzinfo else then.replace(tzinfo=UTC)
        return max(0.0, (then - datetime.now(UTC)).total_seconds())
    return None


def exhausted_for(headers: Mapping[str, str]) -> float:
    """Seconds until a rate limit is reset that this answer used up; 0 while something is left."""
    low = {name.lower(): value.strip() for name, value in headers.items()}
    longest = 0.0
    for kind in ("requests", "tokens"):
        if low.get(f"x-ratelimit-remaining-{kind}") == "0":
            longest = max(longest, _seconds(low.get(f"x-ratelimit-reset-{kind}", "")))
    return longest


def _seconds(text: str) -> float:
    """A duration such as ``6m0s``, ``350ms`` or ``1.5``, in seconds."""
    found = _PART.findall(text)
    if found:
        return sum(float(number) * _UNITS[unit] for number, unit in found)
    try:
        return max(0.0, float(text))
    except ValueError:
        return 0.0


@dataclass(slots=True, eq=False)
class Patience:
    """What the requests of one engine share.

    Attributes:
        retries: tries after the first, of one request.
        base: seconds; try number k waits a uniform part of ``base * 2**k`` (full jitter).
        longest_jitter: at most so much of that.
        budget: retries that all requests have together; every answer gives a tenth of one back.
    """

    retries: int = 6
    base: float = 0.5
    longest_jitter: float = 60.0
    budget: float = 100.0
    _left: float = field(init=False)
    _until: float = field(init=False, default=0.0)
    _random: random.Random = field(init=False, default_factory=random.Random)

    def __post_init__(self) -> None:
        """Start with a full budget."""
        self._left = self.budget

    async def ready(self) -> float:
        """Wait until nobody has to be waited for; the seconds that it took."""
        began = time.monotonic()
        while (left := self._until - time.monotonic()) > 0:
            # Spread out: everybody waits for the same moment.
            await asyncio.sleep(left + self._random.uniform(0, min(self.base, 1.0)))
        return time.monotonic() - began

    def answered(self, headers: Mapping[str, str]) -> None:
        """An answer came; pause where it used up a rate limit."""
        self._left = min(self.budget, self._left + 0.1)
        self._pause(min(exhausted_for(headers), LONGEST))

    def another(self, failure: Failure, tried: int) -> bool:
        """Whether to try again after ``tried`` tries, which takes one from the budget."""
        too_long = failure.wait is not None and failure.wait > LONGEST
        if not failure.again or too_long or tried > self.retries or self._left < 1:
            return False
        self._left -= 1
        return True

    async def back_off(self, failure: Failure, tried: int) -> float:
        """Wait as the provider asks, or a random while; the seconds that it took."""
        began = time.monotonic()
        if failure.wait is not None:
            self._pause(failure.wait)
        else:
            most = min(self.longest_jitter, self.base * 2 ** min(tried, 32))
            await asyncio.sleep(self._random.uniform(0, most))
        await self.ready()
        return time.monotonic() - began

    def _pause(self, seconds: float) -> None:
        self._until = max(self._until, time.monotonic() + seconds)
