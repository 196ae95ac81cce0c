"""Where catalogues are: the official files, generated ones, and folders built from them.

Invariants: files are known by the hash of their whole content. What is built appears under its
final name complete, made by one process while others wait for it; what a killed process left behind
is removed by the next.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from agentdistill.envs.sources import cache, dataset
from agentdistill.errors import ConfigError
from agentdistill.records import digest

PRODUCTS = ("items_shuffle.json", "items_shuffle_1000.json")
"""The official names; the full catalogue comes first."""

PEOPLE = "items_human_ins.json"

QUICK = 1 << 25
"""Files of up to so many bytes are hashed whenever asked; the hashes of larger ones are kept."""


def data_folder() -> Path:
    """Where official files are looked for: ``$WEBSHOP_DATA`` (``agentdistill data webshop``)."""
    return dataset("webshop").folder


@dataclass(frozen=True)
class Files:
    """The files of one catalogue; ``people`` are the requests that people wrote, if there."""

    products: Path
    attributes: Path
    people: Path | None = None

    @cached_property
    def data(self) -> str:
        """Hash of products and attributes: what a task means depends on nothing else."""
        return digest([hash_of(self.products), hash_of(self.attributes)])

    @cached_property
    def key(self) -> str:
        """Hash of everything that a catalogue is built from."""
        return digest([self.data, hash_of(self.people) if self.people else ""])


def find(path: Path) -> Files | None:
    """The official files in a folder, or beside a products' file; None where there are none."""
    if path.is_dir():
        products = next((path / name for name in PRODUCTS if (path / name).is_file()), None)
    else:
        products = path if path.is_file() else None
    if products is None:
        return None
    attributes = products.with_name(products.name.replace("items_shuffle", "items_ins_v2"))
    if attributes == products or not attributes.is_file():
        remedy = "copy items_ins_v2*.json, the attributes, to the products (items_shuffle*.json)"
        raise ConfigError(remedy, key="catalogue", value=str(path))
    people = products.with_name(PEOPLE)
    return Files(products, attributes, people if people.is_file() else None)


def hash_of(path: Path) -> str:
    """Hash of a file's content; that of a large file is computed once."""
    try:
        status = path.stat()
        if status.st_size <= QUICK:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        state = [str(path.resolve()), status.st_size, status.st_mtime_ns]
        note = cache() / "webshop-index" / f"hash-{digest(state)}" / "sha256"
        made(note.parent, lambda folder: _note(path, folder / note.name))
        return note.read_text()
    except OSError as error:
        remedy = f"cannot be read ({error.strerror})"
        raise ConfigError(remedy, key="catalogue", value=str(path)) from error


def _note(path: Path, note: Path) -> None:
    with path.open("rb") as file:
        note.write_text(hashlib.file_digest(file, "sha256").hexdigest())


def generated(products: int, seed: int) -> Files:
    """A generated catalogue of ours; written at its first use."""
    from agentdistill.envs.webshop import generate

    folder = cache() / "webshop-generated" / generated_name(products, seed)
    made(folder, lambda empty: generate.generate(empty, products, seed))
    files = find(folder)
    assert files is not None
    return files


def generated_name(products: int, seed: int) -> str:
    """What identifies a generated catalogue."""
    from agentdistill.envs.webshop import generate

    return f"generated-v{generate.VERSION}-{products}-{seed}"


def made(folder: Path, make: Callable[[Path], None]) -> None:
    """Have ``make`` fill a new folder that takes the name ``folder`` once it is complete.

    Does nothing where the folder exists; waits where another process is making it.

    Raises:
        ConfigError: the disk is full or not ours; the message names the remedy.
    """
    if folder.is_dir():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                _make(folder, make)
    except OSError as error:
        remedy = f"cannot be written ({error.strerror}): set AGENTDISTILL_HOME to another folder"
        raise ConfigError(remedy, key="the cache", value=str(folder.parent)) from error


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        make(aside)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
