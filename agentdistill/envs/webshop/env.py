"""WebShop as text: buy what a shopper asks for.

Invariants
----------
* Pages, search results, goals and rewards are those of the original in its observation mode
  "text"; what differs is in the card's notes and in docs/environments/webshop.md.
* A task's payload is the goal itself (:class:`~agentdistill.envs.webshop.goals.Goal`), so that its
  key is its content; ``index`` is its place in the original's order (its session number).
* The only reward is that of the purchase, which ends the episode; success is a reward of 1.
* An action that is none, or whose label is not on the page, shows the page again: ``valid`` false.
* Nothing is read or built before tasks are listed or an episode begins. Environments of one process
  share one catalogue; processes share its files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agentdistill.envs.base import Availability, Card, Moved, TextEnv
from agentdistill.envs.webshop import buyer, data, reward
from agentdistill.envs.webshop.formats import Product
from agentdistill.envs.webshop.goals import KINDS, SPLITS, Goal, mixed, places
from agentdistill.envs.webshop.pages import Shop, State, shop
from agentdistill.errors import ConfigError, MissingExtraError
from agentdistill.records import Task

ID = "agentdistill/WebShop-v0"

MAX_ACTION = 2000
"""Longer actions are invalid."""

INSTRUCTION = """\
You are shopping in a web shop. Find a product that fits the instruction, choose the options it \
asks for, and buy it: the reward says how well the purchase fits, and it ends the task.
Actions:
search[words] looks for products; click[label] follows what is on the page: a product's id, an \
option such as a size or a colour, Back to Search, < Prev, Next >, Description, Features, Reviews, \
Buy Now.
Upper and lower case are the same inside the brackets. Parts of a page are separated by [SEP]."""

NOTES = (
    "type match compares words of titles that are no stop words; the original asks spaCy for nouns",
    "prices within a range and price caps are drawn with seed 0; the original's are not seeded",
)

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def _tool(name: str, what: str, argument: str, meaning: str) -> dict[str, Any]:
    properties = {argument: {"type": "string", "description": meaning}}
    parameters = {
        "type": "object",
        "properties": properties,
        "required": [argument],
        "additionalProperties": False,
    }
    about = {"name": name, "description": what, "parameters": parameters}
    return {"type": "function", "function": about}


TOOLS = (
    _tool("search", "Look for products.", "keywords", "words to look for"),
    _tool("click", "Follow a label on the page.", "element", "the label, or a product's id"),
)


class WebShopEnv(TextEnv):
    """WebShop over the official files or a generated catalogue. See the module docstring."""

    def __init__(
        self,
        *,
        catalogue: str | Path = "auto",
        goals: str = "auto",
        products: int = 1000,
        catalogue_seed: int = 0,
        attainable: bool = False,
        show_attributes: bool = False,
        max_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Choose the catalogue; nothing is read yet.

        Args:
            catalogue: "generated"; a folder with the official files, or a products' file; "auto":
                the official files in ``$WEBSHOP_DATA``, or a generated catalogue without them.
            goals: "synthetic", "human" (needs items_human_ins.json), or "auto": human with the full
                catalogue where that file is, else synthetic (small catalogues have few human ones).
            products: size of a generated catalogue.
            catalogue_seed: seed of a generated catalogue.
            attainable: leave out goals for which the product that was meant cannot earn 1 (about
                6%: reward.py says why); the places of the others stay.
            show_attributes: have the page "Attributes" of a product, as an option upstream.
            max_steps: step limit; None is 15.
            render_mode: ``ansi`` or None.
        """
        super().__init__(
            max_steps=max_steps, render_mode=render_mode, actions=("click[buy now]", "search[red]")
        )
        kinds = ("auto", *KINDS)
        if goals not in kinds:
            raise ConfigError(f"one of {', '.join(kinds)}", key="goals", value=goals)
        if products < 1:
            raise ConfigError("must be at least 1", key="products", value=products)
        self._place, self._kind = catalogue, goals
        self._generated = products, catalogue_seed
        self._attainable, self._show = attainable, show_attributes
        self._state, self._goal = State("done"), Goal("", "", (), {}, 0.0)

    # -- facts ---------------------------------------------------------------------------------

    @cached_property
    def card(self) -> Card:
        """The facts; ``data`` is the hash of the official files or the generated catalogue's name.

        "" where a named catalogue is missing.
        """
        name, generated, files = "", False, None
        with suppress(ConfigError):  # what is wrong with the files is said when they are used
            files = self._official()
            generated = self._is_generated(files)
            name = files.data if files else data.generated_name(*self._generated) * generated
        kind = self._goals_of(files) + ", attainable only" * self._attainable
        return Card(
            id=ID,
            version="1",
            data=name,
            licence="Apache-2.0" if generated else "Apache-2.0 AND LicenseRef-WebShop-data",
            splits=SPLITS,
            step_limit=self._max_steps or 15,
            source="Yao et al., WebShop, NeurIPS 2022; princeton-nlp/WebShop (MIT)",
            roles={"tune": "dev", "report": "test"},
            notes=(*NOTES, f"goals: {kind}"),
            expert_rate=1.0 if self._attainable else None,
        )

    def _official(self) -> data.Files | None:
        """The official files, if they are there."""
        if self._place == "generated":
            return None
        return data.find(
            data.data_folder() if self._place == "auto" else Path(self._place).expanduser()
        )

    def _is_generated(self, files: data.Files | None) -> bool:
        return self._place == "generated" or (self._place == "auto" and files is None)

    def _goals_of(self, files: data.Files | None) -> str:
        """The kind of goals."""
        if self._kind != "auto":
            return self._kind
        if files is None or files.people is None:
            return "synthetic"
        return "human" if files.products.name == data.PRODUCTS[0] else "synthetic"

    @classmethod
    def availability(cls) -> Availability:
        """What is installed and what data is there."""
        from importlib import metadata

        folder = data.data_folder()
        names = (*data.PRODUCTS, data.PEOPLE)
        found = ", ".join(name for name in names if (folder / name).is_file())
        there = f"{found} in {folder}" if found else "generated (no official files)"
        missing = () if found else ("the official catalogue: agentdistill data webshop",)
        if find_spec("rapidfuzz") is None:
            return Availability("", there, missing, ("pip install 'agentdistill[webshop]'",))
        version = f"built in, rapidfuzz {metadata.version('rapidfuzz')}"
        return Availability(version, there, missing)

    @property
    def instruction(self) -> str:
        """The rules."""
        return INSTRUCTION

    @property
    def goal(self) -> str:
        """The shopper's request."""
        return self._goal.instruction

    @property
    def tools(self) -> list[dict[str, Any]]:
        """``search`` and ``click``."""
        return list(TOOLS)

    def tool_action(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The action behind a call of one of :attr:`tools`."""
        text = super().tool_action(name, arguments)
        known = next((tool["function"] for tool in TOOLS if tool["function"]["name"] == name), None)
        if known is None or list(arguments) != known["parameters"]["required"]:
            return text
        return f"{name}[{text}]"

    # -- tasks ---------------------------------------------------------------------------------

    @cached_property
    def _shop(self) -> Shop:
        """Opens the catalogue, which may have to be generated and indexed first."""
        from agentdistill.envs.webshop.catalogue import opened

        if find_spec("rapidfuzz") is None:
            raise MissingExtraError("the environment WebShop", "webshop")
        files = self._official()
        if files is None and not self._is_generated(files):
            remedy = "holds no items_shuffle*.json: agentdistill data webshop, or 'generated'"
            raise ConfigError(remedy, key="catalogue", value=str(self._place))
        return shop(opened(files or data.generated(*self._generated)), self._show)

    def tasks(self, split: str, seed: int = 0) -> Iterator[Task]:
        """The distinct goals of ``split`` (goals.places), in an order that ``seed`` decides.

        Raises ConfigError for an unknown split, and where there are no goals of the kind.
        """
        places(split, 0)
        return self._tasks(split, seed)

    def _tasks(self, split: str, seed: int) -> Iterator[Task]:
        kind = self._goals_of(self._official())
        goals = self._shop.catalogue.goals[kind]
        if not len(goals):
            remedy = f"the catalogue has none; 'human' needs {data.PEOPLE} beside the products"
            raise ConfigError(remedy, key="goals", value=kind)
        for place in mixed(places(split, len(goals)), seed):
            goal = goals[place]
            if not goals.repeats(place) and (not self._attainable or self._can_be_met(goal)):
                yield Task(ID, split, goal.to_json(), data=self.card.data, index=place)

    def _can_be_met(self, goal: Goal) -> bool:
        return reward.attainable(goal, self._product(goal.asin))

    def _product(self, asin: str) -> Product:
        catalogue = self._shop.catalogue
        row = catalogue.row(asin)
        if row is None:
            remedy = "the catalogue has no such product"
            raise ConfigError(remedy, key="task.payload.asin", value=asin)
        return catalogue.product(row)

    # -- an episode ----------------------------------------------------------------------------

    def _begin(self, task: Task) -> str:
        if task.data not in ("", self.card.data):
            remedy = f"the task is of another catalogue than this one, {self.card.data}"
            raise ConfigError(remedy, key="task.data", value=task.data)
        goal = Goal.from_json(task.payload)
        self._product(goal.asin)
        self._goal, self._state = goal, State()
        return self._shop.show(self._state, goal.instruction)

    def _advance(self, action: str) -> Moved:
        there = self._follow(action)
        if there is not None and there.page == "done":
            return self._buy(there)
        if there is not None:
            self._state = there
        observation = self._shop.show(self._state, self._goal.instruction)
        over, earned = self._state.page == "done", self._state.reward
        return Moved(observation, 0.0, over, earned == 1, earned, there is not None)

    def _follow(self, action: str) -> State | None:
        if len(action) > MAX_ACTION or _CONTROL.search(action):
            return None
        return self._shop.act(self._state, action)

    def _buy(self, state: State) -> Moved:
        catalogue = self._shop.catalogue
        bought, cost = catalogue.product(state.row), catalogue.cost(state.row)
        meant = self._product(self._goal.asin)
        parts = reward.judge(bought, cost, dict(state.options), self._goal, meant)
        self._state = replace(state, reward=parts.total)
        observation = self._shop.show(self._state, self._goal.instruction)
        extra = {"parts": asdict(parts)}
        total = parts.total
        return Moved(observation, total, True, total == 1, total, extra=extra)

    def _save(self) -> State:
        return self._state

    def _load(self, state: State) -> None:
        self._goal, self._state = Goal.from_json(self.task.payload), state

    # -- what can be done ----------------------------------------------------------------------

    def admissible(self) -> list[str]:
        """A click on every label; on the search page, a search for the words of the request.

        Any other search is valid as well, and on every page.
        """
        if self._state.page == "search":
            return [f"search[{buyer.request_words(self._goal)}]"]
        labels = self._shop.labels(self._state)
        return [f"click[{label}]" for label in labels if label and not _CONTROL.search(label)]

    def expert_action(self) -> str | None:
        """What the scripted buyer does now (buyer.py); it knows which product was meant."""
        return buyer.next_action(self._shop, self._state, self._goal)
