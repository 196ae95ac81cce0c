"""WebShop's official files, read piece by piece, as products.

Invariants: nothing is held but the piece at hand, so that 5 GB of JSON need no 5 GB of memory; a
file that is cut off or damaged is a ConfigError that names it; odd fields (no price, no options,
bullets in one string) are read as the original reads them, and where the original would stop, as
"none".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from agentdistill.errors import ConfigError

CHUNK = 1 << 22
"""Characters read at once."""

MAX_PIECE = 1 << 26
"""No product has as many characters: a longer one means a damaged file."""

NO_PRICE = 100.0
"""Price of a product without one."""

UNKNOWN = ("DUMMY_ATTR",)
"""Attributes of a product that nobody annotated."""

Tell = Callable[[int], None]
"""Is told the bytes read so far."""


@dataclass(frozen=True, slots=True)
class Product:
    """One product.

    Attributes:
        asin: its id.
        title: its name.
        category: beauty, electronics, fashion, garden or grocery.
        query: the search that found it when the catalogue was made, lower case.
        product_category: its place in the shop, steps parted by U+203A.
        description: one text.
        bullets: its features.
        prices: one price, or the two ends of a range, in dollars.
        options: option name → values, lower case.
        attributes: what it is like ("machine wash").
        instruction: the synthetic request for it, or None.
        wanted: the attributes that request asks for.
        people: requests that people wrote for it: [text, attributes, options] each.
    """

    asin: str
    title: str
    category: str
    query: str
    product_category: str
    description: str
    bullets: tuple[str, ...]
    prices: tuple[float, ...]
    options: dict[str, list[str]]
    attributes: tuple[str, ...]
    instruction: str | None
    wanted: tuple[str, ...]
    people: tuple[tuple[str, list[str], Any], ...] = ()

    @property
    def price_tag(self) -> str:
        """The price as the pages show it."""
        return " to ".join(f"${price}" for price in self.prices)

    @property
    def document(self) -> str:
        """What the search engine indexes."""
        options = ", and ".join(f"{name}: {', '.join(v)}" for name, v in self.options.items())
        first = self.bullets[0] if self.bullets else ""
        return " ".join([self.title, self.description, first, options]).lower()


def read_products(path: Path, progress: Tell = lambda _: None) -> Iterator[dict[str, Any]]:
    """The records of ``items_shuffle*.json``, without repetitions and without broken ids."""
    seen = set()
    for value, _ in _Pieces(path, "[", progress):
        asin = value.get("asin") if isinstance(value, dict) else None
        if isinstance(asin, str) and asin != "nan" and len(asin) <= 10 and asin not in seen:
            seen.add(asin)
            yield value


def read_attributes(path: Path, progress: Tell = lambda _: None) -> dict[str, str]:
    """Asin → JSON text of its entry in ``items_ins_v2*.json`` (text takes less memory)."""
    return {key: text for (key, _), text in _Pieces(path, "{", progress)}


def read_people(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Asin → what people asked for, from ``items_human_ins.json``."""
    return {key: value for (key, value), _ in _Pieces(path, "{", lambda _: None)}


def product(raw: dict[str, Any], notes: dict[str, Any], people: list[dict[str, Any]]) -> Product:
    """A record of the products' file, its annotations and requests, as a Product.

    Raises ConfigError where a field is of an impossible type.
    """
    try:
        return _product(raw, notes, people)
    except (AttributeError, TypeError) as error:
        remedy = f"a field of this product is not of the official format ({error})"
        raise ConfigError(remedy, key="asin", value=raw["asin"]) from error


def _product(raw: dict[str, Any], notes: dict[str, Any], people: list[dict[str, Any]]) -> Product:
    bullets = raw.get("small_description")
    bullets = bullets if isinstance(bullets, list) else [bullets]
    asked = notes.get("instruction")
    wanted = notes.get("instruction_attributes") or []
    return Product(
        asin=raw["asin"],
        title=_text(raw.get("name")),
        category=_text(raw.get("category")),
        query=_text(raw.get("query")).lower().strip(),
        product_category=_text(raw.get("product_category")),
        description=_text(raw.get("full_description")),
        bullets=tuple(_text(bullet) for bullet in bullets),
        prices=_prices(raw.get("pricing")),
        options=_options(raw.get("customization_options")),
        attributes=tuple(notes.get("attributes", UNKNOWN)),
        instruction=asked if isinstance(asked, str) and wanted else None,
        wanted=tuple(wanted),
        people=tuple(_request(entry) for entry in people),
    )


def _request(entry: dict[str, Any]) -> tuple[str, list[str], Any]:
    options = entry.get("instruction_options") or []
    return _text(entry.get("instruction")), list(entry.get("instruction_attributes") or []), options


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _prices(text: Any) -> tuple[float, ...]:
    """Of texts such as "$12.99" and "$9 $12"; what cannot be read is no price."""
    numbers = []
    for part in _text(text).split("$")[1:]:
        with suppress(ValueError):
            numbers.append(float(re.sub(r"[^\d.]", "", part)))
    return tuple(numbers[:2]) or (NO_PRICE,)


def _options(raw: Any) -> dict[str, list[str]]:
    if not isinstance(raw, dict):
        return {}
    return {
        name.lower(): [_text(v.get("value")).strip().replace("/", " | ").lower() for v in values]
        for name, values in raw.items()
        if values is not None
    }


class _Pieces:
    """The elements of one JSON array, or the pairs of one object, with the text of each value."""

    def __init__(self, path: Path, opening: str, progress: Tell) -> None:
        self._path, self._opening, self._progress = path, opening, progress
        self._decode = json.JSONDecoder().raw_decode
        self._buffer, self._at, self._read = "", 0, 0

    def __iter__(self) -> Iterator[tuple[Any, str]]:
        try:
            with self._path.open(encoding="utf-8") as file:
                yield from self._pieces(file)
        except UnicodeDecodeError as error:
            raise self._damaged() from error
        except OSError as error:
            raise ConfigError(
                f"cannot be read: {error.strerror}", key="catalogue", value=str(self._path)
            ) from error

    def _pieces(self, file: TextIO) -> Iterator[tuple[Any, str]]:
        closing = "]" if self._opening == "[" else "}"
        self._take(file, self._opening)
        if self._peek(file) == closing:
            return
        while True:
            key = None
            if closing == "}":
                key, _ = self._value(file)
                self._take(file, ":")
            value, text = self._value(file)
            yield (value if key is None else (key, value)), text
            if self._peek(file) == closing:
                return
            self._take(file, ",")

    def _more(self, file: TextIO) -> bool:
        """Drop what was used and read on; False at the end of the file."""
        text = file.read(CHUNK)
        self._read += self._at
        self._buffer, self._at = self._buffer[self._at :] + text, 0
        self._progress(file.buffer.tell())
        return bool(text)

    def _peek(self, file: TextIO) -> str:
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at].isspace():
                self._at += 1
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more(file):
                raise self._damaged()

    def _take(self, file: TextIO, wanted: str) -> None:
        if self._peek(file) != wanted:
            raise self._damaged()
        self._at += 1

    def _value(self, file: TextIO) -> tuple[Any, str]:
        self._peek(file)
        while True:
            try:
                value, end = self._decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                if len(self._buffer) - self._at > MAX_PIECE or not self._more(file):
                    raise self._damaged() from error
                continue
            text, self._at = self._buffer[self._at : end], end
            return value, text

    def _damaged(self) -> ConfigError:
        place = self._read + self._at
        return ConfigError(
            f"is cut off or damaged near character {place:,}; copy or download it again",
            key="catalogue",
            value=str(self._path),
        )
