"""A scripted buyer: knows which product was meant, and does what an agent could do to buy it.

Invariants: it acts from any state, has no memory, and never loops. Its search is taken from the
request where that finds the product within three pages, so that its episodes can be imitated;
otherwise from the product's title. It does not reach a reward of 1 where nobody can: see reward.py.
"""

from __future__ import annotations

import re

from agentdistill.envs.webshop.goals import Goal
from agentdistill.envs.webshop.pages import BACK, BUY, NEXT, PER_PAGE, PREVIOUS, Shop, State
from agentdistill.envs.webshop.reward import meets, wishes

NEAR = 3 * PER_PAGE
"""Results to look through for a search that an agent could think of."""

_FAR = 1_000
_PRICE = re.compile(r", and price lower than [\d.]+ dollars$")
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


def next_action(shop: Shop, state: State, goal: Goal) -> str | None:
    """What to do now; None when it is too late or the product is not in the catalogue."""
    row = shop.catalogue.row(goal.asin)
    if row is None or state.page == "done":
        return None
    if state.page == "search":
        return f"search[{_query(shop, goal, row)}]"
    if state.page == "results":
        return _browse(shop, state, row)
    if state.row != row:
        return f"click[{BACK.lower()}]"
    if state.page != "item":
        return f"click[{PREVIOUS.lower()}]"
    label = _missing(shop.labels(state), state, goal)
    return f"click[{BUY.lower() if label is None else label}]"


def request_words(goal: Goal) -> str:
    """The request without its price and without "Find me": words to search for."""
    text = _PRICE.sub("", goal.instruction).removeprefix("Find me ")
    return _clean(text)


def _clean(text: str) -> str:
    return " ".join(_UNUSABLE.sub(" ", text).split())[:1000]


def _query(shop: Shop, goal: Goal, row: int) -> str:
    product = shop.catalogue.product(row)
    plain = _clean(" ".join([product.query, *goal.attributes]))
    tried = [request_words(goal), plain, _clean(product.title), _clean(product.document)]
    tried = [words for words in tried if words]
    ranks = [_rank(shop, words, row) for words in tried]
    near = next((words for words, r in zip(tried[:2], ranks, strict=False) if r < NEAR), None)
    return near or tried[ranks.index(min(ranks))]


def _rank(shop: Shop, words: str, row: int) -> int:
    found = shop.catalogue.search(words.lower())
    return found.index(row) if row in found else _FAR


def _browse(shop: Shop, state: State, row: int) -> str:
    """Towards the product among the results; back where it is not there."""
    rank = _rank(shop, state.query, row)
    if rank == _FAR:
        return f"click[{BACK.lower()}]"
    number = rank // PER_PAGE + 1
    if number == state.number:
        return f"click[{shop.catalogue.product(row).asin.lower()}]"
    return f"click[{NEXT.lower() if number > state.number else PREVIOUS.lower()}]"


def _missing(labels: dict[str, str], state: State, goal: Goal) -> str | None:
    """An option that is still to be chosen."""
    wanted: dict[str, str] = {}
    for value in _values(labels, goal):
        wanted[labels[value]] = value
    chosen = dict(state.options)
    return next((v for name, v in wanted.items() if chosen.get(name) != v), None)


def _values(labels: dict[str, str], goal: Goal) -> list[str]:
    """The labels that meet the goal's options: the very words first, else what comes near."""
    asked = goal.options.values() if isinstance(goal.options, dict) else goal.options
    options = [label for label, name in labels.items() if name and label]
    found = []
    for words, wish in zip(asked, wishes(goal), strict=True):
        same = words.lower() if labels.get(words.lower()) and words else None
        if same is None or not meets(same, wish):
            same = next((label for label in options if meets(label, wish)), same)
        if same is not None:
            found.append(same)
    return found
