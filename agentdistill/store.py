"""The run directory: trajectories in shards, one commit line per finished iteration.

Invariants
----------
* The iteration is the transaction: its shards are complete on the disk before its line is appended
  to ``commits.jsonl``; what has no line did not happen. Nothing is ever rewritten in place.
* A shard is one file, named after its stage, iteration and content; it appears under its name
  complete or not at all. Writing the same trajectories again gives the same file.
* Only a line that ends in a newline counts. Torn and malformed lines are ignored and counted; the
  next append closes a torn one in a way that can never turn it into a commit.
* Of several lines for the same stage and iteration the last one wins. A rollback line uncommits
  the later iterations of its stage; their shards stay, as uncommitted data.
* One process writes (``lock``); any number may read meanwhile with ``readonly=True``.
* Everything that the disk refuses is a StoreError of one line that names the path and the remedy.

Layout: ``commits.jsonl``, ``lock``, ``shards/<stage>-<iteration>-<hash>.npz`` (see ``codec``).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from agentdistill import codec
from agentdistill.crash import crash_point
from agentdistill.errors import ConfigError, StoreError
from agentdistill.files import locked, refusing, replacing, sync
from agentdistill.records import Json, Trajectory

_NAME = re.compile(r"(?P<stage>\w+)-(?P<iteration>\d{8,})-(?P<hash>[0-9a-f]{16})\.npz", re.ASCII)

_TORN = b" #torn\n"
"""Closes a torn line; a line that only lacked its newline must not become a commit by it."""


@dataclass(frozen=True, slots=True)
class ShardRef:
    """A shard: file name, number of trajectories, hexadecimal SHA-256 of the file."""

    name: str
    count: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Commit:
    """One finished iteration of a stage."""

    stage: str
    iteration: int
    shards: tuple[ShardRef, ...]
    info: Mapping[str, Json]


class Store:
    """The trajectories of one run; see the module docstring for what holds.

    Use it as a context manager, or call :meth:`close` to free the lock early.
    """

    def __init__(self, path: str | Path, *, readonly: bool = False) -> None:
        """Open the run directory ``path``; make it unless ``readonly``.

        Raises:
            StoreError: another process writes to it, or the disk refuses.
        """
        self.path = Path(path)
        self._shards = self.path / "shards"
        self._log = self.path / "commits.jsonl"
        self._lock: BinaryIO | None = None
        with refusing(self.path):
            if not readonly:
                self._prepare()
            elif not self.path.is_dir():
                raise StoreError(f"there is no run directory {self.path}: check the path")

    def _prepare(self) -> None:
        self._shards.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self.path / "lock")
        _WRITERS.add(self)
        self._log.touch()
        sync(self.path)
        for leftover in self._shards.glob(".*.tmp"):
            leftover.unlink()

    def close(self) -> None:
        """Let others write; this store can still read."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Store:
        """Itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    # -- writing ----------------------------------------------------------------------------------

    def write(self, stage: str, iteration: int, trajectories: Iterable[Trajectory]) -> ShardRef:
        """Write a shard; it belongs to the run only when :meth:`commit` names it.

        Raises:
            ConfigError: a stage that is not letters, digits and underscores; iteration < 0.
            StoreError: the disk refuses, or this store only reads.
            TypeError: a trajectory cannot be kept exactly (see ``codec``).
        """
        self._check(stage, iteration)
        batch = list(trajectories)
        data = codec.pack(batch)
        sha256 = hashlib.sha256(data).hexdigest()
        name = f"{stage}-{iteration:08d}-{sha256[:16]}.npz"
        with replacing(self._shards / name, "shard") as file:
            file.write(data)
        return ShardRef(name, len(batch), sha256)

    def commit(
        self, stage: str, iteration: int, shards: Sequence[ShardRef], info: Mapping[str, Json]
    ) -> None:
        """Append the line that makes the iteration happen; ``info`` is any JSON.

        Raises:
            ConfigError: as in :meth:`write`.
            StoreError: the disk refuses, a shard is not there, or this store only reads.
        """
        self._check(stage, iteration)
        for ref in shards:
            if not (self._shards / ref.name).is_file():
                raise StoreError(f"{self._shards / ref.name} is gone: write the shard again")
        commit = Commit(stage, iteration, tuple(shards), dict(info))
        crash_point("commit:before")
        self._append(asdict(commit))
        crash_point("commit:after")

    def rollback(self, stage: str, iteration: int) -> None:
        """Uncommit every iteration of ``stage`` after ``iteration`` (-1: all of them).

        For a run that goes on from an older checkpoint. Raises as :meth:`commit`.
        """
        self._check(stage, max(iteration, 0))
        self._append({"stage": stage, "rollback": iteration})

    def _check(self, stage: str, iteration: int) -> None:
        if not re.fullmatch(r"\w+", stage, re.ASCII):
            raise ConfigError("use letters, digits and underscores", key="stage", value=stage)
        if iteration < 0:
            raise ConfigError("must be at least 0", key="iteration", value=iteration)
        if self._lock is None:
            raise StoreError(f"{self.path} is open for reading only: open it with Store(path)")

    def _append(self, record: Mapping[str, Json]) -> None:
        with refusing(self._log):
            descriptor = os.open(self._log, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                size = os.fstat(descriptor).st_size
                torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
                line = (_TORN if torn else b"") + json.dumps(record).encode() + b"\n"
                half = line[: len(line) // 2]
                crash_point("commit:torn", lambda: os.write(descriptor, half))
                if os.write(descriptor, line) < len(line):
                    raise OSError(errno.ENOSPC, "the line was written only in part")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    # -- reading ----------------------------------------------------------------------------------

    def read(self, what: ShardRef | tuple[str, int]) -> list[Trajectory]:
        """The trajectories of a shard, or of the shards of (stage, iteration).

        A committed iteration is read as its line says; of one that is not committed, the shard
        that :meth:`shard` finds.

        Raises:
            StoreError: there is none, or its content is not what was written.
        """
        if isinstance(what, ShardRef):
            return self._load(what)
        for commit in self.commits(what[0]):
            if commit.iteration == what[1]:
                return [item for ref in commit.shards for item in self._load(ref)]
        found = self.shard(*what)
        if found is None:
            raise StoreError(f"{self.path} has no complete shard of {what[0]} {what[1]}")
        return self._load(found)

    def shard(self, stage: str, iteration: int) -> ShardRef | None:
        """A complete shard of the iteration, or None.

        A committed one goes before an uncommitted one, a newer before an older. After a crash
        between the shard and its commit line this is the work that need not be done again.
        """
        named = {ref.name for commit in self.commits(stage) for ref in commit.shards}
        paths = [path for path in self._files(stage) if _place(path) == (stage, iteration)]
        paths.sort(key=lambda path: (path.name in named, path.stat().st_mtime_ns), reverse=True)
        return next((ref for path in paths if (ref := _inspect(path))), None)

    def commits(self, stage: str | None = None) -> list[Commit]:
        """The iterations that count, in the order of their lines; of all stages if None."""
        found, _ = self._replay()
        return [commit for commit in found if stage in (None, commit.stage)]

    def trajectories(
        self, stage: str | None = None, committed: bool | None = True
    ) -> Iterator[Trajectory]:
        """All trajectories, each shard once.

        Args:
            stage: only this one; None for all.
            committed: True for the run itself, False for complete shards that no line names
                (an interrupted or rolled back iteration), None for both.

        Raises:
            StoreError: a committed shard is missing or damaged. Uncommitted ones are skipped then.
        """
        named = dict.fromkeys(ref for commit in self.commits(stage) for ref in commit.shards)
        for ref in named if committed is not False else ():
            yield from self._load(ref)
        for ref in self._orphans(stage)[0] if committed is not True else ():
            yield from self._load(ref)

    def report(self) -> dict[str, int]:
        """What is here: counts of trajectories, lines and shards.

        ``iterations`` and ``committed`` (trajectories) count what commit lines name,
        ``uncommitted`` the trajectories in ``orphan_shards``. ``corrupt_shards`` are files whose
        content is not what their name says, ``missing_shards`` are named by a line and not there.
        """
        commits, torn = self._replay()
        named = {ref.name: ref for commit in commits for ref in commit.shards}
        orphans, corrupt = self._orphans(None)
        present = [name for name in named if (self._shards / name).is_file()]
        corrupt += sum(_inspect(self._shards / name) is None for name in present)
        return {
            "iterations": len(commits),
            "committed": sum(ref.count for ref in named.values()),
            "uncommitted": sum(ref.count for ref in orphans),
            "torn_lines": torn,
            "orphan_shards": len(orphans),
            "corrupt_shards": corrupt,
            "missing_shards": len(named) - len(present),
        }

    def _load(self, ref: ShardRef) -> list[Trajectory]:
        path = self._shards / ref.name
        with refusing(path):
            data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != ref.sha256:
            raise StoreError(f"{path} is damaged: restore it, or roll back to before its iteration")
        try:
            return codec.unpack(data)
        except (ValueError, TypeError, KeyError) as error:
            remedy = "read it with the version of agentdistill that wrote it"
            raise StoreError(f"cannot read {path}: {error}; {remedy}") from error

    def _files(self, stage: str | None) -> list[Path]:
        paths = sorted(self._shards.glob("*.npz"))
        return [path for path in paths if (place := _place(path)) and stage in (None, place[0])]

    def _orphans(self, stage: str | None) -> tuple[list[ShardRef], int]:
        """Complete shards that no line names, and the number of damaged ones."""
        named = {ref.name for commit in self.commits() for ref in commit.shards}
        found = [_inspect(path) for path in self._files(stage) if path.name not in named]
        return [ref for ref in found if ref], found.count(None)

    def _replay(self) -> tuple[list[Commit], int]:
        """What the log says in the end, and how many of its lines are torn or malformed."""
        with refusing(self._log):
            data = self._log.read_bytes() if self._log.exists() else b""
        *lines, rest = data.split(b"\n")
        torn = int(bool(rest))
        commits: dict[tuple[str, int], Commit] = {}
        for line in lines:
            entry = _entry(line)
            if entry is None:
                torn += 1
            elif isinstance(entry, Commit):
                commits.pop((entry.stage, entry.iteration), None)
                commits[entry.stage, entry.iteration] = entry
            else:
                stage, last = entry
                commits = {k: v for k, v in commits.items() if k[0] != stage or k[1] <= last}
        return list(commits.values()), torn


_WRITERS: weakref.WeakSet[Store] = weakref.WeakSet()


def _disown() -> None:
    """Give up the locks in a forked child, so that they end with the process that took them."""
    for store in list(_WRITERS):
        store.close()


os.register_at_fork(after_in_child=_disown)


def _place(path: Path) -> tuple[str, int] | None:
    """Stage and iteration that a file name says; None for a foreign file."""
    match = _NAME.fullmatch(path.name)
    return (match["stage"], int(match["iteration"])) if match else None


def _inspect(path: Path) -> ShardRef | None:
    """The shard at ``path`` if its content is what its name says, else None."""
    with refusing(path):
        data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    if not path.stem.endswith(sha256[:16]):
        return None
    return ShardRef(path.name, codec.count(data), sha256)


def _entry(line: bytes) -> Commit | tuple[str, int] | None:
    """A line of the log: a commit, a rollback (stage, last iteration to keep) or None."""
    try:
        record: dict[str, Any] = json.loads(line)
        stage = str(record["stage"])
        if "rollback" in record:
            return stage, int(record["rollback"])
        shards = tuple(ShardRef(**shard) for shard in record["shards"])
        return Commit(stage, int(record["iteration"]), shards, dict(record["info"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
