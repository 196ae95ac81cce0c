"""What shoppers are asked to buy: the goals of a catalogue, in the original's order.

Invariants: goals are a function of the catalogue's files alone. A synthetic goal is one combination
of a product's options; a human one is a request that somebody wrote. Goals are numbered in the
order of the files and played in the order of the original's shuffle (Python's generator, seed 233),
so that place 1500 here is session 1500 there. Prices within a range, and the price caps, are drawn
as the original draws them; it leaves its generator unseeded, here the seed is :data:`SEED`.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import gcd, prod
from typing import Any

from agentdistill.envs.webshop.formats import Product
from agentdistill.errors import ConfigError

SEED = 0
"""Seeds the draws of prices and caps."""

SHUFFLE = 233
"""The original's seed for the order of the goals."""

CAPS = tuple(10.0 * step for step in range(1, 100))
NO_CAP = 1_000_000.0

SPLITS = ("train", "dev", "test")
KINDS = ("human", "synthetic")


@dataclass(frozen=True, slots=True)
class Goal:
    """One shopping task; as JSON it is a task's payload.

    Attributes:
        asin: the product that was in mind.
        instruction: the request in words, price included.
        attributes: what the product must be like.
        options: name → value (synthetic) or a list of values (human).
        price_upper: what it may cost, in dollars.
    """

    asin: str
    instruction: str
    attributes: tuple[str, ...]
    options: Mapping[str, str] | Sequence[str]
    price_upper: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**asdict(self), "attributes": list(self.attributes)}

    @classmethod
    def from_json(cls, payload: Mapping[str, Any]) -> Goal:
        """The inverse of :meth:`to_json`; ConfigError where a field is missing or wrong."""
        try:
            options = payload["options"]
            named = isinstance(options, Mapping)
            return cls(
                str(payload["asin"]),
                str(payload["instruction"]),
                tuple(str(attribute) for attribute in payload["attributes"]),
                dict(options) if named else [str(option) for option in options],
                float(payload["price_upper"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            remedy = "a goal has asin, instruction, attributes, options and price_upper"
            raise ConfigError(remedy, key="task.payload", value=dict(payload)) from error


@dataclass(frozen=True, slots=True)
class Source:
    """Where goals come from: a row of the catalogue, a request of its people (-1: synthetic)."""

    row: int
    request: int
    cap: float


def price(product: Product, chance: random.Random) -> float:
    """What the product costs: a point of its range."""
    prices = product.prices
    return prices[0] if len(prices) == 1 else chance.uniform(prices[0], prices[1])


def cap(cost: float, chance: random.Random) -> float:
    """The larger of two of the next four round prices; :data:`NO_CAP` where there are no two."""
    above = [round_price for round_price in CAPS if round_price > cost][:4]
    return max(chance.sample(above, 2)) if len(above) >= 2 else NO_CAP


def count(product: Product) -> int:
    """Synthetic goals of a product: the combinations of its options."""
    return prod(len(values) for values in product.options.values())


def shuffled(number: int) -> array[int]:
    """The order in which goals are played."""
    order = array("I", range(number))
    random.Random(SHUFFLE).shuffle(order)
    return order


def _digits(product: Product, number: int) -> dict[str, int]:
    """Option name, sorted → which value the combination ``number`` has; the last varies fastest."""
    digits = {}
    for name in sorted(product.options, reverse=True):
        number, digits[name] = divmod(number, len(product.options[name]))
    return dict(sorted(digits.items()))


def synthetic(product: Product, source: Source, number: int) -> Goal:
    """Goal ``number`` of a product."""
    chosen = {name: product.options[name][at] for name, at in _digits(product, number).items()}
    wishes = ", and ".join(f"{name}: {value}" for name, value in chosen.items())
    text = f"{product.instruction}{' with ' if wishes else ''}{wishes}{_price_words(source.cap)}"
    return Goal(product.asin, text, product.wanted, chosen, source.cap)


def repeats(product: Product, number: int) -> bool:
    """Whether an earlier goal of the product is the same, because a value is listed twice."""
    digits = _digits(product, number).items()
    values = ((product.options[name], at) for name, at in digits)
    return any(listed.index(listed[at]) < at for listed, at in values)


def repeats_request(product: Product, request: int) -> bool:
    """Whether somebody asked for the very same before."""
    return product.people[request] in product.people[:request]


def human(product: Product, source: Source) -> Goal:
    """The goal behind a request that somebody wrote."""
    text, attributes, options = product.people[source.request]
    text = text.strip(".") + _price_words(source.cap)
    return Goal(product.asin, text, tuple(attributes), options, source.cap)


def _price_words(price_upper: float) -> str:
    return "" if price_upper == NO_CAP else f", and price lower than {price_upper:.2f} dollars"


def places(split: str, number: int) -> range:
    """Where the goals of ``split`` are in the order: the first 500 test, the next 1,000 dev.

    Below 5,000 goals test is a tenth and dev a fifth of them. ConfigError for an unknown split.
    """
    test = min(500, -(-number // 10))
    dev = min(1000, -(-number // 5), number - test)
    bounds = {"test": (0, test), "dev": (test, test + dev), "train": (test + dev, number)}
    if split not in bounds:
        raise ConfigError(f"one of {', '.join(SPLITS)}", key="split", value=split)
    return range(*bounds[split])


def mixed(numbers: range, seed: int) -> Iterator[int]:
    """``numbers`` in an order that ``seed`` decides, without a list of them.

    Steps of one length through a circle suffice: what the numbers stand for is shuffled already.
    """
    size = len(numbers)
    if not size:
        return iter(())
    chance = random.Random(f"webshop {seed}")
    step = next(s for s in iter(lambda: chance.randrange(1, size + 1), 0) if gcd(s, size) == 1)
    start = chance.randrange(size)
    return (numbers[(start + step * number) % size] for number in range(size))
