"""The store shows what was committed, whatever happened to the disk, and nothing else."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentdistill.errors import ConfigError, StoreError
from agentdistill.store import ShardRef, Store
from tests.store_worker import ROOT, batch, image

# -- what counts -----------------------------------------------------------------------------------


def commit(store: Store, iteration: int, stage: str = "train", weights: str = "") -> ShardRef:
    ref = store.write(stage, iteration, batch(iteration, weights))
    store.commit(stage, iteration, [ref], {"loss": 0.5, "weights": weights})
    return ref


def steps(store: Store, stage: str | None = "train") -> list[int]:
    return [found.iteration for found in store.commits(stage)]


def test_only_commits_count(run_dir: Path) -> None:
    with Store(run_dir) as store:
        first = commit(store, 0)
        orphan = store.write("train", 1, batch(1))
        other = commit(store, 0, stage="eval")
    with Store(run_dir, readonly=True) as store:
        assert [found.shards for found in store.commits("train")] == [(first,)]
        assert store.commits("train")[0].info == {"loss": 0.5, "weights": ""}
        assert image(store.read(("train", 0))) == image(batch(0)) == image(store.read(first))
        assert image(store.read(("train", 1))) == image(batch(1))
        assert store.shard("train", 1) == orphan
        assert store.shard("eval", 0) == other
        assert store.shard("eval", 1) is None
        assert image(store.trajectories()) == image(batch(0) + batch(0))
        assert image(store.trajectories("train", None)) == image(batch(0) + batch(1))
        assert image(store.trajectories(committed=False)) == image(batch(1))
        assert list(store.trajectories("eval", committed=False)) == []
        assert store.report() == {
            "iterations": 2,
            "committed": 4,
            "uncommitted": 2,
            "torn_lines": 0,
            "orphan_shards": 1,
            "corrupt_shards": 0,
            "missing_shards": 0,
        }
        with pytest.raises(StoreError, match="no complete shard of train 7"):
            store.read(("train", 7))


def test_the_last_line_wins_and_the_old_shard_stays(run_dir: Path) -> None:
    with Store(run_dir) as store:
        old = commit(store, 0)
        commit(store, 1)
        new = commit(store, 0, weights="other")
        assert steps(store) == [1, 0]
        assert store.commits("train")[1].shards == (new,)
        assert image(store.read(old)) == image(batch(0))
        assert store.shard("train", 0) == new
        assert store.report()["uncommitted"] == 2
        assert store.write("train", 0, batch(0)) == old


def test_several_shards_in_one_commit(run_dir: Path) -> None:
    with Store(run_dir) as store:
        refs = [store.write("train", 0, batch(number)) for number in (0, 1)]
        store.commit("train", 0, refs, {})
        assert image(store.read(("train", 0))) == image(batch(0) + batch(1))
        store.commit("score", 0, refs[:1], {})
        assert len(list(store.trajectories())) == 4


def test_rollback_uncommits_what_is_later_in_its_stage(run_dir: Path) -> None:
    with Store(run_dir) as store:
        for iteration in range(4):
            commit(store, iteration)
        commit(store, 3, stage="eval")
        store.rollback("train", 1)
        assert (steps(store), steps(store, "eval")) == ([0, 1], [3])
        assert store.report()["uncommitted"] == 4
        commit(store, 2)
        assert steps(store) == [0, 1, 2]
        store.rollback("train", -1)
        assert steps(store, None) == [3]


def test_a_commit_needs_its_shards(run_dir: Path) -> None:
    with Store(run_dir) as store:
        with pytest.raises(StoreError, match="is gone"):
            store.commit("train", 0, [ShardRef("train-00000000-0.npz", 1, "")], {})
        assert store.commits() == []


@pytest.mark.parametrize(("stage", "iteration"), [("a/b", 0), ("", 0), ("a-b", 0), ("a", -1)])
def test_impossible_names_are_refused(run_dir: Path, stage: str, iteration: int) -> None:
    with Store(run_dir) as store, pytest.raises(ConfigError, match=r"stage=|iteration="):
        store.write(stage, iteration, [])


def test_foreign_files_are_left_alone(run_dir: Path) -> None:
    with Store(run_dir) as store:
        commit(store, 0)
    foreign = run_dir / "shards" / "notes.npz"
    foreign.write_text("mine")
    leftover = run_dir / "shards" / ".train-00000001-0123456789abcdef.npz.7.tmp"
    leftover.write_text("half")
    with Store(run_dir) as store:
        assert store.report()["corrupt_shards"] == 0
        assert foreign.read_text() == "mine"
        assert not leftover.exists()


# -- damage ----------------------------------------------------------------------------------------


def test_torn_at_every_byte(run_dir: Path) -> None:
    with Store(run_dir) as store:
        first = commit(store, 0)
        log = run_dir / "commits.jsonl"
        begin = log.stat().st_size
        second = commit(store, 1)
        whole = log.read_bytes()
        for end in range(begin, len(whole)):
            log.write_bytes(whole[:end])
            torn = int(end > begin)
            assert (steps(store), store.report()["torn_lines"]) == ([0], torn)
            store.commit("eval", 5, [first], {})
            assert (steps(store), steps(store, "eval")) == ([0], [5])
            store.commit("train", 1, [second], {})
            assert (steps(store), store.report()["torn_lines"]) == ([0, 1], torn)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\x00" * 40,
        b"\xff\xfe",
        b"[]",
        b"3",
        b'{"stage": "train"}',
        b'{"stage": "train", "iteration": 9, "shards": [{"name": 1}], "info": {}}',
        b'{"stage": "train", "iteration": null, "shards": [], "info": {}}',
        b"[" * 100_000,
    ],
)
def test_malformed_lines_are_counted(run_dir: Path, line: bytes) -> None:
    with Store(run_dir) as store:
        commit(store, 0)
        with (run_dir / "commits.jsonl").open("ab") as log:
            log.write(line + b"\n")
        commit(store, 1)
        assert steps(store) == [0, 1]
        assert store.report()["torn_lines"] == 1


def test_damaged_shards(run_dir: Path) -> None:
    with Store(run_dir) as store:
        good = commit(store, 0)
        lost = commit(store, 1)
        orphan = store.write("train", 2, batch(2))
        for ref in (good, orphan):
            path = run_dir / "shards" / ref.name
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        (run_dir / "shards" / lost.name).unlink()
        assert store.shard("train", 2) is None
        assert list(store.trajectories(committed=False)) == []
        report = store.report()
        assert (report["corrupt_shards"], report["missing_shards"]) == (2, 1)
        assert report["uncommitted"] == 0
        with pytest.raises(StoreError, match=rf"{good.name} is damaged.*roll back"):
            list(store.trajectories())
        with pytest.raises(StoreError, match=lost.name):
            store.read(lost)
        assert store.write("train", 0, batch(0)) == good
        assert image(store.read(good)) == image(batch(0))


def refuse(number: int):
    def function(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    return function


@pytest.mark.parametrize(
    ("call", "number", "remedy"),
    [
        ("fsync", errno.ENOSPC, "No space left on device; free space"),
        ("fsync", errno.EIO, "Input/output error; check the disk"),
        ("replace", errno.EACCES, "Permission denied; make it writable"),
    ],
)
def test_refused_shard_leaves_no_trace(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, remedy: str
) -> None:
    with Store(run_dir) as store:
        ref = commit(store, 0)
        before = (run_dir / "shards" / ref.name).stat()
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse(number))
            for iteration in (0, 1):
                with pytest.raises(StoreError, match=remedy) as caught:
                    store.write("train", iteration, batch(iteration))
                assert str(run_dir) in str(caught.value)
                assert "\n" not in str(caught.value)
        assert os.listdir(run_dir / "shards") == [ref.name]
        assert (run_dir / "shards" / ref.name).stat() == before
        assert store.shard("train", 1) is None


def test_everything_is_flushed_before_it_counts(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flush(descriptor: int) -> None:
        calls.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name[:6]}")
        fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    with Store(run_dir) as store, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", flush)
        patch.setattr(os, "replace", rename)
        commit(store, 0)
    assert calls == ["flush .train", "rename", "flush shards", "flush commit"]


def test_refused_commit_line_does_not_count(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    with Store(run_dir) as store:
        ref = commit(store, 0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda fd, data: real(fd, data[: len(data) // 3]))
            with pytest.raises(StoreError, match=r"commits\.jsonl.*free space"):
                store.commit("train", 1, [ref], {})
        assert steps(store) == [0]
        store.commit("train", 2, [ref], {})
        assert steps(store) == [0, 2]
        assert store.report()["torn_lines"] == 1


def test_full_disk_for_real(run_dir: Path) -> None:
    code = f"""
import resource
from agentdistill.errors import StoreError
from agentdistill.store import Store
from tests.store_worker import batch
with Store({str(run_dir)!r}) as store:
    store.commit("train", 0, [store.write("train", 0, batch(0))], {{}})
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
    try:
        store.write("train", 1, batch(1, size=50))
    except StoreError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "File too large; raise the limit" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
    with Store(run_dir, readonly=True) as store:
        assert len(os.listdir(run_dir / "shards")) == 1
        assert image(store.read(("train", 0))) == image(batch(0))


def test_a_run_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot use .*file: .*; check"):
        Store(tmp_path / "file")
    with pytest.raises(StoreError, match="there is no run directory"):
        Store(tmp_path / "absent", readonly=True)
    assert not (tmp_path / "absent").exists()


# -- one writer ------------------------------------------------------------------------------------


def test_second_process_is_told_who_writes(run_dir: Path) -> None:
    code = f"""
import sys
from agentdistill.store import Store
with Store({str(run_dir)!r}) as store:
    print("locked", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(StoreError, match=rf"in use by process {holder.pid} on .*end it"):
            Store(run_dir)
        with Store(run_dir, readonly=True) as reader:
            assert reader.commits() == []
            with pytest.raises(StoreError, match="reading only"):
                reader.write("train", 0, [])
            with pytest.raises(StoreError, match="reading only"):
                reader.rollback("train", 0)
        holder.kill()
    with Store(run_dir) as store:
        commit(store, 0)


def test_a_forked_child_does_not_hold_the_lock(run_dir: Path) -> None:
    code = f"""
import os, sys
from agentdistill.errors import StoreError
from agentdistill.store import Store
store = Store({str(run_dir)!r})
child = os.fork()
if child == 0:
    try:
        store.write("train", 0, [])
    except StoreError as error:
        print(error, flush=True)
    sys.stdin.read()
    os._exit(0)
os.kill(os.getpid(), 9)
"""
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as parent:
        assert b"reading only" in parent.stdout.readline()
        assert parent.wait() == -signal.SIGKILL
        with Store(run_dir) as store:  # the child is still alive
            commit(store, 0)


def test_closing_frees_the_lock(run_dir: Path) -> None:
    store = Store(run_dir)
    with pytest.raises(StoreError, match=str(os.getpid())):
        Store(run_dir)
    store.close()
    store.close()
    with Store(run_dir) as again:
        commit(again, 0)
        assert steps(store) == [0]
