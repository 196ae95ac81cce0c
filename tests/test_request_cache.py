"""A paid answer is never paid twice."""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentdistill import request_cache
from agentdistill.request_cache import RequestCache, payload_key
from tests.cli_calls import ROOT

KEY = payload_key({"model": "m", "messages": [{"role": "user", "content": "hi"}]})


@pytest.fixture(params=["memory", "disk"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> RequestCache:
    return RequestCache(tmp_path / "answers" if request.param == "disk" else None)


def test_the_order_of_names_does_not_matter_and_everything_else_does() -> None:
    assert payload_key({"a": 1, "b": [2, {"c": "d"}]}) == payload_key(
        {"b": [2, {"c": "d"}], "a": 1}
    )
    others = [
        {"a": 1, "b": [2]},
        {"a": 1.0, "b": 2},
        {"a": "1", "b": 2},
        {"a": 1, "b": 2, "c": None},
    ]
    assert len({payload_key(each) for each in [*others, {"a": 1, "b": 2}]}) == 5
    assert len(KEY) == 64


def test_what_was_put_is_there_and_stays(cache: RequestCache) -> None:
    assert cache.get(KEY) is None
    answer = {"text": "Grüße \u2713 \ud800", "logp": [-0.5], "nothing": None}
    cache.put(KEY, answer)
    answer["text"] = "changed afterwards"
    cache.put(KEY, {"text": "another"})
    assert cache.get(KEY) == {"text": "Grüße \u2713 \ud800", "logp": [-0.5], "nothing": None}
    assert cache.get(payload_key("other")) is None
    if cache.folder is not None:
        assert RequestCache(cache.folder).get(KEY) == cache.get(KEY)


def test_what_is_no_answer_is_refused_and_leaves_nothing(cache: RequestCache) -> None:
    for wrong in (None, object()):
        with pytest.raises(TypeError):
            cache.put(KEY, wrong)
    assert cache.get(KEY) is None


@pytest.mark.parametrize("damage", [b"", b'{"answer": {"te', b"{}", b"\xff\xfe", b"[1]"])
def test_a_damaged_answer_is_asked_for_again(damage: bytes, tmp_path: Path) -> None:
    cache = RequestCache(tmp_path)
    cache.put(KEY, "first")
    (file,) = tmp_path.rglob("*.json")
    file.write_bytes(damage)
    assert cache.get(KEY) is None
    cache.put(KEY, "second")
    assert cache.get(KEY) == "second"


def test_of_many_who_ask_the_same_one_pays(cache: RequestCache) -> None:
    paid = []

    async def ask() -> str:
        paid.append(1)
        await asyncio.sleep(0.01)
        return "answer"

    async def main() -> list[tuple[str, bool]]:
        return await asyncio.gather(*(cache.answer(KEY, ask) for _ in range(32)))

    found = asyncio.run(main())
    assert (len(paid), [fresh for _, fresh in found].count(True)) == (1, 1)
    assert {text for text, _ in found} == {"answer"}
    assert asyncio.run(cache.answer(KEY, ask)) == ("answer", False)


def test_others_do_not_wait_for_a_different_question(cache: RequestCache) -> None:
    started = []

    async def one(name: str) -> None:
        async def ask() -> str:
            started.append(name)
            while len(started) < 8:
                await asyncio.sleep(0.001)
            return name

        await cache.answer(payload_key(name), ask)

    async def main() -> None:
        await asyncio.wait_for(asyncio.gather(*map(one, "abcdefgh")), 10)

    asyncio.run(main())
    assert sorted(started) == list("abcdefgh")


def test_when_asking_fails_the_next_one_asks(cache: RequestCache) -> None:
    tries = []

    async def ask() -> str:
        tries.append(1)
        await asyncio.sleep(0)
        if len(tries) < 3:
            raise ConnectionError
        return "answer"

    async def main() -> list[object]:
        asked = (cache.answer(KEY, ask) for _ in range(5))
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(main())
    assert [type(each).__name__ for each in found] == ["ConnectionError"] * 2 + ["tuple"] * 3
    assert len(tries) == 3


def test_two_caches_over_one_folder_pay_once(tmp_path: Path) -> None:
    paid = []

    async def ask() -> str:
        paid.append(1)
        await asyncio.sleep(0.03)
        return "answer"

    async def main() -> None:
        caches = [RequestCache(tmp_path) for _ in range(4)]
        await asyncio.gather(*(cache.answer(KEY, ask) for cache in caches))

    asyncio.run(main())
    assert len(paid) == 1
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".json"]


def test_a_lock_whose_name_is_gone_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking, the one before us finished and a third one came."""
    path, real = tmp_path / "some.lock", fcntl.flock

    def slow(file: int, how: int) -> None:
        path.unlink()
        path.touch()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    assert request_cache._lock(path) is None
    monkeypatch.undo()
    lock = request_cache._lock(path)
    assert lock is not None
    assert request_cache._lock(path) is None
    os.close(lock)


WORKER = """
import asyncio, sys, time
from pathlib import Path
from agentdistill.request_cache import RequestCache, payload_key

cache, hang = RequestCache(Path(sys.argv[1])), sys.argv[2] == "hang"

async def ask():
    print("paid", flush=True)
    await asyncio.sleep(600 if hang else 0.002)
    return "answer"

async def main():
    for number in range(20):
        assert (await cache.answer(payload_key(number), ask))[0] == "answer"

asyncio.run(main())
"""


def start(folder: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(folder), how]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_two_processes_pay_once(tmp_path: Path) -> None:
    workers = [start(tmp_path, "quick") for _ in range(2)]
    paid = sum(worker.communicate(timeout=60)[0].count("paid") for worker in workers)
    assert [worker.returncode for worker in workers] == [0, 0]
    assert paid == 20


def test_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
    hanging = start(tmp_path, "hang")
    assert hanging.stdout is not None
    assert hanging.stdout.readline() == "paid\n"
    hanging.kill()
    hanging.communicate()
    quick = start(tmp_path, "quick")
    assert quick.communicate(timeout=60)[0].count("paid") == 20
    assert not list(tmp_path.rglob("*.lock"))
