"""A seeded catalogue of invented products in WebShop's official file formats.

Invariants
----------
* The two files depend on ``VERSION``, ``products`` and ``seed`` only: the same bytes in every
  process. Another ``VERSION`` means another catalogue.
* Products come in families of :data:`FAMILY`: one brand, series and kind, told apart by two
  attributes each; the last two of a family differ in options and price only. So a goal is met by
  one product or very few, and neither the first search result nor any option will do.
* Every attribute of a product stands in its title, description or bullets, and no other attribute
  of its group does.
* A product is a function of its number, so that nothing is held but the order of the numbers.

Products, brands and sentences are made up here; the format is that of the files of princeton-nlp's
WebShop (``items_shuffle*.json``, ``items_ins_v2*.json``), oddities included: missing prices,
options without values, bullets in one string, products nobody annotated.
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from agentdistill.envs.webshop.vocabulary import (
    GROUPS,
    PART_LINES,
    PLAIN_LINES,
    SERIES,
    SYLLABLES,
    TRAIT_LINES,
    USE_LINES,
    Group,
    Line,
)
from agentdistill.errors import ConfigError
from agentdistill.files import refusing, replacing

VERSION = "1"
"""Version of the catalogues that this module writes."""

PRODUCTS_FILE = "items_shuffle.json"
ATTRIBUTES_FILE = "items_ins_v2.json"

FAMILY = 5
"""Products that differ in attributes, options and price only."""

_FACTORS = (0.6, 0.8, 1.0, 1.3, 1.7)
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ASINS = len(_DIGITS) ** 8
_STRIDE = 1_299_709_000_007  # shares no factor with 36, so that multiples never meet below _ASINS


class _Family(NamedTuple):
    """What its products share, and the attributes by which they differ."""

    group: Group
    line: Line
    brand: str
    series: str
    prices: list[float]
    attributes: tuple[frozenset[str], ...]


def generate(folder: Path, products: int = 1000, seed: int = 0) -> None:
    """Write a catalogue into ``folder``; ``items_shuffle.json`` appears last.

    Args:
        folder: made where it is missing; files of these two names in it are replaced.
        products: how many.
        seed: another seed gives other products.

    Raises:
        ConfigError: ``products`` is not positive.
        StoreError: the folder cannot be written.
    """
    if products < 1:
        raise ConfigError("must be at least 1", key="products", value=products)
    order = list(range(products))
    _random(seed, "order").shuffle(order)
    with refusing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with (
        replacing(folder / PRODUCTS_FILE, "file") as items,
        replacing(folder / ATTRIBUTES_FILE, "file") as notes,
    ):
        for place, number in enumerate(order):
            product, note = _product(seed, number)
            items.write(f"{', ' if place else '['}{json.dumps(product)}".encode())
            entry = f"{json.dumps(product['asin'])}: {json.dumps(note)}"
            notes.write(f"{', ' if place else '{'}{entry}".encode())
        items.write(b"]")
        notes.write(b"}")


def _random(seed: int, *place: object) -> Random:
    """Numbers for one place, the same in every process (a string seed is hashed by SHA-512)."""
    return Random("/".join(map(str, ("webshop", VERSION, seed, *place))))


def _product(seed: int, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Product ``number`` with its entry of the attributes file."""
    family = _family(seed, number // FAMILY)
    rng = _random(seed, "product", number)
    mine = family.attributes[number % FAMILY]
    traits, parts, uses = (
        [name for name in names if name in mine]
        for names in (family.group.traits, family.group.parts, family.group.uses)
    )
    bullets = _bullets(rng, traits, parts, uses)
    asin = _asin(seed, number)
    product = {
        "name": _title(rng, family, traits, parts, uses),
        "full_description": _description(rng, family, [*traits, *parts, *uses]),
        "pricing": _pricing(rng, family.prices[number % FAMILY], number % FAMILY == 0),
        "images": [f"https://images.example/{asin}/{n}.jpg" for n in range(rng.randint(1, 6))],
        "product_category": f"{family.group.head} > {family.line.tail}".replace(">", "\u203a"),
        "average_rating": _rating(rng),
        "small_description": " ".join(bullets) if rng.random() < 0.02 else bullets,
        "customization_options": _options(rng, family),
        "asin": asin,
        "category": family.group.category,
        "query": family.line.query,
        "page": rng.randint(1, 400),
    }
    if rng.random() < 0.2:
        product["model"] = f"{family.brand[:3].upper()}-{rng.randint(10, 9999)}"
    return product, _note(rng, family.line, traits, parts, uses)


def _family(seed: int, number: int) -> _Family:
    """Lines take turns in an order of their own, so that a small catalogue has many kinds."""
    lines = [(group, line) for group in GROUPS for line in group.lines]
    _random(seed, "lines").shuffle(lines)
    group, line = lines[number % len(lines)]
    rng = _random(seed, "family", number)
    first, *others = rng.sample(group.traits, len(group.traits))
    pairs = list(combinations([*others, *group.parts, *group.uses], 2))
    chosen = [frozenset((first, *pair)) for pair in rng.sample(pairs, FAMILY - 1)]
    usual = line.low * (line.high / line.low) ** rng.random()
    return _Family(
        group,
        line,
        brand="".join(rng.choice(part) for part in SYLLABLES),
        series=rng.choice(SERIES),
        prices=[usual * factor for factor in rng.sample(_FACTORS, FAMILY)],
        attributes=(*chosen, chosen[-1]),
    )


def _asin(seed: int, number: int) -> str:
    """Ten characters; distinct for distinct numbers below 36 ** 8."""
    rest = (_random(seed, "asin").randrange(_ASINS) + number * _STRIDE) % _ASINS
    digits = []
    for _ in range(8):
        rest, digit = divmod(rest, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return "B0" + "".join(digits)


# -- text ------------------------------------------------------------------------------------------


def _title(
    rng: Random, family: _Family, traits: list[str], parts: list[str], uses: list[str]
) -> str:
    """Brand, kind, series, the traits, and what else there is in half of the titles."""
    noun = family.line.noun
    words = [family.brand, traits[0].title(), noun, f"- {family.series} Collection"]
    more = [*traits[1:], *(f"with {part}" for part in parts), *(f"for {use}" for use in uses)]
    return ", ".join([" ".join(words), *(text.title() for text in more if rng.random() < 0.5)])


def _description(rng: Random, family: _Family, attributes: list[str]) -> str:
    """A few sentences, or nothing as with many real products."""
    if rng.random() < 0.15:
        return ""
    noun, brand = family.line.noun.lower(), family.brand
    some = rng.sample(attributes, 2)
    return (
        f"This {noun} belongs to the {family.series} collection of {brand}. "
        f"Why people pick it: {some[0]}; {some[1]}. {rng.choice(PLAIN_LINES)}"
    )


def _bullets(rng: Random, traits: list[str], parts: list[str], uses: list[str]) -> list[str]:
    """One for each attribute and one that says nothing, in any order."""
    lines = [rng.choice(PLAIN_LINES)]
    for names, forms in ((traits, TRAIT_LINES), (parts, PART_LINES), (uses, USE_LINES)):
        lines += [rng.choice(forms).format(name[0].upper() + name[1:], name) for name in names]
    rng.shuffle(lines)
    return [f"{line} " for line in lines]


def _note(
    rng: Random, line: Line, traits: list[str], parts: list[str], uses: list[str]
) -> dict[str, Any]:
    """Attributes and, where somebody wrote one, the instruction."""
    fate = rng.random()
    attributes = [*traits, *parts, *uses]
    if fate < 0.05:
        return {"attributes": []}
    mixed = rng.sample([*attributes, line.noun.lower()], len(attributes) + 1)
    if fate < 0.15:
        return {"attributes": mixed}
    tail = f" with {', '.join(parts)}" if parts else ""
    tail += f" for {', '.join(uses)}" if uses else ""
    return {
        "attributes": mixed,
        "instruction": f"Find me {', '.join(traits)} {line.query}{tail}",
        "instruction_attributes": attributes,
    }


# -- numbers and choices ---------------------------------------------------------------------------


def _pricing(rng: Random, usual: float, may_lack: bool) -> str:
    """``$12.99``, a range ``$9.00 $12.00``, or nothing for some that ``may_lack`` a price."""
    price, fate = _round(rng, usual), rng.random()
    if may_lack and fate < 0.2:
        return ""
    if fate > 0.9:
        return f"${price:.2f} ${_round(rng, price * rng.uniform(1.2, 1.8)) + 1:.2f}"
    return f"${price:.2f}"


def _round(rng: Random, price: float) -> float:
    return max(1, round(price)) - rng.choice((0.01, 0.05, 0.5, 0.0))


def _rating(rng: Random) -> str | float:
    """A string where there are no reviews; whole numbers are integers."""
    rating = rng.randint(30, 50) / 10
    return "" if rng.random() < 0.3 else int(rating) if rating.is_integer() else rating


def _options(rng: Random, family: _Family) -> dict[str, list[dict[str, Any]] | None] | str:
    """Some values of some axes; "" where there is nothing to choose."""
    fate = rng.random()
    axes = family.group.axes if fate < 0.55 else (rng.choice(family.group.axes),)
    if fate > 0.85:
        return ""
    options: dict[str, list[dict[str, Any]] | None] = {}
    for name, values in axes:
        chosen = rng.sample(values, rng.randint(2, min(6, len(values))))
        pictured = name == family.group.axes[0][0]
        shape = _pictured if pictured else _sized
        options[name] = [shape(rng, value) for value in chosen] if rng.random() > 0.03 else None
    return options


def _pictured(rng: Random, value: str) -> dict[str, Any]:
    """A value with a picture and perhaps a price of its own."""
    own, number = rng.random() < 0.25, rng.randrange(_ASINS)
    price = _round(rng, rng.uniform(8, 90)) if own else 0
    linked = rng.random() < 0.8
    return {
        "is_selected": False,
        "url": f"https://shop.example/dp/{number:x}" if linked else None,
        "value": value,
        "price_string": f"${price:.2f}" if own else "",
        "price": price,
        "image": f"https://images.example/options/{number:x}.jpg" if rng.random() < 0.7 else None,
    }


def _sized(rng: Random, value: str) -> dict[str, Any]:
    """A value that is a variant with an identifier of its own."""
    return {
        "is_selected": False,
        "is_available": rng.random() < 0.9,
        "value": value,
        "asin": "B0" + "".join(rng.choices(_DIGITS, k=8)),
    }
