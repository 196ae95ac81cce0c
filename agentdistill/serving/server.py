"""Listens, and goes down without losing an answer.

Invariants: the first SIGTERM or SIGINT refuses what is new (503) and lets what has begun finish,
which ``Limits.seconds`` bounds; the second one ends that, too. Another machine can only ask with
the key.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import uvicorn

from agentdistill.errors import ConfigError
from agentdistill.serving.app import Serving

_TICK = 0.02
_SENDING = 10
"""Seconds that clients have to take the last answers."""


def check_host(host: str, key: str | None) -> None:
    """Refuse to be reached from other machines by everybody.

    Raises:
        ConfigError: ``host`` is not this machine alone, and there is no key.
    """
    if key is None and not _loopback(host):
        remedy = "other machines could ask without a key; give one with --key-env, or 127.0.0.1"
        raise ConfigError(remedy, key="host", value=host)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_key(variable: str | None) -> str | None:
    """The key in the environment variable of this name; None for none.

    Raises:
        ConfigError: the variable is not set, or empty.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError("this variable is not set", key="key_env", value=variable)
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound; port 0 takes a free one.

    Raises:
        ConfigError: it cannot be.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        bound = socket.create_server((host, port), family=family, backlog=1024)
        # Connections inherit it; without it each answer waits 40 ms for an acknowledgement, as
        # asyncio sets it only on sockets that were made with a protocol.
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return bound
    except OSError as error:
        where = f"{host}:{port}"
        remedy = f"cannot listen there ({error.strerror or error}); choose another port"
        raise ConfigError(remedy, key="port", value=where) from error


async def serve(
    serving: Serving, bound: socket.socket, *, ready: Callable[[], Any] = lambda: None
) -> None:
    """Answer on ``bound`` until a signal comes, or :meth:`Serving.drain` is called.

    Signals are handled in the main thread only, where they arrive. ``ready`` is called when
    clients are answered.
    """
    server: Any = uvicorn.Server(
        uvicorn.Config(
            serving.app,
            access_log=False,
            backlog=1024,
            http="h11",
            lifespan="off",
            log_config=None,
            loop="asyncio",
            server_header=False,
            timeout_graceful_shutdown=_SENDING,
            timeout_keep_alive=75,
            ws="none",
        )
    )
    server.capture_signals = nullcontext  # its own handlers would not drain
    with _signals(serving):
        running = asyncio.create_task(server.serve(sockets=[bound]))
        told = False
        while not (running.done() or serving.abandoned or (serving.draining and not serving.busy)):
            if server.started and not told:
                told = True
                ready()
            await asyncio.sleep(_TICK)
        server.should_exit = True
        await running
    await serving.engine.close()


@contextmanager
def _signals(serving: Serving) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    def stop() -> None:
        (serving.abandon if serving.draining else serving.drain)()

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop)
    try:
        yield
    finally:
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(name)
