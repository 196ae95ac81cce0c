"""Stand-ins for tests: an engine that only answers messages, and a server on this machine."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from agentdistill.engines.base import Capabilities, Engine, Message, Sample, Sampling
from agentdistill.errors import EngineError

Offered = Sequence[Mapping[str, Any]]


class TextEngine(Engine):
    """Answers messages, and takes no token ids."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(text=True)

    async def generate(self, ids: Any, sampling: Any, **options: Any) -> Sample:
        raise EngineError("text only")

    async def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        n: int = 1,
        tools: Offered = (),
        seed: int = 0,
    ) -> list[Sample]:
        return await self.draw(messages, sampling, n, tuple(tools), seed)

    @abstractmethod
    async def draw(
        self, messages: Sequence[Message], sampling: Sampling, n: int, tools: Offered, seed: int
    ) -> list[Sample]:
        """Answer ``n`` times."""


class LocalServer(ABC):
    """Serves HTTP in threads of its own while its block runs; ``root`` is its address."""

    root: str

    def __enter__(self) -> Self:
        serve = self.serve

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                serve(self, b"")

            def do_POST(self) -> None:
                serve(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that leave are what these tests are about

        self._server = Server(("127.0.0.1", 0), Handler)
        self.root = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @abstractmethod
    def serve(self, http: BaseHTTPRequestHandler, body: bytes) -> None:
        """Answer one request."""
