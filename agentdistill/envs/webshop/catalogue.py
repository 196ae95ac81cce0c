"""A catalogue in a folder that any number of processes read at once, and how it is built.

Invariants
----------
* The folder is complete or not there: it is built aside and renamed, by one process at a time;
  nothing in it is written again. Its name follows from the content of the official files, so that
  other files make another folder.
* Reading holds little: products stay in a memory-mapped file and are parsed when they are looked
  at; the last few are remembered, and the last searches.
* Products are numbered by rows, in the order of the file.
"""

from __future__ import annotations

import json
import mmap
import random
from array import array
from collections.abc import Iterator
from copy import copy
from dataclasses import fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from agentdistill.envs.sources import cache
from agentdistill.envs.webshop import goals
from agentdistill.envs.webshop.data import QUICK, Files, made
from agentdistill.envs.webshop.formats import (
    Product,
    Tell,
    product,
    read_attributes,
    read_people,
    read_products,
)
from agentdistill.envs.webshop.goals import KINDS, Goal, Source
from agentdistill.envs.webshop.search import Indexer, Searcher, mapped
from agentdistill.errors import ConfigError

LAYOUT = 1
"""Raised whenever the folder's content would be another."""

PRODUCTS_KEPT, SEARCHES_KEPT = 128, 1024


def build(files: Files, folder: Path, progress: Tell) -> None:
    """Read the official files and write a catalogue into the empty ``folder``.

    Args:
        files: what to read; ConfigError where one is damaged.
        folder: where to write: about the size of the products' file.
        progress: is told the bytes read of the products' file.
    """
    notes = read_attributes(files.attributes)
    people = read_people(files.people) if files.people else {}
    chance = random.Random(goals.SEED)
    indexer, costs, ids, starts = Indexer(), array("d"), list[str](), array("Q", [0])
    with (folder / "products.jsonl").open("wb") as lines:
        for raw in read_products(files.products, progress):
            about = json.loads(notes.get(raw["asin"], "{}"))
            item = product(raw, about, people.get(raw["asin"], []))
            costs.append(goals.price(item, chance))
            indexer.add(item.document)
            ids.append(item.asin)
            starts.append(starts[-1] + _write(lines, item))
    if not ids:
        raise ConfigError("holds no product", key="catalogue", value=str(files.products))
    indexer.save(folder, ids)
    np.save(folder / "lines.npy", np.frombuffer(starts, np.uint64))
    np.save(folder / "costs.npy", np.frombuffer(costs, np.float64))
    asins = np.array([name.encode() for name in ids])
    np.save(folder / "asins.npy", np.sort(asins))
    _save_goals(folder, costs, chance)


def _write(lines: IO[bytes], item: Product) -> int:
    values = [getattr(item, field.name) for field in fields(item)]
    return lines.write(json.dumps(values).encode() + b"\n")


def _save_goals(folder: Path, costs: array[float], chance: random.Random) -> None:
    """Draw the price caps: human and synthetic goals each as if they were the only ones."""
    found: dict[str, list[tuple[Source, int]]] = {kind: [] for kind in KINDS}
    chances = {kind: copy(chance) for kind in KINDS}
    for row, item in enumerate(_lines(folder)):
        for kind in KINDS:
            found[kind] += _sources(kind, row, item, costs[row], chances[kind])
    for kind, sources in found.items():
        ends = np.cumsum([number for _, number in sources], dtype=np.int64)
        order = goals.shuffled(int(ends[-1]) if len(ends) else 0)
        arrays: dict[str, npt.NDArray[Any]] = {
            "rows": np.array([source.row for source, _ in sources], np.int64),
            "requests": np.array([source.request for source, _ in sources], np.int32),
            "caps": np.array([source.cap for source, _ in sources], np.float64),
            "ends": ends,
            "order": np.frombuffer(order, np.uint32),
        }
        for name, values in arrays.items():
            np.save(folder / f"{kind}-{name}.npy", values)


def _lines(folder: Path) -> Iterator[Product]:
    with (folder / "products.jsonl").open("rb") as lines:
        for line in lines:
            yield _product(line)


def _sources(
    kind: str, row: int, item: Product, cost: float, chance: random.Random
) -> Iterator[tuple[Source, int]]:
    """Where goals of ``kind`` come from in one product, and how many from each."""
    if kind == "synthetic":
        if item.instruction is not None:
            yield Source(row, -1, goals.cap(cost, chance)), goals.count(item)
        return
    for request, (_, attributes, _) in enumerate(item.people):
        if attributes:
            yield Source(row, request, goals.cap(cost, chance)), 1


def _product(line: bytes) -> Product:
    *texts, bullets, prices, options, attributes, asked, wanted, people = json.loads(line)
    lists = [tuple(bullets), tuple(prices), options, tuple(attributes), asked, tuple(wanted)]
    values: list[Any] = [*texts, *lists, tuple(people)]
    return Product(*values)


class Goals:
    """The goals of one kind, by their place in the original's order."""

    def __init__(self, catalogue: Catalogue, kind: str) -> None:
        """Map the arrays."""
        folder = catalogue.folder
        self._catalogue = catalogue
        self._rows = mapped(folder / f"{kind}-rows.npy")
        self._ends = mapped(folder / f"{kind}-ends.npy")
        self._requests = mapped(folder / f"{kind}-requests.npy")
        self._caps = mapped(folder / f"{kind}-caps.npy")
        self._order = mapped(folder / f"{kind}-order.npy")

    def __len__(self) -> int:
        """How many there are, repetitions included."""
        return len(self._order)

    def __getitem__(self, place: int) -> Goal:
        """The goal at ``place``."""
        item, source, number = self._find(place)
        if source.request >= 0:
            return goals.human(item, source)
        return goals.synthetic(item, source, number)

    def repeats(self, place: int) -> bool:
        """Whether the goal at ``place`` says the same as another, which does not repeat."""
        item, source, number = self._find(place)
        if source.request >= 0:
            return goals.repeats_request(item, source.request)
        return goals.repeats(item, number)

    def _find(self, place: int) -> tuple[Product, Source, int]:
        """The product, and which of its goals it is."""
        number = int(self._order[place])
        index = int(np.searchsorted(self._ends, number, side="right"))
        row = int(self._rows[index])
        source = Source(row, int(self._requests[index]), float(self._caps[index]))
        first = int(self._ends[index - 1]) if index else 0
        return self._catalogue.product(row), source, number - first


class Catalogue:
    """Products, searches and goals of a folder that :func:`build` wrote."""

    def __init__(self, folder: Path) -> None:
        """Map the files; reads next to nothing."""
        self.folder = folder
        with (folder / "products.jsonl").open("rb") as file:
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._lines = mapped(folder / "lines.npy")
        self._costs = mapped(folder / "costs.npy")
        self._asins = mapped(folder / "asins.npy")
        self._by_asin = mapped(folder / "rows.npy")
        self.product = lru_cache(PRODUCTS_KEPT)(self._read)
        self.search = lru_cache(SEARCHES_KEPT)(Searcher(folder))
        self.summary = lru_cache(16 * PRODUCTS_KEPT)(self._summary)

    def __len__(self) -> int:
        """Number of products."""
        return len(self._costs)

    def row(self, asin: str) -> int | None:
        """The row of the product ``asin``; None where there is none."""
        name = asin.encode(errors="replace")
        place = int(np.searchsorted(self._asins, np.bytes_(name)))
        if place == len(self._asins) or self._asins[place] != name:
            return None
        return int(self._by_asin[place])

    def cost(self, row: int) -> float:
        """What the product costs at the till."""
        return float(self._costs[row])

    def _read(self, row: int) -> Product:
        return _product(self._text[int(self._lines[row]) : int(self._lines[row + 1])])

    def _summary(self, row: int) -> tuple[str, str, str]:
        """Id, title and price tag, for the pages of results."""
        item = self._read(row)
        return item.asin, item.title, item.price_tag

    @cached_property
    def goals(self) -> dict[str, Goals]:
        """Kind → goals."""
        return {kind: Goals(self, kind) for kind in KINDS}


@lru_cache(maxsize=8)
def opened(files: Files) -> Catalogue:
    """The catalogue of ``files``, built at its first use; one process opens it once."""
    folder = cache() / "webshop-index" / f"{files.key}-{LAYOUT}"
    made(folder, lambda empty: _build_shown(files, empty))
    try:
        return Catalogue(folder)
    except (OSError, ValueError) as error:
        remedy = f"the index is damaged ({error}): delete it, it will be built again"
        raise ConfigError(remedy, key="catalogue", value=str(folder)) from error


def _build_shown(files: Files, folder: Path) -> None:
    """:func:`build`; what takes minutes is announced and shows how far it is."""
    size = files.products.stat().st_size
    if size < QUICK:
        build(files, folder, lambda _: None)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"WebShop: indexing {files.products.name}, once", total=size)
        build(files, folder, lambda read: bar.update(task, completed=read))
