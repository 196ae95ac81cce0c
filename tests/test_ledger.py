"""No limit is ever exceeded, whatever runs at the same time."""

from __future__ import annotations

import asyncio
import pickle
import random
import time
from dataclasses import astuple
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agentdistill.cli.cost  # noqa: F401  (adds its verb)
from agentdistill.errors import BudgetError, ConfigError
from agentdistill.ledger import Ledger, SpendLimits
from agentdistill.records import Usage
from agentdistill.spending import read
from tests.bills import KNOWN, MODEL, MOST, WORST, Clock, exactly, paid, pay

# -- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "fit"),
    [
        ({"money": 2 * WORST}, 2),
        ({"money": 2 * WORST - Decimal("1e-12")}, 1),
        ({"money": 0}, 0),
        ({"tokens": 2200}, 2),
        ({"tokens": 2199}, 1),
        ({"calls": 3}, 3),
        ({"calls": 0}, 0),
    ],
)
def test_the_call_that_would_break_a_limit_is_not_made(limits: dict[str, Any], fit: int) -> None:
    ledger = Ledger(None, SpendLimits(**limits), KNOWN)
    # Written to a cache at 3.75, the prompt costs what was reserved.
    full = Usage(cache_write=1000, output=100)
    paid(ledger, fit, usage=full)
    (name,) = limits
    with pytest.raises(BudgetError, match=rf"^budget\.{name}=\S+: .*raise that limit") as caught:
        paid(ledger)
    assert ledger.total.calls == fit
    assert caught.value.exit_code == 6
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.limit) == (str(caught.value), f"budget.{name}")


def test_a_call_that_may_fit_later_waits_and_one_that_cannot_is_refused() -> None:
    ledger = Ledger(None, SpendLimits(money=3 * WORST), KNOWN)
    order: list[str] = []

    async def one(name: str, seconds: float) -> None:
        async with ledger.call("teacher", MODEL, MOST) as mine:
            order.append(name)
            await asyncio.sleep(seconds)
            mine.settle(Usage(input=10, output=1))

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for name in "abcdefgh":
                group.create_task(one(name, 0.02 if name < "d" else 0.0))
            await asyncio.sleep(0.005)
            assert order == ["a", "b", "c"]
            with pytest.raises(BudgetError, match=r"budget\.money"):
                async with ledger.call("teacher", MODEL, Usage(input=10**6)):
                    raise AssertionError("this was sent")

    asyncio.run(main())
    assert order == list("abcdefgh")
    assert Fraction(ledger.total.money) == 8 * exactly(Usage(input=10, output=1))


def test_a_call_within_a_call_never_waits() -> None:
    ledger = Ledger(None, SpendLimits(tokens=2000), KNOWN)

    async def main() -> None:
        async with ledger.call("teacher", MODEL, MOST) as outer:
            with pytest.raises(BudgetError, match="in flight"):
                await asyncio.create_task(pay(ledger))
            outer.settle(Usage(input=900))
            await pay(ledger)

    asyncio.run(asyncio.wait_for(main(), 5))
    assert [ledger.total.calls, ledger.total.tokens] == [2, 2000]


def test_a_call_in_flight_counts_as_a_call_whatever_becomes_of_it() -> None:
    ledger = Ledger(None, SpendLimits(calls=1), KNOWN)

    async def main() -> None:
        first = asyncio.create_task(hang(ledger))
        await asyncio.sleep(0)
        with pytest.raises(BudgetError, match=r"budget\.calls=1: 1 are spent"):
            await asyncio.wait_for(pay(ledger), 5)
        first.cancel()

    asyncio.run(main())


async def hang(ledger: Ledger) -> None:
    async with ledger.call("teacher", MODEL, MOST):
        await asyncio.sleep(600)


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.booleans(), st.integers(1, 40), st.integers(1, 60))
def test_no_interleaving_exceeds_a_limit(
    seed: int, with_money: bool, worst_calls: int, calls: int
) -> None:
    tokens = worst_calls * sum(astuple(MOST))
    money = worst_calls * WORST * Decimal("0.8")
    limits = SpendLimits(money=money if with_money else None, tokens=tokens, calls=calls)
    ledger = Ledger(None, limits, KNOWN)
    asyncio.run(_storm(ledger, random.Random(seed), workers=32, each=3))


def test_no_interleaving_exceeds_a_limit_with_a_file(tmp_path: Path) -> None:
    limits = SpendLimits(money=30 * WORST, tokens=40 * 1100, calls=90)
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, limits, KNOWN) as ledger:
        made = asyncio.run(_storm(ledger, random.Random(1), workers=32, each=3))
        assert len(read(tmp_path)) == made == ledger.total.calls
    with Ledger(path, limits, KNOWN) as again:
        assert again._spent == ledger._spent
        assert again.total.money == ledger.total.money
    assert not list((tmp_path / "ledger.open").iterdir())


async def _storm(ledger: Ledger, rng: random.Random, *, workers: int, each: int) -> int:
    """Concurrent calls with every end there is, watched by accounts of our own."""
    limits, flying, bills = ledger.limits, dict[int, tuple[Fraction, int]](), list[Usage]()
    made = 0

    def watch() -> None:
        spent = sum(map(exactly, bills), Fraction()) + sum(f[0] for f in flying.values())
        tokens = sum(sum(astuple(u)) for u in bills) + sum(f[1] for f in flying.values())
        assert limits.money is None or spent <= Fraction(limits.money)
        assert limits.tokens is None or tokens <= limits.tokens
        assert limits.calls is None or made <= limits.calls

    async def one() -> None:
        nonlocal made
        most = Usage(rng.randrange(1000), rng.randrange(10), rng.randrange(100), rng.randrange(200))
        async with ledger.call("teacher", MODEL, most) as call:
            made += 1
            prompt, place = sum(astuple(most)[:3]), id(call)
            flying[place] = Fraction(prompt * 3750 + most.output * 15000, 10**9), sum(astuple(most))
            watch()
            try:
                for _ in range(rng.randrange(6)):
                    await asyncio.sleep(0)
                end = rng.randrange(5)
                if end == 0:
                    raise ConnectionError("dropped")
                if end == 1:
                    asyncio.current_task().cancel()  # type: ignore[union-attr]
                    await asyncio.sleep(0)
                if end > 2:  # else it ends unsettled
                    read_from_cache = rng.randrange(prompt + 1)
                    usage = Usage(prompt - read_from_cache, read_from_cache, 0, most.output // 2)
                    call.settle(usage)
                    bills.append(usage)
            finally:
                del flying[place]
        watch()

    async def work() -> None:
        for _ in range(each):
            try:
                await one()
            except (BudgetError, ConnectionError):
                pass
            except asyncio.CancelledError:
                asyncio.current_task().uncancel()  # type: ignore[union-attr]

    await asyncio.wait_for(asyncio.gather(*(work() for _ in range(workers))), 60)
    assert Fraction(ledger.total.money) == sum(map(exactly, bills), Fraction())
    assert ledger.total.tokens == sum(sum(astuple(usage)) for usage in bills)
    assert (ledger.total.calls, ledger.total.failures) == (made, made - len(bills))
    assert not list(ledger._held())  # nothing stays reserved
    return made


# -- money without a price -------------------------------------------------------------------------


def test_a_model_that_nobody_priced(tmp_path: Path) -> None:
    async def ask(ledger: Ledger) -> None:
        async with ledger.call("student", "acme/unknown", MOST) as one:
            one.settle(MOST)

    limited = Ledger(tmp_path / "ledger.jsonl", SpendLimits(money=Decimal(1)), KNOWN)
    with pytest.raises(ConfigError, match=r"model='acme/unknown': .*give it a price"):
        asyncio.run(ask(limited))
    assert not (tmp_path / "ledger.jsonl").exists()
    free = Ledger(tmp_path / "ledger.jsonl", SpendLimits(tokens=10_000), KNOWN)
    asyncio.run(ask(free))
    assert (free.total.unpriced, free.total.money, free.total.tokens) == (1, 0, 1100)
    assert free.line() == "1 calls, 1 unpriced, 1,100 of 10,000 tokens"
    with pytest.raises(ConfigError, match="acme/unknown"):  # its past calls cannot be counted
        paid(limited)


# -- time ------------------------------------------------------------------------------------------


def test_working_time_excludes_waiting_for_a_provider(tmp_path: Path) -> None:
    clock = Clock()
    limits = SpendLimits(working_seconds=5)
    ledger = Ledger(tmp_path / "ledger.jsonl", limits, KNOWN, clock=clock)

    async def ask(seconds: float, waited: float) -> None:
        async with ledger.call("teacher", MODEL, MOST, seconds=2.0) as one:
            clock.now += seconds
            one.waited += waited
            one.settle(MOST)

    for _ in range(2):
        asyncio.run(ask(1000.5, 999.0))
    assert ledger.wall == pytest.approx(2001)
    assert [ledger.total.working, ledger.total.waited] == [3.0, 1998.0]
    asyncio.run(ask(2.0, 1.0))
    with pytest.raises(BudgetError, match=r"working_seconds=5: 4\.0 are spent.* 2\.0"):
        asyncio.run(ask(0, 0))
    with pytest.raises(BudgetError, match="working_seconds"):
        paid(Ledger(tmp_path / "ledger.jsonl", SpendLimits(working_seconds=4)))


def test_wall_time_goes_on_after_a_restart_and_not_between(tmp_path: Path) -> None:
    path, clock = tmp_path / "ledger.jsonl", Clock()
    with Ledger(path, prices=KNOWN, clock=clock) as ledger:
        clock.now += 8
        paid(ledger)
    clock.now += 10**6
    with Ledger(path, SpendLimits(wall_seconds=10), KNOWN, clock=clock) as ledger:
        assert ledger.wall == pytest.approx(8)
        paid(ledger)
        clock.now += 2.5
        with pytest.raises(BudgetError, match=r"wall_seconds=10: 10\.5 are gone"):
            paid(ledger)


def test_wall_time_ends_a_call_in_flight() -> None:
    ledger = Ledger(None, SpendLimits(wall_seconds=0.05), KNOWN)

    started = time.monotonic()
    with pytest.raises(BudgetError, match=r"budget\.wall_seconds=0\.05: it ran out"):
        asyncio.run(hang(ledger))
    assert time.monotonic() - started < 5
    assert ledger.total.failures == 1


def test_a_timeout_of_the_caller_is_no_budget() -> None:
    ledger = Ledger(None, SpendLimits(wall_seconds=60), KNOWN)

    async def main() -> None:
        async with ledger.call("teacher", MODEL, MOST), asyncio.timeout(0.001):
            await asyncio.sleep(30)

    with pytest.raises(TimeoutError):
        asyncio.run(main())
