"""A provider on this machine: speaks OpenAI's chat completions over HTTP, and misbehaves on demand.

``Provider(move)`` asks ``move(number, payload)`` what to do with each request, in the order of
their arrival; a list is a script, whose last move is repeated. It keeps what it was asked and what
it would bill, so that a test can compare both with what the caller believes.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from agentdistill.records import Usage
from tests.doubles import LocalServer


@dataclass(frozen=True)
class Move:
    """What to do with one request.

    ``fault``: "" answers; ``hang`` never does; ``drop`` closes without a byte; ``tear`` closes in
    the middle of the answer; ``cut`` sends JSON that ends early; ``garble`` sends no JSON;
    ``alien`` sends JSON of another kind; ``refuse`` sends ``status``.
    ``usage``: what it says was used; None says nothing, ``True`` what it really bills.
    """

    text: str | Sequence[str] = "right"
    fault: str = ""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = "no"
    reasoning: str = ""
    calls: Sequence[Mapping[str, Any]] = ()
    finish: str = "stop"
    usage: Any = True
    bills: Usage = Usage(input=10, output=3)
    after: float = 0.0
    raw: Mapping[str, Any] | None = None
    """The whole answer, in whatever format."""
    most: int | None = None
    """Choices that one answer has at most, whatever ``n`` says."""


def call(name: str, arguments: str, identity: str = "c1") -> dict[str, Any]:
    """A native tool call."""
    function = {"name": name, "arguments": arguments}
    return {"id": identity, "type": "function", "function": function}


Moves = Callable[[int, dict[str, Any]], Move]


class Provider(LocalServer):
    """Use as a context manager; ``url`` is its base URL."""

    def __init__(self, moves: Moves | Sequence[Move] = (Move(),)) -> None:
        script = moves if callable(moves) else list(moves)
        self._moves: Moves = (
            script if callable(script) else lambda number, _: script[min(number, len(script) - 1)]
        )
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.times: list[float] = []
        self.billed: list[Usage] = []
        self.at_once = self._now = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()

    @property
    def url(self) -> str:
        return f"{self.root}/v1"

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        super().__exit__(*exception)

    def serve(self, http: BaseHTTPRequestHandler, body: bytes) -> None:
        payload = json.loads(body)
        with self._lock:
            number = len(self.asked)
            self.asked.append(payload)
            self.keys.append(http.headers.get("Authorization", ""))
            self.times.append(time.monotonic())
            self._now += 1
            self.at_once = max(self.at_once, self._now)
        try:
            self._do(http, payload, self._moves(number, payload))
        finally:
            with self._lock:
                self._now -= 1

    def _do(self, http: BaseHTTPRequestHandler, payload: dict[str, Any], move: Move) -> None:
        self._ended.wait(move.after)
        if move.fault == "hang":
            self._ended.wait(30)
        if move.fault in ("hang", "drop"):
            return self._leave(http)
        if move.fault == "refuse":
            error = {"error": {"message": move.message, "type": "refused", "code": move.status}}
            return self._send(http, move.status, json.dumps(error).encode(), move.headers)
        with self._lock:
            self.billed.append(move.bills)
        body = json.dumps(self._answer(payload, move)).encode()
        if move.fault == "garble":
            body = b"<html>gateway</html>"
        if move.fault == "alien":
            body = b'{"choices": [{"words": null}], "usage": {}}'
        if move.fault == "cut":
            body = body[: len(body) // 2]
        size = len(body)
        if move.fault == "tear":
            body = body[: size // 2]
        self._send(http, 200, body, move.headers, size)
        if move.fault == "tear":
            self._leave(http)

    def _leave(self, http: BaseHTTPRequestHandler) -> None:
        http.close_connection = True
        http.wfile.flush()
        http.connection.shutdown(socket.SHUT_RDWR)

    def _send(
        self,
        http: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: Mapping[str, str],
        size: int | None = None,
    ) -> None:
        http.send_response(status)
        http.send_header("Content-Type", "application/json")
        http.send_header("Content-Length", str(len(body) if size is None else size))
        for name, value in headers.items():
            http.send_header(name, value)
        http.end_headers()
        http.wfile.write(body)

    def _answer(self, payload: dict[str, Any], move: Move) -> Mapping[str, Any]:
        if move.raw is not None:
            return move.raw
        texts = [move.text] if isinstance(move.text, str) else list(move.text)
        number = min(int(payload.get("n") or 1), move.most or 1_000)
        message: dict[str, Any] = {"role": "assistant"}
        if move.reasoning:
            message["reasoning_content"] = move.reasoning
        if move.calls:
            message["tool_calls"] = list(move.calls)
        choices = [
            {
                "index": index,
                "message": {**message, "content": texts[index % len(texts)]},
                "finish_reason": move.finish,
            }
            for index in range(number)
        ]
        answer = {"id": "a", "object": "chat.completion", "created": 1, "choices": choices}
        answer["model"] = payload["model"]
        if move.usage is True:
            answer["usage"] = told(move.bills)
        elif move.usage is not None:
            answer["usage"] = move.usage
        return answer


def told(usage: Usage) -> dict[str, Any]:
    """``usage`` as OpenAI writes it: cached tokens are part of the prompt's."""
    prompt = usage.input + usage.cache_read + usage.cache_write
    return {
        "prompt_tokens": prompt,
        "completion_tokens": usage.output,
        "total_tokens": prompt + usage.output,
        "prompt_tokens_details": {"cached_tokens": usage.cache_read},
    }
