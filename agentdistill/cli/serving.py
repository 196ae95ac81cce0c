"""The verb that answers messages: serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentdistill.cli.base import Config, Overrides, app
from agentdistill.errors import MissingExtraError


@app.command()
def serve(
    config: Config,
    overrides: Overrides = None,
    policy: Annotated[
        str, typer.Option(help="A model, a train stage, or a key of policies.")
    ] = "student",
    host: Annotated[str, typer.Option(help="Others than this machine need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8321,
    key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Variable with the key that clients must send."),
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 4 << 20,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds of a request.")] = 600.0,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests at once; more are told to come again.")
    ] = 64,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append every exchange, for `agentdistill import`."),
    ] = None,
) -> None:
    """Answer OpenAI's chat completions by a policy, until SIGTERM or Ctrl-C."""
    from importlib.util import find_spec

    if not all(find_spec(name) for name in ("starlette", "uvicorn")):
        raise MissingExtraError("serving", "serve")
    import asyncio

    from agentdistill.config import load
    from agentdistill.engines.base import Sampling
    from agentdistill.engines.replies import guard
    from agentdistill.run import Run
    from agentdistill.serving import server
    from agentdistill.serving.app import Limits, Serving
    from agentdistill.serving.policies import engine_of
    from agentdistill.serving.recording import Recording

    key = server.read_key(key_env)
    if key_env is not None:
        guard(key_env)
    server.check_host(host, key)
    recording = Recording(record) if record is not None else None
    with Run(load(config, overrides or ())) as run:
        serving = Serving(
            engine_of(run, policy),
            policy,
            sampling=Sampling(**run.config.sampling.model_dump()),
            key=key,
            limits=Limits(max_body, timeout, concurrency),
            recording=recording,
        )
        bound = server.listen(host, port)
        name = f"[{host}]" if ":" in host else host
        where = f"http://{name}:{bound.getsockname()[1]}/v1"
        ready = f"serving {policy} at {where}; Ctrl-C ends it when all are answered"
        asyncio.run(server.serve(serving, bound, ready=lambda: print(ready, flush=True)))
