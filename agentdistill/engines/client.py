"""litellm as it is used here: imported when needed, silent, and calling nobody by itself.

Invariants: importing it calls no network and reads no ``.env``; its loggers never print a key; it
sends a request of ours once; connections end with the event loop that they belong to.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import os
import sys
from collections.abc import AsyncGenerator, MutableMapping
from contextvars import ContextVar
from functools import cache
from typing import Any

from agentdistill.engines import replies
from agentdistill.errors import MissingExtraError

OURS: ContextVar[bool] = ContextVar("ours", default=False)
"""Whether this task is sending for an engine of ours."""

_LOGGERS = ("LiteLLM", "httpx", "openai._base_client")


@cache
def client() -> Any:
    """The module litellm, imported once and kept from calling anybody by itself.

    Raises:
        MissingExtraError: it is not installed.
    """
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION"}
    before = {name: os.environ.get(name) for name in quiet}
    os.environ.update(quiet)  # it reads them, and would call GitHub, while it is imported
    try:
        litellm: Any = importlib.import_module("litellm")
    except ModuleNotFoundError as error:
        raise MissingExtraError("a model behind an API", "api") from error
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    litellm.suppress_debug_info = True
    litellm.telemetry = False  # older versions
    litellm.disable_aiohttp_transport = True  # httpx says what broke, and closes what it opened
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_scrubbed)
    _send_once(importlib.import_module("litellm.llms.custom_httpx.http_handler").AsyncHTTPHandler)
    return litellm


def _send_once(handler: Any) -> None:
    """Keep litellm from sending a request of ours again by itself when a connection breaks.

    It does so for some providers, whatever ``max_retries`` says; the first may have been billed.
    """
    again = handler.single_connection_post_request

    async def unless_ours(self: Any, *arguments: Any, **options: Any) -> Any:
        error = sys.exc_info()[1]
        if OURS.get() and error is not None:
            raise error
        return await again(self, *arguments, **options)

    handler.single_connection_post_request = unless_ours


def _scrubbed(record: logging.LogRecord) -> bool:
    record.msg, record.args = replies.scrub(record.getMessage()), ()
    if record.exc_info:
        record.exc_text = replies.scrub(logging.Formatter().formatException(record.exc_info))
    return True


async def until_the_end(
    loop: asyncio.AbstractEventLoop,
    loops: MutableMapping[asyncio.AbstractEventLoop, Any],
) -> AsyncGenerator[None, None]:
    """Waits at its ``yield`` until ``loop`` ends, which closes it; then closes its connections.

    litellm keeps them by the loop's address, which the next loop may have again. ``loops`` forgets
    the loop, too.
    """
    try:
        yield
    finally:
        loops.pop(loop, None)
        kept, mine = client().in_memory_llm_clients_cache, f"-{id(loop)}"
        for key in [key for key in kept.cache_dict if str(key).endswith(mine)]:
            kept.ttl_dict.pop(key, None)
            connection = kept.cache_dict.pop(key, None)  # engines of one loop end side by side
            closed = None if connection is None else connection.close()
            if inspect.isawaitable(closed):
                await closed
