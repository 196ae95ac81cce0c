"""Which games there are: folders of game files, and an index that is made once.

Invariants
----------
* A game is known by its path below the folder and the hash of its content; the hash is computed
  when a file is new or its size or time has changed, never at another time.
* The index file is a memory, not a truth: names, sizes and times are looked at once per process,
  and a damaged or foreign index file is made again.
* As upstream, games that cannot be solved or that move or slice things are left out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path

from agentdistill.envs.alfworld.goals import kind
from agentdistill.envs.sources import DATASETS, cache
from agentdistill.errors import ConfigError, StoreError
from agentdistill.files import replacing
from agentdistill.records import digest

SPLITS = ("train", "valid_seen", "valid_unseen")
"""The official parts: valid_seen has rooms of train, valid_unseen has others."""

DATASET = "json_2.1.1"
"""The folder of the official games below the data folder."""

HASH_LENGTH = 16
"""Hexadecimal digits of a game's hash."""

SUFFIX = ".tw-pddl"

MOVE, PUT = "move X to Y", "put X in/on Y"
"""The wordings of alfworld 0.4 and 0.3."""

_FORMAT = 1
_LEFT_OUT = ("movable", "Sliced")


@dataclass(frozen=True, slots=True)
class Entry:
    """One game file.

    Attributes:
        path: below the folder, with slashes.
        size: in bytes.
        time: of the last change, in nanoseconds.
        sha: hash of the content.
        kind: the task type, "" where the goal is of no known type.
        wording: :data:`MOVE`, :data:`PUT`, or "".
        solvable: what the file says about itself.
    """

    path: str
    size: int
    time: int
    sha: str
    kind: str
    wording: str
    solvable: bool


def data_folder() -> Path:
    """Where alfworld keeps its data: ``$ALFWORLD_DATA`` or ``~/.cache/alfworld``."""
    return DATASETS["alfworld"].folder


def cache_folder() -> Path | None:
    """Where we remember what took time, made if need be; None where it cannot be made."""
    folder = cache() / "alfworld"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder


def dataset(folder: Path) -> Path:
    """The folder that has the splits: ``folder`` or its ``json_2.1.1``."""
    return folder / DATASET if (folder / DATASET).is_dir() else folder


def splits(root: Path) -> tuple[str, ...]:
    """The splits in a folder of games; a folder without any is all ``train``."""
    return tuple(name for name in SPLITS if (root / name).is_dir()) or SPLITS[:1]


def has_games(root: Path) -> bool:
    """Whether there is a game; looks no further than the first."""
    return next(_walk(str(root)), None) is not None


class Index:
    """The games below a folder."""

    def __init__(self, root: Path, entries: list[Entry]) -> None:
        """Group ``entries`` by split."""
        self.root = root
        usable = [entry for entry in entries if entry.solvable and not _left_out(entry.path)]
        names = splits(root)
        whole = not (root / names[0]).is_dir()
        self.entries = {
            name: [e for e in usable if whole or e.path.startswith(f"{name}/")] for name in names
        }

    @property
    def data(self) -> str:
        """Hash of all games: the same wherever the folder lies."""
        listed = {split: [(e.path, e.sha) for e in found] for split, found in self.entries.items()}
        return digest(listed)

    @property
    def wordings(self) -> tuple[str, ...]:
        """How the games speak, the most frequent wording first."""
        counts = Counter(e.wording for found in self.entries.values() for e in found if e.wording)
        return tuple(name for name, _ in counts.most_common())


@lru_cache(maxsize=8)
def index(root: Path) -> Index:
    """The games below ``root``; listed once per process, hashed once per machine.

    Raises:
        ConfigError: the folder cannot be read.
    """
    memory = _memory(root)
    known = _read(memory)
    try:
        entries = [
            _entry(root, known.get(path), path, size, time)
            for path, size, time in sorted(
                (os.path.relpath(place, root), size, time) for place, size, time in _walk(str(root))
            )
        ]
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
        raise ConfigError(reason, key="games", value=str(root)) from error
    if memory is not None and {e.path: e for e in entries} != known:
        _write(memory, entries)
    return Index(root, entries)


def _walk(folder: str) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of every game file below ``folder``."""
    with os.scandir(folder) as found:
        for item in found:
            if item.name.endswith(SUFFIX) and item.is_file():
                facts = item.stat()
                yield item.path, facts.st_size, facts.st_mtime_ns
            elif item.is_dir():
                yield from _walk(item.path)


def _entry(root: Path, known: Entry | None, path: str, size: int, time: int) -> Entry:
    if known is not None and (known.size, known.time) == (size, time):
        return known
    content = (root / path).read_bytes()
    begin = content.rfind(b"(:goal")
    goal = content[begin : content.find(b'"', begin)] if begin >= 0 else b""
    goal = goal.replace(b"\\n", b" ").replace(b"\\t", b" ")
    solvable = b'"solvable": false' not in content
    sha = hashlib.sha256(content).hexdigest()[:HASH_LENGTH]
    return Entry(
        path, size, time, sha, kind(goal.decode(errors="replace")), _wording(content), solvable
    )


def _wording(content: bytes) -> str:
    if b"move {o} to {r}" in content:
        return MOVE
    return PUT if b"put {o} in/on {r}" in content else ""


def _left_out(path: str) -> bool:
    return any(word in path for word in _LEFT_OUT)


def _memory(root: Path) -> Path | None:
    """The index file of ``root``."""
    folder = cache_folder()
    return folder and folder / f"index-{digest(str(root.resolve()))}.json"


def _read(memory: Path | None) -> Mapping[str, Entry]:
    if memory is None:
        return {}
    with suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(memory.read_bytes())
        if stored["format"] == _FORMAT:
            return {row[0]: Entry(*row) for row in stored["games"]}
    return {}


def _write(memory: Path, entries: list[Entry]) -> None:
    rows = [astuple(entry) for entry in entries]
    text = json.dumps({"format": _FORMAT, "games": rows})
    with suppress(StoreError), replacing(memory, "file") as file:  # works without a memory, too
        file.write(text.encode())
