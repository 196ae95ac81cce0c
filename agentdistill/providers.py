"""The models behind an API of one run: their engines, what they cost, and what was answered.

Invariants: one engine per model, so that its limits hold for all who use it; nothing is written
before an engine is asked for; ledger and answers lie in the folder of the run, which goes on with
both.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from agentdistill.config import ApiModel, RunConfig, TrainStage
from agentdistill.errors import ConfigError
from agentdistill.ledger import Ledger, Price, SpendLimits
from agentdistill.prices import Prices
from agentdistill.request_cache import RequestCache
from agentdistill.spending import FILE

if TYPE_CHECKING:
    from agentdistill.engines.litellm import LiteLLMEngine

ANSWERS = "answers"
"""Folder of the request cache in that of the run."""


class Providers:
    """See the module docstring; :meth:`close` frees the ledger."""

    def __init__(self, config: RunConfig) -> None:
        """Nothing is opened."""
        self._config = config
        self._engines: dict[str, LiteLLMEngine] = {}

    def close(self) -> None:
        """Free the ledger; whoever goes on opens it again."""
        self._engines.clear()
        ledger = self.__dict__.pop("ledger", None)
        if ledger is not None:
            ledger.close()

    def engine(self, name: str) -> LiteLLMEngine:
        """The engine of the model called ``name``.

        Raises:
            ConfigError: its key is not set, nobody knows its provider, or prices contradict.
            MissingExtraError: litellm is not installed.
            StoreError: the disk refuses.
        """
        if name not in self._engines:
            answers = RequestCache(self._config.path / ANSWERS)
            self._engines[name] = self._engine(name, ledger=self.ledger, answers=answers)
        return self._engines[name]

    def check(self, name: str) -> None:
        """Refuse a model that could not be called; nothing is sent or written.

        Raises:
            ConfigError: see :meth:`engine`; or nobody priced it, and money is limited.
            MissingExtraError: litellm is not installed.
        """
        engine, prices = self._engine(name), Prices(self.prices())
        if self._config.budget.money is not None:
            prices.need(engine.model)

    def _engine(self, name: str, **kept: Any) -> LiteLLMEngine:
        from agentdistill.engines.litellm import LiteLLMEngine
        from agentdistill.engines.patience import Patience

        config = self._config.models[name]
        assert isinstance(config, ApiModel)
        return LiteLLMEngine(
            config.model,
            name=name,
            base_url=config.base_url,
            key_env=config.key_env,
            concurrency=config.concurrency,
            timeout=config.timeout,
            patience=Patience(config.retries, budget=config.retry_budget),
            **kept,
        )

    @cached_property
    def ledger(self) -> Ledger:
        """What was asked and paid.

        Raises:
            ConfigError: two entries give one model different prices.
            StoreError: the disk refuses.
        """
        limits = SpendLimits(**self._config.budget.model_dump())
        return Ledger(self._config.path / FILE, limits, self.prices())

    def spent(self) -> dict[str, float]:
        """What was spent so far, as metrics; nothing where no provider was called."""
        if "ledger" not in self.__dict__:
            return {}
        total, limits = self.ledger.total, self.ledger.limits
        found: dict[str, float] = {"spent/calls": total.calls, "spent/tokens": total.tokens}
        if total.money or limits.money is not None:
            found["spent/money"] = float(total.money)
        return found

    def prices(self) -> dict[str, Price | None]:
        """What the configuration says that models cost, for a ledger.

        None for one at an endpoint of its own: what a provider of that name takes says nothing.

        Raises:
            ConfigError: two entries give one model different prices.
        """
        found: dict[str, Price | None] = {}
        for name, config in self._config.models.items():
            if not isinstance(config, ApiModel) or (config.base_url, config.price) == (None, None):
                continue
            price = config.price.price() if config.price else None
            if found.setdefault(config.model, price) != price:
                raise ConfigError(
                    f"{config.model} has another price elsewhere", key=f"models.{name}.price"
                )
        return found

    def price(self, name: str) -> Price | None:
        """What the model or train stage ``name`` costs; None where nobody said.

        Only models behind an API have a price without one in the configuration: litellm's.
        """
        stage = next((s for s in self._config.stages if s.name == name), None)
        key = stage.model if isinstance(stage, TrainStage) else name
        config = self._config.models.get(key)
        if config is None:
            return None
        if config.price is not None:
            return config.price.price()
        found = Prices(self.prices()).find(config.model) if isinstance(config, ApiModel) else None
        return found.price if found else None
