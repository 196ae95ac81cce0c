"""The reward of a purchase: cases worked out by hand from the original's rules."""

from __future__ import annotations

from typing import Any

import pytest

from agentdistill.envs.webshop import reward
from agentdistill.envs.webshop.formats import Product
from agentdistill.envs.webshop.goals import Goal


def product(**fields: Any) -> Product:
    given: dict[str, Any] = {
        "asin": "B1",
        "title": "Acme Wooden Tea Table",
        "category": "garden",
        "query": "tables",
        "product_category": "Home \u203a Tables \u203a Tea",
        "description": "Made by hand.",
        "bullets": ("Solid oak", "Easy to clean"),
        "prices": (20.0,),
        "options": {"color": ["dark oak", "steelblue"], "size": ["6 ft", "8 ft"]},
        "attributes": ("solid wood",),
        "instruction": None,
        "wanted": (),
    }
    return Product(**{**given, **fields})


GOAL = Goal("B1", "", ("solid wood", "easy"), {"color": "dark oak", "size": "8 ft"}, 30.0)
BEST = {"color": "dark oak", "size": "8 ft"}


@pytest.mark.parametrize(
    ("bought", "cost", "chosen", "total"),
    [
        (product(), 20.0, BEST, 1.0),
        (product(), 20.0, {}, 0.6),
        (product(), 30.01, BEST, 0.8),
        (product(attributes=(), bullets=("hard to clean",)), 20.0, BEST, 0.6),
        (product(attributes=("wood, solid",)), 20.0, BEST, 1.0),
        (product(), 20.0, {"color": "dark oak", "size": "6 ft"}, 0.8),
        (product(), 20.0, {"color": "dark pine", "size": "8 ft"}, 1.0),  # both are "dark"
        (product(title="Acme Wooden Tea Chair"), 20.0, BEST, 1.0),
        (product(title="A lamp"), 20.0, BEST, 0.0),
    ],
)
def test_reward(bought: Product, cost: float, chosen: dict[str, str], total: float) -> None:
    assert reward.judge(bought, cost, chosen, GOAL, product()).total == pytest.approx(total)


@pytest.mark.parametrize(
    ("title", "query", "path", "score"),
    [
        ("Acme Wooden Tea Table", "tables", "A \u203a B", 1.0),
        ("Acme Lamp", "lamps", "A \u203a B", 1.0),  # a quarter of the words
        ("Table, Wooden", "lamps", "A", 1.0),
        ("Lamp", "tables", "Home \u203a Tables", 0.0),
        ("The 't", "tables", "Home \u203a Tables", 0.0),
    ],
)
def test_type(title: str, query: str, path: str, score: float) -> None:
    bought = product(title=title, query=query, product_category=path)
    assert reward.type_score(bought, product()) == score


def test_type_by_shares_of_words() -> None:
    twelve = " ".join(f"word{letter}" for letter in "abcdefghijkl")
    meant = product(title=twelve.replace("word", "w"), query="a", product_category="A")
    for shared, same, score in [(1, False, 0.1), (2, False, 0.5), (2, True, 1.0), (3, False, 1.0)]:
        title = " ".join(meant.title.split()[:shared])
        bought = product(title=title, query="a" if same else "b", product_category="B")
        assert reward.type_score(bought, meant) == score


def test_two_steps_of_the_path_are_the_same_kind() -> None:
    meant = product(title="aa bb cc dd ee ff", query="a")
    paths = {"Home \u203a Tables": 1.0, "Home": 0.5, "Tables \u203a X \u203a Tea": 1.0}
    for path, score in paths.items():
        bought = product(title="aa", query="b", product_category=path)
        assert reward.type_score(bought, meant) == score


def test_a_colour_inside_a_word_cannot_be_met() -> None:
    goal = Goal("B1", "", ("solid wood",), {"color": "steelblue"}, 30.0)
    assert not reward.attainable(goal, product())
    assert reward.judge(product(), 20.0, {"color": "steelblue"}, goal, product()).options == 0
    asked = Goal("B1", "", ("solid wood",), ["steelblue"], 30.0)
    assert reward.attainable(asked, product())
    assert reward.attainable(GOAL, product())
