"""No limit is ever exceeded, money is exact, and nothing that was paid is forgotten."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
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
from agentdistill import prices as prices_module
from agentdistill.errors import BudgetError, ConfigError, StoreError
from agentdistill.journal import Journal
from agentdistill.ledger import Ledger, Price, SpendLimits
from agentdistill.prices import Prices
from agentdistill.records import Usage
from agentdistill.spending import read
from tests.cli_calls import ROOT, answer, call, refused

CHEAP = Price(Decimal(3), Decimal("3.75"), Decimal("0.3"), Decimal(15))
MODEL = "acme/large"
KNOWN = {MODEL: CHEAP}
MOST = Usage(input=1000, output=100)  # 1000 * 3.75 + 100 * 15 millionths at most
WORST = Decimal("0.00525")


def exactly(usage: Usage) -> Fraction:
    """The bill for ``usage`` of CHEAP, by hand."""
    thousandths = 3000, 300, 3750, 15000  # in the order of Usage's fields
    tokens = zip(astuple(usage), thousandths, strict=True)
    return Fraction(sum(count * price for count, price in tokens), 10**9)


async def pay(ledger: Ledger, usage: Usage = MOST, **more: Any) -> None:
    async with ledger.call("teacher", MODEL, MOST) as one:
        one.settle(usage, **more)


def paid(ledger: Ledger, count: int = 1, **more: Any) -> None:
    async def several() -> None:
        for _ in range(count):
            await pay(ledger, **more)

    asyncio.run(several())


# -- prices ----------------------------------------------------------------------------------------


def test_a_bill_is_exact() -> None:
    usage = Usage(input=1_234_567, cache_read=89, cache_write=1, output=3)
    by_hand = Decimal("3.703701") + Decimal("0.0000267") + Decimal("0.00000375") + Decimal("45e-6")
    assert CHEAP.cost(usage) == by_hand
    assert Price(0.1, 0.2, 0.3, 0.7).cost(Usage(1, 1, 1, 3)) == Decimal("2.7e-6")  # type: ignore[arg-type]
    assert CHEAP.most(MOST) == WORST


@given(st.tuples(*[st.integers(0, 10**6)] * 3), st.permutations((0, 1, 2)), st.integers(0, 10**6))
def test_no_division_of_the_prompt_costs_more_than_the_worst(
    prompt: tuple[int, int, int], order: list[int], above: int
) -> None:
    most, moved = Usage(*prompt, 7), Usage(*(prompt[place] for place in order), 7)
    long = Price(Decimal(1), Decimal(9), Decimal(1), Decimal(20))
    tiered = Price(Decimal(3), Decimal(3), Decimal(4), Decimal(15), above, long)
    for price in (CHEAP, tiered):
        assert price.cost(moved) <= price.most(most)
        assert price.cost(Usage(sum(prompt) // 2, 0, 0, 7)) <= price.most(most)


def test_long_prompts_have_a_price_of_their_own() -> None:
    long = Price(Decimal(6), Decimal(6), Decimal(6), Decimal(30))
    price = Price(Decimal(3), Decimal(3), Decimal(3), Decimal(15), 1000, long)
    assert price.cost(Usage(600, 400)) == Decimal("0.003")
    assert price.cost(Usage(600, 401)) == Decimal("0.006006")


@pytest.mark.parametrize("value", [-1, "much", float("nan"), float("inf")])
def test_what_is_no_price_or_limit_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"price\.output"):
        Price(Decimal(1), Decimal(1), Decimal(1), value)
    with pytest.raises(ConfigError, match=r"budget\.tokens"):
        SpendLimits(tokens=value)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A litellm that may not be imported, with a price table beside its code."""
    models = {
        "big": {"litellm_provider": "acme", "input_cost_per_token": 3e-06,
                "output_cost_per_token": 1.5e-05, "cache_read_input_token_cost": 3e-07,
                "input_cost_per_token_above_200k_tokens": 6e-06,
                "output_cost_per_token_above_200k_tokens": 2.25e-05},
        "acme/full": {"input_cost_per_token": 1e-06, "cache_creation_input_token_cost": 1.25e-06,
                      "output_cost_per_token": 2e-06, "output_cost_per_reasoning_token": 4e-06},
        "acme/zero": {"input_cost_per_token": 0, "output_cost_per_token": 0.0},
        "acme/image": {"output_cost_per_image": 0.04},
    }  # fmt: skip
    (tmp_path / "litellm").mkdir()
    (tmp_path / "litellm" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "litellm" / prices_module._TABLE).write_text(json.dumps(models))
    (tmp_path / "litellm-7.8.9.dist-info").mkdir()
    facts = "Metadata-Version: 2.1\nName: litellm\nVersion: 7.8.9\n"
    (tmp_path / "litellm-7.8.9.dist-info" / "METADATA").write_text(facts)
    monkeypatch.syspath_prepend(str(tmp_path))
    prices_module._litellm.cache_clear()
    yield
    prices_module._litellm.cache_clear()


@pytest.mark.usefixtures("table")
def test_litellm_s_table_is_read_and_named() -> None:
    found = Prices({"acme/own": CHEAP, "acme/full": CHEAP})
    big = found.find("acme/big")
    assert big is not None
    assert big.source == "litellm 7.8.9"
    assert big.price.cost(Usage(10, 20, 30, 40)) == Decimal("0.000726")
    assert big.price.cost(Usage(200_001, 0, 0, 2)) == Decimal("1.200051")
    full = Prices().find("acme/full")
    assert full is not None
    assert full.price == Price(Decimal(1), Decimal("1.25"), Decimal(1), Decimal(4))
    for name in ("acme/own", "acme/full"):
        own = found.find(name)
        assert own is not None
        assert (own.price, own.source) == (CHEAP, "configuration")
    for name in ("other/big", "acme/zero", "acme/image", "acme/none"):
        assert found.find(name) is None
    assert "litellm" not in sys.modules


@pytest.mark.skipif(not prices_module.find_spec("litellm"), reason="needs the package litellm")
def test_the_table_of_the_real_litellm() -> None:
    prices_module._litellm.cache_clear()
    found = Prices().find("anthropic/claude-sonnet-4-5")
    assert found is not None
    assert found.price == Price(Decimal(3), Decimal("3.75"), Decimal("0.3"), Decimal(15))


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


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


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


# -- what is written down --------------------------------------------------------------------------


def test_a_call_counts_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", prices=KNOWN)

    async def main() -> None:
        async with ledger.call("teacher", MODEL, MOST) as one:
            one.settle(Usage(input=5), retries=2)
            with pytest.raises(ValueError, match="already"):
                one.settle(Usage(input=5))
        with pytest.raises(ValueError, match="already"):
            one.fail("late")
        with pytest.raises(ValueError, match="negative"):
            async with ledger.call("teacher", MODEL, Usage(input=-1)):
                pass

    asyncio.run(main())
    (entry,) = read(tmp_path)
    assert (entry.usage, entry.retries, entry.price) == (Usage(input=5), 2, "configuration")
    assert entry.money == Decimal("0.000015")


def test_a_line_is_on_the_disk_before_settle_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, flushed = Ledger(tmp_path / "ledger.jsonl", prices=KNOWN), []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.fstat(file).st_ino))

    async def main() -> None:
        async with ledger.call("teacher", MODEL, MOST) as one:
            one.settle(MOST)
            assert (tmp_path / "ledger.jsonl").stat().st_ino in flushed
            assert tmp_path.stat().st_ino in flushed  # the new name as well

    asyncio.run(main())


def test_failures_stay_without_the_words_of_the_provider(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", prices=KNOWN)

    async def main() -> None:
        async with ledger.call("judge", MODEL, MOST) as one:
            one.retries += 3
            one.waited += 0.5
            raise ConnectionError("Authorization: Bearer sk-secret")

    with pytest.raises(ConnectionError):
        asyncio.run(main())
    (entry,) = read(tmp_path)
    assert (entry.error, entry.retries, entry.waited) == ("ConnectionError", 3, 0.5)
    assert (entry.usage, entry.money) == (None, None)
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not any(b"secret" in content for content in written)


def test_a_provider_that_counts_more_than_was_reserved_is_counted_and_named() -> None:
    ledger = Ledger(None, SpendLimits(tokens=1200), KNOWN)
    paid(ledger, usage=Usage(input=5000))
    assert (ledger.total.tokens, ledger.total.over) == (5000, 1)
    with pytest.raises(BudgetError, match="5000 are spent"):
        paid(ledger)


def test_torn_and_foreign_lines_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, prices=KNOWN) as ledger:
        paid(ledger, 2)
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b'{"calls": 1}\n[]\n' + second[:-1])
    with Ledger(path, prices=KNOWN) as ledger:
        assert ledger.total.calls == 1
        paid(ledger)
        assert ledger.total.calls == 2
    assert len(read(tmp_path)) == 2


def test_a_full_disk_keeps_the_reservation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", SpendLimits(tokens=2000), KNOWN)

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    async def main() -> None:
        async with ledger.call("teacher", MODEL, MOST) as one:
            monkeypatch.setattr(os, "write", full)
            one.settle(MOST)

    with pytest.raises(StoreError, match="free space"):
        asyncio.run(main())
    monkeypatch.undo()
    assert [spend.tokens for spend in ledger._held()] == [1100]
    assert ledger.total.calls == 0


# -- several processes -----------------------------------------------------------------------------


def test_one_at_a_time_reads_and_writes(tmp_path: Path) -> None:
    first, second = (Journal(tmp_path / "some.jsonl") for _ in range(2))
    inside = threading.Event()

    def enter() -> None:
        with second.exclusive():
            inside.set()

    with first.exclusive():
        thread = threading.Thread(target=enter)
        thread.start()
        assert not inside.wait(0.05)
    assert inside.wait(10)
    thread.join()


WORKER = f"""
import asyncio, sys
from decimal import Decimal
from pathlib import Path
from agentdistill.errors import BudgetError
from agentdistill.ledger import Ledger, Price, SpendLimits
from agentdistill.records import Usage

MODEL, MOST = {MODEL!r}, Usage(input=1000, output=100)
price = Price(Decimal(3), Decimal("3.75"), Decimal("0.3"), Decimal(15))
ledger = Ledger(Path(sys.argv[1]), SpendLimits(money=Decimal(sys.argv[2])), {{MODEL: price}})

async def one(settle):
    async with ledger.call("teacher", MODEL, MOST) as call:
        print("sent", flush=True)
        await asyncio.sleep(0.002 if settle else 600)
        call.settle(Usage(cache_write=1000, output=100))

async def main(settled, hanging):
    done = await asyncio.gather(*(one(True) for _ in range(settled)), return_exceptions=True)
    assert all(each is None or isinstance(each, BudgetError) for each in done), done
    await asyncio.gather(*(one(False) for _ in range(hanging)))

asyncio.run(main(int(sys.argv[3]), int(sys.argv[4])))
"""


def start(path: Path, money: Decimal, settled: int, hanging: int) -> subprocess.Popen[str]:
    numbers = map(str, (money, settled, hanging))
    command = [sys.executable, "-c", WORKER, str(path), *numbers]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_two_processes_share_one_limit(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    workers = [start(path, 25 * WORST, 20, 0) for _ in range(2)]
    sent = sum(worker.communicate(timeout=120)[0].count("sent") for worker in workers)
    assert [worker.returncode for worker in workers] == [0, 0]
    entries = read(tmp_path)
    assert sent == len(entries) == len({entry.id for entry in entries}) == 25
    assert sum(entry.money or 0 for entry in entries) == 25 * WORST


def test_a_killed_process_leaves_a_ledger_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    worker = start(path, 9 * WORST, 3, 4)
    assert worker.stdout is not None
    for _ in range(7):
        assert worker.stdout.readline() == "sent\n"
    with Ledger(path, SpendLimits(money=9 * WORST), KNOWN) as ledger:
        assert ledger.total.calls == 3
        paid(ledger, usage=Usage(cache_write=1000, output=100))
        assert sum(spend.money for spend in ledger._held()) == 4 * WORST
        os.kill(worker.pid, signal.SIGKILL)
        worker.communicate()
        paid(ledger, usage=Usage(cache_write=1000, output=100))
        with pytest.raises(BudgetError, match=r"budget\.money"):
            paid(ledger)
    entries = read(tmp_path)
    lost = [entry for entry in entries if entry.error == "process died"]
    # The provider may charge for them, and a hard limit takes no chances.
    assert [(entry.usage, entry.money) for entry in lost] == [(MOST, WORST)] * 4
    assert sum(entry.money or 0 for entry in entries) == 9 * WORST
    assert len(entries) == 9
    assert not list((tmp_path / "ledger.open").iterdir())


def test_a_process_that_died_before_any_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    worker = start(path, WORST, 0, 1)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "sent\n"
    worker.kill()
    worker.communicate()
    with Ledger(path, SpendLimits(money=WORST), KNOWN) as ledger:
        for _ in range(2):
            with pytest.raises(BudgetError, match=r"budget\.money"):
                paid(ledger)
    assert [entry.error for entry in read(tmp_path)] == ["process died"]


def test_a_call_that_was_written_down_is_not_lost_as_well(tmp_path: Path) -> None:
    """The process died after the line and before it could say that nothing is open any more."""
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, prices=KNOWN) as ledger:
        paid(ledger)
    (entry,) = read(tmp_path)
    names = ("role", "model", "usage", "money", "price", "seconds")
    held = {name: value for name, value in entry.to_json().items() if name in names}
    (tmp_path / "ledger.open").mkdir(exist_ok=True)
    left = json.dumps({entry.id: held, "other": held})
    (tmp_path / "ledger.open" / "1-dead.json").write_text(f"{left}\nrest of an older one")
    (tmp_path / "ledger.open" / "2-dead.json").write_text('{"tor')
    with Ledger(path, prices=KNOWN) as ledger:
        paid(ledger)
    assert [each.error for each in read(tmp_path)] == [None, "process died", None]


def test_a_forked_child_shares_nothing_but_the_file(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", SpendLimits(calls=3), KNOWN)

    async def main() -> None:
        async with ledger.call("teacher", MODEL, MOST) as one:
            child = os.fork()
            if child == 0:
                os._exit(_in_child(ledger))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            one.settle(MOST)

    asyncio.run(main())
    paid(ledger)
    assert ledger.total.calls == 3


def _in_child(ledger: Ledger) -> int:
    codes: list[int] = []

    def work() -> None:
        paid(ledger)
        codes.append(0)

    thread = threading.Thread(target=work)  # a loop runs in this thread already
    thread.start()
    thread.join(30)
    return 0 if codes == [0] and ledger.total.calls == 1 else 1


# -- the verb --------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    clock = Clock()

    async def main() -> None:
        with Ledger(tmp_path / "ledger.jsonl", prices=KNOWN, clock=clock) as ledger:
            for seconds, error in ((1.0, None), (2.0, None), (9.0, None), (3.0, "lost")):
                async with ledger.call("teacher", MODEL, MOST) as one:
                    usage = Usage(1000, 200, 30, 4)
                    one.settle(usage, seconds=seconds, waited=0.5, retries=1, error=error)
            async with ledger.call("student", "acme/unknown", MOST) as one:
                one.settle(Usage(7), error="malformed")
            async with ledger.call("teacher", MODEL, MOST):
                pass

    asyncio.run(main())
    return tmp_path


def test_cost(run: Path) -> None:
    found = answer("cost", str(run))
    student, teacher = found["by"]
    assert (teacher["role"], teacher["model"]) == ("teacher", MODEL)
    assert teacher["tokens"] == {"input": 4000, "cache_read": 800, "cache_write": 120, "output": 16}
    assert Decimal(teacher["money"]) == Decimal("0.01293")
    assert [teacher[k] for k in ("calls", "failures", "retries")] == [5, 2, 4]
    assert (teacher["waited_seconds"], teacher["latency_median"]) == (2.0, 1.5)
    assert (teacher["prices"], student["prices"]) == (["configuration"], [])
    assert [student[k] for k in ("calls", "failures", "unpriced_calls")] == [1, 1, 1]
    assert Decimal(found["all"]["money"]) == Decimal("0.01293")
    assert Decimal(teacher["failed_money"]) == Decimal("0.0032325")
    text = call("cost", str(run)).stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["student", "acme/unknown", "1", "1", "0", "7", "0", "0", "0", "unpriced"] in [
        row[:10] for row in rows
    ]
    assert "Prices from configuration: acme/large." in text
    assert "Unpriced, in no sum: acme/unknown (calls: 1)." in text
    assert "0.00323 of it is for calls that failed" in text


def test_cost_without_a_ledger(tmp_path: Path) -> None:
    assert "has no ledger.jsonl" in refused(5, "cost", str(tmp_path))
