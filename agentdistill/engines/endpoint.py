"""An HTTP server of one's own, asked with httpx: bounded, with deadlines, errors in one line.

Invariants
----------
* Nothing but the configured URL is called; proxies and ``.netrc`` of the environment are ignored.
* A request is sent again only where that changes nothing: no connection was made, or it is *pure*
  (it asks, and the answer depends on nothing but the request and the weights).
* Connections belong to the event loop that opened them, and are closed when it ends.
* Whatever goes wrong is an :class:`~agentdistill.errors.EngineError` that names URL and remedy.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import weakref
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentdistill.engines.patience import Failure, Patience, asked_to_wait
from agentdistill.engines.replies import guard, scrub
from agentdistill.errors import ConfigError, EngineError, MissingExtraError

if TYPE_CHECKING:
    import httpx

_AGAIN = frozenset({429, 502, 503, 504})
_SHOWN = 300
_CONNECT = 10.0
"""Seconds for a connection; a server on the same network needs far fewer."""


def httpx_module() -> Any:
    """The package httpx.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import httpx
    except ModuleNotFoundError as error:
        raise MissingExtraError("a model on a vLLM server", "vllm") from error
    return httpx


@dataclass(slots=True, eq=False)
class _Open:
    """What belongs to one event loop."""

    client: httpx.AsyncClient
    gate: asyncio.Semaphore
    keeper: AsyncGenerator[None, None]


class ServerError(EngineError):
    """No answer, or a refusal.

    Attributes:
        said: what went wrong, without URL and remedy.
        status: of HTTP; None where nothing was answered.
    """

    def __init__(self, message: str, said: str, status: int | None = None) -> None:
        """``message`` is the whole line."""
        super().__init__(message)
        self.said, self.status = said, status

    def __reduce__(self) -> tuple[type[ServerError], tuple[str, str, int | None]]:
        """Errors travel between processes."""
        return type(self), (str(self), self.said, self.status)


class Endpoint:
    """One server; see the module docstring."""

    def __init__(
        self,
        url: str,
        *,
        key: str = "base_url",
        key_env: str | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        patience: Patience | None = None,
    ) -> None:
        """Nothing is sent.

        Args:
            url: of the server, with or without ``/v1``.
            key: what the configuration calls ``url``, for errors.
            key_env: environment variable with the server's key; None sends none.
            concurrency: requests in flight.
            timeout: seconds for one request, retries and waiting for a turn not included.
            patience: retries of pure requests.

        Raises:
            ConfigError: the variable is not set.
            MissingExtraError: httpx is not installed.
        """
        httpx_module()
        self.url, self._key = url.rstrip("/").removesuffix("/v1"), key
        self._key_env, self._timeout, self._concurrency = key_env, timeout, concurrency
        self._patience = patience or Patience(3, base=0.2, longest_jitter=5.0)
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Open]
        self._loops = weakref.WeakKeyDictionary()
        if key_env is not None:
            guard(key_env)
            if not os.environ.get(key_env):
                raise ConfigError("this variable is not set", key="key_env", value=key_env)

    def __repr__(self) -> str:
        """The URL; a key is only ever named."""
        return f"Endpoint({self.url!r})"

    async def ask(self, path: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        """POST a pure request and return its JSON answer.

        Raises:
            ServerError: the server says no, or no answer came, whatever was tried.
        """
        opened = await self._opened()
        async with opened.gate:
            await self._patience.ready()
            tried = 0
            while True:
                found = await self._once(opened.client, path, payload)
                tried += 1
                if not isinstance(found, Failure):
                    self._patience.answered({})
                    return found
                if not self._patience.another(found, tried):
                    raise self._error(path, found, tried)
                await self._patience.back_off(found, tried)

    async def _once(
        self, client: httpx.AsyncClient, path: str, payload: Mapping[str, Any]
    ) -> dict[str, Any] | Failure:
        try:
            async with asyncio.timeout(self._timeout):
                answer = await client.post(self.url + path, json=payload, headers=self._headers())
        except TimeoutError:
            # Nobody would read what a slow server still computes: asking again makes it slower.
            return Failure(None, f"no answer within {self._timeout:g} s", False)
        except httpx_module().TransportError as error:
            return Failure(None, _told(error), True)
        return _read(answer)

    def call(
        self,
        path: str,
        payload: Mapping[str, Any] | None = None,
        *,
        method: str = "POST",
        timeout: float | None = None,
    ) -> Any:
        """One request from synchronous code, which changes something: never sent again.

        Returns:
            The JSON answer, or its text where it is none.

        Raises:
            ServerError: the server says no, or no answer came.
        """
        httpx, seconds = httpx_module(), self._timeout if timeout is None else timeout
        limits = httpx.Timeout(seconds, connect=min(_CONNECT, seconds))
        try:
            with httpx.Client(trust_env=False, timeout=limits) as client:
                answer = client.request(
                    method, self.url + path, json=payload, headers=self._headers()
                )
        except httpx.TimeoutException:
            raise self._error(
                path, Failure(None, f"no answer within {seconds:g} s", False)
            ) from None
        except httpx.TransportError as error:
            raise self._error(path, Failure(None, _told(error), False)) from None
        if answer.is_success:
            try:
                return answer.json()
            except ValueError:
                return answer.text
        raise self._error(path, _refusal(answer))

    def wait(self, deadline: float, remedy: str = "") -> None:
        """Return once the server says that it is well.

        Args:
            deadline: seconds from now.
            remedy: how such a server is started.

        Raises:
            ServerError: it is not well by then; names the URL, the last answer and the remedy.
        """
        until, pause = time.monotonic() + deadline, 0.05
        while True:
            left = until - time.monotonic()
            try:
                self.call("/health", method="GET", timeout=max(0.2, min(5.0, left)))
                return
            except ServerError as error:
                last = error.said
            if time.monotonic() + pause >= until:
                line = f"{self.url} was not ready within {deadline:g} s: {last}; "
                line += f"{remedy or 'start the server'}, or correct {self._key}"
                raise ServerError(line, last)
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    # -- how --------------------------------------------------------------------------------------

    def _headers(self) -> dict[str, str]:
        """The key is in here, and nowhere else."""
        key = os.environ.get(self._key_env or "")
        return {"Authorization": f"Bearer {key}"} if key else {}

    async def _opened(self) -> _Open:
        """Of the running loop; its connections are closed when it ends."""
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            httpx = httpx_module()
            client = httpx.AsyncClient(
                trust_env=False,
                timeout=httpx.Timeout(None, connect=_CONNECT),
                limits=httpx.Limits(max_connections=self._concurrency),
            )
            keeper = self._until_the_end(loop, client)
            self._loops[loop] = _Open(client, asyncio.Semaphore(self._concurrency), keeper)
            await anext(keeper)  # a loop closes the generators that have begun
        return self._loops[loop]

    async def _until_the_end(
        self, loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient
    ) -> AsyncGenerator[None, None]:
        """Waits at its ``yield`` until ``loop`` ends, which closes it."""
        try:
            yield
        finally:
            self._loops.pop(loop, None)
            await client.aclose()

    def _error(self, path: str, fault: Failure, tried: int = 1) -> ServerError:
        """One line: which server, what it said, what to do."""
        tries = f" ({tried} tries)" if tried > 1 else ""
        said = fault.message if fault.status is None else f"{fault.status}: {fault.message}"
        line = f"{self.url}{path} failed{tries}: {said}; {self._remedy(fault)}"
        return ServerError(line, said, fault.status)

    def _remedy(self, fault: Failure) -> str:
        status = fault.status
        if status in (401, 403):
            return f"check the key in {self._key_env}" if self._key_env else "give key_env"
        if status == 404:
            return f"check {self._key} and the served name, and how the server was started"
        if status is not None and (status >= 500 or status in _AGAIN):
            return "look at the server's log"
        if status is not None:
            return "the server refuses this request"
        if "within" in fault.message:
            return "raise timeout, or lower concurrency"
        return f"check {self._key}, and that a server runs there"


def _told(error: BaseException) -> str:
    """What a broken connection says, in one line."""
    return scrub(f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": "))


def _read(answer: httpx.Response) -> dict[str, Any] | Failure:
    """The JSON of an answer, or why there is none."""
    if not answer.is_success:
        return _refusal(answer)
    try:
        found = json.loads(answer.content)
    except ValueError:
        return Failure(None, "an answer that is no JSON: is this a vLLM server?", False)
    if not isinstance(found, dict):
        return Failure(None, "an answer that is no JSON object: is this a vLLM server?", False)
    return found


def _refusal(answer: httpx.Response) -> Failure:
    """What a server says with an error, in one short line."""
    text = answer.text
    try:
        said = json.loads(text)
        error = said.get("error", said) if isinstance(said, dict) else said
        text = (
            str(error.get("message") or error.get("detail") or error)
            if isinstance(error, dict)
            else str(error)
        )
    except ValueError:
        pass  # whatever it is, it is shown
    line = scrub(" ".join(text.split()))
    line = line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"
    again = answer.status_code in _AGAIN
    wait = asked_to_wait(dict(answer.headers)) if again else None
    return Failure(answer.status_code, line or "no reason", again, wait=wait)
