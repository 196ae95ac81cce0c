"""What tokens cost: prices from the configuration, else from the table that litellm ships.

Invariants: money is a :class:`~decimal.Decimal` in whatever currency the prices are in (litellm's
table: US dollars), and nothing here rounds. A model that nobody priced has no price, never the
price 0. litellm is not imported and nothing is downloaded: its table is read as the file that lies
beside its code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agentdistill.errors import ConfigError
from agentdistill.records import Usage

CONFIGURED = "configuration"
"""Where a price comes from that the user gave."""

_TABLE = "model_prices_and_context_window_backup.json"
_TIER = re.compile(r"input_cost_per_token_above_(\d+)(k?)_tokens")
_MILLION = 6


def amount(value: object, key: str) -> Decimal:
    """``value`` as exact money: a float counts as the number that it is written as.

    Raises:
        ConfigError: not a number, negative or not finite.
    """
    try:
        found = Decimal(str(value))
    except InvalidOperation:
        found = Decimal("NaN")
    if not found.is_finite() or found < 0:
        raise ConfigError("give a number, at least 0", key=key, value=value)
    return found


def prompt_of(usage: Usage) -> int:
    """Tokens of the prompt, whatever became of them in the provider's cache."""
    return usage.input + usage.cache_read + usage.cache_write


@dataclass(frozen=True, slots=True)
class Price:
    """Money per million tokens of each class; numbers and text are taken, Decimals are kept.

    Attributes:
        input: prompt tokens that are in no cache.
        cache_write: prompt tokens that the provider put into its cache.
        cache_read: prompt tokens that it found there.
        output: answered tokens, thoughts included.
        above: prompts of more tokens than this cost ``long`` instead, all their tokens.
        long: that price.
    """

    input: Decimal
    cache_write: Decimal
    cache_read: Decimal
    output: Decimal
    above: int | None = None
    long: Price | None = None

    def __post_init__(self) -> None:
        """Take what is exact; refuse what is no price."""
        for name in ("input", "cache_write", "cache_read", "output"):
            object.__setattr__(self, name, amount(getattr(self, name), f"price.{name}"))
        if (self.above is None) != (self.long is None):
            raise ConfigError("above and long go together", key="price.above", value=self.above)

    def cost(self, usage: Usage) -> Decimal:
        """Money for ``usage``, exact."""
        if self.long is not None and self.above is not None and prompt_of(usage) > self.above:
            return self.long.cost(usage)
        total = (
            usage.input * self.input
            + usage.cache_write * self.cache_write
            + usage.cache_read * self.cache_read
            + usage.output * self.output
        )
        return total.scaleb(-_MILLION)

    def most(self, usage: Usage) -> Decimal:
        """No call of at most ``usage`` costs more, however its prompt divides into the classes."""
        prompt = max(self.input, self.cache_write, self.cache_read)
        here = (prompt_of(usage) * prompt + usage.output * self.output).scaleb(-_MILLION)
        if self.long is None or self.above is None or prompt_of(usage) <= self.above:
            return here
        return max(here, self.long.most(usage))


@dataclass(frozen=True, slots=True)
class Quote:
    """A price and who says so: ``configuration``, or litellm with its version."""

    price: Price
    source: str


class Prices:
    """Finds the price of a model."""

    def __init__(self, configured: Mapping[str, Price | None] | None = None) -> None:
        """``configured`` goes before every table; None there: no table knows this model."""
        given = configured or {}
        self._found: dict[str, Quote | None] = {
            model: None if price is None else Quote(price, CONFIGURED)
            for model, price in given.items()
        }

    def find(self, model: str) -> Quote | None:
        """The price of ``model`` under the name that its engine uses; None if nobody knows it."""
        if model not in self._found:
            version, table = _litellm()
            entry = _entry(table, model)
            self._found[model] = None if entry is None else _quote(entry, f"litellm {version}")
        return self._found[model]

    def need(self, model: str) -> Quote:
        """The same.

        Raises:
            ConfigError: nobody knows it.
        """
        found = self.find(model)
        if found is None:
            raise unpriced(model)
        return found


def unpriced(model: str) -> ConfigError:
    """The refusal of a model without a price where money is limited."""
    return ConfigError(
        "nobody knows its price, and money is limited: give it a price (input, cache_write, "
        "cache_read and output per million tokens; 0 if it is free), or take the limit on money "
        "away",
        key="model",
        value=model,
    )


@lru_cache(maxsize=1)
def _litellm() -> tuple[str, dict[str, dict[str, Any]]]:
    """Version and table of the litellm that is installed; nothing where none is."""
    spec = find_spec("litellm")
    if spec is None or spec.origin is None:
        return "", {}
    path = Path(spec.origin).with_name(_TABLE)
    if not path.is_file():
        return "", {}
    return metadata.version("litellm"), json.loads(path.read_text("utf-8"), parse_float=Decimal)


def _entry(table: Mapping[str, dict[str, Any]], model: str) -> dict[str, Any] | None:
    """``provider/model`` is also listed as ``model``, with its provider inside the entry."""
    if model in table:
        return table[model]
    provider, _, name = model.partition("/")
    found = table.get(name, {})
    return found if found.get("litellm_provider") == provider else None


def _quote(entry: Mapping[str, Any], source: str) -> Quote | None:
    """None for what is not sold by the token, and for a zero that may mean "unknown"."""
    if not any(entry.get(name) for name in ("input_cost_per_token", "output_cost_per_token")):
        return None
    tiers = {int(n) * (1000 if k else 1): f"_above_{n}{k}_tokens" for n, k in _tiers(entry)}
    chain: tuple[int, Price] | None = None
    for above in sorted(tiers, reverse=True):
        chain = above, _read(entry, tiers[above], chain)
    return Quote(_read(entry, "", chain), source)


def _tiers(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = (_TIER.fullmatch(name) for name in entry)
    return [(match[1], match[2]) for match in found if match]


def _read(entry: Mapping[str, Any], tier: str, then: tuple[int, Price] | None) -> Price:
    """The price of one tier; what a tier does not name costs what it costs below."""

    def per_million(*names: str) -> Decimal:
        for key in (key for name in names for key in (name + tier, name)):
            if entry.get(key) is not None:
                return Decimal(entry[key]).scaleb(_MILLION)
        return Decimal(0)

    plain = "input_cost_per_token"
    output = per_million("output_cost_per_token")
    thought = per_million("output_cost_per_reasoning_token")
    above, long = then or (None, None)
    return Price(
        input=per_million(plain),
        cache_write=per_million("cache_creation_input_token_cost", plain),
        cache_read=per_million("cache_read_input_token_cost", plain),
        output=max(output, thought),  # thoughts are not told apart: never less than the bill
        above=above,
        long=long,
    )
