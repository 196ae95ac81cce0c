"""The verbs about models on servers: what models can do, and what a server is started from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentdistill.cli.base import Config, Json, app, document, need

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key; repeatable."),
]


@app.command()
def probe(
    config: Config,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Models or train stages; all models if none."),
    ] = None,
    ask: Annotated[
        bool,
        typer.Option(
            "--ask/--no-ask",
            help="Ask models behind an API one thing (a few tokens, booked in the run's ledger).",
        ),
    ] = True,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Find out by small requests what models can do: text, ids, log-probabilities and more."""
    from agentdistill import display, probing
    from agentdistill.config import load
    from agentdistill.run import Run

    need("probe", "torch", "transformers")
    loaded = load(config, overrides or ())
    with Run(loaded) as the_run:
        reports = probing.probe(the_run, models or list(loaded.models), ask=ask)
    if as_json:
        document([report.to_json() for report in reports])
        return
    display.show(probing.COLUMNS, [probing.cells(report) for report in reports], left=4)
    for report in reports:
        for remark in probing.remarks(report):
            print(remark)


@app.command("server-folder")
def server_folder(
    config: Config,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model, or a train stage.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="To be made.")],
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Write the folder that a vLLM server of MODEL is started from, and print the command."""
    from agentdistill.config import load
    from agentdistill.errors import ConfigError
    from agentdistill.run import Run
    from agentdistill.students import served

    need("server-folder", "torch", "transformers")
    if folder.exists():
        raise ConfigError("exists already; name another one", key="FOLDER", value=str(folder))
    with Run(load(config, overrides or ())) as the_run:
        found = the_run.model(model)
        command = served.write_folder(found.model, found.tokenizer, folder.absolute())
    if as_json:
        document({"folder": str(folder.absolute()), "command": command})
        return
    print(" ".join(command))
