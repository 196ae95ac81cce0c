"""The shop's pages: what they show, what can be clicked on them, and where a click leads.

Invariants: a page is a function of a :class:`State` and the goal's instruction; texts are those of
the original's observation mode "text", pieces joined by " [SEP] ". Blank texts appear where they do
there (its HTML parser drops blanks that hold a line break and keeps the others). Labels are matched
in lower case, and a label that occurs twice means its last occurrence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from agentdistill.envs.webshop.catalogue import Catalogue
from agentdistill.envs.webshop.formats import Product

PER_PAGE = 10
BACK, PREVIOUS, NEXT, BUY = "Back to Search", "< Prev", "Next >", "Buy Now"
SUB_PAGES = ("Description", "Features", "Reviews")
ATTRIBUTES = "Attributes"
PAGES_KEPT = 128

_ACTION = re.compile(r"(.+)\[(.+)\]")
_SPACES = " \n\t\f\r"
_UNSAFE = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&'"}


@dataclass(frozen=True, slots=True)
class State:
    """Where the shopper is.

    Attributes:
        page: "search", "results", "item", a name of :data:`SUB_PAGES`, ATTRIBUTES, or "done".
        query: the last search.
        number: page of results, from 1.
        row: the product that is open, or was bought; -1 for none.
        options: (name, value) pairs that were clicked for it.
        reward: what the purchase earned.
    """

    page: str = "search"
    query: str = ""
    number: int = 1
    row: int = -1
    options: tuple[tuple[str, str], ...] = ()
    reward: float = 0.0


@dataclass(frozen=True, slots=True)
class Page:
    """What a page shows below the instruction, and its labels: label → option name or ""."""

    text: str
    labels: dict[str, str]


class Shop:
    """The pages of one catalogue; has no state of its own but what it remembers."""

    def __init__(self, catalogue: Catalogue, show_attributes: bool = False) -> None:
        """Serve ``catalogue``; ``show_attributes`` adds the page of that name, as upstream."""
        self.catalogue = catalogue
        self._subs = (*SUB_PAGES, ATTRIBUTES) if show_attributes else SUB_PAGES
        self._item = lru_cache(PAGES_KEPT)(self._item_page)
        self._found = lru_cache(PAGES_KEPT)(self._results_page)

    def show(self, state: State, instruction: str) -> str:
        """The observation."""
        if state.page == "done":
            return self._receipt(state)
        if state.page == "search":
            return _joined(["WebShop", "Instruction:", instruction, "Search"])
        head = _joined(["Instruction:", instruction, BACK])
        body = self._page(state).text
        return f"{head} [SEP] {body}" if body else head

    def labels(self, state: State) -> dict[str, str]:
        """What can be clicked, in the order of the page: label → option name or ""."""
        if state.page == "done":
            return {}
        if state.page == "search":
            return {"search": ""}
        return self._page(state).labels

    def _page(self, state: State) -> Page:
        if state.page == "results":
            return self._found(state.query, state.number)
        if state.page == "item":
            return self._item(state.row)
        product = self.catalogue.product(state.row)
        labels = {BACK.lower(): "", PREVIOUS.lower(): ""}
        return Page(_joined([PREVIOUS, *_details(product, state.page)]), labels)

    def act(self, state: State, action: str) -> State | None:
        """Where ``action`` leads; None if it is no action or nothing has that label.

        "buy now" leads to the page "done" without a reward: whoever knows the goal fills it in.
        A search works on every page, as in the original.
        """
        match = _ACTION.match(action)
        if match is None or state.page == "done":
            return None
        verb, argument = match[1], match[2].lower()
        if verb == "search":
            return State("results", argument)
        if verb == "click" and argument != "search":
            labels = self.labels(state)
            return self._click(state, argument, labels[argument]) if argument in labels else None
        return None

    def _click(self, state: State, label: str, option: str) -> State:
        if label == BUY.lower():
            return replace(state, page="done")
        if label == BACK.lower():
            return State()
        if state.page == "results":
            if label in (NEXT.lower(), PREVIOUS.lower()):
                return replace(state, number=state.number + (1 if label == NEXT.lower() else -1))
            row = self.catalogue.row(label.upper())
            return state if row is None else replace(state, page="item", row=row)
        if label == PREVIOUS.lower():
            if state.page == "item":
                return State("results", state.query, state.number)
            return replace(state, page="item")
        sub = next((name for name in self._subs if name.lower() == label), None)
        if sub is not None:
            return replace(state, page=sub)
        chosen = {**dict(state.options), option: label}
        return replace(state, options=tuple(chosen.items()))

    # -- single pages ------------------------------------------------------------------------------

    def _results_page(self, query: str, number: int) -> Page:
        rows = self.catalogue.search(query)
        shown = rows[(number - 1) * PER_PAGE : number * PER_PAGE]
        buttons = [PREVIOUS, NEXT] if number > 1 else [NEXT]
        pieces = [f"Page {number} (Total results: {len(rows)})", *buttons]
        labels = dict.fromkeys([BACK.lower(), *map(str.lower, buttons)], "")
        for row in shown:
            summary = self.catalogue.summary(row)
            pieces += summary
            labels[summary[0].lower()] = ""
        return Page(_joined(pieces), labels)

    def _item_page(self, row: int) -> Page:
        product = self.catalogue.product(row)
        pieces = [PREVIOUS]
        labels = [BACK, PREVIOUS, *self._subs, BUY]
        options = {}
        for name, values in product.options.items():
            pieces += [name, *values]
            options.update(dict.fromkeys(values, name))
        pieces += [product.title, f"Price: {product.price_tag}", "Rating: N.A.", *self._subs, BUY]
        return Page(_joined(pieces), {**dict.fromkeys(map(str.lower, labels), ""), **options})

    def _receipt(self, state: State) -> str:
        asin = self.catalogue.product(state.row).asin
        chosen = json.dumps(dict(state.options), sort_keys=True).translate(_UNSAFE)
        text = (
            f"Thank you for shopping with us!|Your code:|None|(Paste it in your MTurk interface.)"
            f"|Purchased|asin|{asin}|options|\0|attrs|None|category|None|query|None"
            "|product category|None|Target|asin|options|attrs|price upper|instuction text|category"
            "|product category|query|Goal|None|Reward|Your score (min 0.0, max 1.0)"
            f"|{state.reward}|Reward Details|None"
        )
        return text.replace("|", " [SEP] ").replace("\0", chosen)


def _details(product: Product, page: str) -> Iterable[str]:
    """What a page below a product's own shows."""
    if page == "Description":
        return [product.description]
    if page == "Features":
        return [f" {bullet}" for bullet in product.bullets]
    if page == ATTRIBUTES:
        about = [product.category, product.query, product.product_category]
        return [*(f" {attribute}" for attribute in product.attributes), *about]
    return []


def _joined(texts: Iterable[str]) -> str:
    """The texts as the original's parser leaves them, joined."""
    kept = (text for text in texts if text and (text.strip(_SPACES) or "\n" not in text))
    return " [SEP] ".join(text.strip() for text in kept)


@lru_cache(maxsize=8)
def shop(catalogue: Catalogue, show_attributes: bool) -> Shop:
    """The shop of ``catalogue``; environments of one process share it."""
    return Shop(catalogue, show_attributes)
