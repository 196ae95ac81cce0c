"""Models behind an API: where they are, what they cost, and the *name* of their key.

Invariant: no key is ever part of a configuration, nor of the error about one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Literal

from pydantic import Field, model_validator

from agentdistill.config.prompts import Section
from agentdistill.prices import Price

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
_KEY = re.compile(r"key|token|secret|password|auth|header", re.IGNORECASE)


class PriceConfig(Section):
    """What a model costs, per million tokens; numbers as text are exact."""

    input: Decimal = Field(ge=0)
    """Prompt tokens that are in no cache."""
    cache_write: Decimal | None = Field(None, ge=0)
    """Prompt tokens that the provider puts into its cache; None: as ``input``."""
    cache_read: Decimal | None = Field(None, ge=0)
    """Prompt tokens that it finds there; None: as ``input``."""
    output: Decimal = Field(ge=0)
    """Answered tokens, thoughts included."""

    def price(self) -> Price:
        """As a ledger has it."""
        write, read = (
            self.input if part is None else part for part in (self.cache_write, self.cache_read)
        )
        return Price(self.input, write, read, self.output)


class BudgetConfig(Section):
    """What a run may take from providers in all, before it stops; None is no limit.

    A limit holds before the call that would break it. The run keeps what it has paid for: raise
    the limit, repeat the command, and no answer is paid twice.
    """

    money: Decimal | None = Field(None, ge=0)
    """In the currency of the prices; every model that is called then needs one."""
    tokens: int | None = Field(None, ge=0)
    """Of prompts and answers together."""
    calls: int | None = Field(None, ge=0)
    """Requests, each retry counted."""
    wall_seconds: float | None = Field(None, ge=0)
    """How long the run may go on, over restarts."""
    working_seconds: float | None = Field(None, ge=0)
    """Sum over calls, without waits for the provider (rate limits, pauses before retries)."""


class ApiModel(Section):
    """A model behind an API, by text alone; it acts and is not trained."""

    kind: Literal["api"] = "api"
    model: str = Field(pattern=r"^[^/\s]+/\S+$")
    """litellm's name of it, ``provider/model``; ``openai/NAME`` with a ``base_url`` for any server
    that speaks OpenAI's protocol."""
    base_url: str | None = Field(None, pattern=r"^https?://[^\s@?#]+$")
    """Endpoint; None takes the provider's. Nothing secret belongs in it."""
    key_env: str | None = None
    """*Name* of the environment variable with the key. None sends no key to a ``base_url``, and
    without one leaves it to the variables that litellm knows for the provider."""
    native_tools: bool = False
    """Give the model the environment's actions as tools; it may still answer in text."""
    concurrency: int = Field(32, ge=1)
    """Requests at once."""
    timeout: float = Field(120.0, gt=0)
    """Seconds for one request."""
    retries: int = Field(6, ge=0)
    """Tries after the first, after 408, 409, 425, 429, 5xx, time-outs and broken connections."""
    retry_budget: float = Field(100.0, ge=0)
    """Retries of all requests together; every answer gives a tenth of one back."""
    price: PriceConfig | None = None
    """None takes it from the table that litellm ships."""

    @model_validator(mode="before")
    @classmethod
    def _no_keys(cls, values: Any) -> Any:
        return named_key(values, cls.model_fields) if isinstance(values, Mapping) else values


def named_key(values: Mapping[str, Any], known: Iterable[str]) -> Mapping[str, Any]:
    """``values``; refuses a key in the place of a name, in an error that does not repeat it."""
    name = values.get("key_env")
    named = name is None or (isinstance(name, str) and _VARIABLE.fullmatch(name))
    unknown = [str(key) for key in values if str(key) not in known]
    if not named or any(_KEY.search(key) for key in unknown):
        raise ValueError(
            "give the name of an environment variable, such as key_env: OPENAI_API_KEY, and "
            "put the key there; configurations are copied into runs"
        )
    if "@" in str(values.get("base_url")) or "?" in str(values.get("base_url")):
        raise ValueError("base_url holds a user or a query; give the key by key_env instead")
    return values
