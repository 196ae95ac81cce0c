"""Nothing that was paid is forgotten: one line per call, shared by processes; `cost` reads it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path

import pytest

import agentdistill.cli.cost  # noqa: F401  (adds its verb)
from agentdistill.errors import BudgetError, StoreError
from agentdistill.journal import Journal
from agentdistill.ledger import Ledger, SpendLimits
from agentdistill.records import Usage
from agentdistill.spending import read
from tests.bills import KNOWN, MODEL, MOST, WORST, Clock, paid
from tests.cli_calls import ROOT, answer, call, refused

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
