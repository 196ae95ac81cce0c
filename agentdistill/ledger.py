"""Every call to a provider: what it took, and limits that stop before the call that breaks them.

Invariants
----------
* A call is reserved before anything is sent: the worst that it can take counts against every limit
  until it ends, beside what other calls, threads and processes have reserved. So, as long as
  no call uses more than it reserved, no interleaving of calls exceeds a limit.
* A call that would fit once others have ended waits for them, in the order of arrival; one that
  can never fit is refused with a BudgetError. A call inside another one never waits.
* A finished call is one line in the file, on the disk before ``settle`` returns, and it counts
  once. Money is exact.
* A call that ends unsettled gives its reservation back and stays as a failure that cost nothing:
  whoever sends settles with the most where a provider may charge for an answer that was lost. Of
  a process that dies nobody can know, so its calls count with their most.
* Calls in flight belong to the process that made them, not to the children it forks.
* Where money is limited, a model without a price is refused; elsewhere it is shown as unpriced.

The time limits: ``wall_seconds`` is how long the ledger has been in use, over restarts; it
also ends calls in flight. ``working_seconds`` is the sum over calls of their seconds without waits
for the provider (rate limits, queues, pauses before retries).
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from contextvars import ContextVar
from dataclasses import asdict, astuple
from decimal import Decimal
from pathlib import Path

from agentdistill.errors import BudgetError, StoreError
from agentdistill.journal import Journal
from agentdistill.prices import Price, Prices, Quote, unpriced
from agentdistill.records import Json, Usage
from agentdistill.spending import Entry, Spend, SpendLimits, Sum, text

__all__ = ["Call", "Ledger", "Price", "SpendLimits"]

_FIRST_PAUSE, _LAST_PAUSE = 0.005, 0.2
_DIED = "process died"


class Call:
    """One call in flight; made by :meth:`Ledger.call`.

    Attributes:
        retries: attempts after the first so far; whoever sends may count here.
        waited: seconds waited so far for rate limits, queues and pauses before retries.
    """

    def __init__(self, ledger: Ledger, role: str, model: str, most: Usage, seconds: float) -> None:
        """Nothing is reserved yet."""
        _check(most, seconds)
        self.id = uuid.uuid4().hex[:16]
        self.role, self.model, self.most = role, model, most
        self.quote = quote = ledger._quote(model)
        self.retries, self.waited = 0, 0.0
        money = quote.price.most(most) if quote else None
        self.reserved = Spend(money or Decimal(0), sum(astuple(most)), 1, seconds)
        self.open = False
        self._ledger, self._began = ledger, 0.0

    def settle(
        self,
        usage: Usage,
        *,
        seconds: float | None = None,
        waited: float | None = None,
        retries: int | None = None,
        error: str | None = None,
    ) -> Entry:
        """The call has ended and the provider counted ``usage``: write that down, once.

        Args:
            usage: tokens in four classes that do not overlap.
            seconds: the whole call; measured if None.
            waited: of these, waits for the provider; :attr:`waited` if None.
            retries: attempts after the first; :attr:`retries` if None.
            error: kind of failure, for an answer that was paid and is of no use. Never a message
                of the provider: it may hold a key.

        Raises:
            StoreError: the disk refuses; the reservation stays.
            ValueError: it has ended already, or a number is negative.
        """
        waited = self.waited if waited is None else waited
        retries = self.retries if retries is None else retries
        _check(usage, waited, retries, seconds or 0.0)
        return self._end(usage, seconds, waited, retries, error)

    def fail(self, error: str) -> Entry:
        """The call has ended and cost nothing; leaving its block does this, too."""
        return self._end(None, None, self.waited, self.retries, error)

    def _end(
        self,
        usage: Usage | None,
        seconds: float | None,
        waited: float,
        retries: int,
        error: str | None,
    ) -> Entry:
        if not self.open:
            raise ValueError("this call has ended already, and is counted")
        ledger, quote = self._ledger, self.quote
        self.open = False
        return ledger._finish(
            self,
            Entry(
                id=self.id,
                at=round(time.time(), 3),
                role=self.role,
                model=self.model,
                usage=usage,
                money=None if quote is None or usage is None else quote.price.cost(usage),
                price=quote.source if quote else None,
                seconds=ledger._clock() - self._began if seconds is None else seconds,
                waited=waited,
                retries=retries,
                error=error,
                over=usage is not None and _over(usage, self),
                wall=ledger.wall,
            ),
        )

    def _begin(self) -> None:
        self.open, self._began = True, self._ledger._clock()

    def _to_json(self) -> Json:
        """The most that it can take, for other processes."""
        quote, most = self.quote, self.reserved
        return {
            "role": self.role,
            "model": self.model,
            "usage": asdict(self.most),
            "money": text(most.money) if quote else None,
            "price": quote.source if quote else None,
            "seconds": most.working_seconds,
        }


_HOLDING: ContextVar[tuple[Call, ...]] = ContextVar("holding", default=())


class Ledger:
    """See the module docstring; a context manager, or :meth:`close` it."""

    def __init__(
        self,
        path: Path | None,
        limits: SpendLimits = SpendLimits(),  # noqa: B008  (frozen)
        prices: Mapping[str, Price | None] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Go on with the ledger at ``path``.

        Args:
            path: the file, shared with any number of processes; None keeps all in memory.
            limits: of the whole file, what is in it already included.
            prices: per million tokens, by the name of the model, None for one that is in no table;
                they go before litellm's.
            clock: seconds that only grow.

        Raises:
            StoreError: (here and in every method) the disk refuses.
        """
        self.path, self.limits, self.prices = path, limits, Prices(prices)
        self.total = Sum()
        """Over all calls that have ended, of this process and others."""
        self._clock, self._began, self._wall_before = clock, clock(), 0.0
        self._spent, self._unpriced = Spend(), set[str]()
        self._open: dict[str, Call] = {}
        self._journal = None if path is None else Journal(path)
        self._thread = threading.RLock()
        self._queues = weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock]()
        _LEDGERS.add(self)
        self._absorb(self._journal.news() if self._journal else ())

    def close(self) -> None:
        """Free the locks; calls in flight are no longer reserved for others to see."""
        if self._journal is not None:
            self._journal.close()

    def __enter__(self) -> Ledger:
        """Itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    @property
    def wall(self) -> float:
        """Seconds that the ledger has been in use, over restarts."""
        return self._wall_before + self._clock() - self._began

    def line(self) -> str:
        """What was spent so far, in one line for people."""
        return self.total.line(self.limits)

    @asynccontextmanager
    async def call(
        self, role: str, model: str, most: Usage, *, seconds: float = 0.0
    ) -> AsyncIterator[Call]:
        """Reserve the worst case of one call; settle it inside the block.

        Leaving the block without :meth:`Call.settle` gives the reservation back and records a
        failure.

        Args:
            role: teacher, student, analyser, embedding, …
            model: the name under which its price is found.
            most: the most tokens that the provider may count, all attempts together; how the
                prompt divides into its three classes is of no matter.
            seconds: the most that it may take without its waits, such as its timeout; without it
                ``working_seconds`` may be exceeded by the calls in flight.

        Raises:
            BudgetError: a limit leaves no room, or wall time ran out during the call.
            ConfigError: nobody priced the model and money is limited.
        """
        call = Call(self, role, model, most, seconds)
        await self._reserve(call)
        outer = _HOLDING.set((*_HOLDING.get(), call))
        limit = self.limits.wall_seconds
        timeout = asyncio.timeout(None if limit is None else max(0.0, limit - self.wall))
        kind = "left unsettled"
        try:
            async with timeout:
                yield call
        except BaseException as error:
            kind = type(error).__name__
            if isinstance(error, TimeoutError) and timeout.expired():
                raise self._refusal("wall_seconds", "it ran out during a call") from error
            raise
        finally:
            if call.open:
                call.fail(kind)
            _HOLDING.reset(outer)

    # -- reserving --------------------------------------------------------------------------------

    def _quote(self, model: str) -> Quote | None:
        if self.limits.money is None:
            return self.prices.find(model)
        return self.prices.need(model)

    async def _reserve(self, call: Call) -> None:
        if any(outer.open for outer in _HOLDING.get()):
            if (limit := self._try(call)) is not None:
                raise self._refusal(limit, "the calls in flight leave no room for one within them")
            return
        queue = self._queues.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        pause = _FIRST_PAUSE
        async with queue:
            while self._try(call) is not None:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_PAUSE)

    def _try(self, call: Call) -> str | None:
        """Reserve, and return None; or the limit for whose sake it has to wait.

        Raises:
            BudgetError: waiting is of no use.
            ConfigError: money is limited, and the ledger has calls that nobody priced.
        """
        with self._exclusive():
            self._catch_up()
            limit = self._obstacle(call.reserved)
            if limit is None:
                call._begin()
                self._open[call.id] = call
                self._show()
            return limit

    def _obstacle(self, wanted: Spend) -> str | None:
        limits, spent = self.limits, self._spent
        if limits.wall_seconds is not None and self.wall >= limits.wall_seconds:
            raise self._refusal("wall_seconds", f"{self.wall:.1f} are gone")
        if limits.money is not None and self._unpriced:
            raise unpriced(min(self._unpriced))
        held = sum(self._held(), Spend())
        # A call in flight will count as a call whatever becomes of it; the rest may come back.
        spent, held = spent + Spend(calls=held.calls), held + Spend(calls=-held.calls)
        waits = None
        for name in ("money", "tokens", "calls", "working_seconds"):
            limit, used = getattr(limits, name), getattr(spent, name)
            need, others = getattr(wanted, name), getattr(held, name)
            if limit is None:
                continue
            if used + need > limit or (name == "working_seconds" and used >= limit):
                raise self._refusal(name, f"{used} are spent, and this call may take {need}")
            if used + others + need > limit:
                waits = name
        return waits

    def _refusal(self, name: str, message: str) -> BudgetError:
        return BudgetError(f"budget.{name}", getattr(self.limits, name), message)

    def _held(self) -> Iterable[Spend]:
        yield from (call.reserved for call in self._open.values())
        if self._journal is not None:
            for id, held in self._journal.held().items():
                yield self._dead(id, held).spend

    # -- writing down -----------------------------------------------------------------------------

    def _exclusive(self) -> AbstractContextManager[object]:
        return self._thread if self._journal is None else self._journal.exclusive()

    def _finish(self, call: Call, entry: Entry) -> Entry:
        with self._exclusive():
            self._catch_up()
            self._write(entry)
            self._open.pop(call.id, None)
            self._show()
        return entry

    def _write(self, entry: Entry) -> None:
        if self._journal is not None:
            self._journal.append(entry.to_json())
        self._count(entry)

    def _show(self) -> None:
        """Let other processes see what is reserved here."""
        if self._journal is not None:
            self._journal.hold({id: call._to_json() for id, call in self._open.items()})

    def _catch_up(self) -> None:
        """Count what others wrote; write down what dead processes could not."""
        if self._journal is None:
            return
        self._absorb(self._journal.news())
        for file, lost in self._journal.lost().items():
            known = self._journal.known("id") if lost else set()
            for id in lost.keys() - known:
                self._write(self._dead(id, lost[id]))
            file.unlink()

    def _dead(self, id: str, held: Json) -> Entry:
        """How a call of another process counts if that dies."""
        rest = {"waited": 0.0, "retries": 0, "error": _DIED, "over": False, "wall": self.wall}
        entry = Entry.read({"id": id, "at": round(time.time(), 3), **held, **rest})
        if entry is None:
            raise StoreError(f"{self.path} is shared with another version of agentdistill: use one")
        return entry

    def _absorb(self, lines: Iterable[dict[str, Json]]) -> None:
        for entry in filter(None, map(Entry.read, lines)):
            self._count(entry)

    def _count(self, entry: Entry) -> None:
        self.total.add(entry)
        self._spent += entry.spend
        if entry.money is None and entry.tokens:
            self._unpriced.add(entry.model)
        self._wall_before = max(self._wall_before, entry.wall - (self._clock() - self._began))


_LEDGERS: weakref.WeakSet[Ledger] = weakref.WeakSet()


def _disown() -> None:
    """In a forked child: calls in flight and locks are the parent's."""
    for ledger in list(_LEDGERS):
        for call in ledger._open.values():
            call.open = False
        ledger._open, ledger._thread = {}, threading.RLock()
        if ledger._journal is not None:
            ledger._journal.disown()


os.register_at_fork(after_in_child=_disown)


def _over(usage: Usage, call: Call) -> bool:
    """Whether a provider counted more than was reserved, in tokens or in money."""
    if sum(astuple(usage)) > call.reserved.tokens:
        return True
    return call.quote is not None and call.quote.price.cost(usage) > call.reserved.money


def _check(usage: Usage, *numbers: float) -> None:
    if min(*astuple(usage), *numbers) < 0:
        raise ValueError(f"negative numbers in {usage}, {numbers}")
