"""A web server on this machine that can do what real ones do: ranges, drops, errors, pages."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Site:
    """What the server answers, and what it was asked.

    Attributes:
        files: path → content.
        ranges: whether it honours Range.
        cut: bytes of a body after which it drops the connection, by the number of the request.
        status: answers instead of the file, by the number of the request.
        shift: added to the start of every range that it sends.
        length: whether it says how long the body is.
        answer: asked first; a page (content type, body) instead of the file.
        gate: waits for this before the second half of a body.
        asked: path and Range header of every request.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    cut: dict[int, int] = field(default_factory=dict)
    status: dict[int, int] = field(default_factory=dict)
    shift: int = 0
    length: bool = True
    answer: Callable[[str], tuple[str, bytes] | None] = lambda path: None
    gate: threading.Event | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        site, number = self.site, len(self.site.asked)
        wanted = self.headers.get("Range")
        site.asked.append((self.path, wanted))
        self.close_connection = True
        if page := site.answer(self.path):
            self._head(200, {"Content-Type": page[0], "Content-Length": str(len(page[1]))})
            self.wfile.write(page[1])
            return
        body = site.files.get(self.path)
        if body is None or number in site.status:
            self._head(site.status.get(number, 404), {"Content-Length": "0"})
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and site.ranges else 0
        if start >= len(body) and start:
            self._head(416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"})
            return
        self._send(body, start, bool(wanted and site.ranges), site.cut.get(number))

    def _send(self, body: bytes, start: int, part: bool, cut: int | None) -> None:
        sent_from = start + self.site.shift if part else start
        rest = body[sent_from:]
        headers = {"Content-Type": "application/octet-stream"}
        if self.site.length:
            headers["Content-Length"] = str(len(rest))
        if part:
            headers["Content-Range"] = f"bytes {sent_from}-{len(body) - 1}/{len(body)}"
        self._head(206 if part else 200, headers)
        if self.site.gate is not None:
            self.wfile.write(rest[: len(rest) // 2])
            self.wfile.flush()
            self.site.gate.wait(30)
            rest = rest[len(rest) // 2 :]
        self.wfile.write(rest[:cut])

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what some tests are about; anything else is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """Serve ``site`` on a free port of this machine; its ``url`` has no slash at the end."""
    handler = type("Handler", (_Handler,), {"site": site})
    server = _Server(("127.0.0.1", 0), handler)
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield site
    finally:
        if site.gate is not None:
            site.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


def start_of(header: str | None) -> int:
    """The first byte that a Range header asks for."""
    found = re.fullmatch(r"bytes=(\d+)-", header or "bytes=0-")
    assert found is not None
    return int(found[1])
