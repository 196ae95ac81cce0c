"""The application, its errors, and what verbs share."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from agentdistill.errors import AgentDistillError, MissingExtraError

HELP = "Distil LLM tool-use agents: any environment, any teacher, any student, any method."

EPILOG = """\b
Exit codes:
    0  success
    1  a check failed
    2  bad configuration or usage
    3  a package is missing (the message has the install command)
    4  an environment or an engine failed
    5  the disk refused
    6  a limit of the budget would be broken; raise it and repeat the command
  130  interrupted; the same command goes on where it stopped
"""


class _Group(TyperGroup):
    """Turns the errors that users cause into one line and an exit code."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command."""
        try:
            return super().invoke(ctx)
        except AgentDistillError as error:
            message, code = " ".join(str(error).split()), error.exit_code
            _fail(ctx, type(error).__name__, message, code, f"error: {message}")
        except KeyboardInterrupt:
            message = "interrupted; the same command goes on where it stopped"
            _fail(ctx, "KeyboardInterrupt", message, 130, message)


def _fail(ctx: typer.Context, kind: str, message: str, code: int, line: str) -> None:
    print(line, file=sys.stderr)
    if ctx.meta.get("json"):
        document({"error": {"type": kind, "message": message, "exit_code": code}})
    raise typer.Exit(code)


app = typer.Typer(
    cls=_Group,
    name="agentdistill",
    help=HELP,
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _note_json(ctx: typer.Context, value: bool) -> bool:
    ctx.meta["json"] = ctx.meta.get("json", False) or value
    return value


def _show_version(value: bool) -> None:
    if value:
        from agentdistill import __version__

        print(f"agentdistill {__version__}")
        raise typer.Exit


Json = Annotated[
    bool,
    typer.Option("--json", callback=_note_json, help="Print one JSON document, nothing else."),
]
Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, such as stages.distil.lr=1e-3."),
]
EnvOptions = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="Option of the environment; repeatable."),
]


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


def document(value: Any) -> None:
    """Print ``value`` as JSON."""
    print(json.dumps(value, indent=1))


def need(feature: str, *packages: str) -> None:
    """Refuse ``feature`` when one of ``packages`` is not installed."""
    from importlib.util import find_spec

    if not all(find_spec(name) for name in packages):
        raise MissingExtraError(feature, "train")
