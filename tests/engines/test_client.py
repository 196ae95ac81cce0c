"""litellm on its own: what it calls when it is imported and used, and what it costs to have it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.provider import Provider

KEY = {"TEST_PROVIDER_KEY": "sk-0123456789abcdef"}
ALONE = """
import asyncio, os, socket, sys

asked = []

def guard(original):
    def call(*arguments, **options):
        host = arguments[1][0] if isinstance(arguments[1], tuple) else arguments[0]
        if host not in ("127.0.0.1", "localhost"):
            asked.append(host)
            raise OSError("blocked")
        return original(*arguments, **options)
    return call

socket.socket.connect = guard(socket.socket.connect)
lookup = socket.getaddrinfo

def resolve(host, *rest, **options):
    if host not in (None, "127.0.0.1", "localhost"):
        asked.append(host)
        raise OSError("blocked")
    return lookup(host, *rest, **options)

socket.getaddrinfo = resolve
from agentdistill.engines.base import Message, Sampling
from agentdistill.engines.litellm import LiteLLMEngine

engine = LiteLLMEngine("openai/small", base_url=sys.argv[1], key_env="TEST_PROVIDER_KEY")
(sample,) = asyncio.run(engine.chat([Message("user", "hi")], Sampling()))
print(sample.text, asked, os.environ.get("PLANTED"), sep="|")
"""


@pytest.mark.litellm
def test_nobody_else_is_called(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PLANTED=1\n")  # litellm reads this by default
    with Provider() as provider:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(ALONE), provider.url],
            cwd=tmp_path,
            env={**os.environ, **KEY, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.stdout.strip() == "right|[]|None", done.stderr


def test_importing_the_engine_does_not_import_litellm() -> None:
    code = "import sys, agentdistill.engines.litellm; print('litellm' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "False", done.stderr
