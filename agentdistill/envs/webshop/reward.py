"""The reward of a purchase, as the original computes it.

Invariants: r = r_type * (attributes met + options met + price met) / (their number), in [0, 1]. The
original asks spaCy for the nouns of two titles; here they are the words of two letters or more that
are no stop words, as in the sessions recorded for parity. Options of synthetic goals are compared
by name and value together, because the original (perhaps unwittingly) does so: a colour such as
"steelblue", which is cut to "blue" on the buyer's side only, can then never be met.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agentdistill.envs.webshop.analysis import STOP_WORDS
from agentdistill.envs.webshop.formats import Product
from agentdistill.envs.webshop.goals import Goal

_COLOURS = (
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown "
    "burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee "
    "cognac copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia "
    "gold granite grape graphite grass gray green grey heather indigo ivory ivy khaki lavender "
    "lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor "
    "mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red "
    "rose royal rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan "
    "taupe teal tiger turquoise violet walnut wheat white wine yellow"
)
COLOURS = tuple(_COLOURS.split())
"""A value that contains one of these counts as the first of them."""

ALIKE = 85
"""Texts whose token set ratio is above this are the same."""

_WORDS = re.compile(r"\b[a-z][a-z'\-]+\b")
_LATIN1 = dict.fromkeys(range(128, 256))


@dataclass(frozen=True, slots=True)
class Parts:
    """What a reward is made of; ``total`` is the reward."""

    total: float
    type: float
    attributes: int
    options: int
    price: bool


def judge(
    bought: Product, cost: float, chosen: Mapping[str, str], goal: Goal, meant: Product
) -> Parts:
    """The reward for buying ``bought``.

    Args:
        bought: the product.
        cost: what it costs, in dollars.
        chosen: option name → value that the buyer clicked.
        goal: what was asked for.
        meant: the product that the goal was made from.
    """
    kind = type_score(bought, meant)
    attributes = sum(has_attribute(bought, wish) for wish in goal.attributes)
    options = options_met(chosen.values(), goal)
    cheap = cost <= goal.price_upper
    parts = len(goal.attributes) + len(goal.options) + 1
    total = (attributes + options + cheap) / parts * kind
    return Parts(total, kind, attributes, options, cheap)


def type_score(bought: Product, meant: Product) -> float:
    """Whether both are the same kind of thing: 1, 0.5, 0.1 or 0."""
    words = _nouns(meant.title)
    shared = len(set(words) & set(_nouns(bought.title)))
    share = shared / len(words) if words else 0.2
    if share < 0.1:
        return 0.1 if share > 0 else 0.0
    steps = _path(bought) & _path(meant)
    same = bought.query == meant.query or len(steps) >= 2 or share > 0.2
    return 1.0 if same else 0.5


def _nouns(title: str) -> list[str]:
    return [word for word in _WORDS.findall(title.lower()) if word not in STOP_WORDS]


def _path(product: Product) -> set[str]:
    return {step.strip() for step in product.product_category.split("\u203a")}


def has_attribute(product: Product, wish: str) -> bool:
    """Whether the product is annotated with the attribute, or says so itself."""
    if any(alike(attribute, wish) for attribute in product.attributes):
        return True
    texts = (product.title, " ".join(product.bullets), product.description)
    return any(wish in text.lower() for text in texts)


def options_met(chosen: Iterable[str], goal: Goal) -> int:
    """How many of the goal's options one of the chosen values meets."""
    values = [_colour(value) for value in chosen]
    return sum(any(alike(value, wish) for value in values) for wish in wishes(goal))


def meets(value: str, wish: str) -> bool:
    """Whether choosing ``value`` meets one of :func:`wishes`."""
    return alike(_colour(value), wish)


def attainable(goal: Goal, meant: Product) -> bool:
    """Whether the product that was meant can earn a reward of 1."""
    values = [value for listed in meant.options.values() for value in listed if value]
    return all(any(meets(value, wish) for value in values) for wish in wishes(goal))


def wishes(goal: Goal) -> list[str]:
    """The goal's options as texts to compare with."""
    if isinstance(goal.options, Mapping):
        return [_pair(pair) for pair in goal.options.items()]
    return [_colour(value) for value in goal.options]


def _pair(pair: tuple[str, str]) -> str:
    return next((colour for colour in COLOURS if colour in pair), str(pair))


def _colour(value: str) -> str:
    return next((colour for colour in COLOURS if colour in value), value)


def alike(one: str, other: str) -> bool:
    """Whether the token set ratio of two texts is above :data:`ALIKE`, as thefuzz computes it."""
    from rapidfuzz.fuzz import token_set_ratio
    from rapidfuzz.utils import default_process

    one, other = one.translate(_LATIN1), other.translate(_LATIN1)
    return round(token_set_ratio(one, other, processor=default_process)) > ALIKE
