"""What a ledger says: limits, one entry per call, and sums by role and model.

Invariants: money is exact; what nobody priced is counted as unpriced and never as 0. An entry holds
no text of a request, an answer or an error message, and so no key.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, field, fields
from decimal import Decimal, InvalidOperation
from pathlib import Path
from statistics import median, quantiles

from agentdistill.errors import StoreError
from agentdistill.files import refusing
from agentdistill.journal import records
from agentdistill.prices import amount
from agentdistill.records import Json, Usage

FILE = "ledger.jsonl"
"""Name of the ledger in the folder of a run."""


@dataclass(frozen=True, slots=True)
class SpendLimits:
    """What a run may take in all; None is no limit.

    Attributes:
        money: in the currency of the prices.
        tokens: of all classes.
        calls: failed ones count, retries within a call do not.
        wall_seconds: how long the ledger may be in use, over restarts.
        working_seconds: sum over calls of their seconds, waits for the provider left out.
    """

    money: Decimal | None = None
    tokens: int | None = None
    calls: int | None = None
    wall_seconds: float | None = None
    working_seconds: float | None = None

    def __post_init__(self) -> None:
        """Take money as exact; refuse what is no limit."""
        for name in (each.name for each in fields(self)):
            value = getattr(self, name)
            found = None if value is None else amount(value, f"budget.{name}")
            if name == "money":
                object.__setattr__(self, name, found)


@dataclass(frozen=True, slots=True)
class Spend:
    """What is limited: spent, reserved or asked for."""

    money: Decimal = Decimal(0)
    tokens: int = 0
    calls: int = 0
    working_seconds: float = 0.0

    def __add__(self, other: Spend) -> Spend:
        """Both together."""
        return Spend(
            self.money + other.money,
            self.tokens + other.tokens,
            self.calls + other.calls,
            self.working_seconds + other.working_seconds,
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """One finished call.

    Attributes:
        id: unique in its ledger.
        at: end of the call, seconds since 1970.
        role: teacher, student, analyser, embedding, …
        model: name under which its engine knows it.
        usage: tokens; None where the call cost nothing, such as one that was refused. Of a call
            that may have been charged without anybody knowing, the most that it can have used.
        money: what they cost; None if nobody priced the model, or without tokens.
        price: who said so: ``configuration`` or litellm with its version.
        seconds: the whole call, waits included.
        waited: of these, the seconds spent on rate limits, queues and pauses before retries.
        retries: attempts after the first.
        error: kind of the failure, such as ``TimeoutError``; None for an answer.
        over: the provider counted more tokens than the call had reserved.
        wall: seconds that the ledger has been in use, summed over restarts.
    """

    id: str
    at: float
    role: str
    model: str
    usage: Usage | None
    money: Decimal | None
    price: str | None
    seconds: float
    waited: float
    retries: int
    error: str | None
    over: bool
    wall: float

    @property
    def tokens(self) -> int:
        """Tokens of all classes."""
        return sum(astuple(self.usage)) if self.usage else 0

    @property
    def working(self) -> float:
        """Seconds without the waits."""
        return max(0.0, self.seconds - self.waited)

    @property
    def spend(self) -> Spend:
        """What counts against the limits."""
        return Spend(self.money or Decimal(0), self.tokens, 1, self.working)

    def to_json(self) -> dict[str, Json]:
        """For the ledger; :meth:`read` is the inverse."""
        return asdict(self) | {"money": text(self.money)}

    @classmethod
    def read(cls, record: dict[str, Json]) -> Entry | None:
        """None for a line that is no entry."""
        try:
            usage = record["usage"]
            money = record["money"]
            plain = {name: float(record[name]) for name in ("at", "seconds", "waited", "wall")}
            used = {"usage": None if usage is None else Usage(**usage)}
            exact = {"money": None if money is None else Decimal(money)}
            return cls(**record | used | exact | plain)
        except (TypeError, ValueError, KeyError, InvalidOperation):
            return None


def text(value: Decimal | None) -> str | None:
    """Exact money for JSON."""
    return None if value is None else f"{value:f}"


@dataclass(slots=True)
class Sum:
    """The calls of one role to one model, or all calls.

    Attributes:
        role: see :class:`Entry`; "" for all.
        model: see :class:`Entry`; "" for all.
        calls: finished ones, failures included.
        failures: those with an error.
        retries: over all calls.
        usage: tokens in four classes.
        money: exact, of the calls that have a price.
        unpriced: calls that used tokens of a model that nobody priced.
        failed_money: the part of it that failed calls cost, or can have cost at most.
        over: calls that used more than they had reserved.
        waited: seconds.
        working: seconds without the waits.
        latencies: the same of each call that was answered.
        prices: who said what tokens cost.
    """

    role: str = ""
    model: str = ""
    calls: int = 0
    failures: int = 0
    retries: int = 0
    usage: Usage = Usage()
    money: Decimal = Decimal(0)
    unpriced: int = 0
    failed_money: Decimal = Decimal(0)
    over: int = 0
    waited: float = 0.0
    working: float = 0.0
    latencies: list[float] = field(default_factory=list)
    prices: set[str] = field(default_factory=set)

    @property
    def tokens(self) -> int:
        """Tokens of all classes."""
        return sum(astuple(self.usage))

    def add(self, entry: Entry) -> None:
        """One more call."""
        self.calls += 1
        self.failures += entry.error is not None
        self.retries += entry.retries
        if entry.usage is not None:
            pairs = zip(astuple(self.usage), astuple(entry.usage), strict=True)
            self.usage = Usage(*map(sum, pairs))
            self.unpriced += entry.money is None and entry.tokens > 0
        if entry.error is None:
            self.latencies.append(entry.working)
        self.money += entry.money or 0
        self.failed_money += (entry.money or 0) if entry.error is not None else 0
        self.over += entry.over
        self.waited += entry.waited
        self.working += entry.working
        if entry.price is not None:
            self.prices.add(entry.price)

    def latency(self) -> tuple[float, float] | None:
        """Median and 95th percentile of :attr:`latencies`; None without answers."""
        if not self.latencies:
            return None
        if len(self.latencies) == 1:
            return self.latencies[0], self.latencies[0]
        return median(self.latencies), quantiles(self.latencies, n=20, method="inclusive")[-1]

    def line(self, limits: SpendLimits) -> str:
        """For people, in one line."""
        parts = [f"{self.calls:,}{_of(limits.calls)} calls"]
        parts += [f"{self.failures:,} failed"] if self.failures else []
        parts += [f"{self.unpriced:,} unpriced"] if self.unpriced else []
        parts += [f"{self.tokens:,}{_of(limits.tokens)} tokens"]
        priced = self.money or limits.money is not None or not self.unpriced
        parts += [f"money {self.money:.4f}{_of(limits.money)}"] if priced else []
        return ", ".join(parts)

    def to_json(self) -> dict[str, Json]:
        """Money as text, exact."""
        middle, high = self.latency() or (None, None)
        return {
            "role": self.role,
            "model": self.model,
            "calls": self.calls,
            "failures": self.failures,
            "retries": self.retries,
            "tokens": asdict(self.usage),
            "money": text(self.money),
            "unpriced_calls": self.unpriced,
            "failed_money": text(self.failed_money),
            "over_reservation": self.over,
            "waited_seconds": round(self.waited, 3),
            "working_seconds": round(self.working, 3),
            "latency_median": middle,
            "latency_p95": high,
            "prices": sorted(self.prices),
        }


def _of(limit: Decimal | int | None) -> str:
    return "" if limit is None else f" of {limit:,}"


def read(run: Path) -> list[Entry]:
    """The calls of a run, in the order in which they ended.

    Raises:
        StoreError: the folder has no ledger, or it cannot be read.
    """
    path = run / FILE
    if not path.is_file():
        raise StoreError(f"{run} has no {FILE}: it called no provider, or it is not a run's folder")
    with refusing(path):
        data = path.read_bytes()
    return [entry for record in records(data) if (entry := Entry.read(record)) is not None]


def sums(entries: Iterable[Entry]) -> tuple[list[Sum], Sum]:
    """By role and model, in alphabetical order, and over all."""
    found: dict[tuple[str, str], Sum] = {}
    whole = Sum()
    for entry in entries:
        place = entry.role, entry.model
        found.setdefault(place, Sum(*place)).add(entry)
        whole.add(entry)
    return [found[place] for place in sorted(found)], whole
