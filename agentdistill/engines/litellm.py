"""Models behind an API: text in, text out, through litellm.

Invariants
----------
* Nothing but the configured endpoint is called: litellm is imported without its download of prices,
  without reading ``.env``, and with its own retries, fallbacks and cache off.
* A key is known by the name of its environment variable only. It is read when a request is sent;
  errors, logs, answers and ``repr`` have the name instead.
* Every request that is sent is a call of the ledger, each retry a call of its own. One that may
  have been answered without the answer arriving counts with the most that it can have cost.
* An answer in the request cache is not asked for again.
"""

from __future__ import annotations

import asyncio
import copy
import os
import time
import weakref
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from agentdistill.engines import replies
from agentdistill.engines.base import Capabilities, Engine, Message, Sample, Sampling
from agentdistill.engines.client import OURS, client, until_the_end
from agentdistill.engines.patience import Failure, Patience
from agentdistill.engines.replies import Reply
from agentdistill.errors import ConfigError, EngineError, UnfitError
from agentdistill.records import Json, Usage, digest

if TYPE_CHECKING:
    from agentdistill.ledger import Call, Ledger
    from agentdistill.request_cache import RequestCache

_NO_KEY = "none"
"""Sent where no key is configured for a base URL: litellm would send the key of another service."""

_EMPTY = "(empty)"
"""Some providers refuse a message without text."""


@dataclass(slots=True, eq=False)
class _Turns:
    """What belongs to one event loop: how many requests are in flight, and who tidies up."""

    gate: asyncio.Semaphore
    keeper: AsyncGenerator[None, None]


class LiteLLMEngine(Engine):
    """One model of one provider; see the module docstring."""

    def __init__(
        self,
        model: str,
        *,
        name: str = "",
        base_url: str | None = None,
        key_env: str | None = None,
        concurrency: int = 32,
        timeout: float = 120.0,
        patience: Patience | None = None,
        role: str = "student",
        ledger: Ledger | None = None,
        answers: RequestCache | None = None,
    ) -> None:
        """Nothing is sent.

        Args:
            model: litellm's name of it, ``provider/model``.
            name: what errors and trajectories call it; "" takes ``model``.
            base_url: endpoint; None takes the provider's.
            key_env: environment variable that holds the key; None sends none to a ``base_url``, and
                leaves it to litellm where there is no ``base_url``.
            concurrency: requests in flight.
            timeout: seconds for one request.
            patience: retries; shared by engines on one account.
            role: as what the ledger books its calls.
            ledger: keeps the limits on spending.
            answers: what was answered before.

        Raises:
            ConfigError: the provider is unknown, or the variable is not set.
            MissingExtraError: litellm is not installed.
        """
        self.model, self.name, self.role = model, name or model, role
        self.ledger, self.answers = ledger, answers
        self._base_url, self._key_env, self._timeout = base_url, key_env, timeout
        self._concurrency, self._patience = concurrency, patience or Patience()
        self._shared = {"one by one": False}
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Turns]
        self._loops = weakref.WeakKeyDictionary()
        if key_env is not None:
            replies.guard(key_env)
            if not os.environ.get(key_env):
                raise ConfigError("this variable is not set", key="key_env", value=key_env)
        self._takes = self._supported()
        self._shared["one by one"] = "n" not in self._takes

    def _supported(self) -> frozenset[str]:
        """Names of the parameters that this model takes."""
        litellm = client()
        try:
            litellm.get_llm_provider(self.model)
            return frozenset(litellm.get_supported_openai_params(self.model) or ())
        except litellm.exceptions.BadRequestError:
            raise ConfigError(
                "no provider of this name; write provider/model as litellm does, such as "
                "openai/NAME for any server that speaks OpenAI's protocol",
                key="model",
                value=self.model,
            ) from None

    def __repr__(self) -> str:
        """Model and endpoint; a key is only ever named."""
        return f"LiteLLMEngine({self.model!r}, base_url={self._base_url!r})"

    @property
    def capabilities(self) -> Capabilities:
        """Text only."""
        missing = [name for name in ("seed", "n", "tools") if name not in self._takes]
        notes = tuple(f"the provider takes no {name}" for name in missing)
        return Capabilities(text=True, notes=notes)

    def in_role(self, role: str) -> LiteLLMEngine:
        """The same engine, limits and connections included, booked as ``role``."""
        other = copy.copy(self)
        other.role = role
        return other

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int = 0, session: str | None = None
    ) -> Sample:
        """Not possible: an API takes no token ids."""
        raise EngineError(f"{self.name} answers in text over an API and takes no token ids")

    async def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        n: int = 1,
        tools: Sequence[Mapping[str, Any]] = (),
        seed: int = 0,
    ) -> list[Sample]:
        """See :meth:`Engine.chat`; one request where the provider takes ``n``, else several.

        Raises:
            EngineError: no answer came, whatever was tried.
            BudgetError: the ledger has no room for this request.
        """
        if n < 1:
            raise ValueError(f"n={n}: at least 1")
        ask = partial(self._samples, messages, sampling, tools)
        found = [] if n > 1 and self._shared["one by one"] else await self._together(ask, n, seed)
        missing = range(len(found), n)
        if missing:  # the paid ones of a batch that fails are in the cache
            rest = await asyncio.gather(
                *(ask(1, seed + number) for number in missing), return_exceptions=True
            )
            for some in rest:
                if isinstance(some, BaseException):
                    raise some
                found += some
        return found[:n]

    async def _together(self, ask: Any, n: int, seed: int) -> list[Sample]:
        """``n`` samples in one request, or as many as come; none where it takes no ``n``."""
        try:
            found: list[Sample] = await ask(n, seed)
        except _RefusedError as error:
            if n == 1 or error.status not in (400, 422):
                raise
            found = []
        if len(found) < n:
            self._shared["one by one"] = True
        return found

    async def _samples(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        tools: Sequence[Mapping[str, Any]],
        n: int,
        seed: int,
    ) -> list[Sample]:
        payload = self._payload(messages, sampling, tools, n, seed)
        most = replies.worst_case(messages, tools, n, sampling.max_tokens)
        if self.answers is None:
            return (await self._paid(payload, messages, most)).samples()

        async def ask() -> Json:
            return (await self._paid(payload, messages, most)).to_json()

        key = digest({**payload, "base_url": self._base_url, "answer to": seed}, 64)
        found, _ = await self.answers.answer(key, ask)
        return Reply.of_json(found).samples()

    def _payload(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        tools: Sequence[Mapping[str, Any]],
        n: int,
        seed: int,
    ) -> dict[str, Json]:
        """The request, without keys."""
        if tools and "tools" not in self._takes:
            raise UnfitError(f"{self.name} takes no tools; let it answer in text")
        payload: dict[str, Any] = {
            "model": self.model,
            "messages": [_written(message) for message in messages],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
        }
        if sampling.top_p != 1 or self._base_url is not None:
            payload["top_p"] = sampling.top_p  # a server of one's own has defaults of its own
        if sampling.top_k:
            payload["top_k"] = sampling.top_k
        if "seed" in self._takes:
            payload["seed"] = seed % 2**31
        if n > 1:
            payload["n"] = n
        if tools:
            payload["tools"] = [dict(tool) for tool in tools]
        return payload

    async def _paid(
        self, payload: Mapping[str, Json], messages: Sequence[Message], most: Usage
    ) -> Reply:
        """Send until an answer comes or nothing more can be tried."""
        async with (await self._turns()).gate:
            waited, tried = await self._patience.ready(), 0
            while True:
                found = await self._once(payload, messages, most, waited, int(tried > 0))
                tried += 1
                if isinstance(found, Reply):
                    return found
                if not self._patience.another(found, tried):
                    raise _RefusedError(self.name, found, tried, self._key_env)
                waited = await self._patience.back_off(found, tried)

    async def _once(
        self,
        payload: Mapping[str, Json],
        messages: Sequence[Message],
        most: Usage,
        waited: float,
        retries: int,
    ) -> Reply | Failure:
        """Send one request, and book it."""
        began = time.monotonic()
        async with self._booked(most) as call:
            book = partial(_book, call, began=began, waited=waited, retries=retries)
            ours = OURS.set(True)
            try:
                async with asyncio.timeout(self._timeout):
                    answer = await client().acompletion(**payload, **self._how())
                reply = replies.read(answer.model_dump(), messages, most)
            except asyncio.CancelledError:
                book(most, error="cancelled")
                raise
            except Exception as error:  # whatever litellm makes of what a provider sends
                fault = replies.failure(error)
                kind = str(fault.status or ("lost" if fault.lost else "not sent"))
                book(most if fault.lost else None, error=kind)
                return fault
            finally:
                OURS.reset(ours)
            book(reply.usage)
        self._patience.answered(getattr(answer, "_response_headers", None) or {})
        return reply

    def _booked(self, most: Usage) -> AbstractAsyncContextManager[Call | None]:
        if self.ledger is None:
            return nullcontext()
        return self.ledger.call(self.role, self.model, most, seconds=self._timeout)

    def _how(self) -> dict[str, Any]:
        """How a request is sent; the key is in here, and nowhere else."""
        how: dict[str, Any] = {
            "timeout": self._timeout,
            "max_retries": 0,
            "num_retries": 0,
            "drop_params": False,
            "_skip_mcp_handler": True,  # it imports a package that litellm does not depend on
        }
        if self._base_url is not None:
            how |= {"base_url": self._base_url, "api_key": _NO_KEY}
        if self._key_env is not None:
            how["api_key"] = os.environ.get(self._key_env) or _NO_KEY
        return how

    async def _turns(self) -> _Turns:
        """Of the running loop; its connections are closed when it ends."""
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            keeper = until_the_end(loop, self._loops)
            self._loops[loop] = _Turns(asyncio.Semaphore(self._concurrency), keeper)
            await anext(keeper)  # a loop closes the generators that have begun
        return self._loops[loop]


class _RefusedError(EngineError):
    """A request that failed for good."""

    def __init__(self, name: str, fault: Failure, tried: int, key_env: str | None) -> None:
        self.status = fault.status
        super().__init__(replies.explain(name, fault, tried, key_env=key_env))


def _book(
    call: Call | None,
    usage: Usage | None,
    *,
    began: float,
    waited: float,
    retries: int,
    error: str | None = None,
) -> None:
    """Write down how a call ended; without ``usage`` it cost nothing."""
    if call is None:
        return
    if usage is None:
        call.waited, call.retries = waited, retries
        call.fail(error or "no answer")
        return
    seconds = waited + time.monotonic() - began
    call.settle(usage, seconds=seconds, waited=waited, retries=retries, error=error)


def _written(message: Message) -> dict[str, Any]:
    """A message as OpenAI writes it."""
    content = message.content or ("" if message.tool_calls else _EMPTY)
    written: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        written["tool_calls"] = [dict(call) for call in message.tool_calls]
    if message.tool_call_id:
        written["tool_call_id"] = message.tool_call_id
    return written
