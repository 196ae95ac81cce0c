"""Who is answered, and when: the application behind the socket.

Invariants
----------
* A request is refused before its body is read where that is known: a wrong key, a foreign host, a
  full or a closing server, a body that says it is too long.
* Whatever happens, the client gets one answer with OpenAI's body, and the place of the request is
  free again before that is sent.
* An answer is complete before its first byte is sent, also of a stream: a cascade decides at the
  end, and errors keep their status.
* A client that leaves ends the work for it. Nothing is kept between requests.
* Without a key only this machine is answered, and no web page that somebody reads on it: foreign
  names in ``Host`` and bodies that a form can send are refused.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from agentdistill.engines.base import Engine, Sampling
from agentdistill.errors import StoreError
from agentdistill.records import Json
from agentdistill.serving.protocol import (
    FIELD,
    ApiError,
    Asked,
    api_error,
    completion,
    events,
    headers,
    read,
)
from agentdistill.serving.recording import Recording

_LOG = logging.getLogger("agentdistill.serving")
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client can ask for.

    Attributes:
        body: bytes of a request.
        seconds: for a whole request, its body included.
        concurrency: requests at once; more are told to come again.
    """

    body: int = 4 << 20
    seconds: float = 600.0
    concurrency: int = 64


class Serving:
    """One policy as an application; ``app`` is for any ASGI server."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        key: str | None = None,
        limits: Limits = Limits(),
        recording: Recording | None = None,
    ) -> None:
        """Nothing listens yet.

        Args:
            engine: answers messages.
            name: of the policy; the model that clients ask for.
            sampling: what a request does not say.
            key: what clients must send as a bearer token; None asks for none.
            limits: see there.
            recording: where exchanges go.
        """
        self.engine, self.name, self.sampling = engine, name, sampling
        self.limits, self.recording = limits, recording
        self.draining = self.abandoned = False
        self._key, self._since = key, int(time.time())
        self._tasks: set[asyncio.Task[Any]] = set()
        self._places = 0
        self._unrecorded = 0
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", _answering(self._chat), methods=["POST"]),
                Route("/v1/models", _answering(self._models)),
                Route("/v1/models/{name:path}", _answering(self._models)),
                Route("/health", self._health),
            ],
            exception_handlers={HTTPException: _not_here},
        )

    @property
    def busy(self) -> int:
        """Requests that are being answered."""
        return self._places

    def drain(self) -> None:
        """From now on refuse what is new; what has begun goes on."""
        self.draining = True

    def abandon(self) -> None:
        """End what has begun, too."""
        self.draining = self.abandoned = True
        for task in self._tasks:
            task.cancel()

    # -- routes ------------------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        """Whether it takes requests; needs no key."""
        said = {"status": "draining" if self.draining else "ok", "busy": self.busy}
        if self.recording is not None:
            said["not_recorded"] = self._unrecorded
        return JSONResponse(said, 503 if self.draining else 200)

    async def _models(self, request: Request) -> Response:
        """The policy as the only model."""
        self._admit(request)
        model = {"id": self.name, "object": "model", "created": self._since, "owned_by": FIELD}
        wanted = request.path_params.get("name")
        if wanted is None:
            return JSONResponse({"object": "list", "data": [model]})
        self._known(wanted)
        return JSONResponse(model)

    async def _chat(self, request: Request) -> Response:
        """One answer."""
        self._admit(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "send the body as application/json")
        async with self._place():
            async with asyncio.timeout(self.limits.seconds):
                asked = read(await self._body(request), self.sampling)
                self._known(asked.model)
                answer = await self._while_there(request, self._answer(asked))
        if answer is None:
            return Response(status_code=499)  # nobody reads it
        self._record(asked, answer)
        if not asked.stream:
            return JSONResponse(answer, headers=headers(answer))
        stream = _listed(events(answer, with_usage=asked.with_usage))
        quiet = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        said = {**headers(answer), **quiet}
        return StreamingResponse(stream, headers=said, media_type="text/event-stream")

    async def _answer(self, asked: Asked) -> dict[str, Json]:
        samples = await self.engine.chat(
            asked.messages, asked.sampling, n=asked.n, tools=asked.tools, seed=asked.seed
        )
        identity, created = uuid.uuid4().hex[:24], int(time.time())
        return completion(asked, samples, name=self.name, identity=identity, created=created)

    # -- who is answered ---------------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        """Refuse a wrong key; without one, a foreign host."""
        if self._key is None:
            if _host(request) not in _LOCAL:
                remedy = "only this machine is answered without a key; serve with --key-env"
                raise ApiError(403, remedy, kind="permission_error", code="foreign_host")
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1"), self._key.encode())
        if scheme.lower() != "bearer" or not same:
            raise ApiError(
                401,
                "wrong or missing key; send it as Authorization: Bearer KEY",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _known(self, model: str) -> None:
        if model != self.name:
            remedy = f"no model {model!r} here; ask for {self.name!r}"
            raise ApiError(404, remedy, param="model", code="model_not_found")

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """One of the places, while the block runs."""
        if self.draining:
            raise ApiError(
                503,
                "the server is going down",
                kind="server_error",
                code="draining",
                headers={"Retry-After": "1"},
            )
        if self._places >= self.limits.concurrency:
            raise ApiError(
                429,
                f"{self._places} requests are being answered, and no more at once",
                kind="rate_limit_error",
                code="server_full",
                headers={"Retry-After": "1"},
            )
        self._places += 1
        try:
            yield
        finally:
            self._places -= 1

    async def _body(self, request: Request) -> bytes:
        """The body, if it is not too long."""
        most, parts, size = self.limits.body, list[bytes](), 0
        said = request.headers.get("content-length", "")
        if said.isdigit() and int(said) > most:
            raise _too_long(most)
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise _too_long(most)
            parts.append(part)
        return b"".join(parts)

    async def _while_there(
        self, request: Request, work: Coroutine[Any, Any, dict[str, Json]]
    ) -> dict[str, Json] | None:
        """What ``work`` gives; None if the client leaves before, which ends it."""
        task, gone = asyncio.create_task(work), asyncio.create_task(_left(request))
        self._tasks.add(task)
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                return None
            if task.cancelled():
                raise ApiError(503, "the server went down", kind="server_error", code="draining")
            return task.result()
        finally:
            self._tasks.discard(task)
            for each in (task, gone):
                each.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await each

    def _record(self, asked: Asked, answer: dict[str, Json]) -> None:
        """Write the exchange down; the answer, which is paid, goes out even if that fails."""
        if self.recording is None:
            return
        try:
            self.recording.add(asked.said, answer, answer["created"])
        except StoreError as error:
            self._unrecorded += 1
            _LOG.error("not recorded: %s", error)


def _host(request: Request) -> str:
    """Whom the client believes to talk to, as it says it (``request.url`` mends what is odd)."""
    said: str = request.headers.get("host", "localhost")  # none: HTTP/1.0, so no browser
    return said[1 : said.find("]")] if said.startswith("[") else said.partition(":")[0]


def _too_long(most: int) -> ApiError:
    return ApiError(413, f"the body is longer than {most} bytes", code="body_too_long")


def _answering(handler: Handler) -> Handler:
    """``handler`` with every error as an answer."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except Exception as error:
            said = api_error(error)
            if said.status == 500:
                _LOG.error("an answer failed", exc_info=error)
            return JSONResponse(said.body, said.status, headers=said.headers)

    return answer


async def _not_here(request: Request, error: Exception) -> Response:
    """Paths and methods that are none."""
    status = getattr(error, "status_code", 404)
    message = f"{request.method} {request.url.path}: there is no such thing here"
    said = ApiError(status, message, code="unknown_url")
    return JSONResponse(said.body, status, headers=getattr(error, "headers", None))


async def _left(request: Request) -> None:
    """Returns when the client has gone; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _listed(parts: Any) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
