"""What tests of the server share: one that runs in a thread, and a plain client."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agentdistill.engines.base import Engine, Message, Sample, Sampling
from agentdistill.records import Usage
from tests.doubles import Offered, TextEngine

Answers = Callable[[Sequence[Message], int], Sample]


def said(text: str, **options: Any) -> Sample:
    """A sample that is only text."""
    stop = options.pop("stop", "stop")
    return Sample((), (), text, stop, usage=Usage(10, 5, 0, 3), **options)


class Scripted(TextEngine):
    """Answers messages as a function says; keeps what it was asked."""

    def __init__(
        self, answers: Answers | str = "right", *, name: str = "scripted", after: float = 0.0
    ) -> None:
        self._answers: Answers = (
            answers if callable(answers) else lambda messages, number: said(str(answers))
        )
        self.name, self.after, self.closed = name, after, False
        self.asked: list[dict[str, Any]] = []
        self.cancelled = 0

    async def draw(
        self, messages: Sequence[Message], sampling: Sampling, n: int, tools: Offered, seed: int
    ) -> list[Sample]:
        asked = {"messages": list(messages), "sampling": sampling, "n": n}
        self.asked.append({**asked, "tools": tools, "seed": seed})
        try:
            await asyncio.sleep(self.after)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return [self._answers(messages, number) for number in range(n)]

    async def close(self) -> None:
        self.closed = True


class Running:
    """A server in a thread; a context manager. ``url`` is its base URL."""

    def __init__(self, engine: Engine, name: str = "cascade", **options: Any) -> None:
        from agentdistill.serving.app import Serving
        from agentdistill.serving.server import listen

        self.serving = Serving(engine, name, **options)
        self._bound = listen("127.0.0.1", 0)
        self.port = int(self._bound.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._ready = threading.Event()
        self.failed: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        from agentdistill.serving.server import serve

        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            await serve(self.serving, self._bound, ready=self._ready.set)

        try:
            asyncio.run(main())
        except BaseException as error:
            self.failed = error
            self._ready.set()

    def __enter__(self) -> Running:
        self.thread.start()
        assert self._ready.wait(20) and self.failed is None
        return self

    def __exit__(self, *exception: object) -> None:
        self.serving.drain()
        self.thread.join(20)
        assert not self.thread.is_alive() and self.failed is None

    def call(self, action: Callable[[], None]) -> None:
        """``action`` in the server's loop, as a signal would do it."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(action)

    def ask(
        self, body: Any = None, *, path: str = "/v1/chat/completions", **options: Any
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON and headers of one request over a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            return exchange(connection, body, path=path, **options)
        finally:
            connection.close()


def exchange(
    connection: http.client.HTTPConnection,
    body: Any = None,
    *,
    path: str = "/v1/chat/completions",
    method: str = "",
    headers: Mapping[str, str] | None = None,
) -> tuple[int, Any, dict[str, str]]:
    """One request over ``connection``; bytes go as they are, everything else as JSON."""
    raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    kinds = {"Content-Type": "application/json"} if raw is not None else {}
    method = method or ("GET" if raw is None else "POST")
    connection.request(method, path, raw, {**kinds, **(headers or {})})
    answer = connection.getresponse()
    text = answer.read()
    found = {name.lower(): value for name, value in answer.getheaders()}
    kind = found.get("content-type", "")
    return answer.status, json.loads(text) if "json" in kind else text.decode(), found


def chat(*contents: str, model: str = "cascade", **options: Any) -> dict[str, Any]:
    """A request in which users and assistants take turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    return {"model": model, "messages": messages, **options}
